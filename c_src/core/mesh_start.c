/*
 * The start of a node service. L4, control thread only.
 *
 * Steps, each begun when the one before is done:
 *   MESH_CLAIM     is the name free? (local agent and catalog, asked side by side)
 *   MESH_REGISTER  with our own sidecar port, no upstreams, both checks critical
 *   MESH_SIDECAR   runs and its public port accepts
 *   MESH_PASS      both checks
 *   MESH_VISIBLE   the catalog has it, which takes some milliseconds more: READY
 * A step that fails because the agent has no leader or is too busy is repeated with
 * back-off until start_timeout; any other failure undoes all (mesh_stop.c) and is told by
 * FAILED. Invariant: nothing is deregistered that this start has not registered.
 */
#include "error.h"
#include "mesh_internal.h"
#include "sock.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define PROBE_INTERVAL 5 /* milliseconds; decides how long a start takes */
#define LOOK_INTERVAL 3  /* milliseconds; so does this */
#define LOOKS_MAX 500
#define PLACES 3 /* where a former owner may listen */

static void begin_step(struct mesh *mesh, enum mesh_step step);

static void fail_start(struct mesh *mesh, const struct meshx_failure *failure) {
    mesh_note_failure(mesh, failure);
    mesh->failure = *failure;
    mesh->start_failed = true;
    mesh_stop(mesh);
}

static void fail_out_of_memory(struct mesh *mesh) {
    struct meshx_failure failure;
    error_set(&failure, MESHX_ENOMEM, "out of memory for the start of %s",
              mesh->config.values.node);
    fail_start(mesh, &failure);
}

/* A failure of a request to the agent: worth another try, or the end. */
static void on_trouble(struct mesh *mesh, const struct meshx_failure *failure) {
    switch (failure->code) {
    case MESHX_ENODE_UNKNOWN: /* lost between registration and first pass */
        mesh->step = MESH_REGISTER;
        break;
    case MESHX_EAGENT_NO_LEADER:
    case MESHX_EAGENT_TIMEOUT:
    case MESHX_EAGENT_BUSY:
        break;
    default:
        fail_start(mesh, failure);
        return;
    }
    mesh_agent_result(mesh, MESH_TALK_REGISTRATION, failure);
}

void mesh_start_retry(struct mesh *mesh) {
    begin_step(mesh, mesh->step);
}

void mesh_start_overdue(struct mesh *mesh) {
    struct meshx_failure failure;
    const struct meshx_config *config = &mesh->config.values;
    if (mesh->step == MESH_SIDECAR) {
        error_set(&failure, MESHX_ESIDECAR_TIMEOUT,
                  "the sidecar of %s does not accept at %s port %u after %u ms; is "
                  "sidecar_command right? Its output may say why",
                  config->node, mesh->config.sidecar_probe_address, mesh->sidecar_port,
                  config->start_timeout);
    } else if (mesh->has_last_failure) {
        error_set(&failure, mesh->last_failure.code, "%s is not started after %u ms: %s",
                  config->node, config->start_timeout, mesh->last_failure.text);
    } else {
        error_set(&failure, MESHX_EAGENT_TIMEOUT,
                  "the agent at %s has not answered within %u ms; is it overloaded, or "
                  "without a leader?",
                  mesh->config.endpoint.shown, config->start_timeout);
    }
    fail_start(mesh, &failure);
}

void mesh_start(struct mesh *mesh) {
    if (mesh->config.values.control_node) {
        mesh_control_node_start(mesh);
        return;
    }
    loop_timer_start(mesh->deadline, mesh->config.values.start_timeout);
    begin_step(mesh, mesh->config.values.force_registration ? MESH_REGISTER : MESH_CLAIM);
}

/* ---- MESH_CLAIM ---- */

