/*
 * Framed input and output of a link: see link.h; fields and locks are in socket.h.
 *
 * Input reads into one buffer and delivers every whole frame in it. Small frames are
 * copied into binaries of their own; larger ones become sub-binaries of the buffer, which
 * is then given to the emulator, and what follows the last whole frame moves to a new
 * buffer. Only real binaries may reach dist_ctrl_put_data: the emulator's decoder aborts
 * on those of enif_make_resource_binary.
 *
 * Output gathers frames into one writev. What the kernel does not take stays in the
 * writer's environment until the socket is writable; the caller writes nothing new before
 * that.
 */
#include "link.h"
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Frames delivered per call at most: bounds the call. */
#define FRAMES_PER_READ 512
/* Below this a frame is copied: a copy is cheaper than a reference that pins the buffer.
 */
#define COPY_BELOW 2048
/* The large kind stays just under the 512 KiB from which the emulator's allocator maps
 * and unmaps each block by itself, which costs page faults on every read; the small kind
 * is what a quiet link keeps. */
#define BUFFER_BULK ((size_t)480 * 1024)
#define BUFFER_SMALL ((size_t)8 * 1024)
/* Pieces of one writev; IOV_MAX on Linux. */
#define PIECES_MAX 1024
/* System calls of one write: bounds the call when frames have very many pieces. */
#define WRITES_PER_CALL 8
/* Bytes that count as a whole time slice (1 ms at about 2 GB/s of copying). */
#define BYTES_PER_TIMESLICE ((size_t)2 * 1024 * 1024)

static const uint8_t zeros[FRAME_DISTRIBUTION];

static void consume_timeslice(ErlNifEnv *env, size_t bytes) {
    size_t percent = bytes * 100 / BYTES_PER_TIMESLICE;

    enif_consume_timeslice(env, percent < 1 ? 1 : percent > 100 ? 100 : (int)percent);
}

static ERL_NIF_TERM closed(ErlNifEnv *env) {
    return enif_make_tuple2(env, am_error, am_closed);
}

/* framing(Link, handshake | distribution) -> ok. Bytes already read are kept and framed
 * the new way. */
ERL_NIF_TERM nif_framing(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    enif_mutex_lock(socket->write);
    socket->header =
        enif_is_identical(argv[1], am_handshake) ? FRAME_HANDSHAKE : FRAME_DISTRIBUTION;
    enif_mutex_unlock(socket->write);
    enif_mutex_unlock(socket->read);
    return am_ok;
}

/* ---- input ---- */

struct span {
    size_t offset;
    size_t size;
};

/* Finds up to |max| whole frames. Ticks are counted and passed over. |*need| becomes what
 * a partial frame at |*next| needs in all (0: none is there). False: a frame is too
 * large. */
static bool find_frames(struct socket *socket, struct span *frames, size_t max,
                        size_t *count, size_t *next, size_t *need) {
    const uint8_t *bytes = socket->reader.buffer.data;
    size_t position = socket->reader.start;
    uint_fast64_t ticks = 0;
    bool valid = true;

    *count = 0;
    *need = 0;
    while (*count < max && position < socket->reader.end) {
        size_t size;
        enum frame_status status = frame_next(socket->header, bytes + position,
                                              socket->reader.end - position, &size, need);
        valid = status != FRAME_TOO_LARGE;
        if (status != FRAME_COMPLETE) {
            break;
        }
        *need = 0;
        position += socket->header;
        if (size == 0 && socket->header == FRAME_DISTRIBUTION) {
            ticks++;
        } else {
            frames[*count] = (struct span){position, size};
            (*count)++;
        }
        position += size;
    }
    *next = position;
    atomic_fetch_add_explicit(&socket->frames_in, *count + ticks, memory_order_relaxed);
    return valid;
}

/* Makes a buffer of |capacity| that begins with what is not yet delivered. */
static bool renew_buffer(struct socket *socket, size_t capacity) {
    ErlNifBinary fresh;
    size_t rest = socket->reader.end - socket->reader.start;

    if (!enif_alloc_binary(capacity, &fresh)) {
        return false;
    }
    if (rest > 0) {
        memcpy(fresh.data, socket->reader.buffer.data + socket->reader.start, rest);
    }
    if (socket->reader.allocated) {
        enif_release_binary(&socket->reader.buffer);
    }
    socket->reader.buffer = fresh;
    socket->reader.allocated = true;
    socket->reader.start = 0;
    socket->reader.end = rest;
    return true;
}

