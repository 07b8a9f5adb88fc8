/*
 * What the tests of the node service share: one agent for all tests of a program, a
 * control thread for each test, and a look at what the agent has.
 *
 * Tests that harm the agent have their own; so every test has node names of its own.
 */
#ifndef MESHX_TEST_MESH_FIXTURE_H
#define MESHX_TEST_MESH_FIXTURE_H

#include "node.h"

extern struct agent *shared_agent;

/* Fixtures of the group and of each test; the test's |*state| is its loop, or NULL once
 * the test has stopped it. */
int start_shared_agent(void **state);
int stop_shared_agent(void **state);
int start_loop(void **state);
int stop_loop(void **state);
#define TEST(name) cmocka_unit_test_setup_teardown(name, start_loop, stop_loop)

/* Runs the tests, or those that MESHX_TEST_FILTER="*stop*" selects. */
#define RUN_TESTS(tests)                                                                 \
    (use_test_filter(),                                                                  \
     cmocka_run_group_tests(tests, start_shared_agent, stop_shared_agent))
void use_test_filter(void);

/* Paths of the agent's API, for a service's ID or name. */
#define SERVICE "/v1/agent/service/%s"
#define HEALTH "/v1/agent/health/service/id/%s"
#define SIDECAR_HEALTH "/v1/agent/health/service/id/%s-sidecar-proxy"
#define DIALABLE "/v1/health/connect/%s?passing"
/* Those checks with an ID that are critical. */
#define CRITICAL                                                                         \
    "/v1/agent/checks?filter=Status==%%22critical%%22%%20and%%20CheckID==%%22%s%%22"

/* The path for |name|; valid until the next call. */
char *path_of(const char *format, const char *name);
/* Waits as node_wait_agent(); or what status it answers now. */
void await(const char *format, const char *name, int status, const char *text);
int status_of(const char *format, const char *name);

void assert_registered(const char *name);
void assert_not_registered(const char *name);
void assert_dialable(const char *name);

/* Registers something that is not ours: |more| is added to the JSON object. */
void register_other(const char *id, const char *name, const char *node, const char *more);
void deregister_other(const char *id);

/* Denies it by an intention, whose ID is returned: new, until allow_again(). */
char *deny(const char *source, const char *destination);
void allow_again(char *intention);

#endif
