/*
 * What Consul says of linked nodes while a node service runs: intentions and health, by
 * blocking queries at a real agent.
 */
#include "mesh_fixture.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define VM_CHECK "\"Port\":1,\"Check\":{\"Name\":\"Erlang VM\",\"TTL\":\"10m\"}"

/* A node whose sidecar is the other's listener: these tests need none. */
static struct node *start_without_sidecar(struct meshx_loop *loop, struct node *listener,
                                          const struct agent *agent, const char *name) {
    struct node *node = node_new(agent, name);
    const uint16_t port = listener->config.listen_port;
    node->config.sidecar_command = NULL;
    node->config.sidecar_ports = (struct meshx_port_range){port, port};
    node_open(node, loop);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    return node;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void link_up(struct node *node, uint64_t id, const char *other, bool dialed) {
    assert_int_equal(meshx_mesh_link_up(node->mesh, id, other, other, dialed), MESHX_OK);
}

/* Until so many requests more were sent, for what must not happen. */
static void await_requests(struct node *node, uint64_t more) {
    const uint64_t before = node_info(node)->info.requests;
    const struct timespec time = {0, 100000000}; /* each look is an event on record */
    while (node_info(node)->info.requests < before + more) {
        nanosleep(&time, NULL);
    }
}

/* Until the agent allows a link. */
static void await_allowed(struct node *node, const char *other) {
    while (node_upstream(node, other, other, MESHX_UPSTREAM_ASK)->code != MESHX_OK) {
        node_pause();
    }
}

/* Many links, one change: what is asked of the agent does not grow with them. */
static void links_cost_no_requests(void **state) {
    enum { LINKS = 100, OTHER_REQUESTS = 20 };
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node = start_without_sidecar(*state, listener, shared_agent, "hub@test");
    for (uint64_t id = 1; id <= LINKS; id++) {
        char name[32];
        snprintf(name, sizeof name, "peer%d@test", (int)id);
        link_up(node, id, name, id % 2 == 0);
    }
    char *intention = deny("hub@test", "peer50@test");
    const struct node_event *event =
        node_wait(node, MESHX_EVENT_LINK_DENIED, 50, "hub@test => peer50@test");
    assert_int_equal(event->code, MESHX_EDENIED);
    assert_in_range(node_info(node)->info.requests, 1, OTHER_REQUESTS);
    assert_int_equal(node_count(node, MESHX_EVENT_LINK_DENIED, NULL), 1);
    allow_again(intention);
    node_free(node);
    node_free(listener);
}

static void a_denied_link_is_told_once(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "watcher@test");
    register_other("peer@test", "peer@test", "peer@test", "\"Port\":1");
    link_up(node, 1, "peer@test", true);
    link_up(node, 2, "peer@test", false);
    assert_int_equal(meshx_mesh_link_up(node->mesh, 3, "static@test", NULL, true),
                     MESHX_OK);
    static const char *const pairs[][2] = {{"watcher@test", "peer@test"},
                                           {"*", "watcher@test"}};
    for (uint64_t i = 0; i < 2; i++) {
        char *intention = deny(pairs[i][0], pairs[i][1]);
        char text[100];
        snprintf(text, sizeof text, "ID %s", intention);
        for (uint64_t id = 1; id <= 2; id++) {
            const struct node_event *event =
                node_wait(node, MESHX_EVENT_LINK_DENIED, id + 2 * i, NULL);
            assert_int_equal(event->code, MESHX_EDENIED);
            assert_non_null(strstr(event->text, text));
            meshx_mesh_link_down(node->mesh, id + 2 * i);
        }
        allow_again(intention);
        await_allowed(node, "peer@test");
        link_up(node, 3 + 2 * i, "peer@test", true);
        link_up(node, 4 + 2 * i, "peer@test", false);
        await_requests(node, 4);
        assert_int_equal(node_count(node, MESHX_EVENT_LINK_DENIED, NULL), 2 + 2 * i);
    }
    deregister_other("peer@test");
    node_free(node);
    node_free(listener);
}

/* The answer to a question about a node that is denied. On a loaded machine our own
 * sidecar may seem to be down for a moment. */
static const struct node_event *denied(struct node *node, const char *name) {
    const struct node_event *answer = node_upstream(node, name, name, MESHX_UPSTREAM_ASK);
    while (answer->code == MESHX_ESIDECAR_DOWN) {
        node_pause();
        answer = node_upstream(node, name, name, MESHX_UPSTREAM_ASK);
    }
    assert_int_equal(answer->code, MESHX_EDENIED);
    return answer;
}

