/*
 * Checks and copies the configuration of a node service. L4, caller's thread.
 *
 * The tables say what each key must be; texts are checked, copied and freed by the same
 * table, so that a key can't be forgotten in one of the three. Checks come first:
 * nothing is allocated for a configuration that is refused.
 */
#include "mesh_config.h"
#include "document.h"
#include "error.h"
#include "sock.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define FIELD(name) #name, offsetof(struct meshx_config, name)

enum text_rule { ANY_TEXT, CONSUL_NAME, IP_ADDRESS, JSON_OBJECT };

static const struct text_field {
    const char *name;
    size_t offset;
    enum text_rule rule;
    bool optional;
} TEXTS[] = {
    {FIELD(node), ANY_TEXT, false},
    {FIELD(service_id), CONSUL_NAME, false},
    {FIELD(service_name), CONSUL_NAME, false},
    {FIELD(listen_address), IP_ADDRESS, false},
    {FIELD(service_template), JSON_OBJECT, true},
    {FIELD(upstream_template), JSON_OBJECT, true},
    {FIELD(guard_path), ANY_TEXT, true}, /* needed when there is a sidecar_command */
    {FIELD(sidecar_address), IP_ADDRESS, true},
};

static const struct number_field {
    const char *name;
    size_t offset;
    uint32_t minimum;
} NUMBERS[] = {
    {FIELD(sidecar_restart_min), 1},
    {FIELD(sidecar_restart_max), 1},
    /* Three heartbeats fit into it. Shorter, and one late scheduler ends the service. */
    {FIELD(ttl), 500},
    {FIELD(deregister_after), 1},
    {FIELD(start_timeout), 1},
    {FIELD(request_timeout), 1},
    {FIELD(stop_timeout), 1},
    {FIELD(upstream_keep), 1},
};

static const struct range_field {
    const char *name;
    size_t offset;
} RANGES[] = {{FIELD(sidecar_ports)}, {FIELD(upstream_ports)}};

static const char **text_at(struct meshx_config *config, const struct text_field *field) {
    return (const char **)(void *)((char *)config + field->offset);
}

static const char *text_of(const struct meshx_config *config,
                           const struct text_field *field) {
    return *(const char *const *)(const void *)((const char *)config + field->offset);
}

static int check_text(const struct text_field *field, const char *text,
                      struct meshx_failure *failure) {
    if (text == NULL) {
        return field->optional
                   ? MESHX_OK
                   : error_set(failure, MESHX_ECONFIG, "%s is not set, but it is needed",
                               field->name);
    }
    struct sock_address address;
    struct meshx_failure reason;
    int code;
    switch (field->rule) {
    case ANY_TEXT:
        if (text[0] == '\0') {
            return error_set(failure, MESHX_ECONFIG, "%s is empty", field->name);
        }
        break;
    case CONSUL_NAME:
        /* A slash is accepted by Consul's API, but no certificate can carry it. */
        if (text[0] == '\0' || strchr(text, '/') != NULL) {
            return error_set(failure, MESHX_ECONFIG,
                             "%s is \"%s\", but must be a name without '/'", field->name,
                             text);
        }
        break;
    case IP_ADDRESS:
        if (sock_address_parse(text, 1, &address) != 0) {
            return error_set(failure, MESHX_ECONFIG,
                             "%s is \"%s\", but must be a numeric IP address",
                             field->name, text);
        }
        break;
    case JSON_OBJECT:
        code = document_check_template(text, &reason);
        if (code != MESHX_OK) {
            /* Not its text: a template may hold a secret. */
            return error_set(failure, code, "%s must be a JSON object: %s", field->name,
                             reason.text);
        }
        break;
    }
    return MESHX_OK;
}

static int check_number(const struct number_field *field,
                        const struct meshx_config *config,
                        struct meshx_failure *failure) {
    uint32_t value =
        *(const uint32_t *)(const void *)((const char *)config + field->offset);
    return value >= field->minimum ? MESHX_OK
                                   : error_set(failure, MESHX_ECONFIG,
                                               "%s is %u ms, but must be at least %u ms",
                                               field->name, value, field->minimum);
}

static int check_range(const struct range_field *field, const struct meshx_config *config,
                       struct meshx_failure *failure) {
    const struct meshx_port_range *range =
        (const void *)((const char *)config + field->offset);
    return range->first > 0 && range->first <= range->last
               ? MESHX_OK
               : error_set(failure, MESHX_ECONFIG,
                           "%s is %u..%u, but must be two ports above 0 in rising order",
                           field->name, range->first, range->last);
}

