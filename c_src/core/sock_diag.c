/*
 * The kernel's socket diagnostics: see sock_diag.h. L1.
 *
 * The kernel puts its answer, or its error, into the netlink socket before sendto()
 * returns. Without its module tcp_diag it says "no such file" of every single socket, but
 * of a search, too, which otherwise says that only of what it has looked for.
 */
#include "sock_diag.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <unistd.h>

struct sock_end sock_end_make(int family, const void *address, uint16_t port) {
    struct sock_end end = {.family = family, .port = port};
    if (family == AF_INET) {
        memcpy(end.address, address, 4);
    } else if (IN6_IS_ADDR_V4MAPPED((const struct in6_addr *)address)) {
        end.family = AF_INET;
        memcpy(end.address, (const uint8_t *)address + 12, 4);
    } else {
        memcpy(end.address, address, 16);
    }
    return end;
}

struct sock_end sock_end_of(const struct sock_address *address) {
    if (address->storage.ss_family == AF_INET) {
        const struct sockaddr_in *ipv4 = (const struct sockaddr_in *)&address->storage;
        return sock_end_make(AF_INET, &ipv4->sin_addr, ipv4->sin_port);
    }
    if (address->storage.ss_family == AF_INET6) {
        const struct sockaddr_in6 *ipv6 = (const struct sockaddr_in6 *)&address->storage;
        return sock_end_make(AF_INET6, &ipv6->sin6_addr, ipv6->sin6_port);
    }
    return (struct sock_end){.family = address->storage.ss_family};
}

bool sock_end_is_same(const struct sock_end *one, const struct sock_end *other) {
    return one->family == other->family && one->port == other->port &&
           memcmp(one->address, other->address, sizeof one->address) == 0;
}

static bool is_not_permitted(int error) {
    return error == EPERM || error == EACCES || error == EAFNOSUPPORT ||
           error == EPROTONOSUPPORT || error == ENOSYS || error == ECONNREFUSED;
}

/* 0 and |*out|, or -errno; -ENOENT: see above. */
static int ask(const struct sock_end *local, const struct sock_end *peer, uint32_t states,
               uint16_t flags, struct inet_diag_msg *out) {
    struct {
        struct nlmsghdr header;
        struct inet_diag_req_v2 query;
    } request = {
        .header = {.nlmsg_len = sizeof request,
                   .nlmsg_type = SOCK_DIAG_BY_FAMILY,
                   .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags)},
        .query = {.sdiag_family = (uint8_t)local->family,
                  .sdiag_protocol = IPPROTO_TCP,
                  .idiag_states = states,
                  .id = {.idiag_sport = local->port,
                         .idiag_dport = peer != NULL ? peer->port : 0,
                         .idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}},
    };
    memcpy(request.query.id.idiag_src, local->address, sizeof local->address);
    if (peer != NULL) {
        memcpy(request.query.id.idiag_dst, peer->address, sizeof peer->address);
    }
    union {
        struct nlmsghdr header;
        struct {
            struct nlmsghdr header;
            struct inet_diag_msg socket;
        } found;
        struct {
            struct nlmsghdr header;
            struct nlmsgerr error;
        } failed;
        uint8_t bytes[1024]; /* attributes, and messages, that don't fit are not missed */
    } answer = {.bytes = {0}};

    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (netlink < 0) {
        return -errno;
    }
    const struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    ssize_t size = sendto(netlink, &request, sizeof request, MSG_NOSIGNAL,
                          (const struct sockaddr *)&kernel, sizeof kernel);
    if (size >= 0) {
        size = recv(netlink, &answer, sizeof answer, MSG_DONTWAIT);
    }
    int error = size < 0 ? -errno : 0;
    close(netlink);
    if (error != 0) {
        return error;
    }
    switch (answer.header.nlmsg_type) {
    case SOCK_DIAG_BY_FAMILY:
        *out = answer.found.socket;
        return (size_t)size >= sizeof answer.found ? 0 : -EPROTO;
    case NLMSG_DONE: /* of a search, with its error or 0 */
        return answer.failed.error.error < 0 ? -EOPNOTSUPP : -ENOENT;
    case NLMSG_ERROR:
        return (flags & NLM_F_DUMP) != 0       ? -EOPNOTSUPP
               : answer.failed.error.error < 0 ? answer.failed.error.error
                                               : -EPROTO;
    default:
        return -EPROTO;
    }
}

int sock_diag_find_port(const struct sock_end *local, uint32_t states) {
    struct inet_diag_msg ignored;
    int result = ask(local, NULL, states, NLM_F_DUMP, &ignored);
    return is_not_permitted(-result) ? -EOPNOTSUPP : result;
}

int sock_diag_find(const struct sock_end *local, const struct sock_end *peer,
                   uint32_t states, struct inet_diag_msg *out) {
    int result = ask(local, peer, states, 0, out);
    if (result == -ENOENT) {
        /* Listeners are few. */
        int searched = sock_diag_find_port(local, 1U << TCP_LISTEN);
        return searched == 0 ? -ENOENT : searched;
    }
    return is_not_permitted(-result) ? -EOPNOTSUPP : result;
}
