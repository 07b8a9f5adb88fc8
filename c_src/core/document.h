/*
 * Consul's JSON documents, in and out; document*.c alone know jansson. L1.
 *
 * Out: only fields that every Consul since 1.8 knows (an unknown field is a 400 there).
 * In: unknown fields are ignored; a field of the wrong type or malformed JSON is
 * MESHX_EAGENT_ANSWER with a text that says which.
 */
#ifndef MESHX_CORE_DOCUMENT_H
#define MESHX_CORE_DOCUMENT_H

#include "meshx_node.h"

/* Meta key of a node service under which the node name stands: what lookups compare. */
#define DOCUMENT_META_NODE "node"

/* Names of our two checks: by them others find them among all of a datacenter. */
#define DOCUMENT_VM_CHECK "Erlang VM"
#define DOCUMENT_SIDECAR_CHECK "Connect sidecar"

struct document_upstream {
    const char *service_name; /* DestinationName */
    const char *bind_address; /* LocalBindAddress */
    uint16_t port;            /* LocalBindPort */
};

/* What becomes the body of PUT /v1/agent/service/register. */
struct document_registration {
    const char *node;
    const char *service_id;
    const char *service_name;
    const char *listen_address; /* where the sidecar reaches the node */
    uint16_t listen_port;
    const char *sidecar_address; /* NULL: left out */
    uint16_t sidecar_port;
    const char *vm_check_id;       /* of the service */
    const char *sidecar_check_id;  /* of the sidecar */
    uint32_t ttl;                  /* milliseconds */
    uint32_t deregister_after;     /* milliseconds */
    const char *service_template;  /* JSON object text or NULL */
    const char *upstream_template; /* JSON object text or NULL */
    const struct document_upstream *upstreams;
    size_t upstream_count;
};

/*
 * Writes the registration to |*out| (new: caller frees with free()). Service
 * and sidecar have one TTL check each; both begin critical. The template is merged
 * recursively: objects merge, arrays (Checks, Upstreams) are joined, other values are
 * added where ours has none. What the carrier depends on (ID, Name, Port, Meta.node,
 * sidecar port, an upstream's destination and address) it may only give as it is. Returns
 * MESHX_OK, MESHX_ENOMEM or MESHX_ECONFIG (a template doesn't fit).
 */
int document_registration(const struct document_registration *registration, char **out,
                          struct meshx_failure *failure);

/* One instance of a service as /v1/health/{service,connect}/:name lists it. */
struct document_instance {
    char *node;       /* Service.Meta.node, NULL if it has none: then not one of ours */
    char *service_id; /* Service.ID */
    char *agent_node; /* Node.Node: the Consul node it is registered at */
    char *address; /* where it is reached: Service.Address, else Node.Address, or NULL */
    uint16_t port; /* 0: none */
    bool passing;  /* all its checks pass */
    char *trouble; /* output of the first check that does not pass, or NULL */
};

struct document_instances {
    struct document_instance *items;
    size_t count;
};

int document_parse_instances(const char *body, size_t size,
                             struct document_instances *out,
                             struct meshx_failure *failure);
void document_instances_fini(struct document_instances *instances);

/* A service of the local agent: GET /v1/agent/service/:id. */
struct document_service {
    char *node; /* Meta.node or NULL */
    char *address;
    uint16_t port;
    char *local_address; /* of a sidecar: where it dials its node; else NULL and 0 */
    uint16_t local_port;
};

int document_parse_service(const char *body, size_t size, struct document_service *out,
                           struct meshx_failure *failure);
void document_service_fini(struct document_service *service);

/* {"Allowed": true}, answer of /v1/connect/intentions/check. */
int document_parse_allowed(const char *body, size_t size, bool *out,
                           struct meshx_failure *failure);

/* One intention of those that /v1/connect/intentions/match lists. */
struct document_intention {
    char *source; /* a name or "*" */
    char *destination;
    char *action;       /* "allow", "deny"; "" or NULL: it has permissions instead */
    char *id;           /* "" or NULL: it has none */
    int64_t precedence; /* of two that match, the higher one decides */
    bool foreign;       /* one end has a namespace, partition or cluster of its own */
};

struct document_intentions {
    struct document_intention *items;
    size_t count;
};

/* Of one service: {"name": [...]}. */
int document_parse_intentions(const char *body, size_t size,
                              struct document_intentions *out,
                              struct meshx_failure *failure);
void document_intentions_fini(struct document_intentions *intentions);

/* A check of those that /v1/health/state/:state lists. */
struct document_check {
    char *agent_node;   /* the Consul node it is registered at */
    char *service_id;   /* "" or NULL: the Consul node's own */
    char *service_name; /* the same */
    char *trouble;      /* what it says, NULL if it passes */
};

struct document_checks {
    struct document_check *items;
    size_t count;
};

int document_parse_checks(const char *body, size_t size, struct document_checks *out,
                          struct meshx_failure *failure);
void document_checks_fini(struct document_checks *checks);

/* MESHX_OK if |text| is a JSON object, MESHX_ECONFIG with place and reason if not. */
int document_check_template(const char *text, struct meshx_failure *failure);

#endif
