/*
 * Requests and upstreams: from a node name to a local port that leads to it. L4, control
 * thread only.
 *
 * Only when the agent's answers (mesh_lookup.c) are good an upstream is wanted, and only
 * when our own sidecar is seen to listen there its port is told: if another program was
 * faster, the upstream moves to another port.
 *
 * One service has one upstream, and a port leads to one service for the life of the
 * sidecar's process, since the built-in proxy never closes a listener: a port whose
 * upstream was given up stays in |used_ports|. An upstream whose node has left the
 * catalog for good leaves the registration, but keeps its port, should the node come
 * back.
 *
 * A request is in mesh->requests from mesh_upstream_request() until it is answered and
 * no answer of the agent refers to it any more.
 */
#include "error.h"
#include "listener.h"
#include "mesh_internal.h"
#include "sock.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Milliseconds. A burst is over when no lookup is answered for so long, which is much on
 * a loaded machine, or at the latest after so long. */
#define GATHER_PAUSE 200
#define GATHER_MAX 1000
/* How long a sidecar may take to open an upstream. It is looked for with pauses that grow
 * between these, since it takes some milliseconds or very long. */
#define OPEN_TIME 5000
#define OPEN_PAUSE_MIN 2
#define OPEN_PAUSE_MAX 100
/* So many looks in a row, and "unknown" is what the system has to say about it. */
#define OPEN_UNKNOWN 10
/* Moves of an upstream on behalf of one request. */
#define MOVES_MAX 3

/* ---- requests ---- */

static void unlink_request(struct mesh *mesh, struct mesh_request *request) {
    struct mesh_request **place = &mesh->requests;
    while (*place != request) {
        place = &(*place)->next;
    }
    *place = request->next;
}

void mesh_upstream_answer(struct mesh_request *request,
                          const struct meshx_failure *failure,
                          const struct mesh_way *way) {
    struct mesh *mesh = request->mesh;
    struct meshx_event event = {.type = MESHX_EVENT_UPSTREAM,
                                .request = request->id,
                                .failure = failure,
                                .address = way->address,
                                .port = way->port,
                                .direct = way->direct};
    request->answered = true;
    request->proxy = NULL;
    if (failure != NULL && failure->code != MESHX_ESTOPPED &&
        request->kind != MESH_REQUEST_FIND) {
        mesh_note_failure(mesh, failure);
    }
    mesh_emit(mesh, &event);
    if (request->lookups == 0) {
        unlink_request(mesh, request);
        mesh_request_free(request);
    }
}

/* The same, with a local port of the sidecar. */
static void answer(struct mesh_request *request, const struct meshx_failure *failure,
                   uint16_t port) {
    struct mesh_way way = {.address = "127.0.0.1", .port = port};
    mesh_upstream_answer(request, failure, &way);
}

void mesh_upstream_out_of_memory(struct mesh_request *request) {
    struct meshx_failure failure;
    error_set(&failure, MESHX_ENOMEM, "out of memory for the way to %s", request->node);
    answer(request, &failure, 0);
}

/* ---- upstreams ---- */

bool mesh_upstream_port_used(void *context, uint16_t port) {
    const struct mesh *mesh = context;
    for (size_t i = 0; i < mesh->used_count; i++) {
        if (mesh->used_ports[i] == port) {
            return true;
        }
    }
    return false;
}

static bool port_taken(void *context, uint16_t port) {
    const struct mesh *mesh = context;
    return port == mesh->sidecar_port || port == mesh->config.values.listen_port ||
           mesh_upstream_port_used(context, port);
}

struct mesh_upstream *mesh_upstream_find(struct mesh *mesh, const char *service_name) {
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        if (strcmp(mesh->upstreams[i].service_name, service_name) == 0) {
            return &mesh->upstreams[i];
        }
    }
    return NULL;
}

/* Make room for one more. */
static bool reserve_port(struct mesh *mesh) {
    uint16_t *ports = realloc(mesh->used_ports, (mesh->used_count + 1) * sizeof *ports);
    if (ports == NULL) {
        return false;
    }
    mesh->used_ports = ports;
    return true;
}

