/*
 * Probes against listeners of the test: there, not there, coming late, full.
 */
#include "control.h"
#include "probe.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

struct attempt {
    struct meshx_loop *loop;
    enum probe_kind kind;
    const char *address;
    uint16_t port;
    uint32_t interval;
    uint32_t timeout;
    bool cancel_in_callback;
    int code;
    struct probe *probe;
    bool called_too_early;
    bool started;
    int calls;
    enum probe_answer answer;
    sem_t done;
};

static int start(void **state) {
    return meshx_loop_start((struct meshx_loop **)state);
}

static int stop(void **state) {
    meshx_loop_stop(*state, 0);
    return 0;
}

static int bind_loopback(int family, uint16_t *port) {
    struct sockaddr_in ipv4 = {.sin_family = AF_INET};
    struct sockaddr_in6 ipv6 = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
    ipv4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct sockaddr *address =
        family == AF_INET ? (struct sockaddr *)&ipv4 : (struct sockaddr *)&ipv6;
    socklen_t size = family == AF_INET ? sizeof ipv4 : sizeof ipv6;
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, address, size), 0);
    assert_int_equal(getsockname(fd, address, &size), 0);
    *port = ntohs(family == AF_INET ? ipv4.sin_port : ipv6.sin6_port);
    return fd;
}

static void on_done(enum probe_answer answer, void *argument) {
    struct attempt *attempt = argument;
    attempt->called_too_early = !attempt->started;
    attempt->calls++;
    attempt->answer = answer;
    if (attempt->cancel_in_callback) {
        probe_cancel(attempt->probe);
    }
    sem_post(&attempt->done);
}

static void begin(void *argument) {
    struct attempt *attempt = argument;
    attempt->code = probe_start(attempt->loop, attempt->kind, attempt->address,
                                attempt->port, attempt->interval, attempt->timeout,
                                on_done, attempt, &attempt->probe);
    attempt->started = true;
}

static void cancel(void *argument) {
    struct attempt *attempt = argument;
    probe_cancel(attempt->probe);
}

static void begin_and_cancel(void *argument) {
    begin(argument);
    cancel(argument);
}

static void nothing(void *argument) {
    (void)argument;
}

static struct attempt new_attempt(void **state, uint16_t port, uint32_t timeout) {
    struct attempt attempt = {.loop = *state,
                              .address = "127.0.0.1",
                              .port = port,
                              .interval = 5,
                              .timeout = timeout};
    sem_init(&attempt.done, 0, 0);
    return attempt;
}

/* Runs it to its end. */
static bool accepts(struct attempt *attempt) {
    control_run(attempt->loop, begin, attempt);
    assert_int_equal(attempt->code, MESHX_OK);
    control_wait(&attempt->done);
    control_run(attempt->loop, nothing, NULL); /* a second call would come now */
    assert_int_equal(attempt->calls, 1);
    assert_false(attempt->called_too_early);
    return attempt->answer == PROBE_ACCEPTS;
}

static void a_listener_accepts(void **state) {
    uint16_t port;
    int listener = bind_loopback(AF_INET, &port);
    assert_int_equal(listen(listener, 8), 0);
    struct attempt once = new_attempt(state, port, 0);
    assert_true(accepts(&once));
    struct attempt repeated = new_attempt(state, port, 600000);
    assert_true(accepts(&repeated));

    /* One connection each, closed at once without a byte. */
    for (int i = 0; i < 2; i++) {
        char byte;
        int connection = accept(listener, NULL, NULL);
        assert_int_equal(recv(connection, &byte, 1, 0), 0);
        close(connection);
    }
    fcntl(listener, F_SETFL, O_NONBLOCK);
    assert_int_equal(accept(listener, NULL, NULL), -1);
    close(listener);
}

static void a_listener_accepts_ipv6(void **state) {
    uint16_t port;
    int listener = bind_loopback(AF_INET6, &port);
    assert_int_equal(listen(listener, 8), 0);
    struct attempt attempt = new_attempt(state, port, 0);
    attempt.address = "::1";
    assert_true(accepts(&attempt));
    close(listener);
}

/* One that reads the hello and then says |answer| and closes; NULL: nothing. */
static enum probe_answer greet(void **state, const char *answer) {
    uint16_t port;
    char hello[1024];
    char end;
    int listener = bind_loopback(AF_INET, &port);
    assert_int_equal(listen(listener, 8), 0);
    struct attempt attempt = new_attempt(state, port, 0);
    attempt.kind = PROBE_HELLO;
    control_run(attempt.loop, begin, &attempt);
    int connection = accept(listener, NULL, NULL);
    assert_in_range(recv(connection, hello, 5, MSG_WAITALL), 5, 5);
    assert_memory_equal(hello, "\x16\3\1", 3); /* a handshake record of this length */
    size_t size = (size_t)(unsigned char)hello[3] * 256 + (unsigned char)hello[4];
    assert_int_equal(recv(connection, hello, size, MSG_WAITALL), size);
    assert_int_equal(recv(connection, &end, 1, MSG_DONTWAIT), -1);
    if (answer != NULL) {
        assert_int_equal(send(connection, answer, strlen(answer), 0), strlen(answer));
        shutdown(connection, SHUT_WR);
    }
    control_wait(&attempt.done);
    assert_int_equal(recv(connection, &end, 1, 0), 0);
    close(connection);
    close(listener);
    return attempt.answer;
}

