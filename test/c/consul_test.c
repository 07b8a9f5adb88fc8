/*
 * The typed calls against a real agent, and against a server of the test for what a real
 * one says too rarely.
 */
#include "agent.h"
#include "consul.h"
#include "control.h"
#include "web_server.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TIMEOUT = 30000 };

/* A consul at some agent or server. */
struct context {
    struct meshx_loop *loop;
    struct endpoint endpoint;
    struct consul *consul;
    uint32_t timeout;
    int new_code;
    struct consul_counts counts;
};

enum call { REGISTER, DEREGISTER, PASS, FAIL, SERVICE, INSTANCES, CONNECT, ALLOWED };

/* One call and what came of it. Written on the control thread until |done|. */
struct exchange {
    struct context *context;
    enum call call;
    const char *name;
    const char *other;
    bool free_in_callback;
    unsigned nth; /* allocation to fail */
    int code;
    bool returned;
    bool called_too_early;
    int calls;
    struct meshx_failure failure;
    bool found; /* SERVICE */
    char node[256];
    uint16_t port;
    size_t count; /* INSTANCES, CONNECT */
    bool passing; /* of the first */
    char service_id[256];
    char trouble[256];
    bool allowed;
    sem_t done;
};

/* ---- consul objects ---- */

static void make_consul(void *argument) {
    struct context *context = argument;
    context->new_code =
        consul_new(context->loop, &context->endpoint, context->timeout, &context->consul);
}

static void drop_consul(void *argument) {
    struct context *context = argument;
    consul_free(context->consul);
    context->consul = NULL;
}

static void read_counts(void *argument) {
    struct context *context = argument;
    context->counts = consul_counts(context->consul);
}

static void begin_at(struct context *context, const char *address, const char *token,
                     uint32_t timeout) {
    struct meshx_failure failure = {0};
    const struct meshx_setting settings[] = {
        {"CONSUL_HTTP_ADDR", address}, {"CONSUL_HTTP_TOKEN", token}, {NULL, NULL}};
    *context = (struct context){.timeout = timeout};
    if (endpoint_init(&context->endpoint, settings, &failure) != MESHX_OK) {
        fail_msg("%s", failure.text);
    }
    assert_int_equal(meshx_loop_start(&context->loop), MESHX_OK);
    control_run(context->loop, make_consul, context);
    assert_int_equal(context->new_code, MESHX_OK);
}

static void finish(struct context *context) {
    control_run(context->loop, drop_consul, context);
    meshx_loop_stop(context->loop, 0);
    endpoint_fini(&context->endpoint);
}

static struct web_server *begin_server(struct context *context) {
    struct web_server *server;
    char address[64];
    web_server_start(NULL, &server);
    snprintf(address, sizeof address, "127.0.0.1:%u", web_server_port(server));
    begin_at(context, address, NULL, TIMEOUT);
    return server;
}

/* Most tests share one agent. */
static struct agent *shared_agent;
static struct context shared;

static int setup_group(void **state) {
    (void)state;
    agent_start(&shared_agent);
    begin_at(&shared, agent_address(shared_agent), NULL, TIMEOUT);
    return 0;
}

static int teardown_group(void **state) {
    (void)state;
    finish(&shared);
    agent_stop(shared_agent);
    return 0;
}

/* ---- calls ---- */

static void end_call(struct exchange *exchange, const struct meshx_failure *failure) {
    exchange->called_too_early = !exchange->returned;
    exchange->calls++;
    if (failure != NULL) {
        exchange->failure = *failure;
    }
    if (exchange->free_in_callback) {
        drop_consul(exchange->context);
    }
    sem_post(&exchange->done);
}

static void copy(char *out, size_t size, const char *text) {
    snprintf(out, size, "%s", text != NULL ? text : "");
}

static void on_done(const struct meshx_failure *failure, void *argument) {
    end_call(argument, failure);
}

static void on_service(const struct meshx_failure *failure,
                       const struct document_service *service, void *argument) {
    struct exchange *exchange = argument;
    if (service != NULL) {
        exchange->found = true;
        exchange->port = service->port;
        copy(exchange->node, sizeof exchange->node, service->node);
    }
    end_call(exchange, failure);
}