static bool reserve_upstream(struct mesh *mesh) {
    struct mesh_upstream *upstreams =
        realloc(mesh->upstreams, (mesh->upstream_count + 1) * sizeof *upstreams);
    if (upstreams == NULL) {
        return false;
    }
    mesh->upstreams = upstreams;
    return true;
}

static int find_port(struct mesh *mesh, const char *node, uint16_t *port,
                     struct meshx_failure *failure) {
    const struct meshx_port_range range = mesh->config.values.upstream_ports;
    int error = sock_find_port("127.0.0.1", range, port_taken, mesh, port);
    if (error != 0 && error != -EADDRINUSE) {
        return error_set_errno(failure, -error, "can't look for a port for the way to %s",
                               node);
    }
    if (error != 0) {
        return error_set(failure, MESHX_ENO_PORT,
                         "no port in upstream_ports %u..%u is free for the way to %s",
                         range.first, range.last, node);
    }
    return MESHX_OK;
}

/* Adds the upstream |request| needs to the desired state. */
static int add_upstream(struct mesh *mesh, const struct mesh_request *request,
                        struct meshx_failure *failure) {
    struct mesh_upstream upstream = {.revision = mesh->registration.wanted + 1};
    int code = find_port(mesh, request->node, &upstream.port, failure);
    if (code != MESHX_OK) {
        return code;
    }
    upstream.node = strdup(request->node);
    upstream.service_name = strdup(request->service_name);
    if (upstream.node == NULL || upstream.service_name == NULL ||
        !reserve_upstream(mesh) || !reserve_port(mesh)) {
        free(upstream.node);
        free(upstream.service_name);
        return error_set(failure, MESHX_ENOMEM, "out of memory for the way to %s",
                         request->node);
    }
    mesh->upstreams[mesh->upstream_count++] = upstream;
    mesh->used_ports[mesh->used_count++] = upstream.port;
    return MESHX_OK;
}

/* Gives |upstream| another port; the sidecar has never listened at the one it has. */
static int move_upstream(struct mesh *mesh, struct mesh_upstream *upstream,
                         struct meshx_failure *failure) {
    uint16_t port;
    int code = find_port(mesh, upstream->node, &port, failure);
    if (code != MESHX_OK) {
        return code;
    }
    if (!reserve_port(mesh)) {
        return error_set(failure, MESHX_ENOMEM, "out of memory for the way to %s",
                         upstream->node);
    }
    mesh_log(
        mesh, MESHX_LEVEL_WARNING,
        "port %u, which should lead to %s, was taken by another program: the sidecar "
        "of %s will lead there from port %u",
        upstream->port, upstream->node, mesh->config.values.node, port);
    mesh->used_ports[mesh->used_count++] = port;
    upstream->port = port;
    upstream->bound = false;
    upstream->socket = 0;
    upstream->revision = mesh->registration.wanted + 1;
    return MESHX_OK;
}

static void free_upstream(struct mesh_upstream *upstream) {
    free(upstream->node);
    free(upstream->service_name);
}

void mesh_upstream_new_sidecar(struct mesh *mesh) {
    size_t kept = 0;
    mesh->used_count = 0; /* there is room: each upstream's port was in it before */
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        struct mesh_upstream *upstream = &mesh->upstreams[i];
        if (upstream->departed && upstream->departure <= mesh->registration.applied) {
            free_upstream(upstream);
        } else {
            upstream->socket = 0;
            mesh->used_ports[mesh->used_count++] = upstream->port;
            mesh->upstreams[kept++] = *upstream;
        }
    }
    mesh->upstream_count = kept;
}

/* The sidecar has never heard of it. */
static void release_port(struct mesh *mesh, uint16_t port) {
    size_t i = 0;
    while (mesh->used_ports[i] != port) {
        i++;
    }
    mesh->used_ports[i] = mesh->used_ports[--mesh->used_count];
}

/* Gives up those that were in the refused revision and not applied. Their ports too,
 * unless the sidecar may listen there. */
