/*
 * What changes in Consul, by blocking queries. L4, control thread only.
 *
 * Two of them: changes of intentions, once that is wanted (an agent goes on with a query
 * for a minute after who asked has gone, so not by nodes that live for a moment), and
 * critical checks, always, because a query that breaks is also the first sign that the
 * agent has gone. The rules of blocking queries hold: an index that goes back begins anew
 * with 0, an answer without one is asked for on a timer, and however often the agent
 * answers, the same query is not sent more than twice a second, or once in two seconds,
 * but for the first time. A query that fails comes back with jittered back-off; where
 * intentions can't be watched, links are judged anew every few seconds instead.
 */
#include "error.h"
#include "mesh_internal.h"
#include <string.h>

/* All in milliseconds. */
#define INTERVAL 500
#define INTERVAL_CRITICAL 2000 /* no sooner is it told, and any registration wakes it */
#define RETRY_MIN 100
#define RETRY_MAX 1000       /* an agent that has gone may be back any moment */
#define RETRY_MAX_BUSY 10000 /* one that answers, but not this */
#define RETRY_RIGHTS 60000   /* a token may get another policy */
/* The built-in proxy that misses the agent asks again after 5, 20, 45 ... 180 s. */
#define PROXY_RETRY 5000
/* Failures in a row until a person is told. */
#define FAILURES_MAX 5

static void ask(struct mesh_query *query);

static bool is_wanted(const struct mesh_query *query) {
    const struct mesh *mesh = query->mesh;
    return mesh_is_running(mesh) &&
           (query->kind == MESH_QUERY_CRITICAL || mesh->intentions.wanted);
}

bool mesh_watch_sees_intentions(const struct mesh *mesh) {
    return mesh->queries[MESH_QUERY_INTENTIONS].waiting;
}

bool mesh_watch_begins_intentions(const struct mesh *mesh) {
    const struct mesh_query *query = &mesh->queries[MESH_QUERY_INTENTIONS];
    return query->active && query->index == 0 && query->failures == 0 && query->asked;
}

void mesh_watch_recheck(struct mesh *mesh, uint32_t delay) {
    if (mesh_is_running(mesh) && (!mesh->rechecking || delay < MESH_RECHECK_TIME)) {
        mesh->rechecking = true;
        loop_timer_start(mesh->recheck, delay);
    }
}

static void ask_later(struct mesh_query *query, uint64_t delay) {
    loop_timer_start(query->timer, delay);
}

/* ---- failures ---- */

static const char *lost_by(const struct mesh_query *query) {
    return query->kind == MESH_QUERY_CRITICAL
               ? "linked nodes that turn critical are not noticed"
               : "instead, all links are checked every 3 s";
}

static void report(struct mesh_query *query, const struct meshx_failure *failure) {
    struct mesh *mesh = query->mesh;
    const char *name = mesh->config.values.service_name;
    query->reported = true;
    if (failure->code == MESHX_EAGENT_ACL && query->kind == MESH_QUERY_CRITICAL) {
        mesh_log(mesh, MESHX_LEVEL_WARNING,
                 "the token needs node:read and service:read on all, else %s: %s",
                 lost_by(query), failure->text);
    } else if (failure->code == MESHX_EAGENT_ACL) {
        mesh_log(mesh, MESHX_LEVEL_WARNING,
                 "the token needs intentions:read on %s (which service:write has, unless "
                 "the rule says otherwise), else intentions can't be watched; %s: %s",
                 name, lost_by(query), failure->text);
    } else {
        mesh_log(mesh, MESHX_LEVEL_WARNING, "a blocking query fails; %s: %s",
                 lost_by(query), failure->text);
    }
}

static uint64_t back_off(const struct mesh_query *query, int code) {
    uint64_t most = RETRY_MAX;
    if (code == MESHX_EAGENT_ACL) {
        return RETRY_RIGHTS;
    }
    if (code != MESHX_EAGENT_UNREACHABLE) {
        most = RETRY_MAX_BUSY;
    }
    unsigned doublings = query->failures < 8 ? query->failures - 1 : 7;
    uint64_t delay = (uint64_t)RETRY_MIN << doublings;
    delay = delay < most ? delay : most;
    return delay - uv_hrtime() % (delay / 4 + 1);
}