static void on_instances(const struct meshx_failure *failure,
                         const struct document_instances *instances, void *argument) {
    struct exchange *exchange = argument;
    if (instances != NULL) {
        exchange->count = instances->count;
    }
    if (exchange->count > 0) {
        const struct document_instance *first = &instances->items[0];
        exchange->passing = first->passing;
        copy(exchange->node, sizeof exchange->node, first->node);
        copy(exchange->service_id, sizeof exchange->service_id, first->service_id);
        copy(exchange->trouble, sizeof exchange->trouble, first->trouble);
    }
    end_call(exchange, failure);
}

static void on_allowed(const struct meshx_failure *failure, bool allowed,
                       void *argument) {
    struct exchange *exchange = argument;
    exchange->allowed = allowed;
    end_call(exchange, failure);
}

static void make_call(void *argument) {
    struct exchange *exchange = argument;
    struct consul *consul = exchange->context->consul;
    const char *name = exchange->name;
    const char *other = exchange->other;
    allocation_fail(exchange->nth);
    switch (exchange->call) {
    case REGISTER:
        exchange->code = consul_register(consul, name, on_done, exchange);
        break;
    case DEREGISTER:
        exchange->code = consul_deregister(consul, name, on_done, exchange);
        break;
    case PASS:
        exchange->code =
            consul_check(consul, name, CONSUL_PASS, other, on_done, exchange);
        break;
    case FAIL:
        exchange->code =
            consul_check(consul, name, CONSUL_FAIL, other, on_done, exchange);
        break;
    case SERVICE:
        exchange->code = consul_service(consul, name, on_service, exchange);
        break;
    case INSTANCES:
        exchange->code =
            consul_instances(consul, CONSUL_HEALTH_SERVICE, name, on_instances, exchange);
        break;
    case CONNECT:
        exchange->code =
            consul_instances(consul, CONSUL_HEALTH_CONNECT, name, on_instances, exchange);
        break;
    case ALLOWED:
        exchange->code = consul_allowed(consul, name, other, on_allowed, exchange);
        break;
    }
    exchange->returned = true;
}

static void init_exchange(struct exchange *exchange, struct context *context,
                          enum call call, const char *name, const char *other) {
    *exchange =
        (struct exchange){.context = context, .call = call, .name = name, .other = other};
    sem_init(&exchange->done, 0, 0);
}

static void end_exchange(struct exchange *exchange) {
    control_wait(&exchange->done);
    assert_false(exchange->called_too_early);
    assert_int_equal(exchange->calls, 1);
}

static struct exchange run_call(struct context *context, enum call call, const char *name,
                                const char *other) {
    struct exchange exchange;
    init_exchange(&exchange, context, call, name, other);
    control_run(context->loop, make_call, &exchange);
    assert_int_equal(exchange.code, MESHX_OK);
    end_exchange(&exchange);
    return exchange;
}

/* As run_call(), for what must succeed. */
static struct exchange succeed(struct context *context, enum call call, const char *name,
                               const char *other) {
    struct exchange exchange = run_call(context, call, name, other);
    if (exchange.failure.code != MESHX_OK) {
        fail_msg("%s", exchange.failure.text);
    }
    return exchange;
}

static void assert_contains(const char *text, const char *part) {
    if (strstr(text, part) == NULL) {
        fail_msg("\"%s\" is not in: %s", part, text);
    }
}

/* Every failure names the agent; |text| is what else it must say. */
static void assert_fails(struct context *context, enum call call, const char *name,
                         const char *other, int code, const char *text) {
    struct exchange exchange = run_call(context, call, name, other);
    assert_contains(exchange.failure.text, text);
    assert_contains(exchange.failure.text, context->endpoint.shown);
    assert_int_equal(exchange.failure.code, code);
    assert_false(exchange.found);
    assert_false(exchange.allowed);
    assert_int_equal(exchange.count, 0);
}

/* Asks until the first instance is |passing|: the agent tells the catalog a little later,
 * without anything to wait for. Gives up in the end. */
