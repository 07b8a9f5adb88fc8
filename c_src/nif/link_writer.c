/*
 * A link's output: see link.h; fields and locks are in socket.h.
 *
 * It gathers frames into one writev. What the kernel does not take stays in the writer's
 * environment until the socket is writable; the caller writes nothing new before that.
 */
#include "link.h"
#include "sock.h"
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Pieces of one writev; IOV_MAX on Linux. */
#define PIECES_MAX 1024
/* System calls of one write: bounds the call when frames have very many pieces. */
#define WRITES_PER_CALL 8

static const uint8_t zeros[FRAME_DISTRIBUTION];

/* One writev in the making. */
struct gather {
    struct iovec pieces[PIECES_MAX];
    uint8_t headers[PIECES_MAX / 2][FRAME_DISTRIBUTION];
    int count;
    size_t bytes;
    bool complete; /* the whole list fitted */
};

static void add_piece(struct gather *gather, const void *data, size_t size,
                      size_t *skip) {
    if (*skip >= size) {
        *skip -= size;
        return;
    }
    gather->pieces[gather->count].iov_base = (void *)((uintptr_t)data + *skip);
    gather->pieces[gather->count].iov_len = size - *skip;
    gather->bytes += size - *skip;
    gather->count++;
    *skip = 0;
}

/*
 * Gathers frames [{Size, [Binary]}] from |list| on, without the first |skip| bytes. Size
 * is the sum of the binaries' sizes, as dist_ctrl_get_data returns it with get_size. The
 * pieces point into |env|'s binaries. False: |list| is not of that form.
 */
static bool gather_frames(ErlNifEnv *env, enum frame_header header, ERL_NIF_TERM list,
                          size_t skip, struct gather *gather) {
    ERL_NIF_TERM frame;
    size_t headers = 0;

    gather->complete = false;
    while (enif_get_list_cell(env, list, &frame, &list)) {
        const ERL_NIF_TERM *parts;
        ERL_NIF_TERM piece;
        ERL_NIF_TERM pieces;
        ErlNifUInt64 size;
        int arity;

        if (headers == PIECES_MAX / 2 || gather->count == PIECES_MAX) {
            return true;
        }
        if (!enif_get_tuple(env, frame, &arity, &parts) || arity != 2 ||
            !enif_get_uint64(env, parts[0], &size) ||
            !frame_put_header(header, size, gather->headers[headers])) {
            return false;
        }
        add_piece(gather, gather->headers[headers++], header, &skip);
        pieces = parts[1];
        while (enif_get_list_cell(env, pieces, &piece, &pieces)) {
            ErlNifBinary binary;
            if (!enif_inspect_binary(env, piece, &binary) || binary.size > size) {
                return false;
            }
            size -= binary.size;
            if (gather->count == PIECES_MAX) {
                return true;
            }
            add_piece(gather, binary.data, binary.size, &skip);
        }
        if (size != 0) {
            return false; /* a wrong length would garble everything after it */
        }
    }
    gather->complete = true;
    return true;
}

/* Moves |*list| past the frames that the first |*skip| bytes cover; |*skip| is then what
 * is written of the first one left. Returns how many were passed. */
static size_t pass_written(ErlNifEnv *env, enum frame_header header, ERL_NIF_TERM *list,
                           size_t *skip) {
    ERL_NIF_TERM frame;
    ERL_NIF_TERM tail;
    size_t passed = 0;

    while (enif_get_list_cell(env, *list, &frame, &tail)) {
        const ERL_NIF_TERM *parts;
        ErlNifUInt64 size = 0;
        int arity;

        if (!enif_get_tuple(env, frame, &arity, &parts) ||
            !enif_get_uint64(env, parts[0], &size) || *skip < header + size) {
            break;
        }
        *skip -= header + size;
        *list = tail;
        passed++;
    }
    return passed;
}

enum outcome { WRITTEN, BLOCKED, MORE, FAILED, MALFORMED };

