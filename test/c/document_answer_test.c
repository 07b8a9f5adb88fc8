/*
 * What we read from Consul: instances, services and permissions, as a real agent (1.8.7)
 * gives them, cut and bent in every way.
 */
#include "support.h"
#include "document.h"
#include "error.h"

#include <stdlib.h>
#include <string.h>

/* The body is parsed out of a block of just its size: AddressSanitizer sees more. */
static int parse(int (*parser)(const char *, size_t, void *, struct meshx_failure *),
                 const char *body, size_t size, void *out,
                 struct meshx_failure *failure) {
    char *exact = malloc(size == 0 ? 1 : size);
    assert_non_null(exact);
    memcpy(exact, body, size);
    int result = parser(exact, size, out, failure);
    free(exact);
    return result;
}

static int instances_parser(const char *body, size_t size, void *out,
                            struct meshx_failure *failure) {
    return document_parse_instances(body, size, out, failure);
}

static int service_parser(const char *body, size_t size, void *out,
                          struct meshx_failure *failure) {
    return document_parse_service(body, size, out, failure);
}

static int allowed_parser(const char *body, size_t size, void *out,
                          struct meshx_failure *failure) {
    return document_parse_allowed(body, size, out, failure);
}

static const char real_instances[] =
    "[{\"Node\":{\"ID\":\"36f3e8d3-9f2c-9d83-a7ea-04b0bbd7e2a9\",\"Node\":\"host-a\","
    "\"Address\":\"127.0.0.1\",\"Datacenter\":\"dc1\",\"TaggedAddresses\":{\"lan\":"
    "\"127.0.0.1\"},\"Meta\":{\"consul-network-segment\":\"\"},\"CreateIndex\":11,"
    "\"ModifyIndex\":12},\"Service\":{\"ID\":\"node1@a-sidecar-proxy\",\"Service\":"
    "\"name1-sidecar-proxy\",\"Tags\":[],\"Address\":\"\",\"Meta\":{\"node\":\"node1@a\"}"
    ","
    "\"Port\":21500,\"Weights\":{\"Passing\":1,\"Warning\":1},\"EnableTagOverride\":"
    "false,"
    "\"Proxy\":{\"DestinationServiceName\":\"name1\",\"MeshGateway\":{},\"Expose\":{}},"
    "\"Connect\":{},\"CreateIndex\":14,\"ModifyIndex\":14},\"Checks\":[{\"Node\":"
    "\"host-a\",\"CheckID\":\"serfHealth\",\"Name\":\"Serf Health Status\",\"Status\":"
    "\"passing\",\"Notes\":\"\",\"Output\":\"Agent alive and reachable\",\"ServiceID\":"
    "\"\",\"Definition\":{}}]},"
    "{\"Node\":{\"Node\":\"host-b\"},\"Service\":{\"ID\":\"other\",\"Meta\":null},"
    "\"Checks\":[{\"Status\":\"passing\"},"
    "{\"Name\":\"Erlang VM\",\"Status\":\"critical\",\"Output\":\"TTL expired\"},"
    "{\"Name\":\"Connect sidecar\",\"Status\":\"critical\",\"Output\":\"second\"}]}]";

static void instances(void **state) {
    (void)state;
    struct document_instances found;
    struct meshx_failure failure = {0};
    assert_int_equal(parse(instances_parser, real_instances, sizeof real_instances - 1,
                           &found, &failure),
                     MESHX_OK);
    assert_int_equal(found.count, 2);
    assert_string_equal(found.items[0].node, "node1@a");
    assert_string_equal(found.items[0].service_id, "node1@a-sidecar-proxy");
    assert_string_equal(found.items[0].agent_node, "host-a");
    assert_string_equal(found.items[0].address, "127.0.0.1");
    assert_int_equal(found.items[0].port, 21500);
    assert_true(found.items[0].passing);
    assert_null(found.items[0].trouble);
    assert_null(found.items[1].node);
    assert_string_equal(found.items[1].service_id, "other");
    assert_string_equal(found.items[1].agent_node, "host-b");
    assert_null(found.items[1].address);
    assert_int_equal(found.items[1].port, 0);
    assert_false(found.items[1].passing);
    assert_string_equal(found.items[1].trouble, "TTL expired");
    document_instances_fini(&found);
    assert_null(found.items);
    assert_int_equal(found.count, 0);
    document_instances_fini(&found);
}