static void failed(struct mesh_query *query, const struct meshx_failure *failure) {
    struct mesh *mesh = query->mesh;
    query->index = 0;
    query->failures++;
    if (query->failures == 1) {
        query->failing_since = loop_now();
    }
    if (query->kind == MESH_QUERY_INTENTIONS) {
        mesh->intentions.known = false;
    }
    if (failure->code == MESHX_EAGENT_UNREACHABLE && mesh->away_since == 0) {
        mesh->away_since = loop_now();
    }
    mesh_note_failure(mesh, failure);
    if (query->failures == 1) {
        mesh_retry_later(mesh); /* see at once how we stand with the agent */
    }
    /* That the agent has gone, heartbeats tell. A control node has none. */
    bool alone =
        query->failures > FAILURES_MAX && mesh->troubles_logged == 0 &&
        (mesh->heard_at > query->failing_since || mesh->config.values.control_node);
    if ((alone || failure->code == MESHX_EAGENT_ACL) && !query->reported) {
        report(query, failure);
    }
    if (query->kind != MESH_QUERY_CRITICAL) {
        mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
    }
    ask_later(query, back_off(query, failure->code));
    if (query->kind == MESH_QUERY_INTENTIONS && !mesh_intention_is_coming(mesh)) {
        mesh_lookup_unpark(mesh);
    }
}

/* ---- answers ---- */

/* Whether it tells something new. */
static bool answered(struct mesh_query *query, const struct meshx_failure *failure,
                     uint64_t index) {
    query->active = false;
    query->asked = false;
    query->waiting = false;
    if (!mesh_is_running(query->mesh)) {
        if (query->kind == MESH_QUERY_INTENTIONS &&
            query->mesh->state == MESHX_STATE_READY) {
            query->mesh->intentions.known = false; /* not watched any more */
            mesh_lookup_unpark(query->mesh);
        }
        return false;
    }
    query->active = true;
    if (failure != NULL) {
        failed(query, failure);
        return false;
    }
    if (query->mesh->away_since != 0) {
        query->mesh->away_time = loop_now() - query->mesh->away_since;
        query->mesh->away_since = 0;
    }
    if (query->reported) {
        query->reported = false;
        mesh_log(query->mesh, MESHX_LEVEL_NOTICE, "blocking queries work again");
    }
    bool news = index == 0 || index != query->index;
    bool first = query->index == 0; /* has told what is, not what has changed */
    uint64_t age = loop_now() - query->asked_at;
    uint64_t interval = query->kind == MESH_QUERY_CRITICAL ? INTERVAL_CRITICAL : INTERVAL;
    query->failures = 0;
    query->index = index < query->index ? 0 : index;
    ask_later(query, index == 0                 ? MESH_RECHECK_TIME
                     : age < interval && !first ? interval - age
                                                : 0);
    return news;
}

static void on_intentions(const struct meshx_failure *failure, uint64_t index,
                          void *argument) {
    struct mesh_query *query = argument;
    if (answered(query, failure, index)) {
        mesh_intention_refresh(query->mesh);
    }
}

static void on_critical(const struct meshx_failure *failure, uint64_t index,
                        struct document_checks *checks, void *argument) {
    struct mesh_query *query = argument;
    struct mesh *mesh = query->mesh;
    if (answered(query, failure, index)) {
        struct document_checks former = mesh->critical;
        mesh->critical = *checks;
        *checks = former;
        mesh_link_compare(mesh);
    }
}

/* ---- a sidecar that the agent's new state has not reached ---- */

static void renew_sidecar(struct mesh *mesh) {
    mesh_log(
        mesh, MESHX_LEVEL_NOTICE,
        "the agent at %s has lost its state: restarting the sidecar of %s, which else "
        "would be without its new certificates for up to some minutes",
        mesh->config.endpoint.shown, mesh->config.values.node);
    mesh->sidecar_outdated = false;
    mesh->sidecar_accepts = false;
    mesh->sidecar_pid = 0;
    sidecar_restart(mesh->sidecar);
}

