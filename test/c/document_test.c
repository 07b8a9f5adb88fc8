/*
 * Consul's documents. What we write is compared as text where order matters and as JSON
 * where a template is merged in; what we read comes from a real agent (1.8.7), cut and
 * bent in every way.
 */
#include "support.h"
#include "document.h"
#include "error.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct document_upstream two_upstreams[] = {
    {"node2@b", "127.0.0.1", 20001},
    {"node3@c", "127.0.0.1", 20002},
};

static struct document_registration base(void) {
    return (struct document_registration){
        .node = "node1@a",
        .service_id = "node1@a",
        .service_name = "name1",
        .listen_address = "127.0.0.1",
        .listen_port = 4370,
        .sidecar_port = 21500,
        .vm_check_id = "node1@a:vm",
        .sidecar_check_id = "node1@a:sidecar",
        .ttl = 15000,
        .deregister_after = 60000,
    };
}

#define CHECKS                                                                           \
    "{\"CheckID\":\"node1@a:vm\",\"Name\":\"Erlang VM\",\"TTL\":\"15000ms\","            \
    "\"Status\":\"critical\",\"DeregisterCriticalServiceAfter\":\"60000ms\"},"           \
    "{\"CheckID\":\"node1@a:sidecar\",\"Name\":\"Connect sidecar\","                     \
    "\"TTL\":\"15000ms\",\"Status\":\"critical\","                                       \
    "\"DeregisterCriticalServiceAfter\":\"60000ms\"}"
#define ALIAS "{\"Name\":\"Alias of the node service\",\"AliasService\":\"node1@a\"}"
#define UPSTREAMS                                                                        \
    "{\"DestinationName\":\"node2@b\",\"LocalBindAddress\":\"127.0.0.1\","               \
    "\"LocalBindPort\":20001},"                                                          \
    "{\"DestinationName\":\"node3@c\",\"LocalBindAddress\":\"127.0.0.1\","               \
    "\"LocalBindPort\":20002}"
/* The document with more in its objects and arrays; each begins with a comma. */
#define DOCUMENT(META, CHECK, SIDECAR, ALIAS2, PROXY, UPSTREAM, CONNECT, TOP)            \
    "{\"ID\":\"node1@a\",\"Name\":\"name1\",\"Port\":4370,"                              \
    "\"Meta\":{\"node\":\"node1@a\"" META "},\"Checks\":[" CHECKS CHECK "],"             \
    "\"Connect\":{\"SidecarService\":{\"Port\":21500,\"Checks\":[" ALIAS ALIAS2 "],"     \
    "\"Proxy\":{\"LocalServiceAddress\":\"127.0.0.1\",\"LocalServicePort\":4370,"        \
    "\"Upstreams\":[" UPSTREAM "]" PROXY "}" SIDECAR "}" CONNECT "}" TOP "}"

static char *write(const struct document_registration *registration) {
    char *text = NULL;
    struct meshx_failure failure = {0};
    if (document_registration(registration, &text, &failure) != MESHX_OK) {
        fail_msg("refused: %s", failure.text);
    }
    return text;
}

static void assert_writes(const struct document_registration *registration,
                          const char *expected) {
    char *text = write(registration);
    assert_string_equal(text, expected);
    free(text);
}

/* The text of the failure must be |name| and then begin with |says|. */
static void assert_refuses(const struct document_registration *registration,
                           const char *name, const char *says) {
    char *text = NULL;
    struct meshx_failure failure = {0};
    assert_int_equal(document_registration(registration, &text, &failure), MESHX_ECONFIG);
    assert_int_equal(failure.code, MESHX_ECONFIG);
    if (strncmp(failure.text, name, strlen(name)) != 0 ||
        strncmp(failure.text + strlen(name), says, strlen(says)) != 0) {
        fail_msg("\"%s\" does not begin with \"%s%s\"", failure.text, name, says);
    }
    assert_null(text);
    assert_int_equal(document_registration(registration, &text, NULL), MESHX_ECONFIG);
    assert_null(text);
}

/* A field of the written document by its path: "Connect", "SidecarService", NULL. */
static void assert_field(const struct document_registration *registration,
                         const char *const *path, const char *expected) {
    char *text = write(registration);
    json_t *document = json_loads(text, 0, NULL);
    json_t *value = document;
    for (; *path != NULL; path++) {
        value = json_object_get(value, *path);
    }
    if (expected == NULL) {
        assert_null(value);
    } else {
        assert_true(json_is_string(value));
        assert_string_equal(json_string_value(value), expected);
    }
    json_decref(document);
    free(text);
}

