/*
 * Consul's JSON documents, in: what the agent answers. L1, any thread: no state.
 *
 * Nothing of an answer is trusted. Every field is fetched with the type it must have, and
 * a text never ends early at a NUL, which would make two different names look equal.
 */
#include "document_internal.h"
#include "buf.h"
#include "error.h"

#include <stdlib.h>
#include <string.h>

static int parse_answer(const char *body, size_t size, json_t **out,
                        struct meshx_failure *failure) {
    json_error_t error;
    /* A check's output is whatever a program wrote, also a NUL. */
    *out = json_loadb(body, size, JSON_ALLOW_NUL, &error);
    if (*out != NULL) {
        return MESHX_OK;
    }
    return document_ran_out_of_memory(&error)
               ? document_out_of_memory(failure)
               : error_set(failure, MESHX_EAGENT_ANSWER,
                           "the agent's answer is not JSON: line %d, column %d: %s",
                           error.line, error.column, error.text);
}

static int answer_failure(struct meshx_failure *failure, const char *key,
                          const char *wanted, const json_t *value) {
    return error_set(failure, MESHX_EAGENT_ANSWER,
                     "the agent's answer is not understood: %s should be %s, but is %s",
                     key, wanted, value == NULL ? "missing" : document_kind_of(value));
}

enum presence { OPTIONAL, REQUIRED };

/* Borrows |key| of |object| to |*out|; NULL where it is missing or null and may be so. */
static int get(json_t *object, const char *key, json_type type, enum presence presence,
               json_t **out, struct meshx_failure *failure) {
    static const char *const wanted[] = {
        [JSON_OBJECT] = "an object",
        [JSON_ARRAY] = "an array",
        [JSON_STRING] = "a string",
        [JSON_INTEGER] = "an integer",
    };
    json_t *value = json_object_get(object, key);
    *out = NULL;
    if ((value == NULL || json_is_null(value)) && presence == OPTIONAL) {
        return MESHX_OK;
    }
    if (value == NULL || json_typeof(value) != type) {
        return answer_failure(failure, key, wanted[type], value);
    }
    *out = value;
    return MESHX_OK;
}

/* Copies |string| to |*out| (new); NULL stays NULL. A NUL in it becomes a space. */
static int copy_string(const json_t *string, char **out, struct meshx_failure *failure) {
    if (string == NULL) {
        *out = NULL;
        return MESHX_OK;
    }
    size_t size = json_string_length(string);
    char *text = malloc(size + 1);
    if (text == NULL) {
        return document_out_of_memory(failure);
    }
    memcpy(text, json_string_value(string), size + 1);
    for (char *nul = memchr(text, '\0', size); nul != NULL;
         nul = memchr(nul, '\0', size - (size_t)(nul - text))) {
        *nul = ' ';
    }
    *out = text;
    return MESHX_OK;
}

/* get() and copy_string() at once. */
static int get_string(json_t *object, const char *key, enum presence presence, char **out,
                      struct meshx_failure *failure) {
    json_t *value = NULL;
    int result = get(object, key, JSON_STRING, presence, &value, failure);
    return result == MESHX_OK ? copy_string(value, out, failure) : result;
}

/* Port number |key| of |object|; 0 if it is missing and OPTIONAL. */
static int get_port(json_t *object, const char *key, enum presence presence,
                    uint16_t *out, struct meshx_failure *failure) {
    json_t *port = NULL;
    int result = get(object, key, JSON_INTEGER, presence, &port, failure);
    json_int_t number = json_integer_value(port); /* 0 for NULL */
    if (result == MESHX_OK && (number < 0 || number > UINT16_MAX)) {
        return answer_failure(failure, key, "0 to 65535", port);
    }
    *out = (uint16_t)number;
    return result;
}

/* The node name in the Meta of |service|: NULL if there is none. */
static int get_node(json_t *service, char **out, struct meshx_failure *failure) {
    json_t *meta = NULL;
    int result = get(service, "Meta", JSON_OBJECT, OPTIONAL, &meta, failure);
    return result == MESHX_OK
               ? get_string(meta, DOCUMENT_META_NODE, OPTIONAL, out, failure)
               : result;
}

/* |*out|: what |check| says against its instance, NULL if it passes. */
static int read_check(json_t *check, char **out, struct meshx_failure *failure) {
    json_t *status = NULL;
    json_t *output = NULL;
    json_t *name = NULL;
    if (!json_is_object(check)) {
        return answer_failure(failure, "each of Checks", "an object", check);
    }
    int result = get(check, "Status", JSON_STRING, REQUIRED, &status, failure);
    if (result == MESHX_OK) {
        result = get(check, "Output", JSON_STRING, OPTIONAL, &output, failure);
    }
    if (result == MESHX_OK) {
        result = get(check, "Name", JSON_STRING, OPTIONAL, &name, failure);
    }
    if (result != MESHX_OK || strcmp(json_string_value(status), "passing") == 0) {
        return result;
    }
    if (output != NULL && json_string_length(output) > 0) {
        return copy_string(output, out, failure);
    }
    struct buf text = {0};
    if (buf_format(&text, "check \"%s\" is %s",
                   name == NULL ? "" : json_string_value(name),
                   json_string_value(status)) != MESHX_OK) {
        return document_out_of_memory(failure);
    }
    *out = buf_take(&text);
    return MESHX_OK;
}