static void no_instances(void **state) {
    (void)state;
    struct document_instances found;
    memset(&found, 0x55, sizeof found);
    assert_int_equal(parse(instances_parser, "[]", 2, &found, NULL), MESHX_OK);
    assert_int_equal(found.count, 0);
    assert_null(found.items);
    document_instances_fini(&found);
}

#define INSTANCE(NODE, SERVICE, REST)                                                    \
    "[{\"Node\":{\"Node\":" NODE "},\"Service\":{\"ID\":\"i\"" SERVICE "}" REST "}]"

static void odd_instances(void **state) {
    (void)state;
    static const struct {
        const char *body;
        const char *node;
        const char *agent_node;
        const char *trouble;
    } cases[] = {
        {INSTANCE("\"h\"", "", ""), NULL, "h", NULL},
        {INSTANCE("\"h\"", ",\"Meta\":{}", ",\"Checks\":[]"), NULL, "h", NULL},
        {INSTANCE("\"h\"", ",\"Meta\":{\"node\":null}", ",\"Checks\":null"), NULL, "h",
         NULL},
        /* Keys are case-sensitive: this is someone else's. */
        {INSTANCE("\"h\"", ",\"Meta\":{\"Node\":\"x\"}", ""), NULL, "h", NULL},
        /* The last of duplicates, as in Go. */
        {INSTANCE("\"h\"", ",\"Meta\":{\"node\":\"x\",\"node\":\"y\"}", ""), "y", "h",
         NULL},
        {INSTANCE("\"h\"", ",\"Meta\":{\"node\":\"n\"}",
                  ",\"Checks\":[{\"Status\":\"warning\",\"Name\":\"c\"}]"),
         "n", "h", "check \"c\" is warning"},
        {INSTANCE("\"h\"", "", ",\"Checks\":[{\"Status\":\"x\",\"Output\":\"\"}]"), NULL,
         "h", "check \"\" is x"},
        {INSTANCE("\"h\"", "", ",\"Checks\":[{\"Status\":\"critical\",\"Output\":null}]"),
         NULL, "h", "check \"\" is critical"},
        /* A text with NUL doesn't become equal to another one. */
        {INSTANCE("\"h\\u0000\"", ",\"Meta\":{\"node\":\"n\\u0000x\\u0000\"}",
                  ",\"Checks\":[{\"Status\":\"critical\",\"Output\":\"\\u0000o\"}]"),
         "n x ", "h ", " o"},
        {INSTANCE("\"\\ud83d\\ude00\"", "", ""), NULL, "\xf0\x9f\x98\x80", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct document_instances found;
        struct meshx_failure failure = {0};
        if (parse(instances_parser, cases[i].body, strlen(cases[i].body), &found,
                  &failure) != MESHX_OK) {
            fail_msg("%zu: %s", i, failure.text);
        }
        assert_int_equal(found.count, 1);
        const struct document_instance *instance = &found.items[0];
        assert_int_equal(instance->node == NULL, cases[i].node == NULL);
        if (instance->node != NULL) {
            assert_string_equal(instance->node, cases[i].node);
        }
        assert_string_equal(instance->service_id, "i");
        assert_string_equal(instance->agent_node, cases[i].agent_node);
        assert_int_equal(instance->passing, cases[i].trouble == NULL);
        assert_int_equal(instance->trouble == NULL, cases[i].trouble == NULL);
        if (instance->trouble != NULL) {
            assert_string_equal(instance->trouble, cases[i].trouble);
        }
        document_instances_fini(&found);
    }
}

static void assert_answer_refused(int (*parser)(const char *, size_t, void *,
                                                struct meshx_failure *),
                                  const char *body, void *out, const char *says) {
    struct meshx_failure failure = {0};
    assert_int_equal(parse(parser, body, strlen(body), out, &failure),
                     MESHX_EAGENT_ANSWER);
    assert_int_equal(failure.code, MESHX_EAGENT_ANSWER);
    if (strstr(failure.text, says) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", failure.text, says);
    }
    assert_int_equal(parse(parser, body, strlen(body), out, NULL), MESHX_EAGENT_ANSWER);
}

static void wrong_instances(void **state) {
    (void)state;
    static const struct {
        const char *body;
        const char *says;
    } cases[] = {
        {"", "is not JSON: line 1, column 0"},
        {"No cluster leader", "is not JSON"},
        {"[", "is not JSON"},
        {"[] []", "is not JSON"},
        {"[\xff]", "is not JSON"},
        {"{}", "the list of instances should be an array, but is an object"},
        {"[1]", "each instance should be an object, but is an integer"},
        {"[{}]", "Node should be an object, but is missing"},
        {"[{\"Node\":null}]", "Node should be an object, but is null"},
        {"[{\"Node\":{}}]", "Service should be an object, but is missing"},
        {"[{\"Node\":{},\"Service\":{}}]", "Node should be a string, but is missing"},
        {"[{\"Node\":{\"Node\":\"h\"},\"Service\":{}}]",
         "ID should be a string, but is missing"},
        {"[{\"Node\":{\"Node\":\"h\"},\"Service\":{\"ID\":7}}]",
         "ID should be a string, but is an integer"},
        {INSTANCE("7", "", ""), "Node should be a string, but is an integer"},
        {INSTANCE("\"h\"", ",\"Meta\":[]", ""), "Meta should be an object"},
        {INSTANCE("\"h\"", ",\"Meta\":{\"node\":1}", ""), "node should be a string"},
        {INSTANCE("\"h\"", "", ",\"Checks\":{}"), "Checks should be an array"},
        {INSTANCE("\"h\"", "", ",\"Checks\":[0]"), "each of Checks should be an object"},
        {INSTANCE("\"h\"", "", ",\"Checks\":[{}]"), "Status should be a string"},
        {INSTANCE("\"h\"", "", ",\"Checks\":[{\"Status\":\"x\",\"Output\":1}]"),
         "Output should be a string"},
        {INSTANCE("\"h\"", "", ",\"Checks\":[{\"Status\":\"x\",\"Name\":false}]"),
         "Name should be a string, but is a boolean"},
        {"[{\"Node\":{\"Node\":\"h\"},\"Service\":{\"ID\":\"i\",\"Meta\":{\"node\":\"n\"}"
         "},"
         "\"Checks\":[{\"Status\":\"critical\"}]},true]",
         "each instance should be an object, but is a boolean"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct document_instances found;
        memset(&found, 0x55, sizeof found);
        assert_answer_refused(instances_parser, cases[i].body, &found, cases[i].says);
        assert_null(found.items);
        assert_int_equal(found.count, 0);
        document_instances_fini(&found);
    }
}

/* An answer that breaks off anywhere, or has any one byte replaced, is either understood
 * or refused. */
static void damaged_instances(void **state) {
    (void)state;
    const size_t size = sizeof real_instances - 1;
    struct document_instances found;
    for (size_t cut = 0; cut < size; cut++) {
        assert_int_equal(parse(instances_parser, real_instances, cut, &found, NULL),
                         MESHX_EAGENT_ANSWER);
    }
    char *body = malloc(size);
    assert_non_null(body);
    static const char bytes[] = {'\0', '"', '{', ']', ',', '\\', '1', '\xff'};
    for (size_t i = 0; i < size; i++) {
        for (size_t b = 0; b < sizeof bytes; b++) {
            memcpy(body, real_instances, size);
            body[i] = bytes[b];
            int result = parse(instances_parser, body, size, &found, NULL);
            assert_true(result == MESHX_OK || result == MESHX_EAGENT_ANSWER);
            document_instances_fini(&found);
        }
    }
    free(body);
}

static void services(void **state) {
    (void)state;
    static const char body[] =
        "{\"ID\":\"node1@a\",\"Service\":\"name1\",\"Tags\":[],\"Meta\":{\"node\":"
        "\"node1@a\"},\"Port\":4370,\"Address\":\"\",\"Weights\":{\"Passing\":1,"
        "\"Warning\":1},\"EnableTagOverride\":false,\"ContentHash\":\"e8ac1ddf8d78\"}";
    struct document_service service;
    memset(&service, 0x55, sizeof service);
    assert_int_equal(parse(service_parser, body, sizeof body - 1, &service, NULL),
                     MESHX_OK);
    assert_string_equal(service.node, "node1@a");
    assert_string_equal(service.address, "");
    assert_int_equal(service.port, 4370);
    document_service_fini(&service);
    assert_null(service.node);
    document_service_fini(&service);

    static const char sidecar[] =
        "{\"Address\":\"\",\"Port\":22000,\"Proxy\":{\"LocalServiceAddress\":\"::1\","
        "\"LocalServicePort\":4370}}";
    assert_int_equal(parse(service_parser, sidecar, sizeof sidecar - 1, &service, NULL),
                     MESHX_OK);
    assert_string_equal(service.local_address, "::1");
    assert_int_equal(service.local_port, 4370);
    document_service_fini(&service);

    static const char other[] = "{\"Address\":\"10.0.0.1\",\"Port\":65535}";
    assert_int_equal(parse(service_parser, other, sizeof other - 1, &service, NULL),
                     MESHX_OK);
    assert_null(service.node);
    assert_string_equal(service.address, "10.0.0.1");
    assert_int_equal(service.port, 65535);
    document_service_fini(&service);
}

static void wrong_services(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"unknown service ID: x", "is not JSON"},
        {"[]", "the service should be an object, but is an array"},
        {"{\"Port\":1}", "Address should be a string, but is missing"},
        {"{\"Address\":1,\"Port\":1}", "Address should be a string"},
        {"{\"Address\":\"\"}", "Port should be an integer, but is missing"},
        {"{\"Address\":\"\",\"Port\":\"1\"}", "Port should be an integer"},
        {"{\"Address\":\"\",\"Port\":1.5}", "Port should be an integer"},
        {"{\"Address\":\"\",\"Port\":-1}", "Port should be 0 to 65535"},
        {"{\"Address\":\"\",\"Port\":65536}", "Port should be 0 to 65535"},
        {"{\"Address\":\"\",\"Port\":1,\"Meta\":7}", "Meta should be an object"},
        {"{\"Address\":\"\",\"Port\":1,\"Proxy\":[]}", "Proxy should be an object"},
        {"{\"Address\":\"\",\"Port\":1,\"Proxy\":{\"LocalServicePort\":70000}}",
         "LocalServicePort should be 0 to 65535"},
        {"{\"Address\":\"\",\"Port\":1,\"Meta\":{\"node\":[]}}",
         "node should be a string, but is an array"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        static const struct document_service nothing;
        struct document_service service;
        memset(&service, 0x55, sizeof service);
        assert_answer_refused(service_parser, cases[i][0], &service, cases[i][1]);
        assert_memory_equal(&service, &nothing, sizeof service);
    }
}

static void allowed(void **state) {
    (void)state;
    bool answer = false;
    assert_int_equal(parse(allowed_parser, "{\"Allowed\":true}", 16, &answer, NULL),
                     MESHX_OK);
    assert_true(answer);
    assert_int_equal(parse(allowed_parser, "{\"Allowed\":false}", 17, &answer, NULL),
                     MESHX_OK);
    assert_false(answer);
    static const char *const cases[][2] = {
        {"", "is not JSON"},
        {"true", "is not JSON"},
        {"{}", "Allowed should be a boolean, but is missing"},
        {"[]", "Allowed should be a boolean, but is missing"},
        {"{\"Allowed\":null}", "but is null"},
        {"{\"Allowed\":1}", "but is an integer"},
        {"{\"allowed\":true}", "but is missing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_answer_refused(allowed_parser, cases[i][0], &answer, cases[i][1]);
    }
}

static int intentions_parser(const char *body, size_t size, void *out,
                             struct meshx_failure *failure) {
    return document_parse_intentions(body, size, out, failure);
}

static int checks_parser(const char *body, size_t size, void *out,
                         struct meshx_failure *failure) {
    return document_parse_checks(body, size, out, failure);
}

static const char real_intentions[] =
    "{\"a@h\":[{\"ID\":\"9036e901-2510-bac5-9f6d-c51d3662dba5\",\"Description\":\"\","
    "\"SourceNS\":"
    "\"default\",\"SourceName\":\"a@h\",\"DestinationNS\":\"default\","
    "\"DestinationName\":"
    "\"*\",\"SourceType\":\"consul\",\"Action\":\"deny\",\"Meta\":{},\"Precedence\":6},"
    "{\"SourceName\":\"*\",\"DestinationName\":\"b\",\"Permissions\":[]},"
    "{\"SourceName\":\"c\",\"DestinationName\":\"b\",\"SourcePeer\":\"west\"}]}";

static void intentions(void **state) {
    (void)state;
    struct document_intentions found = {0};
    assert_int_equal(parse(intentions_parser, real_intentions, sizeof real_intentions - 1,
                           &found, NULL),
                     MESHX_OK);
    assert_int_equal(found.count, 3);
    assert_string_equal(found.items[0].id, "9036e901-2510-bac5-9f6d-c51d3662dba5");
    assert_string_equal(found.items[0].source, "a@h");
    assert_string_equal(found.items[0].destination, "*");
    assert_string_equal(found.items[0].action, "deny");
    assert_int_equal(found.items[0].precedence, 6);
    assert_null(found.items[1].action);
    assert_null(found.items[1].id);
    assert_int_equal(found.items[1].precedence, 0);
    assert_false(found.items[0].foreign);
    assert_false(found.items[1].foreign);
    assert_true(found.items[2].foreign);
    document_intentions_fini(&found);
    assert_int_equal(parse(intentions_parser, "{\"a\":[]}", 8, &found, NULL), MESHX_OK);
    assert_int_equal(found.count, 0);
    assert_int_equal(parse(intentions_parser, "{\"a\":null}", 10, &found, NULL),
                     MESHX_OK);
    assert_int_equal(found.count, 0);
    static const char *const cases[][2] = {
        {"", "is not JSON"},
        {"{}", "the answer should be an object of one list"},
        {"[]", "the answer should be an object of one list"},
        {"{\"a\":[],\"b\":[]}", "the answer should be an object of one list"},
        {"{\"a\":1}", "the list of intentions should be an array"},
        {"{\"a\":[1]}", "each intention should be an object"},
        {"{\"a\":[{}]}", "SourceName should be a string"},
        {"{\"a\":[{\"SourceName\":\"a\"}]}", "DestinationName should be a string"},
        {"{\"a\":[{\"SourceName\":\"a\",\"DestinationName\":\"b\",\"Action\":1}]}",
         "Action should be a string"},
        {"{\"a\":[{\"SourceName\":\"a\",\"DestinationName\":\"b\",\"Precedence\":\"9\"}]"
         "}",
         "Precedence should be an integer"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_answer_refused(intentions_parser, cases[i][0], &found, cases[i][1]);
    }
}

static const char real_checks[] =
    "[{\"Node\":\"host-a\",\"CheckID\":\"serfHealth\",\"Name\":\"Serf Health Status\","
    "\"Status\":\"critical\",\"Notes\":\"\",\"Output\":\"Agent not live or unreachable\","
    "\"ServiceID\":\"\",\"ServiceName\":\"\",\"Definition\":{}},"
    "{\"Node\":\"host-b\",\"Name\":\"Erlang VM\",\"Status\":\"critical\","
    "\"ServiceID\":\"n@h\",\"ServiceName\":\"n\"}]";

static void checks(void **state) {
    (void)state;
    struct document_checks found = {0};
    assert_int_equal(
        parse(checks_parser, real_checks, sizeof real_checks - 1, &found, NULL),
        MESHX_OK);
    assert_int_equal(found.count, 2);
    assert_string_equal(found.items[0].agent_node, "host-a");
    assert_string_equal(found.items[0].service_id, "");
    assert_string_equal(found.items[0].trouble, "Agent not live or unreachable");
    assert_string_equal(found.items[1].service_id, "n@h");
    assert_string_equal(found.items[1].service_name, "n");
    assert_string_equal(found.items[1].trouble, "check \"Erlang VM\" is critical");
    document_checks_fini(&found);
    static const char *const cases[][2] = {
        {"{}", "the list of checks should be an array"},
        {"[[]]", "each check should be an object"},
        {"[{\"Status\":\"critical\"}]", "Node should be a string"},
        {"[{\"Node\":\"a\"}]", "Status should be a string"},
        {"[{\"Node\":\"a\",\"ServiceID\":1}]", "ServiceID should be a string"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_answer_refused(checks_parser, cases[i][0], &found, cases[i][1]);
    }
}

/* Only the core's own allocations fail: jansson's parser (2.14) crashes when some of its
 * own do. */
static void answers_without_memory(void **state) {
    (void)state;
    static const char service_body[] =
        "{\"Meta\":{\"node\":\"n\"},\"Port\":1,\"Address\":\"10.0.0.1\"}";
    static const char no_output[] = INSTANCE("\"h\"", ",\"Meta\":{\"node\":\"n\"}",
                                             ",\"Checks\":[{\"Status\":\"critical\"}]");
    struct document_instances found = {0};
    struct document_service service = {0};
    struct document_intentions listed = {0};
    struct document_checks critical = {0};
    const struct {
        int (*parser)(const char *, size_t, void *, struct meshx_failure *);
        const char *body;
        size_t size;
        void *out;
        unsigned allocations;
    } cases[] = {
        {instances_parser, real_instances, sizeof real_instances - 1, &found, 8},
        {instances_parser, no_output, sizeof no_output - 1, &found, 5},
        {service_parser, service_body, sizeof service_body - 1, &service, 2},
        {intentions_parser, real_intentions, sizeof real_intentions - 1, &listed, 9},
        {checks_parser, real_checks, sizeof real_checks - 1, &critical, 9},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        unsigned nth = 1;
        for (;; nth++) {
            struct meshx_failure failure = {0};
            allocation_fail(nth);
            int result =
                cases[i].parser(cases[i].body, cases[i].size, cases[i].out, &failure);
            bool failed = allocation_failed();
            allocation_fail(0);
            assert_int_equal(result, failure.code);
            assert_int_equal(result, failed ? MESHX_ENOMEM : MESHX_OK);
            if (!failed) {
                break;
            }
            assert_null(found.items);
            assert_int_equal(found.count, 0);
            assert_null(service.node);
            assert_null(service.address);
            assert_null(listed.items);
            assert_null(critical.items);
        }
        assert_int_equal(nth - 1, cases[i].allocations);
        document_instances_fini(&found);
        document_service_fini(&service);
        document_intentions_fini(&listed);
        document_checks_fini(&critical);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(instances),
        cmocka_unit_test(no_instances),
        cmocka_unit_test(odd_instances),
        cmocka_unit_test(wrong_instances),
        cmocka_unit_test(damaged_instances),
        cmocka_unit_test(services),
        cmocka_unit_test(wrong_services),
        cmocka_unit_test(allowed),
        cmocka_unit_test(intentions),
        cmocka_unit_test(checks),
        cmocka_unit_test(answers_without_memory),
    };
    return cmocka_run_group_tests_name("document_answer", tests, NULL, NULL);
}
