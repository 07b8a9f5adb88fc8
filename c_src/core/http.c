/*
 * HTTP to the agent: curl on the loop, after curl's docs/examples/multi-uv.c. Nothing but
 * this and http_failure.c knows curl. Control thread only.
 *
 * curl tells us which sockets to watch (on_socket) and when to wake it (on_wake_time); we
 * tell it what happened (on_ready, on_wake). Finished calls are reported only after curl
 * has returned, because a callback may do anything, http_free() included; then |freed| is
 * set and the struct lives on until the report has returned.
 *
 * A call's own timer is its deadline, since curl's does not run while the call waits for
 * a connection. It also brings failures that are known within http_send() or within curl,
 * where nobody may be called.
 *
 * A watcher may outlive its http: it is freed in its handle's close callback, and the
 * handle is closed before curl closes the socket.
 */
#include "http.h"
#include "error.h"
#include "http_failure.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_REDIRECTS = 3 };

/* A socket of curl that is watched. */
struct watcher {
    struct http *http;
    curl_socket_t socket;
    uv_poll_t poll;
    struct watcher *next;
    struct watcher *previous;
};

struct call {
    struct http *http;
    CURL *easy;
    struct loop_timer *timer;
    struct curl_slist *headers;
    struct buf url;
    struct buf body;
    bool too_large;
    bool out_of_memory;
    bool may_redirect;
    int redirects;
    uint32_t timeout;
    struct meshx_failure failure; /* to report when the timer fires, unless MESHX_OK */
    char error[CURL_ERROR_SIZE];
    http_done done;
    void *argument;
    struct call *next;
    struct call *previous;
};

struct http {
    struct meshx_loop *loop;
    const struct endpoint *endpoint;
    CURLM *multi;
    struct loop_timer *timer; /* curl's */
    struct buf url;           /* the endpoint's, with the server name as its host */
    struct curl_slist *connect_to;
    struct buf certificates; /* all files of CONSUL_CAPATH */
    struct watcher *watchers;
    struct call *calls;
    bool reporting;
    bool freed;
};

static pthread_once_t global_once = PTHREAD_ONCE_INIT;
static CURLcode global_result;

static void init_global(void) {
    global_result = curl_global_init(CURL_GLOBAL_DEFAULT);
}

int http_global_init(void) {
    pthread_once(&global_once, init_global);
    return global_result == CURLE_OK ? MESHX_OK : MESHX_ENOMEM;
}

/* ---- calls ---- */

static void call_free(struct call *call) {
    curl_easy_cleanup(call->easy);
    curl_slist_free_all(call->headers);
    loop_timer_free(call->timer);
    buf_fini(&call->url);
    buf_fini(&call->body);
    free(call);
}

static void unlink_call(struct call *call) {
    if (call->next != NULL) {
        call->next->previous = call->previous;
    }
    if (call->previous != NULL) {
        call->previous->next = call->next;
    } else {
        call->http->calls = call->next;
    }
}

static void watcher_free(uv_handle_t *handle) {
    free(handle->data);
}

static void unwatch(struct watcher *watcher) {
    if (watcher->next != NULL) {
        watcher->next->previous = watcher->previous;
    }
    if (watcher->previous != NULL) {
        watcher->previous->next = watcher->next;
    } else {
        watcher->http->watchers = watcher->next;
    }
    uv_close((uv_handle_t *)&watcher->poll, watcher_free);
}

/* Accepts a half-built one. curl's callbacks do nothing any more. */
static void destroy(struct http *http) {
    http->freed = true;
    while (http->watchers != NULL) {
        unwatch(http->watchers);
    }
    struct call *call = http->calls;
    while (call != NULL) {
        struct call *next = call->next;
        curl_multi_remove_handle(http->multi, call->easy);
        call_free(call);
        call = next;
    }
    curl_multi_cleanup(http->multi);
    curl_slist_free_all(http->connect_to);
    loop_timer_free(http->timer);
    buf_fini(&http->url);
    buf_fini(&http->certificates);
    free(http);
}

/* Ends the call. False: |http| has been freed by the callback. */
static bool report(struct call *call, const struct meshx_failure *failure,
                   const struct http_answer *answer) {
    struct http *http = call->http;
    unlink_call(call);
    curl_multi_remove_handle(http->multi, call->easy);
    http->reporting = true;
    call->done(failure, answer, call->argument);
    http->reporting = false;
    call_free(call);
    if (http->freed) {
        destroy(http);
        return false;
    }
    return true;
}

