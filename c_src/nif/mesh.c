/*
 * The mesh resource: see mesh.h for the messages.
 *
 * Two objects: the resource, which Erlang holds and which has the core's handle, and the
 * listener of events, which the core holds until its release callback. Neither points to
 * the other, so they end in any order.
 */
#include "mesh.h"
#include "config.h"
#include <string.h>
#include <time.h>

/* Lines of the sidecar's output passed on in a second. The receiver's mailbox has no
 * bound, and the lease's renewals wait in it too. */
#define LINES_PER_SECOND 1000

static ErlNifResourceType *mesh_type;
static char lock_name[] = "meshx_mesh"; /* the NIF API takes no const name */

struct mesh {
    ErlNifMutex *lock;
    struct meshx_mesh *handle; /* NULL: given up; guarded by |lock| */
    ErlNifMonitor monitor;
};

/* Who gets the events. Control thread only after mesh_open. */
struct subscriber {
    struct library *library;
    ErlNifPid pid;
    ErlNifEnv *env; /* holds |tag| */
    ERL_NIF_TERM tag;
    time_t second;  /* the last one with output */
    unsigned lines; /* of output in it */
    uint64_t dropped;
};

/* ---- life ---- */

static void give_up(struct mesh *mesh) {
    struct meshx_mesh *handle;

    enif_mutex_lock(mesh->lock);
    handle = mesh->handle;
    mesh->handle = NULL;
    enif_mutex_unlock(mesh->lock);
    if (handle != NULL) {
        meshx_mesh_close(handle);
    }
}

static void on_destroy(ErlNifEnv *env, void *object) {
    struct mesh *mesh = object;

    (void)env;
    if (mesh->lock != NULL) {
        give_up(mesh);
        enif_mutex_destroy(mesh->lock);
    }
}

static void on_down(ErlNifEnv *env, void *object, ErlNifPid *pid,
                    ErlNifMonitor *monitor) {
    (void)env;
    (void)pid;
    (void)monitor;
    give_up(object);
}

bool mesh_open_type(ErlNifEnv *env, ErlNifResourceFlags flags) {
    ErlNifResourceTypeInit callbacks = {.dtor = on_destroy, .down = on_down};

    mesh_type = enif_open_resource_type_x(env, "meshx_mesh", &callbacks, flags, NULL);
    return mesh_type != NULL;
}

static struct mesh *mesh_get(ErlNifEnv *env, ERL_NIF_TERM term) {
    void *object;

    return enif_get_resource(env, term, mesh_type, &object) ? object : NULL;
}

/* ---- events ---- */

static ERL_NIF_TERM make_state(enum meshx_state state) {
    switch (state) {
    case MESHX_STATE_STARTING:
        return am_starting;
    case MESHX_STATE_READY:
        return am_ready;
    case MESHX_STATE_STOPPING:
        return am_stopping;
    case MESHX_STATE_STOPPED:
        break;
    }
    return am_stopped;
}

static ERL_NIF_TERM make_boolean(bool value) {
    return value ? am_true : am_false;
}

static ERL_NIF_TERM make_upstreams(ErlNifEnv *env, const struct meshx_info *info) {
    ERL_NIF_TERM list = enif_make_list(env, 0);

    for (size_t i = info->upstream_count; i-- > 0;) {
        const struct meshx_upstream_info *upstream = &info->upstreams[i];
        ERL_NIF_TERM keys[] = {am_node, am_service_name, am_port, am_applied};
        ERL_NIF_TERM values[] = {
            terms_text(env, upstream->node), terms_text(env, upstream->service_name),
            enif_make_uint(env, upstream->port), make_boolean(upstream->applied)};
        ERL_NIF_TERM map;
        enif_make_map_from_arrays(env, keys, values, 4, &map);
        list = enif_make_list_cell(env, map, list);
    }
    return list;
}

static ERL_NIF_TERM make_info(ErlNifEnv *env, const struct meshx_info *info) {
    const struct {
        ERL_NIF_TERM key;
        ERL_NIF_TERM value;
    } fields[] = {
        {am_state, make_state(info->state)},
        {am_service_id, terms_text(env, info->service_id)},
        {am_service_name, terms_text(env, info->service_name)},
        {am_agent, terms_text(env, info->agent)},
        {am_listen_port, enif_make_uint(env, info->listen_port)},
        {am_sidecar_port, enif_make_uint(env, info->sidecar_port)},
        {am_sidecar_pid,
         info->sidecar_pid > 0 ? enif_make_int64(env, info->sidecar_pid) : am_undefined},
        {am_sidecar_accepts, make_boolean(info->sidecar_accepts)},
        {am_registered, make_boolean(info->registered)},
        {am_sidecar_starts, enif_make_uint64(env, info->sidecar_starts)},
        {am_registrations, enif_make_uint64(env, info->registrations)},
        {am_repairs, enif_make_uint64(env, info->repairs)},
        {am_requests, enif_make_uint64(env, info->requests)},
        {am_request_failures, enif_make_uint64(env, info->request_failures)},
        {am_upstreams, make_upstreams(env, info)},
        {am_last_failure, terms_failure(env, info->last_failure)},
    };
    ERL_NIF_TERM map = enif_make_new_map(env);

    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        enif_make_map_put(env, map, fields[i].key, fields[i].value, &map);
    }
    return map;
}