static void plain_registration(void **state) {
    (void)state;
    struct document_registration registration = base();
    assert_writes(&registration, DOCUMENT("", "", "", "", "", "", "", ""));
    registration.upstreams = two_upstreams;
    registration.upstream_count = 2;
    assert_writes(&registration, DOCUMENT("", "", "", "", "", UPSTREAMS, "", ""));
    registration.sidecar_address = "10.1.2.3";
    assert_writes(&registration, DOCUMENT("", "", ",\"Address\":\"10.1.2.3\"", "", "",
                                          UPSTREAMS, "", ""));
}

static void largest_numbers(void **state) {
    (void)state;
    struct document_registration registration = base();
    registration.listen_port = 65535;
    registration.ttl = UINT32_MAX;
    registration.deregister_after = UINT32_MAX;
    char *text = write(&registration);
    assert_non_null(strstr(text, "\"TTL\":\"4294967295ms\""));
    assert_non_null(strstr(text, "\"DeregisterCriticalServiceAfter\":\"4294967295ms\""));
    assert_non_null(strstr(text, "\"Port\":65535"));
    free(text);
}

/* Where a node listens at all addresses its sidecar must still find it at the loopback.
 */
static void local_service_address(void **state) {
    (void)state;
    static const char *const path[] = {"Connect", "SidecarService", "Proxy",
                                       "LocalServiceAddress", NULL};
    static const char *const cases[][2] = {
        {"127.0.0.1", "127.0.0.1"}, {"127.0.0.5", "127.0.0.5"},
        {"0.0.0.0", "127.0.0.1"},   {"::", "::1"},
        {"0:0::0", "::1"},          {"::1", "::1"},
        {"10.0.0.1", "10.0.0.1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct document_registration registration = base();
        registration.listen_address = cases[i][0];
        assert_field(&registration, path, cases[i][1]);
    }
}

/* The sidecar would inherit it and listen there only. */
static void service_has_no_address(void **state) {
    (void)state;
    static const char *const address[] = {"Address", NULL};
    struct document_registration registration = base();
    registration.sidecar_address = "10.0.0.1";
    assert_field(&registration, address, NULL);
    registration.service_template = "{\"Address\":\"10.0.0.2\"}";
    assert_field(&registration, address, "10.0.0.2"); /* the user's wish */
}

static void texts_are_escaped(void **state) {
    (void)state;
    static const char *const meta[] = {"Meta", "node", NULL};
    static const char *const name[] = {"Name", NULL};
    struct document_registration registration = base();
    registration.node = "a\"},{\\\n@\xc3\xa4";
    registration.service_name = "\x01/<>";
    assert_field(&registration, meta, registration.node);
    assert_field(&registration, name, registration.service_name);
}

static void texts_must_be_utf8(void **state) {
    (void)state;
    struct document_registration registration = base();
    registration.node = "n\xf6"
                        "de@a";
    assert_refuses(&registration, "", "registration of node1@a: not UTF-8");
    registration = base();
    registration.vm_check_id = "\xff";
    char *text = NULL;
    assert_int_equal(document_registration(&registration, &text, NULL), MESHX_ECONFIG);
    registration = base();
    const struct document_upstream upstream = {"\xc0\x80", "127.0.0.1", 1};
    registration.upstreams = &upstream;
    registration.upstream_count = 1;
    assert_int_equal(document_registration(&registration, &text, NULL), MESHX_ECONFIG);
    assert_null(text);
}

static void templates_are_merged(void **state) {
    (void)state;
    static const struct {
        const char *template;
        const char *expected;
    } cases[] = {
        {"{}", DOCUMENT("", "", "", "", "", UPSTREAMS, "", "")},
        /* Added where we have nothing, of any type. */
        {"{\"Tags\":[\"a\",\"b\"],\"Weights\":{\"Passing\":3},"
         "\"EnableTagOverride\":true,\"X\":1.5,\"Y\":null}",
         DOCUMENT("", "", "", "", "", UPSTREAMS, "",
                  ",\"Tags\":[\"a\",\"b\"],\"Weights\":{\"Passing\":3},"
                  "\"EnableTagOverride\":true,\"X\":1.5,\"Y\":null")},
        /* Meta is joined; its keys are the user's, however they look. */
        {"{\"Meta\":{\"rack\":\"r1\",\"Node\":\"x\",\"NO_DE\":\"y\"}}",
         DOCUMENT(",\"rack\":\"r1\",\"Node\":\"x\",\"NO_DE\":\"y\"", "", "", "", "",
                  UPSTREAMS, "", "")},
        /* Ours win. */
        {"{\"ID\":\"x\",\"Name\":\"x\",\"Port\":1,\"Meta\":{\"node\":\"x\"},"
         "\"Connect\":{\"SidecarService\":{\"Port\":1,\"Proxy\":{"
         "\"LocalServiceAddress\":\"x\",\"LocalServicePort\":true}}}}",
         DOCUMENT("", "", "", "", "", UPSTREAMS, "", "")},
        /* Arrays are joined, ours first. */
        {"{\"Checks\":[{\"TCP\":\"127.0.0.1:1\",\"Interval\":\"5s\"}]}",
         DOCUMENT("", ",{\"TCP\":\"127.0.0.1:1\",\"Interval\":\"5s\"}", "", "", "",
                  UPSTREAMS, "", "")},
        {"{\"Connect\":{\"SidecarService\":{\"Checks\":[{\"AliasNode\":\"n\"}]}}}",
         DOCUMENT("", "", "", ",{\"AliasNode\":\"n\"}", "", UPSTREAMS, "", "")},
        {"{\"Connect\":{\"SidecarService\":{\"Proxy\":{\"Upstreams\":["
         "{\"DestinationName\":\"db\",\"LocalBindPort\":5432}]}}}}",
         DOCUMENT("", "", "", "", "",
                  UPSTREAMS ",{\"DestinationName\":\"db\",\"LocalBindPort\":5432}", "",
                  "")},
        /* Deep inside. */
        {"{\"Connect\":{\"SidecarService\":{\"Proxy\":{\"Config\":{"
         "\"local_connect_timeout_ms\":500}},\"Tags\":[]},\"Native\":false}}",
         DOCUMENT("", "", ",\"Tags\":[]", "",
                  ",\"Config\":{\"local_connect_timeout_ms\":500}", UPSTREAMS,
                  ",\"Native\":false", "")},
        /* null takes nothing away. */
        {"{\"ID\":null,\"Meta\":null,\"Checks\":null,\"Connect\":null}",
         DOCUMENT("", "", "", "", "", UPSTREAMS, "", "")},
        /* One more kind of check is not a misspelt "Checks". */
        {"{\"Check\":{\"TTL\":\"1s\"}}",
         DOCUMENT("", "", "", "", "", UPSTREAMS, "", ",\"Check\":{\"TTL\":\"1s\"}")},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct document_registration registration = base();
        registration.upstreams = two_upstreams;
        registration.upstream_count = 2;
        registration.service_template = cases[i].template;
        assert_writes(&registration, cases[i].expected);
        assert_writes(&registration, cases[i].expected);
    }
}

static void upstream_templates_are_merged(void **state) {
    (void)state;
    struct document_registration registration = base();
    registration.upstreams = two_upstreams;
    registration.upstream_count = 2;
    registration.upstream_template =
        "{\"Datacenter\":\"dc2\",\"Config\":{\"connect_timeout_ms\":1},"
        "\"DestinationName\":\"x\",\"LocalBindAddress\":\"x\",\"LocalBindPort\":1}";
    /* Only ours get it, not those of the service template. */
    registration.service_template = "{\"Connect\":{\"SidecarService\":{\"Proxy\":{"
                                    "\"Upstreams\":[{\"DestinationName\":\"db\"}]}}}}";
#define MORE ",\"Datacenter\":\"dc2\",\"Config\":{\"connect_timeout_ms\":1}}"
    assert_writes(
        &registration,
        DOCUMENT("", "", "", "", "",
                 "{\"DestinationName\":\"node2@b\",\"LocalBindAddress\":\"127.0.0.1\","
                 "\"LocalBindPort\":20001" MORE
                 ",{\"DestinationName\":\"node3@c\",\"LocalBindAddress\":\"127.0.0.1\","
                 "\"LocalBindPort\":20002" MORE ",{\"DestinationName\":\"db\"}",
                 "", ""));
}

static void templates_that_do_not_fit(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"{\"Meta\":[]}", "Meta must be an object, but is an array"},
        {"{\"Meta\":\"x\"}", "Meta must be an object, but is a string"},
        {"{\"Checks\":{}}", "Checks must be an array, but is an object"},
        {"{\"Checks\":true}", "Checks must be an array, but is a boolean"},
        {"{\"Connect\":1}", "Connect must be an object, but is an integer"},
        {"{\"Connect\":{\"SidecarService\":1.5}}",
         "Connect.SidecarService must be an object, but is a number with a fraction"},
        {"{\"Connect\":{\"SidecarService\":{\"Proxy\":{\"Upstreams\":{}}}}}",
         "Connect.SidecarService.Proxy.Upstreams must be an array, but is an object"},
        {"{\"Port\":[1]}", "Port must not be given as an array"},
        {"{\"Meta\":{\"node\":{}}}", "Meta.node must not be given as an object"},
        /* The agent takes any case, and some keys with underscores. */
        {"{\"id\":\"x\"}", "id must be written ID"},
        {"{\"meta\":{}}", "meta must be written Meta"},
        {"{\"Connect\":{\"sidecar_service\":{}}}",
         "Connect.sidecar_service must be written SidecarService"},
        {"{\"Connect\":{\"SidecarService\":{\"Proxy\":{\"local_service_port\":1}}}}",
         "Connect.SidecarService.Proxy.local_service_port must be written "
         "LocalServicePort"},
        {"{\"_P_O_R_T_\":1}", "_P_O_R_T_ must be written Port"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct document_registration registration = base();
        registration.service_template = cases[i][0];
        assert_refuses(&registration, "service_template: ", cases[i][1]);
    }

    struct document_registration registration = base();
    registration.upstreams = two_upstreams;
    registration.upstream_count = 2;
    registration.upstream_template = "{\"LocalBindPort\":[]}";
    assert_refuses(&registration,
                   "upstream_template: ", "LocalBindPort must not be given as an array");
    registration.upstream_template = "{\"destination_name\":\"x\"}";
    assert_refuses(&registration, "upstream_template: ",
                   "destination_name must be written DestinationName");
}