static void drop_upstreams(struct mesh *mesh, uint64_t revision, int code) {
    size_t kept = 0;
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        struct mesh_upstream *upstream = &mesh->upstreams[i];
        bool refused = upstream->revision > mesh->registration.applied &&
                       upstream->revision <= revision;
        if (refused && upstream->bound) {
            upstream->departed = true; /* as it was before it was asked for again */
        }
        if (refused && !upstream->bound) {
            if (mesh_registration_is_refused(code)) {
                release_port(mesh, upstream->port);
            }
            free_upstream(upstream);
        } else {
            mesh->upstreams[kept++] = *upstream;
        }
    }
    mesh->upstream_count = kept;
}

/* ---- the sidecar's listeners ---- */

static bool at_port(uint16_t port, struct sock_address *address) {
    return sock_address_parse("127.0.0.1", port, address) == 0;
}

static enum listener_owner owner_of(const struct mesh *mesh,
                                    struct mesh_upstream *upstream) {
    struct sock_address address;
    if (mesh->sidecar != NULL && mesh->sidecar_pid == 0) {
        return LISTENER_NOBODY; /* nobody who counts: it is just being started again */
    }
    return mesh->sidecar != NULL && at_port(upstream->port, &address)
               ? listener_owner(&address, (pid_t)mesh->sidecar_pid, &upstream->socket)
               : LISTENER_UNKNOWN; /* we don't know its process */
}

static void answer_sidecar_down(struct mesh_request *request);

/* Someone else listens at the port. */
static void move(struct mesh_request *request, struct mesh_upstream *upstream,
                 bool *changed) {
    struct meshx_failure failure;
    if (request->moves == MOVES_MAX) {
        error_set(&failure, MESHX_ENO_PORT,
                  "port %u for the way to %s is in use by another program, as were those "
                  "before it; does one listen at all of upstream_ports?",
                  upstream->port, request->node);
        answer(request, &failure, 0);
    } else if (move_upstream(request->mesh, upstream, &failure) != MESHX_OK) {
        answer(request, &failure, 0);
    } else {
        request->moves++;
        request->open_by = 0;
        request->revision = upstream->revision;
        *changed = true;
    }
}

/* Whether |request| still waits for the listener; else it may be freed. */
static bool is_closed(struct mesh_request *request, bool *changed) {
    struct mesh *mesh = request->mesh;
    struct meshx_failure failure;
    struct mesh_upstream *upstream = mesh_upstream_find(mesh, request->service_name);
    if (upstream == NULL || (mesh->sidecar != NULL && mesh->sidecar_pid == 0)) {
        answer_sidecar_down(request);
        return false;
    }
    if (upstream->revision > mesh->registration.applied) { /* moved for another one */
        request->open_by = 0;
        request->revision = upstream->revision;
        return false;
    }
    uint64_t now = loop_now();
    uint64_t left = now < request->open_by ? request->open_by - now : 0;
    enum listener_owner owner = owner_of(mesh, upstream);
    request->unknown = owner == LISTENER_UNKNOWN ? request->unknown + 1 : 0;
    switch (owner) {
    case LISTENER_NOBODY:
        if (left > 0) {
            return true;
        }
        error_set(&failure, MESHX_ESIDECAR_DOWN,
                  "%s can't be dialed, because the sidecar of %s has not opened port %u "
                  "for it; does it get its configuration from the agent?",
                  request->node, mesh->config.values.node, upstream->port);
        answer(request, &failure, 0);
        return false;
    case LISTENER_OTHER:
        move(request, upstream, changed);
        return false;
    case LISTENER_UNKNOWN:
        if (mesh->sidecar != NULL && left > 0 && request->unknown < OPEN_UNKNOWN) {
            return true;
        }
        break;
    case LISTENER_FAMILY:
        break;
    }
    answer(request, NULL, upstream->port);
    return false;
}

