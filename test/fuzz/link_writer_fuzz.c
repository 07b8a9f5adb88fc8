/*
 * A link's output: whatever the kernel takes of a write, the peer gets the frames that
 * were written, whole and in order, and ticks only between them. Input: which allocation
 * fails, how much the kernel takes each time (0: nothing), then writes and ticks.
 */
#include "fuzz.h"

#include "buf.h"
#include "emulator.h"
#include "link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static struct {
    struct buf taken;
    struct fuzz_input sizes;
    size_t turn;
} kernel;

/* What was written, framed; and the bytes of ticks the link has begun. */
static struct buf written;
static size_t ticked;

static ssize_t fuzz_sendmsg(int fd, const struct msghdr *message, int flags);
static ssize_t fuzz_send(int fd, const void *bytes, size_t size, int flags);
#define sendmsg fuzz_sendmsg
#define send fuzz_send
#include "link_writer.c"
#undef send
#undef sendmsg

/* 255 is the link's end. */
static ssize_t fuzz_sendmsg(int fd, const struct msghdr *message, int flags) {
    (void)fd;
    CHECK(flags == MSG_NOSIGNAL && message->msg_iovlen <= PIECES_MAX);
    size_t size = fuzz_piece(kernel.sizes, &kernel.turn);
    size_t before = kernel.taken.size;
    if (size == 0 || size == 255) {
        errno = size == 0 ? EAGAIN : EPIPE;
        return -1;
    }
    size *= 1 + written.size / 500;
    size = size < 100 ? size : size * size * 10;
    for (size_t i = 0; i < message->msg_iovlen && size > 0; i++) {
        const struct iovec *piece = &message->msg_iov[i];
        size_t part = size < piece->iov_len ? size : piece->iov_len;
        CHECK(buf_append(&kernel.taken, piece->iov_base, part) == MESHX_OK);
        size -= part;
    }
    return (ssize_t)(kernel.taken.size - before);
}

static ssize_t fuzz_send(int fd, const void *bytes, size_t size, int flags) {
    struct iovec piece = {(void *)(uintptr_t)bytes, size};
    return fuzz_sendmsg(fd, &(struct msghdr){.msg_iov = &piece, .msg_iovlen = 1}, flags);
}

static ERL_NIF_TERM make_frame(ErlNifEnv *env, struct fuzz_input *plan,
                               size_t *announced) {
    static const size_t factors[] = {0, 1, 1, 90};
    uint8_t header[FRAME_DISTRIBUTION];
    uint8_t step = fuzz_byte(plan);
    ERL_NIF_TERM pieces[64];
    unsigned count = step >> 2;
    size_t start = written.size;
    CHECK(buf_append(&written, header, sizeof header) == MESHX_OK);
    for (unsigned i = 0; i < count; i++) {
        size_t size = factors[step & 3] * fuzz_byte(plan);
        unsigned char *bytes = enif_make_new_binary(env, size, &pieces[i]);
        memset(bytes, (int)(step + i), size);
        CHECK(buf_append(&written, bytes, size) == MESHX_OK);
    }
    *announced = written.size - start - sizeof header;
    CHECK(frame_put_header(FRAME_DISTRIBUTION, *announced, header));
    memcpy(written.data + start, header, sizeof header);
    return enif_make_list_from_array(env, pieces, count);
}

/* [{Size, [Binary]}]; with |wrong| the last Size is not that of its binaries. */
static ERL_NIF_TERM make_frames(ErlNifEnv *env, struct fuzz_input *plan, unsigned count,
                                bool wrong) {
    ERL_NIF_TERM frames[64];
    for (unsigned i = 0; i < count; i++) {
        size_t size = 0;
        ERL_NIF_TERM pieces = make_frame(env, plan, &size);
        size += wrong && i + 1 == count;
        frames[i] = enif_make_tuple2(env, enif_make_ulong(env, size), pieces);
    }
    return enif_make_list_from_array(env, frames, count);
}

/* The next frame of |from| with something in it. */
static struct fuzz_input next_frame(struct fuzz_input *from, size_t *frames) {
    struct fuzz_input frame = {0};
    while (frame.size == 0 && from->size >= FRAME_DISTRIBUTION) {
        struct fuzz_input left = *from;
        size_t size = fuzz_number(&left, FRAME_DISTRIBUTION);
        if (size > left.size) {
            break;
        }
        frame = fuzz_take(&left, size);
        *from = left;
        (*frames)++;
    }
    return frame;
}