/* The words after the place are jansson's and may change. */
static void malformed_templates(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"", "line 1, column 0: "},
        {"[]", "line 1, column 1: this is an array, not an object"},
        {"1", "line 1, column 1: "},
        {"\"x\"", "line 1, column 3: "},
        {"{", "line 1, column 1: "},
        {"{} x", "line 1, column 4: "},
        {"{\"a\":1,\n \"a\":2}", "line 2, column 4: duplicate object key"},
        {"{\"a\":\"\\u0000\"}", "line 1, column 13: "},
        {"{\"a\":123456789012345678901}", "line 1, column 26: too big integer"},
        {"{\"a\":1e999}", "line 1, column 10: real number overflow"},
        {"{\"a\":\"\xff\"}", "line 1, column 6: "},
        {"{'a':1}", "line 1, column 2: "},
        {"{\"a\":NaN}", "line 1, column 8: "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct meshx_failure failure = {0};
        struct document_registration registration = base();
        registration.service_template = cases[i][0];
        assert_refuses(&registration, "service_template: ", cases[i][1]);
        registration.service_template = NULL;
        registration.upstream_template = cases[i][0];
        assert_refuses(&registration, "upstream_template: ", cases[i][1]);
        assert_int_equal(document_check_template(cases[i][0], &failure), MESHX_ECONFIG);
        assert_int_equal(failure.code, MESHX_ECONFIG);
        assert_int_equal(strncmp(failure.text, cases[i][1], strlen(cases[i][1])), 0);
        assert_int_equal(document_check_template(cases[i][0], NULL), MESHX_ECONFIG);
    }
}

