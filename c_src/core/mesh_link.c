/*
 * Linked nodes: are they still allowed, are they healthy? L4, control thread only.
 *
 * A proxy asks for intentions when a connection is made and never again, so we ask for
 * the link's whole life: when it comes up, and whenever mesh_watch.c says that something
 * may have changed. Not more than a few links are asked about at once, since the
 * heartbeats use the same connections to the agent. What can't be asked changes nothing:
 * only a clear denial is told, once.
 *
 * A link is in mesh->links until it is down and no answer refers to it any more.
 */
#include "error.h"
#include "mesh_internal.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ASKED_MAX 2
/* How long a denial waits for the list of intentions to say which one it is. */
#define NAME_TIME 1000 /* milliseconds */
/* How long a linked node must be critical, or well again, before it is told: a node that
 * stops, or whose agent has lost its state, is critical for a moment. */
#define NOTICE_TIME 2000 /* milliseconds */

static void judge_next(struct mesh *mesh);

static void link_free(struct mesh_link *link) {
    free(link->node);
    free(link->service_name);
    free(link->agent_node);
    free(link);
}

static void unlink_link(struct mesh_link *link) {
    struct mesh_link **place = &link->mesh->links;
    while (*place != link) {
        place = &(*place)->next;
    }
    *place = link->next;
}

static bool is_running(const struct mesh *mesh) {
    return mesh->state == MESHX_STATE_READY && !mesh->draining;
}

/* ---- health ---- */

/* Is |check| one of the node's own two, or that of the host it is on? */
static bool concerns(const struct document_check *check, const struct mesh_link *link) {
    size_t size = strlen(link->node);
    const char *id = check->service_id;
    if (id == NULL || id[0] == '\0') {
        return link->agent_node != NULL &&
               strcmp(check->agent_node, link->agent_node) == 0;
    }
    return strncmp(id, link->node, size) == 0 &&
           (id[size] == '\0' || strcmp(id + size, "-sidecar-proxy") == 0);
}

static void compare(struct mesh_link *link) {
    struct mesh *mesh = link->mesh;
    const struct document_checks *checks = &mesh->critical;
    link->critical = false;
    for (size_t i = 0; i < checks->count && !link->critical; i++) {
        const struct document_check *check = &checks->items[i];
        if (concerns(check, link)) {
            bool says = check->trouble != NULL;
            link->critical = true;
            snprintf(link->trouble, sizeof link->trouble, "%.*s",
                     says ? (int)strcspn(check->trouble, "\r\n") : 0,
                     says ? check->trouble : "");
        }
    }
    if (link->critical != link->critical_told) {
        loop_timer_start(mesh->notice, NOTICE_TIME);
    }
}

void mesh_link_compare(struct mesh *mesh) {
    for (struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (link->service_name != NULL && !link->gone) {
            compare(link);
        }
    }
}

void mesh_link_notice(struct mesh *mesh) {
    if (mesh->queries[MESH_QUERY_CRITICAL].failures > 0) {
        return; /* what we have heard is old; the next answer is compared anew */
    }
    for (struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (link->critical != link->critical_told && !link->gone && is_running(mesh)) {
            struct meshx_event event = {.type = MESHX_EVENT_LINK_HEALTH,
                                        .request = link->id,
                                        .text = link->critical ? link->trouble : NULL};
            link->critical_told = link->critical;
            mesh_emit(mesh, &event);
        }
    }
}

/* ---- intentions ---- */

/* The intention that decides, as far as we may see it and have been told. */
static const struct document_intention *
find_intention(const struct mesh *mesh, const char *source, const char *destination) {
    const struct document_intention *found = NULL;
    for (size_t i = 0; i < mesh->intentions.count; i++) {
        const struct document_intention *one = &mesh->intentions.items[i];
        bool matches =
            (strcmp(one->source, "*") == 0 || strcmp(one->source, source) == 0) &&
            (strcmp(one->destination, "*") == 0 ||
             strcmp(one->destination, destination) == 0);
        if (matches && (found == NULL || one->precedence > found->precedence)) {
            found = one;
        }
    }
    return found;
}

