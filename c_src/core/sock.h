/*
 * Non-blocking TCP sockets, IPv4 and IPv6. L1.
 *
 * No state but the descriptor, which the caller owns from success on. All descriptors are
 * non-blocking and close-on-exec from birth. A negative return is -errno.
 */
#ifndef MESHX_CORE_SOCK_H
#define MESHX_CORE_SOCK_H

#include "meshx_node.h"
#include <sys/socket.h>

struct sock_address {
    struct sockaddr_storage storage;
    socklen_t size;
};

/* Socket options with their defaults below; -1 means "leave the system's default", but
 * for the receive buffer of a connection over loopback: 1 MiB where the system allows it.
 */
struct sock_options {
    int nodelay;     /* TCP_NODELAY, 0 or 1 */
    int keepalive;   /* SO_KEEPALIVE */
    int sndbuf;      /* SO_SNDBUF, bytes */
    int rcvbuf;      /* SO_RCVBUF, bytes */
    int reuseaddr;   /* SO_REUSEADDR (listener) */
    int priority;    /* SO_PRIORITY */
    int tos;         /* IP_TOS / IPV6_TCLASS */
    int backlog;     /* listen(2) */
    int ipv6_v6only; /* IPV6_V6ONLY */
};
#define SOCK_OPTIONS_DEFAULT                                                             \
    { 1, -1, -1, -1, 1, -1, -1, 1024, -1 }

/* Numeric |address| ("127.0.0.1", "::1") and |port| into |out|. 0 or -EINVAL. */
int sock_address_parse(const char *address, uint16_t port, struct sock_address *out);

/* Opens a listener. 0 and |*out|, else -errno. Without TCP_DEFER_ACCEPT: the connections
 * of those who stay silent would fill the kernel's queue, where nobody can turn them
 * away.
 */
int sock_listen(const struct sock_address *address, const struct sock_options *options,
                int *out);

/* Accepts one connection. 0 and |*out|, -EAGAIN if there is none, else -errno.
 * Connections that died while queued are passed over. */
int sock_accept(int listener, const struct sock_options *options, int *out,
                struct sock_address *peer);

/* Begins to connect. 0: connected, -EINPROGRESS: wait until writable, then
 * sock_connected(). In both cases |*out| is the socket; else -errno and nothing to close.
 * |bind| may be NULL. */
int sock_connect(const struct sock_address *address, const struct sock_address *bind,
                 const struct sock_options *options, int *out);

/* Bytes that the peer has no room for yet and that the kernel may take all the same. They
 * are no sooner there for being in its send buffer, which grows to MiBs, and small
 * messages wait behind them. */
#define SOCK_UNSENT_MAX (3 * 512 * 1024)
/* The same while the writer waits for room, of which the kernel tells when there is less
 * than half of this: a wait that ends soon comes again soon, and a scheduler of the
 * emulator spins for most of it. */
#define SOCK_UNSENT_WAITING (384 * 1024)

/* Bounds these bytes, on a system that can. Connections begin with SOCK_UNSENT_MAX. */
void sock_bound_unsent(int fd, int bytes);

/* The outcome of a connect in progress: 0, -EINPROGRESS or -errno. A socket connected to
 * itself is -ECONNREFUSED, here and in sock_connect(). */
int sock_connected(int fd);

/* The local or remote address. 0 or -errno. */
int sock_local(int fd, struct sock_address *out);
int sock_peer(int fd, struct sock_address *out);
uint16_t sock_port(const struct sock_address *address);

/*
 * Finds a port in |range| that can be bound at |address| (numeric) now, beginning at a
 * random place, skipping those for which |taken(context, port)| is true (may be NULL).
 * Stores it in |*out|. Returns 0, -EADDRINUSE when none is free, or -EINVAL or
 * -EADDRNOTAVAIL for a wrong address. Nothing stays bound: another program may take it,
 * which the caller must survive.
 */
int sock_find_port(const char *address, struct meshx_port_range range,
                   bool (*taken)(void *context, uint16_t port), void *context,
                   uint16_t *out);

#endif
