/*
 * Typed calls to the agent: a path, maybe a body, and what the answer means. Control
 * thread only.
 *
 * A call lives from the request to its callback. It is taken off the list before that, so
 * the callback may do anything, consul_free() included. consul_free() frees the calls on
 * the list, which http will not report any more.
 */
#include "consul.h"
#include "error.h"
#include <stdlib.h>
#include <string.h>

#define CONNECTIONS 2
/* Of a blocking query, seconds. The agent adds up to a sixteenth, so that not all end as
 * one. */
#define WAIT 60

enum kind {
    REGISTER,
    DEREGISTER,
    CHECK,
    SERVICE,
    INSTANCES,
    ALLOWED,
    INTENTIONS,
    CHANGES,
    CHECKS
};

struct call {
    struct consul *consul;
    enum kind kind;
    union {
        consul_done plain; /* REGISTER, DEREGISTER, CHECK */
        consul_service_done service;
        consul_instances_done instances;
        consul_allowed_done allowed;
        consul_intentions_done intentions;
        consul_changes_done changes;
        consul_checks_done checks;
    } done;
    void *argument;
    struct buf what; /* for people */
    struct call *next;
    struct call *previous;
};

struct consul {
    struct http *http;
    struct http *waiting; /* for blocking queries */
    const struct endpoint *endpoint;
    uint32_t timeout;
    struct consul_counts counts;
    struct call *calls;
};

int consul_new(struct meshx_loop *loop, const struct endpoint *endpoint, uint32_t timeout,
               struct consul **out) {
    struct consul *consul = calloc(1, sizeof *consul);
    if (consul == NULL) {
        return MESHX_ENOMEM;
    }
    int code = http_new(loop, endpoint, CONNECTIONS, &consul->http);
    if (code == MESHX_OK) {
        code = http_new(loop, endpoint, CONSUL_QUERIES_MAX, &consul->waiting);
    }
    if (code != MESHX_OK) {
        consul_free(consul);
        return code;
    }
    consul->endpoint = endpoint;
    consul->timeout = timeout;
    *out = consul;
    return MESHX_OK;
}

static void unlink_call(struct call *call) {
    if (call->next != NULL) {
        call->next->previous = call->previous;
    }
    if (call->previous != NULL) {
        call->previous->next = call->next;
    } else {
        call->consul->calls = call->next;
    }
}

static void call_free(struct call *call) {
    buf_fini(&call->what);
    free(call);
}

void consul_free(struct consul *consul) {
    if (consul == NULL) {
        return;
    }
    http_free(consul->http);
    http_free(consul->waiting);
    struct call *call = consul->calls;
    while (call != NULL) {
        struct call *next = call->next;
        call_free(call);
        call = next;
    }
    free(consul);
}

struct consul_counts consul_counts(const struct consul *consul) {
    return consul->counts;
}

/* ---- answers ---- */

static bool says(const struct http_answer *answer, const char *words) {
    return strstr(answer->body, words) != NULL;
}

/* Whether |answer| says that what we named is not there. Before 1.11 that was a 500, for
 * a service only with ACLs. */
static bool is_unknown(const struct http_answer *answer) {
    return answer->status == 404 ||
           (answer->status == 500 &&
            (says(answer, "Unknown service") || says(answer, "Unknown check") ||
             says(answer, "does not have associated TTL")));
}

/* Whether the agent can't answer for want of its servers: they have no leader, or a
 * client agent has not joined any yet, or can't connect to them. */
static bool is_without_servers(const struct http_answer *answer) {
    return says(answer, "No cluster leader") || says(answer, "No known Consul servers") ||
           says(answer, "failed to get conn");
}

static bool is_success(const struct call *call, const struct http_answer *answer) {
    return (answer->status >= 200 && answer->status <= 299) ||
           ((call->kind == DEREGISTER || call->kind == SERVICE) && is_unknown(answer));
}

/* Copies the agent's text as one line. */
static void one_line(const struct http_answer *answer, char *out, size_t size) {
    size_t length = 0;
    for (const char *at = answer->body; *at != '\0' && length + 1 < size; at++) {
        unsigned char c = (unsigned char)*at;
        if (c > ' ') {
            out[length++] = (char)c;
        } else if (length > 0 && out[length - 1] != ' ') {
            out[length++] = ' ';
        }
    }
    while (length > 0 && out[length - 1] == ' ') {
        length--;
    }
    out[length] = '\0';
}