static struct exchange wait_passing(struct context *context, enum call call,
                                    const char *name, bool passing) {
    uint64_t deadline = loop_now() + TIMEOUT;
    for (;;) {
        struct exchange exchange = succeed(context, call, name, NULL);
        if (exchange.count == 1 && exchange.passing == passing) {
            return exchange;
        }
        if (loop_now() > deadline) {
            fail_msg("%s does not become %s", name, passing ? "passing" : "failing");
        }
    }
}

static char *registration(const char *name) {
    char *json = NULL;
    struct meshx_failure failure = {0};
    static char vm[256];
    static char sidecar[256];
    snprintf(vm, sizeof vm, "%s:vm", name);
    snprintf(sidecar, sizeof sidecar, "%s:sidecar", name);
    struct document_upstream upstream = {"another@host", "127.0.0.1", 20001};
    struct document_registration document = {.node = name,
                                             .service_id = name,
                                             .service_name = name,
                                             .listen_address = "127.0.0.1",
                                             .listen_port = 4711,
                                             .sidecar_port = 21900,
                                             .vm_check_id = vm,
                                             .sidecar_check_id = sidecar,
                                             .ttl = 600000,
                                             .deregister_after = 600000,
                                             .upstreams = &upstream,
                                             .upstream_count = 1};
    if (document_registration(&document, &json, &failure) != MESHX_OK) {
        fail_msg("%s", failure.text);
    }
    return json;
}

static void register_node(struct context *context, const char *name) {
    char *json = registration(name);
    succeed(context, REGISTER, json, NULL);
    free(json);
}

/* ---- against a real agent ---- */

static void a_service_lives_with_its_sidecar(void **state) {
    (void)state;
    assert_false(succeed(&shared, SERVICE, "life@host", NULL).found);
    register_node(&shared, "life@host");
    struct exchange service = succeed(&shared, SERVICE, "life@host", NULL);
    assert_true(service.found);
    assert_string_equal(service.node, "life@host");
    assert_int_equal(service.port, 4711);
    struct exchange sidecar = succeed(&shared, SERVICE, "life@host-sidecar-proxy", NULL);
    assert_true(sidecar.found);
    assert_int_equal(sidecar.port, 21900);

    succeed(&shared, DEREGISTER, "life@host", NULL);
    assert_false(succeed(&shared, SERVICE, "life@host", NULL).found);
    assert_false(succeed(&shared, SERVICE, "life@host-sidecar-proxy", NULL).found);
    succeed(&shared, DEREGISTER, "life@host", NULL); /* it is not there: fine */
}

/* The service's check and the sidecar's are each for their own instance. */
static void checks_decide_who_is_passing(void **state) {
    (void)state;
    register_node(&shared, "check@host");
    struct exchange instance = wait_passing(&shared, CONNECT, "check@host", false);
    assert_string_equal(instance.node, "check@host");
    assert_string_equal(instance.service_id, "check@host-sidecar-proxy");

    succeed(&shared, PASS, "check@host:vm", "the VM answers");
    instance = wait_passing(&shared, INSTANCES, "check@host", true);
    assert_string_equal(instance.service_id, "check@host");
    assert_string_equal(instance.trouble, "");
    succeed(&shared, PASS, "check@host:sidecar", NULL);
    wait_passing(&shared, CONNECT, "check@host", true);

    succeed(&shared, FAIL, "check@host:vm", "stopped & gone: 100%");
    instance = wait_passing(&shared, INSTANCES, "check@host", false);
    assert_string_equal(instance.trouble, "stopped & gone: 100%");
    succeed(&shared, FAIL, "check@host:sidecar", "no sidecar");
    instance = wait_passing(&shared, CONNECT, "check@host", false);
    assert_string_equal(instance.trouble, "no sidecar");
    succeed(&shared, DEREGISTER, "check@host", NULL);
}