/* Makes room for the next read: at least one byte, |need| for the frame that is partial.
 * A frame longer than the buffer gets its room as its bytes come, doubling: its header
 * alone is not trusted for an allocation. */
static bool make_room(struct socket *socket, size_t need) {
    size_t wanted =
        socket->reader.bulk || need > BUFFER_SMALL ? BUFFER_BULK : BUFFER_SMALL;
    size_t rest = socket->reader.end - socket->reader.start;

    if (rest >= wanted) {
        wanted = 2 * rest < need ? 2 * rest : need;
    }
    if (!socket->reader.allocated || socket->reader.buffer.size < wanted) {
        return renew_buffer(socket, wanted);
    }
    if (rest == 0) {
        socket->reader.start = 0;
        socket->reader.end = 0;
    } else if (socket->reader.start > 0 &&
               socket->reader.start + (need > rest ? need : rest + 1) >
                   socket->reader.buffer.size) {
        memmove(socket->reader.buffer.data,
                socket->reader.buffer.data + socket->reader.start, rest);
        socket->reader.start = 0;
        socket->reader.end = rest;
    }
    return socket->reader.end < socket->reader.buffer.size ||
           renew_buffer(socket, 2 * socket->reader.buffer.size);
}

/*
 * Makes the list of |count| frames and moves |start| to |next|. When a frame is large the
 * buffer is given away and the rest is copied to a new one. Returns 0 when memory ran
 * out.
 */
static ERL_NIF_TERM deliver(ErlNifEnv *env, struct socket *socket,
                            const struct span *frames, size_t count, size_t next) {
    ERL_NIF_TERM list = enif_make_list(env, 0);
    ERL_NIF_TERM whole = 0;
    size_t i;

    for (i = 0; i < count && frames[i].size < COPY_BELOW; i++) {
    }
    socket->reader.start = next;
    if (i < count) {
        ErlNifBinary given = socket->reader.buffer;
        size_t used = socket->reader.end;
        socket->reader.allocated = false; /* renew_buffer() must not release it */
        if (!renew_buffer(socket,
                          used - next > BUFFER_SMALL / 2 ? BUFFER_BULK : BUFFER_SMALL)) {
            socket->reader.allocated = true;
            return 0;
        }
        /* A receiver that keeps one message must not pin a buffer that is mostly empty.
         */
        if (next < given.size / 2) {
            enif_realloc_binary(&given, next);
        }
        whole = enif_make_binary(env, &given);
        for (i = count; i-- > 0;) {
            ERL_NIF_TERM frame;
            if (frames[i].size < COPY_BELOW) {
                unsigned char *copy = enif_make_new_binary(env, frames[i].size, &frame);
                memcpy(copy, given.data + frames[i].offset, frames[i].size);
            } else {
                frame =
                    enif_make_sub_binary(env, whole, frames[i].offset, frames[i].size);
            }
            list = enif_make_list_cell(env, frame, list);
        }
        return list;
    }
    for (i = count; i-- > 0;) {
        ERL_NIF_TERM frame;
        unsigned char *copy = enif_make_new_binary(env, frames[i].size, &frame);
        if (frames[i].size > 0) {
            memcpy(copy, socket->reader.buffer.data + frames[i].offset, frames[i].size);
        }
        list = enif_make_list_cell(env, frame, list);
    }
    return list;
}

/*
 * read(Link) -> {more | wait, [Frame]} | {error, closed | bad_frame | Posix}
 *
 * more: call again. wait: the calling process gets a select message when there is more.
 * During the handshake at most one frame is delivered, since the framing may change after
 * it. An error is returned only when all frames before it have been.
 */
