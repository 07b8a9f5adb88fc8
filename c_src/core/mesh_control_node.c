/*
 * A control node's way to others: remote shells, commands of a release. L4, control
 * thread only.
 *
 * It has no listener, so there is nothing to register and no sidecar. A node whose
 * sidecar is registered with our own agent and whose listener is on this host and of our
 * own user is dialed directly: that user could read its memory as well. Any other is
 * dialed through a proxy of our own, `consul connect proxy -service ... -upstream ...`,
 * which needs no registration and obeys intentions under our name; there is one per
 * destination, for as long as we live or until it ends.
 *
 * Invariant: a request waits for a proxy only while that is in mesh->proxies and does not
 * accept yet.
 */
#include "error.h"
#include "listener.h"
#include "mesh_internal.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROBE_INTERVAL 5 /* milliseconds; decides how long a first dial takes */
#define PROXY_TIME 5000  /* milliseconds until it accepts */

struct mesh_proxy {
    struct mesh *mesh;
    struct mesh_proxy *next;
    char *service_name;
    uint16_t port;
    struct sidecar *sidecar; /* its process */
    struct probe *probe;     /* NULL: accepts, or does not run yet */
    bool accepts;
};

static void fail(struct mesh_request *request, const struct meshx_failure *failure) {
    mesh_upstream_answer(request, failure, &(struct mesh_way){.address = "127.0.0.1"});
}

void mesh_control_node_start(struct mesh *mesh) {
    struct meshx_event event = {.type = MESHX_EVENT_READY};
    mesh->state = MESHX_STATE_READY;
    mesh_emit(mesh, &event);
    mesh_upstream_ready(mesh);
}

/* ---- on this host ---- */

static bool is_ours(const struct mesh_request *request,
                    const struct document_service *sidecar) {
    struct sock_address address;
    uid_t owner;
    return sidecar->node != NULL && strcmp(sidecar->node, request->node) == 0 &&
           sidecar->local_address != NULL && sidecar->local_port != 0 &&
           sock_address_parse(sidecar->local_address, sidecar->local_port, &address) ==
               0 &&
           listener_user(&address, &owner) == 0 && owner == geteuid();
}

static void on_sidecar(const struct meshx_failure *failure,
                       const struct document_service *sidecar, void *argument) {
    struct mesh_request *request = argument;
    if (failure != NULL) {
        request->found = *failure;
    } else if (!request->answered && sidecar != NULL && is_ours(request, sidecar)) {
        struct mesh_way way = {sidecar->local_address, sidecar->local_port, true};
        request->lookups = 0;
        mesh_upstream_answer(request, NULL, &way);
        return;
    } else if (!request->answered) {
        request->lookups = 0;
        mesh_lookup(request);
        return;
    }
    mesh_upstream_looked_up(request);
}

void mesh_control_node_find(struct mesh_request *request) {
    char id[512];
    snprintf(id, sizeof id, "%s" MESH_SIDECAR_SUFFIX, request->service_id);
    request->lookups = 1;
    if (consul_service(request->mesh->consul, id, on_sidecar, request) != MESHX_OK) {
        request->lookups = 0;
        mesh_upstream_out_of_memory(request);
    }
}

/* ---- elsewhere ---- */

static void free_proxy(struct mesh_proxy *proxy) {
    probe_cancel(proxy->probe);
    sidecar_free(proxy->sidecar);
    free(proxy->service_name);
    free(proxy);
}

/* Tells those who wait for |proxy| what became of it. */
static void answer_waiting(struct mesh_proxy *proxy,
                           const struct meshx_failure *failure) {
    struct mesh_way way = {.address = "127.0.0.1", .port = proxy->port};
    struct mesh_request *next = NULL;
    for (struct mesh_request *request = proxy->mesh->requests; request != NULL;
         request = next) {
        next = request->next;
        if (request->proxy == proxy) {
            mesh_upstream_answer(request, failure, &way);
        }
    }
}

/* Its links end with it; who dials again gets another one. */
static void give_up_proxy(struct mesh_proxy *proxy, const struct meshx_failure *failure) {
    struct mesh_proxy **place = &proxy->mesh->proxies;
    while (*place != proxy) {
        place = &(*place)->next;
    }
    *place = proxy->next;
    answer_waiting(proxy, failure);
    free_proxy(proxy);
}

static void on_probed(enum probe_answer answer, void *argument) {
    struct mesh_proxy *proxy = argument;
    struct meshx_failure failure;
    proxy->probe = NULL;
    if (answer == PROBE_ACCEPTS) {
        proxy->accepts = true;
        answer_waiting(proxy, NULL);
        return;
    }
    error_set(&failure, MESHX_ESIDECAR_TIMEOUT,
              "the proxy for the way to service %s does not accept at port %u%s",
              proxy->service_name, proxy->port,
              answer == PROBE_NOT_MADE ? ": " PROBE_NOT_MADE_WHY : "");
    give_up_proxy(proxy, &failure);
}

static void on_started(int64_t pid, void *context) {
    struct mesh_proxy *proxy = context;
    struct meshx_failure failure;
    (void)pid;
    proxy->mesh->sidecar_starts++;
    if (probe_start(proxy->mesh->loop, PROBE_CONNECT, "127.0.0.1", proxy->port,
                    PROBE_INTERVAL, PROXY_TIME, on_probed, proxy,
                    &proxy->probe) != MESHX_OK) {
        proxy->probe = NULL;
        error_set(&failure, MESHX_ENOMEM, "out of memory for the way to service %s",
                  proxy->service_name);
        give_up_proxy(proxy, &failure);
    }
}