static void what_is_unknown_is_told_apart(void **state) {
    (void)state;
    assert_fails(&shared, PASS, "nobody@host:vm", "x", MESHX_ENODE_UNKNOWN,
                 "reporting a pass of check nobody@host:vm");
    assert_fails(&shared, FAIL, "nobody@host:vm", "x", MESHX_ENODE_UNKNOWN,
                 "reporting a failure of check nobody@host:vm");
    assert_false(succeed(&shared, SERVICE, "nobody@host", NULL).found);
    assert_int_equal(succeed(&shared, INSTANCES, "nobody@host", NULL).count, 0);
    assert_int_equal(succeed(&shared, CONNECT, "nobody@host", NULL).count, 0);
}

/* 1.8 knows intentions by POST, 1.9 and later also by "exact" PUT. */
static void deny(const char *source, const char *destination) {
    char body[512];
    char path[512];
    snprintf(body, sizeof body,
             "{\"SourceName\":\"%s\",\"DestinationName\":\"%s\",\"Action\":\"deny\"}",
             source, destination);
    snprintf(path, sizeof path, "/v1/connect/intentions/exact?source=%s&destination=%s",
             source, destination);
    if (agent_request(shared_agent, "POST", "/v1/connect/intentions", body, NULL) !=
        200) {
        assert_int_equal(
            agent_request(shared_agent, "PUT", path, "{\"Action\":\"deny\"}", NULL), 200);
    }
}

static void intentions_decide_who_may_connect(void **state) {
    (void)state;
    assert_true(succeed(&shared, ALLOWED, "a@my.host", "b@my.host").allowed);
    deny("a@my.host", "b@my.host");
    assert_false(succeed(&shared, ALLOWED, "a@my.host", "b@my.host").allowed);
    assert_true(succeed(&shared, ALLOWED, "b@my.host", "a@my.host").allowed);
}

static void any_name_gets_to_the_agent_whole(void **state) {
    (void)state;
    static const char *const names[] = {"a@b.c",      "with space", "100%25 %41",
                                        "knoten@bär", "a?b=c&d#e",  "+~_-\"\\"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char check[256];
        char json[512];
        const char *escape = strchr(names[i], '"') != NULL ? "+~_-\\\"\\\\" : names[i];
        snprintf(json, sizeof json,
                 "{\"ID\":\"%s\",\"Name\":\"%s\",\"Port\":1,\"Meta\":{\"node\":\"%s\"},"
                 "\"Check\":{\"CheckID\":\"%s:vm\",\"TTL\":\"1h\"}}",
                 escape, escape, escape, escape);
        snprintf(check, sizeof check, "%s:vm", names[i]);
        succeed(&shared, REGISTER, json, NULL);
        struct exchange service = succeed(&shared, SERVICE, names[i], NULL);
        assert_true(service.found);
        assert_string_equal(service.node, names[i]);
        succeed(&shared, PASS, check, names[i]);
        assert_string_equal(wait_passing(&shared, INSTANCES, names[i], true).service_id,
                            names[i]);
        succeed(&shared, ALLOWED, names[i], names[i]);
        succeed(&shared, DEREGISTER, names[i], NULL);
        assert_false(succeed(&shared, SERVICE, names[i], NULL).found);
    }
}

static void a_refusal_has_the_agents_words(void **state) {
    (void)state;
    assert_fails(&shared, REGISTER, "{\"Bogus\":1}", NULL, MESHX_EAGENT_REFUSED,
                 "400 Request decode failed: json: unknown field \"Bogus\"");
    assert_fails(&shared, REGISTER, "{\"Name\":", NULL, MESHX_EAGENT_REFUSED,
                 "registering the service: ");
}

static void requests_and_failures_are_counted(void **state) {
    (void)state;
    control_run(shared.loop, read_counts, &shared);
    struct consul_counts before = shared.counts;
    succeed(&shared, SERVICE, "nobody@host", NULL);
    run_call(&shared, PASS, "nobody@host:vm", NULL);
    run_call(&shared, REGISTER, "{", NULL);
    control_run(shared.loop, read_counts, &shared);
    assert_int_equal(shared.counts.requests, before.requests + 3);
    assert_int_equal(shared.counts.failures, before.failures + 2);
}