static ERL_NIF_TERM make_level(enum meshx_level level) {
    switch (level) {
    case MESHX_LEVEL_INFO:
        return am_info;
    case MESHX_LEVEL_NOTICE:
        return am_notice;
    case MESHX_LEVEL_WARNING:
        return am_warning;
    case MESHX_LEVEL_ERROR:
        break;
    }
    return am_error;
}

/* {Request, {ok, Value} | {error, {Code, Text}}}; |value| is used for success only. */
static ERL_NIF_TERM make_answer(ErlNifEnv *env, const struct meshx_event *event,
                                ERL_NIF_TERM value) {
    ERL_NIF_TERM result =
        event->failure != NULL
            ? enif_make_tuple2(env, am_error, terms_failure(env, event->failure))
            : enif_make_tuple2(env, am_ok, value);

    return enif_make_tuple2(env, enif_make_uint64(env, event->request), result);
}

static ERL_NIF_TERM make_type(enum meshx_event_type type) {
    switch (type) {
    case MESHX_EVENT_READY:
        return am_ready;
    case MESHX_EVENT_FAILED:
        return am_failed;
    case MESHX_EVENT_UPSTREAM:
        return am_upstream;
    case MESHX_EVENT_LINK_DENIED:
        return am_link_denied;
    case MESHX_EVENT_LINK_HEALTH:
        return am_link_health;
    case MESHX_EVENT_INFO:
        return am_info;
    case MESHX_EVENT_OUTPUT:
        return am_output;
    case MESHX_EVENT_LOG:
        return am_log;
    case MESHX_EVENT_DRAINED:
        return am_drained;
    case MESHX_EVENT_STOPPED:
        return am_stopped;
    }
    return am_undefined;
}

static ERL_NIF_TERM make_data(ErlNifEnv *env, const struct meshx_event *event) {
    switch (event->type) {
    case MESHX_EVENT_READY:
    case MESHX_EVENT_DRAINED:
        return enif_make_list(env, 0);
    case MESHX_EVENT_UPSTREAM:
        return make_answer(env, event,
                           enif_make_tuple3(env, event->direct ? am_direct : am_sidecar,
                                            terms_text(env, event->address),
                                            enif_make_uint(env, event->port)));
    case MESHX_EVENT_INFO:
        return make_answer(
            env, event, event->info != NULL ? make_info(env, event->info) : am_undefined);
    case MESHX_EVENT_OUTPUT:
        return enif_make_tuple2(env,
                                event->stream == MESHX_STDOUT ? am_stdout : am_stderr,
                                terms_text(env, event->text));
    case MESHX_EVENT_LOG:
        return enif_make_tuple2(env, make_level(event->level),
                                terms_text(env, event->text));
    case MESHX_EVENT_LINK_DENIED:
    case MESHX_EVENT_LINK_HEALTH:
        return enif_make_tuple2(env, enif_make_uint64(env, event->request),
                                event->type == MESHX_EVENT_LINK_HEALTH
                                    ? terms_text(env, event->text)
                                    : terms_failure(env, event->failure));
    case MESHX_EVENT_FAILED:
    case MESHX_EVENT_STOPPED:
        return terms_failure(env, event->failure);
    }
    return am_undefined;
}

static void send_event(struct subscriber *subscriber, const struct meshx_event *event) {
    ErlNifEnv *env = enif_alloc_env();

    if (env == NULL) {
        return; /* the emulator itself does not survive this for long */
    }
    /* A receiver that is gone is handled by the resource's monitor. */
    enif_send(NULL, &subscriber->pid, env,
              enif_make_tuple4(env, am_meshx_event, enif_make_copy(env, subscriber->tag),
                               make_type(event->type), make_data(env, event)));
    enif_free_env(env);
}

static bool is_flood(struct subscriber *subscriber) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    if (subscriber->second != now.tv_sec) {
        subscriber->second = now.tv_sec;
        subscriber->lines = 0;
    }
    return ++subscriber->lines > LINES_PER_SECOND;
}

