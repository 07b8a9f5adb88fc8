/*
 * Connects to a port until something does not refuse. Control thread only.
 *
 * One TCP handle and one timer serve all tries, so nothing is allocated after the start.
 * The timer is the pause between tries and the limit of each.
 *
 * States (function that makes the step):
 *   waiting -> connecting   begin_try, when the timer fires
 *   connecting -> greeting  greet: connected, and the hello is sent
 *   connecting -> closing   end_try: connected, refused, or over the limit
 *   greeting -> closing     end_try: something came, or over the limit
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

/* A local process answers at once, unless it hangs, or the whole machine does. */
enum { TRY_LIMIT_MS = 2000 };

/* The first byte of a TLS record. */
enum { TLS_ALERT = 21, TLS_HANDSHAKE = 22 };

/*
 * A ClientHello that servers of TLS 1.2 and 1.3 go along with (RFC 8446, 4.1.2), so that
 * they have nothing to log. It goes no further, so nothing in it needs to be secret: the
 * key share is the base point of X25519.
 */
static const char client_hello[] =
    "\x16\3\1\0\x8a" /* record: handshake */
    "\1\0\0\x86\3\3" /* ClientHello, legacy version */
    "meshx_node: is my sidecar alive?"
    "\0"                                                       /* no session */
    "\0\x0e\x13\1\x13\2\x13\3\xc0\x2b\xc0\x2f\xc0\x2c\xc0\x30" /* cipher suites */
    "\1\0"                                                     /* no compression */
    "\0\x4f"                                                   /* extensions */
    "\0\x0a\0\6\0\4\0\x1d\0\x17"                               /* X25519, P-256 */
    "\0\x0b\0\2\1\0"                                           /* uncompressed points */
    "\0\x0d\0\x08\0\6\4\3\x08\4\4\1"                           /* ECDSA, RSA */
    "\0\x2b\0\5\4\3\4\3\3"                                     /* TLS 1.3, 1.2 */
    "\0\x33\0\x26\0\x24\0\x1d\0\x20\x09\0\0\0"                 /* key share */
    "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/* Its size on the wire, without the literal's own NUL. */
enum { CLIENT_HELLO_SIZE = sizeof client_hello - 1 };

struct probe {
    struct meshx_loop *loop;
    enum probe_kind kind;
    enum { WAITING, CONNECTING, GREETING, CLOSING, REPORTING } state;
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
    /* Takes a server's whole first flight: what is left unread when we close would be a
     * reset, which proxies log. */
    char received[16384];
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
    } else if (probe->answer == PROBE_ACCEPTS || probe->answer == PROBE_SILENT ||
               probe->only_once || left == 0) {
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

static void on_allocate(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer) {
    struct probe *probe = handle->data;
    (void)suggested;
    *buffer = uv_buf_init(probe->received, sizeof probe->received);
}

/* A sidecar that can't go on with us closes, which it can't while it hangs. */
static void on_read(uv_stream_t *stream, ssize_t size, const uv_buf_t *buffer) {
    struct probe *probe = stream->data;
    if (size != 0 && probe->state == GREETING) {
        bool other =
            size > 0 && buffer->base[0] != TLS_HANDSHAKE && buffer->base[0] != TLS_ALERT;
        end_try(probe, other ? PROBE_REFUSES : PROBE_ACCEPTS);
    }
}

static void greet(struct probe *probe) {
    uv_stream_t *stream = (uv_stream_t *)&probe->tcp;
    const uv_buf_t hello = {.base = (char *)(uintptr_t)client_hello,
                            .len = CLIENT_HELLO_SIZE};
    probe->state = GREETING;
    /* A new connection has room for it; it fails when the other side has closed. */
    if (uv_try_write(stream, &hello, 1) < 0 ||
        uv_read_start(stream, on_allocate, on_read) != 0) {
        end_try(probe, PROBE_ACCEPTS);
    }
}

static void on_connect(uv_connect_t *connect, int status) {
    struct probe *probe = connect->data;
    if (probe->state != CONNECTING) {
        return;
    }
    if (status != 0 || is_connected_to_itself(&probe->tcp)) {
        end_try(probe, PROBE_REFUSES);
    } else if (probe->kind == PROBE_HELLO) {
        greet(probe);
    } else {
        end_try(probe, PROBE_ACCEPTS);
    }
}

/* Whether |error| of a connect() is for want of something of our own. */
static bool is_our_want(int error) {
    return error == UV_EMFILE || error == UV_ENFILE || error == UV_ENOBUFS ||
           error == UV_ENOMEM || error == UV_EADDRNOTAVAIL;
}

static void begin_try(struct probe *probe) {
    probe->state = CONNECTING;
    uv_tcp_init(loop_uv(probe->loop), &probe->tcp);
    probe->tcp.data = probe;
    probe->connect.data = probe;
    int error = uv_tcp_connect(&probe->connect, &probe->tcp,
                               (struct sockaddr *)&probe->address.storage, on_connect);
    if (error == 0) {
        loop_timer_start(probe->timer, TRY_LIMIT_MS);
    } else {
        end_try(probe, is_our_want(error) ? PROBE_NOT_MADE : PROBE_REFUSES);
    }
}

static void on_timer(void *argument) {
    struct probe *probe = argument;
    if (probe->state == CONNECTING || probe->state == GREETING) {
        end_try(probe, PROBE_SILENT);
    } else if (probe->only_once || time_left(probe) > 0) {
        begin_try(probe);
    } else {
        report(probe);
    }
}

int probe_start(struct meshx_loop *loop, enum probe_kind kind, const char *address,
                uint16_t port, uint32_t interval, uint32_t timeout, probe_done done,
                void *argument, struct probe **out) {
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
    probe->kind = kind;
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
    } else if (probe->state != CLOSING) {
        end_try(probe, PROBE_REFUSES);
    }
}