/* Reads |entry| into |item|, which is zeroed; what there is of it on failure is the
 * caller's to free. */
typedef int read_item(json_t *entry, void *item, struct meshx_failure *failure);

struct list {
    void *items;
    size_t count;
};

/* Reads |array|, which |what| names, |item_size| bytes an item. On failure too |*out| has
 * what was read. */
static int read_list(const json_t *array, const char *what, size_t item_size,
                     read_item *read, struct list *out, struct meshx_failure *failure) {
    int result = MESHX_OK;
    *out = (struct list){0};
    if (!json_is_array(array)) {
        return answer_failure(failure, what, "an array", array);
    }
    size_t count = json_array_size(array);
    if (count > 0) {
        out->items = calloc(count, item_size);
        if (out->items == NULL) {
            return document_out_of_memory(failure);
        }
        out->count = count;
    }
    for (size_t i = 0; i < out->count && result == MESHX_OK; i++) {
        result =
            read(json_array_get(array, i), (char *)out->items + i * item_size, failure);
    }
    return result;
}

/* The same, of an answer that is nothing else. */
static int parse_list(const char *body, size_t size, const char *what, size_t item_size,
                      read_item *read, struct list *out, struct meshx_failure *failure) {
    json_t *answer = NULL;
    *out = (struct list){0};
    int result = parse_answer(body, size, &answer, failure);
    if (result == MESHX_OK) {
        result = read_list(answer, what, item_size, read, out, failure);
    }
    json_decref(answer);
    return result;
}

