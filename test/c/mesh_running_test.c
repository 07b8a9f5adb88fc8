/*
 * A node service that runs: upstreams and repairs, against a real agent and real
 * sidecars.
 */
#include "mesh_fixture.h"
#include "process.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

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

/* A node as one of ours is, as far as lists of all show it. */
static void register_with_sidecar(const char *name) {
    char sidecar[128];
    snprintf(sidecar, sizeof sidecar, "%.100s-sidecar-proxy", name);
    register_other(name, name, name, "\"Port\":1");
    register_other(sidecar, sidecar, name,
                   "\"Port\":1,\"Check\":{\"Name\":\"Connect sidecar\",\"TTL\":\"10m\","
                   "\"Status\":\"passing\"}");
}

static void deregister_with_sidecar(const char *name) {
    char sidecar[128];
    snprintf(sidecar, sizeof sidecar, "%.100s-sidecar-proxy", name);
    deregister_other(name);
    deregister_other(sidecar);
}

enum { BURST = 100 };

static void dial_all(struct node *node, char names[BURST][40], uint16_t ports[BURST]) {
    static uint64_t request = 100;
    for (uint64_t i = 0; i < BURST; i++) {
        assert_int_equal(meshx_mesh_upstream(node->mesh, request + i, names[i], names[i],
                                             names[i], MESHX_UPSTREAM_DIAL),
                         MESHX_OK);
    }
    for (uint64_t i = 0; i < BURST; i++) {
        const struct node_event *answer =
            node_wait(node, MESHX_EVENT_UPSTREAM, request + i, NULL);
        assert_int_equal(answer->code, MESHX_OK);
        ports[i] = answer->port;
    }
    request += BURST;
}

