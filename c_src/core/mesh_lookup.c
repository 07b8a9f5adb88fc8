/*
 * What the agent says of a node that we dial, or that dials us. L4, control thread only.
 *
 * A connect() to an upstream's port proves nothing (the proxy accepts first, dials
 * later), so the agent is asked first, side by side: is there such a node and is it
 * healthy, and do intentions allow the link?
 *
 * Invariant: request->lookups counts the answers to come; each is one call of
 * mesh_upstream_looked_up(), the last thing done with the request.
 */
#include "error.h"
#include "mesh_internal.h"
#include <string.h>

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
    } else if (request->kind == MESH_REQUEST_FIND) {
        return; /* how it is doing is not asked */
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

/* ---- is it still there? ---- */

static void on_probed(enum probe_answer answer, void *argument) {
    struct mesh_request *request = argument;
    request->probe = NULL;
    if (answer != PROBE_REFUSES) {
        request->found.code = MESHX_OK;
    }
    mesh_upstream_looked_up(request);
}

/* Of a node that has just ended without a word the checks pass until their TTL is over.
 * Our sidecar accepts and closes then, as it does while the node's listener is busy: what
 * tells them apart is whether anything listens where the node's sidecar should. True if
 * on_probed() follows; until then |found| has the failure that it may clear. */
static bool probe_sidecar(struct mesh_request *request,
                          const struct document_instances *instances) {
    const struct document_instance *instance = instances->items;
    while (instance->node == NULL || strcmp(instance->node, request->node) != 0 ||
           !instance->passing) {
        instance++; /* judge_instances() has seen one */
    }
    if (instance->address == NULL || instance->port == 0 ||
        probe_start(request->mesh->loop, PROBE_CONNECT, instance->address, instance->port,
                    0, 0, on_probed, request, &request->probe) != MESHX_OK) {
        return false;
    }
    error_set(
        &request->found, MESHX_ENODE_UNHEALTHY,
        "%s is registered in Consul (service %s), but nothing listens at %s:%u, where "
        "its sidecar should: has it ended just now?",
        request->node, request->service_name, instance->address, instance->port);
    return true;
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
        if (request->again && request->found.code == MESHX_OK &&
            probe_sidecar(request, instances)) {
            return;
        }
    }
    mesh_upstream_looked_up(request);
}

bool mesh_lookup_allowed(const struct mesh *mesh, const struct meshx_failure *failure,
                         bool allowed, const char *source, const char *destination,
                         struct meshx_failure *out) {
    if (failure != NULL && failure->code == MESHX_EAGENT_ACL) {
        error_set(out, failure->code,
                  "whether %s may connect to %s can't be asked: the token needs "
                  "service:read on %s (%.200s)",
                  source, destination, destination, failure->text);
    } else if (failure != NULL) {
        *out = *failure;
    } else if (!allowed) {
        char which[400];
        mesh_link_describe_denial(mesh, source, destination, which, sizeof which);
        error_set(out, MESHX_EDENIED,
                  "%s denies %s => %s; allow it with `consul intention create -replace "
                  "-allow %s %s`",
                  which, source, destination, source, destination);
    }
    return failure == NULL && allowed;
}

/* Of the two directions a denial says more than another failure. */
static void allowed_answered(struct mesh_request *request,
                             const struct meshx_failure *failure, bool allowed,
                             const char *source, const char *destination) {
    struct meshx_failure found;
    bool lets_in = failure != NULL && request->kind == MESH_REQUEST_ACCEPT;
    if (!mesh_lookup_allowed(request->mesh, failure, allowed, source, destination,
                             &found) &&
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

void mesh_lookup(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    if (request->kind != MESH_REQUEST_ACCEPT) {
        if (consul_instances(mesh->consul, CONSUL_HEALTH_CONNECT, request->service_name,
                             on_instances, request) != MESHX_OK) {
            mesh_upstream_out_of_memory(request);
            return;
        }
        request->lookups = 1;
    }
    if (request->kind != MESH_REQUEST_FIND && ask_intentions(request) != MESHX_OK) {
        mesh_upstream_out_of_memory(request);
    }
}