static void without_rights_it_is_a_matter_of_acl(void **state) {
    (void)state;
    struct agent *agent;
    struct context anonymous;
    struct context unknown;
    struct context master;
    agent_start_with(
        &(struct agent_options){
            .config = "acl { enabled = true default_policy = \"deny\" tokens { master = "
                      "\"6a2b2e8c-0000-4000-8000-000000000000\" } }"},
        &agent);
    begin_at(&anonymous, agent_address(agent), NULL, TIMEOUT);
    begin_at(&unknown, agent_address(agent), "6a2b2e8c-0000-4000-8000-00000000ffff",
             TIMEOUT);
    begin_at(&master, agent_address(agent), "6a2b2e8c-0000-4000-8000-000000000000",
             TIMEOUT);
    char *json = registration("acl@host");
    assert_fails(&anonymous, REGISTER, json, NULL, MESHX_EAGENT_ACL, "Permission denied");
    assert_fails(&unknown, REGISTER, json, NULL, MESHX_EAGENT_ACL, "ACL not found");
    /* The token works only once the ACL system is up, which may be after the leader. */
    uint64_t deadline = loop_now() + TIMEOUT;
    while (run_call(&master, REGISTER, json, NULL).failure.code != MESHX_OK) {
        assert_true(loop_now() < deadline);
    }
    free(json);
    assert_fails(&anonymous, PASS, "acl@host:vm", NULL, MESHX_EAGENT_ACL,
                 "CONSUL_HTTP_TOKEN");
    assert_fails(&anonymous, DEREGISTER, "acl@host", NULL, MESHX_EAGENT_ACL, "403");
    assert_fails(&anonymous, SERVICE, "acl@host", NULL, MESHX_EAGENT_ACL, "403");
    assert_fails(&anonymous, ALLOWED, "a", "b", MESHX_EAGENT_ACL, "403");
    succeed(&master, PASS, "acl@host:vm", NULL);
    /* With ACLs, what is unknown has other words. */
    assert_fails(&master, PASS, "nobody@host:vm", NULL, MESHX_ENODE_UNKNOWN, "lost");
    succeed(&master, DEREGISTER, "nobody@host", NULL);
    succeed(&master, DEREGISTER, "acl@host", NULL);
    finish(&anonymous);
    finish(&unknown);
    finish(&master);
    agent_stop(agent);
}

static void an_agent_may_go_and_come_back(void **state) {
    (void)state;
    struct agent *agent;
    struct context context;
    struct context hasty;
    agent_start(&agent);
    begin_at(&context, agent_address(agent), NULL, TIMEOUT);
    begin_at(&hasty, agent_address(agent), NULL, 50);
    register_node(&context, "restart@host");
    succeed(&context, PASS, "restart@host:vm", NULL);

    agent_freeze(agent);
    assert_fails(&hasty, PASS, "restart@host:vm", NULL, MESHX_EAGENT_TIMEOUT, "50 ms");
    agent_thaw(agent);
    agent_kill(agent);
    assert_fails(&context, PASS, "restart@host:vm", NULL, MESHX_EAGENT_UNREACHABLE,
                 "reporting a pass of check restart@host:vm: ");
    assert_fails(&context, SERVICE, "restart@host", NULL, MESHX_EAGENT_UNREACHABLE,
                 "Connection refused");
    agent_restart(agent);
    assert_fails(&context, PASS, "restart@host:vm", NULL, MESHX_ENODE_UNKNOWN, "lost");
    register_node(&context, "restart@host");
    succeed(&context, PASS, "restart@host:vm", NULL);
    finish(&context);
    finish(&hasty);
    agent_stop(agent);
}

/* ---- against a server of the test ---- */