static void explain(const struct call *call, CURLcode result,
                    struct meshx_failure *failure) {
    struct http_transfer transfer = {.endpoint = call->http->endpoint,
                                     .result = result,
                                     .words = call->error,
                                     .too_large = call->too_large,
                                     .limit = HTTP_MAX_BODY,
                                     .out_of_memory = call->out_of_memory};
    curl_easy_getinfo(call->easy, CURLINFO_OS_ERRNO, &transfer.error_number);
    curl_easy_getinfo(call->easy, CURLINFO_SSL_VERIFYRESULT, &transfer.verify_result);
    http_failure_set(&transfer, failure);
}

/* Whether |url| is at the agent too: nobody else may see our token. */
static bool is_same_origin(const struct http *http, const char *url) {
    const char *base = buf_text(&http->url);
    size_t size = (size_t)(strstr(base, "://") + 3 - base);
    size += strcspn(base + size, "/");
    return strncmp(url, base, size) == 0 && url[size] == '/';
}

/* Sends the call again to where a redirect points. Consul does so when a path is not
 * written its way. False: the answer stands as it is. */
static bool follow(struct call *call, long status) {
    char *location = NULL;
    if (status < 300 || status > 399 || !call->may_redirect ||
        call->redirects == MAX_REDIRECTS ||
        curl_easy_getinfo(call->easy, CURLINFO_REDIRECT_URL, &location) != CURLE_OK ||
        location == NULL || !is_same_origin(call->http, location) ||
        curl_easy_setopt(call->easy, CURLOPT_URL, location) != CURLE_OK) {
        return false;
    }
    call->redirects++;
    buf_consume(&call->body, call->body.size);
    curl_multi_remove_handle(call->http->multi, call->easy);
    if (curl_multi_add_handle(call->http->multi, call->easy) != CURLM_OK) {
        error_set(&call->failure, MESHX_ENOMEM, "out of memory");
        loop_timer_start(call->timer, 0);
    }
    return true;
}

/* X-Consul-Index, for blocking queries. An old curl can't tell: they are asked anew. */
static uint64_t index_of(CURL *easy) {
#if LIBCURL_VERSION_NUM >= 0x075400
    struct curl_header *header = NULL;
    curl_easy_header(easy, "X-Consul-Index", 0, CURLH_HEADER, -1, &header);
    return header != NULL ? strtoull(header->value, NULL, 10) : 0;
#else
    return 0;
#endif
}

/* Reports the calls that curl has finished. The http may be freed after that. */
static void deliver(struct http *http) {
    CURLMsg *message;
    int left;
    while ((message = curl_multi_info_read(http->multi, &left)) != NULL) {
        CURLcode result = message->data.result;
        char *private = NULL;
        long status = 0;
        curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &private);
        curl_easy_getinfo(message->easy_handle, CURLINFO_RESPONSE_CODE, &status);
        struct call *call = (struct call *)private;
        bool lives = true;
        if (result != CURLE_OK) {
            explain(call, result, &call->failure);
            lives = report(call, &call->failure, NULL);
        } else if (!follow(call, status)) {
            struct http_answer answer = {status, buf_text(&call->body), call->body.size,
                                         index_of(call->easy)};
            lives = report(call, NULL, &answer);
        }
        if (!lives) {
            return;
        }
    }
}

static void on_call_timer(void *argument) {
    struct call *call = argument;
    if (call->failure.code == MESHX_OK) {
        error_set(&call->failure, MESHX_EAGENT_TIMEOUT,
                  "Consul agent at %s did not answer within %u ms; is it overloaded, or "
                  "its cluster without a leader?",
                  call->http->endpoint->shown, call->timeout);
    }
    report(call, &call->failure, NULL);
}

static size_t on_body(char *data, size_t size, size_t count, void *context) {
    struct call *call = context;
    size *= count; /* curl: |size| is always 1 */
    if (size > HTTP_MAX_BODY - call->body.size) {
        call->too_large = true;
        return 0;
    }
    if (buf_append(&call->body, data, size) != MESHX_OK) {
        call->out_of_memory = true;
        return 0;
    }
    return size;
}

/* ---- curl's sockets and timer ---- */

