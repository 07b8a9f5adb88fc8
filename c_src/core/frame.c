/*
 * Length framing of the Erlang distribution, sans I/O. L1, any thread: no state.
 *
 * Invariant: no byte at or after |available| is read, and a length is judged as soon as
 * its header is whole, so that nobody allocates for a frame that will be refused.
 */
#include "frame.h"
#include "meshx_node.h"

static size_t largest(enum frame_header header) {
    return header == FRAME_HANDSHAKE ? FRAME_HANDSHAKE_MAX_SIZE : FRAME_MAX_SIZE;
}

enum frame_status frame_next(enum frame_header header, const uint8_t *bytes,
                             size_t available, size_t *size, size_t *need) {
    size_t header_size = (size_t)header;
    if (available < header_size) {
        *need = header_size;
        return FRAME_PARTIAL;
    }
    size_t length = 0;
    for (size_t i = 0; i < header_size; i++) {
        length = length << 8 | bytes[i];
    }
    *size = length;
    if (length > largest(header)) {
        return FRAME_TOO_LARGE;
    }
    *need = header_size + length;
    return available < *need ? FRAME_PARTIAL : FRAME_COMPLETE;
}

int frame_put_header(enum frame_header header, size_t size, uint8_t *out) {
    if (size > largest(header)) {
        return false;
    }
    for (size_t i = (size_t)header; i > 0; i--) {
        out[i - 1] = (uint8_t)(size & 0xFF);
        size >>= 8;
    }
    return true;
}