void mesh_upstream_look(struct mesh *mesh) {
    uint64_t waited = OPEN_TIME; /* by the last that still does */
    bool waiting = false;
    bool changed = false;
    struct mesh_request *next = NULL;
    for (struct mesh_request *request = mesh->requests; request != NULL; request = next) {
        next = request->next;
        if (request->open_by != 0 && !request->answered && is_closed(request, &changed)) {
            uint64_t since = loop_now() + OPEN_TIME - request->open_by;
            waited = since < waited ? since : waited;
            waiting = true;
        }
    }
    if (waiting) {
        uint64_t pause = waited / 8;
        pause = pause > OPEN_PAUSE_MIN ? pause : OPEN_PAUSE_MIN;
        loop_timer_start(mesh->open, pause < OPEN_PAUSE_MAX ? pause : OPEN_PAUSE_MAX);
    }
    if (changed) {
        mesh_registration_change(mesh);
    }
}

/* The agent has it: from now on |request| waits for the sidecar. */
static void await_listener(struct mesh_request *request) {
    request->revision = 0;
    request->open_by = loop_now() + OPEN_TIME;
    request->unknown = 0;
}

void mesh_upstream_applied(struct mesh *mesh, uint64_t revision,
                           const struct meshx_failure *failure) {
    struct mesh_request *next = NULL; /* an answer may free its request */
    for (struct mesh_request *request = mesh->requests; request != NULL; request = next) {
        next = request->next;
        if (request->revision != 0 && request->revision <= revision &&
            !request->answered) {
            if (failure != NULL) {
                answer(request, failure, 0);
            } else {
                await_listener(request);
            }
        }
    }
    if (failure != NULL) {
        drop_upstreams(mesh, revision, failure->code);
        return;
    }
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        struct mesh_upstream *upstream = &mesh->upstreams[i];
        upstream->bound = upstream->bound || upstream->revision <= revision;
    }
    mesh_upstream_look(mesh);
}

/* ---- wanting one ---- */

void mesh_upstream_send(struct mesh *mesh) {
    uint64_t revision = mesh->gathered;
    mesh->gathered = 0;
    loop_timer_stop(mesh->gather);
    if (revision > mesh->registration.wanted) { /* else it went along with another */
        mesh_registration_change(mesh);
    }
}

static bool is_looking_up(const struct mesh *mesh) {
    for (const struct mesh_request *request = mesh->requests; request != NULL;
         request = request->next) {
        if (request->lookups > 0 && request->kind == MESH_REQUEST_DIAL) {
            return true;
        }
    }
    return false;
}

/* A lookup is done: if it was the last one, what was gathered goes out. */
static void send_gathered(struct mesh *mesh) {
    uint64_t now = loop_now();
    if (mesh->gathered == 0) {
        return;
    }
    if (!is_looking_up(mesh) || now >= mesh->gather_by) {
        mesh_upstream_send(mesh);
    } else {
        uint64_t left = mesh->gather_by - now;
        loop_timer_start(mesh->gather, left < GATHER_PAUSE ? left : GATHER_PAUSE);
    }
}

/* A lone request is sent at once; one of a burst waits a moment for the others. */
static void gather(struct mesh *mesh, uint64_t revision) {
    if (mesh->gathered == 0) {
        mesh->gather_by = loop_now() + GATHER_MAX;
        loop_timer_start(mesh->gather, GATHER_PAUSE);
    }
    mesh->gathered = revision;
}

static void dial(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    struct meshx_failure failure;
    struct mesh_upstream *upstream = mesh_upstream_find(mesh, request->service_name);
    if (upstream == NULL) {
        if (add_upstream(mesh, request, &failure) != MESHX_OK) {
            answer(request, &failure, 0);
            return;
        }
        upstream = &mesh->upstreams[mesh->upstream_count - 1];
    } else if (strcmp(upstream->node, request->node) != 0) {
        char *former = upstream->node; /* another node has the service name now */
        upstream->node = request->node;
        request->node = former;
    }
    upstream->absent_since = 0;
    if (upstream->departed) {
        upstream->departed = false;
        upstream->revision = mesh->registration.wanted + 1;
    }
    if (upstream->revision <= mesh->registration.applied) {
        await_listener(request);
        mesh_upstream_look(mesh);
        return;
    }
    request->revision = upstream->revision;
    if (upstream->revision > mesh->registration.wanted) {
        gather(mesh, upstream->revision);
    }
}

/* ---- what the lookups say ---- */

