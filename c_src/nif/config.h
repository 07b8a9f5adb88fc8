/*
 * Reads the map of meshx_node_config into the core's struct meshx_config.
 */
#ifndef MESHX_NIF_CONFIG_H
#define MESHX_NIF_CONFIG_H

#include "terms.h"

/* The values, and what they point to; a zeroed one is valid. */
struct config {
    struct meshx_config values;
    char *texts[64]; /* every string, for the release */
    size_t text_count;
    struct meshx_setting *settings;
    const char **command;
    const char **environment;
};

/* Reads |map|, that of meshx_node_config:load/1 or load_control_node/1 with
 * listen_address and listen_port, into the zeroed |config|. On failure |*culprit| is the
 * key; config_fini() is needed, too. */
bool config_read(ErlNifEnv *env, ERL_NIF_TERM map, struct config *config,
                 ERL_NIF_TERM *culprit);
void config_fini(struct config *config);

#endif