static void in_use(struct mesh *mesh, const char *by) {
    struct meshx_failure failure;
    error_set(&failure, MESHX_ENAME_IN_USE,
              "the name %s is in use by %s; stop that one, take another name, or set "
              "force_registration",
              mesh->config.values.node, by);
    fail_start(mesh, &failure);
}

static void on_former_owner(enum probe_answer answer, void *argument);

/* Where the former owner may listen: like us, or at a loopback address of either kind. */
static void probe_former_owner(struct mesh *mesh) {
    const char *const addresses[PLACES] = {mesh->config.listen_probe_address, "127.0.0.1",
                                           "::1"};
    if (probe_start(mesh->loop, PROBE_CONNECT, addresses[mesh->claim.probes++],
                    mesh->claim.ours_port, 0, 0, on_former_owner, mesh,
                    &mesh->probe) != MESHX_OK) {
        fail_out_of_memory(mesh);
    }
}

static void on_former_owner(enum probe_answer answer, void *argument) {
    struct mesh *mesh = argument;
    bool is_first = mesh->claim.probes == 1; /* the host may lack the other addresses */
    mesh->probe = NULL;
    if (answer == PROBE_NOT_MADE && is_first) {
        struct meshx_failure failure;
        error_set(
            &failure, MESHX_ESYSTEM,
            "whether another %s listens at port %u can't be probed: " PROBE_NOT_MADE_WHY,
            mesh->config.values.node, mesh->claim.ours_port);
        fail_start(mesh, &failure);
    } else if (answer == PROBE_ACCEPTS || answer == PROBE_SILENT) {
        char by[96];
        snprintf(by, sizeof by, "a node on this host that listens at port %u",
                 mesh->claim.ours_port);
        in_use(mesh, by);
    } else if (mesh->claim.probes < PLACES) {
        probe_former_owner(mesh);
    } else {
        begin_step(mesh, MESH_REGISTER); /* left over by a crash: takes its place */
    }
}

/* Both answers have come. */
static void judge_claim(struct mesh *mesh) {
    const struct mesh_claim *claim = &mesh->claim;
    if (claim->failure.code == MESHX_ENAME_IN_USE) {
        in_use(mesh, claim->failure.text);
        return;
    }
    if (claim->failure.code != MESHX_OK) {
        on_trouble(mesh, &claim->failure);
        return;
    }
    /* One instance with our ID is our own leftover if the local agent has one. Which of
     * several it is can't be told, so then any that passes counts. */
    unsigned own = claim->ours_exists ? 1 : 0;
    if (claim->same_id > own && claim->holder[0] != '\0') {
        in_use(mesh, claim->holder);
        return;
    }
    /* A leftover with our own port can't be alive: the listener is ours. */
    if (claim->ours_exists && claim->ours_port != 0 &&
        claim->ours_port != mesh->config.values.listen_port) {
        probe_former_owner(mesh);
        return;
    }
    begin_step(mesh, MESH_REGISTER);
}

/* One of the two answers is there; the first failure counts. */
static void claim_answered(struct mesh *mesh, const struct meshx_failure *failure) {
    struct mesh_claim *claim = &mesh->claim;
    if (failure != NULL && claim->failure.code == MESHX_OK) {
        claim->failure = *failure;
    }
    claim->pending--;
    if (claim->pending == 0 && mesh->state == MESHX_STATE_STARTING) {
        judge_claim(mesh);
    }
}

static void on_own_service(const struct meshx_failure *failure,
                           const struct document_service *service, void *argument) {
    struct mesh *mesh = argument;
    struct meshx_failure foreign;
    if (failure == NULL && service != NULL) {
        if (service->node != NULL &&
            strcmp(service->node, mesh->config.values.node) == 0) {
            mesh->claim.ours_exists = true;
            mesh->claim.ours_port = service->port;
        } else {
            error_set(&foreign, MESHX_ENAME_IN_USE,
                      "another service with the ID %s at the agent at %s (%s%s)",
                      mesh->config.values.service_id, mesh->config.endpoint.shown,
                      service->node != NULL ? "of node " : "not an Erlang node",
                      service->node != NULL ? service->node : "");
            failure = &foreign;
        }
    }
    claim_answered(mesh, failure);
}