static void on_ready(uv_poll_t *poll, int status, int events) {
    struct watcher *watcher = poll->data;
    struct http *http = watcher->http;
    /* On an error curl shall read and write, to see which: told of an error, it would not
     * send again what got lost with a connection that the agent closed. */
    int ready = status < 0 ? CURL_CSELECT_IN | CURL_CSELECT_OUT : 0;
    int running;
    if (events & UV_READABLE) {
        ready |= CURL_CSELECT_IN;
    }
    if (events & UV_WRITABLE) {
        ready |= CURL_CSELECT_OUT;
    }
    curl_multi_socket_action(http->multi, watcher->socket, ready, &running);
    deliver(http);
}

static void on_wake(void *argument) {
    struct http *http = argument;
    int running;
    curl_multi_socket_action(http->multi, CURL_SOCKET_TIMEOUT, 0, &running);
    deliver(http);
}

static int on_wake_time(CURLM *multi, long timeout_ms, void *context) {
    struct http *http = context;
    (void)multi;
    if (http->freed) {
        return 0;
    }
    if (timeout_ms < 0) {
        loop_timer_stop(http->timer);
    } else {
        loop_timer_start(http->timer, (uint64_t)timeout_ms);
    }
    return 0;
}

/* 0 and |*out|, else libuv's error. */
static int watch(struct http *http, curl_socket_t socket, struct watcher **out) {
    struct watcher *watcher = calloc(1, sizeof *watcher);
    if (watcher == NULL) {
        return UV_ENOMEM;
    }
    int error = uv_poll_init_socket(loop_uv(http->loop), &watcher->poll, socket);
    if (error != 0) {
        free(watcher);
        return error;
    }
    watcher->poll.data = watcher;
    watcher->http = http;
    watcher->socket = socket;
    watcher->next = http->watchers;
    if (watcher->next != NULL) {
        watcher->next->previous = watcher;
    }
    http->watchers = watcher;
    *out = watcher;
    return 0;
}

/* Fails one call rather than telling curl, which would give up all of them. */
static void fail_call_of(CURL *easy, int error) {
    char *private = NULL;
    curl_easy_getinfo(easy, CURLINFO_PRIVATE, &private);
    struct call *call = (struct call *)private;
    if (call != NULL) {
        error_set(&call->failure, error == UV_ENOMEM ? MESHX_ENOMEM : MESHX_ESYSTEM,
                  "can't watch the connection to the Consul agent at %s: %s",
                  call->http->endpoint->shown, uv_strerror(error));
        loop_timer_start(call->timer, 0);
    }
}

static int on_socket(CURL *easy, curl_socket_t socket, int action, void *context,
                     void *assigned) {
    struct http *http = context;
    struct watcher *watcher = assigned;
    if (http->freed) {
        return 0;
    }
    if (action == CURL_POLL_REMOVE) {
        if (watcher != NULL) {
            curl_multi_assign(http->multi, socket, NULL);
            unwatch(watcher);
        }
        return 0;
    }
    if (watcher == NULL) {
        int error = watch(http, socket, &watcher);
        if (error != 0) {
            fail_call_of(easy, error);
            return 0;
        }
        curl_multi_assign(http->multi, socket, watcher);
    }
    int events = 0;
    if (action != CURL_POLL_OUT) {
        events |= UV_READABLE;
    }
    if (action != CURL_POLL_IN) {
        events |= UV_WRITABLE;
    }
    uv_poll_start(&watcher->poll, events, on_ready);
    return 0;
}

/* ---- options ---- */

static bool set_long(CURL *easy, CURLoption option, long value) {
    return curl_easy_setopt(easy, option, value) == CURLE_OK;
}

/* NULL: curl's default stays. */
static bool set_text(CURL *easy, CURLoption option, const char *text) {
    return text == NULL || curl_easy_setopt(easy, option, text) == CURLE_OK;
}

/* The files of CONSUL_CAPATH as one: OpenSSL alone would want them named by hash. */
static bool set_ca_path(const struct http *http, CURL *easy) {
    struct curl_blob blob = {http->certificates.data, http->certificates.size,
                             CURL_BLOB_NOCOPY};
    return curl_easy_setopt(easy, CURLOPT_CAINFO_BLOB, &blob) == CURLE_OK ||
           set_text(easy, CURLOPT_CAPATH, http->endpoint->ca_path);
}

