/*
 * Which user of the operating system has opened a listener of this host. L1, any thread.
 */
#ifndef MESHX_CORE_SOCK_LISTENER_H
#define MESHX_CORE_SOCK_LISTENER_H

#include "sock.h"
#include <sys/types.h>

/*
 * Stores in |*out| the user whose listener a connection to |address| would reach. Returns
 * 0; -ENOENT: nothing listens there in this network namespace; -EADDRINUSE: listeners of
 * several users might be meant; else -errno. Reads through all connections of the host,
 * which takes milliseconds when there are thousands.
 */
int sock_listener_owner(const struct sock_address *address, uid_t *out);

#endif