static void answer_sidecar_down(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    struct meshx_failure failure;
    const char *why = "does not accept; the log says why";
    if (mesh->sidecar == NULL) {
        why = "does not accept; it is not run by us, is it started?";
    } else if (mesh->sidecar_pid == 0) {
        why = "does not run (it is being restarted); the log says why";
    }
    error_set(&failure, MESHX_ESIDECAR_DOWN,
              "%s can't be dialed, because the sidecar of %s at port %u %s",
              request->node, mesh->config.values.node, mesh->sidecar_port, why);
    answer(request, &failure, 0);
}

/* All answers have come: the most telling failure counts. */
static void judge(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    if (request->answered) {
        unlink_request(mesh, request);
        mesh_request_free(request);
        return;
    }
    const struct meshx_failure *found = &request->found;
    const struct meshx_failure *allowed = &request->allowed;
    if (found->code != MESHX_OK &&
        (found->code != MESHX_ENODE_UNHEALTHY || allowed->code == MESHX_OK)) {
        answer(request, found, 0);
    } else if (allowed->code != MESHX_OK) {
        answer(request, allowed, 0);
    } else if (request->kind != MESH_REQUEST_DIAL) {
        answer(request, NULL, 0);
    } else if (mesh->config.values.control_node) {
        mesh_control_node_dial(request);
    } else {
        dial(request);
    }
}

void mesh_upstream_looked_up(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    request->lookups--;
    if (request->lookups == 0) {
        judge(request);
        send_gathered(mesh);
    }
}

/* Has a process of our user dialed us, a control node, rather than our sidecar? As long
 * as that can't be said for sure, intentions count. */
static bool is_direct(const struct mesh_request *request) {
    const struct mesh *mesh = request->mesh;
    pid_t guard = mesh->sidecar != NULL ? sidecar_guard(mesh->sidecar) : 0;
    return request->socket != 0 && guard > 0 &&
           listener_descendant(request->socket, guard) == LISTENER_OTHER;
}

static void look_up(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    bool needs_way =
        request->kind == MESH_REQUEST_DIAL || request->kind == MESH_REQUEST_ASK;
    if (request->kind == MESH_REQUEST_ACCEPT && is_direct(request)) {
        mesh_upstream_answer(request, NULL,
                             &(struct mesh_way){.address = "127.0.0.1", .direct = true});
    } else if (needs_way && mesh->config.values.control_node) {
        mesh_control_node_find(request);
    } else if (needs_way && !mesh->sidecar_accepts) {
        answer_sidecar_down(request);
    } else {
        mesh_lookup(request);
    }
}

void mesh_upstream_request(struct mesh *mesh, struct mesh_request *request) {
    struct mesh_request **last = &mesh->requests;
    while (*last != NULL) {
        last = &(*last)->next;
    }
    *last = request;
    request->mesh = mesh;
    if (mesh->state == MESHX_STATE_READY) {
        look_up(request);
    } else if (mesh->state != MESHX_STATE_STARTING) {
        mesh_upstream_stop(mesh);
    }
}

void mesh_upstream_ready(struct mesh *mesh) {
    struct mesh_request *next = NULL;
    for (struct mesh_request *request = mesh->requests; request != NULL; request = next) {
        next = request->next;
        look_up(request);
    }
}

void mesh_upstream_stop(struct mesh *mesh) {
    struct meshx_failure failure;
    error_set(&failure, MESHX_ESTOPPED, "the node service of %s is stopped",
              mesh->config.values.node);
    struct mesh_request *next = NULL;
    for (struct mesh_request *request = mesh->requests; request != NULL; request = next) {
        next = request->next;
        if (!request->answered) {
            answer(request, &failure, 0);
        }
    }
}

void mesh_upstream_fini(struct mesh *mesh) {
    while (mesh->requests != NULL) {
        struct mesh_request *request = mesh->requests;
        mesh->requests = request->next;
        mesh_request_free(request);
    }
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        free_upstream(&mesh->upstreams[i]);
    }
    free(mesh->upstreams);
    free(mesh->used_ports);
    free(mesh->swept);
}