static void other_versions_say_it_otherwise(void **state) {
    (void)state;
    struct context context;
    struct web_server *server = begin_server(&context);
    web_server_set_answer(server, 404,
                          "Unknown check ID \"x\". Ensure that the check ID");
    assert_fails(&context, PASS, "x", NULL, MESHX_ENODE_UNKNOWN, "Unknown check ID");
    web_server_set_answer(server, 404, "Unknown service ID \"x\".");
    succeed(&context, DEREGISTER, "x", NULL);
    assert_false(succeed(&context, SERVICE, "x", NULL).found);
    assert_fails(&context, INSTANCES, "x", NULL, MESHX_EAGENT_REFUSED, "404");
    assert_fails(&context, REGISTER, "{}", NULL, MESHX_EAGENT_REFUSED, "404");

    web_server_set_answer(server, 500, "No cluster leader");
    for (int call = REGISTER; call <= ALLOWED; call++) {
        assert_fails(&context, (enum call)call, "x", "y", MESHX_EAGENT_NO_LEADER,
                     "500 No cluster leader");
    }
    web_server_set_answer(server, 500, "No known Consul servers"); /* before its join */
    assert_fails(&context, INSTANCES, "x", NULL, MESHX_EAGENT_NO_LEADER, "No known");
    web_server_set_answer(server, 500, "rpc error: failed to get conn: dial tcp");
    assert_fails(&context, ALLOWED, "a", "b", MESHX_EAGENT_NO_LEADER, "be reachable");
    web_server_set_answer(server, 500, "CheckID trouble of another kind");
    assert_fails(&context, PASS, "x", NULL, MESHX_EAGENT_REFUSED, "of another kind");
    web_server_set_answer(server, 429, "Your IP is issuing too many\r\nconnections");
    assert_fails(&context, PASS, "x", NULL, MESHX_EAGENT_BUSY, "429 Your IP");
    web_server_set_answer(server, 503, "");
    assert_fails(&context, ALLOWED, "a", "b", MESHX_EAGENT_BUSY,
                 "asking whether a may connect to b: Consul agent at");
    web_server_set_answer(server, 500, "a\x1B[31mb\tc\nd");
    assert_fails(&context, SERVICE, "x", NULL, MESHX_EAGENT_REFUSED, "a [31mb c");
    char longer[1000];
    memset(longer, 'x', sizeof longer);
    longer[sizeof longer - 1] = '\0';
    web_server_set_answer(server, 500, longer);
    assert_fails(&context, SERVICE, "x", NULL, MESHX_EAGENT_REFUSED, "xxxxxxxxxxxxxxx");
    finish(&context);
    web_server_stop(server);
}

static void a_malformed_document_is_a_failure(void **state) {
    (void)state;
    static const enum call calls[] = {SERVICE, INSTANCES, CONNECT, ALLOWED};
    static const char *const bodies[] = {
        "", "{", "<html>", "42", "{\"Allowed\":1}", "[{\"Node\":7}]", "{\"Port\":\"x\"}"};
    struct context context;
    struct web_server *server = begin_server(&context);
    for (size_t body = 0; body < sizeof bodies / sizeof bodies[0]; body++) {
        web_server_set_answer(server, 200, bodies[body]);
        for (size_t call = 0; call < sizeof calls / sizeof calls[0]; call++) {
            assert_fails(&context, calls[call], "name", "other", MESHX_EAGENT_ANSWER,
                         "asking ");
        }
    }
    finish(&context);
    web_server_stop(server);
}

static void freeing_cancels_without_callbacks(void **state) {
    (void)state;
    struct exchange exchanges[4];
    struct exchange last;
    struct context context;
    struct web_server *server = begin_server(&context);
    web_server_set_answer(server, 0, "");
    for (int i = 0; i < 3; i++) {
        init_exchange(&exchanges[i], &context, SERVICE, "x", NULL);
        control_run(context.loop, make_call, &exchanges[i]);
    }
    web_server_wait_requests(server, 2);
    control_run(context.loop, drop_consul, &context);

    /* From the callback of another call, which failed. */
    control_run(context.loop, make_consul, &context);
    init_exchange(&exchanges[3], &context, SERVICE, "x", NULL);
    control_run(context.loop, make_call, &exchanges[3]);
    web_server_wait_requests(server, 3);
    web_server_set_answer(server, 404, "");
    init_exchange(&last, &context, PASS, "x", NULL);
    last.free_in_callback = true;
    control_run(context.loop, make_call, &last);
    end_exchange(&last);
    finish(&context);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(exchanges[i].calls, 0);
    }
    web_server_stop(server);
}

