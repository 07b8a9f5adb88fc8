/*
 * Lookups and upstreams: from a node name to a local port that leads to it. L4, control
 * thread only.
 *
 * A connect() to an upstream's port proves nothing (the proxy accepts first, dials
 * later), so the agent is asked first, side by side: is there such a node and is it
 * healthy, and may we connect to it? Only then an upstream is wanted, and only when our
 * own sidecar is seen to listen there its port is told: if another program was faster,
 * the upstream moves to another port.
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

/* Milliseconds. A burst is over when no lookup is answered for so long, or at the latest
 * after so long. */
#define GATHER_PAUSE 50
#define GATHER_MAX 1000
/* How long a sidecar may take to open an upstream. It is looked for with pauses that grow
 * between these, since it takes some milliseconds or very long. */
#define OPEN_TIME 5000
#define OPEN_PAUSE_MIN 2
#define OPEN_PAUSE_MAX 100
/* From then on "unknown" is what the system has to say about it. */
#define OPEN_UNKNOWN 20
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
    if (failure != NULL && failure->code != MESHX_ESTOPPED) {
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

static void answer_out_of_memory(struct mesh_request *request) {
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
    switch (owner_of(mesh, upstream)) {
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
        if (mesh->sidecar != NULL && left > OPEN_TIME - OPEN_UNKNOWN) {
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

/* ---- lookups ---- */

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

static void judge_instances(struct mesh_request *request,
                            const struct document_instances *instances) {
    const char *trouble = NULL;
    const struct document_instance *other = NULL;
    bool known = false;
    bool passing = false;
    for (size_t i = 0; i < instances->count; i++) {
        const struct document_instance *instance = &instances->items[i];
        if (instance->node != NULL && strcmp(instance->node, request->node) == 0) {
            known = true;
            passing = passing || instance->passing;
            trouble = trouble != NULL ? trouble : instance->trouble;
        } else if (instance->passing) {
            other = instance;
        }
    }
    if (!known) {
        error_set(&request->found, MESHX_ENODE_UNKNOWN,
                  "%s is not registered in Consul (service %s); is it started, with "
                  "-proto_dist meshx_node and in this datacenter?",
                  request->node, request->service_name);
    } else if (!passing) {
        error_set(&request->found, MESHX_ENODE_UNHEALTHY,
                  "%s is registered in Consul (service %s), but not healthy: %.250s",
                  request->node, request->service_name,
                  trouble != NULL ? trouble : "its checks do not pass");
    } else if (other != NULL) {
        /* A proxy dials any passing instance of a service, so it would be a lottery. */
        error_set(&request->found, MESHX_ECONFIG,
                  "%s and %s are both instances of service %s, which makes it a matter "
                  "of luck which of them is reached; give each node its own service_name",
                  request->node, other->node != NULL ? other->node : other->service_id,
                  request->service_name);
    }
}

static void on_instances(const struct meshx_failure *failure,
                         const struct document_instances *instances, void *argument) {
    struct mesh_request *request = argument;
    if (failure != NULL) {
        request->found = *failure;
        if (request->mesh->state == MESHX_STATE_READY) {
            mesh_retry_later(request->mesh); /* see at once how we stand with the agent */
        }
    } else {
        judge_instances(request, instances);
    }
    mesh_upstream_looked_up(request);
}

bool mesh_upstream_allowed(const struct meshx_failure *failure, bool allowed,
                           const char *source, const char *destination,
                           struct meshx_failure *out) {
    if (failure != NULL && failure->code == MESHX_EAGENT_ACL) {
        error_set(out, failure->code,
                  "whether %s may connect to %s can't be asked: the token needs "
                  "service:read on %s (%.200s)",
                  source, destination, destination, failure->text);
    } else if (failure != NULL) {
        *out = *failure;
    } else if (!allowed) {
        error_set(out, MESHX_EDENIED,
                  "a Consul intention (or the default policy) denies %s => %s; allow it "
                  "with `consul intention create -replace -allow %s %s`",
                  source, destination, source, destination);
    }
    return failure == NULL && allowed;
}

/* Of the two directions a denial says more than another failure. */
static void allowed_answered(struct mesh_request *request,
                             const struct meshx_failure *failure, bool allowed,
                             const char *source, const char *destination) {
    struct meshx_failure found;
    bool lets_in = failure != NULL && request->kind == MESH_REQUEST_ACCEPT;
    if (!mesh_upstream_allowed(failure, allowed, source, destination, &found) &&
        !lets_in && request->allowed.code != MESHX_EDENIED) {
        request->allowed = found;
    }
    mesh_upstream_looked_up(request);
}

static void on_allowed(const struct meshx_failure *failure, bool allowed,
                       void *argument) {
    struct mesh_request *request = argument;
    allowed_answered(request, failure, allowed, request->mesh->config.values.service_name,
                     request->service_name);
}

static void on_allowed_back(const struct meshx_failure *failure, bool allowed,
                            void *argument) {
    struct mesh_request *request = argument;
    allowed_answered(request, failure, allowed, request->service_name,
                     request->mesh->config.values.service_name);
}

/* Both directions, since a link carries both ways, or the one in which it is dialed. */
static int ask_intentions(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    const char *ours = mesh->config.values.service_name;
    const char *theirs = request->service_name;
    bool both = !mesh->config.values.dial_direction_only;
    bool accepts = request->kind == MESH_REQUEST_ACCEPT;
    if (both || !accepts) {
        if (consul_allowed(mesh->consul, ours, theirs, on_allowed, request) != MESHX_OK) {
            return MESHX_ENOMEM;
        }
        request->lookups++;
    }
    if (both || accepts) {
        if (consul_allowed(mesh->consul, theirs, ours, on_allowed_back, request) !=
            MESHX_OK) {
            return MESHX_ENOMEM;
        }
        request->lookups++;
    }
    return MESHX_OK;
}

void mesh_upstream_look_up(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    if (request->kind != MESH_REQUEST_ACCEPT) {
        if (consul_instances(mesh->consul, CONSUL_HEALTH_CONNECT, request->service_name,
                             on_instances, request) != MESHX_OK) {
            answer_out_of_memory(request);
            return;
        }
        request->lookups = 1;
    }
    if (ask_intentions(request) != MESHX_OK) {
        answer_out_of_memory(request);
    }
}

static void look_up(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    if (request->kind == MESH_REQUEST_ACCEPT) {
        mesh_upstream_look_up(request);
    } else if (mesh->config.values.control_node) {
        mesh_control_node_find(request);
    } else if (!mesh->sidecar_accepts) {
        answer_sidecar_down(request);
    } else {
        mesh_upstream_look_up(request);
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
