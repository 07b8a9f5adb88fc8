/*
 * Whose listener is at a local port? L1, any thread, no state.
 *
 * A connect() does not tell: it reaches whoever was faster at the port. The kernel's
 * socket diagnostics name the listener a connection would reach, /proc the processes that
 * have it open.
 */
#ifndef MESHX_CORE_LISTENER_H
#define MESHX_CORE_LISTENER_H

#include "sock.h"
#include <sys/types.h>

enum listener_owner {
    LISTENER_NOBODY,
    LISTENER_FAMILY, /* the process, or another descendant of its parent */
    LISTENER_OTHER,
    LISTENER_UNKNOWN /* no diagnostics, no /proc, or the process is another user's */
};

/*
 * Who listens at |address|, as seen from |process|. |*known| is 0 at first and holds the
 * family's socket from then on, which spares the look through /proc; set it to 0 when the
 * process is another one.
 */
enum listener_owner listener_owner(const struct sock_address *address, pid_t process,
                                   uint32_t *known);

/* Stores in |*out| the user whose process has made the listener that a connection to
 * |address| would reach. Returns 0; -ENOENT: there is none; else -errno. */
int listener_user(const struct sock_address *address, uid_t *out);

/* Whether a descendant of |process| has the socket |inode|, a listener or a connection,
 * open: FAMILY, OTHER, or UNKNOWN. */
enum listener_owner listener_descendant(uint32_t inode, pid_t process);

/* Whether connections to |address|'s port are established. True if it can't be told. */
bool listener_has_connections(const struct sock_address *address);

#endif