/* |all|: everything has been taken. Else the last frame may be cut. */
static void check_taken(const struct socket *socket, bool all) {
    struct fuzz_input taken = {(const uint8_t *)buf_text(&kernel.taken),
                               kernel.taken.size};
    struct fuzz_input meant = {(const uint8_t *)buf_text(&written), written.size};
    size_t frames = 0;
    size_t expected = 0;
    for (;;) {
        struct fuzz_input frame = next_frame(&taken, &frames);
        if (frame.size == 0) {
            break;
        }
        struct fuzz_input other = next_frame(&meant, &expected);
        CHECK(frame.size == other.size);
        CHECK(memcmp(frame.bytes, other.bytes, frame.size) == 0);
    }
    CHECK(atomic_load(&socket->bytes_out) == kernel.taken.size);
    if (all) {
        CHECK(next_frame(&meant, &expected).size == 0);
        CHECK(meant.size == 0 && taken.size == 0);
        CHECK(atomic_load(&socket->frames_out) == frames);
    }
}

static void tick(struct socket *socket) {
    ErlNifEnv *env = emulator_begin();
    size_t before = kernel.taken.size;
    bool pending = socket->writer.pending;
    ERL_NIF_TERM result = nif_tick(env, 1, &emulator_link);
    CHECK(emulator_is(result, "ok") || emulator_is_error(result));
    if (kernel.taken.size > before) {
        CHECK(!pending && ticked % FRAME_DISTRIBUTION == 0);
        ticked += kernel.taken.size - before + socket->writer.owed;
        CHECK(ticked % FRAME_DISTRIBUTION == 0);
    }
    (void)emulator_selected(); /* for a tick's rest, which nobody waits for */
    emulator_end(env);
}

/* Follows a write to its end, with ticks meanwhile. True: ok. */
static bool follow(struct socket *socket, ERL_NIF_TERM result, struct fuzz_input *plan) {
    for (int turns = 0; turns < 100; turns++) {
        unsigned selects = emulator_selected().output;
        size_t pending = atomic_load(&socket->bytes_pending);
        bool is_wait = emulator_is(result, "wait");
        if (!is_wait && !emulator_is(result, "more")) {
            CHECK(!emulator_is(result, "ok") || (pending == 0 && selects == 0));
            return emulator_is(result, "ok");
        }
        CHECK(is_wait == (selects > 0));
        CHECK(pending ==
              written.size - (kernel.taken.size - (ticked - socket->writer.owed)));
        if (fuzz_byte(plan) & 1) {
            tick(socket);
        }
        ErlNifEnv *env = emulator_begin();
        result = nif_flush(env, 1, &emulator_link);
        if (!emulator_is(result, "ok") && !emulator_is(result, "wait") &&
            !emulator_is(result, "more")) {
            emulator_end(env);
            return false;
        }
        emulator_end(env); /* the result is an atom */
    }
    return false; /* the kernel takes nothing any more */
}

/* False: the link is of no use any more. */
static bool write_frames_of(struct socket *socket, struct fuzz_input *plan,
                            uint8_t step) {
    bool wrong = step == 0xFE;
    ErlNifEnv *env = emulator_begin();
    const ERL_NIF_TERM arguments[] = {emulator_link,
                                      make_frames(env, plan, step >> 2, wrong)};
    ERL_NIF_TERM result = nif_write(env, 2, arguments);
    bool is_atom = emulator_is(result, "ok") || emulator_is(result, "wait") ||
                   emulator_is(result, "more");
    bool badarg = emulator_is_badarg(result);
    CHECK(is_atom || badarg || emulator_is_error(result));
    /* From here on only the link itself holds what is not yet taken. */
    emulator_end(env);
    if (wrong) {
        return false; /* what came before it may be written or not */
    }
    CHECK(!badarg);
    return is_atom && follow(socket, result, plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input plan = {data, size};
    struct socket socket;
    size_t failing = fuzz_byte(&plan);
    bool usable = true;
    kernel.sizes = fuzz_take(&plan, fuzz_byte(&plan) & 15);
    kernel.turn = 0;
    ticked = 0;
    emulator_open(&socket);
    socket.header = FRAME_DISTRIBUTION;
    emulator_fail(failing);
    for (int steps = 0; steps < 50 && usable && plan.size > 0 && written.size < 100000;
         steps++) {
        uint8_t step = fuzz_byte(&plan);
        if (step & 1) {
            tick(&socket);
        } else {
            usable = write_frames_of(&socket, &plan, step);
        }
    }
    emulator_fail(0);
    /* A tick's rest goes out with whatever comes next. */
    check_taken(&socket, usable && socket.writer.owed == 0);
    emulator_close(&socket);
    buf_fini(&kernel.taken);
    buf_fini(&written);
    return 0;
}
