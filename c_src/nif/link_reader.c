/*
 * A link's input: see link.h; fields and locks are in socket.h.
 *
 * It reads into a stage, memory of the link's own, and copies the whole frames in it: a
 * receiver that keeps a message pins nothing of the stage. Small frames share a binary,
 * a few at a time. Only a frame over 64 KiB, part of a large message, is read into its
 * binary directly. Only real binaries may reach dist_ctrl_put_data: the emulator's
 * decoder aborts on those of enif_make_resource_binary.
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
/* Frames up to this size share a binary with those that follow at once: of four times the
 * smallest one's size, or of so many bytes. That saves allocations, which cost more than
 * the copy since another scheduler frees them. Not more share one, since a message keeps
 * it as long as it waits in a mailbox; once it is decoded, the emulator keeps no more
 * than four times a binary's size (BINARY_EXT in erts/emulator/beam/external.c).
 * meshx_node_traffic.erl relies on the first of these. */
#define SHARED_FRAME ((size_t)2 * 1024)
#define SHARED_BYTES ((size_t)1024)
/* What a frame costs beside its bytes, in bytes. */
#define BYTES_PER_FRAME ((size_t)256)
/* Reads that leave nothing behind before the caller is to wait for more, on a link where
 * several frames came together. */
#define EMPTY_READS 4
/* Bytes whose wait is worth a system call, and no more than the emulator's fragments. */
#define LOW_WATER_MIN 4096
#define LOW_WATER_MAX ((size_t)64 * 1024)

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

/* The most that a frame of |size| bytes, header included, shares a binary of. */
static size_t shared_size(size_t size) {
    return 4 * size > SHARED_BYTES ? 4 * size : SHARED_BYTES;
}

/* Takes the first frame in the stage, of |size| bytes and whole, and with a small one
 * those after it, up to |max| in all. */
static void take_copies(ErlNifEnv *env, struct socket *socket, struct frames *frames,
                        size_t size) {
    const uint8_t *bytes = socket->reader.stage + socket->reader.start;
    size_t available = socket->reader.end - socket->reader.start;
    size_t header = (size_t)socket->header;
    size_t first = header + size;
    size_t limit = first <= SHARED_FRAME ? shared_size(first) : 0;
    size_t length = first;
    unsigned count = 1;
    size_t need = 0;
    ERL_NIF_TERM copy;

    while (length < limit && frames->count + count < frames->max &&
           frame_next(socket->header, bytes + length, available - length, &size, &need) ==
               FRAME_COMPLETE &&
           size > 0 && header + size <= SHARED_FRAME) {
        if (shared_size(header + size) < limit) {
            limit = shared_size(header + size);
        }
        if (length + header + size > limit) {
            break;
        }
        length += header + size;
        count++;
    }
    socket->reader.start += length;
    if (count == 1) {
        unsigned char *alone =
            enif_make_new_binary(env, first - header, &frames->terms[frames->count++]);
        if (first > header) {
            memcpy(alone, bytes + header, first - header);
        }
        return;
    }
    memcpy(enif_make_new_binary(env, length, &copy), bytes, length);
    for (size_t at = 0; at < length; at += header + size) {
        (void)frame_next(socket->header, bytes + at, length - at, &size, &need);
        frames->terms[frames->count++] =
            enif_make_sub_binary(env, copy, at + header, size);
    }
}

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
            socket->reader.start += (size_t)socket->header;
        } else {
            take_copies(env, socket, frames, size);
        }
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

static void set_low_water(struct socket *socket, int bytes) {
    if (bytes != socket->reader.low_water &&
        setsockopt(socket->fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes) == 0) {
        socket->reader.low_water = bytes;
    }
}

/* Nothing can be delivered before the frame under way is whole, so nobody is woken
 * before: proxies send a large one in many pieces. Nor before as much has come as the
 * caller wants. Less than a small receive buffer holds: before Linux 5.12 a full one
 * woke nobody (tcp_epollin_ready() in net/ipv4). */
static void await_frame(struct socket *socket, size_t need) {
    size_t missing = socket->reader.large_size > 0
                         ? socket->reader.large_size - socket->reader.filled
                     : need > 0 ? need - (socket->reader.end - socket->reader.start)
                                : 1;
    int low_water = (int)(missing < LOW_WATER_MAX ? missing : LOW_WATER_MAX);
    int buffer = 0;
    socklen_t size = sizeof buffer;

    low_water = low_water < LOW_WATER_MIN ? 1 : low_water;
    low_water = low_water < socket->reader.least ? socket->reader.least : low_water;
    if (low_water == socket->reader.low_water ||
        getsockopt(socket->fd, SOL_SOCKET, SO_RCVBUF, &buffer, &size) != 0) {
        return;
    }
    low_water = low_water < buffer / 4 ? low_water : buffer / 4;
    set_low_water(socket, low_water);
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

/* low_water(Link, Bytes) -> ok. Waits that begin after the next read end with so many
 * bytes (or with the link, or a quarter of the receive buffer), and read/1 leaves it to
 * the caller how to wait. 0: as a frame needs. */
ERL_NIF_TERM nif_low_water(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    int bytes = 0;

    (void)argc;
    if (socket == NULL || !enif_get_int(env, argv[1], &bytes) || bytes < 0) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    socket->reader.least = bytes;
    /* A wait may be under way. What comes before this is read next, what comes after it
     * ends the wait; before Linux 4.18 a later change would not. */
    if (bytes == 0 && socket->fd >= 0) {
        set_low_water(socket, 1);
    }
    enif_mutex_unlock(socket->read);
    return am_ok;
}

/*
 * read(Link) -> {more | wait, [Frame]} | {error, closed | bad_frame | Posix}
 *
 * more: call again, when others have run; there may be no frame. wait: the calling
 * process gets a select message when there is more, or calls select/1 or await/2 if
 * low_water/2 has set bytes. During the handshake at most one
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
        failure = terms_error_closed(env);
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
            failure = terms_error_closed(env);
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
    if (drained && socket->reader.empty_reads > 0 && socket->reader.least == 0) {
        socket->reader.empty_reads--;
        drained = false;
    }
    if (failure == 0 && drained) {
        shrink(socket);
        await_frame(socket, frames.need);
        if (socket->reader.least == 0 && enif_select(env, socket->fd, ERL_NIF_SELECT_READ,
                                                     socket, NULL, am_undefined) < 0) {
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
    link_consume_timeslice(env, frames.bytes + frames.count * BYTES_PER_FRAME);
    return result;
}
