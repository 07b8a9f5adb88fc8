#include "mesh_fixture.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct agent *shared_agent;

int start_shared_agent(void **state) {
    (void)state;
    agent_start(&shared_agent);
    return 0;
}

int stop_shared_agent(void **state) {
    (void)state;
    agent_stop(shared_agent);
    return 0;
}

int start_loop(void **state) {
    struct meshx_loop *loop = NULL;
    node_pauses_begin();
    assert_int_equal(meshx_loop_start(&loop), MESHX_OK);
    *state = loop;
    return 0;
}

int stop_loop(void **state) {
    if (*state != NULL) {
        meshx_loop_stop(*state, 10000);
    }
    return 0;
}

/* ---- what the agent says ---- */

char *path_of(const char *format, const char *name) {
    static char path[256];
    snprintf(path, sizeof path, format, name);
    return path;
}

void await(const char *format, const char *name, int status, const char *text) {
    node_wait_agent(shared_agent, path_of(format, name), status, text);
}

int status_of(const char *format, const char *name) {
    return agent_request(shared_agent, "GET", path_of(format, name), NULL, NULL);
}

void assert_registered(const char *name) {
    assert_int_equal(status_of(SERVICE, name), 200);
}

void assert_not_registered(const char *name) {
    assert_int_equal(status_of(SERVICE, name), 404);
    assert_int_equal(status_of(SERVICE "-sidecar-proxy", name), 404);
}

void assert_dialable(const char *name) {
    char *body = NULL;
    assert_int_equal(
        agent_request(shared_agent, "GET", path_of(DIALABLE, name), NULL, &body), 200);
    assert_non_null(strstr(body, "sidecar-proxy"));
    free(body);
}

void register_other(const char *id, const char *name, const char *node,
                    const char *more) {
    char body[1024];
    snprintf(body, sizeof body,
             "{\"ID\":\"%s\",\"Name\":\"%s\",\"Meta\":{\"node\":\"%s\"},\"Connect\":{"
             "\"Native\":true},%s}",
             id, name, node, more);
    assert_int_equal(
        agent_request(shared_agent, "PUT", "/v1/agent/service/register", body, NULL),
        200);
    /* In the catalog, too. */
    snprintf(body, sizeof body, "\"%s\"", id);
    await("/v1/health/service/%s", name, 200, body);
}

void deregister_other(const char *id) {
    assert_int_equal(agent_request(shared_agent, "PUT",
                                   path_of("/v1/agent/service/deregister/%s", id), NULL,
                                   NULL),
                     200);
}

char *deny(const char *source, const char *destination) {
    char body[256];
    char *answer = NULL;
    snprintf(body, sizeof body,
             "{\"SourceName\":\"%s\",\"DestinationName\":\"%s\",\"Action\":\"deny\"}",
             source, destination);
    assert_int_equal(
        agent_request(shared_agent, "POST", "/v1/connect/intentions", body, &answer),
        200);
    char *id = strstr(answer, "\"ID\"");
    assert_non_null(id);
    id = strchr(id + 4, '"') + 1;
    *strchr(id, '"') = '\0';
    char *copy = strdup(id);
    free(answer);
    return copy;
}

void allow_again(char *intention) {
    assert_int_equal(agent_request(shared_agent, "DELETE",
                                   path_of("/v1/connect/intentions/%s", intention), NULL,
                                   NULL),
                     200);
    free(intention);
}

void use_test_filter(void) {
    signal(SIGPIPE, SIG_IGN);
    cmocka_set_test_filter(getenv("MESHX_TEST_FILTER")); // NOLINT(concurrency-mt-unsafe)
}