/* What a status that is no success means. */
static void refuse(const struct call *call, const struct http_answer *answer,
                   struct meshx_failure *failure) {
    const struct endpoint *endpoint = call->consul->endpoint;
    int code = MESHX_EAGENT_REFUSED;
    const char *remedy = "";
    char line[200];
    one_line(answer, line, sizeof line);
    if (answer->status == 403) {
        code = MESHX_EAGENT_ACL;
        remedy = endpoint->token == NULL && endpoint->token_file == NULL
                     ? "; set a token that has the rights: CONSUL_HTTP_TOKEN_FILE or "
                       "CONSUL_HTTP_TOKEN"
                 : says(answer, "ACL not found")
                     ? "; Consul doesn't know the token in CONSUL_HTTP_TOKEN or "
                       "CONSUL_HTTP_TOKEN_FILE (any more)"
                     : "; has the token (CONSUL_HTTP_TOKEN, CONSUL_HTTP_TOKEN_FILE) the "
                       "rights?";
    } else if (answer->status == 429 || answer->status == 503) {
        code = MESHX_EAGENT_BUSY;
        remedy = "; it limits connections (http_max_conns_per_client) or requests";
    } else if (is_without_servers(answer)) {
        code = MESHX_EAGENT_NO_LEADER;
        remedy = "; its servers must be reachable and elect a leader";
    } else if (call->kind == CHECK && is_unknown(answer)) {
        code = MESHX_ENODE_UNKNOWN;
        remedy = "; it has lost the registration";
    } else if (answer->status == 400 && endpoint->query != NULL &&
               says(answer, "Enterprise")) {
        remedy = "; unset CONSUL_NAMESPACE and CONSUL_PARTITION";
    } else if (answer->status == 404) {
        remedy = "; is CONSUL_HTTP_ADDR the agent's HTTP port?";
    } else if (answer->status == 400 && says(answer, "HTTPS server")) {
        remedy = " CONSUL_HTTP_ADDR must begin with https://";
    }
    error_set(failure, code, "Consul agent at %s answers %ld %s%s", endpoint->shown,
              answer->status, line[0] != '\0' ? line : "without a word", remedy);
}

/* Counts and reports the failure, with what was asked before its text. */
static void fail(struct call *call, const struct meshx_failure *failure) {
    struct meshx_failure whole;
    error_set(&whole, failure->code, "%s: %s", buf_text(&call->what), failure->text);
    call->consul->counts.failures++;
    switch (call->kind) {
    case REGISTER:
    case DEREGISTER:
    case CHECK:
        call->done.plain(&whole, call->argument);
        break;
    case SERVICE:
        call->done.service(&whole, NULL, call->argument);
        break;
    case INSTANCES:
        call->done.instances(&whole, NULL, call->argument);
        break;
    case ALLOWED:
        call->done.allowed(&whole, false, call->argument);
        break;
    case INTENTIONS:
        call->done.intentions(&whole, NULL, call->argument);
        break;
    case CHANGES:
        call->done.changes(&whole, 0, call->argument);
        break;
    case CHECKS:
        call->done.checks(&whole, 0, NULL, call->argument);
        break;
    }
}

/* The document in the answer is not what it should be. */
static void fail_document(struct call *call, const struct meshx_failure *failure) {
    struct meshx_failure whole;
    error_set(&whole, failure->code, "Consul agent at %s: %s",
              call->consul->endpoint->shown, failure->text);
    fail(call, &whole);
}

static void end_service(struct call *call, const struct http_answer *answer) {
    struct meshx_failure failure;
    struct document_service service;
    if (is_unknown(answer)) {
        call->done.service(NULL, NULL, call->argument);
    } else if (document_parse_service(answer->body, answer->size, &service, &failure) !=
               MESHX_OK) {
        fail_document(call, &failure);
    } else {
        call->done.service(NULL, &service, call->argument);
        document_service_fini(&service);
    }
}

static void end_instances(struct call *call, const struct http_answer *answer) {
    struct meshx_failure failure;
    struct document_instances instances;
    if (document_parse_instances(answer->body, answer->size, &instances, &failure) !=
        MESHX_OK) {
        fail_document(call, &failure);
    } else {
        call->done.instances(NULL, &instances, call->argument);
        document_instances_fini(&instances);
    }
}

static void end_allowed(struct call *call, const struct http_answer *answer) {
    struct meshx_failure failure;
    bool allowed;
    if (document_parse_allowed(answer->body, answer->size, &allowed, &failure) !=
        MESHX_OK) {
        fail_document(call, &failure);
    } else {
        call->done.allowed(NULL, allowed, call->argument);
    }
}