/* Called by the core, on its control thread. */
static void on_event(const struct meshx_event *event, void *context) {
    struct subscriber *subscriber = context;

    if (event->type == MESHX_EVENT_OUTPUT && is_flood(subscriber)) {
        subscriber->dropped++;
        return;
    }
    if (subscriber->dropped > 0) {
        char text[128];
        enif_snprintf(text, sizeof text,
                      "the sidecar writes more than %d lines a second, %lu were dropped",
                      LINES_PER_SECOND, (unsigned long)subscriber->dropped);
        subscriber->dropped = 0;
        send_event(subscriber, &(struct meshx_event){.type = MESHX_EVENT_LOG,
                                                     .level = MESHX_LEVEL_WARNING,
                                                     .text = text});
    }
    send_event(subscriber, event);
}

static void on_release(void *context) {
    struct subscriber *subscriber = context;

    atomic_store(&subscriber->library->occupied, false);
    enif_free_env(subscriber->env);
    enif_free(subscriber);
}

/* ---- NIFs ---- */

/* mesh_open(Config, Tag) -> {ok, Mesh} | stopping | {error, {Code, Text}}
 * stopping: the VM's former node service has not ended. The two share a service ID and
 * nothing orders their requests, so its deregistration could hit the new one. */
ERL_NIF_TERM nif_mesh_open(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct library *library = enif_priv_data(env);
    struct config config = {0};
    struct meshx_failure failure = {.code = MESHX_ENOMEM, .text = "out of memory"};
    struct meshx_callbacks callbacks = {.event = on_event, .release = on_release};
    struct subscriber *subscriber = NULL;
    struct mesh *mesh = NULL;
    ERL_NIF_TERM culprit = am_undefined;
    ERL_NIF_TERM result;
    bool occupied = false;
    int rc;

    (void)argc;
    if (!atomic_compare_exchange_strong(&library->occupied, &occupied, true)) {
        return am_stopping;
    }
    if (!config_read(env, argv[0], &config, &culprit)) {
        char key[64] = "?";
        enif_get_atom(env, culprit, key, sizeof key, ERL_NIF_LATIN1);
        failure.code = MESHX_ECONFIG;
        enif_snprintf(failure.text, sizeof failure.text,
                      "configuration key %s is missing or of a wrong type", key);
        goto fail;
    }
    subscriber = enif_alloc(sizeof *subscriber);
    mesh = enif_alloc_resource(mesh_type, sizeof *mesh);
    if (mesh != NULL) {
        memset(mesh, 0, sizeof *mesh);
        mesh->lock = enif_mutex_create(lock_name);
    }
    if (subscriber == NULL || mesh == NULL || mesh->lock == NULL) {
        goto fail;
    }
    memset(subscriber, 0, sizeof *subscriber);
    subscriber->env = enif_alloc_env();
    if (subscriber->env == NULL) {
        goto fail;
    }
    subscriber->library = library;
    enif_self(env, &subscriber->pid);
    subscriber->tag = enif_make_copy(subscriber->env, argv[1]);
    if (enif_monitor_process(env, mesh, &subscriber->pid, &mesh->monitor) != 0) {
        goto fail;
    }
    callbacks.context = subscriber;
    rc = meshx_mesh_open(library->loop, &config.values, &callbacks, &mesh->handle,
                         &failure);
    if (rc != MESHX_OK) {
        failure.code = rc;
        goto fail;
    }
    result = enif_make_tuple2(env, am_ok, enif_make_resource(env, mesh));
    enif_release_resource(mesh);
    config_fini(&config);
    return result;

fail:
    atomic_store(&library->occupied, false);
    result = enif_make_tuple2(env, am_error, terms_failure(env, &failure));
    if (mesh != NULL) {
        enif_release_resource(mesh);
    }
    if (subscriber != NULL) {
        if (subscriber->env != NULL) {
            enif_free_env(subscriber->env);
        }
        enif_free(subscriber);
    }
    config_fini(&config);
    return result;
}

/* {error, stopped} or {error, out_of_memory} */
static ERL_NIF_TERM make_result(ErlNifEnv *env, int rc) {
    ERL_NIF_TERM code = enif_make_atom(env, meshx_error_name(rc));
    return rc == MESHX_OK ? am_ok : enif_make_tuple2(env, am_error, code);
}

/* Is |mode| {accept, Socket}? */
static bool get_socket(ErlNifEnv *env, ERL_NIF_TERM mode, unsigned *socket) {
    const ERL_NIF_TERM *pair;
    int arity;

    return enif_get_tuple(env, mode, &arity, &pair) && arity == 2 &&
           enif_get_uint(env, pair[1], socket);
}

static enum meshx_upstream_mode upstream_mode(ERL_NIF_TERM mode) {
    if (enif_is_identical(mode, am_find)) {
        return MESHX_UPSTREAM_FIND;
    }
    if (enif_is_identical(mode, am_redial)) {
        return MESHX_UPSTREAM_REDIAL;
    }
    return enif_is_identical(mode, am_ask) ? MESHX_UPSTREAM_ASK : MESHX_UPSTREAM_DIAL;
}

