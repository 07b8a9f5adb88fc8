/*
 * Which user owns the other end of a connection: see sock_owner.h. L1, any thread: no
 * state, a netlink socket or file lives only for the one question.
 *
 * Invariant: a user is named only for exactly the connection that was asked for, and only
 * while a process holds that end. When it does not any more, the kernel tells user 0 for
 * what is left; and for a connection that is gone it may answer with a listener at the
 * same port, of anybody.
 */
#include "sock_owner.h"

#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One end of a connection. An IPv4 address within IPv6 is an IPv4 address. */
struct end {
    int family;
    uint32_t address[4]; /* network order; IPv4 has the first */
    uint16_t port;       /* network order */
};

static void set_end(struct end *end, int family, const void *address, uint16_t port) {
    memset(end, 0, sizeof *end);
    end->family = family;
    end->port = port;
    if (family == AF_INET) {
        memcpy(end->address, address, 4);
    } else if (IN6_IS_ADDR_V4MAPPED((const struct in6_addr *)address)) {
        end->family = AF_INET;
        memcpy(end->address, (const uint8_t *)address + 12, 4);
    } else {
        memcpy(end->address, address, 16);
    }
}

/* False: neither IPv4 nor IPv6. */
static bool get_end(const struct sock_address *from, struct end *out) {
    if (from->storage.ss_family == AF_INET) {
        const struct sockaddr_in *ipv4 = (const struct sockaddr_in *)&from->storage;
        set_end(out, AF_INET, &ipv4->sin_addr, ipv4->sin_port);
        return true;
    }
    if (from->storage.ss_family == AF_INET6) {
        const struct sockaddr_in6 *ipv6 = (const struct sockaddr_in6 *)&from->storage;
        set_end(out, AF_INET6, &ipv6->sin6_addr, ipv6->sin6_port);
        return true;
    }
    return false;
}

static bool is_same_end(const struct end *one, const struct end *other) {
    return one->family == other->family && one->port == other->port &&
           memcmp(one->address, other->address, sizeof one->address) == 0;
}

/* ---- socket diagnostics, sock_diag(7) ---- */

static bool is_not_permitted(int error) {
    return error == EPERM || error == EACCES || error == EAFNOSUPPORT ||
           error == EPROTONOSUPPORT || error == EOPNOTSUPP || error == ENOSYS ||
           error == ECONNREFUSED;
}

/* The kernel puts its answer, or its error, into the socket before send() returns. */
static int exchange(int netlink, const struct end *from, const struct end *to,
                    struct inet_diag_msg *out) {
    struct {
        struct nlmsghdr header;
        struct inet_diag_req_v2 query;
    } request = {
        .header = {.nlmsg_len = sizeof request,
                   .nlmsg_type = SOCK_DIAG_BY_FAMILY,
                   .nlmsg_flags = NLM_F_REQUEST},
        .query = {.sdiag_family = (uint8_t)from->family,
                  .sdiag_protocol = IPPROTO_TCP,
                  .idiag_states = ~0U,
                  .id = {.idiag_sport = from->port,
                         .idiag_dport = to->port,
                         .idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}},
    };
    memcpy(request.query.id.idiag_src, from->address, sizeof from->address);
    memcpy(request.query.id.idiag_dst, to->address, sizeof to->address);
    union {
        struct nlmsghdr header;
        uint8_t bytes[1024]; /* attributes that did not fit are not missed */
    } answer;

    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    if (sendto(netlink, &request, sizeof request, MSG_NOSIGNAL,
               (const struct sockaddr *)&kernel, sizeof kernel) < 0) {
        return -errno;
    }
    ssize_t size = recv(netlink, &answer, sizeof answer, 0);
    if (size < 0) {
        return -errno;
    }
    if ((size_t)size >= NLMSG_LENGTH(sizeof(struct nlmsgerr)) &&
        answer.header.nlmsg_type == NLMSG_ERROR) {
        const struct nlmsgerr *error = NLMSG_DATA(&answer.header);
        return error->error < 0 ? error->error : -EPROTO;
    }
    if ((size_t)size < NLMSG_LENGTH(sizeof *out) ||
        answer.header.nlmsg_type != SOCK_DIAG_BY_FAMILY) {
        return -EPROTO;
    }
    memcpy(out, NLMSG_DATA(&answer.header), sizeof *out);
    return 0;
}

/* Asks for the socket whose own end is |from|. -ENOENT: there is none that a process
 * holds, or the kernel can't look for any. */
