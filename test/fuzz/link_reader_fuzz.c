/*
 * A link's input: whatever comes, in whatever pieces, what is read are the frames of the
 * stream, in order, none twice and none lost; also when memory runs out in between.
 * Input: packets of the handshake, which allocation fails, the sizes of the pieces (0:
 * nothing yet), and what comes.
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
    struct buf stream;
    size_t sent;
    struct fuzz_input sizes;
    size_t turn;
    bool ends;
} peer;

static ssize_t fuzz_recvmsg(int fd, struct msghdr *message, int flags);
#define recvmsg fuzz_recvmsg
#include "link_reader.c"
#undef recvmsg

/* The peer's next bytes. */
static ssize_t fuzz_recvmsg(int fd, struct msghdr *message, int flags) {
    (void)fd;
    (void)flags;
    size_t left = peer.stream.size - peer.sent;
    size_t size = fuzz_piece(peer.sizes, &peer.turn);
    size_t copied = 0;
    if (left == 0 && peer.ends) {
        return 0;
    }
    if (left == 0 || size == 0) {
        errno = EAGAIN;
        return -1;
    }
    /* Small pieces and ones that fill any buffer, but not too many. */
    size *= 1 + peer.stream.size / 500;
    size = size < 200 ? size : size * size * 10;
    size = size < left ? size : left;
    for (size_t i = 0; i < message->msg_iovlen && copied < size; i++) {
        struct iovec *room = &message->msg_iov[i];
        size_t part = size - copied < room->iov_len ? size - copied : room->iov_len;
        memcpy(room->iov_base, peer.stream.data + peer.sent + copied, part);
        /* All its length is there to be written to. */
        if (part < room->iov_len) {
            ((char *)room->iov_base)[room->iov_len - 1] = 'x';
        }
        copied += part;
    }
    peer.sent += copied;
    return (ssize_t)copied;
}

/* With bytes that differ from place to place and from frame to frame. */
static void put_frame(size_t size_of_header, size_t size, uint8_t fill) {
    static uint8_t bytes[1031 * 256 + 256];
    uint8_t header[FRAME_DISTRIBUTION];
    for (size_t i = 0; bytes[1] == 0 && i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)(i + i / 251);
    }
    CHECK(frame_put_header((enum frame_header)size_of_header, size, header));
    CHECK(fill + size <= sizeof bytes);
    CHECK(buf_append(&peer.stream, header, size_of_header) == MESHX_OK);
    CHECK(buf_append(&peer.stream, bytes + fill, size) == MESHX_OK);
}

/* Makes the stream: packets, then frames of all sizes, ticks, and bytes as they are. */
static void make_stream(struct fuzz_input plan, size_t packets) {
    static const size_t factors[] = {1, 37, 257, 1031};
    for (size_t i = 0; i < packets; i++) {
        struct fuzz_input header = plan;
        size_t size = fuzz_number(&plan, 2);
        if (size <= FRAME_HANDSHAKE_MAX_SIZE) {
            put_frame(FRAME_HANDSHAKE, size, (uint8_t)i);
        } else {
            header = fuzz_take(&header, 2);
            CHECK(buf_append(&peer.stream, header.bytes, header.size) == MESHX_OK);
        }
    }
    /* Not so much that few inputs can be tried. */
    for (int steps = 0; steps < 200 && plan.size > 0 && peer.stream.size < 300000;
         steps++) {
        uint8_t step = fuzz_byte(&plan);
        switch (step & 3) {
        case 0: {
            struct fuzz_input bytes = fuzz_take(&plan, step >> 2);
            CHECK(buf_append(&peer.stream, bytes.bytes, bytes.size) == MESHX_OK);
            break;
        }
        case 1:
            for (size_t i = 0; i <= (size_t)step >> 2; i++) {
                put_frame(FRAME_DISTRIBUTION, 0, 0);
            }
            break;
        default:
            put_frame(FRAME_DISTRIBUTION,
                      factors[step >> 2 & 3] * fuzz_byte(&plan) + (step >> 6), step);
        }
    }
}

/* Where the next frame with something in it should begin; its size in |*size|. False:
 * there is none. */
