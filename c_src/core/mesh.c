/*
 * The node service's public face: API for any thread, mailbox, events, birth and end. L4.
 *
 * A caller only leaves things in the handle (a request in the mailbox, a wish to drain or
 * stop, the time of the lease's renewal) and posts a mailbox run to the control thread.
 * Invariant: an accepted request is answered by exactly one event, since whoever finds
 * handle->loop NULL under the lock is refused, and mesh_finish() takes the mailbox in the
 * same moment in which it sets it NULL.
 */
#include "error.h"
#include "mesh_internal.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- events ---- */

void mesh_emit(struct mesh *mesh, const struct meshx_event *event) {
    mesh->callbacks.event(event, mesh->callbacks.context);
}

void mesh_log(struct mesh *mesh, enum meshx_level level, const char *format, ...) {
    char text[1200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    struct meshx_event event = {.type = MESHX_EVENT_LOG, .level = level, .text = text};
    mesh_emit(mesh, &event);
}

void mesh_note_failure(struct mesh *mesh, const struct meshx_failure *failure) {
    mesh->has_last_failure = true;
    mesh->last_failure = *failure;
}

void mesh_tell_failure(struct mesh *mesh) {
    if (mesh->start_failed && !mesh->failure_told) {
        struct meshx_event event = {.type = MESHX_EVENT_FAILED,
                                    .failure = &mesh->failure};
        mesh->failure_told = true;
        mesh_emit(mesh, &event);
    }
}

static void answer_info(struct mesh *mesh, uint64_t request) {
    struct meshx_event event = {.type = MESHX_EVENT_INFO, .request = request};
    struct meshx_failure failure;
    const struct meshx_config *config = &mesh->config.values;
    const struct mesh_registration *registration = &mesh->registration;
    size_t count = 0;
    struct meshx_upstream_info *upstreams =
        calloc(mesh->upstream_count + 1, sizeof *upstreams);
    if (upstreams == NULL) {
        error_set(&failure, MESHX_ENOMEM, "out of memory for the answer");
        event.failure = &failure;
        mesh_emit(mesh, &event);
        return;
    }
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        const struct mesh_upstream *upstream = &mesh->upstreams[i];
        if (upstream->departed) {
            continue;
        }
        upstreams[count++] = (struct meshx_upstream_info){
            .node = upstream->node,
            .service_name = upstream->service_name,
            .port = upstream->port,
            .applied = upstream->revision <= registration->applied};
    }
    struct consul_counts counts = consul_counts(mesh->consul);
    struct meshx_info info = {
        .state = mesh->state,
        .service_id = config->service_id,
        .service_name = config->service_name,
        .agent = mesh->config.endpoint.shown,
        .listen_port = config->listen_port,
        .sidecar_port = mesh->sidecar_port,
        .sidecar_pid = mesh->sidecar_pid,
        .sidecar_accepts = mesh->sidecar_accepts,
        .registered = registration->applied > 0 && registration->lost == 0 &&
                      registration->may_exist,
        .sidecar_starts = mesh->sidecar_starts,
        .registrations = mesh->registrations,
        .repairs = mesh->repairs,
        .requests = counts.requests,
        .request_failures = counts.failures,
        .upstreams = upstreams,
        .upstream_count = count,
        .last_failure = mesh->has_last_failure ? &mesh->last_failure : NULL};
    event.info = &info;
    mesh_emit(mesh, &event);
    free(upstreams);
}

/* ---- requests and the mailbox ---- */

struct mesh_request *mesh_request_new(enum mesh_request_kind kind, uint64_t id,
                                      const char *node, const char *service_name) {
    struct mesh_request *request = calloc(1, sizeof *request);
    if (request == NULL) {
        return NULL;
    }
    request->kind = kind;
    request->id = id;
    request->node = node != NULL ? strdup(node) : NULL;
    request->service_name = service_name != NULL ? strdup(service_name) : NULL;
    if ((node != NULL && request->node == NULL) ||
        (service_name != NULL && request->service_name == NULL)) {
        mesh_request_free(request);
        return NULL;
    }
    return request;
}

