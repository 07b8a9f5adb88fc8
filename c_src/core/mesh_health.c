/*
 * Keeps a node service healthy: heartbeats, the sidecar's life, the agent's absence. L4,
 * control thread only.
 *
 * A check is passed only while what it stands for was just seen alive. The service's is
 * passed while the VM's lease was renewed; the sidecar's, which decides whether others
 * dial us, while moreover its public port answers a probe. Whatever happens is logged
 * when it changes, never again at every heartbeat, and what fails at the agent is retried
 * within a second, so that its return is noticed at once.
 */
#include "error.h"
#include "listener.h"
#include "mesh_internal.h"
#include <stdio.h>
#include <string.h>

#define PROBE_INTERVAL 5
#define EXTERNAL_PROBE_INTERVAL 200
#define RETRY_MIN 50
#define RETRY_MAX 1000
/* Failed probes in a row until a sidecar that runs but does not accept is restarted. */
#define MISSES_MAX 2
/* Probes in a row without an answer, each 2 s long, until its check fails and until it is
 * restarted. One is nothing on a loaded machine. */
#define SILENT_CRITICAL 2
#define SILENT_HANGS 4

/* ---- the agent ---- */

void mesh_retry_later(struct mesh *mesh) {
    uint32_t limit = mesh->config.values.ttl / 3;
    if (mesh->retrying || mesh->config.values.control_node) {
        return; /* a control node has nothing that it could repair */
    }
    mesh->retry_delay = mesh->retry_delay > 0 ? mesh->retry_delay * 2 : RETRY_MIN;
    if (mesh->retry_delay > RETRY_MAX) {
        mesh->retry_delay = RETRY_MAX;
    }
    if (mesh->retry_delay > limit) {
        mesh->retry_delay = limit;
    }
    /* Up to a quarter less, so that many nodes do not come back to an agent as one. */
    uint32_t jitter = (uint32_t)(uv_hrtime() % (mesh->retry_delay / 4 + 1));
    mesh->retrying = true;
    loop_timer_start(mesh->retry, mesh->retry_delay - jitter);
}

static bool any_trouble(const struct mesh *mesh) {
    for (size_t i = 0; i < MESH_TALK_COUNT; i++) {
        if (mesh->troubles[i] != MESHX_OK) {
            return true;
        }
    }
    return false;
}

void mesh_agent_result(struct mesh *mesh, enum mesh_talk talk,
                       const struct meshx_failure *failure) {
    mesh->troubles[talk] = failure != NULL ? failure->code : MESHX_OK;
    if (failure != NULL) {
        uint64_t bit = UINT64_C(1) << (unsigned)(-failure->code & 63);
        mesh_note_failure(mesh, failure);
        if (mesh->troubles_logged == 0) {
            mesh->trouble_since = loop_now();
        }
        if ((mesh->troubles_logged & bit) == 0) {
            mesh->troubles_logged |= bit;
            mesh_log(mesh, MESHX_LEVEL_WARNING, "%s; trying again%s", failure->text,
                     mesh->state == MESHX_STATE_STARTING ? " until start_timeout" : "");
        }
        mesh_retry_later(mesh);
    } else if (mesh->troubles_logged != 0 && !any_trouble(mesh)) {
        mesh->troubles_logged = 0;
        mesh->retry_delay = 0;
        mesh_log(mesh, MESHX_LEVEL_NOTICE, "the agent at %s works again after %llu ms",
                 mesh->config.endpoint.shown,
                 (unsigned long long)(loop_now() - mesh->trouble_since));
    }
}

/* ---- checks ---- */

static void on_checked(const struct meshx_failure *failure, void *argument);

static void send_check(struct mesh_check *check) {
    check->in_flight = true;
    check->again = false;
    check->sent = check->wanted;
    check->sent_at = loop_now();
    check->registration = check->mesh->registration.applied;
    if (consul_check(check->mesh->consul, check->id, check->wanted, check->note,
                     on_checked, check) != MESHX_OK) {
        struct meshx_failure failure;
        error_set(&failure, MESHX_ENOMEM, "out of memory for a request to the agent");
        on_checked(&failure, check);
    }
}

static void on_checked(const struct meshx_failure *failure, void *argument) {
    struct mesh_check *check = argument;
    struct mesh *mesh = check->mesh;
    check->in_flight = false;
    if (mesh->state == MESHX_STATE_STOPPING) {
        return;
    }
    if (check->again) {
        send_check(check); /* its answer counts */
    } else if (mesh->draining) {
        mesh_drain_checked(check, failure);
    } else if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_checked(mesh, check, failure);
    } else if (failure != NULL && failure->code == MESHX_ENODE_UNKNOWN) {
        mesh_agent_result(mesh, check->talk, NULL);
        if (mesh->registration.applied > check->registration) {
            send_check(check); /* we have registered again since it was sent */
        } else {
            mesh_registration_lost(mesh);
        }
    } else {
        if (failure == NULL) {
            mesh->away_time = 0; /* the agent still knows us: it has lost nothing */
            if (check->sent_at > mesh->heard_at) {
                mesh->heard_at = check->sent_at;
            }
        }
        mesh_agent_result(mesh, check->talk, failure);
    }
}

