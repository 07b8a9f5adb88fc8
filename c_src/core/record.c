/*
 * Records of meshx_guard, sans I/O. L1, any thread: no state.
 *
 * Invariant: the payload size is checked against the type before anything waits for the
 * payload, so that no input makes the caller collect more than RECORD_MAX_SIZE bytes.
 */
#include "record.h"

#include <stdbool.h>
#include <string.h>

static uint32_t get_number(const uint8_t *bytes) {
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 |
           (uint32_t)bytes[3];
}

static bool size_fits(enum guard_record type, uint32_t size) {
    switch (type) {
    case GUARD_STARTED:
    case GUARD_EXEC_FAILED:
        return size == 4;
    case GUARD_EXITED:
        return size == 8;
    case GUARD_STDOUT:
    case GUARD_STDERR:
        return size <= GUARD_LINE_MAX;
    }
    return false; /* no such type */
}

enum record_status record_next(const uint8_t *bytes, size_t available,
                               struct record *record) {
    if (available < GUARD_RECORD_HEADER) {
        return RECORD_PARTIAL;
    }
    enum guard_record type = (enum guard_record)bytes[0];
    uint32_t size = get_number(bytes + 1);
    if (!size_fits(type, size)) {
        return RECORD_INVALID;
    }
    if (available < GUARD_RECORD_HEADER + (size_t)size) {
        return RECORD_PARTIAL;
    }
    const uint8_t *payload = bytes + GUARD_RECORD_HEADER;
    *record = (struct record){.type = type, .size = GUARD_RECORD_HEADER + (size_t)size};
    switch (type) {
    case GUARD_STARTED:
        record->pid = get_number(payload);
        break;
    case GUARD_EXEC_FAILED:
        record->error_number = (int)get_number(payload);
        break;
    case GUARD_EXITED:
        record->exit_status = (int)get_number(payload);
        record->signal_number = (int)get_number(payload + 4);
        break;
    case GUARD_STDOUT:
    case GUARD_STDERR:
        record->line = (const char *)payload;
        record->line_size = size;
        break;
    }
    return RECORD_COMPLETE;
}

void record_line(const struct record *record, char line[GUARD_LINE_MAX + 1]) {
    for (size_t i = 0; i < record->line_size; i++) {
        line[i] = record->line[i] == '\0' ? ' ' : record->line[i];
    }
    line[record->line_size] = '\0';
}
