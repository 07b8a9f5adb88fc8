/*
 * Framed input and output of a link: see link.h; fields and locks are in socket.h.
 *
 * Input reads into a stage, memory of the link's own, and delivers every whole frame in
 * it as a binary of its own: a receiver that keeps a message pins nothing but that. Only
 * a frame over 64 KiB, part of a large message, is read into its binary directly. Only
 * real binaries may reach dist_ctrl_put_data: the emulator's decoder aborts on those of
 * enif_make_resource_binary.
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

/* Frames and bytes delivered per call: bounds the call. The last receive may go beyond by
 * what it has room for. */
#define FRAMES_PER_READ 512
#define BYTES_PER_READ ((size_t)64 * 1024)
/* Room for frames that are copied; the small one is what a quiet link keeps. */
#define STAGE_BULK ((size_t)256 * 1024)
#define STAGE_SMALL ((size_t)8 * 1024)
/* A frame that is longer, header included, is read into place if it is not yet whole: a
 * copy costs more than the shorter reads. The emulator's own fragments of large messages
 * are the frames just above it. */
#define LARGE_FROM ((size_t)64 * 1024)
/* What is allocated for a large frame before its bytes come. */
#define LARGE_FIRST ((size_t)256 * 1024)
_Static_assert(LARGE_FIRST >= STAGE_BULK, "what is in the stage fits");
/* Read together with a large frame's end: enough for the next one's header, or for many
 * small frames. */
#define READ_AHEAD ((size_t)4 * 1024)
/* Pieces of one writev; IOV_MAX on Linux. */
#define PIECES_MAX 1024
/* System calls of one write: bounds the call when frames have very many pieces. */
#define WRITES_PER_CALL 8
/* Bytes that count as a whole time slice (1 ms at about 2 GB/s of copying). */
#define BYTES_PER_TIMESLICE ((size_t)2 * 1024 * 1024)

/* What a frame costs beside its bytes, in bytes. */
#define BYTES_PER_FRAME ((size_t)256)

/* Reads that leave nothing behind before the caller is to wait for more, on a link where
 * several frames came together. */
#define EMPTY_READS 4

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

void link_reader_free(struct socket *socket) {
    enif_free(socket->reader.stage);
    if (socket->reader.large_size > 0) {
        enif_release_binary(&socket->reader.large);
    }
}

/* Gives the stage |capacity| bytes; what is in it moves to its beginning. */
static bool renew_stage(struct socket *socket, size_t capacity) {
    size_t rest = socket->reader.end - socket->reader.start;
    uint8_t *stage = enif_alloc(capacity);

    if (stage == NULL) {
        return false;
    }
    if (rest > 0) {
        memcpy(stage, socket->reader.stage + socket->reader.start, rest);
    }
    enif_free(socket->reader.stage);
    socket->reader.stage = stage;
    socket->reader.capacity = capacity;
    socket->reader.start = 0;
    socket->reader.end = rest;
    return true;
}

/* Makes room in the stage for |need| bytes from |start| on, and more. */
static bool make_room(struct socket *socket, size_t need) {
    size_t wanted = socket->reader.bulk || need > STAGE_SMALL ? STAGE_BULK : STAGE_SMALL;
    size_t rest = socket->reader.end - socket->reader.start;

    if (socket->reader.capacity < wanted) {
        return renew_stage(socket, wanted);
    }
    if (rest == 0) {
        socket->reader.start = 0;
        socket->reader.end = 0;
    } else if (socket->reader.start > 0 &&
               (socket->reader.start + need > socket->reader.capacity ||
                socket->reader.end == socket->reader.capacity)) {
        memmove(socket->reader.stage, socket->reader.stage + socket->reader.start, rest);
        socket->reader.start = 0;
        socket->reader.end = rest;
    }
    return true;
}

/* Begins the large frame of |size| bytes whose first bytes, after the header at |start|,
 * are in the stage. Memory for a very long one comes as its bytes do: its header alone is
 * not trusted. */