/* The first makes us watch the intentions; from then on a refusal says which one it is.
 */
static void a_denied_dial_names_the_intention(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "namer@test");
    register_other("foe@test", "foe@test", "foe@test", "\"Port\":1");
    char *intention = deny("*", "foe@test");
    const struct node_event *answer = denied(node, "foe@test");
    assert_non_null(strstr(answer->text, "(or the default policy) denies"));
    char text[100];
    snprintf(text, sizeof text, "intention * => foe@test (precedence 8, ID %s) denies",
             intention);
    do {
        node_pause();
        answer = denied(node, "foe@test");
    } while (strstr(answer->text, text) == NULL);
    assert_non_null(strstr(answer->text, "-replace -allow namer@test foe@test"));
    assert_null(strstr(answer->text, "-allow foe@test namer@test"));
    char *back = deny("foe@test", "*"); /* both are told of */
    do {
        node_pause();
        answer = denied(node, "foe@test");
    } while (strstr(answer->text, "-allow foe@test namer@test") == NULL);
    assert_non_null(strstr(answer->text, "-allow namer@test foe@test"));
    allow_again(back);
    allow_again(intention);
    deregister_other("foe@test");
    node_free(node);
    node_free(listener);
}

static void one_direction_if_wished(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node = node_new(shared_agent, "oneway@test");
    const uint16_t port = listener->config.listen_port;
    node->config.dial_direction_only = true;
    node->config.sidecar_command = NULL;
    node->config.sidecar_ports = (struct meshx_port_range){port, port};
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    register_other("peer@test", "peer@test", "peer@test", "\"Port\":1");
    link_up(node, 1, "peer@test", true);
    link_up(node, 2, "peer@test", false);
    char *there = deny("oneway@test", "peer@test");
    node_wait(node, MESHX_EVENT_LINK_DENIED, 1, "oneway@test => peer@test");
    assert_int_equal(node_accept(node, "peer@test", "peer@test")->code, MESHX_OK);
    char *back = deny("peer@test", "oneway@test");
    node_wait(node, MESHX_EVENT_LINK_DENIED, 2, "peer@test => oneway@test");
    assert_int_equal(node_accept(node, "peer@test", "peer@test")->code, MESHX_EDENIED);
    allow_again(there);
    assert_int_equal(
        node_upstream(node, "peer@test", "peer@test", MESHX_UPSTREAM_ASK)->code,
        MESHX_OK);
    allow_again(back);
    assert_int_equal(node_count(node, MESHX_EVENT_LINK_DENIED, NULL), 2);
    deregister_other("peer@test");
    node_free(node);
    node_free(listener);
}

static void a_critical_node_is_told_and_told_well(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "nurse@test");
    /* Not every ID is the node's name (meshx_node_name:service_id/1). */
    register_other("sick-id", "sick@test", "sick@test", VM_CHECK);
    link_up(node, 1, "sick@test", true);
    node_wait(node, MESHX_EVENT_LINK_HEALTH, 1, "Erlang VM");
    assert_int_equal(agent_request(shared_agent, "PUT",
                                   "/v1/agent/check/pass/service:sick-id", NULL, NULL),
                     200);
    while (node_count(node, MESHX_EVENT_LINK_HEALTH, NULL) < 2) {
        node_pause();
    }
    assert_int_equal(node_count(node, MESHX_EVENT_LINK_HEALTH, "Erlang VM"), 1);
    deregister_other("sick-id");
    node_free(node);
    node_free(listener);
}

/* Its own checks fail at nothing but a heartbeat, and those are far apart here. */
static void an_agent_that_returns_is_noticed_at_once(void **state) {
    struct agent *agent = NULL;
    agent_start(&agent);
    struct node *listener = node_new(agent, "unused@test");
    struct node *node = node_new(agent, "missing@test");
    const uint16_t port = listener->config.listen_port;
    node->config.ttl = 600000;
    node->config.sidecar_command = NULL;
    node->config.sidecar_ports = (struct meshx_port_range){port, port};
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    link_up(node, 1, "anyone@test", true);
    agent_kill(agent);
    /* What was under way may break off, of which is told first. */
    node_wait(node, MESHX_EVENT_LOG, 0, "can't be reached");
    assert_null(strstr(node_info(node)->text, "==")); /* last failure: no filter in it */
    agent_restart(agent);
    node_wait(node, MESHX_EVENT_LOG, 0, "registered again");
    await_requests(node, 4);
    assert_int_equal(node_count(node, MESHX_EVENT_LINK_DENIED, NULL), 0);
    assert_int_equal(node_count(node, MESHX_EVENT_LOG, "can't be reached"), 1);
    assert_int_equal(node_info(node)->info.repairs, 1);
    node_free(node);
    node_free(listener);
    agent_stop(agent);
}