ERL_NIF_TERM nif_read(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct span frames[FRAMES_PER_READ];
    size_t max;
    size_t count = 0;
    size_t next = 0;
    size_t need = 0;
    size_t moved = 0;
    ERL_NIF_TERM list;
    ERL_NIF_TERM result;
    bool wait = false;
    bool valid;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    if (socket->fd < 0) {
        result = closed(env);
        goto done;
    }
    max = socket->header == FRAME_HANDSHAKE ? 1 : FRAMES_PER_READ;
    /* Frames left by the last call come first: it stopped at |max|. */
    valid = find_frames(socket, frames, max, &count, &next, &need);
    if (valid && count == 0) {
        ssize_t received;
        socket->reader.start = next;
        if (!make_room(socket, need)) {
            result = terms_error_errno(env, ENOMEM);
            goto done;
        }
        size_t room = socket->reader.buffer.size - socket->reader.end;
        do {
            received = recv(socket->fd, socket->reader.buffer.data + socket->reader.end,
                            room, 0);
        } while (received < 0 && errno == EINTR);
        if (received == 0 || (received < 0 && errno != EAGAIN && errno != EWOULDBLOCK)) {
            result = received == 0 || errno == ECONNRESET ? closed(env)
                                                          : terms_error_errno(env, errno);
            goto done;
        }
        moved = received > 0 ? (size_t)received : 0;
        atomic_fetch_add_explicit(&socket->bytes_in, moved, memory_order_relaxed);
        socket->reader.end += moved;
        socket->reader.bulk = moved == room || moved > BUFFER_SMALL;
        /* After a short read the socket was empty: asking the kernel again is a wasted
         * call. */
        wait = moved < room;
        valid = find_frames(socket, frames, max, &count, &next, &need);
    }
    if (!valid && count == 0) {
        result = enif_make_tuple2(env, am_error, enif_make_atom(env, "bad_frame"));
        goto done;
    }
    list = deliver(env, socket, frames, count, next);
    if (list == 0) {
        result = terms_error_errno(env, ENOMEM);
        goto done;
    }
    /* What was read but not looked at, because |max| was reached, makes no select
     * message. */
    wait = wait && count < max;
    if (wait) {
        if (socket->reader.start == socket->reader.end && socket->reader.allocated &&
            socket->reader.buffer.size > BUFFER_SMALL && !socket->reader.bulk) {
            enif_release_binary(&socket->reader.buffer); /* a quiet link keeps little */
            socket->reader.allocated = false;
            socket->reader.start = 0;
            socket->reader.end = 0;
        }
        if (enif_select(env, socket->fd, ERL_NIF_SELECT_READ, socket, NULL,
                        am_undefined) < 0) {
            result = terms_error_errno(env, ENOMEM);
            goto done;
        }
    }
    result = enif_make_tuple2(env, wait ? am_wait : am_more, list);
done:
    enif_mutex_unlock(socket->read);
    consume_timeslice(env, moved);
    return result;
}

/* ---- output ---- */

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
        return saved == EPIPE || saved == ECONNRESET ? closed(env)
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
        result = closed(env);
    } else if (socket->writer.pending) {
        result = enif_make_badarg(env);
    } else {
        outcome = write_frames(env, socket, &list, &skip, &moved);
        result = finish_write(env, socket, outcome, env, list, skip);
    }
    enif_mutex_unlock(socket->write);
    consume_timeslice(env, moved);
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
        result = closed(env);
    } else {
        bool pending = socket->writer.pending;
        ErlNifEnv *list_env = pending ? socket->writer.env : env;
        ERL_NIF_TERM list = pending ? socket->writer.rest : enif_make_list(env, 0);
        size_t skip = pending ? socket->writer.skip : 0;
        enum outcome outcome = write_frames(list_env, socket, &list, &skip, &moved);
        result = finish_write(env, socket, outcome, list_env, list, skip);
    }
    enif_mutex_unlock(socket->write);
    consume_timeslice(env, moved);
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
        result = closed(env);
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
                         ? closed(env)
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

/* statistics(Link) -> {FramesIn, FramesOut, BytesIn, BytesOut, BytesPending}; takes no
 * lock. */
ERL_NIF_TERM nif_statistics(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    return enif_make_tuple5(env, enif_make_uint64(env, atomic_load(&socket->frames_in)),
                            enif_make_uint64(env, atomic_load(&socket->frames_out)),
                            enif_make_uint64(env, atomic_load(&socket->bytes_in)),
                            enif_make_uint64(env, atomic_load(&socket->bytes_out)),
                            enif_make_uint64(env, atomic_load(&socket->bytes_pending)));
}
