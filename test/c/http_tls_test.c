/*
 * HTTPS against a real agent with certificates that Consul itself has made.
 */
#include "agent.h"
#include "exchange.h"
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

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
    context_begin(&context, settings);
    exchange_get(&exchange, &context, "/v1/status/leader");
    if (exchange.failure.code != MESHX_OK) {
        assert_contains(exchange.failure.text, address);
    }
    context_finish(&context);
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

/* openssl ec -aes128; it is no pair with any certificate. */
static const char locked_key[] =
    "-----BEGIN EC PRIVATE KEY-----\n"
    "Proc-Type: 4,ENCRYPTED\n"
    "DEK-Info: AES-128-CBC,A32D2635EC58B48147D4FD87F2E09645\n"
    "\n"
    "LYlECIyi2Zg9cTC8ZO3J802MpBga4byX9cXHO0JLLmaqisp4fxj/W5Mzx95cTVGH\n"
    "q2ImkFFxddgTXOPDFn9Ecrcow1AsRmv5sFmZ/iPzv/hzLG6KBrdy9XlWfXAsW7Kc\n"
    "yTmLg54MStnKL5kFPRAisWKyHxAzT1LvPuJYF+r6OwE=\n"
    "-----END EC PRIVATE KEY-----\n";

/* OpenSSL would ask at the terminal, or else at standard input, and the control thread
 * would wait for the answer. */
static void a_locked_key_is_not_asked_about(void **state) {
    (void)state;
    char address[64];
    char cert[256];
    char key[256];
    char answer[16] = "";
    int typed[2];
    struct agent *agent;
    char *directory = make_certificates();
    start_tls_agent(directory, false, address, sizeof address, &agent);
    snprintf(cert, sizeof cert, "%s/dc1-client-consul-0.pem", directory);
    snprintf(key, sizeof key, "%s/locked.pem", directory);
    FILE *file = fopen(key, "we");
    assert_non_null(file);
    assert_true(fputs(locked_key, file) >= 0 && fclose(file) == 0);

    (void)setsid(); /* no terminal */
    int before = dup(STDIN_FILENO);
    assert_int_equal(pipe(typed), 0);
    assert_int_equal(write(typed[1], "secret\n", 7), 7);
    assert_int_equal(dup2(typed[0], STDIN_FILENO), STDIN_FILENO);
    assert_tls_fails(address,
                     SETTINGS({"CONSUL_HTTP_SSL", "1"}, {"CONSUL_HTTP_SSL_VERIFY", "0"},
                              {"CONSUL_CLIENT_CERT", cert}, {"CONSUL_CLIENT_KEY", key}));
    close(typed[1]);
    assert_int_equal(read(typed[0], answer, sizeof answer), 7); /* still there */
    dup2(before, STDIN_FILENO);
    close(before);
    close(typed[0]);
    agent_stop(agent);
    agent_remove_directory(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tls_verifies_the_agent),
        cmocka_unit_test(tls_shows_a_certificate_of_its_own),
        cmocka_unit_test(a_locked_key_is_not_asked_about),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