static int read_instance(json_t *entry, void *item, struct meshx_failure *failure) {
    struct document_instance *out = item;
    json_t *agent = NULL;
    json_t *service = NULL;
    json_t *checks = NULL;
    if (!json_is_object(entry)) {
        return answer_failure(failure, "each instance", "an object", entry);
    }
    int result = get(entry, "Node", JSON_OBJECT, REQUIRED, &agent, failure);
    if (result == MESHX_OK) {
        result = get(entry, "Service", JSON_OBJECT, REQUIRED, &service, failure);
    }
    if (result == MESHX_OK) {
        result = get(entry, "Checks", JSON_ARRAY, OPTIONAL, &checks, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(agent, "Node", REQUIRED, &out->agent_node, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(service, "ID", REQUIRED, &out->service_id, failure);
    }
    if (result == MESHX_OK) {
        result = get_node(service, &out->node, failure);
    }
    if (result == MESHX_OK) {
        result = get_port(service, "Port", OPTIONAL, &out->port, failure);
    }
    if (result == MESHX_OK) {
        bool own = json_string_length(json_object_get(service, "Address")) > 0;
        result = get_string(own ? service : agent, "Address", OPTIONAL, &out->address,
                            failure);
    }
    for (size_t i = 0;
         i < json_array_size(checks) && result == MESHX_OK && out->trouble == NULL; i++) {
        result = read_check(json_array_get(checks, i), &out->trouble, failure);
    }
    out->passing = out->trouble == NULL;
    return result;
}

int document_parse_instances(const char *body, size_t size,
                             struct document_instances *out,
                             struct meshx_failure *failure) {
    struct list list;
    int result = parse_list(body, size, "the list of instances", sizeof *out->items,
                            read_instance, &list, failure);
    *out = (struct document_instances){.items = list.items, .count = list.count};
    if (result != MESHX_OK) {
        document_instances_fini(out);
    }
    return result;
}

void document_instances_fini(struct document_instances *instances) {
    for (size_t i = 0; i < instances->count; i++) {
        free(instances->items[i].node);
        free(instances->items[i].service_id);
        free(instances->items[i].agent_node);
        free(instances->items[i].address);
        free(instances->items[i].trouble);
    }
    free(instances->items);
    *instances = (struct document_instances){0};
}

int document_parse_service(const char *body, size_t size, struct document_service *out,
                           struct meshx_failure *failure) {
    json_t *answer = NULL;
    json_t *proxy = NULL;
    *out = (struct document_service){0};
    int result = parse_answer(body, size, &answer, failure);
    if (result != MESHX_OK) {
        return result;
    }
    if (!json_is_object(answer)) {
        result = answer_failure(failure, "the service", "an object", answer);
    }
    if (result == MESHX_OK) {
        result = get_node(answer, &out->node, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(answer, "Address", REQUIRED, &out->address, failure);
    }
    if (result == MESHX_OK) {
        result = get_port(answer, "Port", REQUIRED, &out->port, failure);
    }
    if (result == MESHX_OK) {
        result = get(answer, "Proxy", JSON_OBJECT, OPTIONAL, &proxy, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(proxy, "LocalServiceAddress", OPTIONAL, &out->local_address,
                            failure);
    }
    if (result == MESHX_OK) {
        result = get_port(proxy, "LocalServicePort", OPTIONAL, &out->local_port, failure);
    }
    if (result != MESHX_OK) {
        document_service_fini(out);
    }
    json_decref(answer);
    return result;
}

void document_service_fini(struct document_service *service) {
    free(service->node);
    free(service->address);
    free(service->local_address);
    *service = (struct document_service){0};
}

int document_parse_allowed(const char *body, size_t size, bool *out,
                           struct meshx_failure *failure) {
    json_t *answer = NULL;
    int result = parse_answer(body, size, &answer, failure);
    if (result != MESHX_OK) {
        return result;
    }
    json_t *allowed = json_object_get(answer, "Allowed");
    if (json_is_boolean(allowed)) {
        *out = json_is_true(allowed);
    } else {
        result = answer_failure(failure, "Allowed", "a boolean", allowed);
    }
    json_decref(answer);
    return result;
}

/* Whether |key| is there and says anything but |usual|. */
static bool is_unusual(const json_t *object, const char *key, const char *usual) {
    const json_t *value = json_object_get(object, key);
    const char *text = json_string_value(value);
    return value != NULL && !json_is_null(value) &&
           (text == NULL || (text[0] != '\0' && strcmp(text, usual) != 0));
}

/* Consul Enterprise's, and those of other clusters. */
static bool is_foreign(const json_t *intention) {
    return is_unusual(intention, "SourceNS", "default") ||
           is_unusual(intention, "DestinationNS", "default") ||
           is_unusual(intention, "SourcePartition", "default") ||
           is_unusual(intention, "DestinationPartition", "default") ||
           is_unusual(intention, "SourcePeer", "") ||
           is_unusual(intention, "SourceSamenessGroup", "");
}

static int read_intention(json_t *entry, void *item, struct meshx_failure *failure) {
    struct document_intention *out = item;
    json_t *precedence = NULL;
    if (!json_is_object(entry)) {
        return answer_failure(failure, "each intention", "an object", entry);
    }
    int result = get_string(entry, "SourceName", REQUIRED, &out->source, failure);
    if (result == MESHX_OK) {
        result =
            get_string(entry, "DestinationName", REQUIRED, &out->destination, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(entry, "Action", OPTIONAL, &out->action, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(entry, "ID", OPTIONAL, &out->id, failure);
    }
    if (result == MESHX_OK) {
        result = get(entry, "Precedence", JSON_INTEGER, OPTIONAL, &precedence, failure);
        out->precedence = json_integer_value(precedence);
    }
    out->foreign = is_foreign(entry);
    return result;
}

int document_parse_intentions(const char *body, size_t size,
                              struct document_intentions *out,
                              struct meshx_failure *failure) {
    struct list list = {0};
    json_t *answer = NULL;
    int result = parse_answer(body, size, &answer, failure);
    if (result == MESHX_OK && json_object_size(answer) != 1) {
        result = answer_failure(failure, "the answer", "an object of one list", answer);
    }
    const json_t *array = json_object_iter_value(json_object_iter(answer));
    if (result == MESHX_OK && !json_is_null(array)) { /* null: none */
        result = read_list(array, "the list of intentions", sizeof *out->items,
                           read_intention, &list, failure);
    }
    json_decref(answer);
    *out = (struct document_intentions){.items = list.items, .count = list.count};
    if (result != MESHX_OK) {
        document_intentions_fini(out);
    }
    return result;
}

void document_intentions_fini(struct document_intentions *intentions) {
    for (size_t i = 0; i < intentions->count; i++) {
        free(intentions->items[i].source);
        free(intentions->items[i].destination);
        free(intentions->items[i].action);
        free(intentions->items[i].id);
    }
    free(intentions->items);
    *intentions = (struct document_intentions){0};
}

static int read_critical(json_t *entry, void *item, struct meshx_failure *failure) {
    struct document_check *out = item;
    if (!json_is_object(entry)) {
        return answer_failure(failure, "each check", "an object", entry);
    }
    int result = get_string(entry, "Node", REQUIRED, &out->agent_node, failure);
    if (result == MESHX_OK) {
        result = get_string(entry, "ServiceID", OPTIONAL, &out->service_id, failure);
    }
    if (result == MESHX_OK) {
        result = get_string(entry, "ServiceName", OPTIONAL, &out->service_name, failure);
    }
    return result == MESHX_OK ? read_check(entry, &out->trouble, failure) : result;
}

int document_parse_checks(const char *body, size_t size, struct document_checks *out,
                          struct meshx_failure *failure) {
    struct list list;
    int result = parse_list(body, size, "the list of checks", sizeof *out->items,
                            read_critical, &list, failure);
    *out = (struct document_checks){.items = list.items, .count = list.count};
    if (result != MESHX_OK) {
        document_checks_fini(out);
    }
    return result;
}

void document_checks_fini(struct document_checks *checks) {
    for (size_t i = 0; i < checks->count; i++) {
        free(checks->items[i].agent_node);
        free(checks->items[i].service_id);
        free(checks->items[i].service_name);
        free(checks->items[i].trouble);
    }
    free(checks->items);
    *checks = (struct document_checks){0};
}
