/*
 * The node service against a real agent and real sidecars.
 *
 * One agent serves all tests (those that harm it have their own), so every test has node
 * names of its own.
 */
#include "node.h"
#include "process.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct agent *shared_agent;

static int start_shared_agent(void **state) {
    (void)state;
    agent_start(&shared_agent);
    return 0;
}

static int stop_shared_agent(void **state) {
    (void)state;
    agent_stop(shared_agent);
    return 0;
}

static int start_loop(void **state) {
    struct meshx_loop *loop = NULL;
    assert_int_equal(meshx_loop_start(&loop), MESHX_OK);
    *state = loop;
    return 0;
}

static int stop_loop(void **state) {
    if (*state != NULL) {
        meshx_loop_stop(*state, 10000);
    }
    return 0;
}

/* ---- what the agent says ---- */

static char *path_of(const char *format, const char *name) {
    static char path[256];
    snprintf(path, sizeof path, format, name);
    return path;
}

static void await(const char *format, const char *name, int status, const char *text) {
    node_wait_agent(shared_agent, path_of(format, name), status, text);
}

#define SERVICE "/v1/agent/service/%s"
#define HEALTH "/v1/agent/health/service/id/%s"
#define DIALABLE "/v1/health/connect/%s?passing"

/* Checks with this ID that are critical. */
#define CRITICAL                                                                         \
    "/v1/agent/checks?filter=Status==%%22critical%%22%%20and%%20CheckID==%%22%s%%22"

static int status_of(const char *format, const char *name) {
    return agent_request(shared_agent, "GET", path_of(format, name), NULL, NULL);
}

static void assert_registered(const char *name) {
    assert_int_equal(status_of(SERVICE, name), 200);
}

static void assert_not_registered(const char *name) {
    assert_int_equal(status_of(SERVICE, name), 404);
    assert_int_equal(status_of(SERVICE "-sidecar-proxy", name), 404);
}

static void assert_dialable(const char *name) {
    char *body = NULL;
    assert_int_equal(
        agent_request(shared_agent, "GET", path_of(DIALABLE, name), NULL, &body), 200);
    assert_non_null(strstr(body, "sidecar-proxy"));
    free(body);
}

