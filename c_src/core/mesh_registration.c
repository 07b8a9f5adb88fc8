/*
 * The one writer of our registration: desired against applied. L4, control thread only.
 *
 * Every PUT carries the whole desired state and at most one is under way, so no update
 * is lost and whatever is asked for meanwhile goes out in the next one: a burst of
 * upstreams costs two. Revisions are explained at struct mesh_registration.
 */
#include "error.h"
#include "mesh_internal.h"
#include <stdlib.h>
#include <string.h>

/* An agent that takes a registration but knows nothing of it a moment later, a balancer
 * over two of them perhaps, is not written to without pause: the next heartbeat looks. */
#define REPAIR_PAUSE_MS 1000

static void on_registered(const struct meshx_failure *failure, void *argument);
static void settle(struct mesh *mesh, const struct meshx_failure *failure);

/* Writes the desired state as JSON to |*out| (new). */
static int write_registration(const struct mesh *mesh, char **out,
                              struct meshx_failure *failure) {
    const struct meshx_config *config = &mesh->config.values;
    size_t count = 0;
    struct document_upstream *upstreams =
        calloc(mesh->upstream_count + 1, sizeof *upstreams);
    if (upstreams == NULL) {
        return error_set(failure, MESHX_ENOMEM, "out of memory for the registration");
    }
    for (size_t i = 0; i < mesh->upstream_count; i++) {
        if (!mesh->upstreams[i].departed) {
            upstreams[count++] = (struct document_upstream){
                .service_name = mesh->upstreams[i].service_name,
                .bind_address = "127.0.0.1",
                .port = mesh->upstreams[i].port};
        }
    }
    struct document_registration registration = {
        .node = config->node,
        .service_id = config->service_id,
        .service_name = config->service_name,
        .listen_address = mesh->config.listen_probe_address,
        .listen_port = config->listen_port,
        .sidecar_address = config->sidecar_address,
        .sidecar_port = mesh->sidecar_port,
        .vm_check_id = mesh->vm_check.id,
        .sidecar_check_id = mesh->sidecar_check.id,
        .ttl = config->ttl,
        .deregister_after = config->deregister_after,
        .service_template = config->service_template,
        .upstream_template = config->upstream_template,
        .upstreams = upstreams,
        .upstream_count = count};
    int code = document_registration(&registration, out, failure);
    free(upstreams);
    return code;
}

bool mesh_registration_is_refused(int code) {
    return code == MESHX_EAGENT_REFUSED || code == MESHX_EAGENT_ACL ||
           code == MESHX_ECONFIG;
}

/* A connection that broke is not among these: the agent may have done it before. */
static bool has_not_arrived(int code) {
    return code == MESHX_EAGENT_UNREACHABLE || code == MESHX_EAGENT_TLS;
}

uint64_t mesh_registration_change(struct mesh *mesh) {
    uint64_t revision = ++mesh->registration.wanted;
    mesh_registration_apply(mesh);
    return revision;
}

static void forget_token(struct buf *token) {
    if (token->data != NULL) {
        explicit_bzero(token->data, token->size);
    }
    buf_fini(token);
}

/* Empty if there is none, or it can't be read now. */
static void read_token(const struct mesh *mesh, struct buf *token) {
    struct meshx_failure ignored; /* named by whichever request needs the token */
    if (mesh->config.endpoint.token_file != NULL) {
        (void)endpoint_token(&mesh->config.endpoint, token, &ignored);
    }
}

void mesh_registration_apply(struct mesh *mesh) {
    struct mesh_registration *registration = &mesh->registration;
    bool something = registration->wanted > registration->sent ||
                     registration->lost != 0 || registration->moving != 0;
    bool alive = mesh->state == MESHX_STATE_STARTING || mesh->state == MESHX_STATE_READY;
    if (registration->in_flight || !something || !alive) {
        return;
    }
    char *json = NULL;
    struct meshx_failure failure;
    registration->in_flight = true;
    registration->sent = registration->wanted;
    forget_token(&registration->token);
    read_token(mesh, &registration->token);
    int code = write_registration(mesh, &json, &failure);
    if (code == MESHX_OK) {
        code = consul_register(mesh->consul, json, on_registered, mesh);
        if (code != MESHX_OK) {
            error_set(&failure, code, "out of memory for the registration");
        }
    }
    free(json);
    if (code != MESHX_OK) {
        settle(mesh, &failure); /* nothing was sent */
    }
}

/* The agent keeps the token of a registration and tells its servers about the service
 * with it. Once that one is revoked they would not hear of us any more. */
