/*
 * What meshx_guard tells its parent over the socket on descriptor 3: records of a 1-byte
 * type, a 4-byte big-endian payload size and the payload. The parent sends nothing: when
 * its end of the socket closes, the guard stops the sidecar (TERM to its group, grace,
 * KILL) and exits.
 *
 * Usage: meshx_guard STOP_TIMEOUT_MS PROGRAM [ARGUMENT ...]
 * After EXITED or EXEC_FAILED the guard has nothing left to do and exits.
 */
#ifndef MESHX_GUARD_RECORD_H
#define MESHX_GUARD_RECORD_H

#define GUARD_SOCKET_FD 3
#define GUARD_RECORD_HEADER 5
#define GUARD_LINE_MAX 4096 /* longer output lines are cut into pieces of this size */

enum guard_record {
    GUARD_STARTED = 1,     /* payload: sidecar's pid, 4 bytes big-endian */
    GUARD_EXEC_FAILED = 2, /* payload: errno, 4 bytes */
    GUARD_EXITED = 3,      /* payload: 4 bytes exit status or -1, 4 bytes signal or 0 */
    GUARD_STDOUT = 4,      /* payload: a line without its newline */
    GUARD_STDERR = 5,
};

#endif
