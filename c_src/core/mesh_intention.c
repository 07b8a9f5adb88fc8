/*
 * Which links intentions allow, known here, so that no link costs a request. L4, control
 * thread only.
 *
 * What can decide a pair that our service is one end of are those intentions that match
 * our service as source or as destination, and for all other pairs what holds for two
 * names that nobody has: three answers of the agent, however many nodes there are. They
 * are asked for whenever the blocking query (mesh_watch.c) tells of a change.
 *
 * Invariant: |known| only while all three are from after the last change that we were
 * told of. Where they can't be had, or aren't as simple as that, the agent is asked about
 * each link instead (MESH_VERDICT_ASK).
 */
#include "error.h"
#include "mesh_internal.h"
#include <string.h>
#include <strings.h>

/* No node has this as its service's name: it has no "@" and isn't made by any mapping. */
#define NOBODY "meshx-node-nobody"

static void ask(struct mesh *mesh);

/* ---- verdicts ---- */

static bool is_name(const char *end, const char *name) {
    return strcmp(end, "*") == 0 || strcmp(end, name) == 0;
}

/* Consul's versions differ in whether they would match it. */
static bool is_name_but_for_case(const char *end, const char *name) {
    return strcmp(end, name) != 0 && strcasecmp(end, name) == 0;
}

enum mesh_verdict mesh_intention_verdict(const struct mesh *mesh, const char *source,
                                         const char *destination,
                                         const struct document_intention **decides) {
    const struct mesh_intentions *all = &mesh->intentions;
    bool ours = strcmp(source, mesh->config.values.service_name) == 0;
    const struct document_intentions *matching = ours ? &all->from : &all->to;
    *decides = NULL;
    if (!all->known) {
        return MESH_VERDICT_ASK;
    }
    for (size_t i = 0; i < matching->count; i++) {
        const struct document_intention *one = &matching->items[i];
        if (one->foreign || is_name_but_for_case(one->source, source) ||
            is_name_but_for_case(one->destination, destination)) {
            *decides = NULL;
            return MESH_VERDICT_ASK;
        }
        if (is_name(one->source, source) && is_name(one->destination, destination) &&
            (*decides == NULL || one->precedence > (*decides)->precedence)) {
            *decides = one;
        }
    }
    bool allowed = *decides == NULL ? all->otherwise
                                    : (*decides)->action != NULL &&
                                          strcmp((*decides)->action, "allow") == 0;
    return allowed ? MESH_VERDICT_ALLOW : MESH_VERDICT_DENY;
}

bool mesh_intention_is_current(const struct mesh *mesh) {
    return mesh->intentions.known && mesh_watch_sees_intentions(mesh);
}

bool mesh_intention_is_coming(const struct mesh *mesh) {
    return mesh->intentions.pending > 0 || mesh_watch_begins_intentions(mesh);
}

/* ---- answers ---- */

/* The last answer of three has come. */
static void finish(struct mesh *mesh) {
    struct mesh_intentions *all = &mesh->intentions;
    bool again = all->again;
    all->known = !all->incomplete && !again;
    all->again = false;
    if (!mesh_is_running(mesh)) {
        if (mesh->state == MESHX_STATE_READY) { /* draining: requests are answered */
            mesh_lookup_unpark(mesh);
        }
        return;
    }
    if (again) {
        ask(mesh);
    } else {
        mesh_link_judge(mesh);
        mesh_lookup_unpark(mesh);
    }
}

static void answered(struct mesh *mesh, const struct meshx_failure *failure) {
    struct mesh_intentions *all = &mesh->intentions;
    if (failure != NULL) {
        all->incomplete = true;
        if (failure->code != MESHX_EAGENT_ACL) { /* that lasts */
            mesh_note_failure(mesh, failure);
            mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
        }
    }
    all->pending--;
    if (all->pending == 0) {
        finish(mesh);
    }
}

static void take(struct document_intentions *place, struct document_intentions *new) {
    struct document_intentions former = *place;
    *place = *new;
    *new = former;
}

static void on_from(const struct meshx_failure *failure,
                    struct document_intentions *intentions, void *argument) {
    struct mesh *mesh = argument;
    if (failure == NULL) {
        take(&mesh->intentions.from, intentions);
    }
    answered(mesh, failure);
}

static void on_to(const struct meshx_failure *failure,
                  struct document_intentions *intentions, void *argument) {
    struct mesh *mesh = argument;
    if (failure == NULL) {
        take(&mesh->intentions.to, intentions);
    }
    answered(mesh, failure);
}

static void on_otherwise(const struct meshx_failure *failure, bool allowed,
                         void *argument) {
    struct mesh *mesh = argument;
    mesh->intentions.otherwise = allowed;
    answered(mesh, failure);
}

/* ---- questions ---- */

static void ask(struct mesh *mesh) {
    struct mesh_intentions *all = &mesh->intentions;
    const char *name = mesh->config.values.service_name;
    const unsigned wanted = 3;
    all->incomplete = false;
    if (consul_intentions(mesh->consul, CONSUL_SOURCE, name, on_from, mesh) == MESHX_OK) {
        all->pending++;
    }
    if (consul_intentions(mesh->consul, CONSUL_DESTINATION, name, on_to, mesh) ==
        MESHX_OK) {
        all->pending++;
    }
    if (consul_allowed(mesh->consul, NOBODY, NOBODY, on_otherwise, mesh) == MESHX_OK) {
        all->pending++;
    }
    if (all->pending < wanted) {
        all->incomplete = true;
        mesh_watch_recheck(mesh, MESH_RECHECK_TIME);
    }
    if (all->pending == 0) {
        finish(mesh);
    }
}

void mesh_intention_refresh(struct mesh *mesh) {
    mesh->intentions.known = false;
    if (mesh->intentions.pending > 0) {
        mesh->intentions.again = true;
    } else {
        ask(mesh);
    }
}

void mesh_intention_fini(struct mesh *mesh) {
    document_intentions_fini(&mesh->intentions.from);
    document_intentions_fini(&mesh->intentions.to);
}