static bool set_tls(const struct http *http, CURL *easy) {
    const struct endpoint *endpoint = http->endpoint;
    /* Who names certificate authorities trusts only these, not the system's too. */
    if (endpoint->ca_file != NULL || endpoint->ca_path != NULL) {
        curl_easy_setopt(easy, CURLOPT_CAPATH, NULL);
    }
    if (endpoint->ca_file == NULL && endpoint->ca_path != NULL &&
        !set_ca_path(http, easy)) {
        return false;
    }
    return set_long(easy, CURLOPT_SSL_VERIFYPEER, endpoint->verify ? 1 : 0) &&
           set_long(easy, CURLOPT_SSL_VERIFYHOST, endpoint->verify ? 2 : 0) &&
           set_text(easy, CURLOPT_CAINFO, endpoint->ca_file) &&
           set_text(easy, CURLOPT_SSLCERT, endpoint->client_cert) &&
           set_text(easy, CURLOPT_SSLKEY, endpoint->client_key) &&
           /* Without a password OpenSSL asks at the terminal, and we would wait. */
           set_text(easy, CURLOPT_KEYPASSWD, "");
}

static bool set_connection(const struct http *http, CURL *easy) {
    const struct endpoint *endpoint = http->endpoint;
#if LIBCURL_VERSION_NUM >= 0x075500
    bool ok = set_text(easy, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    bool ok = set_long(easy, CURLOPT_PROTOCOLS, CURLPROTO_HTTP | CURLPROTO_HTTPS);
#endif
#if LIBCURL_VERSION_NUM >= 0x075700
    /* Never wait for a name resolver's thread. */
    ok = ok && set_long(easy, CURLOPT_QUICK_EXIT, 1);
#endif
    return ok && set_long(easy, CURLOPT_NOSIGNAL, 1) &&
           set_long(easy, CURLOPT_HTTP_VERSION, CURL_HTTP_VERSION_1_1) &&
           set_text(easy, CURLOPT_PROXY, "") && /* whatever the environment says */
           set_text(easy, CURLOPT_USERAGENT, "meshx_node") &&
           set_text(easy, CURLOPT_UNIX_SOCKET_PATH, endpoint->unix_socket) &&
           set_text(easy, CURLOPT_USERPWD, endpoint->auth) &&
           (http->connect_to == NULL ||
            curl_easy_setopt(easy, CURLOPT_CONNECT_TO, http->connect_to) == CURLE_OK) &&
           (strncmp(endpoint->url, "https:", 6) != 0 || set_tls(http, easy));
}

static bool add_header(struct call *call, const char *header) {
    struct curl_slist *headers = curl_slist_append(call->headers, header);
    if (headers == NULL) {
        return false;
    }
    call->headers = headers;
    return true;
}

/* Method, body, headers. A token file that can't be read becomes |call->failure|. */
static bool set_request(struct call *call, const struct http_request *request) {
    struct buf header = {0};
    bool is_get = strcmp(request->method, "GET") == 0;
    bool ok = true;
    if (!is_get) {
        const char *body = request->body != NULL ? request->body : "";
        /* PUT as POST of another name, so that curl has the body at hand to send again
         * when the agent has closed the idle connection. */
        ok = set_text(call->easy, CURLOPT_COPYPOSTFIELDS, body) &&
             set_text(call->easy, CURLOPT_CUSTOMREQUEST, request->method) &&
             add_header(call, "Content-Type: application/json") &&
             add_header(call, "Expect:"); /* don't wait for "100 Continue" */
    }
    ok = ok && buf_append_text(&header, "X-Consul-Token: ") == MESHX_OK;
    if (ok) {
        size_t name_size = header.size;
        ok =
            endpoint_token(call->http->endpoint, &header, &call->failure) != MESHX_ENOMEM;
        if (ok && header.size > name_size) {
            ok = add_header(call, buf_text(&header));
        }
        explicit_bzero(header.data, header.size);
    }
    buf_fini(&header);
    call->may_redirect = is_get;
    return ok &&
           curl_easy_setopt(call->easy, CURLOPT_HTTPHEADER, call->headers) == CURLE_OK;
}

static bool set_url(struct call *call, const char *path) {
    const char *base = buf_text(&call->http->url);
    const char *query = call->http->endpoint->query;
    return buf_append_text(&call->url, base) == MESHX_OK &&
           buf_append_text(&call->url, path) == MESHX_OK &&
           (query == NULL ||
            buf_format(&call->url, "%c%s", strchr(path, '?') != NULL ? '&' : '?',
                       query) == MESHX_OK) &&
           set_text(call->easy, CURLOPT_URL, buf_text(&call->url));
}

static bool set_callbacks(struct call *call) {
    CURL *easy = call->easy;
    return curl_easy_setopt(easy, CURLOPT_PRIVATE, call) == CURLE_OK &&
           curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, call->error) == CURLE_OK &&
           curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body) == CURLE_OK &&
           curl_easy_setopt(easy, CURLOPT_WRITEDATA, call) == CURLE_OK;
}