/* Writes as much of |*list| as the kernel takes; |*list| and |*skip| are moved on. */
static enum outcome write_frames(ErlNifEnv *env, struct socket *socket,
                                 ERL_NIF_TERM *list, size_t *skip, size_t *moved) {
    for (int calls = 0; calls < WRITES_PER_CALL; calls++) {
        struct gather gather;
        struct msghdr message = {.msg_iov = gather.pieces};
        size_t passed;
        ssize_t sent;
        size_t none = 0;

        gather.count = 0;
        gather.bytes = 0;
        if (socket->writer.owed > 0) {
            add_piece(&gather, zeros, socket->writer.owed, &none);
        }
        if (!gather_frames(env, socket->header, *list, *skip, &gather)) {
            return MALFORMED;
        }
        if (gather.count == 0) {
            return WRITTEN;
        }
        message.msg_iovlen = (size_t)gather.count;
        do {
            sent = sendmsg(socket->fd, &message, MSG_NOSIGNAL);
        } while (sent < 0 && errno == EINTR);
        if (sent < 0) {
            return errno == EAGAIN || errno == EWOULDBLOCK ? BLOCKED : FAILED;
        }
        *moved += (size_t)sent;
        atomic_fetch_add_explicit(&socket->bytes_out, (size_t)sent, memory_order_relaxed);
        size_t owed =
            socket->writer.owed < (size_t)sent ? socket->writer.owed : (size_t)sent;
        socket->writer.owed -= owed;
        *skip += (size_t)sent - owed;
        passed = pass_written(env, socket->header, list, skip);
        atomic_fetch_add_explicit(&socket->frames_out, passed, memory_order_relaxed);
        if ((size_t)sent < gather.bytes) {
            return BLOCKED;
        }
        if (gather.complete) {
            return WRITTEN;
        }
    }
    return MORE;
}

/* Bytes of |list| without the first |skip|. */
static size_t count_bytes(ErlNifEnv *env, enum frame_header header, ERL_NIF_TERM list,
                          size_t skip) {
    ERL_NIF_TERM frame;
    size_t bytes = 0;

    while (enif_get_list_cell(env, list, &frame, &list)) {
        const ERL_NIF_TERM *parts;
        ErlNifUInt64 size = 0;
        int arity;
        if (enif_get_tuple(env, frame, &arity, &parts) &&
            enif_get_uint64(env, parts[0], &size)) {
            bytes += header + size;
        }
    }
    return bytes - skip;
}

/* Ends a write or flush: keeps what is left in the writer's environment. */
static ERL_NIF_TERM finish_write(ErlNifEnv *env, struct socket *socket,
                                 enum outcome outcome, ErlNifEnv *list_env,
                                 ERL_NIF_TERM list, size_t skip) {
    int saved = errno;

    if (outcome == FAILED) {
        return saved == EPIPE || saved == ECONNRESET ? terms_error_closed(env)
                                                     : terms_error_errno(env, saved);
    }
    if (outcome == MALFORMED) {
        return enif_make_badarg(env);
    }
    if (outcome == WRITTEN) {
        if (socket->writer.pending) {
            socket->writer.pending = false;
            enif_clear_env(socket->writer.env);
            atomic_store_explicit(&socket->bytes_pending, 0, memory_order_relaxed);
        }
        return am_ok;
    }
    if (list_env != socket->writer.env) {
        if (socket->writer.env == NULL) {
            socket->writer.env = enif_alloc_env();
        }
        if (socket->writer.env == NULL) {
            return terms_error_errno(env, ENOMEM);
        }
        list = enif_make_copy(socket->writer.env, list); /* refers to large binaries */
    }
    socket->writer.rest = list;
    socket->writer.skip = skip;
    socket->writer.pending = true;
    atomic_store_explicit(&socket->bytes_pending,
                          count_bytes(socket->writer.env, socket->header, list, skip),
                          memory_order_relaxed);
    if (outcome == MORE) {
        return am_more;
    }
    socket->writer.waiting = true;
    sock_bound_unsent(socket->fd, SOCK_UNSENT_WAITING);
    if (enif_select(env, socket->fd, ERL_NIF_SELECT_WRITE, socket, NULL, am_undefined) <
        0) {
        return terms_error_errno(env, ENOMEM);
    }
    return am_wait;
}

