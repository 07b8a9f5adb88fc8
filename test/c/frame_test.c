/* Length framing: every cut of a stream, every limit. */
#include "support.h"
#include "frame.h"

#include <stdlib.h>
#include <string.h>

/* Bytes are always handed over in a block of just their size, so that AddressSanitizer
 * sees a read beyond |available|. */
static enum frame_status next_of(enum frame_header header, const uint8_t *bytes,
                                 size_t available, size_t *size, size_t *need) {
    uint8_t *exact = malloc(available == 0 ? 1 : available);
    assert_non_null(exact);
    memcpy(exact, bytes, available);
    enum frame_status status = frame_next(header, exact, available, size, need);
    free(exact);
    return status;
}

static void check_cuts(enum frame_header header, size_t length) {
    size_t total = (size_t)header + length;
    uint8_t *bytes = malloc(total + 3);
    assert_non_null(bytes);
    memset(bytes, 0xFF, total + 3);
    assert_true(frame_put_header(header, length, bytes));
    for (size_t available = 0; available <= total + 3; available++) {
        size_t size = 0;
        size_t need = 0;
        enum frame_status status = next_of(header, bytes, available, &size, &need);
        if (available < (size_t)header) {
            assert_int_equal(status, FRAME_PARTIAL);
            assert_int_equal(need, header);
        } else if (available < total) {
            assert_int_equal(status, FRAME_PARTIAL);
            assert_int_equal(need, total);
        } else {
            assert_int_equal(status, FRAME_COMPLETE);
            assert_int_equal(size, length);
        }
    }
    free(bytes);
}

static void every_cut(void **state) {
    (void)state;
    static const size_t lengths[] = {0, 1, 2, 5, 255, 256, 257, 1000};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        check_cuts(FRAME_HANDSHAKE, lengths[i]);
        check_cuts(FRAME_DISTRIBUTION, lengths[i]);
    }
}

static void tick_is_an_empty_frame(void **state) {
    (void)state;
    const uint8_t tick[4] = {0};
    size_t size = 1;
    size_t need = 0;
    assert_int_equal(next_of(FRAME_DISTRIBUTION, tick, 4, &size, &need), FRAME_COMPLETE);
    assert_int_equal(size, 0);
}

/* A stream of frames delivered in two pieces, cut at every byte: the same frames come
 * out, and |need| is never more than what really is missing. */
static void stream_cut_anywhere(void **state) {
    (void)state;
    static const size_t lengths[] = {3, 0, 0, 300, 1, 70};
    const size_t count = sizeof lengths / sizeof lengths[0];
    uint8_t stream[600];
    size_t total = 0;
    for (size_t i = 0; i < count; i++) {
        assert_true(frame_put_header(FRAME_DISTRIBUTION, lengths[i], stream + total));
        memset(stream + total + 4, (int)i + 1, lengths[i]);
        total += 4 + lengths[i];
    }
    for (size_t cut = 0; cut <= total; cut++) {
        const size_t ends[2] = {cut, total};
        size_t from = 0;
        size_t frames = 0;
        for (int piece = 0; piece < 2; piece++) {
            size_t size = 0;
            size_t need = 0;
            while (frames < count &&
                   next_of(FRAME_DISTRIBUTION, stream + from, ends[piece] - from, &size,
                           &need) == FRAME_COMPLETE) {
                assert_int_equal(size, lengths[frames]);
                if (size > 0) {
                    assert_int_equal(stream[from + 4], frames + 1);
                }
                from += 4 + size;
                frames++;
            }
            if (frames < count) {
                assert_true(need > ends[piece] - from);
                assert_true(need <= 4 + lengths[frames]);
            }
        }
        assert_int_equal(frames, count);
        assert_int_equal(from, total);
    }
}

static void big_endian(void **state) {
    (void)state;
    uint8_t bytes[5] = {0, 0, 0, 0, 0xAA};
    assert_true(frame_put_header(FRAME_DISTRIBUTION, 0x01020304, bytes));
    assert_memory_equal(bytes, "\x01\x02\x03\x04\xAA", 5);
    memset(bytes, 0xAA, sizeof bytes);
    assert_true(frame_put_header(FRAME_HANDSHAKE, 0x0506, bytes));
    assert_memory_equal(bytes, "\x05\x06\xAA\xAA\xAA", 5);

    size_t size = 0;
    size_t need = 0;
    assert_int_equal(
        next_of(FRAME_DISTRIBUTION, (const uint8_t *)"\x01\x02\x03\x04", 4, &size, &need),
        FRAME_PARTIAL);
    assert_int_equal(need, 4 + 0x01020304);
}

static void limits(void **state) {
    (void)state;
    uint8_t bytes[4] = {0x55, 0x55, 0x55, 0x55};
    size_t size = 0;
    size_t need = 0;

    assert_true(frame_put_header(FRAME_HANDSHAKE, FRAME_HANDSHAKE_MAX_SIZE, bytes));
    assert_int_equal(next_of(FRAME_HANDSHAKE, bytes, 2, &size, &need), FRAME_PARTIAL);
    assert_int_equal(need, FRAME_HANDSHAKE_MAX_SIZE + 2);

    assert_true(frame_put_header(FRAME_DISTRIBUTION, FRAME_MAX_SIZE, bytes));
    assert_int_equal(next_of(FRAME_DISTRIBUTION, bytes, 4, &size, &need), FRAME_PARTIAL);
    assert_int_equal(need, FRAME_MAX_SIZE + 4);

    /* A refused header writes nothing. */
    memset(bytes, 0x55, sizeof bytes);
    assert_false(frame_put_header(FRAME_HANDSHAKE, FRAME_HANDSHAKE_MAX_SIZE + 1, bytes));
    assert_false(frame_put_header(FRAME_HANDSHAKE, 65536, bytes));
    assert_false(frame_put_header(FRAME_DISTRIBUTION, FRAME_MAX_SIZE + 1, bytes));
    assert_false(frame_put_header(FRAME_DISTRIBUTION, SIZE_MAX, bytes));
    assert_memory_equal(bytes, "\x55\x55\x55\x55", 4);

    /* Too large is known from the header alone. */
    assert_int_equal(
        next_of(FRAME_DISTRIBUTION, (const uint8_t *)"\x08\x00\x00\x01", 4, &size, &need),
        FRAME_TOO_LARGE);
    assert_int_equal(size, FRAME_MAX_SIZE + 1);
    assert_int_equal(
        next_of(FRAME_DISTRIBUTION, (const uint8_t *)"\xff\xff\xff\xff", 4, &size, &need),
        FRAME_TOO_LARGE);
    assert_int_equal(size, UINT32_MAX);
    assert_int_equal(
        next_of(FRAME_HANDSHAKE, (const uint8_t *)"\x10\x01", 2, &size, &need),
        FRAME_TOO_LARGE);
    assert_int_equal(size, FRAME_HANDSHAKE_MAX_SIZE + 1);
    assert_int_equal(
        next_of(FRAME_DISTRIBUTION, (const uint8_t *)"\xff\xff\xff", 3, &size, &need),
        FRAME_PARTIAL);
    assert_int_equal(need, 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_cut),
        cmocka_unit_test(tick_is_an_empty_frame),
        cmocka_unit_test(stream_cut_anywhere),
        cmocka_unit_test(big_endian),
        cmocka_unit_test(limits),
    };
    return cmocka_run_group_tests_name("frame", tests, NULL, NULL);
}
