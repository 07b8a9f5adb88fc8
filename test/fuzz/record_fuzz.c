/*
 * The guard's records as the core reads them: the same however the stream is cut, and
 * each is what its bytes say. Input: the sizes of the pieces, stream.
 */
#include "fuzz.h"

#include "buf.h"
#include "record.h"

#include <stdlib.h>
#include <string.h>

static void put_number(struct buf *out, int64_t number) {
    const uint8_t bytes[] = {(uint8_t)(number >> 24), (uint8_t)(number >> 16),
                             (uint8_t)(number >> 8), (uint8_t)number};
    CHECK(buf_append(out, bytes, sizeof bytes) == MESHX_OK);
}

/* What a guard writes for |record|. */
static void build(struct buf *out, const struct record *record) {
    uint8_t type = (uint8_t)record->type;
    CHECK(buf_append(out, &type, 1) == MESHX_OK);
    put_number(out, (int64_t)record->size - GUARD_RECORD_HEADER);
    switch (record->type) {
    case GUARD_STARTED:
        CHECK(record->pid >= 0);
        put_number(out, record->pid);
        break;
    case GUARD_EXEC_FAILED:
        put_number(out, record->error_number);
        break;
    case GUARD_EXITED:
        put_number(out, record->exit_status);
        put_number(out, record->signal_number);
        break;
    case GUARD_STDOUT:
    case GUARD_STDERR:
        CHECK(buf_append(out, record->line, record->line_size) == MESHX_OK);
        break;
    }
}

static void check_line(const struct record *record) {
    char line[GUARD_LINE_MAX + 1];
    record_line(record, line);
    CHECK(strlen(line) == record->line_size);
    for (size_t i = 0; i < record->line_size; i++) {
        CHECK(line[i] == (record->line[i] == '\0' ? ' ' : record->line[i]));
    }
}

/* Takes the record at |bytes| if it is whole, adding it to |out|. Returns its size. */
static size_t take(const uint8_t *bytes, size_t available, struct buf *out,
                   enum record_status *status) {
    struct record record;
    uint8_t *block = fuzz_block(bytes, available);
    *status = record_next(block, available, &record);
    if (*status == RECORD_COMPLETE) {
        CHECK(record.size <= available && record.size <= RECORD_MAX_SIZE);
        build(out, &record);
        if (record.type == GUARD_STDOUT || record.type == GUARD_STDERR) {
            check_line(&record);
        }
    }
    CHECK(*status != RECORD_PARTIAL || available < RECORD_MAX_SIZE);
    free(block);
    return *status == RECORD_COMPLETE ? record.size : 0;
}

/* All of |stream| in pieces. Returns why it ended. */
static enum record_status take_all(struct fuzz_input stream, struct fuzz_input sizes,
                                   bool whole, struct buf *out) {
    enum record_status status;
    size_t turn = 0;
    size_t start = 0;
    size_t end = whole ? stream.size : 0;
    for (;;) {
        start += take(stream.bytes + start, end - start, out, &status);
        if (status == RECORD_INVALID ||
            (status == RECORD_PARTIAL && end == stream.size)) {
            return status;
        }
        if (status == RECORD_PARTIAL) {
            size_t piece = 1 + fuzz_piece(sizes, &turn);
            end = stream.size - end < piece ? stream.size : end + piece;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fuzz_input stream = {data, size};
    struct fuzz_input sizes = fuzz_take(&stream, fuzz_byte(&stream));
    struct buf whole = {0};
    struct buf cut = {0};
    enum record_status status = take_all(stream, sizes, true, &whole);
    CHECK(take_all(stream, sizes, false, &cut) == status);
    CHECK(cut.size == whole.size);
    CHECK(whole.size <= stream.size);
    CHECK(memcmp(buf_text(&cut), buf_text(&whole), whole.size) == 0);
    /* Built again, they are the bytes they came from. */
    CHECK(whole.size == 0 || memcmp(whole.data, stream.bytes, whole.size) == 0);
    buf_fini(&whole);
    buf_fini(&cut);
    return 0;
}