static int find(int netlink, const struct end *from, const struct end *to,
                struct sock_owner *out) {
    struct inet_diag_msg found = {.idiag_state = 0};
    struct end source;
    struct end destination;
    int result = exchange(netlink, from, to, &found);
    if (result != 0) {
        return result;
    }
    set_end(&source, found.idiag_family, found.id.idiag_src, found.id.idiag_sport);
    set_end(&destination, found.idiag_family, found.id.idiag_dst, found.id.idiag_dport);
    if (found.idiag_inode == 0 || found.idiag_state == TCP_LISTEN ||
        !is_same_end(&source, from) || !is_same_end(&destination, to)) {
        return -ENOENT;
    }
    *out = (struct sock_owner){.uid = found.idiag_uid, .inode = found.idiag_inode};
    return 0;
}

int sock_owner(const struct sock_address *local, const struct sock_address *peer,
               struct sock_owner *out) {
    struct end here;
    struct end there;
    struct sock_owner ours;
    if (!get_end(local, &here) || !get_end(peer, &there)) {
        return -EAFNOSUPPORT;
    }
    int netlink =
        socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_SOCK_DIAG);
    if (netlink < 0) {
        return is_not_permitted(errno) ? -EOPNOTSUPP : -errno;
    }
    int result = find(netlink, &there, &here, out);
    /* A kernel without the module tcp_diag says the same of everything. Our own end is
     * there: if not even that is found, nothing ever is. */
    if (result == -ENOENT && find(netlink, &here, &there, &ours) == -ENOENT) {
        result = -EOPNOTSUPP;
    }
    close(netlink);
    return result < 0 && is_not_permitted(-result) ? -EOPNOTSUPP : result;
}

/* ---- /proc/net, proc(5) ---- */

/* "ADDRESS:PORT " as /proc/net/tcp (tcp6 if |ipv6|) has it: words in host order. */
static void print_end(const struct end *end, bool ipv6, char *out, size_t size) {
    const uint32_t mapped[4] = {0, 0, htonl(0xFFFF), end->address[0]};
    const uint32_t *words = end->family == AF_INET ? mapped : end->address;
    unsigned port = ntohs(end->port);
    if (ipv6) {
        (void)snprintf(out, size, "%08X%08X%08X%08X:%04X ", words[0], words[1], words[2],
                       words[3], port);
    } else {
        (void)snprintf(out, size, "%08X:%04X ", end->address[0], port);
    }
}

/* What follows both ends in a line: state, queues, timer, retransmits, user, timeout,
 * inode. */
enum { USER_FIELD = 4, INODE_FIELD = 6 };

/* The number that is the |nth| field of |text|. */
static unsigned long field(const char *text, int nth) {
    for (int i = 0; i < nth; i++) {
        text += strspn(text, " ");
        text += strcspn(text, " ");
    }
    return strtoul(text, NULL, 10);
}

/* Looks for the socket whose own end is |from|. */
static int scan(const char *path, bool ipv6, const struct end *from, const struct end *to,
                struct sock_owner *out) {
    char line[512];
    char ends[128];
    int result = -ENOENT;
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return -errno; /* -ENOENT too, where there is no IPv6 */
    }
    print_end(from, ipv6, ends, sizeof ends);
    print_end(to, ipv6, ends + strlen(ends), sizeof ends - strlen(ends));
    while (result == -ENOENT && fgets(line, sizeof line, file) != NULL) {
        const char *found = strstr(line, ends);
        unsigned long inode =
            found != NULL ? field(found + strlen(ends), INODE_FIELD) : 0;
        if (inode != 0) {
            out->uid = (uid_t)field(found + strlen(ends), USER_FIELD);
            out->inode = (uint32_t)inode;
            result = 0;
        }
    }
    if (result == -ENOENT && ferror(file) != 0) {
        result = -EIO;
    }
    (void)fclose(file);
    return result;
}

int sock_owner_scan(const struct sock_address *local, const struct sock_address *peer,
                    struct sock_owner *out) {
    struct end here;
    struct end there;
    int result = -ENOENT;
    if (!get_end(local, &here) || !get_end(peer, &there)) {
        return -EAFNOSUPPORT;
    }
    if (there.family == AF_INET) {
        result = scan("/proc/net/tcp", false, &there, &here, out);
    }
    /* A socket of IPv6 can be connected to an IPv4 address. */
    return result == -ENOENT ? scan("/proc/net/tcp6", true, &there, &here, out) : result;
}
