/*
 * HTTP against a server of the test that answers as badly as asked for (web_server.h),
 * and TLS against a real agent.
 */
#include "agent.h"
#include "control.h"
#include "http.h"
#include "web_server.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LONG = 60000, MAX_EXCHANGES = 64 };

struct context {
    struct meshx_loop *loop;
    struct web_server *server;
    struct endpoint endpoint;
    struct http *http;
    int new_code;
};

/* One request and what came of it. Written on the control thread until |done|. */
struct exchange {
    struct context *context;
    struct http_request request;
    bool free_http_in_callback;
    struct exchange *then; /* sent from the callback */
    int code;
    bool sent;
    bool called_too_early;
    int calls;
    struct meshx_failure failure; /* MESHX_OK: there is an answer */
    long status;
    size_t size;
    char body[4096];
    sem_t done;
};

/* ---- with and without a server ---- */

static void make_http(void *argument) {
    struct context *context = argument;
    context->new_code = http_new(context->loop, &context->endpoint, &context->http);
}

static void drop_http(void *argument) {
    struct context *context = argument;
    http_free(context->http);
    context->http = NULL;
}

/* |settings| as in endpoint_init(). */
static void begin_with(struct context *context, const struct meshx_setting *settings) {
    struct meshx_failure failure = {0};
    *context = (struct context){0};
    if (endpoint_init(&context->endpoint, settings, &failure) != MESHX_OK) {
        fail_msg("%s", failure.text);
    }
    assert_int_equal(meshx_loop_start(&context->loop), MESHX_OK);
    control_run(context->loop, make_http, context);
    assert_int_equal(context->new_code, MESHX_OK);
}

static void finish(struct context *context) {
    control_run(context->loop, drop_http, context);
    meshx_loop_stop(context->loop, 0);
    endpoint_fini(&context->endpoint);
    if (context->server != NULL) {
        web_server_stop(context->server);
    }
}

/* |more| is one setting beside the address. */
static void begin_server(struct context *context, const char *name, const char *value) {
    struct web_server *server;
    char address[64];
    web_server_start(NULL, &server);
    snprintf(address, sizeof address, "127.0.0.1:%u", web_server_port(server));
    const struct meshx_setting settings[] = {
        {"CONSUL_HTTP_ADDR", address}, {name, value}, {NULL, NULL}};
    begin_with(context, settings);
    context->server = server;
}

static int setup(void **state) {
    static struct context context;
    begin_server(&context, NULL, NULL);
    *state = &context;
    return 0;
}

static int teardown(void **state) {
    finish(*state);
    return 0;
}

/* ---- requests ---- */

static void send_exchange(void *argument);

static void on_done(const struct meshx_failure *failure, const struct http_answer *answer,
                    void *argument) {
    struct exchange *exchange = argument;
    exchange->called_too_early = !exchange->sent;
    exchange->calls++;
    if (failure != NULL) {
        exchange->failure = *failure;
    } else {
        exchange->status = answer->status;
        exchange->size = answer->size;
        if (answer->size < sizeof exchange->body && answer->body[answer->size] == '\0') {
            memcpy(exchange->body, answer->body, answer->size + 1);
        }
    }
    if ((failure == NULL) == (answer == NULL)) {
        exchange->calls = -1;
    }
    if (exchange->then != NULL) {
        send_exchange(exchange->then);
    }
    if (exchange->free_http_in_callback) {
        drop_http(exchange->context);
    }
    sem_post(&exchange->done);
}

static void send_exchange(void *argument) {
    struct exchange *exchange = argument;
    exchange->code =
        http_send(exchange->context->http, &exchange->request, on_done, exchange);
    exchange->sent = true;
}

static void init_exchange(struct exchange *exchange, struct context *context,
                          const char *path, uint32_t timeout) {
    *exchange =
        (struct exchange){.context = context, .request = {"GET", path, NULL, timeout}};
    sem_init(&exchange->done, 0, 0);
}

