/*
 * Records of meshx_guard (guard_record.h), sans I/O. L1.
 *
 * Stateless, as frame.h: the caller keeps the bytes and asks again when more have come.
 */
#ifndef MESHX_CORE_RECORD_H
#define MESHX_CORE_RECORD_H

#include "guard_record.h"

#include <stddef.h>
#include <stdint.h>

#define RECORD_MAX_SIZE (GUARD_RECORD_HEADER + GUARD_LINE_MAX)

struct record {
    enum guard_record type;
    size_t size;       /* with its header */
    int64_t pid;       /* STARTED */
    int error_number;  /* EXEC_FAILED */
    int exit_status;   /* EXITED; -1: ended by |signal_number| */
    int signal_number; /* EXITED; 0: none */
    const char *line;  /* STDOUT, STDERR: borrowed from the bytes, without a NUL */
    size_t line_size;  /* at most GUARD_LINE_MAX */
};

enum record_status {
    RECORD_COMPLETE,
    RECORD_PARTIAL, /* more bytes are needed; never when there are RECORD_MAX_SIZE */
    RECORD_INVALID, /* not something a guard writes */
};

/* Looks at the record that begins at |bytes|. Fills |record| when it is COMPLETE. */
enum record_status record_next(const uint8_t *bytes, size_t available,
                               struct record *record);

/* Copies the line as a NUL-terminated string; a NUL within it becomes a space. */
void record_line(const struct record *record, char line[GUARD_LINE_MAX + 1]);

#endif