static void end_intentions(struct call *call, const struct http_answer *answer) {
    struct meshx_failure failure;
    struct document_intentions intentions;
    if (document_parse_intentions(answer->body, answer->size, &intentions, &failure) !=
        MESHX_OK) {
        fail_document(call, &failure);
    } else {
        call->done.intentions(NULL, &intentions, call->argument);
        document_intentions_fini(&intentions);
    }
}

static void end_checks(struct call *call, const struct http_answer *answer) {
    struct meshx_failure failure;
    struct document_checks checks;
    if (document_parse_checks(answer->body, answer->size, &checks, &failure) !=
        MESHX_OK) {
        fail_document(call, &failure);
    } else {
        call->done.checks(NULL, answer->index, &checks, call->argument);
        document_checks_fini(&checks);
    }
}

static void end_success(struct call *call, const struct http_answer *answer) {
    switch (call->kind) {
    case REGISTER:
    case DEREGISTER:
    case CHECK:
        call->done.plain(NULL, call->argument);
        break;
    case SERVICE:
        end_service(call, answer);
        break;
    case INSTANCES:
        end_instances(call, answer);
        break;
    case ALLOWED:
        end_allowed(call, answer);
        break;
    case INTENTIONS:
        end_intentions(call, answer);
        break;
    case CHANGES:
        call->done.changes(NULL, answer->index, call->argument);
        break;
    case CHECKS:
        end_checks(call, answer);
        break;
    }
}

static void on_answer(const struct meshx_failure *failure,
                      const struct http_answer *answer, void *argument) {
    struct call *call = argument;
    unlink_call(call);
    if (failure != NULL) {
        fail(call, failure);
    } else if (is_success(call, answer)) {
        end_success(call, answer);
    } else {
        struct meshx_failure refusal;
        refuse(call, answer, &refusal);
        fail(call, &refusal);
    }
    call_free(call);
}

/* ---- questions ---- */

struct question {
    const char *method;
    const char *path;      /* ends where |name| is appended, escaped */
    const char *name;      /* or NULL */
    const char *parameter; /* ends where |value| is appended, escaped */
    const char *value;     /* or NULL: without the parameter */
    const uint64_t *index; /* of a blocking query, or NULL */
    const char *body;
    const char *what; /* for people; |name| follows, unless it is the filter of a blocking
                         query, and |relation| and |value| if set */
    const char *relation;
};

static int build_path(const struct question *question, struct buf *path) {
    int code = buf_append_text(path, question->path);
    if (code == MESHX_OK && question->name != NULL) {
        code = buf_append_escaped(path, question->name);
    }
    if (code == MESHX_OK && question->value != NULL) {
        code = buf_append_text(path, question->parameter);
        if (code == MESHX_OK) {
            code = buf_append_escaped(path, question->value);
        }
    }
    if (code == MESHX_OK && question->index != NULL && *question->index > 0) {
        code = buf_format(path, "&index=%llu&wait=%us",
                          (unsigned long long)*question->index, WAIT);
    }
    return code;
}

static int build_what(const struct question *question, struct buf *what) {
    int code = buf_append_text(what, question->what);
    if (code == MESHX_OK && question->name != NULL && question->index == NULL) {
        code = buf_format(what, " %s", question->name);
    }
    if (code == MESHX_OK && question->relation != NULL) {
        code = buf_format(what, " %s %s", question->relation, question->value);
    }
    return code;
}

/* Copies |model|, which has its kind, callback and argument, and sends the question. */
static int ask(struct consul *consul, const struct call *model,
               const struct question *question) {
    struct buf path = {0};
    struct call *call = malloc(sizeof *call);
    if (call == NULL) {
        return MESHX_ENOMEM;
    }
    *call = *model;
    call->consul = consul;
    if (build_what(question, &call->what) != MESHX_OK ||
        build_path(question, &path) != MESHX_OK) {
        goto fail;
    }
    bool watches = question->index != NULL;
    bool waits = watches && *question->index > 0; /* else it is answered at once */
    struct http_request request = {question->method, buf_text(&path), question->body,
                                   consul->timeout + (waits ? WAIT * 1000 / 16 * 17 : 0)};
    if (http_send(watches ? consul->waiting : consul->http, &request, on_answer, call) !=
        MESHX_OK) {
        goto fail;
    }
    buf_fini(&path);
    consul->counts.requests++;
    call->next = consul->calls;
    if (call->next != NULL) {
        call->next->previous = call;
    }
    consul->calls = call;
    return MESHX_OK;

fail:
    buf_fini(&path);
    call_free(call);
    return MESHX_ENOMEM;
}