static void begin_exchange(struct exchange *exchange, struct context *context,
                           const char *path, uint32_t timeout) {
    init_exchange(exchange, context, path, timeout);
    control_run(context->loop, send_exchange, exchange);
    assert_int_equal(exchange->code, MESHX_OK);
}

static void end_exchange(struct exchange *exchange) {
    control_wait(&exchange->done);
    assert_false(exchange->called_too_early);
    assert_int_equal(exchange->calls, 1);
}

static void run_request(struct exchange *exchange, struct context *context,
                        const struct http_request *request) {
    init_exchange(exchange, context, NULL, 0);
    exchange->request = *request;
    control_run(context->loop, send_exchange, exchange);
    assert_int_equal(exchange->code, MESHX_OK);
    end_exchange(exchange);
}

static void get(struct exchange *exchange, struct context *context, const char *path) {
    run_request(exchange, context, &(struct http_request){"GET", path, NULL, LONG});
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

static void assert_contains(const char *text, const char *part) {
    if (strstr(text, part) == NULL) {
        fail_msg("\"%s\" is not in: %s", part, text);
    }
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
    get(&exchange, *state, "/hello");
    assert_answer(&exchange, 200, "hello");
    get(&exchange, *state, "/status/404");
    assert_answer(&exchange, 404, "404");
    get(&exchange, *state, "/status/503");
    assert_answer(&exchange, 503, "503");
    get(&exchange, *state, "/chunked");
    assert_answer(&exchange, 200, "hello");
}

static void a_request_is_sent_as_told(void **state) {
    struct exchange exchange;
    get(&exchange, *state, "/echo?a=%20b");
    assert_int_equal(exchange.status, 200);
    assert_contains(exchange.body, "GET /echo?a=%20b HTTP/1.1\r\n");
    assert_lacks(exchange.body, "X-Consul-Token");
    assert_lacks(exchange.body, "Authorization");

    char body[3000];
    memset(body, 'x', sizeof body);
    body[sizeof body - 1] = '\0';
    run_request(&exchange, *state, &(struct http_request){"PUT", "/echo", body, LONG});
    assert_contains(exchange.body, "PUT /echo HTTP/1.1\r\n");
    assert_contains(exchange.body, "Content-Type: application/json\r\n");
    assert_contains(exchange.body, "Content-Length: 2999\r\n");
    assert_contains(exchange.body, body);
    assert_lacks(exchange.body, "Expect");

    run_request(&exchange, *state, &(struct http_request){"PUT", "/echo", NULL, LONG});
    assert_contains(exchange.body, "PUT /echo HTTP/1.1\r\n");
    assert_contains(exchange.body, "Content-Length: 0\r\n");

    run_request(&exchange, *state, &(struct http_request){"DELETE", "/echo", NULL, LONG});
    assert_contains(exchange.body, "DELETE /echo HTTP/1.1\r\n");
}

/* begin_with() frees nothing of the environment's proxy, it must just not be used. */
static void a_proxy_of_the_environment_is_not_used(void **state) {
    (void)state;
    char proxy[64];
    struct context context;
    struct exchange exchange;
    snprintf(proxy, sizeof proxy, "http://127.0.0.1:%u", agent_free_port());
    setenv("http_proxy", proxy, 1);
    setenv("all_proxy", proxy, 1);
    begin_server(&context, NULL, NULL);
    get(&exchange, &context, "/hello");
    finish(&context);
    unsetenv("http_proxy");
    unsetenv("all_proxy");
    assert_answer(&exchange, 200, "hello");
}

static void namespace_and_partition_go_with_every_path(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    begin_server(&context, "CONSUL_NAMESPACE", "a b");
    get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "GET /echo?ns=a%20b HTTP/1.1\r\n");
    get(&exchange, &context, "/echo?note=x");
    assert_contains(exchange.body, "GET /echo?note=x&ns=a%20b HTTP/1.1\r\n");
    finish(&context);
}

