/* Consul's environment variables, each with what is allowed and what is refused. */
#include "support.h"
#include "endpoint.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SETTINGS(...) ((const struct meshx_setting[]){__VA_ARGS__, {NULL, NULL}})

static char folder[] = "/tmp/meshx_endpoint_XXXXXX";
static char path_text[256];

static const char *path_of(const char *name) {
    snprintf(path_text, sizeof path_text, "%s/%s", folder, name);
    return path_text;
}

static void write_file(const char *name, const char *bytes, size_t size) {
    FILE *file = fopen(path_of(name), "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static int make_folder(void **state) {
    (void)state;
    return mkdtemp(folder) == NULL ? -1 : 0;
}

static int remove_folder(void **state) {
    (void)state;
    static const char *const files[] = {"file", "token", "pipe"};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        unlink(path_of(files[i]));
    }
    return rmdir(folder);
}

/* The failure must leave nothing behind and name |culprit|. */
static struct meshx_failure refuse(const struct meshx_setting *settings,
                                   const char *culprit) {
    static const struct endpoint nothing;
    struct endpoint endpoint;
    struct meshx_failure failure = {0};
    memset(&endpoint, 0x55, sizeof endpoint);
    assert_int_equal(endpoint_init(&endpoint, settings, &failure), MESHX_ECONFIG);
    assert_int_equal(failure.code, MESHX_ECONFIG);
    assert_memory_equal(&endpoint, &nothing, sizeof endpoint);
    if (strstr(failure.text, culprit) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", failure.text, culprit);
    }
    assert_int_equal(endpoint_init(&endpoint, settings, NULL), MESHX_ECONFIG);
    return failure;
}

static struct endpoint accept(const struct meshx_setting *settings) {
    struct endpoint endpoint;
    struct meshx_failure failure = {0};
    memset(&endpoint, 0x55, sizeof endpoint);
    if (endpoint_init(&endpoint, settings, &failure) != MESHX_OK) {
        fail_msg("refused: %s", failure.text);
    }
    return endpoint;
}

static void assert_token(const struct endpoint *endpoint, const char *expected) {
    struct buf token = {0};
    assert_int_equal(endpoint_token(endpoint, &token, NULL), MESHX_OK);
    assert_string_equal(buf_text(&token), expected);
    buf_fini(&token);
}

static void assert_defaults(const struct endpoint *endpoint) {
    assert_string_equal(endpoint->url, "http://127.0.0.1:8500");
    assert_string_equal(endpoint->shown, "127.0.0.1:8500");
    assert_string_equal(endpoint->host, "127.0.0.1");
    assert_int_equal(endpoint->port, 8500);
    assert_null(endpoint->unix_socket);
    assert_null(endpoint->token);
    assert_null(endpoint->token_file);
    assert_null(endpoint->auth);
    assert_true(endpoint->verify);
    assert_null(endpoint->ca_file);
    assert_null(endpoint->ca_path);
    assert_null(endpoint->client_cert);
    assert_null(endpoint->client_key);
    assert_null(endpoint->server_name);
    assert_null(endpoint->query);
    assert_token(endpoint, "");
}

static void defaults(void **state) {
    (void)state;
    static const char *const names[] = {
        "CONSUL_HTTP_ADDR",       "CONSUL_HTTP_TOKEN",  "CONSUL_HTTP_TOKEN_FILE",
        "CONSUL_HTTP_SSL",        "CONSUL_HTTP_AUTH",   "CONSUL_HTTP_SSL_VERIFY",
        "CONSUL_CACERT",          "CONSUL_CAPATH",      "CONSUL_CLIENT_CERT",
        "CONSUL_CLIENT_KEY",      "CONSUL_NAMESPACE",   "CONSUL_PARTITION",
        "CONSUL_TLS_SERVER_NAME", "CONSUL_GRPC_CACERT",
    };
    const size_t count = sizeof names / sizeof names[0];
    struct meshx_setting empty[sizeof names / sizeof names[0] + 1];
    struct meshx_setting unset[sizeof names / sizeof names[0] + 1];
    for (size_t i = 0; i < count; i++) {
        empty[i] = (struct meshx_setting){names[i], ""};
        unset[i] = (struct meshx_setting){names[i], NULL};
    }
    empty[count] = unset[count] = (struct meshx_setting){NULL, NULL};
    const struct meshx_setting *const lists[] = {
        NULL, empty, unset,
        SETTINGS({"CONSUL_GRPC_ADDR", "x:1"}, {"consul_http_addr", "y"})};
    for (size_t i = 0; i < 4; i++) {
        struct endpoint endpoint = accept(lists[i]);
        assert_defaults(&endpoint);
        endpoint_fini(&endpoint);
    }
}

