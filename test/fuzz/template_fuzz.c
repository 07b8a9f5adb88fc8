/*
 * The registration: whatever a user's templates add, what the carrier depends on is ours
 * and stands there once, in every spelling an agent would take for it. Input: the
 * service's template, a NUL, the upstreams' template.
 */
#include "fuzz.h"

#include "document.h"

#include <ctype.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static const struct document_upstream upstreams[] = {
    {.service_name = "b-at-host", .bind_address = "127.0.0.1", .port = 22001},
    {.service_name = "c-at-host", .bind_address = "127.0.0.1", .port = 22002},
};

static struct document_registration registration = {
    .node = "a@host",
    .service_id = "a-at-host",
    .service_name = "a-name",
    .listen_address = "127.0.0.1",
    .listen_port = 4711,
    .sidecar_address = "10.0.0.1",
    .sidecar_port = 21000,
    .vm_check_id = "a-at-host:vm",
    .sidecar_check_id = "a-at-host:sidecar",
    .ttl = 15000,
    .deregister_after = 60000,
    .upstreams = upstreams,
    .upstream_count = 2,
};

/* Consul's decoder ignores case, and underscores in some names. */
static bool is_taken_for(const char *key, const char *ours) {
    for (;; key++, ours++) {
        while (*key == '_') {
            key++;
        }
        if (tolower((unsigned char)*key) != tolower((unsigned char)*ours)) {
            return false;
        }
        if (*ours == '\0') {
            return true;
        }
    }
}

/* The value of |key|, to which no other key of |object| amounts. */
static json_t *only(json_t *object, const char *key) {
    const char *other;
    json_t *value;
    CHECK(json_is_object(object));
    json_object_foreach(object, other, value) {
        CHECK(strcmp(other, key) == 0 || !is_taken_for(other, key));
    }
    return json_object_get(object, key);
}

static void check_text(json_t *object, const char *key, const char *text) {
    json_t *value = only(object, key);
    CHECK(json_is_string(value) && strcmp(json_string_value(value), text) == 0);
}

static void check_number(json_t *object, const char *key, int number) {
    json_t *value = only(object, key);
    CHECK(json_is_integer(value) && json_integer_value(value) == number);
}

static void check_check(json_t *object, const char *id) {
    json_t *check = json_array_get(only(object, "Checks"), 0);
    check_text(check, "CheckID", id);
    check_text(check, "TTL", "15000ms");
    check_text(check, "Status", "critical");
}

static void check_document(const char *text) {
    json_error_t error;
    json_t *document = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (document == NULL) {
        /* A template as deep as jansson reads is deeper where it is merged in. */
        CHECK(json_error_code(&error) == json_error_stack_overflow);
        return;
    }
    check_text(document, "ID", registration.service_id);
    check_text(document, "Name", registration.service_name);
    check_number(document, "Port", registration.listen_port);
    json_t *node = json_object_get(only(document, "Meta"), DOCUMENT_META_NODE);
    CHECK(json_is_string(node) && strcmp(json_string_value(node), "a@host") == 0);
    check_check(document, registration.vm_check_id);
    check_text(json_array_get(only(document, "Checks"), 0),
               "DeregisterCriticalServiceAfter", "60000ms");

    json_t *sidecar = only(only(document, "Connect"), "SidecarService");
    check_text(sidecar, "Address", registration.sidecar_address);
    check_number(sidecar, "Port", registration.sidecar_port);
    check_check(sidecar, registration.sidecar_check_id);

    json_t *proxy = only(sidecar, "Proxy");
    check_text(proxy, "LocalServiceAddress", registration.listen_address);
    check_number(proxy, "LocalServicePort", registration.listen_port);
    json_t *list = only(proxy, "Upstreams");
    for (size_t i = 0; i < registration.upstream_count; i++) {
        json_t *upstream = json_array_get(list, i);
        check_text(upstream, "DestinationName", upstreams[i].service_name);
        check_text(upstream, "LocalBindAddress", upstreams[i].bind_address);
        check_number(upstream, "LocalBindPort", upstreams[i].port);
    }
    json_decref(document);
}

static bool is_object(const char *text) {
    json_t *value = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    bool result = json_is_object(value);
    json_decref(value);
    return result;
}

static bool check_template(const char *text) {
    struct meshx_failure failure = {0};
    int code = document_check_template(text, &failure);
    CHECK((code == MESHX_OK) == is_object(text));
    if (code != MESHX_OK) {
        CHECK(code == MESHX_ECONFIG);
        fuzz_check_failure(code, &failure);
    }
    return code == MESHX_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input input = {data, size};
    char *service = fuzz_text(fuzz_until(&input, '\0'));
    char *upstream = fuzz_text(fuzz_until(&input, '\0'));
    bool readable =
        check_template(service) && (*upstream == '\0' || check_template(upstream));
    registration.service_template = service;
    registration.upstream_template = *upstream == '\0' ? NULL : upstream;

    struct meshx_failure failure = {0};
    char *text = NULL;
    int code = document_registration(&registration, &text, &failure);
    if (code == MESHX_OK) {
        CHECK(readable);
        check_document(text);
        char *again = NULL;
        CHECK(document_registration(&registration, &again, NULL) == MESHX_OK);
        CHECK(strcmp(text, again) == 0);
        free(again);
    } else {
        CHECK(code == MESHX_ECONFIG && text == NULL);
        fuzz_check_failure(code, &failure);
    }
    free(text);
    free(upstream);
    free(service);
    return 0;
}