void mesh_request_free(struct mesh_request *request) {
    probe_cancel(request->probe);
    free(request->node);
    free(request->service_id);
    free(request->service_name);
    free(request);
}

static void free_requests(struct mesh_request *request) {
    while (request != NULL) {
        struct mesh_request *next = request->next;
        mesh_request_free(request);
        request = next;
    }
}

static void handle_unref(struct meshx_mesh *handle) {
    if (atomic_fetch_sub(&handle->references, 1) == 1) {
        pthread_mutex_destroy(&handle->lock);
        free(handle);
    }
}

static void append_request(struct meshx_mesh *handle, struct mesh_request *request) {
    if (handle->last != NULL) {
        handle->last->next = request;
    } else {
        handle->first = request;
    }
    handle->last = request;
}

static struct mesh_request *take_requests(struct meshx_mesh *handle) {
    struct mesh_request *first = handle->first;
    handle->first = NULL;
    handle->last = NULL;
    return first;
}

/* Takes over |request|. */
static void read_request(struct mesh *mesh, struct mesh_request *request) {
    switch (request->kind) {
    case MESH_REQUEST_DIAL:
    case MESH_REQUEST_ASK:
    case MESH_REQUEST_FIND:
    case MESH_REQUEST_ACCEPT:
        mesh_upstream_request(mesh, request);
        return;
    case MESH_REQUEST_INFO:
        answer_info(mesh, request->id);
        break;
    case MESH_REQUEST_LINK_UP:
        mesh_link_up(mesh, request);
        break;
    case MESH_REQUEST_LINK_DOWN:
        mesh_link_down(mesh, request->id);
        break;
    }
    mesh_request_free(request);
}

/* The node service has ended. */
static void refuse_request(struct mesh *mesh, struct mesh_request *request,
                           const struct meshx_failure *failure) {
    if (request->kind != MESH_REQUEST_LINK_UP &&
        request->kind != MESH_REQUEST_LINK_DOWN) {
        struct meshx_event event = {.type = request->kind == MESH_REQUEST_INFO
                                                ? MESHX_EVENT_INFO
                                                : MESHX_EVENT_UPSTREAM,
                                    .request = request->id,
                                    .failure = failure};
        mesh_emit(mesh, &event);
    }
    mesh_request_free(request);
}

void mesh_read_mailbox(struct mesh *mesh) {
    struct meshx_mesh *handle = mesh->handle;
    pthread_mutex_lock(&handle->lock);
    struct mesh_request *request = take_requests(handle);
    bool drain = handle->drain;
    bool stop = handle->stop;
    handle->drain = false;
    handle->stop = false;
    pthread_mutex_unlock(&handle->lock);
    while (request != NULL) {
        struct mesh_request *next = request->next;
        request->next = NULL;
        read_request(mesh, request);
        request = next;
    }
    if (drain) {
        mesh_drain(mesh);
    }
    if (stop) {
        mesh_stop(mesh);
    }
}

static void run_mailbox(void *argument) {
    struct meshx_mesh *handle = argument;
    pthread_mutex_lock(&handle->lock);
    struct mesh *mesh = handle->mesh;
    handle->posted = false;
    pthread_mutex_unlock(&handle->lock);
    /* Only this thread frees the node service, so it stays after the unlock. */
    if (mesh != NULL) {
        mesh_read_mailbox(mesh);
    }
    handle_unref(handle);
}

/* Lock held. Makes sure that a mailbox run follows. */
static int post_mailbox(struct meshx_mesh *handle) {
    if (handle->loop == NULL) {
        return MESHX_ESTOPPED;
    }
    if (handle->posted) {
        return MESHX_OK;
    }
    atomic_fetch_add(&handle->references, 1);
    int code = loop_post(handle->loop, run_mailbox, handle);
    if (code == MESHX_OK) {
        handle->posted = true;
    } else {
        atomic_fetch_sub(&handle->references, 1);
    }
    return code;
}