static void addresses(void **state) {
    (void)state;
    static const struct {
        const char *address;
        const char *ssl;
        const char *url;
        const char *host;
        uint16_t port;
    } cases[] = {
        {"10.0.0.1:8501", NULL, "http://10.0.0.1:8501", "10.0.0.1", 8501},
        {"10.0.0.1:8501", "1", "https://10.0.0.1:8501", "10.0.0.1", 8501},
        {"10.0.0.1:8501", "false", "http://10.0.0.1:8501", "10.0.0.1", 8501},
        {"consul.example.org", NULL, "http://consul.example.org:8500",
         "consul.example.org", 8500},
        {"my_host-1:1", NULL, "http://my_host-1:1", "my_host-1", 1},
        {":8600", NULL, "http://127.0.0.1:8600", "127.0.0.1", 8600},
        {"http://:8600", NULL, "http://127.0.0.1:8600", "127.0.0.1", 8600},
        {"http://host:8600", NULL, "http://host:8600", "host", 8600},
        {"http://host", NULL, "http://host:80", "host", 80},
        {"https://host", NULL, "https://host:443", "host", 443},
        {"https://host:8501", NULL, "https://host:8501", "host", 8501},
        {"https://host:8501", "false", "https://host:8501", "host", 8501},
        {"http://host:8501", "true", "https://host:8501", "host", 8501},
        {"http://host", "true", "https://host:443", "host", 443},
        {"http://host:8500/", NULL, "http://host:8500", "host", 8500},
        {"http://host:8500///", NULL, "http://host:8500", "host", 8500},
        {"http://host:8500/consul/a%20b/", NULL, "http://host:8500/consul/a%20b", "host",
         8500},
        {"host:8500/consul", NULL, "http://host:8500/consul", "host", 8500},
        {"host/consul", NULL, "http://host:8500/consul", "host", 8500},
        {"[::1]:8500", NULL, "http://[::1]:8500", "[::1]", 8500},
        {"[::1]", NULL, "http://[::1]:8500", "[::1]", 8500},
        {"https://[2001:db8::1]:65535/x", NULL, "https://[2001:db8::1]:65535/x",
         "[2001:db8::1]", 65535},
        {"https://[::ffff:1.2.3.4]", NULL, "https://[::ffff:1.2.3.4]:443",
         "[::ffff:1.2.3.4]", 443},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct endpoint endpoint = accept(SETTINGS({"CONSUL_HTTP_ADDR", cases[i].address},
                                                   {"CONSUL_HTTP_SSL", cases[i].ssl}));
        assert_string_equal(endpoint.url, cases[i].url);
        assert_string_equal(endpoint.host, cases[i].host);
        assert_int_equal(endpoint.port, cases[i].port);
        assert_null(endpoint.unix_socket);
        endpoint_fini(&endpoint);
    }
}

static void shows_the_address_with_its_port(void **state) {
    (void)state;
    static const char *const shown[][2] = {
        {"host:8500", "host:8500"},
        {":8600", ":8600"},
        {"http://host:8600/x/", "http://host:8600/x/"},
        {"host", "http://host:8500"},
        {"http://host", "http://host:80"},
        {"https://[::1]/x", "https://[::1]:443/x"},
    };
    for (size_t i = 0; i < sizeof shown / sizeof shown[0]; i++) {
        struct endpoint endpoint = accept(SETTINGS({"CONSUL_HTTP_ADDR", shown[i][0]}));
        assert_string_equal(endpoint.shown, shown[i][1]);
        endpoint_fini(&endpoint);
    }
}

