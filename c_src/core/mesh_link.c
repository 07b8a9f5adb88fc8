/*
 * Linked nodes: are they still allowed, are they healthy? L4, control thread only.
 *
 * A proxy asks for intentions when a connection is made and never again, so we judge a
 * link for its whole life: when it comes up, and whenever something may have changed.
 * mesh_intention.c knows the verdicts, or says that the agent must be asked. Then not
 * more than a few links are asked about at once, since the heartbeats use the same
 * connections. What can't be asked changes nothing: only a clear denial is told, once.
 *
 * A link is in mesh->links until it is down and no answer refers to it any more.
 */
#include "error.h"
#include "mesh_internal.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ASKED_MAX 2
/* How long a linked node must be critical, or well again, before it is told: a node that
 * stops, or whose agent has lost its state, is critical for a moment. */
#define NOTICE_TIME 2000 /* milliseconds */

static void judge_next(struct mesh *mesh, bool fresh);

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

/* ---- health ---- */

static bool is_of_host(const struct document_check *check) {
    return check->service_id == NULL || check->service_id[0] == '\0';
}

bool mesh_link_is_host_critical(const struct mesh *mesh, const char *agent_node) {
    for (size_t i = 0; i < mesh->critical.count; i++) {
        const struct document_check *check = &mesh->critical.items[i];
        if (is_of_host(check) && strcmp(check->agent_node, agent_node) == 0) {
            return true;
        }
    }
    return false;
}