static int leave_request(struct meshx_mesh *handle, struct mesh_request *request) {
    if (request == NULL) {
        return MESHX_ENOMEM;
    }
    pthread_mutex_lock(&handle->lock);
    int code = post_mailbox(handle);
    if (code == MESHX_OK) {
        append_request(handle, request);
    }
    pthread_mutex_unlock(&handle->lock);
    if (code != MESHX_OK) {
        mesh_request_free(request);
    }
    return code;
}

/* ---- birth and end ---- */

static void on_deadline(void *argument) {
    struct mesh *mesh = argument;
    mesh_read_mailbox(mesh);
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_overdue(mesh);
    } else {
        mesh_tell_failure(mesh);
    }
}

static void on_heartbeat(void *argument) {
    struct mesh *mesh = argument;
    mesh_read_mailbox(mesh);
    if (mesh->state == MESHX_STATE_READY) {
        loop_timer_start(mesh->heartbeat, mesh->config.values.ttl / 3);
        mesh_heartbeat(mesh);
    } else if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_look(mesh);
    }
}

static void on_retry(void *argument) {
    struct mesh *mesh = argument;
    mesh->retrying = false;
    mesh_read_mailbox(mesh);
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_retry(mesh);
    } else if (mesh->draining) {
        mesh_drain_retry(mesh);
    } else if (mesh->state == MESHX_STATE_READY) {
        mesh_heartbeat(mesh);
        mesh_registration_apply(mesh);
    }
}

static void on_gather(void *argument) {
    mesh_upstream_send(argument);
}

static void on_open(void *argument) {
    mesh_upstream_look(argument);
}

static void on_finish(void *argument) {
    mesh_finish(argument);
}

static void on_loop_stop(void *self) {
    mesh_stop(self);
}

/* Makes the parts that belong to the control thread. */
static int make_parts(struct mesh *mesh) {
    static const char *const no_environment[] = {NULL};
    const struct meshx_config *config = &mesh->config.values;
    int code = consul_new(mesh->loop, &mesh->config.endpoint, config->request_timeout,
                          &mesh->consul);
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_deadline, mesh, &mesh->deadline);
    }
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_heartbeat, mesh, &mesh->heartbeat);
    }
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_retry, mesh, &mesh->retry);
    }
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_gather, mesh, &mesh->gather);
    }
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_open, mesh, &mesh->open);
    }
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_finish, mesh, &mesh->finish);
    }
    if (code == MESHX_OK) {
        code = mesh_watch_init(mesh);
    }
    if (code == MESHX_OK && config->sidecar_command != NULL && !config->control_node) {
        struct sidecar_config sidecar = {.guard_path = config->guard_path,
                                         .command = config->sidecar_command,
                                         .environment =
                                             config->sidecar_environment != NULL
                                                 ? config->sidecar_environment
                                                 : no_environment,
                                         .restart_min = config->sidecar_restart_min,
                                         .restart_max = config->sidecar_restart_max,
                                         .stop_timeout = config->stop_timeout};
        struct sidecar_callbacks callbacks = mesh_sidecar_callbacks;
        callbacks.context = mesh;
        code = sidecar_new(mesh->loop, &sidecar, &callbacks, &mesh->sidecar);
    }
    return code;
}

static void begin(void *argument) {
    struct mesh *mesh = argument;
    loop_join(mesh->loop, &mesh->member);
    int code = make_parts(mesh);
    if (code != MESHX_OK) {
        mesh->start_failed = true;
        error_set(&mesh->failure, code, "the start of %s failed: %s",
                  mesh->config.values.node,
                  code == MESHX_ENOMEM ? "out of memory" : meshx_error_name(code));
        mesh_finish(mesh);
        return;
    }
    mesh_start(mesh);
}

static void mesh_free(struct mesh *mesh) {
    mesh_registration_fini(&mesh->registration);
    mesh_config_fini(&mesh->config);
    free(mesh);
}