/* Registers something that is not ours: |more| is added to the JSON object. */
static void register_other(const char *id, const char *name, const char *node,
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

static void deregister_other(const char *id) {
    assert_int_equal(agent_request(shared_agent, "PUT",
                                   path_of("/v1/agent/service/deregister/%s", id), NULL,
                                   NULL),
                     200);
}

/* Returns the ID of the new intention; new. */
static char *deny(const char *source, const char *destination) {
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

static void allow_again(char *intention) {
    assert_int_equal(agent_request(shared_agent, "DELETE",
                                   path_of("/v1/connect/intentions/%s", intention), NULL,
                                   NULL),
                     200);
    free(intention);
}

/* Opens a node that can't start, and returns the failure. */
static const struct node_event *fail_to_start(struct node *node,
                                              struct meshx_loop *loop) {
    node_open(node, loop);
    const struct node_event *failed = node_wait(node, MESHX_EVENT_FAILED, 0, NULL);
    node_wait(node, MESHX_EVENT_STOPPED, 0, NULL);
    assert_int_equal(node_count(node, MESHX_EVENT_READY, NULL), 0);
    assert_int_equal(node_info_refused(node), MESHX_ESTOPPED);
    return failed;
}

/* ---- start and stop ---- */

static void ready_means_dialable_and_stop_leaves_nothing(void **state) {
    struct node *node = node_start(*state, shared_agent, "plain@test");
    assert_dialable("plain@test");
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.state, MESHX_STATE_READY);
    assert_int_equal(info.listen_port, node->config.listen_port);
    assert_in_range(info.sidecar_port, 21000, 23999);
    assert_true(info.registered && info.sidecar_accepts);
    assert_int_equal(info.sidecar_starts, 1);
    assert_int_equal(info.registrations, 1);
    assert_int_equal(info.repairs, 0);
    assert_true(info.requests >= 5 && info.request_failures == 0);
    assert_true(process_runs((pid_t)info.sidecar_pid));
    node_wait(node, MESHX_EVENT_OUTPUT, 0, "public listener");

    assert_int_equal(node_stop(node)->code, MESHX_OK);
    assert_not_registered("plain@test");
    assert_false(process_runs((pid_t)info.sidecar_pid));
    assert_int_equal(node_info_refused(node), MESHX_ESTOPPED);
    node_free(node);
}

static void close_stops_too(void **state) {
    struct node *node = node_start(*state, shared_agent, "closed@test");
    pid_t sidecar = (pid_t)node_info(node)->info.sidecar_pid;
    node_free(node);
    assert_not_registered("closed@test");
    assert_false(process_runs(sidecar));
}

static void the_same_name_starts_again_at_once(void **state) {
    for (int i = 0; i < 3; i++) {
        struct node *node = node_start(*state, shared_agent, "again@test");
        node_stop(node);
        node_free(node);
    }
}

static void stop_during_a_start_undoes_it(void **state) {
    struct node *node = node_new(shared_agent, "hasty@test");
    node->command[0] = "/bin/sleep";
    node->command[1] = "1000";
    node->command[2] = NULL;
    node_open(node, *state);
    assert_int_equal(
        meshx_mesh_upstream(node->mesh, 7, "x@test", "x@test", MESHX_UPSTREAM_DIAL),
        MESHX_OK);
    await(SERVICE, "hasty@test", 200, NULL);
    assert_int_equal(node_info(node)->info.state, MESHX_STATE_STARTING);
    assert_int_equal(node_stop(node)->code, MESHX_OK);
    assert_int_equal(node_wait(node, MESHX_EVENT_UPSTREAM, 7, NULL)->code,
                     MESHX_ESTOPPED);
    assert_int_equal(node_count(node, MESHX_EVENT_FAILED, NULL), 0);
    assert_not_registered("hasty@test");
    node_free(node);

    /* At once, before anything was asked. */
    node = node_new(shared_agent, "hasty@test");
    node_open(node, *state);
    assert_int_equal(node_stop(node)->code, MESHX_OK);
    assert_not_registered("hasty@test");
    node_free(node);
}

static void drain_turns_both_checks_critical(void **state) {
    struct node *node = node_start(*state, shared_agent, "drained@test");
    meshx_mesh_drain(node->mesh);
    await(CRITICAL, "drained@test:vm", 200, "drained@test:vm");
    await(CRITICAL, "drained@test:sidecar", 200, "drained@test:sidecar");
    assert_int_equal(node_stop(node)->code, MESHX_OK);
    assert_not_registered("drained@test");
    node_free(node);
}

static void the_loops_end_stops_orderly(void **state) {
    struct node *node = node_start(*state, shared_agent, "looped@test");
    pid_t sidecar = (pid_t)node_info(node)->info.sidecar_pid;
    meshx_loop_stop(*state, 10000);
    *state = NULL;
    assert_int_equal(node_wait(node, MESHX_EVENT_STOPPED, 0, NULL)->code, MESHX_OK);
    assert_not_registered("looped@test");
    assert_false(process_runs(sidecar));
    /* The handle outlives the loop. */
    meshx_mesh_renew(node->mesh);
    meshx_mesh_drain(node->mesh);
    meshx_mesh_stop(node->mesh);
    assert_int_equal(meshx_mesh_info(node->mesh, 1), MESHX_ESTOPPED);
    node_free(node);
}

static void the_loops_end_does_not_wait_for_a_silent_agent(void **state) {
    struct agent *agent = NULL;
    agent_start(&agent);
    struct node *node = node_start(*state, agent, "silent@test");
    pid_t sidecar = (pid_t)node_info(node)->info.sidecar_pid;
    agent_freeze(agent);
    meshx_loop_stop(*state, 100);
    *state = NULL;
    const struct node_event *stopped = node_wait(node, MESHX_EVENT_STOPPED, 0, NULL);
    assert_int_equal(stopped->code, MESHX_ESTOPPED);
    assert_non_null(strstr(stopped->text, "still registered"));
    assert_true(process_wait_gone(sidecar)); /* its guard sees to that */
    agent_thaw(agent);
    node_free(node);
    agent_stop(agent);
}

static void a_stop_without_agent_says_so(void **state) {
    struct agent *agent = NULL;
    agent_start(&agent);
    struct node *node = node_start(*state, agent, "left@test");
    pid_t sidecar = (pid_t)node_info(node)->info.sidecar_pid;
    agent_kill(agent);
    const struct node_event *stopped = node_stop(node);
    assert_int_equal(stopped->code, MESHX_EAGENT_UNREACHABLE);
    assert_non_null(strstr(stopped->text, "left@test is still registered"));
    assert_false(process_runs(sidecar));
    node_free(node);
    agent_stop(agent);
}

/* ---- starts that fail ---- */

static void a_bad_configuration_is_named(void **state) {
    struct node *node = node_new(shared_agent, "bad@test");
    struct meshx_config good = node->config;
    static const char *const nothing[] = {NULL};
    struct meshx_setting bad_agent[] = {{"CONSUL_HTTP_ADDR", "ftp://x"}, {NULL, NULL}};
    const char *cases[][2] = {{"node", "not set"},
                              {"service_id", "a/b"},
                              {"service_name", "a/b"},
                              {"listen_address", "localhost"},
                              {"listen_port", "0"},
                              {"service_template", "[1]"},
                              {"upstream_template", "{"},
                              {"sidecar_command", "empty"},
                              {"guard_path", "not set"},
                              {"sidecar_address", "example.org"},
                              {"sidecar_ports", "9..8"},
                              {"upstream_ports", "0..8"},
                              {"sidecar_restart_min", "6000"},
                              {"sidecar_restart_max", "0"},
                              {"ttl", "499"},
                              {"start_timeout", "0"},
                              {"CONSUL_HTTP_ADDR", "ftp"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct meshx_config config = good;
        struct meshx_failure failure = {0};
        struct meshx_callbacks callbacks = {0};
        struct meshx_mesh *mesh = NULL;
        switch (i) {
        case 0:
            config.node = NULL;
            break;
        case 1:
            config.service_id = "a/b";
            break;
        case 2:
            config.service_name = "a/b";
            break;
        case 3:
            config.listen_address = "localhost";
            break;
        case 4:
            config.listen_port = 0;
            break;
        case 5:
            config.service_template = "[1]";
            break;
        case 6:
            config.upstream_template = "{";
            break;
        case 7:
            config.sidecar_command = nothing;
            break;
        case 8:
            config.guard_path = NULL;
            break;
        case 9:
            config.sidecar_address = "example.org";
            break;
        case 10:
            config.sidecar_ports = (struct meshx_port_range){9, 8};
            break;
        case 11:
            config.upstream_ports = (struct meshx_port_range){0, 8};
            break;
        case 12:
            config.sidecar_restart_min = 6000;
            break;
        case 13:
            config.sidecar_restart_max = 0;
            break;
        case 14:
            config.ttl = 499;
            break;
        case 15:
            config.start_timeout = 0;
            break;
        default:
            config.consul = bad_agent;
            break;
        }
        assert_int_equal(meshx_mesh_open(*state, &config, &callbacks, &mesh, &failure),
                         MESHX_ECONFIG);
        assert_int_equal(failure.code, MESHX_ECONFIG);
        assert_non_null(strstr(failure.text, cases[i][0]));
        assert_non_null(strstr(failure.text, cases[i][1]));
        assert_null(mesh);
    }
    node_free(node);
}

static void a_live_owner_keeps_its_name(void **state) {
    struct node *owner = node_start(*state, shared_agent, "owned@test");
    struct node *rival = node_new(shared_agent, "owned@test");
    const struct node_event *failed = fail_to_start(rival, *state);
    assert_int_equal(failed->code, MESHX_ENAME_IN_USE);
    assert_non_null(strstr(failed->text, "owned@test"));
    assert_non_null(strstr(failed->text, "force_registration"));
    assert_dialable("owned@test");
    assert_int_equal(node_info(owner)->info.registrations, 1);
    node_free(rival);

    rival = node_new(shared_agent, "owned@test");
    rival->config.force_registration = true;
    node_open(rival, *state);
    node_wait(rival, MESHX_EVENT_READY, 0, NULL);
    node_free(rival);
    node_free(owner);
}

static void a_foreign_service_keeps_its_id(void **state) {
    struct node *node = node_new(shared_agent, "foreign@test");
    register_other("foreign@test", "web", "", "\"Port\":1");
    const struct node_event *failed = fail_to_start(node, *state);
    assert_int_equal(failed->code, MESHX_ENAME_IN_USE);
    assert_registered("foreign@test");
    deregister_other("foreign@test");
    node_free(node);
}

static void a_healthy_instance_elsewhere_keeps_its_name(void **state) {
    struct node *node = node_new(shared_agent, "twin@test");
    register_other("twin-elsewhere", "twin@test", "twin@test", "\"Port\":1");
    const struct node_event *failed = fail_to_start(node, *state);
    assert_int_equal(failed->code, MESHX_ENAME_IN_USE);
    assert_non_null(strstr(failed->text, "twin-elsewhere"));
    assert_non_null(strstr(failed->text, "meshx-test")); /* the Consul node */
    assert_not_registered("twin@test");
    deregister_other("twin-elsewhere");
    node_free(node);
}

static void what_a_crash_left_behind_is_taken_over(void **state) {
    struct node *node = node_new(shared_agent, "stale@test");
    char more[32];
    snprintf(more, sizeof more, "\"Port\":%u", agent_free_port());
    register_other("stale@test", "stale@test", "stale@test", more);
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    assert_dialable("stale@test");
    node_free(node);
    assert_not_registered("stale@test");
}

static void without_agent_a_start_fails_at_once(void **state) {
    struct node *node = node_new(shared_agent, "lonely@test");
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%u", agent_free_port());
    node->settings[0].value = address;
    const struct node_event *failed = fail_to_start(node, *state);
    assert_int_equal(failed->code, MESHX_EAGENT_UNREACHABLE);
    assert_non_null(strstr(failed->text, address));
    node_free(node);

    node = node_new(shared_agent, "lonely@test");
    node->settings[0].value = address;
    node->config.force_registration = true;
    assert_int_equal(fail_to_start(node, *state)->code, MESHX_EAGENT_UNREACHABLE);
    node_free(node);
}

static void a_slow_agent_is_waited_for(void **state) {
    struct agent *agent = NULL;
    agent_start(&agent);
    struct node *node = node_new(agent, "patient@test");
    node->config.request_timeout = 300;
    agent_freeze(agent);
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_LOG, 0, "trying again until start_timeout");
    agent_thaw(agent);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    assert_int_equal(node_count(node, MESHX_EVENT_LOG, "trying again"), 1);
    node_free(node);

    node = node_new(agent, "impatient@test");
    node->config.request_timeout = 300;
    node->config.start_timeout = 500;
    agent_freeze(agent);
    assert_int_equal(fail_to_start(node, *state)->code, MESHX_EAGENT_TIMEOUT);
    agent_thaw(agent);
    node_free(node);
    agent_stop(agent);
}

static void fails_with_command(struct meshx_loop *loop, const char *program,
                               const char *argument, int code, const char *text) {
    struct node *node = node_new(shared_agent, "sidecarless@test");
    node->command[0] = program;
    node->command[1] = argument;
    node->command[2] = NULL;
    node->config.start_timeout = code == MESHX_ESIDECAR_TIMEOUT ? 300 : 30000;
    const struct node_event *failed = fail_to_start(node, loop);
    assert_int_equal(failed->code, code);
    assert_non_null(strstr(failed->text, text));
    assert_not_registered("sidecarless@test");
    node_free(node);
}

static void a_sidecar_that_fails_fails_the_start(void **state) {
    fails_with_command(*state, "/no/such/sidecar", NULL, MESHX_ESIDECAR_COMMAND,
                       "/no/such/sidecar");
    fails_with_command(*state, "/bin/false", NULL, MESHX_ESIDECAR_EXITED, "status 1");
    fails_with_command(*state, "/bin/sleep", "1000", MESHX_ESIDECAR_TIMEOUT, "port");
}

static void without_a_free_port_nothing_is_registered(void **state) {
    struct node *node = node_new(shared_agent, "portless@test");
    uint16_t port = node->config.listen_port; /* surely taken */
    node->config.sidecar_ports = (struct meshx_port_range){port, port};
    assert_int_equal(fail_to_start(node, *state)->code, MESHX_ENO_PORT);
    assert_not_registered("portless@test");
    node_free(node);
}

/* Says at its first start that the port is taken, as the built-in proxy does, and is the
 * proxy at its second. */
static void a_port_lost_in_a_race_is_replaced(void **state) {
    struct node *node = node_new(shared_agent, "raced@test");
    char *directory = agent_make_directory();
    char script[1024];
    snprintf(
        script, sizeof script,
        "if [ -e %s/second ]; then exec %s connect proxy -sidecar-for raced@test; fi; "
        ": > %s/second; echo 'listener stopped: listener=\"public listener\" bind: "
        "address already in use'; exec sleep 1000",
        directory, node->command[0], directory);
    node->command[0] = "/bin/sh";
    node->command[1] = "-c";
    node->command[2] = script;
    node->command[3] = NULL;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    node_wait(node, MESHX_EVENT_LOG, 0, "moves to");
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.registrations, 2);
    assert_int_equal(info.sidecar_starts, 2);
    assert_dialable("raced@test");
    node_free(node);
    agent_remove_directory(directory);
}