/* Is |check| one of the node's own two, or that of the host it is on? */
static bool concerns(const struct document_check *check, const struct mesh_link *link) {
    const char *name = check->service_name;
    if (is_of_host(check)) {
        return link->agent_node != NULL &&
               strcmp(check->agent_node, link->agent_node) == 0;
    }
    return name != NULL && (strcmp(name, link->service_name) == 0 ||
                            mesh_lookup_is_sidecar(name, link->service_name));
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

static void compare_all(struct mesh *mesh) {
    for (struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (link->service_name != NULL && !link->gone) {
            compare(link);
        }
    }
}

/* On which host a node is. It may still be listed on the one it has left, because that
 * has failed. */
static const char *find_host(const struct mesh *mesh, const char *service_name,
                             const struct document_checks *sidecars) {
    const char *host = NULL;
    for (size_t i = 0; i < sidecars->count; i++) {
        const struct document_check *sidecar = &sidecars->items[i];
        if (mesh_lookup_is_sidecar(sidecar->service_name, service_name) &&
            (host == NULL || mesh_link_is_host_critical(mesh, host))) {
            host = sidecar->agent_node;
        }
    }
    return host;
}

static void on_sidecars(const struct meshx_failure *failure, uint64_t index,
                        struct document_checks *sidecars, void *argument) {
    struct mesh *mesh = argument;
    (void)index;
    mesh->hosts_asked = false;
    for (struct mesh_link *link = mesh->links; failure == NULL && link != NULL;
         link = link->next) {
        const char *host = link->service_name == NULL || link->agent_node != NULL
                               ? NULL
                               : find_host(mesh, link->service_name, sidecars);
        if (host != NULL) {
            link->agent_node = strdup(host); /* NULL: next time */
        }
    }
    if (mesh_is_running(mesh)) {
        compare_all(mesh);
    }
}

/* On which host a node is, counts only when one is in trouble: its end is theirs, too. */
static bool is_host_unknown(const struct mesh *mesh) {
    bool host = false;
    bool unknown = false;
    for (size_t i = 0; i < mesh->critical.count; i++) {
        host = host || is_of_host(&mesh->critical.items[i]);
    }
    for (const struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        unknown = unknown || (link->agent_node == NULL && link->service_name != NULL);
    }
    return host && unknown;
}

void mesh_link_compare(struct mesh *mesh) {
    if (!mesh_is_running(mesh)) {
        return;
    }
    compare_all(mesh);
    if (!mesh->hosts_asked && is_host_unknown(mesh)) {
        mesh->hosts_asked = consul_sidecars(mesh->consul, on_sidecars, mesh) == MESHX_OK;
    }
}

void mesh_link_notice(struct mesh *mesh) {
    if (mesh->queries[MESH_QUERY_CRITICAL].failures > 0) {
        return; /* what we have heard is old; the next answer is compared anew */
    }
    for (struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (link->critical != link->critical_told && !link->gone &&
            mesh_is_running(mesh)) {
            struct meshx_event event = {.type = MESHX_EVENT_LINK_HEALTH,
                                        .request = link->id,
                                        .text = link->critical ? link->trouble : NULL};
            link->critical_told = link->critical;
            mesh_emit(mesh, &event);
        }
    }
}

/* ---- intentions ---- */

static void describe(const struct document_intention *one, char *out, size_t size) {
    bool has_id = one->id != NULL && one->id[0] != '\0';
    snprintf(out, size, "the Consul intention %.100s => %.100s (precedence %lld%s%.50s)",
             one->source, one->destination, (long long)one->precedence,
             has_id ? ", ID " : "", has_id ? one->id : "");
}

void mesh_link_describe_denial(const struct mesh *mesh, const char *source,
                               const char *destination, char *out, size_t size) {
    const struct document_intention *one = NULL;
    bool denied =
        mesh_intention_is_current(mesh) &&
        mesh_intention_verdict(mesh, source, destination, &one) == MESH_VERDICT_DENY;
    if (denied && one != NULL) {
        describe(one, out, size);
    } else {
        snprintf(out, size, "a Consul intention (or the default policy)");
    }
}

static void emit_denied(struct mesh *mesh, uint64_t id,
                        const struct meshx_failure *failure) {
    struct meshx_event event = {
        .type = MESHX_EVENT_LINK_DENIED, .request = id, .failure = failure};
    mesh_note_failure(mesh, failure);
    mesh_emit(mesh, &event);
}

/* |one| decides, or if NULL, |other|. */
static void tell_denied(struct mesh_link *link, const char *source,
                        const char *destination, const struct document_intention *one,
                        const char *other) {
    struct mesh *mesh = link->mesh;
    struct meshx_failure failure;
    char which[400];
    snprintf(which, sizeof which, "%s", other);
    if (link->denied) {
        return;
    }
    if (one != NULL) {
        describe(one, which, sizeof which);
    }
    link->denied = true;
    error_set(&failure, MESHX_EDENIED, "%s denies %s => %s", which, source, destination);
    emit_denied(mesh, link->id, &failure);
}

/* The agent's answer about one direction; |link| may be freed by this. */
static void judge_answer(struct mesh_link *link, const struct meshx_failure *failure,
                         bool allowed, const char *source, const char *destination) {
    struct mesh *mesh = link->mesh;
    struct meshx_failure why;
    if (mesh_is_running(mesh) && !link->gone &&
        !mesh_lookup_allowed(mesh, failure, allowed, source, destination, &why)) {
        if (failure == NULL) {
            const struct document_intention *decides = NULL;
            bool same = mesh_intention_verdict(mesh, source, destination, &decides) ==
                        MESH_VERDICT_DENY;
            tell_denied(link, source, destination, same ? decides : NULL,
                        "a Consul intention, or the default policy,");
        } else {
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
    link->asked--;
    if (link->asked > 0) {
        return;
    }
    mesh->links_asked--;
    if (link->gone) {
        unlink_link(link);
        link_free(link);
    }
    judge_next(mesh, false);
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

/* By what we know, else the agent is asked, which needs memory. What is not |fresh| may
 * have changed a moment ago, so that a denial would be for good what was over already. */
static void judge_direction(struct mesh_link *link, bool fresh, const char *source,
                            const char *destination, consul_allowed_done done) {
    struct mesh *mesh = link->mesh;
    const struct document_intention *decides = NULL;
    enum mesh_verdict verdict =
        fresh || mesh_intention_is_current(mesh)
            ? mesh_intention_verdict(mesh, source, destination, &decides)
            : MESH_VERDICT_ASK;
    switch (verdict == MESH_VERDICT_DENY && !fresh ? MESH_VERDICT_ASK : verdict) {
    case MESH_VERDICT_ALLOW:
        break;
    case MESH_VERDICT_DENY:
        tell_denied(link, source, destination, decides, "Consul's default policy");
        break;
    case MESH_VERDICT_ASK:
        if (consul_allowed(mesh->consul, source, destination, done, link) == MESHX_OK) {
            link->asked++;
        } else {
            mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
        }
        break;
    }
}

static void judge(struct mesh_link *link, bool fresh) {
    struct mesh *mesh = link->mesh;
    const char *ours = mesh->config.values.service_name;
    bool both = !mesh->config.values.dial_direction_only;
    link->judged = mesh->link_news;
    if (both || link->dialed) {
        judge_direction(link, fresh, ours, link->service_name, on_ours);
    }
    if (both || !link->dialed) {
        judge_direction(link, fresh, link->service_name, ours, on_theirs);
    }
    mesh->links_asked += link->asked > 0 ? 1 : 0;
}

/* |fresh|: what is known is this very moment's. */
static void judge_next(struct mesh *mesh, bool fresh) {
    if (mesh_intention_is_coming(mesh)) {
        return; /* what there is to know makes all be judged */
    }
    for (struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        if (mesh->links_asked >= ASKED_MAX || !mesh_is_running(mesh)) {
            return;
        }
        if (link->service_name != NULL && !link->gone && link->asked == 0 &&
            link->judged < mesh->link_news) {
            judge(link, fresh);
        }
    }
}

void mesh_link_judge(struct mesh *mesh) {
    mesh->link_news++;
    judge_next(mesh, true);
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
    if (link == NULL && request->service_name == NULL) {
        return; /* no intention counts for it */
    }
    if (link == NULL) {
        struct meshx_failure failure;
        error_set(&failure, MESHX_ENOMEM, "out of memory, so no intention could cut it");
        emit_denied(mesh, request->id, &failure);
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
    mesh->intentions.wanted = true;
    mesh_watch_begin(mesh);
    mesh_link_compare(mesh);
    judge_next(mesh, false);
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