void mesh_finish(struct mesh *mesh) {
    struct meshx_mesh *handle = mesh->handle;
    /* From here on nothing can call back. */
    probe_cancel(mesh->probe);
    loop_timer_free(mesh->deadline);
    loop_timer_free(mesh->heartbeat);
    loop_timer_free(mesh->retry);
    loop_timer_free(mesh->gather);
    loop_timer_free(mesh->open);
    loop_timer_free(mesh->finish);
    mesh_watch_end(mesh);
    sidecar_free(mesh->sidecar);
    mesh_control_node_fini(mesh);

    mesh->state = MESHX_STATE_STOPPED;
    pthread_mutex_lock(&handle->lock);
    struct mesh_request *request = take_requests(handle);
    struct mesh_request *downs = handle->downs;
    handle->downs = NULL;
    handle->loop = NULL;
    handle->mesh = NULL;
    pthread_mutex_unlock(&handle->lock);
    free_requests(downs);
    struct meshx_failure stopped;
    error_set(&stopped, MESHX_ESTOPPED, "the node service of %s is stopped",
              mesh->config.values.node);
    while (request != NULL) {
        struct mesh_request *next = request->next;
        refuse_request(mesh, request, &stopped);
        request = next;
    }
    mesh_upstream_stop(mesh);
    mesh_tell_failure(mesh);
    struct meshx_event event = {.type = MESHX_EVENT_STOPPED,
                                .failure =
                                    mesh->stop_failed ? &mesh->stop_failure : NULL};
    mesh_emit(mesh, &event);
    mesh->callbacks.release(mesh->callbacks.context);

    consul_free(mesh->consul);
    mesh_upstream_fini(mesh);
    mesh_watch_fini(mesh);
    mesh_link_fini(mesh);
    loop_leave(mesh->loop, &mesh->member);
    mesh_free(mesh);
    handle_unref(handle);
}

/* ---- public API ---- */

int meshx_mesh_open(struct meshx_loop *loop, const struct meshx_config *config,
                    const struct meshx_callbacks *callbacks, struct meshx_mesh **out,
                    struct meshx_failure *failure) {
    struct meshx_mesh *handle = NULL;
    struct mesh *mesh = calloc(1, sizeof *mesh);
    if (mesh == NULL) {
        return error_set(failure, MESHX_ENOMEM, "out of memory");
    }
    int code = mesh_config_init(&mesh->config, config, failure);
    if (code != MESHX_OK) {
        free(mesh);
        return code;
    }
    handle = calloc(1, sizeof *handle);
    if (handle == NULL || pthread_mutex_init(&handle->lock, NULL) != 0) {
        code = error_set(failure, MESHX_ENOMEM, "out of memory");
        goto fail;
    }
    atomic_init(&handle->references, 2); /* the caller's and the node service's */
    atomic_init(&handle->renewed_at, loop_now());
    handle->loop = loop;
    handle->mesh = mesh;
    mesh->handle = handle;
    mesh->loop = loop;
    mesh->callbacks = *callbacks;
    mesh->member =
        (struct loop_member){.stop = on_loop_stop, .abandon = mesh_abandon, .self = mesh};
    mesh->vm_check = (struct mesh_check){
        .mesh = mesh, .talk = MESH_TALK_VM_CHECK, .id = mesh->config.vm_check_id};
    mesh->sidecar_check = (struct mesh_check){.mesh = mesh,
                                              .talk = MESH_TALK_SIDECAR_CHECK,
                                              .id = mesh->config.sidecar_check_id};
    /* The control thread may begin, and even end it, before this returns. */
    *out = handle;
    code = loop_post(loop, begin, mesh);
    if (code != MESHX_OK) {
        *out = NULL;
        error_set(failure, code, "%s is not started: %s", config->node,
                  code == MESHX_ENOMEM ? "out of memory"
                                       : "the control thread is stopped");
        pthread_mutex_destroy(&handle->lock);
        goto fail;
    }
    return MESHX_OK;
fail:
    free(handle);
    mesh_free(mesh);
    return code;
}