static bool is_denial(const struct document_intention *one) {
    return one != NULL && (one->action == NULL || strcmp(one->action, "allow") != 0);
}

static void describe(const struct document_intention *one, char *out, size_t size) {
    bool has_id = one->id != NULL && one->id[0] != '\0';
    snprintf(out, size, "the Consul intention %.100s => %.100s (precedence %lld%s%.50s)",
             one->source, one->destination, (long long)one->precedence,
             has_id ? ", ID " : "", has_id ? one->id : "");
}

void mesh_link_describe_denial(const struct mesh *mesh, const char *source,
                               const char *destination, char *out, size_t size) {
    const struct mesh_query *query = &mesh->queries[MESH_QUERY_INTENTIONS];
    const struct document_intention *one = find_intention(mesh, source, destination);
    if (query->active && query->failures == 0 && is_denial(one)) {
        describe(one, out, size);
    } else {
        snprintf(out, size, "a Consul intention (or the default policy)");
    }
}

static void tell_denied(struct mesh_link *link, const char *source,
                        const char *destination) {
    struct mesh *mesh = link->mesh;
    struct meshx_failure failure;
    const struct document_intention *one = find_intention(mesh, source, destination);
    char which[400] =
        "Consul's default policy, or an intention that our token can't read,";
    if (link->denied_at == 0) {
        link->denied_at = loop_now();
    }
    if (!is_denial(one) && loop_now() - link->denied_at < NAME_TIME) {
        mesh_watch_recheck(mesh, NAME_TIME); /* unless news of it come before */
        return;
    }
    if (is_denial(one)) {
        describe(one, which, sizeof which);
    } else if (one != NULL) { /* it is outdated, or outdone by one that we can't see */
        snprintf(which, sizeof which, "a Consul intention");
    }
    link->denied = true;
    error_set(&failure, MESHX_EDENIED, "%s denies %s => %s", which, source, destination);
    mesh_note_failure(mesh, &failure);
    struct meshx_event event = {
        .type = MESHX_EVENT_LINK_DENIED, .request = link->id, .failure = &failure};
    mesh_emit(mesh, &event);
}

/* One answer about the link is here; |link| may be freed by this. */
static void answered(struct mesh_link *link) {
    struct mesh *mesh = link->mesh;
    link->asked--;
    if (link->asked > 0) {
        return;
    }
    mesh->links_asked--;
    if (!link->refused) {
        link->denied_at = 0;
    }
    if (link->gone) {
        unlink_link(link);
        link_free(link);
    }
    judge_next(mesh);
}

static void judge_answer(struct mesh_link *link, const struct meshx_failure *failure,
                         bool allowed, const char *source, const char *destination) {
    struct mesh *mesh = link->mesh;
    struct meshx_failure why;
    if (is_running(mesh) && !link->gone &&
        !mesh_lookup_allowed(mesh, failure, allowed, source, destination, &why)) {
        link->refused = link->refused || failure == NULL;
        if (failure == NULL && !link->denied) {
            tell_denied(link, source, destination);
        } else if (failure != NULL) {
            mesh_note_failure(mesh, &why);
            if (why.code != MESHX_EAGENT_ACL) { /* that lasts */
                mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
            }
        }
        if (why.code == MESHX_EAGENT_ACL && !mesh->link_acl_reported) {
            mesh->link_acl_reported = true;
            mesh_log(mesh, MESHX_LEVEL_WARNING,
                     "%s; a link to it is kept, whatever intentions say", why.text);
        }
    }
    answered(link);
}

static void on_ours(const struct meshx_failure *failure, bool allowed, void *argument) {
    struct mesh_link *link = argument;
    judge_answer(link, failure, allowed, link->mesh->config.values.service_name,
                 link->service_name);
}

static void on_theirs(const struct meshx_failure *failure, bool allowed, void *argument) {
    struct mesh_link *link = argument;
    judge_answer(link, failure, allowed, link->service_name,
                 link->mesh->config.values.service_name);
}