/* Would it be found where the other is looked for? */
static bool is_twin(const struct document_instance *instance,
                    const struct meshx_config *config) {
    return instance->node != NULL && instance->passing &&
           strcasecmp(instance->node, config->node) == 0;
}

static void on_own_instances(const struct meshx_failure *failure,
                             const struct document_instances *instances, void *argument) {
    struct mesh *mesh = argument;
    struct mesh_claim *claim = &mesh->claim;
    const struct meshx_config *config = &mesh->config.values;
    struct meshx_failure rival;
    for (size_t i = 0; failure == NULL && i < instances->count; i++) {
        const struct document_instance *instance = &instances->items[i];
        if (instance->node == NULL || strcmp(instance->node, config->node) != 0) {
            if (is_twin(instance, config)) {
                error_set(&rival, MESHX_ENAME_IN_USE,
                          "%s (the names of Consul's services ignore case; "
                          "service_name dns tells the two apart)",
                          instance->node);
                failure = &rival;
            }
            continue;
        }
        bool same_id = strcmp(instance->service_id, config->service_id) == 0;
        claim->same_id += same_id ? 1 : 0;
        if (instance->passing) {
            snprintf(claim->holder, sizeof claim->holder,
                     "the service with ID %s at Consul node %s", instance->service_id,
                     instance->agent_node);
        }
        if (instance->passing && !same_id) {
            error_set(&rival, MESHX_ENAME_IN_USE, "%s", claim->holder);
            failure = &rival;
        }
    }
    claim_answered(mesh, failure);
}

static void begin_claim(struct mesh *mesh) {
    const struct meshx_config *config = &mesh->config.values;
    struct meshx_failure failure;
    error_set(&failure, MESHX_ENOMEM, "out of memory for the start of %s", config->node);
    mesh->claim = (struct mesh_claim){.pending = 2};
    if (consul_service(mesh->consul, config->service_id, on_own_service, mesh) !=
        MESHX_OK) {
        claim_answered(mesh, &failure);
    }
    if (consul_instances(mesh->consul, CONSUL_HEALTH_SERVICE, config->service_name,
                         on_own_instances, mesh) != MESHX_OK) {
        claim_answered(mesh, &failure);
    }
}

/* ---- MESH_REGISTER ---- */

static bool port_taken(void *argument, uint16_t port) {
    struct mesh *mesh = argument;
    return port == mesh->sidecar_port || port == mesh->config.values.listen_port ||
           mesh_upstream_port_used(mesh, port);
}

int mesh_choose_sidecar_port(struct mesh *mesh, struct meshx_failure *failure) {
    const struct meshx_config *config = &mesh->config.values;
    struct meshx_port_range range = config->sidecar_ports;
    /* A pinned port may be bound already: by our own sidecar, or by an external one. */
    if (range.first == range.last &&
        (mesh->sidecar == NULL || mesh->sidecar_port == range.first)) {
        mesh->sidecar_port = range.first;
        return MESHX_OK;
    }
    int error = sock_find_port(mesh->config.sidecar_bind_address, range, port_taken, mesh,
                               &mesh->sidecar_port);
    if (error == -EADDRNOTAVAIL) {
        return error_set(failure, MESHX_ECONFIG,
                         "sidecar_address is %s, but must be an address of this host",
                         mesh->config.sidecar_bind_address);
    }
    if (error != -EADDRINUSE && error != 0) {
        return error_set_errno(failure, -error, "can't look for a port in sidecar_ports");
    }
    if (error != 0) {
        return error_set(failure, MESHX_ENO_PORT,
                         "no port in sidecar_ports %u..%u is free at %s for the sidecar "
                         "of %s",
                         range.first, range.last, mesh->config.sidecar_bind_address,
                         config->node);
    }
    return MESHX_OK;
}

