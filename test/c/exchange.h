/*
 * Requests by http.h, sent and waited for from a test's thread.
 */
#ifndef MESHX_TEST_EXCHANGE_H
#define MESHX_TEST_EXCHANGE_H

#include "http.h"
#include "support.h"
#include "web_server.h"
#include <semaphore.h>

enum { LONG = 60000, MAX_EXCHANGES = 64 };

struct context {
    struct meshx_loop *loop;
    struct web_server *server;
    struct endpoint endpoint;
    struct http *http;
    int new_code;
};

/* One request and what came of it. Written on the control thread until |done|. */
struct exchange {
    struct context *context;
    struct http_request request;
    bool free_http_in_callback;
    struct exchange *then; /* sent from the callback */
    int code;
    bool sent;
    bool called_too_early;
    int calls;
    struct meshx_failure failure; /* MESHX_OK: there is an answer */
    long status;
    size_t size;
    char body[4096];
    sem_t done;
};

/* Starts a loop with an http; |settings| as in endpoint_init(). */
void context_begin(struct context *context, const struct meshx_setting *settings);
/* Ends both, and the server if there is one. */
void context_finish(struct context *context);
/* On the control thread: http_new(), its result in |new_code|; http_free(). */
void context_make_http(void *argument);
void context_drop_http(void *argument);

void exchange_init(struct exchange *exchange, struct context *context, const char *path,
                   uint32_t timeout);
/* On the control thread. */
void exchange_send(void *argument);
/* Sends a GET; exchange_end() waits for what comes of it: one callback, and not too
 * early. */
void exchange_begin(struct exchange *exchange, struct context *context, const char *path,
                    uint32_t timeout);
void exchange_end(struct exchange *exchange);
/* Both in one, with any request; with a GET that may take as long as it likes. */
void exchange_run(struct exchange *exchange, struct context *context,
                  const struct http_request *request);
void exchange_get(struct exchange *exchange, struct context *context, const char *path);

void assert_contains(const char *text, const char *part);

#endif