static bool next_frame(size_t header, size_t *at, size_t *size) {
    size_t largest =
        header == FRAME_HANDSHAKE ? FRAME_HANDSHAKE_MAX_SIZE : FRAME_MAX_SIZE;
    for (;;) {
        struct fuzz_input left = {(const uint8_t *)buf_text(&peer.stream) + *at,
                                  peer.stream.size - *at};
        if (left.size < header) {
            return false;
        }
        *size = fuzz_number(&left, header);
        if (*size > largest || *size > left.size) {
            return false;
        }
        *at += header;
        if (*size > 0 || header == FRAME_HANDSHAKE) {
            return true;
        }
    }
}

/* The frames of one call are those that come next. */
static size_t check_frames(ErlNifEnv *env, ERL_NIF_TERM list, size_t header, size_t *at) {
    ERL_NIF_TERM head;
    size_t count = 0;
    for (; enif_get_list_cell(env, list, &head, &list); count++) {
        ErlNifBinary frame;
        size_t size = 0;
        CHECK(enif_inspect_binary(env, head, &frame));
        CHECK(next_frame(header, at, &size));
        CHECK(frame.size == size);
        CHECK(size == 0 || memcmp(frame.data, peer.stream.data + *at, size) == 0);
        *at += size;
    }
    return count;
}

/* Reads to the end, or to the first error that is none of memory. */
static void read_all(struct socket *socket, size_t packets) {
    size_t at = 0;
    size_t size = 0;
    bool ended = false;
    while (!ended) {
        const ERL_NIF_TERM arguments[] = {emulator_link, am_undefined};
        const ERL_NIF_TERM *parts;
        int arity;
        ErlNifEnv *env = emulator_begin();
        if (packets == 0 && socket->header == FRAME_HANDSHAKE) {
            (void)nif_framing(env, 2, arguments);
        }
        /* What is awaited changes when a wait ends and who sees to it, nothing else. */
        bool awaits_much = peer.turn % 2 == 1;
        const ERL_NIF_TERM awaited[] = {emulator_link,
                                        enif_make_ulong(env, awaits_much ? 65536 : 0)};
        CHECK(emulator_is(nif_low_water(env, 2, awaited), "ok"));
        ERL_NIF_TERM result = nif_read(env, 1, arguments);
        unsigned selects = emulator_selected().input;
        CHECK(enif_get_tuple(env, result, &arity, &parts) && arity == 2);
        if (emulator_is_error(result)) {
            ended = !emulator_is(parts[1], "errno"); /* ENOMEM: try again */
        } else {
            size_t count = check_frames(env, parts[1], socket->header, &at);
            bool waits = emulator_is(parts[0], "wait");
            CHECK(waits || emulator_is(parts[0], "more"));
            CHECK((selects > 0) == (waits && !awaits_much));
            CHECK(socket->header == FRAME_DISTRIBUTION || count <= 1);
            packets -= socket->header == FRAME_HANDSHAKE ? count : 0;
            ended = waits && peer.sent == peer.stream.size && !peer.ends;
        }
        emulator_end(env);
    }
    CHECK(!next_frame(socket->header, &at, &size));
    CHECK(atomic_load(&socket->bytes_in) == peer.sent);
}

/* Were all of them 0, nothing would ever come. */
static bool brings_something(struct fuzz_input sizes) {
    bool result = sizes.size == 0;
    for (size_t i = 0; i < sizes.size; i++) {
        result = result || sizes.bytes[i] != 0;
    }
    return result;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input plan = {data, size};
    struct socket socket;
    size_t packets = fuzz_byte(&plan);
    size_t failing = fuzz_byte(&plan);
    peer.ends = packets & 1;
    packets = packets >> 1 & 3;
    peer.sizes = fuzz_take(&plan, fuzz_byte(&plan) & 15);
    peer.turn = peer.sent = 0;
    if (!brings_something(peer.sizes)) {
        return 0;
    }
    buf_fini(&peer.stream);
    make_stream(plan, packets);
    emulator_open(&socket);
    emulator_fail(failing);
    read_all(&socket, packets);
    emulator_fail(0);
    emulator_close(&socket);
    buf_fini(&peer.stream);
    return 0;
}