static void begin_register(struct mesh *mesh) {
    struct meshx_failure failure;
    if (mesh->sidecar_port == 0 && mesh_choose_sidecar_port(mesh, &failure) != MESHX_OK) {
        fail_start(mesh, &failure);
        return;
    }
    mesh_registration_change(mesh);
}

void mesh_start_registered(struct mesh *mesh, const struct meshx_failure *failure) {
    struct mesh_registration *registration = &mesh->registration;
    if (failure != NULL) {
        on_trouble(mesh, failure);
    } else if (registration->wanted > registration->sent) {
        mesh_registration_apply(mesh);
    } else {
        if (registration->moving != 0) {
            registration->moving = 0;
            mesh->sidecar_pid = 0;
            sidecar_restart(mesh->sidecar);
        }
        begin_step(mesh, MESH_SIDECAR);
    }
}

/* ---- MESH_SIDECAR ---- */

static void begin_sidecar(struct mesh *mesh) {
    if (mesh->sidecar == NULL || mesh->sidecar_accepts) {
        begin_step(mesh, MESH_PASS);
    } else if (!mesh->sidecar_begun) {
        mesh->sidecar_begun = true;
        sidecar_start(mesh->sidecar);
    } else if (mesh->sidecar_pid != 0) {
        mesh_probe_sidecar(mesh, PROBE_INTERVAL, mesh->config.values.start_timeout);
    }
}

void mesh_start_accepts(struct mesh *mesh) {
    if (mesh->step == MESH_SIDECAR) {
        begin_step(mesh, MESH_PASS);
    }
}

/* Someone was faster at the port we chose: takes another one, once. */
void mesh_start_shut_out(struct mesh *mesh, const char *text) {
    struct meshx_failure failure;
    uint16_t port = mesh->sidecar_port;
    if (mesh->registration.moving != 0) {
        return; /* the same news from another line */
    }
    if (mesh->moved_at != 0 || mesh->config.values.sidecar_ports.first ==
                                   mesh->config.values.sidecar_ports.last) {
        error_set(&failure, MESHX_ENO_PORT,
                  "port %u (sidecar_ports) is in use by another program: %.300s", port,
                  text);
        fail_start(mesh, &failure);
        return;
    }
    if (mesh_choose_sidecar_port(mesh, &failure) != MESHX_OK) {
        fail_start(mesh, &failure);
        return;
    }
    mesh_log(mesh, MESHX_LEVEL_NOTICE,
             "port %u was taken by another program meanwhile; the sidecar of %s moves to "
             "%u",
             port, mesh->config.values.node, mesh->sidecar_port);
    probe_cancel(mesh->probe);
    mesh->probe = NULL;
    mesh->sidecar_accepts = false;
    mesh->moved_at = loop_now();
    mesh->step = MESH_REGISTER;
    mesh->registration.moving = mesh->registration.wanted + 1;
    mesh_registration_change(mesh);
}

void mesh_start_sidecar_ended(struct mesh *mesh, const struct meshx_failure *failure) {
    if (failure->code == MESHX_ESIDECAR_EXITED &&
        strstr(failure->text, "address already in use") != NULL) {
        mesh_start_shut_out(mesh, failure->text);
    } else {
        fail_start(mesh, failure);
    }
}

/* ---- MESH_PASS ---- */

static void begin_pass(struct mesh *mesh) {
    mesh->vm_check.passed = false;
    mesh->sidecar_check.passed = mesh->sidecar == NULL; /* passes when it accepts */
    mesh_check_set(&mesh->vm_check, CONSUL_PASS, "the node answers");
    if (mesh->sidecar != NULL) {
        mesh_check_set(&mesh->sidecar_check, CONSUL_PASS, "the sidecar accepts");
    }
}

