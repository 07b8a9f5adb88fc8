/*
 * The configuration of a node service: checked, copied, and what follows from it. L4.
 *
 * Made on the caller's thread by meshx_mesh_open(), immutable after.
 */
#ifndef MESHX_CORE_MESH_CONFIG_H
#define MESHX_CORE_MESH_CONFIG_H

#include "endpoint.h"
#include "meshx_node.h"

struct mesh_config {
    struct meshx_config values; /* all it points at is ours, |consul| is NULL */
    struct endpoint endpoint;
    char *vm_check_id;
    char *sidecar_check_id;
    /* Borrowed from |values| or static. A wildcard address is probed at its loopback. */
    const char *listen_probe_address;
    const char *sidecar_bind_address;
    const char *sidecar_probe_address;
};

/*
 * Checks and copies |from|. MESHX_OK, MESHX_ENOMEM or MESHX_ECONFIG (|failure| names key
 * and value). On failure nothing is left allocated.
 */
int mesh_config_init(struct mesh_config *config, const struct meshx_config *from,
                     struct meshx_failure *failure);

/* Frees the fields. Accepts an all-zero config. */
void mesh_config_fini(struct mesh_config *config);

#endif
