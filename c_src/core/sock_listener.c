/*
 * Which user of the operating system has opened a listener of this host. L1.
 *
 * From /proc/net/tcp and tcp6 (proc_net_tcp in the kernel's documentation): one line per
 * socket, addresses as 32-bit words in the host's byte order. A listener at a wildcard
 * address counts too, and one at "::" also for IPv4.
 */
#include "sock_listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define LISTENING 0x0A /* TCP_LISTEN */
#define LINE_SIZE 256

/* |address| as it stands in its table. */
static void write_address(const struct sock_address *address, char out[33]) {
    uint32_t words[4];
    size_t count = 1;
    if (address->storage.ss_family == AF_INET6) {
        const struct sockaddr_in6 *ipv6 = (const struct sockaddr_in6 *)&address->storage;
        memcpy(words, &ipv6->sin6_addr, sizeof ipv6->sin6_addr);
        count = 4;
    } else {
        const struct sockaddr_in *ipv4 = (const struct sockaddr_in *)&address->storage;
        memcpy(words, &ipv4->sin_addr, sizeof ipv4->sin_addr);
    }
    for (size_t i = 0; i < count; i++) {
        snprintf(out + 8 * i, 9, "%08X", (unsigned)words[i]);
    }
}

static bool is_wildcard(const char *address) {
    return address[strspn(address, "0")] == '\0';
}

/* Looks for listeners at |wanted| (or any wildcard) and |port| in one table. */
static int look_into(const char *path, const char *wanted, uint16_t port, bool *found,
                     uid_t *out) {
    char line[LINE_SIZE];
    int error = 0;
    FILE *table = fopen(path, "re");
    if (table == NULL) {
        return errno == ENOENT ? 0 : -errno; /* no IPv6 */
    }
    while (error == 0 && fgets(line, sizeof line, table) != NULL) {
        char address[33];
        unsigned line_port;
        unsigned state;
        unsigned owner;
        // NOLINTNEXTLINE(cert-err34-c): the kernel's numbers fit
        if (sscanf(line, " %*u: %32[0-9A-F]:%4x %*s %2x %*s %*s %*s %u", address,
                   &line_port, &state, &owner) != 4 ||
            state != LISTENING || line_port != port ||
            (strcmp(address, wanted) != 0 && !is_wildcard(address))) {
            continue;
        }
        if (*found && *out != owner) {
            error = -EADDRINUSE;
        }
        *found = true;
        *out = owner;
    }
    fclose(table);
    return error;
}

int sock_listener_owner(const struct sock_address *address, uid_t *out) {
    char wanted[33];
    bool found = false;
    uint16_t port = sock_port(address);
    write_address(address, wanted);
    int error = look_into("/proc/net/tcp6", wanted, port, &found, out);
    if (error == 0 && address->storage.ss_family == AF_INET) {
        error = look_into("/proc/net/tcp", wanted, port, &found, out);
    }
    if (error != 0) {
        return error;
    }
    return found ? 0 : -ENOENT;
}