static char *nested(size_t depth, char open, char close) {
    char *text = malloc(depth * 2 + 7);
    assert_non_null(text);
    memcpy(text, "{\"a\":", 5);
    memset(text + 5, open, depth);
    memset(text + 5 + depth, close, depth);
    text[5 + depth * 2] = '}';
    text[6 + depth * 2] = '\0';
    return text;
}

static void deep_templates(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    char *text = nested(2000, '[', ']');
    struct document_registration registration = base();
    registration.service_template = text;
    assert_int_equal(document_check_template(text, &failure), MESHX_OK);
    char *document = write(&registration);
    assert_non_null(strstr(document, "[[[[[["));
    free(document);
    free(text);

    text = nested(1000000, '[', ']');
    assert_int_equal(document_check_template(text, &failure), MESHX_ECONFIG);
    assert_non_null(strstr(failure.text, "maximum parsing depth"));
    free(text);
}

static void good_templates_check(void **state) {
    (void)state;
    struct meshx_failure failure = {0};
    assert_int_equal(document_check_template(" {} \n", &failure), MESHX_OK);
    assert_int_equal(document_check_template("{\"Tags\":[\"\xc3\xa4\"]}", NULL),
                     MESHX_OK);
}

/* --- Answers --------------------------------------------------------------------------
 */

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
    assert_true(found.items[0].passing);
    assert_null(found.items[0].trouble);
    assert_null(found.items[1].node);
    assert_string_equal(found.items[1].service_id, "other");
    assert_string_equal(found.items[1].agent_node, "host-b");
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

/* --- Without memory -------------------------------------------------------------------
 */

/*
 * jansson allocates inside its shared library; through this its allocations fail too.
 * Only for what we write: its parser (2.14) crashes when some allocations fail, so for
 * templates and answers only the core's own are failed.
 */
