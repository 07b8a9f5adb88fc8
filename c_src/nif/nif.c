/*
 * Load, upgrade and unload of the NIF library, and its function table.
 *
 * The library's private data holds the one control thread. An upgrade hands it over;
 * unload joins the thread. Unload waits until no resource is left, so by then every
 * node service has been given up and has only its orderly stop to finish.
 */
#include "link.h"
#include "mesh.h"

/* Changes with the arguments of any NIF, so that a stale .so beside a newer .beam (or the
 * other way round) fails to load instead of misbehaving. In step with meshx_node_nif.erl.
 */
#define ABI_VERSION 2

/* How long unload lets node services stop in order; it blocks a scheduler meanwhile. */
#define UNLOAD_GRACE_MS 500

static bool open_types(ErlNifEnv *env, ERL_NIF_TERM load_info) {
    ErlNifResourceFlags flags =
        (ErlNifResourceFlags)(ERL_NIF_RT_CREATE | ERL_NIF_RT_TAKEOVER);
    int version;

    if (!enif_get_int(env, load_info, &version) || version != ABI_VERSION) {
        return false;
    }
    terms_init(env);
    return socket_open_type(env, flags) && mesh_open_type(env, flags);
}

static int load(ErlNifEnv *env, void **priv_data, ERL_NIF_TERM load_info) {
    struct library *library;

    if (!open_types(env, load_info)) {
        return -1;
    }
    library = enif_alloc(sizeof *library);
    if (library == NULL) {
        return -1;
    }
    atomic_init(&library->occupied, false);
    if (meshx_loop_start(&library->loop) != MESHX_OK) {
        enif_free(library);
        return -1;
    }
    *priv_data = library;
    return 0;
}

static int upgrade(ErlNifEnv *env, void **priv_data, void **old_priv_data,
                   ERL_NIF_TERM load_info) {
    if (!open_types(env, load_info)) {
        return -1;
    }
    *priv_data = *old_priv_data;
    *old_priv_data = NULL;
    return 0;
}

static void unload(ErlNifEnv *env, void *priv_data) {
    struct library *library = priv_data;

    (void)env;
    if (library != NULL) { /* NULL: handed over by an upgrade */
        meshx_loop_stop(library->loop, UNLOAD_GRACE_MS);
        enif_free(library);
    }
}

static ErlNifFunc functions[] = {
    {"listen", 3, nif_listen, 0},
    {"accept", 2, nif_accept, 0},
    {"connect", 4, nif_connect, 0},
    {"connected", 1, nif_connected, 0},
    {"controlling_process", 2, nif_controlling_process, 0},
    {"address", 2, nif_address, 0},
    {"peer_uid", 1, nif_peer_uid, 0},
    {"close", 1, nif_close, 0},
    {"setopt", 3, nif_setopt, 0},
    {"getopt", 2, nif_getopt, 0},
    {"framing", 2, nif_framing, 0},
    {"read", 1, nif_read, 0},
    {"write", 2, nif_write, 0},
    {"flush", 1, nif_flush, 0},
    {"tick", 1, nif_tick, 0},
    {"statistics", 1, nif_statistics, 0},
    {"mesh_open", 2, nif_mesh_open, 0},
    {"mesh_upstream", 5, nif_mesh_upstream, 0},
    {"mesh_link_up", 5, nif_mesh_link_up, 0},
    {"mesh_link_down", 2, nif_mesh_link_down, 0},
    {"mesh_info", 2, nif_mesh_info, 0},
    {"mesh_renew", 1, nif_mesh_renew, 0},
    {"mesh_drain", 1, nif_mesh_drain, 0},
    {"mesh_stop", 1, nif_mesh_stop, 0},
};

ERL_NIF_INIT(meshx_node_nif, functions, load, NULL, upgrade, unload)
