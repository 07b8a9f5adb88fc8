/*
 * Which user of the operating system owns the other end of a connection. L1, any thread.
 *
 * On loopback the kernel knows both ends of every connection. Users are as in the
 * caller's user namespace; one that has no place there is the overflow user (65534).
 */
#ifndef MESHX_CORE_SOCK_OWNER_H
#define MESHX_CORE_SOCK_OWNER_H

#include "sock.h"
#include <sys/types.h>

struct sock_owner {
    uid_t uid;
    uint32_t inode; /* of the socket, as in /proc/PID/fd */
};

/*
 * Stores in |*out| the user whose process holds the end at |peer| of the connection
 * between |local| and |peer|. Returns 0, or -ENOENT: no process of this host (this
 * network namespace) holds it, because it is closed or because it is elsewhere;
 * -EOPNOTSUPP: the kernel's socket diagnostics can't be used, ask sock_owner_scan(); else
 * -errno. Takes some microseconds, however many connections there are.
 */
int sock_owner(const struct sock_address *local, const struct sock_address *peer,
               struct sock_owner *out);

/*
 * The same from /proc/net/tcp and tcp6, but never -EOPNOTSUPP. Reads through all
 * connections of the host, so it takes milliseconds when there are thousands.
 */
int sock_owner_scan(const struct sock_address *local, const struct sock_address *peer,
                    struct sock_owner *out);

#endif