static void *failing_malloc(size_t size) {
    return malloc(size);
}

static void registration_without_memory(void **state) {
    (void)state;
    struct document_registration registration = base();
    registration.upstreams = two_upstreams;
    registration.upstream_count = 2;
    registration.sidecar_address = "10.0.0.1";
    char *expected = write(&registration);
    json_malloc_t its_malloc;
    json_free_t its_free;
    json_get_alloc_funcs(&its_malloc, &its_free);
    json_set_alloc_funcs(failing_malloc, free);
    unsigned nth = 1;
    for (;; nth++) {
        char *text = NULL;
        struct meshx_failure failure = {0};
        allocation_fail(nth);
        int result = document_registration(&registration, &text, &failure);
        bool failed = allocation_failed();
        allocation_fail(0);
        if (!failed) {
            assert_int_equal(result, MESHX_OK);
            assert_string_equal(text, expected);
            free(text);
            break;
        }
        assert_int_equal(result, MESHX_ENOMEM);
        assert_int_equal(failure.code, MESHX_ENOMEM);
        assert_null(text);
    }
    json_set_alloc_funcs(its_malloc, its_free);
    assert_true(nth > 50);
    free(expected);
}

static void templates_without_memory(void **state) {
    (void)state;
    static const struct {
        const char *service;
        const char *upstream;
        int result;
    } cases[] = {
        {"{\"Tags\":[\"t\"],\"Checks\":[1,2]}", "{\"Datacenter\":\"dc2\"}", MESHX_OK},
        {"{\"Connect\":{\"SidecarService\":1}}", NULL, MESHX_ECONFIG},
    };
    for (size_t i = 0; i < 2; i++) {
        struct document_registration registration = base();
        registration.upstreams = two_upstreams;
        registration.upstream_count = 2;
        registration.service_template = cases[i].service;
        registration.upstream_template = cases[i].upstream;
        unsigned nth = 1;
        for (;; nth++) {
            char *text = NULL;
            allocation_fail(nth);
            int result = document_registration(&registration, &text, NULL);
            bool failed = allocation_failed();
            allocation_fail(0);
            assert_int_equal(result, failed ? MESHX_ENOMEM : cases[i].result);
            assert_int_equal(text != NULL, result == MESHX_OK);
            free(text);
            if (!failed) {
                break;
            }
        }
        assert_true(nth > 1);
    }
}

static void answers_without_memory(void **state) {
    (void)state;
    static const char service_body[] =
        "{\"Meta\":{\"node\":\"n\"},\"Port\":1,\"Address\":\"10.0.0.1\"}";
    static const char no_output[] = INSTANCE("\"h\"", ",\"Meta\":{\"node\":\"n\"}",
                                             ",\"Checks\":[{\"Status\":\"critical\"}]");
    struct document_instances found = {0};
    struct document_service service = {0};
    const struct {
        int (*parser)(const char *, size_t, void *, struct meshx_failure *);
        const char *body;
        size_t size;
        void *out;
        unsigned allocations;
    } cases[] = {
        {instances_parser, real_instances, sizeof real_instances - 1, &found, 7},
        {instances_parser, no_output, sizeof no_output - 1, &found, 5},
        {service_parser, service_body, sizeof service_body - 1, &service, 2},
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
        }
        assert_int_equal(nth - 1, cases[i].allocations);
        document_instances_fini(&found);
        document_service_fini(&service);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_registration),
        cmocka_unit_test(largest_numbers),
        cmocka_unit_test(local_service_address),
        cmocka_unit_test(service_has_no_address),
        cmocka_unit_test(texts_are_escaped),
        cmocka_unit_test(texts_must_be_utf8),
        cmocka_unit_test(templates_are_merged),
        cmocka_unit_test(upstream_templates_are_merged),
        cmocka_unit_test(templates_that_do_not_fit),
        cmocka_unit_test(malformed_templates),
        cmocka_unit_test(deep_templates),
        cmocka_unit_test(good_templates_check),
        cmocka_unit_test(instances),
        cmocka_unit_test(no_instances),
        cmocka_unit_test(odd_instances),
        cmocka_unit_test(wrong_instances),
        cmocka_unit_test(damaged_instances),
        cmocka_unit_test(services),
        cmocka_unit_test(wrong_services),
        cmocka_unit_test(allowed),
        cmocka_unit_test(registration_without_memory),
        cmocka_unit_test(templates_without_memory),
        cmocka_unit_test(answers_without_memory),
    };
    return cmocka_run_group_tests_name("document", tests, NULL, NULL);
}