/* mesh_upstream(Mesh, Request, Node, ServiceId, ServiceName,
 *     dial | redial | ask | find | {accept, Socket}) -> ok | {error, Code} */
ERL_NIF_TERM nif_mesh_upstream(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct mesh *mesh = mesh_get(env, argv[0]);
    ErlNifUInt64 request;
    char *node = NULL;
    char *service_id = NULL;
    char *service_name = NULL;
    unsigned socket = 0;
    ERL_NIF_TERM result;
    int rc = MESHX_ESTOPPED;

    (void)argc;
    if (mesh == NULL || !enif_get_uint64(env, argv[1], &request) ||
        (node = terms_to_text(env, argv[2])) == NULL ||
        (service_id = terms_to_text(env, argv[3])) == NULL ||
        (service_name = terms_to_text(env, argv[4])) == NULL) {
        enif_free(node);
        enif_free(service_id);
        return enif_make_badarg(env);
    }
    enif_mutex_lock(mesh->lock);
    if (mesh->handle != NULL) {
        rc = get_socket(env, argv[5], &socket)
                 ? meshx_mesh_accept(mesh->handle, request, node, service_name, socket)
                 : meshx_mesh_upstream(mesh->handle, request, node, service_id,
                                       service_name, upstream_mode(argv[5]));
    }
    enif_mutex_unlock(mesh->lock);
    result = make_result(env, rc);
    enif_free(node);
    enif_free(service_id);
    enif_free(service_name);
    return result;
}

/* mesh_link_up(Mesh, Id, Node, ServiceName, dialed | accepted) -> ok | {error, Code} */
ERL_NIF_TERM nif_mesh_link_up(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct mesh *mesh = mesh_get(env, argv[0]);
    bool is_named = !enif_is_identical(argv[3], am_undefined);
    ErlNifUInt64 id;
    char *node = NULL;
    char *service_name = NULL;
    int rc = MESHX_ESTOPPED;

    (void)argc;
    if (mesh == NULL || !enif_get_uint64(env, argv[1], &id) ||
        (node = terms_to_text(env, argv[2])) == NULL ||
        (is_named && (service_name = terms_to_text(env, argv[3])) == NULL)) {
        enif_free(node);
        return enif_make_badarg(env);
    }
    enif_mutex_lock(mesh->lock);
    if (mesh->handle != NULL) {
        rc = meshx_mesh_link_up(mesh->handle, id, node, service_name,
                                enif_is_identical(argv[4], am_dialed));
    }
    enif_mutex_unlock(mesh->lock);
    enif_free(node);
    enif_free(service_name);
    return make_result(env, rc);
}

/* mesh_link_down(Mesh, Id) -> ok */
ERL_NIF_TERM nif_mesh_link_down(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct mesh *mesh = mesh_get(env, argv[0]);
    ErlNifUInt64 id;

    (void)argc;
    if (mesh == NULL || !enif_get_uint64(env, argv[1], &id)) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(mesh->lock);
    if (mesh->handle != NULL) {
        meshx_mesh_link_down(mesh->handle, id);
    }
    enif_mutex_unlock(mesh->lock);
    return am_ok;
}

/* mesh_info(Mesh, Request) -> ok | {error, Code} */
ERL_NIF_TERM nif_mesh_info(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct mesh *mesh = mesh_get(env, argv[0]);
    ErlNifUInt64 request;
    int rc = MESHX_ESTOPPED;

    (void)argc;
    if (mesh == NULL || !enif_get_uint64(env, argv[1], &request)) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(mesh->lock);
    if (mesh->handle != NULL) {
        rc = meshx_mesh_info(mesh->handle, request);
    }
    enif_mutex_unlock(mesh->lock);
    return make_result(env, rc);
}

/* Those that take the mesh alone and always succeed. */
static ERL_NIF_TERM simple(ErlNifEnv *env, ERL_NIF_TERM term,
                           void (*call)(struct meshx_mesh *)) {
    struct mesh *mesh = mesh_get(env, term);

    if (mesh == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(mesh->lock);
    if (mesh->handle != NULL) {
        call(mesh->handle);
    }
    enif_mutex_unlock(mesh->lock);
    return am_ok;
}

/* mesh_renew(Mesh) -> ok */
ERL_NIF_TERM nif_mesh_renew(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    (void)argc;
    return simple(env, argv[0], meshx_mesh_renew);
}

/* mesh_drain(Mesh) -> ok */
ERL_NIF_TERM nif_mesh_drain(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    (void)argc;
    return simple(env, argv[0], meshx_mesh_drain);
}

/* mesh_stop(Mesh) -> ok */
ERL_NIF_TERM nif_mesh_stop(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    (void)argc;
    return simple(env, argv[0], meshx_mesh_stop);
}
