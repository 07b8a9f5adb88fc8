/*
 * The Erlang configuration as the core's: see config.h. Any scheduler thread, no state.
 *
 * Invariant: whatever was allocated is in struct config, also when reading has failed.
 */
#include "config.h"
#include <string.h>

static void free_texts(const char **texts) {
    for (size_t i = 0; texts != NULL && texts[i] != NULL; i++) {
        enif_free((char *)(uintptr_t)texts[i]);
    }
    enif_free((void *)texts);
}

void config_fini(struct config *config) {
    for (size_t i = 0; i < config->text_count; i++) {
        enif_free(config->texts[i]);
    }
    for (size_t i = 0; config->settings != NULL && config->settings[i].name != NULL;
         i++) {
        enif_free((char *)(uintptr_t)config->settings[i].name);
        enif_free((char *)(uintptr_t)config->settings[i].value);
    }
    enif_free(config->settings);
    free_texts(config->command);
    free_texts(config->environment);
}

static bool get_text(ErlNifEnv *env, ERL_NIF_TERM value, struct config *config,
                     const char **out) {
    char *text = terms_to_text(env, value);

    if (text == NULL) {
        return false;
    }
    config->texts[config->text_count++] = text;
    *out = text;
    return true;
}

/* Zeroed, with one item more than |list| has (new). NULL: no list, or no memory. */
static void *alloc_array(ErlNifEnv *env, ERL_NIF_TERM list, size_t item_size) {
    unsigned length;
    void *array;

    if (!enif_get_list_length(env, list, &length)) {
        return NULL;
    }
    array = enif_alloc((length + 1) * item_size);
    if (array != NULL) {
        memset(array, 0, (length + 1) * item_size);
    }
    return array;
}

/* A list of binaries to an array ended by NULL. */
static bool get_texts(ErlNifEnv *env, ERL_NIF_TERM list, const char ***out) {
    ERL_NIF_TERM item;

    *out = alloc_array(env, list, sizeof **out);
    if (*out == NULL) {
        return false;
    }
    for (size_t i = 0; enif_get_list_cell(env, list, &item, &list); i++) {
        (*out)[i] = terms_to_text(env, item);
        if ((*out)[i] == NULL) {
            return false;
        }
    }
    return true;
}

/* [{Name, Value}] to an array ended by a NULL name. */
static bool get_settings(ErlNifEnv *env, ERL_NIF_TERM list, struct meshx_setting **out) {
    ERL_NIF_TERM item;

    *out = alloc_array(env, list, sizeof **out);
    if (*out == NULL) {
        return false;
    }
    for (size_t i = 0; enif_get_list_cell(env, list, &item, &list); i++) {
        const ERL_NIF_TERM *pair;
        int arity;
        if (!enif_get_tuple(env, item, &arity, &pair) || arity != 2) {
            return false;
        }
        (*out)[i].name = terms_to_text(env, pair[0]);
        if ((*out)[i].name == NULL) {
            return false;
        }
        (*out)[i].value = terms_to_text(env, pair[1]);
        if ((*out)[i].value == NULL) {
            return false;
        }
    }
    return true;
}

static bool get_range(ErlNifEnv *env, ERL_NIF_TERM value, struct meshx_port_range *out) {
    const ERL_NIF_TERM *pair;
    int arity;
    unsigned first;
    unsigned last;

    if (!enif_get_tuple(env, value, &arity, &pair) || arity != 2 ||
        !enif_get_uint(env, pair[0], &first) || !enif_get_uint(env, pair[1], &last) ||
        first > UINT16_MAX || last > UINT16_MAX) {
        return false;
    }
    out->first = (uint16_t)first;
    out->last = (uint16_t)last;
    return true;
}

bool config_read(ErlNifEnv *env, ERL_NIF_TERM map, struct config *config,
                 ERL_NIF_TERM *culprit) {
    struct meshx_config *values = &config->values;
    const struct {
        ERL_NIF_TERM key;
        const char **out;
        bool optional; /* the atom undefined is allowed */
    } texts[] = {
        {am_node, &values->node, false},
        {am_service_id, &values->service_id, false},
        {am_service_name, &values->service_name, false},
        {am_listen_address, &values->listen_address, false},
        {am_service_template, &values->service_template, true},
        {am_upstream_template, &values->upstream_template, true},
        {am_guard_path, &values->guard_path, false},
        {am_sidecar_address, &values->sidecar_address, true},
    };
    const struct {
        ERL_NIF_TERM key;
        uint32_t *out;
    } numbers[] = {
        {am_sidecar_restart_min, &values->sidecar_restart_min},
        {am_sidecar_restart_max, &values->sidecar_restart_max},
        {am_ttl, &values->ttl},
        {am_deregister_after, &values->deregister_after},
        {am_start_timeout, &values->start_timeout},
        {am_request_timeout, &values->request_timeout},
        {am_stop_timeout, &values->stop_timeout},
        {am_upstream_keep, &values->upstream_keep},
    };
    ERL_NIF_TERM value;
    unsigned number;

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        *culprit = texts[i].key;
        if (!enif_get_map_value(env, map, texts[i].key, &value)) {
            return false;
        }
        if (!(texts[i].optional && enif_is_identical(value, am_undefined)) &&
            !get_text(env, value, config, texts[i].out)) {
            return false;
        }
    }
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        *culprit = numbers[i].key;
        if (!enif_get_map_value(env, map, numbers[i].key, &value) ||
            !enif_get_uint(env, value, &number)) {
            return false;
        }
        *numbers[i].out = number;
    }
    *culprit = am_listen_port;
    if (!enif_get_map_value(env, map, am_listen_port, &value) ||
        !enif_get_uint(env, value, &number) || number > UINT16_MAX) {
        return false;
    }
    values->listen_port = (uint16_t)number;
    *culprit = am_sidecar_ports;
    if (!enif_get_map_value(env, map, am_sidecar_ports, &value) ||
        !get_range(env, value, &values->sidecar_ports)) {
        return false;
    }
    *culprit = am_upstream_ports;
    if (!enif_get_map_value(env, map, am_upstream_ports, &value) ||
        !get_range(env, value, &values->upstream_ports)) {
        return false;
    }
    *culprit = am_consul;
    if (!enif_get_map_value(env, map, am_consul, &value) ||
        !get_settings(env, value, &config->settings)) {
        return false;
    }
    values->consul = config->settings;
    *culprit = am_sidecar_environment;
    if (!enif_get_map_value(env, map, am_sidecar_environment, &value) ||
        !get_texts(env, value, &config->environment)) {
        return false;
    }
    values->sidecar_environment = config->environment;
    *culprit = am_sidecar_command;
    if (!enif_get_map_value(env, map, am_sidecar_command, &value) ||
        (!enif_is_identical(value, am_none) &&
         !get_texts(env, value, &config->command))) {
        return false;
    }
    values->sidecar_command = config->command; /* NULL for none */
    *culprit = am_force_registration;
    if (!enif_get_map_value(env, map, am_force_registration, &value)) {
        return false;
    }
    values->force_registration = enif_is_identical(value, am_true);
    *culprit = am_intention_directions;
    if (!enif_get_map_value(env, map, am_intention_directions, &value)) {
        return false;
    }
    values->dial_direction_only = enif_is_identical(value, am_dial);
    values->control_node = enif_get_map_value(env, map, am_control_node, &value) &&
                           enif_is_identical(value, am_true);
    return true;
}
