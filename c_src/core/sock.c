/*
 * Non-blocking TCP sockets, IPv4 and IPv6. L1, any thread.
 *
 * Invariant: a descriptor reaches the caller only together with success (or, for a
 * connect, -EINPROGRESS); on every other path it is closed here.
 */
#include "sock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

/* Bytes, of which the kernel makes twice as many; see options_for(). */
#define LOOPBACK_BUFFER (1024 * 1024)

static int last_error(void) {
    return -errno;
}

/* Sets an option, but leaves the system's default for -1. 0 or -errno. */
static int set_option(int fd, int level, int name, int value) {
    if (value == -1) {
        return 0;
    }
    return setsockopt(fd, level, name, &value, sizeof value) == 0 ? 0 : last_error();
}

/* The options that matter for a connection as well as for a listener, whose connections
 * inherit the buffer sizes: those must be known before the handshake scales the window.
 */
static int set_options(int fd, int family, const struct sock_options *options) {
    const struct {
        int level;
        int name;
        int value;
    } list[] = {
        {SOL_SOCKET, SO_KEEPALIVE, options->keepalive},
        {SOL_SOCKET, SO_SNDBUF, options->sndbuf},
        {SOL_SOCKET, SO_RCVBUF, options->rcvbuf},
        {IPPROTO_TCP, TCP_NODELAY, options->nodelay},
        {family == AF_INET6 ? IPPROTO_IPV6 : IPPROTO_IP,
         family == AF_INET6 ? IPV6_TCLASS : IP_TOS, options->tos},
        /* After the TOS, which sets a priority of its own; see socket(7). */
        {SOL_SOCKET, SO_PRIORITY, options->priority},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        int result = set_option(fd, list[i].level, list[i].name, list[i].value);
        if (result != 0) {
            return result;
        }
    }
    return 0;
}

static bool is_loopback(const struct sock_address *address) {
    const void *storage = &address->storage;
    if (address->storage.ss_family == AF_INET6) {
        return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)storage)->sin6_addr);
    }
    return ntohl(((const struct sockaddr_in *)storage)->sin_addr.s_addr) >> 24 == 127;
}

/* May a receive buffer be that large? 1, -1: no, 0: can't be told now. The file is not
 * there in network namespaces of older kernels. */
static int is_allowed(int size) {
    char text[32] = "";
    int fd = open("/proc/sys/net/core/rmem_max", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return errno == ENOENT ? -1 : 0;
    }
    ssize_t count = read(fd, text, sizeof text - 1);
    close(fd);
    return count > 0 && strtol(text, NULL, 10) >= size ? 1 : -1;
}

/* The options at |address|, of a listener or to connect to. What lies in loopback's
 * receive buffers, which the kernel lets grow to many MiBs, is no sooner there, and small
 * messages wait behind it. Where a buffer of this size is not allowed it stays the
 * kernel's: with a smaller one they wait longer. */
static struct sock_options options_for(const struct sock_address *address,
                                       const struct sock_options *options) {
    static atomic_int allowed; /* as is_allowed() tells */
    struct sock_options result = *options;
    if (options->rcvbuf == -1 && is_loopback(address)) {
        if (allowed == 0) {
            allowed = is_allowed(LOOPBACK_BUFFER);
        }
        result.rcvbuf = allowed == 1 ? LOOPBACK_BUFFER : -1;
    }
    return result;
}

void sock_bound_unsent(int fd, int bytes) {
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof bytes);
}

static int open_socket(int family, int *out) {
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
    if (fd < 0) {
        return last_error();
    }
    sock_bound_unsent(fd, SOCK_UNSENT_MAX);
    *out = fd;
    return 0;
}

static int bind_to(int fd, const struct sock_address *address) {
    return bind(fd, (const struct sockaddr *)&address->storage, address->size) == 0
               ? 0
               : last_error();
}

int sock_address_parse(const char *address, uint16_t port, struct sock_address *out) {
    struct in_addr ipv4;
    struct in6_addr ipv6;
    memset(out, 0, sizeof *out);
    if (inet_pton(AF_INET, address, &ipv4) == 1) {
        struct sockaddr_in *to = (struct sockaddr_in *)&out->storage;
        to->sin_family = AF_INET;
        to->sin_addr = ipv4;
        to->sin_port = htons(port);
        out->size = sizeof *to;
        return 0;
    }
    if (inet_pton(AF_INET6, address, &ipv6) == 1) {
        struct sockaddr_in6 *to = (struct sockaddr_in6 *)&out->storage;
        to->sin6_family = AF_INET6;
        to->sin6_addr = ipv6;
        to->sin6_port = htons(port);
        out->size = sizeof *to;
        return 0;
    }
    return -EINVAL;
}

int sock_listen(const struct sock_address *address, const struct sock_options *options,
                int *out) {
    int family = address->storage.ss_family;
    int fd = -1;
    int result = open_socket(family, &fd);
    if (result != 0) {
        return result;
    }
    const struct sock_options all = options_for(address, options);
    result = set_options(fd, family, &all);
    if (result == 0) {
        result = set_option(fd, SOL_SOCKET, SO_REUSEADDR, options->reuseaddr);
    }
    if (result == 0 && family == AF_INET6) {
        result = set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, options->ipv6_v6only);
    }
    if (result == 0) {
        result = bind_to(fd, address);
    }
    if (result != 0) {
        goto fail;
    }
    if (listen(fd, options->backlog) != 0) {
        result = last_error();
        goto fail;
    }
    *out = fd;
    return 0;

fail:
    close(fd);
    return result;
}