static void token_and_password_are_sent(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    begin_server(&context, "CONSUL_HTTP_TOKEN", "secret");
    get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "X-Consul-Token: secret\r\n");
    finish(&context);

    begin_server(&context, "CONSUL_HTTP_AUTH", "user:pass");
    get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "Authorization: Basic dXNlcjpwYXNz\r\n");
    run_request(&exchange, &context, &(struct http_request){"PUT", "/echo", "{}", LONG});
    assert_contains(exchange.body, "Authorization: Basic dXNlcjpwYXNz\r\n");
    finish(&context);
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
    get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "X-Consul-Token: first\r\n");
    write_file(path, "second\n");
    get(&exchange, &context, "/echo");
    assert_contains(exchange.body, "X-Consul-Token: second\r\n");

    assert_int_equal(unlink(path), 0);
    get(&exchange, &context, "/echo");
    assert_int_equal(exchange.failure.code, MESHX_ECONFIG);
    assert_contains(exchange.failure.text, path);
    assert_int_equal(web_server_requests(context.server), 2);
    finish(&context);
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
    begin_with(&context, settings);
    get(&exchange, &context, "/hello");
    assert_answer(&exchange, 200, "hello");
    web_server_stop(server);
    unlink(path);
    get(&exchange, &context, "/hello");
    assert_failure(&exchange, MESHX_EAGENT_UNREACHABLE, "No such file or directory");
    finish(&context);
    agent_remove_directory(directory);
}

static void redirects_are_followed_within_the_agent(void **state) {
    struct context *context = *state;
    struct exchange exchange;
    struct web_server *other;
    get(&exchange, context, "/redirect");
    assert_answer(&exchange, 200, "hello");

    int before = web_server_requests(context->server);
    get(&exchange, context, "/redirect-loop");
    assert_answer(&exchange, 301, "moved");
    assert_int_equal(web_server_requests(context->server), before + 4);

    run_request(&exchange, context,
                &(struct http_request){"PUT", "/redirect", "{}", LONG});
    assert_answer(&exchange, 301, "moved");

    web_server_start(NULL, &other);
    web_server_lead_away(context->server, web_server_port(other));
    get(&exchange, context, "/redirect-away");
    assert_answer(&exchange, 301, "moved");
    assert_int_equal(web_server_requests(other), 0);
    web_server_stop(other);
}

/* ---- bad answers ---- */

static void bad_answers_are_failures(void **state) {
    struct exchange exchange;
    get(&exchange, *state, "/garbage");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "is not HTTP");
    get(&exchange, *state, "/bad-chunk");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "is not HTTP");
    get(&exchange, *state, "/huge");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "larger than 16 MiB");
    get(&exchange, *state, "/endless");
    assert_failure(&exchange, MESHX_EAGENT_ANSWER, "larger than 16 MiB");
    get(&exchange, *state, "/nothing");
    assert_failure(&exchange, MESHX_EAGENT_UNREACHABLE, "broke the connection");
    get(&exchange, *state, "/cut");
    assert_failure(&exchange, MESHX_EAGENT_UNREACHABLE, "broke the connection");
    get(&exchange, *state, "/hello");
    assert_answer(&exchange, 200, "hello");
}

static void a_silent_agent_meets_the_deadline(void **state) {
    struct context *context = *state;
    struct exchange silent[3];
    struct exchange hello;
    /* The third waits for a connection all its time. */
    for (int i = 0; i < 3; i++) {
        begin_exchange(&silent[i], context, "/silent", 30);
    }
    for (int i = 0; i < 3; i++) {
        end_exchange(&silent[i]);
        assert_failure(&silent[i], MESHX_EAGENT_TIMEOUT, "within 30 ms");
    }
    get(&hello, context, "/hello");
    assert_answer(&hello, 200, "hello");
}