void mesh_registration_follow_token(struct mesh *mesh) {
    struct mesh_registration *registration = &mesh->registration;
    struct buf token = {0};
    read_token(mesh, &token);
    bool changed =
        token.size > 0 && strcmp(buf_text(&token), buf_text(&registration->token)) != 0;
    forget_token(&token);
    if (changed && registration->lost == 0) {
        mesh_log(
            mesh, MESHX_LEVEL_NOTICE,
            "the token in CONSUL_HTTP_TOKEN_FILE=%s has changed: registering %s again "
            "with it",
            mesh->config.endpoint.token_file, mesh->config.values.service_id);
        registration->lost = ++registration->wanted;
        mesh_registration_apply(mesh);
    }
}

void mesh_registration_fini(struct mesh_registration *registration) {
    forget_token(&registration->token);
}

void mesh_registration_lost(struct mesh *mesh) {
    struct mesh_registration *registration = &mesh->registration;
    if (registration->lost != 0 ||
        loop_now() - registration->repaired_at < REPAIR_PAUSE_MS) {
        return;
    }
    mesh_log(mesh, MESHX_LEVEL_WARNING,
             "the agent at %s does not know %s any more (restarted without its data, or "
             "someone deregistered it): registering it again",
             mesh->config.endpoint.shown, mesh->config.values.service_id);
    registration->lost = ++registration->wanted;
    mesh_registration_apply(mesh);
}

/* All that was waiting for what the agent has now. */
static void on_applied(struct mesh *mesh) {
    struct mesh_registration *registration = &mesh->registration;
    if (registration->moving != 0 && registration->moving <= registration->applied) {
        registration->moving = 0;
        if (!mesh->draining) {
            mesh->sidecar_pid = 0;
            sidecar_restart(mesh->sidecar);
        }
    }
    if (registration->lost != 0 && registration->lost <= registration->applied) {
        registration->lost = 0;
        registration->repaired_at = loop_now();
        mesh->repairs++;
        mesh_log(mesh, MESHX_LEVEL_NOTICE, "%s is registered again at the agent at %s",
                 mesh->config.values.service_id, mesh->config.endpoint.shown);
        mesh_check_both(mesh); /* new checks begin critical */
        mesh_watch_lost(mesh);
    }
    mesh_upstream_applied(mesh, registration->applied, NULL);
    mesh_registration_apply(mesh);
}

static bool has_template(const struct mesh *mesh) {
    const struct meshx_config *config = &mesh->config.values;
    return config->service_template != NULL ||
           (config->upstream_template != NULL && mesh->upstream_count > 0);
}

static void on_registered(const struct meshx_failure *failure, void *argument) {
    struct mesh *mesh = argument;
    struct mesh_registration *registration = &mesh->registration;
    struct meshx_failure named;
    if (failure != NULL && failure->code == MESHX_EAGENT_REFUSED && has_template(mesh)) {
        error_set(&named, failure->code,
                  "%s (service_template and upstream_template, if set, add to it)",
                  failure->text);
        failure = &named;
    }
    if (failure == NULL) {
        registration->may_exist = true;
        registration->applied = registration->sent;
        mesh->registrations++;
    } else if (!has_not_arrived(failure->code) &&
               !mesh_registration_is_refused(failure->code)) {
        registration->may_exist = true; /* it may have done it and not said so */
    }
    settle(mesh, failure);
}

/* The registration under way is done or has failed: whose turn is it? */
static void settle(struct mesh *mesh, const struct meshx_failure *failure) {
    struct mesh_registration *registration = &mesh->registration;
    registration->in_flight = false;
    if (mesh->state == MESHX_STATE_STOPPING) {
        mesh_stop_continue(mesh);
    } else if (mesh->state == MESHX_STATE_STARTING) {
        mesh_start_registered(mesh, failure);
    } else if (failure == NULL) {
        mesh_agent_result(mesh, MESH_TALK_REGISTRATION, NULL);
        on_applied(mesh);
    } else {
        /* Those who asked are told and may ask again. What holds on is retried. */
        bool retried = registration->lost != 0 || registration->moving != 0;
        mesh_upstream_applied(mesh, registration->sent, failure);
        if (retried) {
            mesh_agent_result(mesh, MESH_TALK_REGISTRATION, failure);
        } else {
            mesh_note_failure(mesh, failure);
        }
        if (registration->wanted > registration->sent) {
            mesh_registration_apply(mesh);
        }
    }
}