static void unix_sockets(void **state) {
    (void)state;
    struct endpoint endpoint =
        accept(SETTINGS({"CONSUL_HTTP_ADDR", "unix:///run/a b?c@d"}));
    assert_string_equal(endpoint.unix_socket, "/run/a b?c@d");
    assert_string_equal(endpoint.url, "http://localhost");
    assert_string_equal(endpoint.host, "localhost");
    assert_string_equal(endpoint.shown, "unix:///run/a b?c@d");
    endpoint_fini(&endpoint);

    endpoint =
        accept(SETTINGS({"CONSUL_HTTP_ADDR", "unix:///s"}, {"CONSUL_HTTP_SSL", "true"}));
    assert_string_equal(endpoint.url, "https://localhost");
    endpoint_fini(&endpoint);

    char address[7 + 109] = "unix://";
    memset(address + 7, '/', 107);
    endpoint = accept(SETTINGS({"CONSUL_HTTP_ADDR", address}));
    assert_int_equal(strlen(endpoint.unix_socket), 107);
    endpoint_fini(&endpoint);
    address[7 + 107] = '/';
    refuse(SETTINGS({"CONSUL_HTTP_ADDR", address}), "107 bytes");
    refuse(SETTINGS({"CONSUL_HTTP_ADDR", "unix://"}), "CONSUL_HTTP_ADDR=unix://:");
}