/* Nor other requests: their number doesn't grow with that of the upstreams. */
static void a_burst_of_upstreams_takes_few_registrations(void **state) {
    enum { REQUESTS = 30 };
    struct node *node = node_start(*state, shared_agent, "burst@test");
    char names[BURST][40];
    uint16_t ports[BURST];
    struct timespec begin;
    struct timespec end;
    for (int i = 0; i < BURST; i++) {
        snprintf(names[i], sizeof names[i], "target%d@test", i);
        register_with_sidecar(names[i]);
    }
    const uint64_t before = node_info(node)->info.requests;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    dial_all(node, names, ports);
    for (int i = 0; i < BURST; i++) {
        for (int j = 0; j < i; j++) {
            assert_int_not_equal(ports[i], ports[j]);
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.upstream_count, BURST);
    assert_in_range(info.requests, before + 1, before + REQUESTS);
    /* The first had none of them, and one or two had all; one more for each 200 ms in
     * which an agent on a loaded machine may have answered nothing. */
    const uint64_t milliseconds = (uint64_t)(end.tv_sec - begin.tv_sec) * 1000 +
                                  (uint64_t)(end.tv_nsec / 1000000) -
                                  (uint64_t)(begin.tv_nsec / 1000000);
    assert_in_range(info.registrations, 2, 3 + milliseconds / 200);
    char *body = NULL;
    agent_request(shared_agent, "GET", path_of(SERVICE "-sidecar-proxy", "burst@test"),
                  NULL, &body);
    for (int i = 0; i < BURST; i++) {
        assert_non_null(strstr(body, names[i]));
        deregister_with_sidecar(names[i]);
    }
    free(body);
    node_free(node);
}

/* Twice in a moment, so that no blocking query is under way just then. */
static void nor_does_one_after_a_change_of_intentions(void **state) {
    enum { REQUESTS = 30 };
    struct node *node = node_start(*state, shared_agent, "burst@test");
    char names[BURST][40];
    uint16_t ports[BURST];
    for (int i = 0; i < BURST; i++) {
        snprintf(names[i], sizeof names[i], "target%d@test", i);
        register_with_sidecar(names[i]);
    }
    dial_all(node, names, ports);
    allow_again(deny("burst@test", "stranger@test"));
    const uint64_t before = node_info(node)->info.requests;
    dial_all(node, names, ports);
    assert_in_range(node_info(node)->info.requests, before + 1, before + REQUESTS);
    for (int i = 0; i < BURST; i++) {
        deregister_with_sidecar(names[i]);
    }
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
    /* Who only looks whether they are registered learns that much. */
    assert_int_equal(
        node_upstream(node, "nobody@test", "sick@test", MESHX_UPSTREAM_FIND)->code,
        MESHX_ENODE_UNKNOWN);
    static const char *const found[][2] = {
        {"sick@test", "sick@test"}, {"a@test", "pair"}, {"guarded@test", "guarded@test"}};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(
            node_upstream(node, found[i][0], found[i][1], MESHX_UPSTREAM_FIND)->code,
            MESHX_OK);
    }
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.upstream_count, 0);
    assert_int_equal(info.registrations, 1);

    allow_again(intention);
    assert_int_equal(
        node_upstream(node, "guarded@test", "guarded@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_OK);
    /* Its checks pass, but it has no sidecar that runs. */
    const struct node_event *answer =
        node_upstream(node, "guarded@test", "guarded@test", MESHX_UPSTREAM_REDIAL);
    assert_int_equal(answer->code, MESHX_ENODE_UNHEALTHY);
    assert_non_null(strstr(answer->text, "nothing listens at "));
    deregister_other("sick@test");
    deregister_other("pair-a");
    deregister_other("pair-b");
    deregister_other("guarded@test");
    node_free(node);
}

static void a_refused_registration_fails_its_requests_only(void **state) {
    struct node *node = node_new(shared_agent, "picky@test");
    node->config.upstream_template = "{\"NoSuchField\":1}"; /* a 400 of the agent */
    const uint16_t port = agent_free_port();
    node->config.upstream_ports = (struct meshx_port_range){port, port};
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    register_other("wanted@test", "wanted@test", "wanted@test", "\"Port\":1");
    for (int i = 0; i < 2; i++) { /* the only port is free again */
        const struct node_event *answer =
            node_upstream(node, "wanted@test", "wanted@test", MESHX_UPSTREAM_DIAL);
        assert_int_equal(answer->code, MESHX_EAGENT_REFUSED);
        assert_non_null(strstr(answer->text, "NoSuchField"));
    }
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
    await(SIDECAR_HEALTH, "killed@test", 503, NULL);
    assert_int_equal(
        node_upstream(node, "dest@test", "dest@test", MESHX_UPSTREAM_DIAL)->code,
        MESHX_ESIDECAR_DOWN);
    assert_int_equal(
        node_upstream(node, "dest@test", "dest@test", MESHX_UPSTREAM_ASK)->code,
        MESHX_ESIDECAR_DOWN);

    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(SIDECAR_HEALTH, "killed@test", 200, NULL);
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
        node_pause();
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
    await(SIDECAR_HEALTH, "removed@test", 200, NULL);
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
    await(SIDECAR_HEALTH, "stuck@test", 503, NULL);
    meshx_mesh_renew(node->mesh);
    node_wait(node, MESHX_EVENT_LOG, 0, "answers again");
    await(HEALTH, "stuck@test", 200, NULL);
    await(SIDECAR_HEALTH, "stuck@test", 200, NULL);
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
    await(SIDECAR_HEALTH, "deaf@test", 200, NULL);
    const struct meshx_info after = node_info(node)->info;
    assert_int_not_equal(after.sidecar_port, before.sidecar_port);
    assert_int_equal(after.registrations, 2);
    assert_int_equal(after.sidecar_starts, 2);
    node_free(node);
    agent_remove_directory(directory);
}

/* Only then a probe can't be made, which says nothing about the sidecar. */
static void without_descriptors_the_sidecar_is_let_be(void **state) {
    struct node *node = node_new(shared_agent, "crowded@test");
    enum { MANY = 100 };
    int taken[MANY];
    int count = 0;
    struct rlimit before;
    node->config.ttl = 900;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    const struct rlimit few = {MANY, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    while (count < MANY && (taken[count] = dup(STDERR_FILENO)) >= 0) {
        count++;
    }
    /* Five heartbeats at least: each passes one check, or both. */
    const uint64_t requests = node_info(node)->info.requests;
    struct meshx_info info = {0};
    while (info.requests < requests + 10) {
        info = node_info(node)->info;
        node_pause();
    }
    while (count > 0) {
        close(taken[--count]);
    }
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(node_count(node, MESHX_EVENT_LOG, "can't be probed"), 1);
    await(SIDECAR_HEALTH, "crowded@test", 200, NULL);
    assert_int_equal(node_info(node)->info.sidecar_starts, 1);
    assert_int_equal(node_count(node, MESHX_EVENT_LOG, "restarting it"), 0);
    node_free(node);
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
    assert_int_equal(status_of(SIDECAR_HEALTH, "outside@test"), 503);
    pid_t proxy = fork();
    if (proxy == 0) {
        execle(listener->command[0], listener->command[0], "connect", "proxy",
               "-log-level", "err", "-sidecar-for", "outside@test", (char *)NULL,
               (char *const *)listener->environment);
        _exit(127);
    }
    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(SIDECAR_HEALTH, "outside@test", 200, NULL);
    assert_int_equal(kill(proxy, SIGKILL), 0);
    assert_true(process_wait_gone(proxy));
    node_free(node);
    node_free(listener);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(data_passes_both_sidecars),
        TEST(a_burst_of_upstreams_takes_few_registrations),
        TEST(nor_does_one_after_a_change_of_intentions),
        TEST(each_refusal_says_why_and_leaves_no_upstream),
        TEST(a_refused_registration_fails_its_requests_only),
        TEST(requests_before_ready_wait_for_it),
        TEST(a_killed_sidecar_comes_back),
        TEST(an_agent_that_forgot_us_is_told_again),
        TEST(someone_elses_deregistration_is_repaired),
        TEST(a_stuck_vm_goes_critical),
        TEST(a_deaf_sidecar_is_replaced),
        TEST(without_descriptors_the_sidecar_is_let_be),
        TEST(an_external_sidecar_may_come_later),
    };
    return RUN_TESTS(tests);
}
