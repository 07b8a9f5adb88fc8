/*
 * HTTP against a server of the test that answers as badly as asked for (web_server.h).
 */
#include "agent.h"
#include "control.h"
#include "exchange.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* |more| is one setting beside the address. */
static void begin_server(struct context *context, const char *name, const char *value) {
    struct web_server *server;
    char address[64];
    web_server_start(NULL, &server);
    snprintf(address, sizeof address, "127.0.0.1:%u", web_server_port(server));
    const struct meshx_setting settings[] = {
        {"CONSUL_HTTP_ADDR", address}, {name, value}, {NULL, NULL}};
    context_begin(context, settings);
    context->server = server;
}

static int setup(void **state) {
    static struct context context;
    begin_server(&context, NULL, NULL);
    *state = &context;
    return 0;
}

static int teardown(void **state) {
    context_finish(*state);
    return 0;
}

static void assert_answer(const struct exchange *exchange, long status,
                          const char *body) {
    if (exchange->failure.code != MESHX_OK) {
        fail_msg("%s", exchange->failure.text);
    }
    assert_int_equal(exchange->status, status);
    assert_string_equal(exchange->body, body);
    assert_int_equal(exchange->size, strlen(body));
}

static void assert_lacks(const char *text, const char *part) {
    if (strstr(text, part) != NULL) {
        fail_msg("\"%s\" is in: %s", part, text);
    }
}

/* Every failure names the agent. */
static void assert_failure(const struct exchange *exchange, int code, const char *text) {
    assert_contains(exchange->failure.text, text);
    assert_contains(exchange->failure.text, exchange->context->endpoint.shown);
    assert_int_equal(exchange->failure.code, code);
}

/* ---- requests and answers ---- */

static void any_status_is_an_answer(void **state) {
    struct exchange exchange;
    exchange_get(&exchange, *state, "/hello");
    assert_answer(&exchange, 200, "hello");
    exchange_get(&exchange, *state, "/status/404");
    assert_answer(&exchange, 404, "404");
    exchange_get(&exchange, *state, "/status/503");
    assert_answer(&exchange, 503, "503");
    exchange_get(&exchange, *state, "/chunked");
    assert_answer(&exchange, 200, "hello");
}

static void a_request_is_sent_as_told(void **state) {
    struct exchange exchange;
    exchange_get(&exchange, *state, "/echo?a=%20b");
    assert_int_equal(exchange.status, 200);
    assert_contains(exchange.body, "GET /echo?a=%20b HTTP/1.1\r\n");
    assert_lacks(exchange.body, "X-Consul-Token");
    assert_lacks(exchange.body, "Authorization");

    char body[3000];
    memset(body, 'x', sizeof body);
    body[sizeof body - 1] = '\0';
    exchange_run(&exchange, *state, &(struct http_request){"PUT", "/echo", body, LONG});
    assert_contains(exchange.body, "PUT /echo HTTP/1.1\r\n");
    assert_contains(exchange.body, "Content-Type: application/json\r\n");
    assert_contains(exchange.body, "Content-Length: 2999\r\n");
    assert_contains(exchange.body, body);
    assert_lacks(exchange.body, "Expect");

    exchange_run(&exchange, *state, &(struct http_request){"PUT", "/echo", NULL, LONG});
    assert_contains(exchange.body, "PUT /echo HTTP/1.1\r\n");
    assert_contains(exchange.body, "Content-Length: 0\r\n");

    exchange_run(&exchange, *state,
                 &(struct http_request){"DELETE", "/echo", NULL, LONG});
    assert_contains(exchange.body, "DELETE /echo HTTP/1.1\r\n");
}

/* context_begin() frees nothing of the environment's proxy, it must just not be used. */
static void a_proxy_of_the_environment_is_not_used(void **state) {
    (void)state;
    char proxy[64];
    struct context context;
    struct exchange exchange;
    snprintf(proxy, sizeof proxy, "http://127.0.0.1:%u", agent_free_port());
    setenv("http_proxy", proxy, 1);
    setenv("all_proxy", proxy, 1);
    begin_server(&context, NULL, NULL);
    exchange_get(&exchange, &context, "/hello");
    context_finish(&context);
    unsetenv("http_proxy");
    unsetenv("all_proxy");
    assert_answer(&exchange, 200, "hello");
}

static void namespace_and_partition_go_with_every_path(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    begin_server(&context, "CONSUL_NAMESPACE", "a b");
    exchange_get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "GET /echo?ns=a%20b HTTP/1.1\r\n");
    exchange_get(&exchange, &context, "/echo?note=x");
    assert_contains(exchange.body, "GET /echo?note=x&ns=a%20b HTTP/1.1\r\n");
    context_finish(&context);
}