static void wrong_addresses(void **state) {
    (void)state;
    static const struct {
        const char *address;
        const char *says;
    } cases[] = {
        {"ftp://host:1", "unknown scheme ftp://"},
        {"HTTP://host:1", "unknown scheme HTTP://"},
        {"://host", "unknown scheme"},
        {"s3cret@x://host", "unknown scheme ://"},
        {"http:/x://host", "two slashes"},
        {"http:/host:1", "two slashes"},
        {"https:/host", "two slashes"},
        {"unix:/run/consul.sock", "two slashes"},
        {"http:/me:s3cret@host:1", "CONSUL_HTTP_AUTH"},
        {"http://", "no host name"},
        {"http:///x", "no host name"},
        {"/x", "no host name"},
        {"ho st:1", "no host name"},
        {" host:1", "no host name"},
        {"host\n:1", "no host name"},
        {"h\xc3\xb6st:1", "no host name"},
        {"host:", "port"},
        {"host:/x", "port"},
        {"host:0", "port"},
        {"host:65536", "port"},
        {"host:000001", "port"},
        {"host:-1", "port"},
        {"host:80a", "port"},
        {"host: 80", "port"},
        {"host:8500 ", "port"},
        {"http://host:99999999999999999999", "port"},
        {"::1", "[::1]:8500"},
        {"::1:8500", "[::1]:8500"},
        {"fe80::1", "[::1]:8500"},
        {"[::1", "brackets"},
        {"[", "brackets"},
        {"[]:1", "brackets"},
        {"[127.0.0.1]:1", "brackets"},
        {"[fe80::1%eth0]:1", "brackets"},
        {"[0000:0000:0000:0000:0000:0000:0000:0000:0000:0000]", "brackets"},
        {"[::1]8500", "colon"},
        {"[::1]:", "port"},
        {"host:1/a b", "character"},
        {"host:1/\xc3\xa4", "character"},
        {"host:1/\x7f", "character"},
        {"host:1?x", "no query"},
        {"http://host:1/x?token=s3cret", "no query"},
        {"http://host:1/#s3cret", "no fragment"},
        {"http://user:s3cret@host:1", "CONSUL_HTTP_AUTH"},
        {"user:s3cret@host:1", "CONSUL_HTTP_AUTH"},
        {"http://user:s3cret/x@host:1", "CONSUL_HTTP_AUTH"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct meshx_failure failure =
            refuse(SETTINGS({"CONSUL_HTTP_ADDR", cases[i].address}), cases[i].says);
        assert_int_equal(strncmp(failure.text, "CONSUL_HTTP_ADDR", 16), 0);
        assert_null(strstr(failure.text, "s3cret"));
    }
    char *huge = calloc(1, 100001);
    assert_non_null(huge);
    memset(huge, 'a', 100000);
    huge[99999] = ':';
    refuse(SETTINGS({"CONSUL_HTTP_ADDR", huge}), "CONSUL_HTTP_ADDR=aaa");
    free(huge);
}

static void booleans(void **state) {
    (void)state;
    static const char *const yes[] = {"1", "t", "T", "TRUE", "true", "True"};
    static const char *const no[] = {"0", "f", "F", "FALSE", "false", "False"};
    static const char *const wrong[] = {"yes", "tRUE", " true", "2", "on"};
    for (size_t i = 0; i < 6; i++) {
        struct endpoint endpoint = accept(
            SETTINGS({"CONSUL_HTTP_SSL", yes[i]}, {"CONSUL_HTTP_SSL_VERIFY", no[i]}));
        assert_string_equal(endpoint.url, "https://127.0.0.1:8500");
        assert_false(endpoint.verify);
        endpoint_fini(&endpoint);
        endpoint = accept(
            SETTINGS({"CONSUL_HTTP_SSL", no[i]}, {"CONSUL_HTTP_SSL_VERIFY", yes[i]}));
        assert_string_equal(endpoint.url, "http://127.0.0.1:8500");
        assert_true(endpoint.verify);
        endpoint_fini(&endpoint);
    }
    for (size_t i = 0; i < 5; i++) {
        char culprit[64];
        snprintf(culprit, sizeof culprit, "CONSUL_HTTP_SSL=%s: must be true or",
                 wrong[i]);
        refuse(SETTINGS({"CONSUL_HTTP_SSL", wrong[i]}), culprit);
        snprintf(culprit, sizeof culprit, "CONSUL_HTTP_SSL_VERIFY=%s: must", wrong[i]);
        refuse(SETTINGS({"CONSUL_HTTP_SSL_VERIFY", wrong[i]}), culprit);
    }
}

static void last_duplicate_counts(void **state) {
    (void)state;
    struct endpoint endpoint = accept(
        SETTINGS({"CONSUL_HTTP_ADDR", "a:1"}, {"X", "y"}, {"CONSUL_HTTP_ADDR", "b:2"}));
    assert_string_equal(endpoint.url, "http://b:2");
    endpoint_fini(&endpoint);
}

static void tokens(void **state) {
    (void)state;
    struct endpoint endpoint = accept(SETTINGS({"CONSUL_HTTP_TOKEN", "s3cret"}));
    struct buf out = {0};
    assert_int_equal(buf_append_text(&out, "X-Consul-Token: "), MESHX_OK);
    assert_int_equal(endpoint_token(&endpoint, &out, NULL), MESHX_OK);
    assert_string_equal(buf_text(&out), "X-Consul-Token: s3cret");
    buf_fini(&out);
    endpoint_fini(&endpoint);

    /* It becomes a header: no second header may hide in it. */
    static const char *const wrong[] = {"s3cret\n", "s3\r\ncret: x", "s3cret\x01"};
    for (size_t i = 0; i < 3; i++) {
        struct meshx_failure failure =
            refuse(SETTINGS({"CONSUL_HTTP_TOKEN", wrong[i]}), "CONSUL_HTTP_TOKEN: ");
        assert_null(strstr(failure.text, "s3"));
    }
}

static void token_file(void **state) {
    (void)state;
    char path[sizeof path_text];
    snprintf(path, sizeof path, "%s", path_of("token"));
    write_file("token", " \t\nfirst\r\n \n", 12);
    struct endpoint endpoint = accept(
        SETTINGS({"CONSUL_HTTP_TOKEN_FILE", path}, {"CONSUL_HTTP_TOKEN", "other"}));
    assert_string_equal(endpoint.token_file, path);
    assert_token(&endpoint, "first");
    write_file("token", "rotated", 7);
    assert_token(&endpoint, "rotated");
    write_file("token", "\n\n", 2);
    assert_token(&endpoint, "other");

    char bytes[4097];
    memset(bytes, 'x', sizeof bytes);
    write_file("token", bytes, 4096);
    struct buf out = {0};
    assert_int_equal(endpoint_token(&endpoint, &out, NULL), MESHX_OK);
    assert_int_equal(out.size, 4096);
    buf_fini(&out);

    struct meshx_failure failure = {0};
    write_file("token", bytes, 4097);
    assert_int_equal(endpoint_token(&endpoint, &out, &failure), MESHX_ECONFIG);
    assert_non_null(strstr(failure.text, path));
    assert_null(strstr(failure.text, "xxx"));
    refuse(SETTINGS({"CONSUL_HTTP_TOKEN_FILE", path}), path);

    write_file("token", "s3cret\0x", 8);
    assert_int_equal(endpoint_token(&endpoint, &out, &failure), MESHX_ECONFIG);
    write_file("token", "s3cret\nX-Header: y", 18);
    assert_int_equal(endpoint_token(&endpoint, &out, &failure), MESHX_ECONFIG);
    assert_null(strstr(failure.text, "s3cret"));

    assert_int_equal(unlink(path), 0);
    memset(&failure, 0, sizeof failure);
    assert_int_equal(endpoint_token(&endpoint, &out, &failure), MESHX_ECONFIG);
    assert_int_equal(failure.code, MESHX_ECONFIG);
    assert_non_null(strstr(failure.text, "CONSUL_HTTP_TOKEN_FILE="));
    assert_non_null(strstr(failure.text, "No such file"));
    assert_int_equal(endpoint_token(&endpoint, &out, NULL), MESHX_ECONFIG);
    assert_int_equal(out.size, 0);
    buf_fini(&out);
    endpoint_fini(&endpoint);
}

static void token_file_without_token_in_it(void **state) {
    (void)state;
    write_file("token", "", 0);
    struct endpoint endpoint =
        accept(SETTINGS({"CONSUL_HTTP_TOKEN_FILE", path_of("token")}));
    assert_token(&endpoint, "");
    endpoint_fini(&endpoint);
    /* Nothing to read in a pipe: neither hangs. */
    assert_int_equal(mkfifo(path_of("pipe"), 0600), 0);
    endpoint = accept(SETTINGS({"CONSUL_HTTP_TOKEN_FILE", path_of("pipe")}));
    assert_token(&endpoint, "");
    endpoint_fini(&endpoint);
}

static void files_must_be_readable(void **state) {
    (void)state;
    static const char *const names[] = {"CONSUL_HTTP_TOKEN_FILE", "CONSUL_CACERT",
                                        "CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY",
                                        "CONSUL_CAPATH"};
    for (size_t i = 0; i < 5; i++) {
        struct meshx_failure failure =
            refuse(SETTINGS({names[i], path_of("missing")}), path_of("missing"));
        assert_int_equal(strncmp(failure.text, names[i], strlen(names[i])), 0);
        assert_non_null(strstr(failure.text, "No such file or directory"));
    }
    for (size_t i = 0; i < 4; i++) {
        refuse(SETTINGS({names[i], folder}), "Is a directory");
    }
    write_file("file", "x", 1);
    refuse(SETTINGS({"CONSUL_CAPATH", path_of("file")}), "Not a directory");
    /* It opens, but nothing is mapped at its beginning. */
    refuse(SETTINGS({"CONSUL_HTTP_TOKEN_FILE", "/proc/self/mem"}), "Input/output error");
}

static void tls_files(void **state) {
    (void)state;
    write_file("file", "x", 1);
    const char *file = path_of("file");
    struct endpoint endpoint = accept(SETTINGS(
        {"CONSUL_CACERT", file}, {"CONSUL_CAPATH", folder}, {"CONSUL_CLIENT_CERT", file},
        {"CONSUL_CLIENT_KEY", file}, {"CONSUL_TLS_SERVER_NAME", "server.dc1.consul"}));
    assert_string_equal(endpoint.ca_file, file);
    assert_string_equal(endpoint.ca_path, folder);
    assert_string_equal(endpoint.client_cert, file);
    assert_string_equal(endpoint.client_key, file);
    assert_string_equal(endpoint.server_name, "server.dc1.consul");
    endpoint_fini(&endpoint);

    struct meshx_failure failure =
        refuse(SETTINGS({"CONSUL_CLIENT_CERT", file}), "set both or none");
    assert_int_equal(strncmp(failure.text, "CONSUL_CLIENT_KEY:", 18), 0);
    failure = refuse(SETTINGS({"CONSUL_CLIENT_KEY", file}), "set both or none");
    assert_int_equal(strncmp(failure.text, "CONSUL_CLIENT_CERT:", 19), 0);
    refuse(SETTINGS({"CONSUL_TLS_SERVER_NAME", "a/b"}), "CONSUL_TLS_SERVER_NAME=a/b:");
    refuse(SETTINGS({"CONSUL_TLS_SERVER_NAME", "a:1"}), "CONSUL_TLS_SERVER_NAME=a:1:");
}

static void auth(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"user:pa:ss", "user:pa:ss"}, {"user", "user:"}, {":pass", ":pass"}};
    for (size_t i = 0; i < 3; i++) {
        struct endpoint endpoint = accept(SETTINGS({"CONSUL_HTTP_AUTH", cases[i][0]}));
        assert_string_equal(endpoint.auth, cases[i][1]);
        assert_null(strstr(endpoint.shown, "pa"));
        endpoint_fini(&endpoint);
    }
}

