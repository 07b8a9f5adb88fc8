/*
 * Typed calls to the local Consul agent. L3, control thread only.
 *
 * Callback rules are http.h's: exactly once, never from within the call, never after
 * consul_free(). A call returns MESHX_OK, or MESHX_ENOMEM and makes no callback.
 * Statuses become failures here: 403 MESHX_EAGENT_ACL, "No cluster leader"
 * (or no servers at all) MESHX_EAGENT_NO_LEADER, 429 and 503 MESHX_EAGENT_BUSY, other
 * 4xx/5xx MESHX_EAGENT_REFUSED with the agent's text; what 404 means is
 * said at each call. Every failure's text names the agent's address, what was asked and,
 * where there is one, the remedy.
 */
#ifndef MESHX_CORE_CONSUL_H
#define MESHX_CORE_CONSUL_H

#include "http.h"
#include "document.h"

struct consul;

/* Blocking queries that may be under way at once. */
#define CONSUL_QUERIES_MAX 2

/* Requests sent and failed so far. */
struct consul_counts {
    uint64_t requests;
    uint64_t failures;
};

/* |endpoint| is borrowed and must outlive the object. |timeout|: of one request, ms. */
int consul_new(struct meshx_loop *loop, const struct endpoint *endpoint, uint32_t timeout,
               struct consul **out);
void consul_free(struct consul *consul);
struct consul_counts consul_counts(const struct consul *consul);

typedef void (*consul_done)(const struct meshx_failure *failure, void *argument);

/* PUT /v1/agent/service/register with |json|. */
int consul_register(struct consul *consul, const char *json, consul_done done,
                    void *argument);

/* PUT /v1/agent/service/deregister/:id. An unknown ID (404, or 500 "Unknown service") is
 * success: it is not registered. */
int consul_deregister(struct consul *consul, const char *service_id, consul_done done,
                      void *argument);

enum consul_check { CONSUL_PASS, CONSUL_FAIL };

/*
 * PUT /v1/agent/check/{pass,fail}/:check_id?note=. An unknown check (404; before 1.11 a
 * 500 that says so) is MESHX_ENODE_UNKNOWN: the agent has lost the registration.
 */
int consul_check(struct consul *consul, const char *check_id, enum consul_check status,
                 const char *note, consul_done done, void *argument);

/* GET /v1/agent/service/:id; |service| is NULL when there is none (404). */
typedef void (*consul_service_done)(const struct meshx_failure *failure,
                                    const struct document_service *service,
                                    void *argument);
int consul_service(struct consul *consul, const char *service_id,
                   consul_service_done done, void *argument);

/* Which instances: those of the service itself, or what a proxy would dial to reach it.
 */
enum consul_health { CONSUL_HEALTH_SERVICE, CONSUL_HEALTH_CONNECT };

/* GET /v1/health/{service,connect}/:name. None is an empty list. */
typedef void (*consul_instances_done)(const struct meshx_failure *failure,
                                      const struct document_instances *instances,
                                      void *argument);
int consul_instances(struct consul *consul, enum consul_health which,
                     const char *service_name, consul_instances_done done,
                     void *argument);

/* GET /v1/connect/intentions/check: may |source| connect to |destination|? */
typedef void (*consul_allowed_done)(const struct meshx_failure *failure, bool allowed,
                                    void *argument);
int consul_allowed(struct consul *consul, const char *source, const char *destination,
                   consul_allowed_done done, void *argument);

/*
 * GET /v1/connect/intentions/match: all that may decide what service |name| is one end
 * of. Needs no right but intentions:read on that service. The callback may take what it
 * gets by putting another document in its place.
 */
enum consul_end { CONSUL_SOURCE, CONSUL_DESTINATION };
typedef void (*consul_intentions_done)(const struct meshx_failure *failure,
                                       struct document_intentions *intentions,
                                       void *argument);
int consul_intentions(struct consul *consul, enum consul_end end, const char *name,
                      consul_intentions_done done, void *argument);

/*
 * Blocking queries: the agent answers when what is asked for is no longer as it was at
 * |index|, or after a minute as before; with index 0 at once. The callback's |index| is
 * the one to go on with; 0: this agent tells none. It may take what it gets by putting
 * another document in its place. They have connections of their own, so
 * that nothing waits for them.
 */

/*
 * GET /v1/connect/intentions, of which none is listed: the index says that there was a
 * change. (Of ../match only late versions tell one.) A token is told of every change,
 * also of intentions that it may not read.
 */
typedef void (*consul_changes_done)(const struct meshx_failure *failure, uint64_t index,
                                    void *argument);
int consul_watch_intentions(struct consul *consul, uint64_t index,
                            consul_changes_done done, void *argument);

/* GET /v1/health/state/critical: of all node services and Consul nodes. */
typedef void (*consul_checks_done)(const struct meshx_failure *failure, uint64_t index,
                                   struct document_checks *checks, void *argument);
int consul_watch_critical(struct consul *consul, uint64_t index, consul_checks_done done,
                          void *argument);

/* GET /v1/health/state/any: the sidecar's check of every node service, in one answer that
 * is not waited for. */
int consul_sidecars(struct consul *consul, consul_checks_done done, void *argument);

#endif