/* ---- allocations ---- */

static void every_allocation_may_fail(void **state) {
    (void)state;
    static const struct {
        enum call call;
        const char *body;
        unsigned in_answer; /* at least so many fail after the call has returned */
    } cases[] = {
        {REGISTER, "", 0},
        {DEREGISTER, "", 0},
        {PASS, "", 0},
        {FAIL, "", 0},
        {SERVICE, "{\"ID\":\"x\",\"Address\":\"a\",\"Port\":1,\"Meta\":{\"node\":\"x\"}}",
         3},
        {INSTANCES,
         "[{\"Node\":{\"Node\":\"n\"},\"Service\":{\"ID\":\"x\",\"Meta\":{\"node\":\"x\"}"
         "},"
         "\"Checks\":[{\"Status\":\"critical\",\"Output\":\"o\"}]}]",
         5},
        {CONNECT, "[]", 0},
        {ALLOWED, "{\"Allowed\":true}", 1},
    };
    struct context context;
    struct web_server *server = begin_server(&context);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        unsigned in_call = 0;
        unsigned in_answer = 0;
        bool failed = true;
        web_server_set_answer(server, 200, cases[i].body);
        for (unsigned nth = 1; failed; nth++) {
            struct exchange exchange;
            init_exchange(&exchange, &context, cases[i].call, "name", "other");
            exchange.nth = nth;
            control_run(context.loop, make_call, &exchange);
            if (exchange.code == MESHX_OK) {
                end_exchange(&exchange);
            }
            failed = allocation_failed();
            allocation_fail(0);
            if (!failed) {
                assert_int_equal(exchange.failure.code, MESHX_OK);
            } else if (exchange.code == MESHX_OK) {
                assert_int_equal(exchange.failure.code, MESHX_ENOMEM);
                in_answer++;
            } else {
                assert_int_equal(exchange.code, MESHX_ENOMEM);
                assert_int_equal(exchange.calls, 0);
                in_call++;
            }
        }
        assert_true(in_call >= 4);
        assert_true(in_answer >= cases[i].in_answer);
    }
    finish(&context);
    web_server_stop(server);
}

struct scarce {
    struct context *context;
    unsigned nth;
};

static void make_consul_without_memory(void *argument) {
    struct scarce *scarce = argument;
    allocation_fail(scarce->nth);
    make_consul(scarce->context);
}

static void every_allocation_of_a_new_consul_may_fail(void **state) {
    (void)state;
    struct context context;
    struct scarce scarce = {.context = &context};
    bool failed = true;
    begin_at(&context, "127.0.0.1:1", NULL, TIMEOUT);
    control_run(context.loop, drop_consul, &context);
    for (scarce.nth = 1; failed; scarce.nth++) {
        control_run(context.loop, make_consul_without_memory, &scarce);
        failed = allocation_failed();
        allocation_fail(0);
        assert_int_equal(context.new_code, failed ? MESHX_ENOMEM : MESHX_OK);
    }
    assert_true(scarce.nth > 3);
    finish(&context);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_service_lives_with_its_sidecar),
        cmocka_unit_test(checks_decide_who_is_passing),
        cmocka_unit_test(what_is_unknown_is_told_apart),
        cmocka_unit_test(intentions_decide_who_may_connect),
        cmocka_unit_test(any_name_gets_to_the_agent_whole),
        cmocka_unit_test(a_refusal_has_the_agents_words),
        cmocka_unit_test(requests_and_failures_are_counted),
        cmocka_unit_test(without_rights_it_is_a_matter_of_acl),
        cmocka_unit_test(an_agent_may_go_and_come_back),
        cmocka_unit_test(other_versions_say_it_otherwise),
        cmocka_unit_test(a_malformed_document_is_a_failure),
        cmocka_unit_test(freeing_cancels_without_callbacks),
        cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(every_allocation_of_a_new_consul_may_fail),
    };
    return cmocka_run_group_tests(tests, setup_group, teardown_group);
}
