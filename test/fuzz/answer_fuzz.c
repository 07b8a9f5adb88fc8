/*
 * The agent's answers: every parser takes every input. What it understands, it
 * understands again when written anew, and never of an answer that was cut. Input: the
 * answer.
 */
#include "fuzz.h"

#include "document.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static bool same(const char *a, const char *b) {
    return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

static void check_code(int code, const struct meshx_failure *failure) {
    CHECK(code == MESHX_EAGENT_ANSWER);
    fuzz_check_failure(code, failure);
}

/* The size of an answer that lacks its last token. */
static size_t cut(struct fuzz_input body) {
    while (body.size > 0 && strchr(" \t\r\n", body.bytes[body.size - 1]) != NULL) {
        body.size--;
    }
    CHECK(body.size > 0);
    return body.size - 1;
}

/* ---- instances ---- */

static json_t *instance_to_json(const struct document_instance *instance) {
    json_t *entry = json_pack("{s:{s:s}, s:{s:s}}", "Node", "Node", instance->agent_node,
                              "Service", "ID", instance->service_id);
    if (instance->node != NULL) {
        json_object_set_new(json_object_get(entry, "Service"), "Meta",
                            json_pack("{s:s}", DOCUMENT_META_NODE, instance->node));
    }
    if (instance->trouble != NULL) {
        json_object_set_new(entry, "Checks",
                            json_pack("[{s:s}, {s:s, s:s}]", "Status", "passing",
                                      "Status", "critical", "Output", instance->trouble));
    }
    CHECK(entry != NULL);
    return entry;
}

static void check_same_instances(const struct document_instances *a,
                                 const struct document_instances *b) {
    CHECK(a->count == b->count);
    for (size_t i = 0; i < a->count; i++) {
        CHECK(same(a->items[i].node, b->items[i].node));
        CHECK(same(a->items[i].service_id, b->items[i].service_id));
        CHECK(same(a->items[i].agent_node, b->items[i].agent_node));
        CHECK(same(a->items[i].trouble, b->items[i].trouble));
        CHECK(a->items[i].passing == b->items[i].passing);
    }
}

static void check_instances(struct fuzz_input body, const char *bytes) {
    struct document_instances found;
    struct document_instances again;
    struct meshx_failure failure = {0};
    int code = document_parse_instances(bytes, body.size, &found, &failure);
    if (code != MESHX_OK) {
        check_code(code, &failure);
        CHECK(found.items == NULL && found.count == 0);
        return;
    }
    json_t *list = json_array();
    for (size_t i = 0; i < found.count; i++) {
        const struct document_instance *instance = &found.items[i];
        CHECK(instance->agent_node != NULL && instance->service_id != NULL);
        CHECK(instance->passing == (instance->trouble == NULL));
        CHECK(instance->trouble == NULL || instance->trouble[0] != '\0');
        json_array_append_new(list, instance_to_json(instance));
    }
    char *text = json_dumps(list, 0);
    CHECK(text != NULL);
    CHECK(document_parse_instances(text, strlen(text), &again, &failure) == MESHX_OK);
    check_same_instances(&found, &again);
    document_instances_fini(&again);
    free(text);
    json_decref(list);
    document_instances_fini(&found);
    CHECK(document_parse_instances(bytes, cut(body), &found, &failure) ==
          MESHX_EAGENT_ANSWER);
}

/* ---- a service ---- */

static void check_service(struct fuzz_input body, const char *bytes) {
    struct document_service found;
    struct document_service again;
    struct meshx_failure failure = {0};
    int code = document_parse_service(bytes, body.size, &found, &failure);
    if (code != MESHX_OK) {
        check_code(code, &failure);
        CHECK(found.node == NULL && found.address == NULL && found.local_address == NULL);
        return;
    }
    CHECK(found.address != NULL);
    json_t *service =
        json_pack("{s:s, s:i, s:{s:s*}, s:{s:s*, s:i}}", "Address", found.address, "Port",
                  (int)found.port, "Meta", DOCUMENT_META_NODE, found.node, "Proxy",
                  "LocalServiceAddress", found.local_address, "LocalServicePort",
                  (int)found.local_port);
    char *text = json_dumps(service, 0);
    CHECK(text != NULL);
    CHECK(document_parse_service(text, strlen(text), &again, &failure) == MESHX_OK);
    CHECK(same(found.node, again.node));
    CHECK(same(found.address, again.address));
    CHECK(found.port == again.port);
    CHECK(same(found.local_address, again.local_address));
    CHECK(found.local_port == again.local_port);
    document_service_fini(&again);
    free(text);
    json_decref(service);
    document_service_fini(&found);
    CHECK(document_parse_service(bytes, cut(body), &found, &failure) ==
          MESHX_EAGENT_ANSWER);
}

/* ---- an intention ---- */

static void check_allowed(struct fuzz_input body, const char *bytes) {
    struct meshx_failure failure = {0};
    bool allowed = false;
    bool denied = true;
    int code = document_parse_allowed(bytes, body.size, &allowed, &failure);
    CHECK(document_parse_allowed(bytes, body.size, &denied, NULL) == code);
    if (code != MESHX_OK) {
        check_code(code, &failure);
        CHECK(!allowed && denied); /* a failure says nothing */
        return;
    }
    CHECK(allowed == denied);
    CHECK(document_parse_allowed(bytes, cut(body), &allowed, &failure) ==
          MESHX_EAGENT_ANSWER);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input body = {data, size};
    char *bytes = (char *)fuzz_block(data, size);
    check_instances(body, bytes);
    check_service(body, bytes);
    check_allowed(body, bytes);
    free(bytes);
    return 0;
}
