/*
 * The kernel's socket diagnostics, sock_diag(7): who has which TCP socket? L1, any
 * thread, no state: a netlink socket lives only for the one question.
 */
#ifndef MESHX_CORE_SOCK_DIAG_H
#define MESHX_CORE_SOCK_DIAG_H

#include "sock.h"
#include <linux/inet_diag.h>

/* One end of a connection. An IPv4 address within IPv6 is an IPv4 address. */
struct sock_end {
    int family;          /* others than IPv4 and IPv6 have no address and no port */
    uint32_t address[4]; /* network order; IPv4 has the first */
    uint16_t port;       /* network order */
};

struct sock_end sock_end_make(int family, const void *address, uint16_t port);
struct sock_end sock_end_of(const struct sock_address *address);
bool sock_end_is_same(const struct sock_end *one, const struct sock_end *other);

/*
 * What the kernel finds when a packet comes for |local| from |peer| (NULL: a new
 * connection), if it is in one of |states|, bits 1 << TCP_...: of a connection that is
 * gone that may be a listener. 0 and |*out|; -ENOENT: nothing; -EOPNOTSUPP: the
 * diagnostics can't be used; else -errno. Takes some microseconds.
 */
int sock_diag_find(const struct sock_end *local, const struct sock_end *peer,
                   uint32_t states, struct inet_diag_msg *out);

/* Looks through all sockets for one in |states| that has |local|'s port, whatever its
 * addresses. 0, or as above. */
int sock_diag_find_port(const struct sock_end *local, uint32_t states);

#endif