static void token_and_password_are_sent(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    begin_server(&context, "CONSUL_HTTP_TOKEN", "secret");
    exchange_get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "X-Consul-Token: secret\r\n");
    context_finish(&context);

    begin_server(&context, "CONSUL_HTTP_AUTH", "user:pass");
    exchange_get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "Authorization: Basic dXNlcjpwYXNz\r\n");
    exchange_run(&exchange, &context, &(struct http_request){"PUT", "/echo", "{}", LONG});
    assert_contains(exchange.body, "Authorization: Basic dXNlcjpwYXNz\r\n");
    context_finish(&context);
}

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "we");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void a_rotated_token_is_used_at_once(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    char *directory = agent_make_directory();
    char path[256];
    snprintf(path, sizeof path, "%s/token", directory);
    write_file(path, "first\n");
    begin_server(&context, "CONSUL_HTTP_TOKEN_FILE", path);
    exchange_get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "X-Consul-Token: first\r\n");
    write_file(path, "second\n");
    exchange_get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "X-Consul-Token: second\r\n");

    assert_int_equal(unlink(path), 0);
    exchange_get(&exchange, &context, "/echo");
    assert_int_equal(exchange.failure.code, MESHX_ECONFIG);
    assert_contains(exchange.failure.text, path);
    assert_int_equal(web_server_requests(context.server), 2);
    context_finish(&context);
    agent_remove_directory(directory);
}

static void a_unix_socket_is_spoken_to(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    struct web_server *server;
    char *directory = agent_make_directory();
    char path[256];
    char address[300];
    snprintf(path, sizeof path, "%s/socket", directory);
    snprintf(address, sizeof address, "unix://%s", path);
    const struct meshx_setting settings[] = {{"CONSUL_HTTP_ADDR", address}, {NULL, NULL}};
    web_server_start(path, &server);
    context_begin(&context, settings);
    exchange_get(&exchange, &context, "/hello");
    assert_answer(&exchange, 200, "hello");
    web_server_stop(server);
    unlink(path);
    exchange_get(&exchange, &context, "/hello");
    assert_failure(&exchange, MESHX_EAGENT_UNREACHABLE, "No such file or directory");
    context_finish(&context);
    agent_remove_directory(directory);
}

static void redirects_are_followed_within_the_agent(void **state) {
    struct context *context = *state;
    struct exchange exchange;
    struct web_server *other;
    exchange_get(&exchange, context, "/redirect");
    assert_answer(&exchange, 200, "hello");

    int before = web_server_requests(context->server);
    exchange_get(&exchange, context, "/redirect-loop");
    assert_answer(&exchange, 301, "moved");
    assert_int_equal(web_server_requests(context->server), before + 4);

    exchange_run(&exchange, context,
                 &(struct http_request){"PUT", "/redirect", "{}", LONG});
    assert_answer(&exchange, 301, "moved");

    web_server_start(NULL, &other);
    web_server_lead_away(context->server, web_server_port(other));
    exchange_get(&exchange, context, "/redirect-away");
    assert_answer(&exchange, 301, "moved");
    assert_int_equal(web_server_requests(other), 0);
    web_server_stop(other);
}

/* ---- bad answers ---- */

static void bad_answers_are_failures(void **state) {
    struct exchange exchange;
    exchange_get(&exchange, *state, "/garbage");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "is not HTTP");
    exchange_get(&exchange, *state, "/bad-chunk");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "is not HTTP");
    exchange_get(&exchange, *state, "/huge");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "larger than 16 MiB");
    exchange_get(&exchange, *state, "/endless");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "larger than 16 MiB");
    exchange_get(&exchange, *state, "/nothing");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "broke the connection");
    exchange_get(&exchange, *state, "/cut");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "broke the connection");
    exchange_get(&exchange, *state, "/hello");
    assert_answer(&exchange, 200, "hello");
}

static void a_silent_agent_meets_the_deadline(void **state) {
    struct context *context = *state;
    struct exchange silent[3];
    struct exchange hello;
    /* The third waits for a connection all its time. */
    for (int i = 0; i < 3; i++) {
        exchange_begin(&silent[i], context, "/silent", 30);
    }
    for (int i = 0; i < 3; i++) {
        exchange_end(&silent[i]);
        assert_failure(&silent[i], MESHX_EAGENT_TIMEOUT, "within 30 ms");
    }
    exchange_get(&hello, context, "/hello");
    assert_answer(&hello, 200, "hello");
}

/* A waiting request goes out when a deadline sets a connection free. */
static void a_deadline_makes_room_for_others(void **state) {
    struct exchange silent[2];
    struct exchange hello;
    exchange_begin(&silent[0], *state, "/silent", 30);
    exchange_begin(&silent[1], *state, "/silent", 30);
    exchange_get(&hello, *state, "/hello");
    assert_answer(&hello, 200, "hello");
    exchange_end(&silent[0]);
    exchange_end(&silent[1]);
}

