/*
 * Framing: however a stream is cut, its frames are those that their lengths say, and what
 * is missing is known from the header. Input: framing, the sizes of the pieces, stream.
 */
#include "fuzz.h"

#include "frame.h"

#include <stdlib.h>
#include <string.h>

static size_t length_of(const uint8_t *bytes, size_t header) {
    return fuzz_number(&(struct fuzz_input){bytes, header}, header);
}

/* Looks at |available| bytes and checks what is said of them. True: |*size| is a frame.
 */
static bool check_next(enum frame_header header, const uint8_t *bytes, size_t available,
                       size_t *size, bool *too_large) {
    uint8_t again[FRAME_DISTRIBUTION];
    uint8_t *block = fuzz_block(bytes, available);
    size_t need = 0;
    enum frame_status status = frame_next(header, block, available, size, &need);
    free(block);
    *too_large = status == FRAME_TOO_LARGE;
    if (available < (size_t)header) {
        CHECK(status == FRAME_PARTIAL && need == (size_t)header);
        return false;
    }
    size_t length = length_of(bytes, (size_t)header);
    CHECK(*size == length);
    CHECK(*too_large == (length > (header == FRAME_HANDSHAKE ? FRAME_HANDSHAKE_MAX_SIZE
                                                             : FRAME_MAX_SIZE)));
    CHECK((frame_put_header(header, length, again) != 0) == !*too_large);
    if (*too_large) {
        return false;
    }
    CHECK(memcmp(again, bytes, (size_t)header) == 0);
    CHECK(need == (size_t)header + length);
    CHECK((status == FRAME_COMPLETE) == (available >= need));
    return status == FRAME_COMPLETE;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input stream = {data, size};
    enum frame_header header =
        fuzz_byte(&stream) & 1 ? FRAME_HANDSHAKE : FRAME_DISTRIBUTION;
    struct fuzz_input sizes = fuzz_take(&stream, fuzz_byte(&stream));
    size_t turn = 0;
    size_t start = 0;
    size_t end = 0;
    bool too_large = false;
    while (!too_large) {
        size_t frame = 0;
        if (check_next(header, stream.bytes + start, end - start, &frame, &too_large)) {
            start += (size_t)header + frame;
            CHECK(start <= end);
        } else if (end == stream.size) {
            break;
        } else {
            size_t piece = 1 + fuzz_piece(sizes, &turn);
            end = stream.size - end < piece ? stream.size : end + piece;
        }
    }
    return 0;
}