int meshx_mesh_upstream(struct meshx_mesh *mesh, uint64_t request, const char *node,
                        const char *service_id, const char *service_name,
                        enum meshx_upstream_mode mode) {
    static const enum mesh_request_kind kinds[] = {
        [MESHX_UPSTREAM_DIAL] = MESH_REQUEST_DIAL,
        [MESHX_UPSTREAM_REDIAL] = MESH_REQUEST_DIAL,
        [MESHX_UPSTREAM_ASK] = MESH_REQUEST_ASK,
        [MESHX_UPSTREAM_FIND] = MESH_REQUEST_FIND};
    struct mesh_request *made =
        mesh_request_new(kinds[mode], request, node, service_name);
    if (made != NULL && (made->service_id = strdup(service_id)) == NULL) {
        mesh_request_free(made);
        made = NULL;
    }
    if (made != NULL) {
        made->again = mode == MESHX_UPSTREAM_REDIAL;
    }
    return leave_request(mesh, made);
}

int meshx_mesh_accept(struct meshx_mesh *mesh, uint64_t request, const char *node,
                      const char *service_name, uint32_t socket) {
    struct mesh_request *made =
        mesh_request_new(MESH_REQUEST_ACCEPT, request, node, service_name);
    if (made != NULL) {
        made->socket = socket;
    }
    return leave_request(mesh, made);
}

int meshx_mesh_link_up(struct meshx_mesh *mesh, uint64_t link, const char *node,
                       const char *service_name, bool dialed) {
    struct mesh_request *down =
        mesh_request_new(MESH_REQUEST_LINK_DOWN, link, NULL, NULL);
    struct mesh_request *up =
        down != NULL ? mesh_request_new(MESH_REQUEST_LINK_UP, link, node, service_name)
                     : NULL;
    if (up != NULL) {
        up->dialed = dialed;
    }
    pthread_mutex_lock(&mesh->lock);
    int code = up != NULL ? post_mailbox(mesh) : MESHX_ENOMEM;
    if (code == MESHX_OK) {
        append_request(mesh, up);
        down->next = mesh->downs;
        mesh->downs = down;
    }
    pthread_mutex_unlock(&mesh->lock);
    if (code != MESHX_OK) {
        free_requests(up);
        free_requests(down);
    }
    return code;
}

/* From here on a post that fails does no harm: timers read the mailbox, too, and a
 * stopping loop stops its members itself. */
void meshx_mesh_link_down(struct meshx_mesh *mesh, uint64_t link) {
    pthread_mutex_lock(&mesh->lock);
    struct mesh_request **place = &mesh->downs;
    while (*place != NULL && (*place)->id != link) {
        place = &(*place)->next;
    }
    struct mesh_request *down = *place;
    if (down != NULL) {
        *place = down->next;
        down->next = NULL;
        append_request(mesh, down);
        post_mailbox(mesh);
    }
    pthread_mutex_unlock(&mesh->lock);
}

int meshx_mesh_info(struct meshx_mesh *mesh, uint64_t request) {
    return leave_request(mesh, mesh_request_new(MESH_REQUEST_INFO, request, NULL, NULL));
}

void meshx_mesh_renew(struct meshx_mesh *mesh) {
    atomic_store(&mesh->renewed_at, loop_now());
}

void meshx_mesh_drain(struct meshx_mesh *mesh) {
    pthread_mutex_lock(&mesh->lock);
    mesh->drain = true;
    post_mailbox(mesh);
    pthread_mutex_unlock(&mesh->lock);
}

void meshx_mesh_stop(struct meshx_mesh *mesh) {
    pthread_mutex_lock(&mesh->lock);
    mesh->stop = true;
    post_mailbox(mesh);
    pthread_mutex_unlock(&mesh->lock);
}

void meshx_mesh_close(struct meshx_mesh *mesh) {
    meshx_mesh_stop(mesh);
    handle_unref(mesh);
}
