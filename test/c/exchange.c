/* See exchange.h. */
#include "exchange.h"
#include "control.h"
#include <string.h>

/* ---- with and without a server ---- */

void context_make_http(void *argument) {
    struct context *context = argument;
    context->new_code = http_new(context->loop, &context->endpoint, 2, &context->http);
}

void context_drop_http(void *argument) {
    struct context *context = argument;
    http_free(context->http);
    context->http = NULL;
}

/* |settings| as in endpoint_init(). */
void context_begin(struct context *context, const struct meshx_setting *settings) {
    struct meshx_failure failure = {0};
    *context = (struct context){0};
    if (endpoint_init(&context->endpoint, settings, &failure) != MESHX_OK) {
        fail_msg("%s", failure.text);
    }
    assert_int_equal(meshx_loop_start(&context->loop), MESHX_OK);
    control_run(context->loop, context_make_http, context);
    assert_int_equal(context->new_code, MESHX_OK);
}

void context_finish(struct context *context) {
    control_run(context->loop, context_drop_http, context);
    meshx_loop_stop(context->loop, 0);
    endpoint_fini(&context->endpoint);
    if (context->server != NULL) {
        web_server_stop(context->server);
    }
}
/* ---- requests ---- */

static void on_done(const struct meshx_failure *failure, const struct http_answer *answer,
                    void *argument) {
    struct exchange *exchange = argument;
    exchange->called_too_early = !exchange->sent;
    exchange->calls++;
    if (failure != NULL) {
        exchange->failure = *failure;
    } else {
        exchange->status = answer->status;
        exchange->size = answer->size;
        if (answer->size < sizeof exchange->body && answer->body[answer->size] == '\0') {
            memcpy(exchange->body, answer->body, answer->size + 1);
        }
    }
    if ((failure == NULL) == (answer == NULL)) {
        exchange->calls = -1;
    }
    if (exchange->then != NULL) {
        exchange_send(exchange->then);
    }
    if (exchange->free_http_in_callback) {
        context_drop_http(exchange->context);
    }
    sem_post(&exchange->done);
}

void exchange_send(void *argument) {
    struct exchange *exchange = argument;
    exchange->code =
        http_send(exchange->context->http, &exchange->request, on_done, exchange);
    exchange->sent = true;
}

void exchange_init(struct exchange *exchange, struct context *context, const char *path,
                   uint32_t timeout) {
    *exchange =
        (struct exchange){.context = context, .request = {"GET", path, NULL, timeout}};
    sem_init(&exchange->done, 0, 0);
}

void exchange_begin(struct exchange *exchange, struct context *context, const char *path,
                    uint32_t timeout) {
    exchange_init(exchange, context, path, timeout);
    control_run(context->loop, exchange_send, exchange);
    assert_int_equal(exchange->code, MESHX_OK);
}

void exchange_end(struct exchange *exchange) {
    control_wait(&exchange->done);
    assert_false(exchange->called_too_early);
    assert_int_equal(exchange->calls, 1);
}

void exchange_run(struct exchange *exchange, struct context *context,
                  const struct http_request *request) {
    exchange_init(exchange, context, NULL, 0);
    exchange->request = *request;
    control_run(context->loop, exchange_send, exchange);
    assert_int_equal(exchange->code, MESHX_OK);
    exchange_end(exchange);
}

void exchange_get(struct exchange *exchange, struct context *context, const char *path) {
    exchange_run(exchange, context, &(struct http_request){"GET", path, NULL, LONG});
}

void assert_contains(const char *text, const char *part) {
    if (strstr(text, part) == NULL) {
        fail_msg("\"%s\" is not in: %s", part, text);
    }
}