static void nobody_there_is_a_failure(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    char address[64];
    snprintf(address, sizeof address, "localhost:%u", agent_free_port());
    const struct meshx_setting settings[] = {{"CONSUL_HTTP_ADDR", address}, {NULL, NULL}};
    context_begin(&context, settings);
    exchange_get(&exchange, &context, "/hello");
    assert_failure(&exchange, MESHX_EAGENT_UNREACHABLE, "Connection refused");
    assert_contains(exchange.failure.text, "CONSUL_HTTP_ADDR");
    context_finish(&context);
}

/* ---- connections ---- */

static void many_requests_share_two_connections(void **state) {
    static struct exchange exchanges[MAX_EXCHANGES];
    struct context *context = *state;
    for (int i = 0; i < MAX_EXCHANGES; i++) {
        exchange_begin(&exchanges[i], context, i < 2 ? "/gate" : "/hello", LONG);
    }
    web_server_wait_requests(context->server, 2);
    web_server_open_gate(context->server);
    for (int i = 0; i < MAX_EXCHANGES; i++) {
        exchange_end(&exchanges[i]);
        assert_answer(&exchanges[i], 200, "hello");
    }
    assert_int_equal(web_server_requests(context->server), MAX_EXCHANGES);
    assert_int_equal(web_server_connections(context->server), 2);
}

/* The server closes the idle connection; what the next request is, it must not notice. */
static void a_stale_connection_goes_unnoticed(void **state) {
    struct context *context = *state;
    struct exchange exchange;
    for (int i = 0; i < 20; i++) {
        exchange_get(&exchange, context, "/hello-and-close");
        assert_answer(&exchange, 200, "hello");
        exchange_run(&exchange, context,
                     &(struct http_request){"PUT", "/hello-and-close", "{}", LONG});
        assert_answer(&exchange, 200, "hello");
    }
    assert_int_equal(web_server_requests(context->server), 40);
}

/* The same, but the request was on its way when the connection was closed. */
static void a_request_on_a_dying_connection_is_sent_again(void **state) {
    struct context *context = *state;
    struct exchange exchange;
    exchange_get(&exchange, context, "/hello");
    assert_answer(&exchange, 200, "hello");
    exchange_get(&exchange, context, "/fresh");
    assert_answer(&exchange, 200, "hello");
    exchange_run(&exchange, context,
                 &(struct http_request){"PUT", "/fresh", "{\"a\":1}", LONG});
    assert_answer(&exchange, 200, "hello");
    exchange_run(&exchange, context, &(struct http_request){"PUT", "/fresh", NULL, LONG});
    assert_answer(&exchange, 200, "hello");
    assert_int_equal(web_server_connections(context->server), 4);
    assert_int_equal(web_server_requests(context->server), 7); /* three twice */
}

/* ---- freeing ---- */

static void freeing_cancels_without_callbacks(void **state) {
    struct context *context = *state;
    struct exchange exchanges[4];
    for (int i = 0; i < 4; i++) {
        exchange_begin(&exchanges[i], context, "/gate", LONG);
    }
    web_server_wait_requests(context->server, 2);
    control_run(context->loop, context_drop_http, context);
    web_server_open_gate(context->server);
    meshx_loop_stop(context->loop, 0);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(exchanges[i].calls, 0);
    }
    assert_int_equal(meshx_loop_start(&context->loop), MESHX_OK); /* for teardown */
}

static void a_callback_may_send_and_free(void **state) {
    struct context *context = *state;
    struct exchange first;
    struct exchange second;
    struct exchange never[2];
    exchange_init(&first, context, "/hello", LONG);
    exchange_init(&second, context, "/hello", LONG);
    first.then = &second;
    second.free_http_in_callback = true;
    exchange_begin(&never[0], context, "/gate", LONG);
    control_run(context->loop, exchange_send, &first);
    exchange_end(&first);
    exchange_end(&second);
    assert_answer(&second, 200, "hello");
    assert_null(context->http);

    /* Also when it was a failure that came by the timer. */
    control_run(context->loop, context_make_http, context);
    exchange_begin(&never[1], context, "/gate", LONG);
    exchange_init(&first, context, "/silent", 10);
    first.free_http_in_callback = true;
    control_run(context->loop, exchange_send, &first);
    exchange_end(&first);
    assert_int_equal(first.failure.code, MESHX_EAGENT_TIMEOUT);
    meshx_loop_stop(context->loop, 0);
    assert_int_equal(never[0].calls, 0);
    assert_int_equal(never[1].calls, 0);
    assert_int_equal(meshx_loop_start(&context->loop), MESHX_OK); /* for teardown */
}

static void freeing_nothing_is_allowed(void **state) {
    struct context *context = *state;
    control_run(context->loop, context_drop_http, context);
    control_run(context->loop, context_drop_http, context);
}