static bool begin_large(struct socket *socket, size_t size) {
    size_t begin = socket->reader.start + (size_t)socket->header;
    size_t first = size < LARGE_FIRST ? size : LARGE_FIRST;

    if (!enif_alloc_binary(first, &socket->reader.large)) {
        return false;
    }
    socket->reader.large_size = size;
    socket->reader.filled = socket->reader.end - begin;
    memcpy(socket->reader.large.data, socket->reader.stage + begin,
           socket->reader.filled);
    socket->reader.start = 0;
    socket->reader.end = 0;
    return true;
}

static bool grow_large(struct socket *socket) {
    size_t size = 2 * socket->reader.large.size;

    return socket->reader.filled < socket->reader.large.size ||
           enif_realloc_binary(&socket->reader.large, size < socket->reader.large_size
                                                          ? size
                                                          : socket->reader.large_size);
}

/* The frames of one call. */
struct frames {
    ERL_NIF_TERM terms[FRAMES_PER_READ];
    unsigned count;
    unsigned max;
    size_t bytes; /* of all received for them */
    size_t need;  /* bytes that the partial frame at the stage's start needs in all */
    bool too_large;
};

/* Takes the whole frames out of what was read, up to |max|. Ticks are counted and passed
 * over. False: out of memory. */
static bool take_frames(ErlNifEnv *env, struct socket *socket, struct frames *frames) {
    uint_fast64_t ticks = 0;
    unsigned before = frames->count;
    bool memory = true;

    frames->need = 0;
    if (socket->reader.large_size > 0 &&
        socket->reader.filled == socket->reader.large_size) {
        frames->terms[frames->count++] = enif_make_binary(env, &socket->reader.large);
        socket->reader.large_size = 0;
    }
    while (frames->count < frames->max && socket->reader.start < socket->reader.end) {
        const uint8_t *bytes = socket->reader.stage + socket->reader.start;
        size_t size = 0;
        enum frame_status status =
            frame_next(socket->header, bytes, socket->reader.end - socket->reader.start,
                       &size, &frames->need);
        if (status == FRAME_TOO_LARGE) {
            frames->too_large = true;
            break;
        }
        if (status == FRAME_PARTIAL) {
            if (frames->need > LARGE_FROM) {
                memory = begin_large(socket, size);
            }
            break;
        }
        frames->need = 0;
        if (size == 0 && socket->header == FRAME_DISTRIBUTION) {
            ticks++;
        } else {
            unsigned char *copy =
                enif_make_new_binary(env, size, &frames->terms[frames->count++]);
            if (size > 0) {
                memcpy(copy, bytes + socket->header, size);
            }
        }
        socket->reader.start += (size_t)socket->header + size;
    }
    atomic_fetch_add_explicit(&socket->frames_in, frames->count - before + ticks,
                              memory_order_relaxed);
    return memory;
}

/* One receive: into the large frame under way and a little beyond, else into the stage.
 * |*room| is what fits; the result is that of recvmsg, with ENOMEM of our own. */
static ssize_t receive(struct socket *socket, size_t need, size_t *room) {
    struct iovec pieces[2];
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 1};
    size_t large = 0;
    ssize_t received;

    if (socket->reader.large_size > 0) {
        if (!grow_large(socket)) {
            errno = ENOMEM;
            return -1;
        }
        large = socket->reader.large.size - socket->reader.filled;
        if (large > LARGE_FIRST) {
            large = LARGE_FIRST; /* bounds the call */
        }
        pieces[0].iov_base = socket->reader.large.data + socket->reader.filled;
        pieces[0].iov_len = large;
        /* Only the next frame's beginning: what is read into the stage is copied again.
         */
        pieces[1].iov_base = socket->reader.stage;
        pieces[1].iov_len = READ_AHEAD;
        if (socket->reader.filled + large == socket->reader.large_size) {
            message.msg_iovlen = 2;
        }
    } else {
        if (!make_room(socket, need)) {
            errno = ENOMEM;
            return -1;
        }
        pieces[0].iov_base = socket->reader.stage + socket->reader.end;
        pieces[0].iov_len = socket->reader.capacity - socket->reader.end;
    }
    *room = pieces[0].iov_len + (message.msg_iovlen == 2 ? pieces[1].iov_len : 0);
    do {
        received = recvmsg(socket->fd, &message, 0);
    } while (received < 0 && errno == EINTR);
    if (received <= 0) {
        return received;
    }
    if ((size_t)received > large) {
        socket->reader.end += (size_t)received - large;
        socket->reader.filled += large;
    } else {
        socket->reader.filled += (size_t)received;
    }
    return received;
}