static void query(void **state) {
    (void)state;
    struct endpoint endpoint = accept(SETTINGS({"CONSUL_NAMESPACE", "a b&c"}));
    assert_string_equal(endpoint.query, "ns=a%20b%26c");
    endpoint_fini(&endpoint);
    endpoint = accept(SETTINGS({"CONSUL_PARTITION", "p"}));
    assert_string_equal(endpoint.query, "partition=p");
    endpoint_fini(&endpoint);
    endpoint = accept(SETTINGS({"CONSUL_PARTITION", "p"}, {"CONSUL_NAMESPACE", "n"}));
    assert_string_equal(endpoint.query, "ns=n&partition=p");
    endpoint_fini(&endpoint);
}

static void fini_twice(void **state) {
    (void)state;
    struct endpoint endpoint = {0};
    endpoint_fini(&endpoint);
    endpoint = accept(NULL);
    endpoint_fini(&endpoint);
    assert_null(endpoint.url);
    endpoint_fini(&endpoint);
}

/* Fails every allocation of init and token with |settings|; all that was taken must be
 * given back (LeakSanitizer) and the outcome must be out of memory, nothing else. */
static unsigned fail_every_allocation(const struct meshx_setting *settings) {
    unsigned nth = 1;
    for (;; nth++) {
        struct endpoint endpoint;
        struct buf token = {0};
        struct meshx_failure failure = {0};
        allocation_fail(nth);
        int result = endpoint_init(&endpoint, settings, &failure);
        if (result == MESHX_OK) {
            result = endpoint_token(&endpoint, &token, &failure);
        }
        bool failed = allocation_failed();
        allocation_fail(0);
        assert_int_equal(result, failed ? MESHX_ENOMEM : MESHX_OK);
        assert_int_equal(failure.code, failed ? MESHX_ENOMEM : 0);
        buf_fini(&token);
        endpoint_fini(&endpoint);
        if (!failed) {
            return nth - 1;
        }
    }
}