/* ---- allocations ---- */

struct scarce {
    struct context *context;
    struct exchange exchange;
    unsigned nth;
};

static void make_http_without_memory(void *argument) {
    struct scarce *scarce = argument;
    struct context *context = scarce->context;
    allocation_fail(scarce->nth);
    context->new_code = http_new(context->loop, &context->endpoint, 2, &context->http);
}

static void send_without_memory(void *argument) {
    struct scarce *scarce = argument;
    allocation_fail(scarce->nth);
    exchange_send(&scarce->exchange);
}

static void every_allocation_of_a_request_may_fail(void **state) {
    (void)state;
    static struct context context;
    static struct scarce scarce = {.context = &context};
    struct exchange last;
    bool failed = true;
    int in_call = 0;
    int in_answer = 0;
    begin_server(&context, "CONSUL_HTTP_TOKEN", "secret");
    context.endpoint.query = strdup("ns=x");
    for (scarce.nth = 1; failed; scarce.nth++) {
        /* Each on a fresh connection, so that it is watched anew. */
        exchange_init(&scarce.exchange, &context, "/hello-and-close", LONG);
        control_run(context.loop, send_without_memory, &scarce);
        if (scarce.exchange.code == MESHX_OK) {
            exchange_end(&scarce.exchange);
        }
        failed = allocation_failed();
        allocation_fail(0);
        if (!failed) {
            assert_answer(&scarce.exchange, 200, "hello");
        } else if (scarce.exchange.code == MESHX_OK) {
            assert_int_equal(scarce.exchange.failure.code, MESHX_ENOMEM);
            in_answer++;
        } else {
            assert_int_equal(scarce.exchange.code, MESHX_ENOMEM);
            assert_int_equal(scarce.exchange.calls, 0);
            in_call++;
        }
    }
    assert_true(in_call >= 4);
    assert_true(in_answer >= 2); /* the watcher, the body */
    exchange_get(&last, &context, "/hello");
    assert_answer(&last, 200, "hello");
    context_finish(&context);
}

static void every_allocation_of_a_new_http_may_fail(void **state) {
    (void)state;
    static struct context context;
    static struct scarce scarce = {.context = &context};
    struct exchange last;
    bool failed = true;
    char *directory = agent_make_directory();
    char path[256];
    snprintf(path, sizeof path, "%s/certificate.pem", directory);
    write_file(path, "something");
    char address[64];
    struct web_server *server;
    web_server_start(NULL, &server);
    snprintf(address, sizeof address, "https://127.0.0.1:%u", web_server_port(server));
    const struct meshx_setting settings[] = {{"CONSUL_HTTP_ADDR", address},
                                             {"CONSUL_TLS_SERVER_NAME", "agent"},
                                             {"CONSUL_CAPATH", directory},
                                             {NULL, NULL}};
    context_begin(&context, settings);
    context.server = server;
    control_run(context.loop, context_drop_http, &context);
    for (scarce.nth = 1; failed; scarce.nth++) {
        control_run(context.loop, make_http_without_memory, &scarce);
        failed = allocation_failed();
        allocation_fail(0);
        assert_int_equal(context.new_code, failed ? MESHX_ENOMEM : MESHX_OK);
    }
    assert_true(scarce.nth > 6);
    exchange_get(&last, &context, "/");
    assert_int_equal(last.failure.code, MESHX_EAGENT_TLS);
    context_finish(&context);
    agent_remove_directory(directory);
}

int main(void) {
#define WITH_SERVER(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        WITH_SERVER(any_status_is_an_answer),
        WITH_SERVER(a_request_is_sent_as_told),
        cmocka_unit_test(a_proxy_of_the_environment_is_not_used),
        cmocka_unit_test(namespace_and_partition_go_with_every_path),
        cmocka_unit_test(token_and_password_are_sent),
        cmocka_unit_test(a_rotated_token_is_used_at_once),
        cmocka_unit_test(a_unix_socket_is_spoken_to),
        WITH_SERVER(redirects_are_followed_within_the_agent),
        WITH_SERVER(bad_answers_are_failures),
        WITH_SERVER(a_silent_agent_meets_the_deadline),
        WITH_SERVER(a_deadline_makes_room_for_others),
        cmocka_unit_test(nobody_there_is_a_failure),
        WITH_SERVER(many_requests_share_two_connections),
        WITH_SERVER(a_stale_connection_goes_unnoticed),
        WITH_SERVER(a_request_on_a_dying_connection_is_sent_again),
        WITH_SERVER(freeing_cancels_without_callbacks),
        WITH_SERVER(a_callback_may_send_and_free),
        WITH_SERVER(freeing_nothing_is_allowed),
        cmocka_unit_test(every_allocation_of_a_request_may_fail),
        cmocka_unit_test(every_allocation_of_a_new_http_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
