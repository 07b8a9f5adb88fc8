/*
 * Upstreams of nodes that are gone. L4, control thread only.
 *
 * With each heartbeat the agent is asked about one of them, so the load does not grow
 * with their number. One whose node has not been in the catalog for upstream_keep, and
 * through which no connection is open, leaves the registration. It keeps its port, for
 * the built-in proxy has not closed it, and gets it back should the node return; a new
 * sidecar process forgets it.
 */
#include "listener.h"
#include "mesh_internal.h"
#include <stdlib.h>
#include <string.h>

static void depart(struct mesh *mesh, struct mesh_upstream *upstream) {
    mesh_log(mesh, MESHX_LEVEL_INFO,
             "%s has not been in Consul's catalog for %llu s: the sidecar of %s needs no "
             "way to it any more",
             upstream->node,
             (unsigned long long)(loop_now() - upstream->absent_since) / 1000,
             mesh->config.values.node);
    upstream->absent_since = 0;
    upstream->departed = true;
    upstream->departure = mesh->registration.wanted + 1;
    mesh_registration_change(mesh);
}

static bool is_listed(const struct document_instances *instances, const char *node) {
    for (size_t i = 0; i < instances->count; i++) {
        const char *name = instances->items[i].node;
        if (name != NULL && strcmp(name, node) == 0) {
            return true;
        }
    }
    return false;
}

/* A link to a node that is not in the catalog (its agent is down) keeps its upstream. */
static void on_swept(const struct meshx_failure *failure,
                     const struct document_instances *instances, void *argument) {
    struct mesh *mesh = argument;
    struct mesh_upstream *upstream = mesh_upstream_find(mesh, mesh->swept);
    struct sock_address address;
    free(mesh->swept);
    mesh->swept = NULL;
    if (failure != NULL || upstream == NULL || upstream->departed || mesh->draining ||
        mesh->state != MESHX_STATE_READY) {
        return;
    }
    uint64_t now = loop_now();
    if (is_listed(instances, upstream->node)) {
        upstream->absent_since = 0;
    } else if (upstream->absent_since == 0) {
        upstream->absent_since = now;
    } else if (now - upstream->absent_since >= mesh->config.values.upstream_keep &&
               sock_address_parse("127.0.0.1", upstream->port, &address) == 0 &&
               !listener_has_connections(&address)) {
        depart(mesh, upstream);
    }
}

void mesh_departure_sweep(struct mesh *mesh) {
    if (mesh->swept != NULL) {
        return;
    }
    for (size_t i = 0; mesh->swept == NULL && i < mesh->upstream_count; i++) {
        mesh->sweep_next = (mesh->sweep_next + 1) % mesh->upstream_count;
        const struct mesh_upstream *upstream = &mesh->upstreams[mesh->sweep_next];
        if (!upstream->departed) {
            mesh->swept = strdup(upstream->service_name);
            if (mesh->swept == NULL) {
                return;
            }
        }
    }
    if (mesh->swept != NULL &&
        consul_instances(mesh->consul, CONSUL_HEALTH_SERVICE, mesh->swept, on_swept,
                         mesh) != MESHX_OK) {
        free(mesh->swept);
        mesh->swept = NULL;
    }
}
