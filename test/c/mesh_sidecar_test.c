/*
 * A node service whose sidecar hangs or finds its ports taken, and upstreams of nodes
 * that are gone, against a real agent and real sidecars.
 */
#include "mesh_fixture.h"
#include <arpa/inet.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Takes |port| of 127.0.0.1, as soon as it is free. */
static int take_port(uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    const int yes = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    while (bind(fd, (const struct sockaddr *)&address, sizeof address) != 0) {
        node_pause();
    }
    assert_int_equal(listen(fd, SOMAXCONN), 0);
    return fd;
}

static void assert_nobody_came(int listener) {
    assert_int_equal(accept(listener, NULL, NULL), -1);
}

static void kill_sidecar(struct node *node, int signal_number) {
    assert_int_equal(kill((pid_t)node_info(node)->info.sidecar_pid, signal_number), 0);
}

static struct node *start_slow_to_restart(struct meshx_loop *loop, const char *name) {
    struct node *node = node_new(shared_agent, name);
    node->config.ttl = 900;
    node->config.sidecar_address = "127.0.0.1";
    node->config.sidecar_restart_min = 1000;
    node_open(node, loop);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    return node;
}

static void a_sidecar_that_hangs_is_replaced(void **state) {
    struct node *node = node_new(shared_agent, "hung@test");
    struct node *peer = node_start(*state, shared_agent, "hungpeer@test");
    node->config.ttl = 900;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    const uint16_t port = node_info(node)->info.sidecar_port;
    kill_sidecar(node, SIGSTOP);
    await(SIDECAR_HEALTH, "hung@test", 503, "does not answer");
    node_wait(node, MESHX_EVENT_LOG, 0, "the sidecar of hung@test hangs");
    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(SIDECAR_HEALTH, "hung@test", 200, NULL);
    const struct meshx_info info = node_info(node)->info;
    assert_int_equal(info.sidecar_port, port);
    assert_int_equal(info.sidecar_starts, 2);
    assert_int_equal(info.registrations, 1);
    assert_true(node_echo(
        node_upstream(peer, "hung@test", "hung@test", MESHX_UPSTREAM_DIAL)->port));
    node_free(node);
    node_free(peer);
}

/* Peers' links go through it until they are closed. */
static void a_sidecar_that_hangs_while_draining_is_let_be(void **state) {
    const struct timespec long_enough = {8, 0}; /* it would be replaced after so long */
    struct node *node = node_new(shared_agent, "ebbing@test");
    node->config.ttl = 900;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    kill_sidecar(node, SIGSTOP);
    await(SIDECAR_HEALTH, "ebbing@test", 503, "does not answer");
    meshx_mesh_drain(node->mesh);
    node_wait(node, MESHX_EVENT_DRAINED, 0, NULL);
    nanosleep(&long_enough, NULL);
    assert_int_equal(node_info(node)->info.sidecar_starts, 1);
    assert_int_equal(node_count(node, MESHX_EVENT_LOG, "restarting it"), 0);
    kill_sidecar(node, SIGCONT);
    assert_int_equal(node_stop(node)->code, MESHX_OK);
    node_free(node);
}

/* Probes of a healthy sidecar leave no trace in its log. */
static void probes_are_not_logged(void **state) {
    struct node *node = node_new(shared_agent, "quiet@test");
    node->config.ttl = 900;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    const uint64_t requests = node_info(node)->info.requests;
    while (node_info(node)->info.requests < requests + 8) { /* four heartbeats */
        node_pause();
    }
    assert_int_equal(node_count(node, MESHX_EVENT_OUTPUT, "[ERR"), 0);
    assert_int_equal(node_count(node, MESHX_EVENT_OUTPUT, "[WARN"), 0);
    assert_int_equal(node_info(node)->info.sidecar_starts, 1);
    node_free(node);
}

/* As it was told at its start: another program was there first, and accepts for it. */
static void a_stranger_at_the_public_port_is_not_the_sidecar(void **state) {
    struct node *node = start_slow_to_restart(*state, "strange@test");
    struct node *peer = node_start(*state, shared_agent, "strangepeer@test");
    const uint16_t port = node_info(node)->info.sidecar_port;
    kill_sidecar(node, SIGKILL);
    int stranger = take_port(port);
    node_wait(node, MESHX_EVENT_LOG, 0, "restarting it at");
    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    await(SIDECAR_HEALTH, "strange@test", 200, NULL);
    assert_int_not_equal(node_info(node)->info.sidecar_port, port);
    await(DIALABLE, "strange@test", 200, "sidecar-proxy");
    assert_true(node_echo(
        node_upstream(peer, "strange@test", "strange@test", MESHX_UPSTREAM_DIAL)->port));
    close(stranger);
    node_free(node);
    node_free(peer);
}