/* Errors of one queued connection which Linux reports in accept(2), "Error handling";
 * they say nothing about the listener. EOPNOTSUPP is left out: it is also the listener's
 * own. */
static bool died_in_queue(int error) {
    switch (error) {
    case EINTR:
    case ECONNABORTED:
    case EPROTO:
    case ENOPROTOOPT:
    case ENETDOWN:
    case ENETUNREACH:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENONET:
        return true;
    default:
        return false;
    }
}

int sock_accept(int listener, const struct sock_options *options, int *out,
                struct sock_address *peer) {
    struct sock_address from;
    int fd = -1;
    do {
        memset(&from, 0, sizeof from);
        from.size = sizeof from.storage;
        fd = accept4(listener, (struct sockaddr *)&from.storage, &from.size,
                     SOCK_NONBLOCK | SOCK_CLOEXEC);
    } while (fd < 0 && died_in_queue(errno));
    if (fd < 0) {
        return last_error();
    }
    int result = set_options(fd, from.storage.ss_family, options);
    if (result != 0) {
        close(fd);
        return result;
    }
    *out = fd;
    if (peer != NULL) {
        *peer = from;
    }
    return 0;
}

/*
 * A connect() to a local port that nobody listens at can meet itself when the kernel
 * picks that very port as the source (TCP's simultaneous open). Upstream ports are dialed
 * again and again, so this happens; it must count as refused.
 */
static int refuse_self(int fd) {
    struct sock_address local;
    struct sock_address peer;
    int result = sock_local(fd, &local);
    if (result == 0) {
        result = sock_peer(fd, &peer);
    }
    if (result == 0 && local.size == peer.size &&
        memcmp(&local.storage, &peer.storage, local.size) == 0) {
        result = -ECONNREFUSED;
    }
    return result;
}

int sock_connect(const struct sock_address *address, const struct sock_address *bind,
                 const struct sock_options *options, int *out) {
    int family = address->storage.ss_family;
    int fd = -1;
    int result = open_socket(family, &fd);
    if (result != 0) {
        return result;
    }
    const struct sock_options all = options_for(address, options);
    result = set_options(fd, family, &all);
    if (result == 0 && bind != NULL) {
        result = bind_to(fd, bind);
    }
    if (result != 0) {
        goto fail;
    }
    if (connect(fd, (const struct sockaddr *)&address->storage, address->size) == 0) {
        result = refuse_self(fd);
    } else {
        /* An interrupted connect goes on in the background, see connect(2). */
        result = errno == EINTR ? -EINPROGRESS : last_error();
    }
    if (result != 0 && result != -EINPROGRESS) {
        goto fail;
    }
    *out = fd;
    return result;

fail:
    close(fd);
    return result;
}

int sock_connected(int fd) {
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    int count = poll(&ready, 1, 0);
    if (count <= 0) {
        return count == 0 || errno == EINTR ? -EINPROGRESS : last_error();
    }
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
        return last_error();
    }
    return error != 0 ? -error : refuse_self(fd);
}

int sock_local(int fd, struct sock_address *out) {
    memset(out, 0, sizeof *out);
    out->size = sizeof out->storage;
    return getsockname(fd, (struct sockaddr *)&out->storage, &out->size) == 0
               ? 0
               : last_error();
}

int sock_peer(int fd, struct sock_address *out) {
    memset(out, 0, sizeof *out);
    out->size = sizeof out->storage;
    return getpeername(fd, (struct sockaddr *)&out->storage, &out->size) == 0
               ? 0
               : last_error();
}

uint16_t sock_port(const struct sock_address *address) {
    switch (address->storage.ss_family) {
    case AF_INET:
        return ntohs(((const struct sockaddr_in *)&address->storage)->sin_port);
    case AF_INET6:
        return ntohs(((const struct sockaddr_in6 *)&address->storage)->sin6_port);
    default:
        return 0;
    }
}

/* Where to begin: nodes that start at the same time should not race for one port. */
static uint32_t random_number(void) {
    uint32_t number = 0;
    if (getrandom(&number, sizeof number, GRND_NONBLOCK) != (ssize_t)sizeof number) {
        number = (uint32_t)getpid();
    }
    return number;
}

int sock_find_port(const char *address, struct meshx_port_range range,
                   bool (*taken)(void *context, uint16_t port), void *context,
                   uint16_t *out) {
    struct sock_address candidate;
    int fd = -1;
    int result = sock_address_parse(address, 0, &candidate);
    if (result != 0) {
        return result;
    }
    uint32_t first = range.first == 0 ? 1 : range.first; /* bind() to 0 finds just any */
    if (range.last < first) {
        return -EADDRINUSE;
    }
    result = open_socket(candidate.storage.ss_family, &fd);
    if (result != 0) {
        return result;
    }
    /* As the sidecar will do: connections in TIME_WAIT must not make a port look taken.
     */
    result = set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);

    uint32_t count = range.last - first + 1;
    uint32_t start = random_number() % count;
    bool found = false;
    for (uint32_t i = 0; result == 0 && !found && i < count; i++) {
        uint16_t port = (uint16_t)(first + (start + i) % count);
        if (taken != NULL && taken(context, port)) {
            continue;
        }
        (void)sock_address_parse(address, port, &candidate);
        int error = bind_to(fd, &candidate);
        if (error == 0) {
            *out = port;
            found = true;
        } else if (error != -EADDRINUSE && error != -EACCES) {
            result = error; /* the address is wrong, not the port */
        }
    }
    close(fd);
    return result == 0 && !found ? -EADDRINUSE : result;
}