/* A waiting request goes out when a deadline sets a connection free. */
static void a_deadline_makes_room_for_others(void **state) {
    struct exchange silent[2];
    struct exchange hello;
    begin_exchange(&silent[0], *state, "/silent", 30);
    begin_exchange(&silent[1], *state, "/silent", 30);
    get(&hello, *state, "/hello");
    assert_answer(&hello, 200, "hello");
    end_exchange(&silent[0]);
    end_exchange(&silent[1]);
}

static void nobody_there_is_a_failure(void **state) {
    (void)state;
    struct context context;
    struct exchange exchange;
    char address[64];
    snprintf(address, sizeof address, "localhost:%u", agent_free_port());
    const struct meshx_setting settings[] = {{"CONSUL_HTTP_ADDR", address}, {NULL, NULL}};
    begin_with(&context, settings);
    get(&exchange, &context, "/hello");
    assert_failure(&exchange, MESHX_EAGENT_UNREACHABLE, "Connection refused");
    assert_contains(exchange.failure.text, "CONSUL_HTTP_ADDR");
    finish(&context);
}

/* ---- TLS, with a real agent ---- */

/* A certificate authority, an agent's certificate and a client's, made by consul. */
static char *make_certificates(void) {
    char command[1024];
    char *directory = agent_make_directory();
    snprintf(command, sizeof command,
             "cd '%s' && mkdir authorities nothing && for what in 'ca create' 'cert "
             "create -server' "
             "'cert create -client'; do '%s' tls $what >log 2>&1 || exit 1; done && "
             "cp consul-agent-ca.pem authorities/",
             directory, agent_binary());
    assert_int_equal(system(command), 0); // NOLINT(cert-env33-c)
    return directory;
}

/* What a request with these settings comes to. */
static struct exchange try_tls(const char *address, const struct meshx_setting *more) {
    struct context context;
    struct exchange exchange;
    struct meshx_setting settings[8] = {{"CONSUL_HTTP_ADDR", address}};
    for (int i = 0; more[i].name != NULL; i++) {
        settings[i + 1] = more[i];
    }
    begin_with(&context, settings);
    get(&exchange, &context, "/v1/status/leader");
    if (exchange.failure.code != MESHX_OK) {
        assert_contains(exchange.failure.text, address);
    }
    finish(&context);
    return exchange;
}

static void assert_tls_works(const char *address, const struct meshx_setting *more) {
    struct exchange exchange = try_tls(address, more);
    if (exchange.failure.code != MESHX_OK) {
        fail_msg("%s", exchange.failure.text);
    }
    assert_int_equal(exchange.status, 200);
}

static void assert_tls_fails(const char *address, const struct meshx_setting *more) {
    struct exchange exchange = try_tls(address, more);
    assert_contains(exchange.failure.text, "TLS failed");
    assert_int_equal(exchange.failure.code, MESHX_EAGENT_TLS);
}

static void start_tls_agent(const char *directory, bool clients_too, char *address,
                            size_t size, struct agent **out) {
    char config[1024];
    uint16_t port = agent_free_port();
    snprintf(config, sizeof config,
             "ports { https = %u } verify_incoming_https = %s "
             "ca_file = \"%s/consul-agent-ca.pem\" "
             "cert_file = \"%s/dc1-server-consul-0.pem\" "
             "key_file = \"%s/dc1-server-consul-0-key.pem\"",
             port, clients_too ? "true" : "false", directory, directory, directory);
    snprintf(address, size, "127.0.0.1:%u", port);
    agent_start_with(&(struct agent_options){.config = config}, out);
}

#define SETTINGS(...)                                                                    \
    (const struct meshx_setting[]) {                                                     \
        __VA_ARGS__, {                                                                   \
            NULL, NULL                                                                   \
        }                                                                                \
    }