static void a_hello_wants_a_reaction(void **state) {
    assert_int_equal(greet(state, "\x16\3\3 a ServerHello"), PROBE_ACCEPTS);
    assert_int_equal(greet(state, "\x15\3\3 an alert"), PROBE_ACCEPTS);
    assert_int_equal(greet(state, ""), PROBE_ACCEPTS);
    assert_int_equal(greet(state, "HTTP/1.1 400 Bad Request\r\n\r\n"), PROBE_REFUSES);
    assert_int_equal(greet(state, NULL), PROBE_SILENT);
}

/* However little of the time for all tries is left when one begins. */
static void a_try_has_time_for_its_answer(void **state) {
    uint16_t port;
    char byte;
    int listener = bind_loopback(AF_INET, &port);
    assert_int_equal(listen(listener, 8), 0);
    struct attempt attempt = new_attempt(state, port, 1);
    attempt.kind = PROBE_HELLO;
    control_run(attempt.loop, begin, &attempt);
    int connection = accept(listener, NULL, NULL);
    assert_int_equal(recv(connection, &byte, 1, 0), 1);
    usleep(100000);
    assert_int_equal(send(connection, "\x15\3\3", 3, MSG_NOSIGNAL), 3);
    control_wait(&attempt.done);
    assert_int_equal(attempt.answer, PROBE_ACCEPTS);
    close(connection);
    close(listener);
}

/* Bound but not listening: refused, and nobody else can take the port. */
static void a_port_without_listener_does_not(void **state) {
    uint16_t port;
    int fd = bind_loopback(AF_INET, &port);
    struct attempt once = new_attempt(state, port, 0);
    assert_false(accepts(&once));

    uint64_t begin_time = loop_now();
    struct attempt repeated = new_attempt(state, port, 50);
    assert_false(accepts(&repeated));
    assert_true(loop_now() - begin_time >= 49);

    struct attempt pause_beyond_the_end = new_attempt(state, port, 20);
    pause_beyond_the_end.interval = 600000;
    assert_false(accepts(&pause_beyond_the_end));
    close(fd);
}

static void a_listener_may_come_late(void **state) {
    uint16_t port;
    int fd = bind_loopback(AF_INET, &port);
    struct attempt attempt = new_attempt(state, port, 600000);
    control_run(*state, begin, &attempt);
    struct attempt refused = new_attempt(state, port, 30); /* goes by meanwhile */
    assert_false(accepts(&refused));
    assert_int_equal(listen(fd, 8), 0);
    control_wait(&attempt.done);
    assert_int_equal(attempt.answer, PROBE_ACCEPTS);
    control_run(*state, nothing, NULL);
    close(fd);
}

static void an_address_that_cannot_be_reached_does_not_accept(void **state) {
    struct attempt attempt = new_attempt(state, 9, 0);
    attempt.address = "255.255.255.255"; /* connect() itself fails */
    assert_false(accepts(&attempt));
    assert_int_equal(attempt.answer, PROBE_REFUSES);
}

