/*
 * Connects to a port until something accepts. Control thread only.
 *
 * One TCP handle and one timer serve all tries, so nothing is allocated after the start.
 * The timer is the pause between tries and the limit of each.
 *
 * States (function that makes the step):
 *   waiting -> connecting   begin_try, when the timer fires
 *   connecting -> closing   end_try: connected, refused, or over the limit
 *   closing -> waiting      on_closed, if there is time left
 *   closing -> reporting    on_closed
 *   waiting -> reporting    on_timer, when the time is over
 *   reporting -> freed      report
 * probe_cancel() frees at once when waiting, else when the handle is closed.
 */
#include "probe.h"
#include "sock.h"
#include <stdlib.h>
#include <string.h>

/* A local listener answers at once, unless its backlog is full. */
enum { TRY_LIMIT_MS = 1000 };

struct probe {
    struct meshx_loop *loop;
    enum { WAITING, CONNECTING, CLOSING, REPORTING } state;
    struct sock_address address;
    uint32_t interval;
    bool only_once;
    bool cancelled;
    enum probe_answer answer; /* of the last try */
    uint64_t deadline;        /* by loop_now() */
    uv_tcp_t tcp;
    uv_connect_t connect;
    struct loop_timer *timer;
    probe_done done;
    void *argument;
};

static void probe_free(struct probe *probe) {
    loop_timer_free(probe->timer);
    free(probe);
}

static void report(struct probe *probe) {
    probe->state = REPORTING;
    probe->done(probe->answer, probe->argument);
    probe_free(probe);
}

static uint64_t time_left(const struct probe *probe) {
    uint64_t now = loop_now();
    return now < probe->deadline ? probe->deadline - now : 0;
}

static void on_closed(uv_handle_t *handle) {
    struct probe *probe = handle->data;
    uint64_t left = time_left(probe);
    if (probe->cancelled) {
        probe_free(probe);
    } else if (probe->answer == PROBE_ACCEPTS || probe->only_once || left == 0) {
        report(probe);
    } else {
        probe->state = WAITING;
        loop_timer_start(probe->timer, left < probe->interval ? left : probe->interval);
    }
}

static void end_try(struct probe *probe, enum probe_answer answer) {
    probe->state = CLOSING;
    probe->answer = answer;
    loop_timer_stop(probe->timer);
    uv_close((uv_handle_t *)&probe->tcp, on_closed);
}

/* When the kernel happens to choose the port we try as our own, TCP connects us to
 * ourselves; no one else is there. */
static bool is_connected_to_itself(const uv_tcp_t *tcp) {
    struct sockaddr_storage local = {.ss_family = AF_UNSPEC};
    struct sockaddr_storage remote = {.ss_family = AF_UNSPEC};
    int local_size = sizeof local;
    int remote_size = sizeof remote;
    return uv_tcp_getsockname(tcp, (struct sockaddr *)&local, &local_size) == 0 &&
           uv_tcp_getpeername(tcp, (struct sockaddr *)&remote, &remote_size) == 0 &&
           local_size == remote_size && memcmp(&local, &remote, (size_t)local_size) == 0;
}

static void on_connect(uv_connect_t *connect, int status) {
    struct probe *probe = connect->data;
    if (probe->state == CONNECTING) {
        end_try(probe, status == 0 && !is_connected_to_itself(&probe->tcp)
                           ? PROBE_ACCEPTS
                           : PROBE_REFUSES);
    }
}

/* Whether |error| of a connect() is for want of something of our own. */
static bool is_our_want(int error) {
    return error == UV_EMFILE || error == UV_ENFILE || error == UV_ENOBUFS ||
           error == UV_ENOMEM || error == UV_EADDRNOTAVAIL;
}

static void begin_try(struct probe *probe) {
    uint64_t limit = TRY_LIMIT_MS;
    if (!probe->only_once && time_left(probe) < limit) {
        limit = time_left(probe);
    }
    probe->state = CONNECTING;
    uv_tcp_init(loop_uv(probe->loop), &probe->tcp);
    probe->tcp.data = probe;
    probe->connect.data = probe;
    int error = uv_tcp_connect(&probe->connect, &probe->tcp,
                               (struct sockaddr *)&probe->address.storage, on_connect);
    if (error == 0) {
        loop_timer_start(probe->timer, limit);
    } else {
        end_try(probe, is_our_want(error) ? PROBE_NOT_MADE : PROBE_REFUSES);
    }
}

static void on_timer(void *argument) {
    struct probe *probe = argument;
    if (probe->state == CONNECTING) {
        end_try(probe, PROBE_REFUSES);
    } else if (probe->only_once || time_left(probe) > 0) {
        begin_try(probe);
    } else {
        report(probe);
    }
}

int probe_start(struct meshx_loop *loop, const char *address, uint16_t port,
                uint32_t interval, uint32_t timeout, probe_done done, void *argument,
                struct probe **out) {
    struct probe *probe = calloc(1, sizeof *probe);
    int code = MESHX_ENOMEM;
    if (probe == NULL) {
        goto fail;
    }
    if (sock_address_parse(address, port, &probe->address) != 0) {
        code = MESHX_ECONFIG;
        goto fail;
    }
    code = loop_timer_new(loop, on_timer, probe, &probe->timer);
    if (code != MESHX_OK) {
        goto fail;
    }
    probe->loop = loop;
    probe->state = WAITING;
    probe->interval = interval;
    probe->only_once = timeout == 0;
    probe->deadline = loop_now() + timeout;
    probe->done = done;
    probe->argument = argument;
    loop_timer_start(probe->timer, 0);
    *out = probe;
    return MESHX_OK;

fail:
    free(probe);
    return code;
}

void probe_cancel(struct probe *probe) {
    if (probe == NULL || probe->state == REPORTING) {
        return;
    }
    probe->cancelled = true;
    if (probe->state == WAITING) {
        probe_free(probe);
    } else if (probe->state == CONNECTING) {
        end_try(probe, PROBE_REFUSES);
    }
}