static void survives_without_memory(void **state) {
    (void)state;
    char address[200];
    char token[sizeof path_text];
    write_file("file", "x", 1);
    write_file("token", "t", 1);
    snprintf(token, sizeof token, "%s", path_of("token"));
    const char *file = path_of("file");
    memset(address, 'h', sizeof address);
    memcpy(address + 190, "/prefix", 8);
    assert_true(fail_every_allocation(SETTINGS(
                    {"CONSUL_HTTP_ADDR", address}, {"CONSUL_HTTP_TOKEN", "x"},
                    {"CONSUL_HTTP_TOKEN_FILE", token}, {"CONSUL_HTTP_AUTH", "u"},
                    {"CONSUL_CACERT", file}, {"CONSUL_CAPATH", folder},
                    {"CONSUL_CLIENT_CERT", file}, {"CONSUL_CLIENT_KEY", file},
                    {"CONSUL_TLS_SERVER_NAME", "s"}, {"CONSUL_NAMESPACE", address},
                    {"CONSUL_PARTITION", address})) >= 14);
    assert_true(fail_every_allocation(SETTINGS({"CONSUL_HTTP_ADDR", "unix:///s"},
                                               {"CONSUL_HTTP_TOKEN", "x"})) >= 5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults),
        cmocka_unit_test(addresses),
        cmocka_unit_test(shows_the_address_with_its_port),
        cmocka_unit_test(unix_sockets),
        cmocka_unit_test(wrong_addresses),
        cmocka_unit_test(booleans),
        cmocka_unit_test(last_duplicate_counts),
        cmocka_unit_test(tokens),
        cmocka_unit_test(token_file),
        cmocka_unit_test(token_file_without_token_in_it),
        cmocka_unit_test(files_must_be_readable),
        cmocka_unit_test(tls_files),
        cmocka_unit_test(auth),
        cmocka_unit_test(query),
        cmocka_unit_test(fini_twice),
        cmocka_unit_test(survives_without_memory),
    };
    return cmocka_run_group_tests_name("endpoint", tests, make_folder, remove_folder);
}
