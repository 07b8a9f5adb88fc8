/*
 * The guard's end of the records: a sidecar's output, however it comes, becomes records
 * that the core reads as the same lines. Input: the sizes of the pieces, output.
 */
#include "fuzz.h"

#include "record.h"

#define main guard_main
int guard_main(int argc, char **argv);
#include "meshx_guard.c"
#undef main

static struct guard guard;

/* Takes one line record off what the guard would send. */
static struct fuzz_input take_line(size_t *at) {
    struct record record;
    CHECK(record_next(guard.pending + *at, guard.pending_end - *at, &record) ==
          RECORD_COMPLETE);
    CHECK(record.type == GUARD_STDOUT);
    *at += record.size;
    return (struct fuzz_input){(const uint8_t *)record.line, record.line_size};
}

static void check_piece(size_t *at, const uint8_t *bytes, size_t size) {
    struct fuzz_input line = take_line(at);
    CHECK(line.size == size);
    CHECK(size == 0 || memcmp(line.bytes, bytes, size) == 0);
}

/* A line, long ones in pieces; without the return that some programs put at its end. */
static void check_line(size_t *at, struct fuzz_input line) {
    bool cut = false;
    while (line.size > GUARD_LINE_MAX) {
        struct fuzz_input piece = fuzz_take(&line, GUARD_LINE_MAX);
        check_piece(at, piece.bytes, piece.size);
        cut = true;
    }
    if (line.size > 0 && line.bytes[line.size - 1] == '\r') {
        line.size--;
    }
    if (line.size > 0 || !cut) {
        check_piece(at, line.bytes, line.size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input output = {data, size};
    struct fuzz_input sizes = fuzz_take(&output, fuzz_byte(&output));
    struct fuzz_input left = output;
    struct stream *stream = &guard.streams[0];
    size_t turn = 0;
    size_t at = 0;

    guard.owner_reads = true;
    guard.pending_start = guard.pending_end = 0;
    stream->type = GUARD_STDOUT;
    while (left.size > 0) {
        struct fuzz_input piece = fuzz_take(&left, 1 + 17 * fuzz_piece(sizes, &turn));
        char *bytes = fuzz_text(piece);
        split_lines(&guard, stream, bytes, piece.size);
        free(bytes);
    }
    if (stream->size > 0) {
        end_line(&guard, stream);
    }
    stream->cut = false;
    CHECK(guard.dropped == 0);

    while (output.size > 0) {
        check_line(&at, fuzz_until(&output, '\n'));
    }
    CHECK(at == guard.pending_end);
    return 0;
}