static void an_upstream_taken_while_the_sidecar_is_down_moves(void **state) {
    struct node *peer = node_start(*state, shared_agent, "robbedpeer@test");
    struct node *node = start_slow_to_restart(*state, "robbed@test");
    const uint16_t port =
        node_upstream(node, "robbedpeer@test", "robbedpeer@test", MESHX_UPSTREAM_DIAL)
            ->port;
    assert_true(node_echo(port));
    kill_sidecar(node, SIGKILL);
    int stranger = take_port(port);
    node_wait(node, MESHX_EVENT_LOG, 0, "accepts at port");
    const struct node_event *answer =
        node_upstream(node, "robbedpeer@test", "robbedpeer@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->code, MESHX_OK);
    assert_int_not_equal(answer->port, port);
    assert_true(node_echo(answer->port));
    node_wait(node, MESHX_EVENT_LOG, 0, "was taken by another program");
    assert_int_equal(node_info(node)->info.upstream_count, 1);
    assert_nobody_came(stranger);
    close(stranger);
    node_free(node);
    node_free(peer);
}

/* Between the registration and the sidecar's look at it. */
static void an_upstream_taken_before_it_is_opened_moves(void **state) {
    struct node *peer = node_start(*state, shared_agent, "fasterpeer@test");
    struct node *node = node_start(*state, shared_agent, "faster@test");
    const uint64_t request = 1000;
    kill_sidecar(node, SIGSTOP);
    assert_int_equal(meshx_mesh_upstream(node->mesh, request, "fasterpeer@test",
                                         "fasterpeer@test", "fasterpeer@test",
                                         MESHX_UPSTREAM_DIAL),
                     MESHX_OK);
    const struct node_event *info = node_info(node);
    while (info->info.upstream_count == 0 || info->info.registrations < 2) {
        node_pause();
        info = node_info(node);
    }
    const uint16_t port = info->upstream_ports[0];
    int stranger = take_port(port);
    kill_sidecar(node, SIGCONT);
    const struct node_event *answer =
        node_wait(node, MESHX_EVENT_UPSTREAM, request, NULL);
    while (answer->code == MESHX_ESIDECAR_DOWN) { /* it was slower than 5 s */
        node_pause();
        answer = node_upstream(node, "fasterpeer@test", "fasterpeer@test",
                               MESHX_UPSTREAM_DIAL);
    }
    assert_int_equal(answer->code, MESHX_OK);
    assert_int_not_equal(answer->port, port);
    assert_true(node_echo(answer->port));
    assert_nobody_came(stranger);
    close(stranger);
    node_free(node);
    node_free(peer);
}

static void the_way_to_a_departed_node_is_removed(void **state) {
    struct node *node = node_new(shared_agent, "left@test");
    node->config.ttl = 600;
    node->config.upstream_keep = 500;
    node_open(node, *state);
    node_wait(node, MESHX_EVENT_READY, 0, NULL);
    struct node *gone = node_start(*state, shared_agent, "gone@test");
    struct node *stays = node_start(*state, shared_agent, "stays@test");
    const uint16_t port =
        node_upstream(node, "gone@test", "gone@test", MESHX_UPSTREAM_DIAL)->port;
    node_upstream(node, "stays@test", "stays@test", MESHX_UPSTREAM_DIAL);
    node_free(gone);
    node_wait(node, MESHX_EVENT_LOG, 0, "gone@test has not been in Consul's catalog");
    while (node_info(node)->info.registrations < 4) {
        node_pause();
    }
    char *body = NULL;
    agent_request(shared_agent, "GET", path_of(SERVICE "-sidecar-proxy", "left@test"),
                  NULL, &body);
    assert_null(strstr(body, "gone@test"));
    assert_non_null(strstr(body, "stays@test"));
    free(body);
    assert_int_equal(node_info(node)->info.upstream_count, 1);

    /* Its port is nobody else's, but its own should it come back: the built-in proxy has
     * never closed it. */
    gone = node_start(*state, shared_agent, "gone@test");
    const struct node_event *answer =
        node_upstream(node, "gone@test", "gone@test", MESHX_UPSTREAM_DIAL);
    assert_int_equal(answer->port, port);
    assert_true(node_echo(port));
    assert_int_equal(node_info(node)->info.upstream_count, 2);
    node_free(gone);
    node_free(stays);
    node_free(node);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(a_sidecar_that_hangs_is_replaced),
        TEST(a_sidecar_that_hangs_while_draining_is_let_be),
        TEST(probes_are_not_logged),
        TEST(a_stranger_at_the_public_port_is_not_the_sidecar),
        TEST(an_upstream_taken_while_the_sidecar_is_down_moves),
        TEST(an_upstream_taken_before_it_is_opened_moves),
        TEST(the_way_to_a_departed_node_is_removed),
    };
    return RUN_TESTS(tests);
}