void mesh_check_set(struct mesh_check *check, enum consul_check status,
                    const char *note) {
    if (check->mesh->state == MESHX_STATE_STOPPING) {
        return;
    }
    check->wanted = status;
    if (note != check->note) {
        snprintf(check->note, sizeof check->note, "%.255s", note);
    }
    if (check->in_flight) {
        check->again = check->wanted != check->sent;
    } else {
        send_check(check);
    }
}

static void check_vm(struct mesh *mesh) {
    uint32_t ttl = mesh->config.values.ttl;
    uint64_t age = loop_now() - atomic_load(&mesh->handle->renewed_at);
    /* One renewal may be missed. Seen at the next heartbeat, that is within the TTL. A
     * renewal may be later than our now. */
    bool lapsed = (int64_t)age > (int64_t)(ttl - ttl / 3);
    if (lapsed && !mesh->lease_lapsed) {
        mesh_log(mesh, MESHX_LEVEL_WARNING,
                 "the VM of %s has not answered for %llu ms: its checks are failed until "
                 "it does; is the VM overloaded, or was it suspended?",
                 mesh->config.values.node, (unsigned long long)age);
    } else if (!lapsed && mesh->lease_lapsed) {
        mesh_log(mesh, MESHX_LEVEL_NOTICE, "the VM of %s answers again",
                 mesh->config.values.node);
    }
    mesh->lease_lapsed = lapsed;
    if (lapsed) {
        mesh_check_set(&mesh->vm_check, CONSUL_FAIL, "the VM does not answer");
        mesh_check_set(&mesh->sidecar_check, CONSUL_FAIL, "the VM does not answer");
    } else {
        mesh_check_set(&mesh->vm_check, CONSUL_PASS, "the node answers");
    }
}

void mesh_check_both(struct mesh *mesh) {
    if (mesh->draining) {
        return;
    }
    check_vm(mesh);
    if (mesh->sidecar_accepts && !mesh->lease_lapsed) {
        mesh_check_set(&mesh->sidecar_check, CONSUL_PASS, "the sidecar accepts");
    }
}

void mesh_heartbeat(struct mesh *mesh) {
    if (mesh->draining) {
        return;
    }
    mesh_registration_follow_token(mesh);
    check_vm(mesh);
    if (mesh->sidecar != NULL && mesh->sidecar_pid == 0) {
        /* Said at once when it ended; said again, the agent may have missed it. */
        mesh_check_set(&mesh->sidecar_check, CONSUL_FAIL,
                       mesh->sidecar_check.wanted == CONSUL_PASS
                           ? "the sidecar is being restarted"
                           : mesh->sidecar_check.note);
    } else if (mesh->sidecar == NULL && !mesh->sidecar_accepts) {
        mesh_probe_sidecar(mesh, EXTERNAL_PROBE_INTERVAL, mesh->config.values.ttl / 3);
    } else {
        mesh_probe_sidecar(mesh, 0, 0);
    }
    if (!any_trouble(mesh)) {
        mesh_departure_sweep(mesh);
    }
}

void mesh_health_begin(struct mesh *mesh) {
    loop_timer_start(mesh->heartbeat, mesh->config.values.ttl / 3);
    if (mesh->sidecar == NULL) {
        mesh_probe_sidecar(mesh, EXTERNAL_PROBE_INTERVAL, mesh->config.values.ttl / 3);
    }
}

/* ---- the sidecar's public port ---- */

static void on_accepts(struct mesh *mesh) {
    mesh->sidecar_accepts = true;
    mesh->sidecar_misses = 0;
    mesh->listener_reported = false;
    if (mesh->sidecar_reported) {
        mesh->sidecar_reported = false;
        mesh_log(mesh, MESHX_LEVEL_NOTICE, "the sidecar of %s accepts at port %u",
                 mesh->config.values.node, mesh->sidecar_port);
    }
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_accepts(mesh);
    } else if (!mesh->lease_lapsed) {
        mesh_check_set(&mesh->sidecar_check, CONSUL_PASS, "the sidecar accepts");
    }
}

