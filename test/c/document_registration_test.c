/*
 * What we write to Consul: a registration with its templates. Compared as text where
 * order matters and as JSON where one field does.
 */
#include "support.h"
#include "document.h"
#include "error.h"

#include <jansson.h>
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
    "\"Status\":\"critical\",\"DeregisterCriticalServiceAfter\":\"60000ms\"}"
#define SIDECAR_CHECKS                                                                   \
    "{\"CheckID\":\"node1@a:sidecar\",\"Name\":\"Connect sidecar\","                     \
    "\"TTL\":\"15000ms\",\"Status\":\"critical\"}"
#define UPSTREAMS                                                                        \
    "{\"DestinationName\":\"node2@b\",\"LocalBindAddress\":\"127.0.0.1\","               \
    "\"LocalBindPort\":20001},"                                                          \
    "{\"DestinationName\":\"node3@c\",\"LocalBindAddress\":\"127.0.0.1\","               \
    "\"LocalBindPort\":20002}"
/* The document with more in its objects and arrays; each begins with a comma. */
#define DOCUMENT(META, CHECK, SIDECAR, SIDECAR_CHECK, PROXY, UPSTREAM, CONNECT, TOP)     \
    "{\"ID\":\"node1@a\",\"Name\":\"name1\",\"Port\":4370,"                              \
    "\"Meta\":{\"node\":\"node1@a\"" META "},\"Checks\":[" CHECKS CHECK "],"             \
    "\"Connect\":{\"SidecarService\":{\"Port\":21500,\"Checks\":[" SIDECAR_CHECKS        \
        SIDECAR_CHECK "],"                                                               \
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
    registration.sidecar_address = NULL;
    registration.service_template = "{\"Address\":\"\"}";
    assert_field(&registration, address, "");
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
        /* Ours, given once more. */
        {"{\"ID\":\"node1@a\",\"Meta\":{\"node\":\"node1@a\"}}",
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
        "\"LocalBindAddress\":\"127.0.0.1\"}";
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
        {"{\"Port\":[1]}", "Port must be left out: inet_dist_listen_min decides"},
        {"{\"Meta\":{\"node\":{}}}", "Meta.node must not be given as an object"},
        {"{\"ID\":\"x\"}", "ID must be left out: the node's name decides"},
        {"{\"Name\":\"x\"}", "Name must be left out: service_name decides"},
        {"{\"Port\":1}", "Port must be left out: inet_dist_listen_min decides"},
        {"{\"port\":1}", "port must be left out: inet_dist_listen_min decides"},
        {"{\"Address\":\"10.0.0.2\"}",
         "Address needs sidecar_address too: the sidecar would listen there"},
        {"{\"Connect\":{\"SidecarService\":{\"Address\":\"10.0.0.2\"}}}",
         "Connect.SidecarService.Address must be left out: sidecar_address decides"},
        {"{\"Meta\":{\"node\":\"x\"}}", "Meta.node must be left out: meshx_node sets it"},
        {"{\"Connect\":{\"SidecarService\":{\"Port\":1}}}",
         "Connect.SidecarService.Port must be left out: sidecar_ports decides"},
        {"{\"Connect\":{\"SidecarService\":{\"Proxy\":{\"LocalServicePort\":true}}}}",
         "Connect.SidecarService.Proxy.LocalServicePort must be left out: "
         "inet_dist_listen_min decides"},
        /* The agent takes any case, and some keys with underscores. */
        {"{\"id\":\"x\"}", "id must be left out: the node's name decides"},
        {"{\"meta\":{}}", "meta must be written Meta"},
        {"{\"Connect\":{\"sidecar_service\":{}}}",
         "Connect.sidecar_service must be written SidecarService"},
        {"{\"Connect\":{\"SidecarService\":{\"Proxy\":{\"local_service_port\":1}}}}",
         "Connect.SidecarService.Proxy.local_service_port must be left out: "
         "inet_dist_listen_min decides"},
        {"{\"_P_O_R_T_\":1}", "_P_O_R_T_ must be left out: inet_dist_listen_min decides"},
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
    assert_refuses(&registration, "upstream_template: ",
                   "LocalBindPort must be left out: upstream_ports decides");
    registration.upstream_template = "{\"destination_name\":\"x\"}";
    assert_refuses(&registration, "upstream_template: ",
                   "destination_name must be left out: the dialled node decides");
    registration.upstream_template = "{\"LocalBindPort\":1234}";
    assert_refuses(&registration, "upstream_template: ",
                   "LocalBindPort must be left out: upstream_ports decides");
    /* Found before there is an upstream. */
    registration.upstream_count = 0;
    for (size_t i = 0; i < 3; i++) {
        registration.upstream_template =
            (const char *const[]){"{\"LocalBindPort\":1}", "{\"LocalBindPort\":2}",
                                  "{\"LocalBindPort\":1234}"}[i];
        assert_refuses(&registration, "upstream_template: ",
                       "LocalBindPort must be left out: upstream_ports decides");
    }
    registration.service_template = NULL;
    registration.upstream_template = "{\"LocalBindAddress\":\"127.0.0.1\"}";
    assert_writes(&registration, DOCUMENT("", "", "", "", "", "", "", ""));
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

/* It may hold a secret. */
static void quotes_nothing_of_a_template(void **state) {
    (void)state;
    static const char *const wrong[] = {
        "{\"Meta\": s3cret}",
        "{\"Meta\": \"s3cret}",
        "{\"Meta\": {\"a\":1} s3cret",
        "{\"s3cret\": 1, \"s3cret\": 2}",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        struct meshx_failure failure = {0};
        assert_int_equal(document_check_template(wrong[i], &failure), MESHX_ECONFIG);
        assert_int_equal(strncmp(failure.text, "line 1, column ", 15), 0);
        assert_null(strstr(failure.text, "s3cret"));
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

/* --- Without memory -------------------------------------------------------------------
 */

/*
 * jansson allocates inside its shared library; through this its allocations fail too.
 * Only for what we write: its parser (2.14) crashes when some allocations fail, so for
 * templates only the core's own are failed.
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
        cmocka_unit_test(quotes_nothing_of_a_template),
        cmocka_unit_test(deep_templates),
        cmocka_unit_test(good_templates_check),
        cmocka_unit_test(registration_without_memory),
        cmocka_unit_test(templates_without_memory),
    };
    return cmocka_run_group_tests_name("document_registration", tests, NULL, NULL);
}
