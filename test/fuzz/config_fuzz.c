/*
 * A node service's configuration: what is accepted is copied and fit for use, a refusal
 * names the key and quotes nothing of a template. Input: lines with the texts, sidecar's
 * command and environment among them; then the numbers.
 */
#include "fuzz.h"

#include "mesh_config.h"
#include "sock.h"

#include <stdlib.h>
#include <string.h>

#define TEXTS_MAX 8
#define LIST_MAX 4

static const char *copied(struct fuzz_input *input) {
    char *text = fuzz_text(fuzz_until(input, '\n'));
    if (strcmp(text, "-") != 0) {
        return text;
    }
    free(text);
    return NULL; /* a dash: the key is not set */
}

/* Lines up to an empty one. */
static void read_list(struct fuzz_input *input, const char **list) {
    for (size_t i = 0; i < LIST_MAX && input->size > 0; i++) {
        list[i] = copied(input);
        if (list[i] == NULL || list[i][0] == '\0') {
            break;
        }
    }
}

static void check_list(const char *const *copy, const char *const *from) {
    CHECK((copy == NULL) == (from == NULL));
    for (size_t i = 0; from != NULL && (from[i] != NULL || copy[i] != NULL); i++) {
        CHECK(copy[i] != from[i] && strcmp(copy[i], from[i]) == 0);
    }
}

static void check_copy(const char *copy, const char *from) {
    CHECK(from == NULL ? copy == NULL : copy != from && strcmp(copy, from) == 0);
}

static void check_address(const char *text) {
    struct sock_address address;
    CHECK(sock_address_parse(text, 1, &address) == 0);
}

static void check_config(const struct mesh_config *config,
                         const struct meshx_config *from) {
    const struct meshx_config *values = &config->values;
    check_copy(values->node, from->node);
    check_copy(values->service_id, from->service_id);
    check_copy(values->service_name, from->service_name);
    check_copy(values->service_template, from->service_template);
    check_copy(values->upstream_template, from->upstream_template);
    check_copy(values->guard_path, from->guard_path);
    check_copy(values->sidecar_address, from->sidecar_address);
    check_list(values->sidecar_command, from->sidecar_command);
    check_list(values->sidecar_environment, from->sidecar_environment);
    CHECK(values->consul == NULL);
    CHECK(values->node[0] != '\0');
    CHECK(values->service_id[0] != '\0' && strchr(values->service_id, '/') == NULL);
    CHECK(values->sidecar_command == NULL || values->sidecar_command[0][0] != '\0');
    CHECK(values->sidecar_command == NULL || values->guard_path != NULL);
    CHECK(values->listen_port > 0 || values->control_node);
    CHECK(values->sidecar_ports.first > 0);
    CHECK(values->sidecar_ports.first <= values->sidecar_ports.last);
    CHECK(values->sidecar_restart_min <= values->sidecar_restart_max);
    CHECK(strncmp(config->vm_check_id, from->service_id, strlen(from->service_id)) == 0);
    CHECK(strcmp(config->vm_check_id, config->sidecar_check_id) != 0);
    check_address(config->listen_probe_address);
    check_address(config->sidecar_bind_address);
    check_address(config->sidecar_probe_address);
}

/* A refusal begins with the key. */
static void check_refusal(const struct meshx_failure *failure) {
    size_t key = strspn(failure->text, "abcdefghijklmnopqrstuvwxyz_");
    CHECK(key > 2 && failure->text[key] == ' ');
}

/* A template may hold a secret; jansson quotes what it stumbles over. */
static void check_not_quoted(const struct meshx_failure *failure) {
    const char *reason = failure->text + strcspn(failure->text, " ");
    CHECK(strncmp(reason, " must be a JSON object: ", 24) != 0 ||
          strstr(reason, " near ") == NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input input = {data, size};
    const char *command[LIST_MAX + 1] = {NULL};
    const char *environment[LIST_MAX + 1] = {NULL};
    struct meshx_config from = {0};
    const char **const texts[TEXTS_MAX] = {
        &from.node,           &from.service_id,       &from.service_name,
        &from.listen_address, &from.service_template, &from.upstream_template,
        &from.guard_path,     &from.sidecar_address,
    };
    for (size_t i = 0; i < TEXTS_MAX; i++) {
        *texts[i] = copied(&input);
    }
    read_list(&input, command);
    read_list(&input, environment);
    from.sidecar_command = command[0] == NULL ? NULL : command;
    from.sidecar_environment = environment[0] == NULL ? NULL : environment;
    uint32_t *const numbers[] = {
        &from.ttl,
        &from.deregister_after,
        &from.start_timeout,
        &from.stop_timeout,
        &from.request_timeout,
        &from.sidecar_restart_min,
        &from.sidecar_restart_max,
        &from.upstream_keep,
    };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        *numbers[i] = (uint32_t)fuzz_number(&input, 2);
    }
    from.listen_port = (uint16_t)fuzz_number(&input, 2);
    from.sidecar_ports.first = (uint16_t)fuzz_number(&input, 2);
    from.sidecar_ports.last = (uint16_t)fuzz_number(&input, 2);
    from.upstream_ports.first = (uint16_t)fuzz_number(&input, 2);
    from.upstream_ports.last = (uint16_t)fuzz_number(&input, 2);
    from.control_node = fuzz_number(&input, 1) % 2 == 1;

    struct meshx_failure failure = {0};
    struct mesh_config config;
    int code = mesh_config_init(&config, &from, &failure);
    if (code == MESHX_OK) {
        check_config(&config, &from);
        mesh_config_fini(&config);
    } else {
        CHECK(code == MESHX_ECONFIG);
        fuzz_check_failure(code, &failure);
        check_refusal(&failure);
        check_not_quoted(&failure);
    }
    for (size_t i = 0; i < TEXTS_MAX; i++) {
        free((void *)*texts[i]);
    }
    for (size_t i = 0; i < LIST_MAX; i++) {
        free((void *)command[i]);
        free((void *)environment[i]);
    }
    return 0;
}