/* A sidecar that runs, but not where it should: another port, another process. */
static void replace_sidecar(struct mesh *mesh) {
    struct meshx_failure failure;
    uint16_t port = mesh->sidecar_port;
    mesh->sidecar_misses = 0;
    if (mesh_choose_sidecar_port(mesh, &failure) != MESHX_OK) {
        mesh_note_failure(mesh, &failure);
    }
    mesh_log(mesh, MESHX_LEVEL_WARNING,
             "the sidecar of %s runs but does not accept at port %u: restarting it at "
             "port %u",
             mesh->config.values.node, port, mesh->sidecar_port);
    if (mesh->sidecar_port == port) {
        mesh->sidecar_pid = 0;
        sidecar_restart(mesh->sidecar);
    } else {
        mesh->registration.moving = mesh->registration.wanted + 1;
        mesh_registration_change(mesh);
    }
}

/* Others can't reach us: says so, once, and fails the check. */
static void mark_unreachable(struct mesh *mesh, const char *what) {
    char note[160];
    snprintf(note, sizeof note, "the sidecar does not %s at %s port %u", what,
             mesh->config.sidecar_probe_address, mesh->sidecar_port);
    mesh->sidecar_accepts = false;
    if (!mesh->sidecar_reported) {
        mesh->sidecar_reported = true;
        mesh_log(mesh, MESHX_LEVEL_WARNING,
                 "%s of %s: others can't reach it until the sidecar does%s", note,
                 mesh->config.values.node,
                 mesh->sidecar == NULL ? "; it is not run by us, is it started?" : "");
    }
    mesh_check_set(&mesh->sidecar_check, CONSUL_FAIL, note);
}

static void on_refuses(struct mesh *mesh) {
    mesh->sidecar_misses++;
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh->sidecar_accepts = false;
        return; /* the deadline of the start ends it */
    }
    mark_unreachable(mesh, "accept");
    if (mesh->sidecar_misses > MISSES_MAX && mesh->sidecar_pid != 0 &&
        mesh->registration.moving == 0) {
        replace_sidecar(mesh);
    }
}

/* Someone else has the port. Moves at once, but not as fast as a sidecar can say it
 * again.
 */
static void on_shut_out(struct mesh *mesh, const char *why) {
    uint64_t now = loop_now();
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_shut_out(mesh, why);
    } else if (mesh->state == MESHX_STATE_READY && !mesh->draining) {
        mesh->sidecar_shut_out = true;
        if (mesh->moved_at == 0 ||
            now - mesh->moved_at > mesh->config.values.sidecar_restart_max) {
            mesh->moved_at = now;
            mesh->sidecar_misses = MISSES_MAX;
        }
        on_refuses(mesh);
    }
}

/* No reason to replace the sidecar. Its check is neither passed nor failed meanwhile. */
static void on_not_made(struct mesh *mesh) {
    if (!mesh->probe_reported) {
        mesh->probe_reported = true;
        mesh_log(mesh, MESHX_LEVEL_WARNING,
                 "the sidecar of %s can't be probed: " PROBE_NOT_MADE_WHY,
                 mesh->config.values.node);
    }
}

/* ---- a sidecar that hangs ---- */

/* A sidecar dials us before it answers anyone. So if our own listener is full, that is
 * not the sidecar's fault. */
static void on_own_listener(enum probe_answer answer, void *argument) {
    struct mesh *mesh = argument;
    mesh->probe = NULL;
    mesh->sidecar_misses = 0;
    if (answer == PROBE_NOT_MADE) {
        on_not_made(mesh);
        return;
    }
    if (answer != PROBE_ACCEPTS) {
        if (!mesh->listener_reported) {
            mesh->listener_reported = true;
            mesh_log(mesh, MESHX_LEVEL_WARNING,
                     "the sidecar of %s does not answer, but neither does the node's own "
                     "listener at port %u: the sidecar is let be",
                     mesh->config.values.node, mesh->config.values.listen_port);
        }
        return;
    }
    mesh_log(mesh, MESHX_LEVEL_WARNING,
             "the sidecar of %s hangs: it runs but does not answer at port %u; "
             "restarting it",
             mesh->config.values.node, mesh->sidecar_port);
    mesh->sidecar_pid = 0;
    sidecar_restart(mesh->sidecar);
}

static void on_silent(struct mesh *mesh) {
    mesh->sidecar_misses++;
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_probe_sidecar(mesh, PROBE_INTERVAL, mesh->config.values.start_timeout);
        return; /* the deadline of the start ends it */
    }
    if (mesh->sidecar_misses >= SILENT_CRITICAL) {
        mark_unreachable(mesh, "answer");
    }
    if (mesh->sidecar == NULL || mesh->sidecar_pid == 0) {
        return; /* the next heartbeat asks again */
    }
    if (mesh->sidecar_misses < SILENT_HANGS) {
        mesh_probe_sidecar(mesh, 0, 0);
    } else if (probe_start(mesh->loop, PROBE_CONNECT, mesh->config.listen_probe_address,
                           mesh->config.values.listen_port, 0, 0, on_own_listener, mesh,
                           &mesh->probe) != MESHX_OK) {
        mesh->probe = NULL;
    }
}

