/*
 * Start and end of a node service, against a real agent and real sidecars.
 */
#include "mesh_fixture.h"
#include "process.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    assert_int_equal(meshx_mesh_upstream(node->mesh, 7, "x@test", "x@test", "x@test",
                                         MESHX_UPSTREAM_DIAL),
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
    node_wait(node, MESHX_EVENT_DRAINED, 0, NULL);
    assert_int_equal(node_count(node, MESHX_EVENT_DRAINED, NULL), 1);
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
                              {"service_template", "JSON object"},
                              {"upstream_template", "JSON object"},
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

    /* Also when the rival listens elsewhere. */
    rival = node_new(shared_agent, "owned@test");
    rival->config.listen_address = "::1";
    assert_int_equal(fail_to_start(rival, *state)->code, MESHX_ENAME_IN_USE);
    assert_dialable("owned@test");
    node_free(rival);

    /* Nor does it lose its registration to one that the agent refuses. */
    rival = node_new(shared_agent, "owned@test");
    rival->config.force_registration = true;
    rival->config.service_template = "{\"NoSuchField\":1}";
    assert_int_equal(fail_to_start(rival, *state)->code, MESHX_EAGENT_REFUSED);
    assert_dialable("owned@test");
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

/* Consul would find either of them under both names. */
static void a_name_in_other_case_is_kept_too(void **state) {
    struct node *node = node_new(shared_agent, "twin@test");
    register_other("twin-in-capitals", "TWIN@test", "TWIN@test", "\"Port\":1");
    const struct node_event *failed = fail_to_start(node, *state);
    assert_int_equal(failed->code, MESHX_ENAME_IN_USE);
    assert_non_null(strstr(failed->text, "in use by TWIN@test"));
    assert_non_null(strstr(failed->text, "service_name dns"));
    assert_not_registered("twin@test");
    deregister_other("twin-in-capitals");
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
                       "/no/such/sidecar is not found; install it");
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