/* Only to learn on which host it is: whose end is its end, too. */
static void on_instances(const struct meshx_failure *failure,
                         const struct document_instances *instances, void *argument) {
    struct mesh_link *link = argument;
    for (size_t i = 0; failure == NULL && i < instances->count; i++) {
        const struct document_instance *instance = &instances->items[i];
        if (instance->node != NULL && strcmp(instance->node, link->node) == 0 &&
            link->agent_node == NULL) {
            link->agent_node = strdup(instance->agent_node); /* NULL: next time */
        }
    }
    if (is_running(link->mesh) && !link->gone) {
        compare(link);
    }
    answered(link);
}

/* Sends the questions; what there is no memory for is asked later. */
static void ask(struct mesh_link *link) {
    struct mesh *mesh = link->mesh;
    const char *ours = mesh->config.values.service_name;
    bool both = !mesh->config.values.dial_direction_only;
    bool complete = true;
    link->judged = mesh->link_news;
    link->refused = false;
    if (both || link->dialed) {
        bool sent = consul_allowed(mesh->consul, ours, link->service_name, on_ours,
                                   link) == MESHX_OK;
        link->asked += sent ? 1 : 0;
        complete = sent;
    }
    if (both || !link->dialed) {
        bool sent = consul_allowed(mesh->consul, link->service_name, ours, on_theirs,
                                   link) == MESHX_OK;
        link->asked += sent ? 1 : 0;
        complete = complete && sent;
    }
    if (link->agent_node == NULL) {
        bool sent = consul_instances(mesh->consul, CONSUL_HEALTH_SERVICE,
                                     link->service_name, on_instances, link) == MESHX_OK;
        link->asked += sent ? 1 : 0;
    }
    mesh->links_asked += link->asked > 0 ? 1 : 0;
    if (!complete) {
        mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
    }
}

static void judge_next(struct mesh *mesh) {
    for (struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (mesh->links_asked >= ASKED_MAX || !is_running(mesh)) {
            return;
        }
        if (link->service_name != NULL && !link->gone && link->asked == 0 &&
            link->judged < mesh->link_news) {
            ask(link);
        }
    }
}

void mesh_link_judge(struct mesh *mesh) {
    mesh->link_news++;
    judge_next(mesh);
}

/* ---- up and down ---- */

bool mesh_link_any(const struct mesh *mesh) {
    for (const struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (link->service_name != NULL && !link->gone) {
            return true;
        }
    }
    return false;
}

void mesh_link_up(struct mesh *mesh, struct mesh_request *request) {
    struct mesh_link *link = calloc(1, sizeof *link);
    if (link == NULL) {
        mesh_log(mesh, MESHX_LEVEL_WARNING,
                 "out of memory: the link to %s is not watched for intentions",
                 request->node);
        return;
    }
    *link = (struct mesh_link){.next = mesh->links,
                               .mesh = mesh,
                               .id = request->id,
                               .node = request->node,
                               .service_name = request->service_name,
                               .dialed = request->dialed};
    request->node = NULL;
    request->service_name = NULL;
    mesh->links = link;
    if (mesh->link_news == 0) {
        mesh->link_news = 1;
    }
    mesh_watch_begin(mesh);
    judge_next(mesh);
}

void mesh_link_down(struct mesh *mesh, uint64_t id) {
    struct mesh_link *link = mesh->links;
    while (link != NULL && (link->id != id || link->gone)) {
        link = link->next;
    }
    if (link != NULL) {
        link->gone = true;
        if (link->asked == 0) {
            unlink_link(link);
            link_free(link);
        }
        if (mesh->sidecar_outdated) {
            mesh_watch_unlinked(mesh);
        }
    }
}

void mesh_link_fini(struct mesh *mesh) {
    while (mesh->links != NULL) {
        struct mesh_link *link = mesh->links;
        mesh->links = link->next;
        link_free(link);
    }
}