static void without_descriptors_nothing_is_said(void **state) {
    uint16_t port;
    struct rlimit before;
    int listener = bind_loopback(AF_INET, &port);
    assert_int_equal(listen(listener, 8), 0);
    struct attempt once = new_attempt(state, port, 0);
    struct attempt repeated = new_attempt(state, port, 600000);
    struct attempt meanwhile = new_attempt(state, port, 20);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    const struct rlimit none = {0, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    assert_false(accepts(&once));
    control_run(*state, begin, &repeated);
    assert_false(accepts(&meanwhile));
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(once.answer, PROBE_NOT_MADE);
    assert_int_equal(meanwhile.answer, PROBE_NOT_MADE);
    control_wait(&repeated.done);
    assert_int_equal(repeated.answer, PROBE_ACCEPTS);
    control_run(*state, nothing, NULL);
    close(listener);
}

static void only_numeric_addresses_are_taken(void **state) {
    struct attempt attempt = new_attempt(state, 1, 0);
    attempt.address = "localhost";
    control_run(*state, begin, &attempt);
    assert_int_equal(attempt.code, MESHX_ECONFIG);
    assert_int_equal(attempt.calls, 0);
}

/* A listener whose backlog is full: further connections hang. */
struct full_listener {
    int listener;
    int clients[8];
    uint16_t port;
};

static struct full_listener open_full_listener(void) {
    struct full_listener full;
    struct sockaddr_in address = {.sin_family = AF_INET};
    full.listener = bind_loopback(AF_INET, &full.port);
    assert_int_equal(listen(full.listener, 0), 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(full.port);
    for (int i = 0; i < 8; i++) {
        full.clients[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        connect(full.clients[i], (struct sockaddr *)&address, sizeof address);
    }
    return full;
}

static void close_full_listener(struct full_listener *full) {
    for (int i = 0; i < 8; i++) {
        close(full->clients[i]);
    }
    close(full->listener);
}

static void a_hanging_connect_has_a_limit(void **state) {
    struct full_listener full = open_full_listener();
    struct attempt once = new_attempt(state, full.port, 0); /* 2 s */
    assert_false(accepts(&once));
    struct attempt repeated = new_attempt(state, full.port, 40);
    assert_false(accepts(&repeated));
    close_full_listener(&full);
}

static void a_cancelled_probe_never_calls(void **state) {
    struct full_listener full = open_full_listener();
    uint16_t port;
    int fd = bind_loopback(AF_INET, &port);

    struct attempt before_its_try = new_attempt(state, port, 600000);
    control_run(*state, begin_and_cancel, &before_its_try);

    struct attempt connecting = new_attempt(state, full.port, 600000);
    control_run(*state, begin, &connecting);
    struct attempt meanwhile = new_attempt(state, port, 20);
    assert_false(accepts(&meanwhile));
    control_run(*state, cancel, &connecting);

    struct attempt between_tries = new_attempt(state, port, 600000);
    between_tries.interval = 600000;
    control_run(*state, begin, &between_tries);
    meanwhile = new_attempt(state, port, 20);
    assert_false(accepts(&meanwhile));
    control_run(*state, cancel, &between_tries);

    struct attempt reporting = new_attempt(state, port, 0);
    reporting.cancel_in_callback = true;
    assert_false(accepts(&reporting));

    /* Without pause between its tries it is cancelled wherever it just is. */
    struct attempt anywhere[100];
    for (int i = 0; i < 100; i++) {
        anywhere[i] = new_attempt(state, port, 600000);
        anywhere[i].interval = 0;
        control_run(*state, begin, &anywhere[i]);
    }
    for (int i = 0; i < 100; i++) {
        control_run(*state, cancel, &anywhere[i]);
    }

    probe_cancel(NULL);
    assert_int_equal(listen(fd, 8), 0);
    struct attempt greeting = new_attempt(state, port, 600000);
    greeting.kind = PROBE_HELLO;
    control_run(*state, begin, &greeting);
    int connection = accept(fd, NULL, NULL);
    char hello[5];
    assert_int_equal(recv(connection, hello, sizeof hello, MSG_WAITALL), sizeof hello);
    control_run(*state, cancel, &greeting);
    close(connection);
    struct attempt last = new_attempt(state, port, 0);
    assert_true(accepts(&last));
    assert_int_equal(before_its_try.calls, 0);
    assert_int_equal(connecting.calls, 0);
    assert_int_equal(between_tries.calls, 0);
    assert_int_equal(greeting.calls, 0);
    for (int i = 0; i < 100; i++) {
        assert_int_equal(anywhere[i].calls, 0);
    }
    close(fd);
    close_full_listener(&full);
}

static void begin_without_memory(void *argument) {
    struct attempt *attempt = argument;
    unsigned nth = 1;
    allocation_fail(nth);
    begin(attempt);
    while (allocation_failed()) {
        assert_int_equal(attempt->code, MESHX_ENOMEM);
        allocation_fail(++nth);
        begin(attempt);
    }
    allocation_fail(0);
    assert_true(nth > 1);
}

static void every_allocation_may_fail(void **state) {
    uint16_t port;
    int listener = bind_loopback(AF_INET, &port);
    assert_int_equal(listen(listener, 8), 0);
    struct attempt attempt = new_attempt(state, port, 0);
    control_run(*state, begin_without_memory, &attempt);
    assert_int_equal(attempt.code, MESHX_OK);
    control_wait(&attempt.done);
    control_run(*state, nothing, NULL);
    assert_int_equal(attempt.calls, 1);
    close(listener);
}

int main(void) {
#define ON_LOOP(test) cmocka_unit_test_setup_teardown(test, start, stop)
    const struct CMUnitTest tests[] = {
        ON_LOOP(a_listener_accepts),
        ON_LOOP(a_listener_accepts_ipv6),
        ON_LOOP(a_hello_wants_a_reaction),
        ON_LOOP(a_try_has_time_for_its_answer),
        ON_LOOP(a_port_without_listener_does_not),
        ON_LOOP(a_listener_may_come_late),
        ON_LOOP(an_address_that_cannot_be_reached_does_not_accept),
        ON_LOOP(without_descriptors_nothing_is_said),
        ON_LOOP(only_numeric_addresses_are_taken),
        ON_LOOP(a_hanging_connect_has_a_limit),
        ON_LOOP(a_cancelled_probe_never_calls),
        ON_LOOP(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
