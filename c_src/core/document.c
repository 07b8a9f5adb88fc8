/*
 * Consul's JSON documents, out: what a registration says. L1, any thread: no state.
 *
 * Our document is built first and a user's template merged into it, so that a template
 * can add but never take away. Keys keep their order (ours, then the template's), so the
 * same input is the same text. jansson's own limits hold: 2048 levels of nesting, 64-bit
 * integers, UTF-8.
 */
#include "document_internal.h"
#include "buf.h"
#include "error.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

/* Where we are in a document, for people: "Connect.SidecarService". */
struct place {
    const struct place *parent; /* NULL: the document itself, |key| is its name */
    const char *key;
};

int document_out_of_memory(struct meshx_failure *failure) {
    return error_set(failure, MESHX_ENOMEM, "out of memory for a JSON document");
}

bool document_ran_out_of_memory(const json_error_t *error) {
    return error->line < 0 || json_error_code(error) == json_error_out_of_memory;
}

const char *document_kind_of(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number with a fraction";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

/* --- Templates ------------------------------------------------------------------------
 */

static int parse_template(const char *text, json_t **out, struct meshx_failure *failure) {
    json_error_t error;
    json_t *value = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (value == NULL && document_ran_out_of_memory(&error)) {
        return document_out_of_memory(failure);
    }
    if (value == NULL) {
        /* Without what jansson quotes: a template may hold a secret. */
        const char *quote = strstr(error.text, " near ");
        size_t size = quote == NULL ? strlen(error.text) : (size_t)(quote - error.text);
        return error_set(failure, MESHX_ECONFIG, "line %d, column %d: %.*s", error.line,
                         error.column, (int)size, error.text);
    }
    if (!json_is_object(value)) {
        int result = error_set(failure, MESHX_ECONFIG,
                               "line 1, column 1: this is %s, not an object",
                               document_kind_of(value));
        json_decref(value);
        return result;
    }
    *out = value;
    return MESHX_OK;
}

int document_check_template(const char *text, struct meshx_failure *failure) {
    json_t *value = NULL;
    int result = parse_template(text, &value, failure);
    json_decref(value);
    return result;
}

/* As parse_template(), but |text| may be NULL and the failure names the template. */
static int read_template(const char *name, const char *text, json_t **out,
                         struct meshx_failure *failure) {
    struct meshx_failure reason;
    if (text == NULL) {
        return MESHX_OK;
    }
    int result = parse_template(text, out, &reason);
    return result == MESHX_ECONFIG
               ? error_set(failure, result, "%s: %s", name, reason.text)
           : result == MESHX_OK ? MESHX_OK
                                : document_out_of_memory(failure);
}

static int append_place(struct buf *out, const struct place *place) {
    if (place->parent == NULL) {
        return MESHX_OK;
    }
    int result = append_place(out, place->parent);
    if (result == MESHX_OK && place->parent->parent != NULL) {
        result = buf_append_text(out, ".");
    }
    return result == MESHX_OK ? buf_append_text(out, place->key) : result;
}

static int template_failure(struct meshx_failure *failure, const struct place *place,
                            const char *problem, const char *detail) {
    struct buf path = {0};
    const struct place *root = place;
    while (root->parent != NULL) {
        root = root->parent;
    }
    int result = append_place(&path, place);
    result = result != MESHX_OK ? document_out_of_memory(failure)
                                : error_set(failure, MESHX_ECONFIG, "%s: %s %s %s",
                                            root->key, buf_text(&path), problem, detail);
    buf_fini(&path);
    return result;
}

/* Whether the agent would take |a| for |b|: it ignores case and, for some, underscores.
 */
static bool is_lookalike(const char *a, const char *b) {
    for (;; a++, b++) {
        a += strspn(a, "_");
        b += strspn(b, "_");
        char upper_a = (char)(*a >= 'a' && *a <= 'z' ? *a - 'a' + 'A' : *a);
        char upper_b = (char)(*b >= 'a' && *b <= 'z' ? *b - 'a' + 'A' : *b);
        if (upper_a != upper_b) {
            return false;
        }
        if (upper_a == '\0') {
            return true;
        }
    }
}

/* The key of |ours| that the agent would overwrite with the template's |key|, or NULL. */
static const char *find_lookalike(json_t *ours, const char *key) {
    const char *our_key;
    json_t *value;
    json_object_foreach(ours, our_key, value) {
        if (is_lookalike(our_key, key)) {
            return our_key;
        }
    }
    return NULL;
}

/* What a template can't set, since something else decides it. */
static const struct {
    const char *parent;
    const char *key;
    const char *decided;
} decided_elsewhere[] = {
    {"service_template", "ID", "the node's name decides"},
    {"service_template", "Name", "service_name decides"},
    {"service_template", "Port", "inet_dist_listen_min decides"},
    {"SidecarService", "Address", "sidecar_address decides"},
    {"SidecarService", "Port", "sidecar_ports decides"},
    {"Proxy", "LocalServiceAddress", "inet_dist_use_interface decides"},
    {"Proxy", "LocalServicePort", "inet_dist_listen_min decides"},
    {"upstream_template", "DestinationName", "the dialled node decides"},
    {"upstream_template", "LocalBindAddress", "it is always 127.0.0.1"},
    {"upstream_template", "LocalBindPort", "upstream_ports decides"},
};

static const char *decides(const struct place *place) {
    for (size_t i = 0; i < sizeof decided_elsewhere / sizeof decided_elsewhere[0]; i++) {
        if (strcmp(place->parent->key, decided_elsewhere[i].parent) == 0 &&
            is_lookalike(place->key, decided_elsewhere[i].key)) {
            return decided_elsewhere[i].decided;
        }
    }
    return NULL;
}

/*
 * Adds to |ours| what it doesn't have: objects are merged, arrays joined, other values
 * must be the same. |theirs| is only read, but its values are shared afterwards.
 */
static int merge(json_t *ours, json_t *theirs, const struct place *place,
                 struct meshx_failure *failure) {
    /* Meta's keys are the user's own words, only elsewhere spelling can overwrite ours.
     */
    bool are_words = place->parent != NULL && strcmp(place->key, "Meta") == 0;
    const char *key;
    json_t *value;
    json_object_foreach(theirs, key, value) {
        const struct place here = {place, key};
        json_t *mine = json_object_get(ours, key);
        const char *decided = decides(&here);
        int result = MESHX_OK;
        if (decided != NULL && !json_is_null(value) && !json_equal(mine, value)) {
            return template_failure(failure, &here, "must be left out:", decided);
        }
        if (mine == NULL) {
            const char *meant = are_words ? NULL : find_lookalike(ours, key);
            if (meant != NULL) {
                return template_failure(failure, &here, "must be written", meant);
            }
            if (json_object_set(ours, key, value) != 0) {
                return document_out_of_memory(failure);
            }
        } else if (json_is_null(value)) {
            continue;
        } else if (json_is_object(mine)) {
            result = json_is_object(value)
                         ? merge(mine, value, &here, failure)
                         : template_failure(failure, &here, "must be an object, but is",
                                            document_kind_of(value));
        } else if (json_is_array(mine)) {
            if (!json_is_array(value)) {
                return template_failure(failure, &here, "must be an array, but is",
                                        document_kind_of(value));
            }
            if (json_array_extend(mine, value) != 0) {
                return document_out_of_memory(failure);
            }
        } else if (json_is_object(value) || json_is_array(value)) {
            result = template_failure(failure, &here, "must not be given as",
                                      document_kind_of(value));
        } else if (!json_equal(mine, value)) {
            result = template_failure(failure, &here,
                                      "must be left out:", "meshx_node sets it");
        }
        if (result != MESHX_OK) {
            return result;
        }
    }
    return MESHX_OK;
}

/* --- Registration ---------------------------------------------------------------------
 */

/* Of json_pack_ex(), whose input only ever fails for its encoding. */
static int pack_failure(struct meshx_failure *failure, const json_error_t *error,
                        const char *text) {
    return json_error_code(error) == json_error_invalid_utf8
               ? error_set(failure, MESHX_ECONFIG, "registration of %s: not UTF-8", text)
               : document_out_of_memory(failure);
}

/* Where the sidecar reaches a node that listens at |address|. */
static const char *reachable(const char *address) {
    struct in_addr ipv4;
    struct in6_addr ipv6;
    if (inet_pton(AF_INET, address, &ipv4) == 1) {
        return ipv4.s_addr == htonl(INADDR_ANY) ? "127.0.0.1" : address;
    }
    if (inet_pton(AF_INET6, address, &ipv6) == 1) {
        return IN6_IS_ADDR_UNSPECIFIED(&ipv6) ? "::1" : address;
    }
    return address;
}

static int add_check(json_t *checks, const struct document_registration *registration,
                     const char *id, const char *name, struct meshx_failure *failure) {
    json_error_t error;
    char ttl[16];
    snprintf(ttl, sizeof ttl, "%lums", (unsigned long)registration->ttl);
    json_t *check = json_pack_ex(&error, 0, "{s:s, s:s, s:s, s:s}", "CheckID", id, "Name",
                                 name, "TTL", ttl, "Status", "critical");
    if (check == NULL) {
        return pack_failure(failure, &error, id);
    }
    return json_array_append_new(checks, check) == 0 ? MESHX_OK
                                                     : document_out_of_memory(failure);
}

/* The VM's check also ends what a crash leaves behind. The sidecar's must not: that would
 * take away the sidecar's registration alone. */
static int add_vm_check(json_t *checks, const struct document_registration *registration,
                        struct meshx_failure *failure) {
    char after[16];
    snprintf(after, sizeof after, "%lums", (unsigned long)registration->deregister_after);
    int result = add_check(checks, registration, registration->vm_check_id,
                           DOCUMENT_VM_CHECK, failure);
    if (result == MESHX_OK &&
        json_object_set_new(json_array_get(checks, 0), "DeregisterCriticalServiceAfter",
                            json_string(after)) != 0) {
        result = document_out_of_memory(failure);
    }
    return result;
}

static int add_upstream(json_t *upstreams, const struct document_upstream *upstream,
                        json_t *template, struct meshx_failure *failure) {
    json_error_t error;
    json_t *value = json_pack_ex(
        &error, 0, "{s:s, s:s, s:i}", "DestinationName", upstream->service_name,
        "LocalBindAddress", upstream->bind_address, "LocalBindPort", (int)upstream->port);
    if (value == NULL) {
        return pack_failure(failure, &error, upstream->service_name);
    }
    const struct place place = {NULL, "upstream_template"};
    int result = template == NULL ? MESHX_OK : merge(value, template, &place, failure);
    if (result == MESHX_OK && json_array_append(upstreams, value) != 0) {
        result = document_out_of_memory(failure);
    }
    json_decref(value);
    return result;
}

/* So that a template that doesn't fit is found when the node starts, not when it dials.
 * No template sets what fits two upstreams. */
static int check_upstream_template(json_t *template, struct meshx_failure *failure) {
    static const struct document_upstream any[] = {{"-", "127.0.0.1", 1},
                                                   {"+", "127.0.0.1", 2}};
    json_t *upstreams = json_array();
    int result = upstreams == NULL ? document_out_of_memory(failure) : MESHX_OK;
    for (size_t i = 0; i < 2 && result == MESHX_OK; i++) {
        result = add_upstream(upstreams, &any[i], template, failure);
    }
    json_decref(upstreams);
    return result;
}

/*
 * The document without the template. The sidecar has a check of its own, for it alone is
 * what others look for; an alias of the service's checks, the usual way, is told of their
 * changes by a notice that gets lost now and then, and then lags by a minute
 * (agent/checks/alias.go). The service has no Address: its sidecar would
 * inherit it and listen there instead of at all addresses (agent/sidecar_service.go).
 */
static int pack_document(const struct document_registration *registration, json_t *checks,
                         json_t *sidecar_checks, json_t *upstreams, json_t **out,
                         struct meshx_failure *failure) {
    json_error_t error;
    json_t *document = json_pack_ex(
        &error, 0,
        "{s:s, s:s, s:i, s:{s:s}, s:O,"
        " s:{s:{s:i, s:O, s:{s:s, s:i, s:O}}}}",
        "ID", registration->service_id, "Name", registration->service_name, "Port",
        (int)registration->listen_port, "Meta", DOCUMENT_META_NODE, registration->node,
        "Checks", checks, "Connect", "SidecarService", "Port",
        (int)registration->sidecar_port, "Checks", sidecar_checks, "Proxy",
        "LocalServiceAddress", reachable(registration->listen_address),
        "LocalServicePort", (int)registration->listen_port, "Upstreams", upstreams);
    if (document == NULL) {
        return pack_failure(failure, &error, registration->service_id);
    }
    if (registration->sidecar_address != NULL) {
        json_t *sidecar =
            json_object_get(json_object_get(document, "Connect"), "SidecarService");
        if (json_object_set_new(sidecar, "Address",
                                json_string(registration->sidecar_address)) != 0) {
            json_decref(document);
            return document_out_of_memory(failure);
        }
    }
    *out = document;
    return MESHX_OK;
}

/* Where json_dump_callback() writes. It goes on after some of the callback's errors as if
 * nothing had happened (jansson 2.14), so whether one failed is noted here. */
struct sink {
    struct buf text;
    bool failed;
};

static int write_to_sink(const char *text, size_t size, void *argument) {
    struct sink *sink = argument;
    if (buf_append(&sink->text, text, size) != MESHX_OK) {
        sink->failed = true;
    }
    return sink->failed ? -1 : 0;
}

/*
 * Not json_dumps(): its text belongs to jansson's allocator, which another library in
 * this process may have replaced, ours to free().
 */
static int dump(const json_t *document, char **out, struct meshx_failure *failure) {
    struct sink sink = {0};
    if (json_dump_callback(document, write_to_sink, &sink, JSON_COMPACT) != 0 ||
        sink.failed) {
        buf_fini(&sink.text);
        return document_out_of_memory(failure);
    }
    *out = buf_take(&sink.text);
    return MESHX_OK;
}

int document_registration(const struct document_registration *registration, char **out,
                          struct meshx_failure *failure) {
    json_t *service_template = NULL;
    json_t *upstream_template = NULL;
    json_t *checks = json_array();
    json_t *sidecar_checks = json_array();
    json_t *upstreams = json_array();
    json_t *document = NULL;
    const struct place place = {NULL, "service_template"};
    int result = MESHX_OK;
    if (checks == NULL || sidecar_checks == NULL || upstreams == NULL) {
        result = document_out_of_memory(failure);
        goto done;
    }
    result = read_template("service_template", registration->service_template,
                           &service_template, failure);
    if (result == MESHX_OK) {
        result = read_template("upstream_template", registration->upstream_template,
                               &upstream_template, failure);
    }
    if (result == MESHX_OK) {
        result = add_vm_check(checks, registration, failure);
    }
    if (result == MESHX_OK) {
        result = add_check(sidecar_checks, registration, registration->sidecar_check_id,
                           DOCUMENT_SIDECAR_CHECK, failure);
    }
    if (result == MESHX_OK && upstream_template != NULL &&
        registration->upstream_count == 0) {
        result = check_upstream_template(upstream_template, failure);
    }
    for (size_t i = 0; i < registration->upstream_count && result == MESHX_OK; i++) {
        result = add_upstream(upstreams, &registration->upstreams[i], upstream_template,
                              failure);
    }
    if (result == MESHX_OK) {
        result = pack_document(registration, checks, sidecar_checks, upstreams, &document,
                               failure);
    }
    if (result == MESHX_OK && service_template != NULL) {
        result = merge(document, service_template, &place, failure);
    }
    const char *key = find_lookalike(document, "Address");
    if (result == MESHX_OK && registration->sidecar_address == NULL && key != NULL &&
        json_string_length(json_object_get(document, key)) > 0) {
        const struct place address = {&place, "Address"};
        result = template_failure(failure, &address, "needs sidecar_address too:",
                                  "the sidecar would listen there");
    }
    if (result == MESHX_OK) {
        result = dump(document, out, failure);
    }

done:
    json_decref(document);
    json_decref(upstreams);
    json_decref(sidecar_checks);
    json_decref(checks);
    json_decref(upstream_template);
    json_decref(service_template);
    return result;
}