static int check(const struct meshx_config *config, struct meshx_failure *failure) {
    int code = MESHX_OK;
    for (size_t i = 0; code == MESHX_OK && i < ARRAY_SIZE(TEXTS); i++) {
        code = check_text(&TEXTS[i], text_of(config, &TEXTS[i]), failure);
    }
    for (size_t i = 0; code == MESHX_OK && i < ARRAY_SIZE(NUMBERS); i++) {
        code = check_number(&NUMBERS[i], config, failure);
    }
    for (size_t i = 0; code == MESHX_OK && i < ARRAY_SIZE(RANGES); i++) {
        code = check_range(&RANGES[i], config, failure);
    }
    if (code != MESHX_OK) {
        return code;
    }
    if (config->listen_port == 0 && !config->control_node) {
        return error_set(failure, MESHX_ECONFIG,
                         "listen_port is 0, but must be the port of an open listener");
    }
    if (config->sidecar_restart_min > config->sidecar_restart_max) {
        return error_set(failure, MESHX_ECONFIG,
                         "sidecar_restart_min is %u ms, but must not be above "
                         "sidecar_restart_max (%u ms)",
                         config->sidecar_restart_min, config->sidecar_restart_max);
    }
    if (config->sidecar_command == NULL) {
        return MESHX_OK;
    }
    if (config->sidecar_command[0] == NULL || config->sidecar_command[0][0] == '\0') {
        return error_set(failure, MESHX_ECONFIG,
                         "sidecar_command is empty, but must begin with a program");
    }
    if (config->guard_path == NULL) {
        return error_set(failure, MESHX_ECONFIG,
                         "guard_path is not set, but sidecar_command needs it");
    }
    return MESHX_OK;
}

/* Frees a list made by copy_list(). */
static void free_list(const char *const *list) {
    for (size_t i = 0; list != NULL && list[i] != NULL; i++) {
        free((void *)list[i]);
    }
    free((void *)list);
}

/* A copy of a NULL-ended list (new), NULL for NULL; |*failed| if memory ran out. */
static const char *const *copy_list(const char *const *from, bool *failed) {
    size_t count = 0;
    while (from != NULL && from[count] != NULL) {
        count++;
    }
    if (from == NULL) {
        return NULL;
    }
    const char **list = calloc(count + 1, sizeof *list);
    for (size_t i = 0; list != NULL && i < count; i++) {
        list[i] = strdup(from[i]);
        if (list[i] == NULL) {
            free_list(list);
            list = NULL;
        }
    }
    *failed = *failed || list == NULL;
    return list;
}

static char *check_id(const char *service_id, const char *which, bool *failed) {
    size_t size = strlen(service_id) + strlen(which) + 2;
    char *id = malloc(size);
    if (id == NULL) {
        *failed = true;
        return NULL;
    }
    snprintf(id, size, "%s:%s", service_id, which);
    return id;
}

/* Where a listener bound to |address| can be reached from this host. */
static const char *reachable(const char *address) {
    if (strcmp(address, "0.0.0.0") == 0) {
        return "127.0.0.1";
    }
    return strcmp(address, "::") == 0 ? "::1" : address;
}

int mesh_config_init(struct mesh_config *config, const struct meshx_config *from,
                     struct meshx_failure *failure) {
    memset(config, 0, sizeof *config);
    int code = check(from, failure);
    if (code == MESHX_OK) {
        code = endpoint_init(&config->endpoint, from->consul, failure);
    }
    if (code != MESHX_OK) {
        return code;
    }

    bool failed = false;
    struct meshx_config *values = &config->values;
    *values = *from;
    values->consul = NULL;
    for (size_t i = 0; i < ARRAY_SIZE(TEXTS); i++) {
        const char *text = text_of(from, &TEXTS[i]);
        char *copy = text == NULL || failed ? NULL : strdup(text);
        failed = failed || (text != NULL && copy == NULL);
        *text_at(values, &TEXTS[i]) = copy;
    }
    values->sidecar_command = copy_list(from->sidecar_command, &failed);
    values->sidecar_environment = copy_list(from->sidecar_environment, &failed);
    config->vm_check_id = check_id(from->service_id, "vm", &failed);
    config->sidecar_check_id = check_id(from->service_id, "sidecar", &failed);
    if (failed) {
        mesh_config_fini(config);
        return error_set(failure, MESHX_ENOMEM, "out of memory for the configuration");
    }
    config->listen_probe_address = reachable(values->listen_address);
    config->sidecar_bind_address =
        values->sidecar_address != NULL ? values->sidecar_address : "0.0.0.0";
    config->sidecar_probe_address = reachable(config->sidecar_bind_address);
    return MESHX_OK;
}

void mesh_config_fini(struct mesh_config *config) {
    for (size_t i = 0; i < ARRAY_SIZE(TEXTS); i++) {
        free((void *)*text_at(&config->values, &TEXTS[i]));
    }
    free_list(config->values.sidecar_command);
    free_list(config->values.sidecar_environment);
    free(config->vm_check_id);
    free(config->sidecar_check_id);
    endpoint_fini(&config->endpoint);
    memset(config, 0, sizeof *config);
}
