/*
 * A control node: finds others without a service of its own, against a real agent and
 * real proxies.
 */
#include "mesh_fixture.h"
#include <string.h>

/* A control node's configuration; |command| is that of its proxies. */
static struct node *control_node_new(const char *name) {
    struct node *node = node_new(shared_agent, name);
    node->config.control_node = true;
    node->config.listen_port = 0;
    node->command[3] = "-service";
    node->command[5] = "-upstream";
    return node;
}

/* A node that looks as if it were on another host: our agent has nothing under the ID
 * that its sidecar would have there. */
static struct node *far_node_start(struct meshx_loop *loop, const char *name,
                                   const char *id) {
    struct node *node = node_new(shared_agent, name);
    node->config.service_id = id;
    node->command[4] = id;
    node_open(node, loop);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    return node;
}

static void own_listeners_are_dialed_directly(void **state) {
    struct node *target = node_start(*state, shared_agent, "near@test");
    struct node *node = control_node_new("shell1@test");
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    assert_not_registered("shell1@test");

    const struct node_event *answer =
        node_upstream(node, "near@test", "near@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_OK);
    assert_int_equal(answer->port, target->config.listen_port);
    assert_true(answer->direct);
    assert_int_equal(
        node_upstream(node, "near@test", "near@test", MESHX_UPSTREAM_ASK)->code,
        MESHX_OK);
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.state, MESHX_STATE_READY);
    assert_false(info.registered);
    assert_int_equal(info.sidecar_starts, 0);
    meshx_mesh_drain(node->mesh);
    assert_int_equal(node_stop(node)->code, MESHX_OK);
    node_free(node);
    node_free(target);
}

/* A new proxy accepts before it knows where the other one is: dials are repeated until a
 * byte comes back. */
static void assert_echo(uint16_t port) {
    for (unsigned tries = 0; !node_echo(port); tries++) {
        assert_in_range(tries, 0, 1000);
        node_pause();
    }
}

static void others_are_dialed_through_one_proxy_each(void **state) {
    struct node *one = far_node_start(*state, "far1@test", "far1");
    struct node *two = far_node_start(*state, "far2@test", "far2");
    struct node *node = control_node_new("shell2@test");
    node_open(node, *state);

    const struct node_event *answer =
        node_upstream(node, "far1@test", "far1@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_OK);
    assert_false(answer->direct);
    assert_in_range(answer->port, 24000, 26999);
    uint16_t port = answer->port;
    assert_echo(port);
    assert_int_equal(
        node_upstream(node, "far1@test", "far1@test", MESHX_UPSTREAM_DIAL)->port, port);
    answer = node_upstream(node, "far2@test", "far2@test", MESHX_UPSTREAM_DIAL);
    assert_int_not_equal(answer->port, port);
    assert_echo(answer->port);
    assert_int_equal(node_info(node)->info.sidecar_starts, 2);
    assert_not_registered("shell2@test");
    node_free(node);
    node_free(one);
    node_free(two);
}

static void what_can_not_be_dialed_says_why(void **state) {
    struct node *far = far_node_start(*state, "far.3@test", "far3");
    struct node *node = control_node_new("shell3@test");
    node_open(node, *state);
    const struct node_event *answer =
        node_upstream(node, "none@test", "none@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_ENODE_UNKNOWN);
    answer = node_upstream(node, "far.3@test", "far.3@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_ECONFIG);
    assert_non_null(strstr(answer->text, "service_name dns"));
    node_free(node);

    node = control_node_new("shell3@test");
    node->config.sidecar_command = NULL;
    node_open(node, *state);
    answer = node_upstream(node, "far.3@test", "far.3@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_ECONFIG);
    assert_non_null(strstr(answer->text, "consul is not found"));
    node_free(node);
    node_free(far);
}

/* It ends before it accepts; the next request starts another one. */
static void a_proxy_that_ends_fails_who_waits(void **state) {
    struct node *far = far_node_start(*state, "far4@test", "far4");
    struct node *node = control_node_new("shell4@test");
    node->command[0] = "/bin/sh";
    node->command[1] = "-c";
    node->command[2] = "echo no >&2; exit 3";
    node->command[3] = NULL;
    node_open(node, *state);
    for (int i = 0; i < 2; i++) {
        const struct node_event *answer =
            node_upstream(node, "far4@test", "far4@test", MESHX_UPSTREAM_DIAL);
        assert_int_equal(answer->code, MESHX_ESIDECAR_EXITED);
        assert_non_null(strstr(answer->text, "exited with status 3: no"));
    }
    node_free(node);
    node_free(far);
}

/* ---- memory ---- */

/* One life with the |nth| allocation failing; true: it did. */
static bool live_with_failure(struct meshx_loop *loop, unsigned nth) {
    static const char *const others[] = {"near5@test", "far5@test"};
    struct node *node = control_node_new("shell5@test");
    allocation_fail(nth);
    int code = node_try_open(node, loop);
    if (code == MESHX_OK) {
        code = node_wait_started(node)->code;
    }
    for (size_t i = 0; code == MESHX_OK && i < 2; i++) {
        uint64_t request = ++node->requests;
        code = meshx_mesh_upstream(node->mesh, request, others[i], others[i], others[i],
                                   MESHX_UPSTREAM_DIAL);
        if (code == MESHX_OK) {
            code = node_wait(node, MESHX_EVENT_UPSTREAM, request, NULL)->code;
        }
    }
    /* A process that is not started for want of memory is a failed system call. */
    if (code != MESHX_OK && code != MESHX_ENOMEM && code != MESHX_ESYSTEM) {
        node_show_events(node);
        fail_msg("allocation %u: %s", nth, meshx_error_name(code));
    }
    bool failed = allocation_failed();
    allocation_fail(0);
    node_free(node);
    return failed;
}

static void every_allocation_may_fail(void **state) {
    struct node *near = node_start(*state, shared_agent, "near5@test");
    struct node *far = far_node_start(*state, "far5@test", "far5");
    unsigned count = 0;
    while (live_with_failure(*state, count + 1)) {
        count++;
    }
    assert_in_range(count, 20, 500);
    node_free(near);
    node_free(far);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(own_listeners_are_dialed_directly),
        TEST(others_are_dialed_through_one_proxy_each),
        TEST(what_can_not_be_dialed_says_why),
        TEST(a_proxy_that_ends_fails_who_waits),
        TEST(every_allocation_may_fail),
    };
    return RUN_TESTS(tests);
}