static void tls_verifies_the_agent(void **state) {
    (void)state;
    char address[64];
    char ca_file[256];
    char ca_path[256];
    char nothing[256];
    char https[80];
    struct agent *agent;
    char *directory = make_certificates();
    start_tls_agent(directory, false, address, sizeof address, &agent);
    snprintf(ca_file, sizeof ca_file, "%s/consul-agent-ca.pem", directory);
    snprintf(ca_path, sizeof ca_path, "%s/authorities", directory);
    snprintf(nothing, sizeof nothing, "%s/nothing", directory);
    snprintf(https, sizeof https, "https://%s", address);
    const struct meshx_setting ssl = {"CONSUL_HTTP_SSL", "true"};
    const struct meshx_setting ca = {"CONSUL_CACERT", ca_file};

    assert_tls_works(address, SETTINGS(ssl, ca));
    assert_tls_works(https, SETTINGS(ca));
    assert_tls_works(https, SETTINGS({"CONSUL_CAPATH", ca_path}));
    assert_tls_works(https,
                     SETTINGS(ca, {"CONSUL_TLS_SERVER_NAME", "server.dc1.consul"}));
    assert_tls_works(https, SETTINGS({"CONSUL_HTTP_SSL_VERIFY", "false"}));

    assert_tls_fails(https, SETTINGS(ssl)); /* no authority that knows it */
    assert_tls_fails(https, SETTINGS(ca, {"CONSUL_TLS_SERVER_NAME", "other.dc1.consul"}));
    assert_tls_fails(https, SETTINGS({"CONSUL_CACERT", "/etc/hostname"}));
    assert_tls_fails(https, SETTINGS({"CONSUL_CAPATH", nothing}));

    /* The wrong kind of port, both ways. */
    assert_tls_fails(agent_address(agent), SETTINGS(ssl, ca));
    struct exchange plain = try_tls(address, SETTINGS(ca));
    assert_int_equal(plain.status, 400);
    assert_contains(plain.body, "HTTP request to an HTTPS server");
    agent_stop(agent);
    agent_remove_directory(directory);
}

static void tls_shows_a_certificate_of_its_own(void **state) {
    (void)state;
    char address[64];
    char ca_file[256];
    char cert[256];
    char key[256];
    struct agent *agent;
    char *directory = make_certificates();
    start_tls_agent(directory, true, address, sizeof address, &agent);
    snprintf(ca_file, sizeof ca_file, "%s/consul-agent-ca.pem", directory);
    snprintf(cert, sizeof cert, "%s/dc1-client-consul-0.pem", directory);
    snprintf(key, sizeof key, "%s/dc1-client-consul-0-key.pem", directory);
    const struct meshx_setting ssl = {"CONSUL_HTTP_SSL", "1"};
    const struct meshx_setting ca = {"CONSUL_CACERT", ca_file};

    assert_tls_works(address, SETTINGS(ssl, ca, {"CONSUL_CLIENT_CERT", cert},
                                       {"CONSUL_CLIENT_KEY", key}));
    assert_tls_fails(address, SETTINGS(ssl, ca)); /* the agent wants one */
    assert_tls_fails(address, SETTINGS(ssl, ca, {"CONSUL_CLIENT_CERT", ca_file},
                                       {"CONSUL_CLIENT_KEY", key})); /* no pair */
    agent_stop(agent);
    agent_remove_directory(directory);
}

/* ---- connections ---- */

static void many_requests_share_two_connections(void **state) {
    static struct exchange exchanges[MAX_EXCHANGES];
    struct context *context = *state;
    for (int i = 0; i < MAX_EXCHANGES; i++) {
        begin_exchange(&exchanges[i], context, i < 2 ? "/gate" : "/hello", LONG);
    }
    web_server_wait_requests(context->server, 2);
    web_server_open_gate(context->server);
    for (int i = 0; i < MAX_EXCHANGES; i++) {
        end_exchange(&exchanges[i]);
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
        get(&exchange, context, "/hello-and-close");
        assert_answer(&exchange, 200, "hello");
        run_request(&exchange, context,
                    &(struct http_request){"PUT", "/hello-and-close", "{}", LONG});
        assert_answer(&exchange, 200, "hello");
    }
    assert_int_equal(web_server_requests(context->server), 40);
}