/* A quiet link keeps little. */
static void shrink(struct socket *socket) {
    if (!socket->reader.bulk && socket->reader.capacity > STAGE_SMALL &&
        socket->reader.start == socket->reader.end && socket->reader.large_size == 0) {
        enif_free(socket->reader.stage);
        socket->reader.stage = NULL;
        socket->reader.capacity = 0;
        socket->reader.start = 0;
        socket->reader.end = 0;
    }
}

/*
 * read(Link) -> {more | wait, [Frame]} | {error, closed | bad_frame | Posix}
 *
 * more: call again, when others have run; there may be no frame. wait: the calling
 * process gets a select message when there is more. During the handshake at most one
 * frame is delivered, since the framing may change after it. An error is returned only
 * when all frames before it have been.
 */
ERL_NIF_TERM nif_read(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct frames frames;
    ERL_NIF_TERM result;
    ERL_NIF_TERM failure = 0;
    bool drained = false;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    frames.count = 0;
    frames.bytes = 0;
    frames.need = 0;
    frames.too_large = false;
    enif_mutex_lock(socket->read);
    frames.max = socket->header == FRAME_HANDSHAKE ? 1 : FRAMES_PER_READ;
    if (socket->fd < 0) {
        failure = closed(env);
    } else if (!take_frames(env, socket, &frames)) { /* left by the last call */
        failure = terms_error_errno(env, ENOMEM);
    }
    while (failure == 0 && !drained && !frames.too_large && frames.count < frames.max &&
           frames.bytes < BYTES_PER_READ) {
        size_t room = 0;
        ssize_t received = receive(socket, frames.need, &room);
        if (received > 0) {
            frames.bytes += (size_t)received;
            socket->reader.bulk =
                (size_t)received == room || (size_t)received > STAGE_SMALL;
            /* After a short read the socket was empty: asking the kernel again is a
             * wasted call. */
            drained = (size_t)received < room;
            if (!take_frames(env, socket, &frames)) {
                failure = terms_error_errno(env, ENOMEM);
            }
        } else if (received == 0 || errno == ECONNRESET) {
            failure = closed(env);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            socket->reader.bulk = false;
            drained = true;
        } else {
            failure = terms_error_errno(env, errno);
        }
    }
    if (frames.too_large) {
        failure = enif_make_tuple2(env, am_error, enif_make_atom(env, "bad_frame"));
    }
    atomic_fetch_add_explicit(&socket->bytes_in, frames.bytes, memory_order_relaxed);
    /* What was read but not looked at, because |max| was reached, makes no select
     * message. */
    drained = drained && frames.count < frames.max;
    /* Where several processes wait for answers, these come one upon another: looking
     * again when the others have run costs less than two switches of threads, to the
     * emulator's poll thread and back. */
    if (frames.count > 1) {
        socket->reader.empty_reads = EMPTY_READS;
    }
    if (drained && socket->reader.empty_reads > 0) {
        socket->reader.empty_reads--;
        drained = false;
    }
    if (failure == 0 && drained) {
        shrink(socket);
        if (enif_select(env, socket->fd, ERL_NIF_SELECT_READ, socket, NULL,
                        am_undefined) < 0) {
            failure = terms_error_errno(env, ENOMEM);
        }
    }
    if (failure != 0 && frames.count == 0) {
        result = failure;
    } else {
        /* A failure comes again at the next call, if only as the end. */
        result =
            enif_make_tuple2(env, drained && failure == 0 ? am_wait : am_more,
                             enif_make_list_from_array(env, frames.terms, frames.count));
    }
    enif_mutex_unlock(socket->read);
    consume_timeslice(env, frames.bytes + frames.count * BYTES_PER_FRAME);
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
