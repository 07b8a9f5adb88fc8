/*
 * HTTP to the Consul agent: libcurl's multi interface driven by the loop; only the files
 * of http know curl. L3, control thread only.
 *
 * A bounded number of connections to the agent, kept alive; requests wait for one, so
 * those that the agent answers only when something happens have an http of their own.
 * Every request has a deadline and its callback is called exactly once, later (never from
 * within http_send()), unless http_free() comes first: then it is never called.
 */
#ifndef MESHX_CORE_HTTP_H
#define MESHX_CORE_HTTP_H

#include "loop.h"
#include "endpoint.h"

/* Longest body accepted from the agent; a longer answer is MESHX_EAGENT_ANSWER. */
#define HTTP_MAX_BODY ((size_t)16 * 1024 * 1024)

struct http;

struct http_request {
    const char *method; /* "GET", "PUT" */
    const char *path;   /* begins with '/', already percent-encoded, with its query */
    const char *body;   /* JSON text or NULL */
    uint32_t timeout;   /* milliseconds, whole request */
};

struct http_answer {
    long status;
    const char *body; /* NUL-terminated, borrowed during the callback */
    size_t size;
    uint64_t index; /* X-Consul-Index; 0: it has none */
};

/*
 * |failure| != NULL: no whole answer, |answer| is NULL. After MESHX_EAGENT_UNREACHABLE,
 * _TLS, MESHX_ECONFIG (token file unreadable) and MESHX_ENOMEM the agent has not got the
 * request; after _TIMEOUT and _ANSWER (connection broken, or not HTTP, or too long) it
 * may have done what was asked. Any status is an answer.
 */
typedef void (*http_done)(const struct meshx_failure *failure,
                          const struct http_answer *answer, void *argument);

/* With so many connections at most. |endpoint| is borrowed and must outlive the http. */
int http_new(struct meshx_loop *loop, const struct endpoint *endpoint, long connections,
             struct http **out);

/* Begins a request; all of |request| is copied. MESHX_OK or MESHX_ENOMEM (no callback).
 */
int http_send(struct http *http, const struct http_request *request, http_done done,
              void *argument);

/* Cancels what is under way without callbacks; frees in the background. NULL is allowed.
 */
void http_free(struct http *http);

/* curl_global_init(), once a process; any thread. */
int http_global_init(void);

#endif