/*
 * write(Link, [{Size, [Binary]}]) -> ok | more | wait | {error, closed | Posix}
 *
 * more: call flush/1. wait: call flush/1 after the select message. Frames handed over are
 * never lost by either; the next write must come after an ok. badarg while frames are
 * pending.
 */
ERL_NIF_TERM nif_write(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    ERL_NIF_TERM list = argv[1];
    ERL_NIF_TERM result;
    enum outcome outcome;
    size_t skip = 0;
    size_t moved = 0;

    (void)argc;
    if (socket == NULL || !enif_is_list(env, list)) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->write);
    if (socket->fd < 0) {
        result = terms_error_closed(env);
    } else if (socket->writer.pending) {
        result = enif_make_badarg(env);
    } else {
        outcome = write_frames(env, socket, &list, &skip, &moved);
        result = finish_write(env, socket, outcome, env, list, skip);
    }
    enif_mutex_unlock(socket->write);
    link_consume_timeslice(env, moved);
    return result;
}

/* flush(Link) -> as write/2, for what an earlier write left. ok when nothing was left. */
ERL_NIF_TERM nif_flush(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    ERL_NIF_TERM result;
    size_t moved = 0;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->write);
    if (socket->fd < 0) {
        result = terms_error_closed(env);
    } else {
        if (socket->writer.waiting) {
            socket->writer.waiting = false;
            sock_bound_unsent(socket->fd, SOCK_UNSENT_MAX);
        }
        bool pending = socket->writer.pending;
        ErlNifEnv *list_env = pending ? socket->writer.env : env;
        ERL_NIF_TERM list = pending ? socket->writer.rest : enif_make_list(env, 0);
        size_t skip = pending ? socket->writer.skip : 0;
        enum outcome outcome = write_frames(list_env, socket, &list, &skip, &moved);
        result = finish_write(env, socket, outcome, list_env, list, skip);
    }
    enif_mutex_unlock(socket->write);
    link_consume_timeslice(env, moved);
    return result;
}

/*
 * tick(Link) -> ok | {error, closed | Posix}
 *
 * Writes an empty frame, from any process and without waiting: when frames are pending or
 * the kernel takes nothing, bytes are on their way and do the tick's work. A tick cut in
 * the middle goes out before the next frame; its rest is asked for by the owner's select
 * message.
 */
ERL_NIF_TERM nif_tick(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    ERL_NIF_TERM result = am_ok;
    ssize_t sent;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->write);
    if (socket->fd < 0) {
        result = terms_error_closed(env);
    } else if (!socket->writer.pending && socket->writer.owed == 0) {
        do {
            sent = send(socket->fd, zeros, sizeof zeros, MSG_NOSIGNAL);
        } while (sent < 0 && errno == EINTR);
        if (sent > 0) {
            atomic_fetch_add_explicit(&socket->frames_out, 1, memory_order_relaxed);
            atomic_fetch_add_explicit(&socket->bytes_out, (size_t)sent,
                                      memory_order_relaxed);
            socket->writer.owed = sizeof zeros - (size_t)sent;
        } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
            result = errno == EPIPE || errno == ECONNRESET
                         ? terms_error_closed(env)
                         : terms_error_errno(env, errno);
        }
        if (socket->writer.owed > 0 &&
            enif_select(env, socket->fd, ERL_NIF_SELECT_WRITE, socket, &socket->owner,
                        am_undefined) < 0) {
            result = terms_error_errno(env, ENOMEM);
        }
    }
    enif_mutex_unlock(socket->write);
    return result;
}