/* ---- what a probe has found ---- */

/* A probe meets whoever was faster at the port. */
static bool is_taken(struct mesh *mesh) {
    struct sock_address address;
    return mesh->sidecar_pid != 0 &&
           sock_address_parse(mesh->config.sidecar_probe_address, mesh->sidecar_port,
                              &address) == 0 &&
           listener_owner(&address, (pid_t)mesh->sidecar_pid, &mesh->sidecar_socket) ==
               LISTENER_OTHER;
}

static void on_probed(enum probe_answer answer, void *argument) {
    struct mesh *mesh = argument;
    mesh->probe = NULL;
    if (answer == PROBE_NOT_MADE) {
        on_not_made(mesh);
        return;
    }
    mesh->probe_reported = false;
    if (is_taken(mesh)) {
        on_shut_out(mesh, "another program listens there");
    } else if (answer == PROBE_ACCEPTS && !mesh->sidecar_shut_out) {
        on_accepts(mesh);
    } else if (answer == PROBE_SILENT) {
        on_silent(mesh);
    } else {
        on_refuses(mesh);
    }
}

void mesh_probe_sidecar(struct mesh *mesh, uint32_t interval, uint32_t timeout) {
    if (mesh->probe != NULL || mesh->draining) {
        return;
    }
    if (probe_start(mesh->loop, PROBE_HELLO, mesh->config.sidecar_probe_address,
                    mesh->sidecar_port, interval, timeout, on_probed, mesh,
                    &mesh->probe) != MESHX_OK) {
        mesh->probe = NULL;
        mesh_retry_later(mesh); /* no memory: a later one will do */
    }
}

/* ---- the sidecar's process ---- */

static void on_sidecar_started(int64_t pid, void *context) {
    struct mesh *mesh = context;
    mesh->sidecar_pid = pid;
    mesh->sidecar_starts++;
    mesh->sidecar_accepts = false;
    mesh->sidecar_shut_out = false;
    mesh->sidecar_socket = 0;
    mesh->sidecar_outdated = false;
    mesh->sidecar_misses = 0;
    mesh_upstream_new_sidecar(mesh);
    if (mesh->state == MESHX_STATE_STARTING || mesh->state == MESHX_STATE_READY) {
        probe_cancel(mesh->probe); /* it knew the former process */
        mesh->probe = NULL;
        mesh_probe_sidecar(mesh, PROBE_INTERVAL,
                           mesh->state == MESHX_STATE_STARTING
                               ? mesh->config.values.start_timeout
                               : mesh->config.values.ttl / 3);
    }
}

static void on_sidecar_ended(const struct meshx_failure *failure, uint32_t restart_ms,
                             void *context) {
    struct mesh *mesh = context;
    mesh->sidecar_pid = 0;
    mesh->sidecar_accepts = false;
    if (mesh->state != MESHX_STATE_STARTING && mesh->state != MESHX_STATE_READY) {
        return;
    }
    probe_cancel(mesh->probe);
    mesh->probe = NULL;
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_sidecar_ended(mesh, failure);
        return;
    }
    mesh_note_failure(mesh, failure);
    mesh->sidecar_reported = true;
    mesh_log(mesh, MESHX_LEVEL_WARNING,
             "%s: others can't reach %s, its sidecar is restarted in %u ms",
             failure->text, mesh->config.values.node, restart_ms);
    if (!mesh->draining) {
        mesh_check_set(&mesh->sidecar_check, CONSUL_FAIL, failure->text);
    }
}

static void on_sidecar_output(enum meshx_stream stream, const char *line, void *context) {
    struct mesh *mesh = context;
    struct meshx_event event = {
        .type = MESHX_EVENT_OUTPUT, .stream = stream, .text = line};
    mesh_emit(mesh, &event);
    if (strstr(line, "Parsed TLS identity") != NULL) {
        mesh->sidecar_outdated = false; /* it has asked the agent again */
    }
    /* The built-in proxy ("public listener") and Envoy ("public_listener") go on without
     * it and never try again. Sooner than a probe, and where the system does not tell
     * whose listener it met. */
    if (mesh->sidecar_pid != 0 &&
        (strstr(line, "public listener") != NULL ||
         strstr(line, "public_listener") != NULL) &&
        strcasestr(line, "address already in use") != NULL) {
        on_shut_out(mesh, line);
    }
}

static void on_sidecar_stopped(void *context) {
    mesh_sidecar_stopped(context);
}

const struct sidecar_callbacks mesh_sidecar_callbacks = {.started = on_sidecar_started,
                                                         .ended = on_sidecar_ended,
                                                         .output = on_sidecar_output,
                                                         .stopped = on_sidecar_stopped};