void mesh_start_checked(struct mesh *mesh, struct mesh_check *check,
                        const struct meshx_failure *failure) {
    if (mesh->step != MESH_PASS || mesh->retrying) {
        return; /* overtaken by a failure of the other one */
    }
    if (failure != NULL) {
        on_trouble(mesh, failure);
        return;
    }
    check->passed = true;
    if (mesh->vm_check.passed && mesh->sidecar_check.passed) {
        begin_step(mesh, MESH_VISIBLE);
    }
}

/* ---- MESH_VISIBLE ---- */

static void become_ready(struct mesh *mesh) {
    const struct meshx_config *config = &mesh->config.values;
    struct meshx_event event = {.type = MESHX_EVENT_READY};
    loop_timer_stop(mesh->deadline);
    loop_timer_stop(mesh->retry);
    mesh->retrying = false;
    mesh->state = MESHX_STATE_READY;
    mesh_agent_result(mesh, MESH_TALK_REGISTRATION, NULL);
    mesh->retry_delay = 0;
    mesh_log(mesh, MESHX_LEVEL_INFO,
             "%s is registered at the agent at %s as service %s, sidecar port %u",
             config->node, mesh->config.endpoint.shown, config->service_name,
             mesh->sidecar_port);
    mesh_emit(mesh, &event);
    mesh_health_begin(mesh);
    mesh_watch_begin(mesh);
    mesh_upstream_ready(mesh);
}

/* Others may not find us: tells why, but that is no reason to fail. */
static void ready_unseen(struct mesh *mesh, const char *why) {
    mesh_log(mesh, MESHX_LEVEL_WARNING,
             "%s is registered, but does not appear in Consul's catalog as healthy (%s); "
             "others may not find it. With ACLs, does the token have node:read?",
             mesh->config.values.node, why);
    become_ready(mesh);
}

static void on_look(const struct meshx_failure *failure,
                    const struct document_instances *instances, void *argument) {
    struct mesh *mesh = argument;
    const char *trouble = NULL;
    if (mesh->state != MESHX_STATE_STARTING || mesh->step != MESH_VISIBLE) {
        return;
    }
    if (failure != NULL && failure->code == MESHX_EAGENT_ACL) {
        ready_unseen(mesh, failure->text);
        return;
    }
    if (failure != NULL) {
        on_trouble(mesh, failure);
        return;
    }
    for (size_t i = 0; i < instances->count; i++) {
        const struct document_instance *instance = &instances->items[i];
        if (instance->node != NULL &&
            strcmp(instance->node, mesh->config.values.node) == 0) {
            trouble = instance->trouble;
            if (instance->passing) {
                become_ready(mesh);
                return;
            }
        }
    }
    if (++mesh->looks < LOOKS_MAX) {
        loop_timer_start(mesh->heartbeat, LOOK_INTERVAL);
    } else {
        ready_unseen(mesh, trouble != NULL ? trouble : "it is not listed");
    }
}

void mesh_start_look(struct mesh *mesh) {
    if (mesh->step == MESH_VISIBLE &&
        consul_instances(mesh->consul, CONSUL_HEALTH_CONNECT,
                         mesh->config.values.service_name, on_look, mesh) != MESHX_OK) {
        fail_out_of_memory(mesh);
    }
}

static void begin_visible(struct mesh *mesh) {
    if (mesh->sidecar == NULL) {
        become_ready(mesh); /* it is up to someone else when the sidecar comes */
    } else {
        mesh_start_look(mesh);
    }
}

static void begin_step(struct mesh *mesh, enum mesh_step step) {
    mesh->step = step;
    switch (step) {
    case MESH_CLAIM:
        begin_claim(mesh);
        break;
    case MESH_REGISTER:
        begin_register(mesh);
        break;
    case MESH_SIDECAR:
        begin_sidecar(mesh);
        break;
    case MESH_PASS:
        begin_pass(mesh);
        break;
    case MESH_VISIBLE:
        begin_visible(mesh);
        break;
    }
}
