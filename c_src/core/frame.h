/*
 * Length framing of the Erlang distribution, sans I/O. L1.
 *
 * In the handshake a packet has a 2-byte big-endian length before it, after it 4 bytes
 * (https://www.erlang.org/doc/apps/erts/erl_dist_protocol). An empty 4-byte frame is a
 * tick. Stateless: the caller keeps the bytes and asks again when more have come.
 */
#ifndef MESHX_CORE_FRAME_H
#define MESHX_CORE_FRAME_H

#include <stddef.h>
#include <stdint.h>

enum frame_header {
    FRAME_HANDSHAKE = 2,
    FRAME_DISTRIBUTION = 4
}; /* header size in bytes */

/* Longest frame accepted after the handshake. The emulator sends fragments of 64 KiB;
 * only a message with a huge control part makes a larger frame. */
#define FRAME_MAX_SIZE ((size_t)128 * 1024 * 1024)
/* Longest packet of the handshake: none has more than a node name of 255 bytes and some
 * 30 bytes beside it. Whoever sends it is still a stranger. */
#define FRAME_HANDSHAKE_MAX_SIZE ((size_t)4 * 1024)

enum frame_status {
    FRAME_COMPLETE,
    FRAME_PARTIAL,   /* |*need| bytes in all are needed before asking again */
    FRAME_TOO_LARGE, /* |*size| is over the maximum */
};

/*
 * Looks at the frame that begins at |bytes|. FRAME_COMPLETE: payload is |*size| bytes at
 * |bytes| + |header|. FRAME_PARTIAL: |*need| is header + payload, or just the header size
 * as long as the header itself is not whole.
 */
enum frame_status frame_next(enum frame_header header, const uint8_t *bytes,
                             size_t available, size_t *size, size_t *need);

/* Writes the header for a payload of |size| bytes to |out| (|header| bytes). False: too
 * large. */
int frame_put_header(enum frame_header header, size_t size, uint8_t *out);

#endif
