/*
 * Load, upgrade and unload of the NIF library, and its function table.
 *
 * The library's private data holds the one control thread. Code of the module that is
 * loaded anew shares it with the code before it; unload, when the last of them is purged,
 * joins the thread. Unload waits until no resource is left, so by then every node service
 * has been given up and has only its orderly stop to finish.
 */
#include "link.h"
#include "mesh.h"
#include "timer.h"

/* Changes with the NIFs and their arguments, so that a stale .so beside a newer .beam (or
 * the other way round) fails to load instead of misbehaving. In step with
 * meshx_node_nif.erl. */
#define ABI_VERSION 5

/* How long unload lets node services stop in order; it blocks a scheduler meanwhile. */
#define UNLOAD_GRACE_MS 500

/* Its address tells this build of the library from another one in the same VM. */
static const char build;

static bool open_types(ErlNifEnv *env) {
    ErlNifResourceFlags flags =
        (ErlNifResourceFlags)(ERL_NIF_RT_CREATE | ERL_NIF_RT_TAKEOVER);

    return socket_open_type(env, flags) && timer_open_type(env, flags) &&
           mesh_open_type(env, flags);
}

static bool is_version(ErlNifEnv *env, ERL_NIF_TERM load_info) {
    int version;

    return enif_get_int(env, load_info, &version) && version == ABI_VERSION;
}

/* meshx_node_nif.erl has words for what it returns. */
static int load(ErlNifEnv *env, void **priv_data, ERL_NIF_TERM load_info) {
    struct library *library;
    int code;

    if (!is_version(env, load_info)) {
        return MESHX_ECONFIG;
    }
    terms_init(env);
    if (!open_types(env)) {
        return MESHX_ECONFIG;
    }
    library = enif_alloc(sizeof *library);
    if (library == NULL) {
        return MESHX_ENOMEM;
    }
    library->build = &build;
    atomic_init(&library->users, 1);
    atomic_init(&library->occupied, false);
    code = meshx_loop_start(&library->loop);
    if (code != MESHX_OK) {
        enif_free(library);
        return code;
    }
    *priv_data = library;
    return 0;
}

/* NIFs called by the old code may be running: what they use must not change. So another
 * build, whose resources may look different, is refused; this one is all set up. */
static int upgrade(ErlNifEnv *env, void **priv_data, void **old_priv_data,
                   ERL_NIF_TERM load_info) {
    struct library *library = *old_priv_data;

    if (!is_version(env, load_info) || library->build != &build || !open_types(env)) {
        return -1;
    }
    atomic_fetch_add(&library->users, 1);
    *priv_data = library;
    return 0;
}

static void unload(ErlNifEnv *env, void *priv_data) {
    struct library *library = priv_data;

    (void)env;
    if (atomic_fetch_sub(&library->users, 1) == 1) {
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
    {"peer_socket", 1, nif_peer_socket, 0},
    {"close", 1, nif_close, 0},
    {"setopt", 3, nif_setopt, 0},
    {"getopt", 2, nif_getopt, 0},
    {"framing", 2, nif_framing, 0},
    {"low_water", 2, nif_low_water, 0},
    {"select", 1, nif_select, 0},
    {"await", 2, nif_await, 0},
    {"read", 1, nif_read, 0},
    {"write", 2, nif_write, 0},
    {"flush", 1, nif_flush, 0},
    {"tick", 1, nif_tick, 0},
    {"statistics", 1, nif_statistics, 0},
    {"timer", 0, nif_timer, 0},
    {"timer_start", 2, nif_timer_start, 0},
    {"mesh_open", 2, nif_mesh_open, 0},
    {"mesh_upstream", 6, nif_mesh_upstream, 0},
    {"mesh_link_up", 5, nif_mesh_link_up, 0},
    {"mesh_link_down", 2, nif_mesh_link_down, 0},
    {"mesh_info", 2, nif_mesh_info, 0},
    {"mesh_renew", 1, nif_mesh_renew, 0},
    {"mesh_drain", 1, nif_mesh_drain, 0},
    {"mesh_stop", 1, nif_mesh_stop, 0},
};

ERL_NIF_INIT(meshx_node_nif, functions, load, NULL, upgrade, unload)