/* ---- upstreams ---- */

static void data_passes_both_sidecars(void **state) {
    struct node *one = node_start(*state, shared_agent, "one@test");
    struct node *two = node_start(*state, shared_agent, "two@test");
    assert_int_equal(node_upstream(one, "two@test", "two@test", MESHX_UPSTREAM_ASK)->code,
                     MESHX_OK);
    assert_int_equal(node_info(one)->info.upstream_count, 0);

    const struct node_event *answer =
        node_upstream(one, "two@test", "two@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_OK);
    assert_in_range(answer->port, 24000, 26999);
    assert_true(node_echo(answer->port));
    /* And back, and the same port again without another registration. */
    assert_true(
        node_echo(node_upstream(two, "one@test", "one@test", MESHX_UPSTREAM_DIAL)->port));
    assert_int_equal(
        node_upstream(one, "two@test", "two@test", MESHX_UPSTREAM_DIAL)->port,
        answer->port);
    const struct node_event *info = node_info(one);
    assert_int_equal(info->info.registrations, 2);
    assert_int_equal(info->info.upstream_count, 1);
    assert_int_equal(info->upstream_ports[0], answer->port);
    node_free(two);
    assert_int_equal(
        node_upstream(one, "two@test", "two@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_ENODE_UNKNOWN);
    node_free(one);
}

static void a_burst_of_upstreams_takes_two_registrations(void **state) {
    enum { COUNT = 10 };
    struct node *node = node_start(*state, shared_agent, "burst@test");
    char names[COUNT][32];
    uint16_t ports[COUNT];
    for (int i = 0; i < COUNT; i++) {
        snprintf(names[i], sizeof names[i], "target%d@test", i);
        register_other(names[i], names[i], names[i], "\"Port\":1");
    }
    for (int i = 0; i < COUNT; i++) {
        assert_int_equal(meshx_mesh_upstream(node->mesh, 100 + (uint64_t)i, names[i],
                                             names[i], MESHX_UPSTREAM_DIAL),
                         MESHX_OK);
    }
    for (int i = 0; i < COUNT; i++) {
        const struct node_event *answer =
            node_wait(node, MESHX_EVENT_UPSTREAM, 100 + (uint64_t)i, NULL);
        assert_int_equal(answer->code, MESHX_OK);
        ports[i] = answer->port;
        for (int j = 0; j < i; j++) {
            assert_int_not_equal(ports[i], ports[j]);
        }
    }
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.upstream_count, COUNT);
    /* The first that was looked up goes alone, the others together in the next one; a
     * straggler among the lookups may need a third. */
    assert_in_range(info.registrations, 2, 4);
    char *body = NULL;
    agent_request(shared_agent, "GET", path_of(SERVICE "-sidecar-proxy", "burst@test"),
                  NULL, &body);
    for (int i = 0; i < COUNT; i++) {
        assert_non_null(strstr(body, names[i]));
        deregister_other(names[i]);
    }
    free(body);
    node_free(node);
}

static void each_refusal_says_why_and_leaves_no_upstream(void **state) {
    struct node *node = node_start(*state, shared_agent, "asker@test");
    register_other("sick@test", "sick@test", "sick@test",
                   "\"Port\":1,\"Check\":{\"TTL\":\"10m\",\"Notes\":\"x\"}");
    register_other("pair-a", "pair", "a@test", "\"Port\":1");
    register_other("pair-b", "pair", "b@test", "\"Port\":1");
    register_other("guarded@test", "guarded@test", "guarded@test", "\"Port\":1");
    char *intention = deny("asker@test", "guarded@test");
    static const enum meshx_upstream_mode modes[] = {MESHX_UPSTREAM_ASK,
                                                     MESHX_UPSTREAM_DIAL};
    for (int i = 0; i < 2; i++) {
        const struct node_event *answer =
            node_upstream(node, "nobody@test", "nobody@test", modes[i]);
        assert_int_equal(answer->code, MESHX_ENODE_UNKNOWN);
        assert_non_null(strstr(answer->text, "nobody@test is not registered"));
        /* The service is there, but it is another node's. */
        answer = node_upstream(node, "nobody@test", "sick@test", modes[i]);
        assert_int_equal(answer->code, MESHX_ENODE_UNKNOWN);
        answer = node_upstream(node, "sick@test", "sick@test", modes[i]);
        assert_int_equal(answer->code, MESHX_ENODE_UNHEALTHY);
        answer = node_upstream(node, "a@test", "pair", modes[i]);
        assert_int_equal(answer->code, MESHX_ECONFIG);
        assert_non_null(strstr(answer->text, "b@test"));
        answer = node_upstream(node, "guarded@test", "guarded@test", modes[i]);
        assert_int_equal(answer->code, MESHX_EDENIED);
        assert_non_null(strstr(answer->text, "asker@test => guarded@test"));
    }
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.upstream_count, 0);
    assert_int_equal(info.registrations, 1);

    allow_again(intention);
    assert_int_equal(
        node_upstream(node, "guarded@test", "guarded@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_OK);
    deregister_other("sick@test");
    deregister_other("pair-a");
    deregister_other("pair-b");
    deregister_other("guarded@test");
    node_free(node);
}

static void a_refused_registration_fails_its_requests_only(void **state) {
    struct node *node = node_new(shared_agent, "picky@test");
    node->config.upstream_template = "{\"NoSuchField\":1}"; /* a 400 of the agent */
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    register_other("wanted@test", "wanted@test", "wanted@test", "\"Port\":1");
    const struct node_event *answer =
        node_upstream(node, "wanted@test", "wanted@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_EAGENT_REFUSED);
    assert_non_null(strstr(answer->text, "NoSuchField"));
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.upstream_count, 0);
    assert_true(info.registered);
    assert_dialable("picky@test");
    deregister_other("wanted@test");
    node_free(node);
}

static void requests_before_ready_wait_for_it(void **state) {
    struct node *two = node_start(*state, shared_agent, "early2@test");
    struct node *one = node_new(shared_agent, "early1@test");
    node_open(one, *state);
    assert_int_equal(
        node_upstream(one, "early2@test", "early2@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_OK);
    assert_int_equal(node_count(one, MESHX_EVENT_READY, NULL), 1);
    node_free(one);
    node_free(two);
}

/* ---- repairs ---- */

static void a_killed_sidecar_comes_back(void **state) {
    struct node *node = node_new(shared_agent, "killed@test");
    node->config.sidecar_restart_min = 2000; /* time to see what is meanwhile */
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    pid_t first = (pid_t)node_info(node)->info.sidecar_pid;
    register_other("dest@test", "dest@test", "dest@test", "\"Port\":1");
    uint16_t port =
        node_upstream(node, "dest@test", "dest@test", MESHX_UPSTREAM_DIAL)->port;
    assert_int_equal(kill(first, SIGKILL), 0);
    node_wait(node, MESHX_EVENT_LOG, 0, "restarted in 2000 ms");
    await(HEALTH, "killed@test", 503, NULL);
    assert_int_equal(
        node_upstream(node, "dest@test", "dest@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_ESIDECAR_DOWN);
    assert_int_equal(
        node_upstream(node, "dest@test", "dest@test", MESHX_UPSTREAM_ASK)->code,
        MESHX_OK);

    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(HEALTH, "killed@test", 200, NULL);
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.sidecar_starts, 2);
    assert_int_not_equal(info.sidecar_pid, first);
    assert_int_equal(
        node_upstream(node, "dest@test", "dest@test", MESHX_UPSTREAM_DIAL)->port, port);
    deregister_other("dest@test");
    node_free(node);
}

static void an_agent_that_forgot_us_is_told_again(void **state) {
    struct agent *agent = NULL;
    agent_start(&agent);
    struct node *one = node_start(*state, agent, "kept1@test");
    struct node *two = node_start(*state, agent, "kept2@test");
    uint16_t port =
        node_upstream(one, "kept2@test", "kept2@test", MESHX_UPSTREAM_DIAL)->port;
    assert_true(node_echo(port));
    agent_kill(agent);
    node_wait(one, MESHX_EVENT_LOG, 0, "trying again");
    node_wait(two, MESHX_EVENT_LOG, 0, "trying again");
    assert_int_equal(
        node_upstream(one, "kept2@test", "kept2@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_EAGENT_UNREACHABLE);
    agent_restart(agent);
    node_wait(one, MESHX_EVENT_LOG, 0, "registered again");
    node_wait(two, MESHX_EVENT_LOG, 0, "registered again");
    node_wait_agent(agent, path_of(DIALABLE, "kept2@test"), 200, "sidecar-proxy");
    const struct meshx_info info = node_info(one)->info;
    assert_int_equal(info.repairs, 1);
    assert_int_equal(info.upstream_count, 1);
    assert_true(info.registered);
    while (!node_echo(port)) { /* until the proxies have their new certificates */
    }
    assert_int_equal(node_count(one, MESHX_EVENT_LOG, "trying again"), 1);
    node_free(one);
    node_free(two);
    agent_stop(agent);
}

static void someone_elses_deregistration_is_repaired(void **state) {
    struct node *node = node_new(shared_agent, "removed@test");
    node->config.ttl = 900;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    deregister_other("removed@test");
    node_wait(node, MESHX_EVENT_LOG, 0, "does not know");
    node_wait(node, MESHX_EVENT_LOG, 0, "registered again");
    await(HEALTH, "removed@test", 200, NULL);
    node_free(node);
}

static void a_stuck_vm_goes_critical(void **state) {
    struct node *node = node_new(shared_agent, "stuck@test");
    node->config.ttl = 900;
    node->stuck = true;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    node_wait(node, MESHX_EVENT_LOG, 0, "has not answered");
    await(HEALTH, "stuck@test", 503, NULL);
    meshx_mesh_renew(node->mesh);
    node_wait(node, MESHX_EVENT_LOG, 0, "answers again");
    await(HEALTH, "stuck@test", 200, NULL);
    assert_int_equal(node_count(node, MESHX_EVENT_LOG, "has not answered"), 1);
    node_free(node);
}

/* The pid a script has written to |path|. */
static pid_t read_pid(const char *path) {
    int pid = 0;
    while (pid == 0) {
        FILE *file = fopen(path, "re");
        if (file != NULL) {
            (void)fscanf(file, "%d\n", &pid); // NOLINT(cert-err34-c)
            fclose(file);
        }
    }
    return pid;
}

/* Goes on running when the proxy in it is gone. */
static void a_deaf_sidecar_is_replaced(void **state) {
    struct node *node = node_new(shared_agent, "deaf@test");
    char *directory = agent_make_directory();
    char script[1024];
    char pid_file[256];
    snprintf(pid_file, sizeof pid_file, "%s/pid", directory);
    snprintf(script, sizeof script,
             "%s connect proxy -sidecar-for deaf@test & echo $! > %s; wait; exec sleep "
             "1000",
             node->command[0], pid_file);
    node->config.ttl = 900;
    node->command[0] = "/bin/sh";
    node->command[1] = "-c";
    node->command[2] = script;
    node->command[3] = NULL;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    const struct meshx_info before = node_info(node)->info;
    assert_int_equal(kill(read_pid(pid_file), SIGKILL), 0);
    node_wait(node, MESHX_EVENT_LOG, 0, "others can't reach it");
    node_wait(node, MESHX_EVENT_LOG, 0, "restarting it at");
    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(HEALTH, "deaf@test", 200, NULL);
    const struct meshx_info after = node_info(node)->info;
    assert_int_not_equal(after.sidecar_port, before.sidecar_port);
    assert_int_equal(after.registrations, 2);
    assert_int_equal(after.sidecar_starts, 2);
    node_free(node);
    agent_remove_directory(directory);
}

static void an_external_sidecar_may_come_later(void **state) {
    struct node *node = node_new(shared_agent, "outside@test");
    struct node *listener = node_new(shared_agent, "unused@test");
    node->config.sidecar_command = NULL;
    node->config.ttl = 900;
    uint16_t port = agent_free_port();
    node->config.sidecar_ports = (struct meshx_port_range){port, port};
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    assert_int_equal(node_info(node)->info.sidecar_port, port);
    assert_int_equal(
        node_upstream(node, "unused@test", "unused@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_ESIDECAR_DOWN);
    node_wait(node, MESHX_EVENT_LOG, 0, "is it started?");
    assert_int_equal(status_of(HEALTH, "outside@test"), 503);
    pid_t proxy = fork();
    if (proxy == 0) {
        execle(listener->command[0], listener->command[0], "connect", "proxy",
               "-log-level", "err", "-sidecar-for", "outside@test", (char *)NULL,
               (char *const *)listener->environment);
        _exit(127);
    }
    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(HEALTH, "outside@test", 200, NULL);
    assert_int_equal(kill(proxy, SIGKILL), 0);
    assert_true(process_wait_gone(proxy));
    node_free(node);
    node_free(listener);
}

/* ---- memory ---- */

/* One life of a node service with the |nth| allocation failing. True: it did. */
static bool live_with_failure(struct meshx_loop *loop, unsigned nth, bool managed) {
    static const char name[] = "starved@test";
    struct node *node = node_new(shared_agent, name);
    struct node *target = node_new(shared_agent, "target@test");
    uint64_t request = 0;
    int code;
    node->config.ttl = 600;
    if (!managed) { /* the other's listener stands for a sidecar */
        uint16_t port = target->config.listen_port;
        node->config.sidecar_command = NULL;
        node->config.sidecar_ports = (struct meshx_port_range){port, port};
    }
    allocation_fail(nth);
    code = node_try_open(node, loop);
    if (code == MESHX_OK && node_wait_started(node)->type == MESHX_EVENT_READY) {
        do {
            code = meshx_mesh_upstream(node->mesh, ++request, "target@test",
                                       "target@test", MESHX_UPSTREAM_DIAL);
            if (code == MESHX_OK) {
                code = node_wait(node, MESHX_EVENT_UPSTREAM, request, NULL)->code;
            }
        } while (code == MESHX_ESIDECAR_DOWN);
        assert_true(code == MESHX_OK || code == MESHX_ENOMEM);
        code = meshx_mesh_info(node->mesh, ++request);
        if (code == MESHX_OK) {
            code = node_wait(node, MESHX_EVENT_INFO, request, NULL)->code;
        }
        assert_true(code == MESHX_OK || code == MESHX_ENOMEM);
        meshx_mesh_drain(node->mesh);
        code = node_stop(node)->code;
    }
    bool failed = allocation_failed();
    allocation_fail(0);
    if (code == MESHX_OK || node_count(node, MESHX_EVENT_STOPPED, "still") == 0) {
        assert_not_registered(name);
    } else {
        deregister_other(name); /* no memory to do so */
    }
    node_free(node);
    node_free(target);
    return failed;
}

static void live_through_every_failure(struct meshx_loop *loop, bool managed) {
    unsigned count = 0;
    register_other("target@test", "target@test", "target@test", "\"Port\":1");
    while (live_with_failure(loop, count + 1, managed)) {
        count++;
    }
    assert_in_range(count, 30, 2000);
    deregister_other("target@test");
}

static void every_allocation_may_fail(void **state) {
    live_through_every_failure(*state, false);
}

static void every_allocation_may_fail_with_a_sidecar(void **state) {
    live_through_every_failure(*state, true);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, start_loop, stop_loop)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(ready_means_dialable_and_stop_leaves_nothing),
        TEST(close_stops_too),
        TEST(the_same_name_starts_again_at_once),
        TEST(stop_during_a_start_undoes_it),
        TEST(drain_turns_both_checks_critical),
        TEST(the_loops_end_stops_orderly),
        TEST(the_loops_end_does_not_wait_for_a_silent_agent),
        TEST(a_stop_without_agent_says_so),
        TEST(a_bad_configuration_is_named),
        TEST(a_live_owner_keeps_its_name),
        TEST(a_foreign_service_keeps_its_id),
        TEST(a_healthy_instance_elsewhere_keeps_its_name),
        TEST(what_a_crash_left_behind_is_taken_over),
        TEST(without_agent_a_start_fails_at_once),
        TEST(a_slow_agent_is_waited_for),
        TEST(a_sidecar_that_fails_fails_the_start),
        TEST(without_a_free_port_nothing_is_registered),
        TEST(a_port_lost_in_a_race_is_replaced),
        TEST(data_passes_both_sidecars),
        TEST(a_burst_of_upstreams_takes_two_registrations),
        TEST(each_refusal_says_why_and_leaves_no_upstream),
        TEST(a_refused_registration_fails_its_requests_only),
        TEST(requests_before_ready_wait_for_it),
        TEST(a_killed_sidecar_comes_back),
        TEST(an_agent_that_forgot_us_is_told_again),
        TEST(someone_elses_deregistration_is_repaired),
        TEST(a_stuck_vm_goes_critical),
        TEST(a_deaf_sidecar_is_replaced),
        TEST(an_external_sidecar_may_come_later),
        TEST(every_allocation_may_fail),
        TEST(every_allocation_may_fail_with_a_sidecar),
    };
    signal(SIGPIPE, SIG_IGN);
    /* MESHX_TEST_FILTER="*stop*" runs some of them. */
    cmocka_set_test_filter(getenv("MESHX_TEST_FILTER")); // NOLINT(concurrency-mt-unsafe)
    return cmocka_run_group_tests(tests, start_shared_agent, stop_shared_agent);
}