/* The same, but the request was on its way when the connection was closed. */
static void a_request_on_a_dying_connection_is_sent_again(void **state) {
    struct context *context = *state;
    struct exchange exchange;
    get(&exchange, context, "/hello");
    assert_answer(&exchange, 200, "hello");
    get(&exchange, context, "/fresh");
    assert_answer(&exchange, 200, "hello");
    run_request(&exchange, context,
                &(struct http_request){"PUT", "/fresh", "{\"a\":1}", LONG});
    assert_answer(&exchange, 200, "hello");
    run_request(&exchange, context, &(struct http_request){"PUT", "/fresh", NULL, LONG});
    assert_answer(&exchange, 200, "hello");
    assert_int_equal(web_server_connections(context->server), 4);
    assert_int_equal(web_server_requests(context->server), 7); /* three twice */
}

/* ---- freeing ---- */

static void freeing_cancels_without_callbacks(void **state) {
    struct context *context = *state;
    struct exchange exchanges[4];
    for (int i = 0; i < 4; i++) {
        begin_exchange(&exchanges[i], context, "/gate", LONG);
    }
    web_server_wait_requests(context->server, 2);
    control_run(context->loop, drop_http, context);
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
    init_exchange(&first, context, "/hello", LONG);
    init_exchange(&second, context, "/hello", LONG);
    first.then = &second;
    second.free_http_in_callback = true;
    begin_exchange(&never[0], context, "/gate", LONG);
    control_run(context->loop, send_exchange, &first);
    end_exchange(&first);
    end_exchange(&second);
    assert_answer(&second, 200, "hello");
    assert_null(context->http);

    /* Also when it was a failure that came by the timer. */
    control_run(context->loop, make_http, context);
    begin_exchange(&never[1], context, "/gate", LONG);
    init_exchange(&first, context, "/silent", 10);
    first.free_http_in_callback = true;
    control_run(context->loop, send_exchange, &first);
    end_exchange(&first);
    assert_int_equal(first.failure.code, MESHX_EAGENT_TIMEOUT);
    meshx_loop_stop(context->loop, 0);
    assert_int_equal(never[0].calls, 0);
    assert_int_equal(never[1].calls, 0);
    assert_int_equal(meshx_loop_start(&context->loop), MESHX_OK); /* for teardown */
}

static void freeing_nothing_is_allowed(void **state) {
    struct context *context = *state;
    control_run(context->loop, drop_http, context);
    control_run(context->loop, drop_http, context);
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
    context->new_code = http_new(context->loop, &context->endpoint, &context->http);
}

static void send_without_memory(void *argument) {
    struct scarce *scarce = argument;
    allocation_fail(scarce->nth);
    send_exchange(&scarce->exchange);
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
        init_exchange(&scarce.exchange, &context, "/hello-and-close", LONG);
        control_run(context.loop, send_without_memory, &scarce);
        if (scarce.exchange.code == MESHX_OK) {
            end_exchange(&scarce.exchange);
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
    get(&last, &context, "/hello");
    assert_answer(&last, 200, "hello");
    finish(&context);
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
    begin_with(&context, settings);
    context.server = server;
    control_run(context.loop, drop_http, &context);
    for (scarce.nth = 1; failed; scarce.nth++) {
        control_run(context.loop, make_http_without_memory, &scarce);
        failed = allocation_failed();
        allocation_fail(0);
        assert_int_equal(context.new_code, failed ? MESHX_ENOMEM : MESHX_OK);
    }
    assert_true(scarce.nth > 6);
    get(&last, &context, "/");
    assert_int_equal(last.failure.code, MESHX_EAGENT_TLS);
    finish(&context);
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
        cmocka_unit_test(tls_verifies_the_agent),
        cmocka_unit_test(tls_shows_a_certificate_of_its_own),
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
