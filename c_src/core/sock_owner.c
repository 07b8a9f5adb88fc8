/*
 * Which user owns the other end of a connection: see sock_owner.h. L1, any thread, no
 * state.
 *
 * Invariant: a user is named only for exactly the connection that was asked for, and only
 * while a process holds that end. When it does not any more, the kernel tells user 0 for
 * what is left; and for a connection that is gone it may answer with a listener at the
 * same port, of anybody.
 */
#include "sock_owner.h"
#include "sock_diag.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool is_internet(const struct sock_end *here, const struct sock_end *there) {
    return (here->family == AF_INET || here->family == AF_INET6) &&
           (there->family == AF_INET || there->family == AF_INET6);
}

int sock_owner(const struct sock_address *local, const struct sock_address *peer,
               struct sock_owner *out) {
    const struct sock_end here = sock_end_of(local);
    const struct sock_end there = sock_end_of(peer);
    struct inet_diag_msg found;
    if (!is_internet(&here, &there)) {
        return -EAFNOSUPPORT;
    }
    int result = sock_diag_find(&there, &here, ~0U, &found);
    if (result != 0) {
        return result;
    }
    const struct sock_end source =
        sock_end_make(found.idiag_family, found.id.idiag_src, found.id.idiag_sport);
    const struct sock_end destination =
        sock_end_make(found.idiag_family, found.id.idiag_dst, found.id.idiag_dport);
    if (found.idiag_inode == 0 || found.idiag_state == TCP_LISTEN ||
        !sock_end_is_same(&source, &there) || !sock_end_is_same(&destination, &here)) {
        return -ENOENT;
    }
    *out = (struct sock_owner){.uid = found.idiag_uid, .inode = found.idiag_inode};
    return 0;
}

/* ---- /proc/net, proc(5) ---- */

/* "ADDRESS:PORT " as /proc/net/tcp (tcp6 if |ipv6|) has it: words in host order. */
static void print_end(const struct sock_end *end, bool ipv6, char *out, size_t size) {
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
static int scan(const char *path, bool ipv6, const struct sock_end *from,
                const struct sock_end *to, struct sock_owner *out) {
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
    const struct sock_end here = sock_end_of(local);
    const struct sock_end there = sock_end_of(peer);
    int result = -ENOENT;
    if (!is_internet(&here, &there)) {
        return -EAFNOSUPPORT;
    }
    if (there.family == AF_INET) {
        result = scan("/proc/net/tcp", false, &there, &here, out);
    }
    /* A socket of IPv6 can be connected to an IPv4 address. */
    return result == -ENOENT ? scan("/proc/net/tcp6", true, &there, &here, out) : result;
}
