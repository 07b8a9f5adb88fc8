/*
 * The end of a node service: drain, deregister, stop the sidecar. L4, control thread
 * only.
 *
 * The same way back for a stop that was asked for and for a start that failed. It waits
 * for a registration under way (a deregistration must not overtake it) and for one
 * deregistration, which may fail, and only then stops the sidecar: as long as peers can
 * find us, somebody is there.
 */
#include "error.h"
#include "mesh_internal.h"

/* What a sidecar gets from TERM to its end, and as much for the agent. Who waits for a
 * start that failed is then told so, though it is still being undone. */
#define UNDO_MARGIN 1000

static void finish_soon(struct mesh *mesh) {
    loop_timer_start(mesh->finish, 0);
}

static void tell_drained(struct mesh *mesh) {
    struct meshx_event event = {.type = MESHX_EVENT_DRAINED};
    mesh_emit(mesh, &event);
}

void mesh_drain(struct mesh *mesh) {
    if (mesh->state == MESHX_STATE_STARTING) {
        mesh_stop(mesh); /* nobody could have found us yet */
    } else if (mesh->state == MESHX_STATE_READY && mesh->config.values.control_node) {
        tell_drained(mesh); /* nobody can find it */
    } else if (mesh->state == MESHX_STATE_READY && !mesh->draining) {
        mesh->draining = true;
        probe_cancel(mesh->probe); /* whatever it finds, the sidecar is let be now */
        mesh->probe = NULL;
        mesh_drain_retry(mesh);
    }
}

void mesh_drain_retry(struct mesh *mesh) {
    struct mesh_check *const checks[] = {&mesh->vm_check, &mesh->sidecar_check};
    for (size_t i = 0; i < sizeof checks / sizeof checks[0]; i++) {
        if (!checks[i]->drained) {
            mesh_check_set(checks[i], CONSUL_FAIL, "the node is stopping");
        }
    }
}

void mesh_drain_checked(struct mesh_check *check, const struct meshx_failure *failure) {
    struct mesh *mesh = check->mesh;
    if (failure != NULL && failure->code == MESHX_ENOMEM) {
        mesh_retry_later(mesh);
        return;
    }
    check->drained = true;
    if (mesh->vm_check.drained && mesh->sidecar_check.drained) {
        tell_drained(mesh);
    }
}

void mesh_stop(struct mesh *mesh) {
    if (mesh->state != MESHX_STATE_STARTING && mesh->state != MESHX_STATE_READY) {
        return;
    }
    mesh->state = MESHX_STATE_STOPPING;
    loop_timer_stop(mesh->deadline);
    if (mesh->start_failed) {
        loop_timer_start(mesh->deadline,
                         (uint64_t)mesh->config.values.stop_timeout + UNDO_MARGIN);
    }
    loop_timer_stop(mesh->heartbeat);
    loop_timer_stop(mesh->retry);
    loop_timer_stop(mesh->gather);
    loop_timer_stop(mesh->open);
    mesh_watch_end(mesh);
    probe_cancel(mesh->probe);
    mesh->probe = NULL;
    mesh_upstream_stop(mesh);
    mesh_stop_continue(mesh);
}

static void stop_sidecar(struct mesh *mesh) {
    if (mesh->sidecar_begun) {
        sidecar_stop(mesh->sidecar);
    } else {
        finish_soon(mesh);
    }
}

static void still_registered(struct mesh *mesh, const char *why) {
    mesh->stop_failed = true;
    error_set(&mesh->stop_failure, MESHX_ESTOPPED,
              "%s is still registered at the agent at %s, which drops it %u s after its "
              "checks have gone critical: %s",
              mesh->config.values.service_id, mesh->config.endpoint.shown,
              mesh->config.values.deregister_after / 1000, why);
}

static void on_deregistered(const struct meshx_failure *failure, void *argument) {
    struct mesh *mesh = argument;
    if (failure != NULL) {
        still_registered(mesh, failure->text);
        mesh->stop_failure.code = failure->code;
        mesh_note_failure(mesh, failure);
    } else {
        mesh->registration.may_exist = false;
    }
    stop_sidecar(mesh);
}

void mesh_stop_continue(struct mesh *mesh) {
    if (mesh->registration.in_flight) {
        return;
    }
    if (!mesh->registration.may_exist) {
        stop_sidecar(mesh);
    } else if (consul_deregister(mesh->consul, mesh->config.values.service_id,
                                 on_deregistered, mesh) != MESHX_OK) {
        struct meshx_failure failure;
        error_set(&failure, MESHX_ENOMEM, "out of memory");
        on_deregistered(&failure, mesh);
    }
}

void mesh_sidecar_stopped(struct mesh *mesh) {
    mesh->sidecar_pid = 0;
    mesh->sidecar_accepts = false;
    finish_soon(mesh);
}

void mesh_abandon(void *self) {
    struct mesh *mesh = self;
    if (mesh->registration.in_flight ||
        (mesh->registration.may_exist && !mesh->stop_failed)) {
        still_registered(mesh, "the time for an orderly stop was over");
    }
    mesh_finish(mesh);
}