static void an_address_of_another_host_is_named(void **state) {
    struct node *node = node_new(shared_agent, "elsewhere@test");
    node->config.sidecar_address = "192.0.2.1";
    const struct node_event *failed = fail_to_start(node, *state);
    assert_int_equal(failed->code, MESHX_ECONFIG);
    assert_non_null(strstr(failed->text, "sidecar_address is 192.0.2.1"));
    assert_not_registered("elsewhere@test");
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

/* ---- memory ---- */

/* MESHX_OK or MESHX_ENOMEM, whatever happens in between. */
static int ask_all(struct node *node) {
    uint64_t request = 0;
    int code;
    do { /* an external sidecar is probed from READY on */
        node_pause();
        code = meshx_mesh_upstream(node->mesh, ++request, "target@test", "target@test",
                                   "target@test", MESHX_UPSTREAM_DIAL);
        if (code == MESHX_OK) {
            code = node_wait(node, MESHX_EVENT_UPSTREAM, request, NULL)->code;
        }
    } while (code == MESHX_ESIDECAR_DOWN);
    int info = meshx_mesh_info(node->mesh, ++request);
    if (info == MESHX_OK) {
        info = node_wait(node, MESHX_EVENT_INFO, request, NULL)->code;
    }
    return code != MESHX_OK ? code : info;
}

/* One life of a node service with the |nth| allocation failing. True: it did. |*overdue|
 * counts starts and answers that took longer than their limits of many seconds. */
static bool live_with_failure(struct meshx_loop *loop, unsigned nth, bool managed,
                              unsigned *overdue) {
    char name[40]; /* a new one, for what the last may have left */
    snprintf(name, sizeof name, "starved%u-%u-%d@test", nth, *overdue, managed);
    struct node *node = node_new(shared_agent, name);
    struct node *target = node_new(shared_agent, "target@test");
    node->config.ttl = 600;
    if (!managed) { /* the other's listener stands for a sidecar */
        uint16_t port = target->config.listen_port;
        node->config.sidecar_command = NULL;
        node->config.sidecar_ports = (struct meshx_port_range){port, port};
    }
    allocation_fail(nth);
    int code = node_try_open(node, loop);
    if (code == MESHX_OK) {
        const struct node_event *started = node_wait_started(node);
        code = started->code;
        if (started->type == MESHX_EVENT_READY) {
            code = ask_all(node);
            meshx_mesh_drain(node->mesh);
        }
        /* A process that is not started for want of memory is a failed system call. */
        if (code == MESHX_ESIDECAR_TIMEOUT || code == MESHX_EAGENT_TIMEOUT) {
            node_show_events(node);
            (*overdue)++;
        } else if (code != MESHX_OK && code != MESHX_ENOMEM && code != MESHX_ESYSTEM) {
            node_show_events(node);
            fail_msg("allocation %u: %s", nth, meshx_error_name(code));
        }
        node_stop(node);
    }
    bool failed = allocation_failed();
    allocation_fail(0);
    /* With its answer lost, the agent may do a registration after the deregistration. */
    if (node_count(node, MESHX_EVENT_FAILED, "registering the service:") == 0 &&
        node_count(node, MESHX_EVENT_UPSTREAM, "registering the service:") == 0 &&
        node_count(node, MESHX_EVENT_STOPPED, "still registered") == 0) {
        assert_not_registered(name);
    }
    node_free(node);
    node_free(target);
    return failed;
}

/* What there is no memory for is said again. */
static void drained_is_told_when_it_is_so(void **state) {
    bool failed = true;
    for (unsigned nth = 1; failed; nth++) {
        char name[40];
        snprintf(name, sizeof name, "ebbing%u@test", nth);
        struct node *sidecar = node_new(shared_agent, "unused@test"); /* stands for one */
        struct node *node = node_new(shared_agent, name);
        const uint16_t port = sidecar->config.listen_port;
        node->config.sidecar_command = NULL;
        node->config.sidecar_ports = (struct meshx_port_range){port, port};
        node_open(node, *state);
        node_wait(node, MESHX_EVENT_READY, 0, NULL);
        await(SIDECAR_HEALTH, name, 200, NULL);
        allocation_fail(nth);
        meshx_mesh_drain(node->mesh);
        node_wait(node, MESHX_EVENT_DRAINED, 0, NULL);
        failed = allocation_failed();
        allocation_fail(0);
        char *body = NULL;
        assert_int_equal(agent_request(shared_agent, "GET", path_of(SIDECAR_HEALTH, name),
                                       NULL, &body),
                         503);
        assert_non_null(strstr(body, "the node is stopping"));
        free(body);
        assert_int_equal(
            agent_request(shared_agent, "GET", path_of(HEALTH, name), NULL, &body), 503);
        assert_non_null(strstr(body, "the node is stopping"));
        free(body);
        assert_int_equal(node_count(node, MESHX_EVENT_DRAINED, NULL), 1);
        node_free(node);
        node_free(sidecar);
    }
}

/* Under TSan, whose subject is the threads, a life takes long: some of them will do. */
#ifdef __SANITIZE_THREAD__
enum { NEXT_ALLOCATION = 5 };
#else
enum { NEXT_ALLOCATION = 1 };
#endif

static void live_through_every_failure(struct meshx_loop *loop, bool managed) {
    unsigned count = 0;
    unsigned overdue = 0;
    register_other("target@test", "target@test", "target@test", "\"Port\":1");
    for (bool failed = true; failed;) {
        unsigned before = overdue;
        failed = live_with_failure(loop, count + 1, managed, &overdue);
        if (overdue == before) {
            count += NEXT_ALLOCATION;
        } else {
            /* A loaded machine may be that slow once; the same allocation again, for one
             * that hangs would do so again. */
            assert_in_range(overdue, 1, 2);
            failed = true;
        }
    }
    assert_true(count >= 30);
    deregister_other("target@test");
}

static void every_allocation_may_fail(void **state) {
    live_through_every_failure(*state, false);
}

static void every_allocation_may_fail_with_a_sidecar(void **state) {
    live_through_every_failure(*state, true);
}

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
        TEST(a_name_in_other_case_is_kept_too),
        TEST(what_a_crash_left_behind_is_taken_over),
        TEST(without_agent_a_start_fails_at_once),
        TEST(a_slow_agent_is_waited_for),
        TEST(a_sidecar_that_fails_fails_the_start),
        TEST(without_a_free_port_nothing_is_registered),
        TEST(an_address_of_another_host_is_named),
        TEST(a_port_lost_in_a_race_is_replaced),
        TEST(drained_is_told_when_it_is_so),
        TEST(every_allocation_may_fail),
        TEST(every_allocation_may_fail_with_a_sidecar),
    };
    return RUN_TESTS(tests);
}