static void on_ended(const struct meshx_failure *failure, uint32_t restart_ms,
                     void *context) {
    struct mesh_proxy *proxy = context;
    (void)restart_ms;
    if (proxy->accepts) {
        mesh_log(proxy->mesh, MESHX_LEVEL_WARNING, "the way to service %s is gone: %s",
                 proxy->service_name, failure->text);
    }
    give_up_proxy(proxy, failure);
}

static void on_output(enum meshx_stream stream, const char *line, void *context) {
    struct mesh_proxy *proxy = context;
    struct meshx_event event = {
        .type = MESHX_EVENT_OUTPUT, .stream = stream, .text = line};
    mesh_emit(proxy->mesh, &event);
}

static struct mesh_proxy *find_proxy(struct mesh *mesh, const char *service_name) {
    struct mesh_proxy *proxy = mesh->proxies;
    while (proxy != NULL && strcmp(proxy->service_name, service_name) != 0) {
        proxy = proxy->next;
    }
    return proxy;
}

static bool port_taken(void *context, uint16_t port) {
    const struct mesh *mesh = context;
    const struct mesh_proxy *proxy = mesh->proxies;
    while (proxy != NULL && proxy->port != port) {
        proxy = proxy->next;
    }
    return proxy != NULL;
}

/* The command with its last word, which is |upstream|. */
static int new_process(struct mesh_proxy *proxy, const char *upstream) {
    static const char *const no_environment[] = {NULL};
    const struct meshx_config *config = &proxy->mesh->config.values;
    size_t count = 0;
    while (config->sidecar_command[count] != NULL) {
        count++;
    }
    const char **command = calloc(count + 2, sizeof *command);
    if (command == NULL) {
        return MESHX_ENOMEM;
    }
    memcpy((void *)command, (const void *)config->sidecar_command,
           count * sizeof *command);
    command[count] = upstream;
    struct sidecar_config process = {.guard_path = config->guard_path,
                                     .command = command,
                                     .environment = config->sidecar_environment != NULL
                                                        ? config->sidecar_environment
                                                        : no_environment,
                                     .restart_min = config->sidecar_restart_min,
                                     .restart_max = config->sidecar_restart_max,
                                     .stop_timeout = config->stop_timeout};
    struct sidecar_callbacks callbacks = {
        .started = on_started, .ended = on_ended, .output = on_output, .context = proxy};
    int code = sidecar_new(proxy->mesh->loop, &process, &callbacks, &proxy->sidecar);
    free((void *)command);
    return code;
}

/* What stands in the way of a proxy to |request|'s node. */
static int check_proxy(const struct mesh_request *request,
                       struct meshx_failure *failure) {
    const char *name = request->service_name;
    if (request->mesh->config.values.sidecar_command == NULL) {
        return error_set(failure, MESHX_ECONFIG,
                         "%s has no listener of this user on this host, so the way to it "
                         "is a proxy, but the program consul is not found in PATH (or "
                         "sidecar_command is none)",
                         request->node);
    }
    if (strpbrk(name, ".:") != NULL) {
        return error_set(
            failure, MESHX_ECONFIG,
            "%s has no listener of this user on this host, and a node without a service "
            "of its own can't reach it elsewhere: `consul connect proxy -upstream` takes "
            "no name like %s; use service_name dns, or start this one with a name and "
            "without -dist_listen false or -remsh",
            request->node, name);
    }
    return MESHX_OK;
}

/* NULL: |failure| says why. */
static struct mesh_proxy *add_proxy(struct mesh_request *request,
                                    struct meshx_failure *failure) {
    struct mesh *mesh = request->mesh;
    const struct meshx_port_range range = mesh->config.values.upstream_ports;
    char upstream[512];
    if (check_proxy(request, failure) != MESHX_OK) {
        return NULL;
    }
    struct mesh_proxy *proxy = calloc(1, sizeof *proxy);
    if (proxy == NULL) {
        goto no_memory;
    }
    proxy->mesh = mesh;
    if (sock_find_port("127.0.0.1", range, port_taken, mesh, &proxy->port) != 0) {
        error_set(failure, MESHX_ENO_PORT,
                  "no port in upstream_ports %u..%u is free for the way to %s",
                  range.first, range.last, request->node);
        goto fail;
    }
    snprintf(upstream, sizeof upstream, "%s:127.0.0.1:%u", request->service_name,
             proxy->port);
    proxy->service_name = strdup(request->service_name);
    if (proxy->service_name == NULL || new_process(proxy, upstream) != MESHX_OK) {
        goto no_memory;
    }
    proxy->next = mesh->proxies;
    mesh->proxies = proxy;
    sidecar_start(proxy->sidecar);
    return proxy;

no_memory:
    error_set(failure, MESHX_ENOMEM, "out of memory for the way to %s", request->node);
fail:
    if (proxy != NULL) {
        free_proxy(proxy);
    }
    return NULL;
}

void mesh_control_node_dial(struct mesh_request *request) {
    struct meshx_failure failure;
    struct mesh_proxy *proxy = find_proxy(request->mesh, request->service_name);
    if (proxy == NULL) {
        proxy = add_proxy(request, &failure);
    }
    if (proxy == NULL) {
        fail(request, &failure);
    } else if (proxy->accepts) {
        struct mesh_way way = {.address = "127.0.0.1", .port = proxy->port};
        mesh_upstream_answer(request, NULL, &way);
    } else {
        request->proxy = proxy;
    }
}

/* The guards end the processes. */
void mesh_control_node_fini(struct mesh *mesh) {
    while (mesh->proxies != NULL) {
        struct mesh_proxy *proxy = mesh->proxies;
        mesh->proxies = proxy->next;
        free_proxy(proxy);
    }
}