static void a_stop_waits_for_no_query(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "waiting@test");
    link_up(node, 1, "anyone@test", true);
    await_requests(node, 6);
    const double begin = seconds();
    node_stop(node);
    assert_true(seconds() - begin < 10);
    node_free(node);
    node_free(listener);
}

static void the_end_of_a_link_needs_no_memory(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "forgetful@test");
    register_other("peer@test", "peer@test", "peer@test", "\"Port\":1");
    enum { COUNT = 20 };
    for (uint64_t id = 1; id <= COUNT; id++) {
        link_up(node, id, "peer@test", true);
        do {
            allocation_fail(1);
            meshx_mesh_link_down(node->mesh, id);
        } while (!allocation_failed());
        allocation_fail(0);
    }
    node_info(node); /* before the next heartbeat, what was left is read with this */
    char *intention = deny("forgetful@test", "peer@test");
    link_up(node, COUNT + 1, "peer@test", true);
    node_wait(node, MESHX_EVENT_LINK_DENIED, COUNT + 1, NULL);
    assert_int_equal(node_count(node, MESHX_EVENT_LINK_DENIED, "denies"), 1);
    allow_again(intention);
    deregister_other("peer@test");
    node_free(node);
    node_free(listener);
}

/* What can't be asked for want of memory is asked again; what can't be watched is denied.
 */
static void every_allocation_may_fail(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "poor@test");
    register_other("peer@test", "peer@test", "peer@test", "\"Port\":1");
    char *intention = deny("poor@test", "peer@test");
    uint64_t id = 0;
    bool failed = true;
    while (failed) {
        id++;
        allocation_fail((unsigned)id);
        int code = meshx_mesh_link_up(node->mesh, id, "peer@test", "peer@test", true);
        while (code == MESHX_OK && node_count(node, MESHX_EVENT_LINK_DENIED, NULL) == 0) {
            node_pause();
        }
        failed = allocation_failed();
        allocation_fail(0);
        assert_true(code == MESHX_OK || code == MESHX_ENOMEM);
        meshx_mesh_link_down(node->mesh, id);
        pthread_mutex_lock(&node->lock);
        node->count = 0;
        pthread_mutex_unlock(&node->lock);
    }
    assert_in_range(id, 4, 500);
    allow_again(intention);
    deregister_other("peer@test");
    node_free(node);
    node_free(listener);
}

/* Its intentions are not watched any more, but asked for. */
static void a_draining_node_answers(void **state) {
    struct node *listener = node_new(shared_agent, "unused@test");
    struct node *node =
        start_without_sidecar(*state, listener, shared_agent, "drainer@test");
    register_other("peer@test", "peer@test", "peer@test", "\"Port\":1");
    link_up(node, 1, "peer@test", true);
    await_requests(node, 4);
    meshx_mesh_drain(node->mesh);
    node_wait(node, MESHX_EVENT_DRAINED, 0, NULL);
    allow_again(deny("drainer@test", "stranger@test"));
    sleep(1); /* the blocking query has been answered, and isn't sent again */
    assert_int_equal(node_accept(node, "peer@test", "peer@test")->code, MESHX_OK);
    deregister_other("peer@test");
    node_free(node);
    node_free(listener);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(links_cost_no_requests),
        TEST(a_denied_link_is_told_once),
        TEST(a_denied_dial_names_the_intention),
        TEST(one_direction_if_wished),
        TEST(a_critical_node_is_told_and_told_well),
        TEST(an_agent_that_returns_is_noticed_at_once),
        TEST(a_stop_waits_for_no_query),
        TEST(the_end_of_a_link_needs_no_memory),
        TEST(a_draining_node_answers),
        TEST(every_allocation_may_fail),
    };
    return RUN_TESTS(tests);
}