int http_send(struct http *http, const struct http_request *request, http_done done,
              void *argument) {
    struct call *call = calloc(1, sizeof *call);
    if (call == NULL) {
        return MESHX_ENOMEM;
    }
    call->http = http;
    call->done = done;
    call->argument = argument;
    call->timeout = request->timeout;
    call->easy = curl_easy_init();
    if (call->easy == NULL ||
        loop_timer_new(http->loop, on_call_timer, call, &call->timer) != MESHX_OK ||
        !set_callbacks(call) || !set_connection(http, call->easy) ||
        !set_url(call, request->path) || !set_request(call, request)) {
        goto fail;
    }
    if (call->failure.code == MESHX_OK &&
        curl_multi_add_handle(http->multi, call->easy) != CURLM_OK) {
        goto fail;
    }
    call->next = http->calls;
    if (call->next != NULL) {
        call->next->previous = call;
    }
    http->calls = call;
    loop_timer_start(call->timer, call->failure.code == MESHX_OK ? request->timeout : 0);
    return MESHX_OK;

fail:
    call_free(call);
    return MESHX_ENOMEM;
}

/* ---- the http itself ---- */

/* With CONSUL_TLS_SERVER_NAME the URL has that name, which curl then sends as SNI and
 * verifies, and a connect-to rule leads to the real address. */
static int set_base_url(struct http *http) {
    const struct endpoint *endpoint = http->endpoint;
    if (endpoint->server_name == NULL || strncmp(endpoint->url, "https://", 8) != 0) {
        return buf_append_text(&http->url, endpoint->url);
    }
    struct buf rule = {0};
    int code = buf_format(&http->url, "https://%s%s", endpoint->server_name,
                          endpoint->url + 8 + strlen(endpoint->host));
    if (code == MESHX_OK) {
        code = buf_format(&rule, "::%s:%u", endpoint->host, endpoint->port);
    }
    if (code == MESHX_OK) {
        http->connect_to = curl_slist_append(NULL, buf_text(&rule));
        code = http->connect_to != NULL ? MESHX_OK : MESHX_ENOMEM;
    }
    buf_fini(&rule);
    return code;
}

static bool set_multi(struct http *http, long connections) {
    CURLM *multi = http->multi;
    return curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket) == CURLM_OK &&
           curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, http) == CURLM_OK &&
           curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_wake_time) == CURLM_OK &&
           curl_multi_setopt(multi, CURLMOPT_TIMERDATA, http) == CURLM_OK &&
           curl_multi_setopt(multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, connections) ==
               CURLM_OK &&
           curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, connections) == CURLM_OK;
}

int http_new(struct meshx_loop *loop, const struct endpoint *endpoint, long connections,
             struct http **out) {
    struct http *http = calloc(1, sizeof *http);
    if (http == NULL) {
        return MESHX_ENOMEM;
    }
    http->loop = loop;
    http->endpoint = endpoint;
    if (http_global_init() != MESHX_OK || set_base_url(http) != MESHX_OK ||
        endpoint_certificates(endpoint, &http->certificates) != MESHX_OK ||
        loop_timer_new(loop, on_wake, http, &http->timer) != MESHX_OK) {
        goto fail;
    }
    http->multi = curl_multi_init();
    if (http->multi == NULL || !set_multi(http, connections)) {
        goto fail;
    }
    *out = http;
    return MESHX_OK;

fail:
    destroy(http);
    return MESHX_ENOMEM;
}

void http_free(struct http *http) {
    if (http != NULL && http->reporting) {
        http->freed = true;
    } else if (http != NULL) {
        destroy(http);
    }
}