/* A new agent may have a new CA. Proxies that have missed it work on with each other as
 * before, but not with new ones, until they ask again, which after a long absence takes
 * long. Links are worth more than that. */
void mesh_watch_lost(struct mesh *mesh) {
    uint64_t away =
        mesh->away_since != 0 ? loop_now() - mesh->away_since : mesh->away_time;
    mesh->sidecar_outdated = away >= PROXY_RETRY;
    mesh_watch_unlinked(mesh);
}

void mesh_watch_unlinked(struct mesh *mesh) {
    bool linked = false;
    for (const struct mesh_link *link = mesh->links; link != NULL; link = link->next) {
        linked = linked || !link->gone;
    }
    if (mesh->sidecar_outdated && !linked && mesh_is_running(mesh) &&
        mesh->sidecar != NULL && mesh->sidecar_pid != 0) {
        renew_sidecar(mesh);
    }
}

/* ---- questions ---- */

static void ask(struct mesh_query *query) {
    struct mesh *mesh = query->mesh;
    int code = MESHX_OK;
    query->active = is_wanted(query);
    if (!query->active) {
        return;
    }
    query->asked_at = loop_now();
    switch (query->kind) {
    case MESH_QUERY_INTENTIONS:
        code = consul_watch_intentions(mesh->consul, query->index, on_intentions, query);
        break;
    case MESH_QUERY_CRITICAL:
    case MESH_QUERY_COUNT:
        code = consul_watch_critical(mesh->consul, query->index, on_critical, query);
        break;
    }
    if (code != MESHX_OK) {
        struct meshx_failure failure;
        error_set(&failure, code, "out of memory for a blocking query");
        failed(query, &failure);
    } else {
        query->asked = true;
        query->waiting = query->index > 0;
    }
}

static void on_timer(void *argument) {
    ask(argument);
}

static void on_recheck(void *argument) {
    struct mesh *mesh = argument;
    bool blind = mesh->queries[MESH_QUERY_INTENTIONS].failures > 0;
    mesh->rechecking = false;
    if (!mesh_is_running(mesh) || !mesh_link_any(mesh)) {
        return;
    }
    /* Answers under way are not asked for again, else slow ones would never count. */
    if (mesh->troubles_logged == 0 && mesh->intentions.pending == 0) {
        mesh_intention_refresh(mesh);
    }
    if (blind || mesh->troubles_logged != 0) {
        mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
    }
}

static void on_notice(void *argument) {
    mesh_link_notice(argument);
}

/* ---- life ---- */

int mesh_watch_init(struct mesh *mesh) {
    int code = loop_timer_new(mesh->loop, on_recheck, mesh, &mesh->recheck);
    if (code == MESHX_OK) {
        code = loop_timer_new(mesh->loop, on_notice, mesh, &mesh->notice);
    }
    for (int kind = 0; code == MESHX_OK && kind < MESH_QUERY_COUNT; kind++) {
        struct mesh_query *query = &mesh->queries[kind];
        query->mesh = mesh;
        query->kind = (enum mesh_query_kind)kind;
        code = loop_timer_new(mesh->loop, on_timer, query, &query->timer);
    }
    return code;
}

void mesh_watch_begin(struct mesh *mesh) {
    for (int kind = 0; kind < MESH_QUERY_COUNT; kind++) {
        struct mesh_query *query = &mesh->queries[kind];
        if (!query->active) {
            query->index = 0; /* what was missed comes with the answer */
            ask(query);
        }
    }
    if (mesh->queries[MESH_QUERY_INTENTIONS].failures > 0 && mesh_link_any(mesh)) {
        mesh_watch_recheck(mesh, MESH_RECHECK_TIME); /* they end with the last link */
    }
}

void mesh_watch_end(struct mesh *mesh) {
    loop_timer_free(mesh->recheck);
    loop_timer_free(mesh->notice);
    mesh->recheck = NULL;
    mesh->notice = NULL;
    for (int kind = 0; kind < MESH_QUERY_COUNT; kind++) {
        loop_timer_free(mesh->queries[kind].timer);
        mesh->queries[kind].timer = NULL;
    }
}

void mesh_watch_fini(struct mesh *mesh) {
    mesh_intention_fini(mesh);
    document_checks_fini(&mesh->critical);
}
