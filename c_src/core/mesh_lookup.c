/*
 * What the agent says of a node that we dial, or that dials us. L4, control thread only.
 *
 * A connect() to an upstream's port proves nothing (the proxy accepts first, dials
 * later), so the agent is asked first, side by side: is there such a node and is it
 * healthy, and, unless mesh_intention.c knows, do intentions allow the link?
 *
 * One node is asked about by its name, and as long as that goes on all others that are
 * dialed together, by a list of all: a burst costs a few requests, however many nodes
 * there are. What such a list has nothing against may be dialed; who it has not, or not
 * as healthy, is asked about by name.
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

/* ---- one node ---- */

static void on_instances(const struct meshx_failure *failure,
                         const struct document_instances *instances, void *argument) {
    struct mesh_request *request = argument;
    request->mesh->lone_lookups--;
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

static bool ask_about(struct mesh_request *request) {
    bool sent =
        consul_instances(request->mesh->consul, CONSUL_HEALTH_CONNECT,
                         request->service_name, on_instances, request) == MESHX_OK;
    request->mesh->lone_lookups += sent ? 1 : 0;
    return sent;
}

static void out_of_memory(struct mesh_request *request) {
    mesh_upstream_out_of_memory(request);
    mesh_upstream_looked_up(request);
}

/* ---- many nodes ---- */

bool mesh_lookup_is_sidecar(const char *text, const char *begin) {
    size_t size = strlen(begin);
    return text != NULL && strncmp(text, begin, size) == 0 &&
           strcmp(text + size, MESH_SIDECAR_SUFFIX) == 0;
}

/* Is its service there once, with a sidecar that passes? */
static bool is_listed(const struct mesh_request *request,
                      const struct document_checks *sidecars) {
    size_t found = 0;
    bool good = false;
    for (size_t i = 0; i < sidecars->count; i++) {
        const struct document_check *sidecar = &sidecars->items[i];
        if (mesh_lookup_is_sidecar(sidecar->service_name, request->service_name)) {
            found++;
            good = sidecar->trouble == NULL &&
                   mesh_lookup_is_sidecar(sidecar->service_id, request->service_id) &&
                   !mesh_link_is_host_critical(request->mesh, sidecar->agent_node);
        }
    }
    return found == 1 && good;
}

static void ask_list(struct mesh *mesh);

/* The end of one request may be the end of others: each time from the beginning. */
static struct mesh_request *next_listed(const struct mesh *mesh) {
    struct mesh_request *request = mesh->requests;
    while (request != NULL && !request->list_asked) {
        request = request->next;
    }
    return request;
}

static void on_list(const struct meshx_failure *failure, uint64_t index,
                    struct document_checks *sidecars, void *argument) {
    struct mesh *mesh = argument;
    struct mesh_request *request;
    (void)index;
    mesh->listing = false;
    while ((request = next_listed(mesh)) != NULL) {
        request->list_asked = false;
        if (request->answered || (failure == NULL && is_listed(request, sidecars))) {
            mesh_upstream_looked_up(request);
        } else if (!ask_about(request)) {
            out_of_memory(request);
        }
    }
    ask_list(mesh);
}

/* If anyone wants one and none is under way. */
static void ask_list(struct mesh *mesh) {
    bool wanted = false;
    for (struct mesh_request *request = mesh->requests; request != NULL && !mesh->listing;
         request = request->next) {
        request->list_asked = request->list_asked || request->list_wanted;
        request->list_wanted = false;
        wanted = wanted || request->list_asked;
    }
    if (!wanted) {
        return;
    }
    mesh->listing = true;
    if (consul_sidecars(mesh->consul, on_list, mesh) != MESHX_OK) {
        mesh->listing = false;
        struct mesh_request *request;
        while ((request = next_listed(mesh)) != NULL) {
            request->list_asked = false;
            out_of_memory(request);
        }
    }
}

/* ---- intentions ---- */

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

/* From now on they are watched, as soon as that is possible. */
static void want_intentions(struct mesh *mesh) {
    if (!mesh->intentions.wanted && !mesh->config.values.control_node) {
        mesh->intentions.wanted = true;
        mesh_watch_begin(mesh);
    }
}

/* Of the two directions a denial says more than another failure. Two denials are told of
 * together: who allows only the one would be denied once more. */
static void allowed_answered(struct mesh_request *request,
                             const struct meshx_failure *failure, bool allowed,
                             const char *source, const char *destination) {
    struct meshx_failure found;
    bool lets_in = failure != NULL && request->kind == MESH_REQUEST_ACCEPT;
    if (!mesh_lookup_allowed(request->mesh, failure, allowed, source, destination,
                             &found) &&
        !lets_in) {
        struct meshx_failure before = request->allowed;
        if (found.code == MESHX_EDENIED) {
            want_intentions(request->mesh); /* the next denial can name its intention */
        }
        if (before.code != MESHX_EDENIED) {
            request->allowed = found;
        } else if (found.code == MESHX_EDENIED) {
            error_set(&request->allowed, MESHX_EDENIED,
                      "%s; the other way is denied too: `consul intention create "
                      "-replace -allow %s %s`",
                      before.text, source, destination);
        }
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

/* One direction. What we know saves the question if it is |good| and allows it; a denial
 * may have been taken back a moment ago. */
static bool ask_direction(struct mesh_request *request, bool good, const char *source,
                          const char *destination, consul_allowed_done done) {
    struct mesh *mesh = request->mesh;
    const struct document_intention *decides = NULL;
    request->lookups++;
    if (good && mesh_intention_verdict(mesh, source, destination, &decides) ==
                    MESH_VERDICT_ALLOW) {
        done(NULL, true, request);
        return true;
    }
    if (consul_allowed(mesh->consul, source, destination, done, request) != MESHX_OK) {
        request->lookups--;
        return false;
    }
    return true;
}

/* Both directions, since a link carries both ways, or the one in which it is dialed. */
static bool ask_intentions(struct mesh_request *request, bool good) {
    const struct mesh *mesh = request->mesh;
    const char *ours = mesh->config.values.service_name;
    const char *theirs = request->service_name;
    bool both = !mesh->config.values.dial_direction_only;
    bool accepts = request->kind == MESH_REQUEST_ACCEPT;
    return (!(both || !accepts) ||
            ask_direction(request, good, ours, theirs, on_allowed)) &&
           (!(both || accepts) ||
            ask_direction(request, good, theirs, ours, on_allowed_back));
}

/* All that is to be asked about intentions, at once or when they are known: who only asks
 * wants to know how it is now. */
static void judge_intentions(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    bool asks = request->kind == MESH_REQUEST_ASK;
    if (!asks && mesh_is_running(mesh) && mesh->intentions.known &&
        !mesh_intention_is_current(mesh)) {
        mesh_intention_refresh(mesh); /* not watched just now: once for all requests */
    }
    if (!asks && mesh_intention_is_coming(mesh)) {
        request->parked = true;
        request->lookups++;
    } else if (!ask_intentions(request, !asks && mesh_intention_is_current(mesh))) {
        mesh_upstream_out_of_memory(request);
    }
}

static struct mesh_request *next_parked(const struct mesh *mesh) {
    struct mesh_request *request = mesh->requests;
    while (request != NULL && !request->parked) {
        request = request->next;
    }
    return request;
}

void mesh_lookup_unpark(struct mesh *mesh) {
    struct mesh_request *request;
    while (!mesh_intention_is_coming(mesh) && (request = next_parked(mesh)) != NULL) {
        request->parked = false;
        /* What is known now is good, even if for a moment no change would be told. */
        if (!request->answered && !ask_intentions(request, true)) {
            mesh_upstream_out_of_memory(request);
        }
        mesh_upstream_looked_up(request);
    }
}

/* Does another one ask at the same time? */
static bool is_one_of_many(const struct mesh_request *request) {
    const struct mesh_request *other = request->mesh->requests;
    while (other != NULL && (other == request || other->lookups == 0)) {
        other = other->next;
    }
    return other != NULL && !request->mesh->config.values.control_node;
}

void mesh_lookup(struct mesh_request *request) {
    struct mesh *mesh = request->mesh;
    bool many = is_one_of_many(request);
    bool listed = many && request->kind == MESH_REQUEST_DIAL && !request->again &&
                  (mesh->lone_lookups > 0 || mesh->listing);
    request->lookups = 1; /* this function itself, since some answers come at once */
    if (many) {
        want_intentions(mesh);
    }
    if (listed) {
        request->lookups++;
        request->list_wanted = true;
    } else if (request->kind != MESH_REQUEST_ACCEPT) {
        if (ask_about(request)) {
            request->lookups++;
        } else {
            mesh_upstream_out_of_memory(request);
        }
    }
    if (!request->answered && request->kind != MESH_REQUEST_FIND) {
        judge_intentions(request);
    }
    mesh_upstream_looked_up(request);
    if (listed) {
        ask_list(mesh);
    }
}