int consul_register(struct consul *consul, const char *json, consul_done done,
                    void *argument) {
    return ask(consul,
               &(struct call){.kind = REGISTER, .done.plain = done, .argument = argument},
               &(struct question){.method = "PUT",
                                  .path = "/v1/agent/service/register",
                                  .body = json,
                                  .what = "registering the service"});
}

int consul_deregister(struct consul *consul, const char *service_id, consul_done done,
                      void *argument) {
    return ask(
        consul,
        &(struct call){.kind = DEREGISTER, .done.plain = done, .argument = argument},
        &(struct question){.method = "PUT",
                           .path = "/v1/agent/service/deregister/",
                           .name = service_id,
                           .what = "deregistering service"});
}

int consul_check(struct consul *consul, const char *check_id, enum consul_check status,
                 const char *note, consul_done done, void *argument) {
    bool pass = status == CONSUL_PASS;
    return ask(
        consul, &(struct call){.kind = CHECK, .done.plain = done, .argument = argument},
        &(struct question){
            .method = "PUT",
            .path = pass ? "/v1/agent/check/pass/" : "/v1/agent/check/fail/",
            .name = check_id,
            .parameter = "?note=",
            .value = note,
            .what = pass ? "reporting a pass of check" : "reporting a failure of check"});
}

int consul_service(struct consul *consul, const char *service_id,
                   consul_service_done done, void *argument) {
    return ask(
        consul,
        &(struct call){.kind = SERVICE, .done.service = done, .argument = argument},
        &(struct question){.method = "GET",
                           .path = "/v1/agent/service/",
                           .name = service_id,
                           .what = "asking for service ID"});
}

int consul_instances(struct consul *consul, enum consul_health which,
                     const char *service_name, consul_instances_done done,
                     void *argument) {
    return ask(
        consul,
        &(struct call){.kind = INSTANCES, .done.instances = done, .argument = argument},
        &(struct question){.method = "GET",
                           .path = which == CONSUL_HEALTH_CONNECT ? "/v1/health/connect/"
                                                                  : "/v1/health/service/",
                           .name = service_name,
                           .what = "asking for instances of service"});
}

int consul_allowed(struct consul *consul, const char *source, const char *destination,
                   consul_allowed_done done, void *argument) {
    return ask(
        consul,
        &(struct call){.kind = ALLOWED, .done.allowed = done, .argument = argument},
        &(struct question){.method = "GET",
                           .path = "/v1/connect/intentions/check?source=",
                           .name = source,
                           .parameter = "&destination=",
                           .value = destination,
                           .what = "asking whether",
                           .relation = "may connect to"});
}

int consul_intentions(struct consul *consul, enum consul_end end, const char *name,
                      consul_intentions_done done, void *argument) {
    return ask(
        consul,
        &(struct call){.kind = INTENTIONS, .done.intentions = done, .argument = argument},
        &(struct question){.method = "GET",
                           .path = end == CONSUL_SOURCE ? "/v1/connect/intentions/match"
                                                          "?by=source&name="
                                                        : "/v1/connect/intentions/match"
                                                          "?by=destination&name=",
                           .name = name,
                           .what = end == CONSUL_SOURCE
                                       ? "asking for intentions with source"
                                       : "asking for intentions with destination"});
}

int consul_watch_intentions(struct consul *consul, uint64_t index,
                            consul_changes_done done, void *argument) {
    return ask(
        consul,
        &(struct call){.kind = CHANGES, .done.changes = done, .argument = argument},
        &(struct question){.method = "GET",
                           .path = "/v1/connect/intentions?filter=",
                           .name = "SourceName==\"\"",
                           .index = &index,
                           .what = "watching intentions"});
}

int consul_sidecars(struct consul *consul, consul_checks_done done, void *argument) {
    return ask(consul,
               &(struct call){.kind = CHECKS, .done.checks = done, .argument = argument},
               &(struct question){.method = "GET",
                                  .path = "/v1/health/state/any?filter=",
                                  .name = "Name==\"" DOCUMENT_SIDECAR_CHECK "\"",
                                  .what = "asking for all sidecars with"});
}

int consul_watch_critical(struct consul *consul, uint64_t index, consul_checks_done done,
                          void *argument) {
    return ask(
        consul, &(struct call){.kind = CHECKS, .done.checks = done, .argument = argument},
        &(struct question){.method = "GET",
                           .path = "/v1/health/state/critical?filter=",
                           .name = "CheckID==\"serfHealth\" or Name==\"" DOCUMENT_VM_CHECK
                                   "\" or Name==\"" DOCUMENT_SIDECAR_CHECK "\"",
                           .index = &index,
                           .what = "watching critical checks"});
}
