/* Sockets on the loopback interface. Where something is still to come, the test waits
 * with poll() for the event itself. */
#include "support.h"
#include "sock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const struct sock_options defaults = SOCK_OPTIONS_DEFAULT;

static bool has_ipv6(void) {
    struct sock_address address;
    int fd = -1;
    assert_int_equal(sock_address_parse("::1", 0, &address), 0);
    if (sock_listen(&address, &defaults, &fd) != 0) {
        return false;
    }
    close(fd);
    return true;
}

static void wait_for(int fd, short events) {
    struct pollfd ready = {.fd = fd, .events = events};
    assert_int_equal(poll(&ready, 1, 30000), 1);
}

static void assert_flags(int fd) {
    assert_true((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
    assert_true((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
}

static int option_of(int fd, int level, int name) {
    int value = -1;
    socklen_t size = sizeof value;
    assert_int_equal(getsockopt(fd, level, name, &value, &size), 0);
    return value;
}

static int listen_at(const char *text, struct sock_address *bound) {
    struct sock_address address;
    int fd = -1;
    assert_int_equal(sock_address_parse(text, 0, &address), 0);
    assert_int_equal(sock_listen(&address, &defaults, &fd), 0);
    assert_int_equal(sock_local(fd, bound), 0);
    assert_int_not_equal(sock_port(bound), 0);
    return fd;
}

static int connect_to(const struct sock_address *address,
                      const struct sock_options *options) {
    int fd = -1;
    int result = sock_connect(address, NULL, options, &fd);
    if (result == -EINPROGRESS) {
        wait_for(fd, POLLOUT);
        result = sock_connected(fd);
    }
    assert_int_equal(result, 0);
    return fd;
}

static void addresses(void **state) {
    (void)state;
    struct sock_address address;
    assert_int_equal(sock_address_parse("127.0.0.1", 8500, &address), 0);
    assert_int_equal(address.storage.ss_family, AF_INET);
    assert_int_equal(address.size, sizeof(struct sockaddr_in));
    assert_int_equal(sock_port(&address), 8500);
    assert_int_equal(sock_address_parse("::1", 65535, &address), 0);
    assert_int_equal(address.storage.ss_family, AF_INET6);
    assert_int_equal(address.size, sizeof(struct sockaddr_in6));
    assert_int_equal(sock_port(&address), 65535);
    static const char *const wrong[] = {"",          "localhost", "127.0.0.1:80", "127.1",
                                        "256.0.0.1", "[::1]",     ":::",          " ::1"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        assert_int_equal(sock_address_parse(wrong[i], 1, &address), -EINVAL);
    }
    memset(&address, 0, sizeof address);
    assert_int_equal(sock_port(&address), 0);
}

static void check_conversation(const char *text) {
    struct sock_address bound;
    struct sock_address peer;
    struct sock_address local;
    int accepted = -1;
    int listener = listen_at(text, &bound);
    assert_flags(listener);
    assert_int_equal(sock_accept(listener, &defaults, &accepted, NULL), -EAGAIN);

    int client = connect_to(&bound, &defaults);
    assert_flags(client);
    assert_int_equal(option_of(client, IPPROTO_TCP, TCP_NODELAY), 1);
    assert_int_equal(send(client, "hello", 5, MSG_NOSIGNAL), 5);

    wait_for(listener, POLLIN);
    assert_int_equal(sock_accept(listener, &defaults, &accepted, &peer), 0);
    assert_flags(accepted);
    assert_int_equal(option_of(accepted, IPPROTO_TCP, TCP_NODELAY), 1);
    assert_int_equal(sock_accept(listener, &defaults, &(int){-1}, NULL), -EAGAIN);

    assert_int_equal(sock_local(client, &local), 0);
    assert_int_equal(peer.size, local.size);
    assert_memory_equal(&peer.storage, &local.storage, peer.size);
    assert_int_equal(sock_peer(accepted, &peer), 0);
    assert_memory_equal(&peer.storage, &local.storage, peer.size);
    assert_int_equal(sock_peer(client, &peer), 0);
    assert_int_equal(sock_port(&peer), sock_port(&bound));

    char bytes[5];
    wait_for(accepted, POLLIN);
    assert_int_equal(recv(accepted, bytes, sizeof bytes, 0), 5);
    assert_memory_equal(bytes, "hello", 5);
    assert_int_equal(recv(accepted, bytes, sizeof bytes, 0), -1);
    assert_int_equal(errno, EAGAIN);
    close(accepted);
    close(client);
    close(listener);
}

static void ipv4_conversation(void **state) {
    (void)state;
    check_conversation("127.0.0.1");
}

static void ipv6_conversation(void **state) {
    (void)state;
    if (!has_ipv6()) {
        skip();
    }
    check_conversation("::1");
}

/* They are somebody's to turn away, not left in the kernel's queue. */
static void accepts_who_says_nothing(void **state) {
    (void)state;
    struct sock_address bound;
    int accepted = -1;
    int listener = listen_at("127.0.0.1", &bound);
    int silent = connect_to(&bound, &defaults);
    wait_for(listener, POLLIN);
    assert_int_equal(sock_accept(listener, &defaults, &accepted, NULL), 0);
    close(accepted);
    close(silent);
    close(listener);
}

static void options_are_set(void **state) {
    (void)state;
    struct sock_address address;
    struct sock_address bound;
    const struct sock_options options = {
        .nodelay = 0,
        .keepalive = 1,
        .sndbuf = 20000,
        .rcvbuf = 30000,
        .reuseaddr = 0,
        .priority = 3,
        .tos = 0x10,
        .backlog = 5,
        .ipv6_v6only = -1,
    };
    int listener = -1;
    assert_int_equal(sock_address_parse("127.0.0.1", 0, &address), 0);
    assert_int_equal(sock_listen(&address, &options, &listener), 0);
    assert_int_equal(sock_local(listener, &bound), 0);
    assert_int_equal(option_of(listener, SOL_SOCKET, SO_REUSEADDR), 0);
    int client = connect_to(&bound, &options);
    assert_int_equal(send(client, "x", 1, MSG_NOSIGNAL), 1);
    wait_for(listener, POLLIN);
    int accepted = -1;
    assert_int_equal(sock_accept(listener, &options, &accepted, NULL), 0);
    const int all[] = {listener, client, accepted};
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(option_of(all[i], IPPROTO_TCP, TCP_NODELAY), 0);
        assert_int_equal(option_of(all[i], SOL_SOCKET, SO_KEEPALIVE), 1);
        /* The kernel doubles them, see socket(7). */
        assert_int_equal(option_of(all[i], SOL_SOCKET, SO_SNDBUF), 40000);
        assert_int_equal(option_of(all[i], SOL_SOCKET, SO_RCVBUF), 60000);
        assert_int_equal(option_of(all[i], SOL_SOCKET, SO_PRIORITY), 3);
        assert_int_equal(option_of(all[i], IPPROTO_IP, IP_TOS), 0x10);
        close(all[i]);
    }

    int plain = listen_at("127.0.0.1", &bound);
    assert_int_equal(option_of(plain, SOL_SOCKET, SO_REUSEADDR), 1);
    assert_int_equal(option_of(plain, SOL_SOCKET, SO_KEEPALIVE), 0);
    close(plain);
}

/* Both ends, unless it is said otherwise; the kernel doubles it. */
static void loopback_has_a_bounded_receive_buffer(void **state) {
    (void)state;
    struct sock_address address;
    struct sock_address bound;
    const struct sock_options none = SOCK_OPTIONS_DEFAULT;
    struct sock_options some = none;
    some.rcvbuf = 30000;
    int allowed = 0;
    FILE *limit = fopen("/proc/sys/net/core/rmem_max", "r");
    if (limit != NULL) {
        assert_int_equal(fscanf(limit, "%d", &allowed), 1);
        fclose(limit);
    }
    assert_int_equal(sock_address_parse("127.0.0.1", 0, &address), 0);
    for (int chosen = 0; chosen < 2; chosen++) {
        const struct sock_options *options = chosen ? &some : &none;
        int listener = -1;
        int accepted = -1;
        assert_int_equal(sock_listen(&address, options, &listener), 0);
        assert_int_equal(sock_local(listener, &bound), 0);
        int client = connect_to(&bound, options);
        wait_for(listener, POLLIN);
        assert_int_equal(sock_accept(listener, &none, &accepted, NULL), 0);
        const int ends[] = {client, accepted};
        for (size_t i = 0; i < 2; i++) {
            int size = option_of(ends[i], SOL_SOCKET, SO_RCVBUF);
            if (chosen) {
                assert_int_equal(size, 60000);
            } else if (allowed >= 1 << 20) {
                assert_int_equal(size, 2 << 20);
            } else {
                assert_int_not_equal(size, 2 * allowed); /* the kernel's own */
            }
            close(ends[i]);
        }
        close(listener);
    }
}

/* Bytes not yet sent when |fd| is writable again, since |peer| reads. */
static int unsent_when_writable(int fd, int peer) {
    char bytes[4096];
    struct pollfd writable = {.fd = fd, .events = POLLOUT};
    int unsent = -1;
    while (poll(&writable, 1, 0) == 0) {
        wait_for(peer, POLLIN);
        assert_true(recv(peer, bytes, sizeof bytes, 0) > 0);
    }
    assert_int_equal(ioctl(fd, SIOCOUTQNSD, &unsent), 0);
    return unsent;
}

/* Both ends may write until the peer has no room, and little beyond; then until half of
 * what they may have unsent is gone, or nearly all, if that was asked for. How much the
 * send buffer takes besides depends on loopback's MTU and on net.ipv4.tcp_wmem. */
static void what_is_not_sent_is_bounded(void **state) {
    (void)state;
    static char bytes[16 * 1024];
    struct sock_address address;
    struct sock_address bound;
    struct sock_options options = SOCK_OPTIONS_DEFAULT;
    options.rcvbuf = 30000;
    int listener = -1;
    int accepted = -1;
    assert_int_equal(sock_address_parse("127.0.0.1", 0, &address), 0);
    assert_int_equal(sock_listen(&address, &options, &listener), 0);
    assert_int_equal(sock_local(listener, &bound), 0);
    int client = connect_to(&bound, &options);
    wait_for(listener, POLLIN);
    assert_int_equal(sock_accept(listener, &options, &accepted, NULL), 0);
    const int ends[] = {client, accepted};
    for (size_t i = 0; i < 2; i++) {
        ssize_t sent = 0;
        size_t all = 0;
        assert_int_equal(option_of(ends[i], IPPROTO_TCP, TCP_NOTSENT_LOWAT),
                         SOCK_UNSENT_MAX);
        while ((sent = send(ends[i], bytes, sizeof bytes, MSG_NOSIGNAL)) > 0) {
            all += (size_t)sent;
        }
        assert_int_equal(errno, EAGAIN);
        assert_in_range(all, 1, SOCK_UNSENT_MAX + 256 * 1024);
    }
    assert_in_range(unsent_when_writable(client, accepted), 0, SOCK_UNSENT_MAX / 2);
    sock_bound_unsent(client, SOCK_UNSENT_WAITING);
    assert_in_range(unsent_when_writable(client, accepted), 0, SOCK_UNSENT_WAITING / 2);
    close(client);
    close(accepted);
    close(listener);
}

static void ipv6_options_are_set(void **state) {
    (void)state;
    if (!has_ipv6()) {
        skip();
    }
    for (int only = 0; only <= 1; only++) {
        struct sock_address address;
        struct sock_options options = SOCK_OPTIONS_DEFAULT;
        int fd = -1;
        options.ipv6_v6only = only;
        options.tos = 0x10;
        assert_int_equal(sock_address_parse("::", 0, &address), 0);
        assert_int_equal(sock_listen(&address, &options, &fd), 0);
        assert_int_equal(option_of(fd, IPPROTO_IPV6, IPV6_V6ONLY), only);
        assert_int_equal(option_of(fd, IPPROTO_IPV6, IPV6_TCLASS), 0x10);
        close(fd);
    }
}

/* The number the next descriptor would get: shows a leak. */
static int next_fd(void) {
    int fd = dup(0);
    assert_true(fd >= 0);
    close(fd);
    return fd;
}

static void failures_leave_nothing_open(void **state) {
    (void)state;
    struct sock_address bound;
    struct sock_address address;
    int fd = -1;
    int listener = listen_at("127.0.0.1", &bound);
    int before = next_fd();

    assert_int_equal(sock_listen(&bound, &defaults, &fd), -EADDRINUSE);
    /* TEST-NET-1: an address no host has. */
    assert_int_equal(sock_address_parse("192.0.2.1", 0, &address), 0);
    assert_int_equal(sock_listen(&address, &defaults, &fd), -EADDRNOTAVAIL);
    assert_int_equal(sock_connect(&bound, &address, &defaults, &fd), -EADDRNOTAVAIL);
    memset(&address, 0, sizeof address);
    address.storage.ss_family = 255;
    address.size = sizeof address.storage;
    assert_int_equal(sock_listen(&address, &defaults, &fd), -EAFNOSUPPORT);
    assert_int_equal(sock_connect(&address, NULL, &defaults, &fd), -EAFNOSUPPORT);

    if (has_ipv6()) {
        struct sock_options wrong = SOCK_OPTIONS_DEFAULT;
        wrong.tos = 256; /* a traffic class has 8 bits */
        assert_int_equal(sock_address_parse("::1", 0, &address), 0);
        assert_int_equal(sock_listen(&address, &wrong, &fd), -EINVAL);
        assert_int_equal(sock_connect(&address, NULL, &wrong, &fd), -EINVAL);
    }

    assert_int_equal(sock_accept(before, &defaults, &fd, NULL), -EBADF);
    assert_int_equal(sock_connected(before), -EBADF);
    assert_int_equal(sock_local(before, &address), -EBADF);
    assert_int_equal(sock_peer(listener, &address), -ENOTCONN);
    assert_int_equal(fd, -1);
    assert_int_equal(next_fd(), before);
    close(listener);
}

/* A connection that can't get its options is closed, not handed out half prepared. */
static void accept_with_wrong_option(void **state) {
    (void)state;
    if (!has_ipv6()) {
        skip();
    }
    struct sock_address bound;
    struct sock_options wrong = SOCK_OPTIONS_DEFAULT;
    int fd = -1;
    char byte;
    wrong.tos = 256;
    int listener = listen_at("::1", &bound);
    int client = connect_to(&bound, &defaults);
    assert_int_equal(send(client, "x", 1, MSG_NOSIGNAL), 1);
    wait_for(listener, POLLIN);
    int before = next_fd();
    assert_int_equal(sock_accept(listener, &wrong, &fd, NULL), -EINVAL);
    assert_int_equal(fd, -1);
    assert_int_equal(next_fd(), before);
    wait_for(client, POLLIN);
    assert_true(recv(client, &byte, 1, 0) <= 0);
    close(client);
    close(listener);
}

static void connect_refused(void **state) {
    (void)state;
    struct sock_address bound;
    /* Bound, but not listening: nobody else can get the port meanwhile. */
    struct sock_address address;
    int holder = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(sock_address_parse("127.0.0.1", 0, &address), 0);
    assert_int_equal(bind(holder, (struct sockaddr *)&address.storage, address.size), 0);
    assert_int_equal(sock_local(holder, &bound), 0);

    int fd = -1;
    int result = sock_connect(&bound, NULL, &defaults, &fd);
    if (result == -EINPROGRESS) {
        wait_for(fd, POLLOUT);
        result = sock_connected(fd);
        assert_int_equal(result, -ECONNREFUSED);
        /* The error is told once; the socket never looks connected for that. */
        assert_int_not_equal(sock_connected(fd), 0);
        close(fd);
    }
    assert_int_equal(result, -ECONNREFUSED);
    close(holder);
}

/* A listener whose queue is full drops what comes: the connect stays in progress. */
static void connect_in_progress(void **state) {
    (void)state;
    struct sock_address address;
    struct sock_address bound;
    struct sock_options options = SOCK_OPTIONS_DEFAULT;
    int listener = -1;
    options.backlog = 0;
    assert_int_equal(sock_address_parse("127.0.0.1", 0, &address), 0);
    assert_int_equal(sock_listen(&address, &options, &listener), 0);
    assert_int_equal(sock_local(listener, &bound), 0);
    int first = connect_to(&bound, &defaults);
    int second = -1;
    assert_int_equal(sock_connect(&bound, NULL, &defaults, &second), -EINPROGRESS);
    assert_flags(second);
    assert_int_equal(sock_connected(second), -EINPROGRESS);
    assert_int_equal(sock_connected(first), 0);
    close(second);
    close(first);
    close(listener);
}

static void connect_from_given_address(void **state) {
    (void)state;
    struct sock_address bound;
    struct sock_address from;
    struct sock_address local;
    int listener = listen_at("127.0.0.1", &bound);
    int fd = -1;
    assert_int_equal(sock_address_parse("127.0.0.2", 0, &from), 0);
    int result = sock_connect(&bound, &from, &defaults, &fd);
    assert_true(result == 0 || result == -EINPROGRESS);
    wait_for(fd, POLLOUT);
    assert_int_equal(sock_connected(fd), 0);
    assert_int_equal(sock_local(fd, &local), 0);
    const struct sockaddr_in *ipv4 = (const struct sockaddr_in *)&local.storage;
    assert_int_equal(ntohl(ipv4->sin_addr.s_addr), 0x7F000002);
    close(fd);
    close(listener);
}

static void connect_to_itself_is_refused(void **state) {
    (void)state;
    struct sock_address address;
    int fd = -1;
    uint16_t port = 0;
    const struct meshx_port_range range = {20000, 60000};
    assert_int_equal(sock_find_port("127.0.0.1", range, NULL, NULL, &port), 0);
    assert_int_equal(sock_address_parse("127.0.0.1", port, &address), 0);
    int result = sock_connect(&address, &address, &defaults, &fd);
    if (result == -EINPROGRESS) {
        wait_for(fd, POLLOUT);
        result = sock_connected(fd);
        close(fd);
    }
    assert_int_equal(result, -ECONNREFUSED);
}

/* Ports of |range| that the search was offered; all but |only| are taken. */
struct search {
    struct meshx_port_range range;
    uint16_t only;
    unsigned offered;
};

static bool taken_but_one(void *context, uint16_t port) {
    struct search *search = context;
    assert_in_range(port, search->range.first, search->range.last);
    search->offered++;
    return port != search->only;
}

static void check_search(const char *text) {
    struct sock_address bound;
    uint16_t port = 0;
    int listener = listen_at(text, &bound);
    uint16_t busy = sock_port(&bound);

    /* A port that something listens at is not free, its neighbours may be. */
    const struct meshx_port_range one = {busy, busy};
    assert_int_equal(sock_find_port(text, one, NULL, NULL, &port), -EADDRINUSE);
    assert_int_equal(port, 0);
    close(listener);

    /* What was found can be listened at. Another program may be faster: try again. */
    int result = -EADDRINUSE;
    for (int i = 0; i < 100 && result == -EADDRINUSE; i++) {
        const struct meshx_port_range range = {20000, 60000};
        struct sock_address address;
        assert_int_equal(sock_find_port(text, range, NULL, NULL, &port), 0);
        assert_in_range(port, 20000, 60000);
        assert_int_equal(sock_address_parse(text, port, &address), 0);
        result = sock_listen(&address, &defaults, &listener);
    }
    assert_int_equal(result, 0);
    close(listener);
}

static void finds_ipv4_port(void **state) {
    (void)state;
    check_search("127.0.0.1");
}

static void finds_ipv6_port(void **state) {
    (void)state;
    if (!has_ipv6()) {
        skip();
    }
    check_search("::1");
}

static void search_covers_the_range(void **state) {
    (void)state;
    uint16_t port = 0;
    for (uint16_t only = 40000; only < 40010; only++) {
        struct search search = {{40000, 40009}, only, 0};
        int result =
            sock_find_port("127.0.0.9", search.range, taken_but_one, &search, &port);
        assert_in_range(search.offered, 1, 10);
        assert_int_equal(result, 0);
        assert_int_equal(port, only);
    }
    /* All taken: each was offered once. The ends of what a port can be do not overflow.
     */
    struct search search = {{65000, 65535}, 0, 0};
    assert_int_equal(
        sock_find_port("127.0.0.9", search.range, taken_but_one, &search, &port),
        -EADDRINUSE);
    assert_int_equal(search.offered, 536);
}

static void search_skips_a_taken_port(void **state) {
    (void)state;
    struct sock_address bound;
    uint16_t port = 0;
    /* An own loopback address: nobody else is there. */
    int listener = listen_at("127.0.0.10", &bound);
    uint16_t busy = sock_port(&bound);
    struct meshx_port_range range = {(uint16_t)(busy - 1), busy};
    for (int i = 0; i < 20; i++) {
        assert_int_equal(sock_find_port("127.0.0.10", range, NULL, NULL, &port), 0);
        assert_int_equal(port, busy - 1);
    }
    close(listener);
}

static void search_begins_anywhere(void **state) {
    (void)state;
    uint16_t first = 0;
    uint16_t port = 0;
    bool differs = false;
    const struct meshx_port_range range = {20000, 60000};
    assert_int_equal(sock_find_port("127.0.0.11", range, NULL, NULL, &first), 0);
    for (int i = 0; i < 20 && !differs; i++) {
        assert_int_equal(sock_find_port("127.0.0.11", range, NULL, NULL, &port), 0);
        differs = port != first;
    }
    assert_true(differs);
}

static void search_refuses_nonsense(void **state) {
    (void)state;
    uint16_t port = 0;
    const struct meshx_port_range reversed = {2, 1};
    const struct meshx_port_range zero = {0, 0};
    const struct meshx_port_range good = {20000, 60000};
    assert_int_equal(sock_find_port("127.0.0.1", reversed, NULL, NULL, &port),
                     -EADDRINUSE);
    assert_int_equal(sock_find_port("127.0.0.1", zero, NULL, NULL, &port), -EADDRINUSE);
    assert_int_equal(sock_find_port("host", good, NULL, NULL, &port), -EINVAL);
    assert_int_equal(sock_find_port("192.0.2.1", good, NULL, NULL, &port),
                     -EADDRNOTAVAIL);
    assert_int_equal(port, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(addresses),
        cmocka_unit_test(ipv4_conversation),
        cmocka_unit_test(ipv6_conversation),
        cmocka_unit_test(accepts_who_says_nothing),
        cmocka_unit_test(options_are_set),
        cmocka_unit_test(loopback_has_a_bounded_receive_buffer),
        cmocka_unit_test(what_is_not_sent_is_bounded),
        cmocka_unit_test(ipv6_options_are_set),
        cmocka_unit_test(failures_leave_nothing_open),
        cmocka_unit_test(accept_with_wrong_option),
        cmocka_unit_test(connect_refused),
        cmocka_unit_test(connect_in_progress),
        cmocka_unit_test(connect_from_given_address),
        cmocka_unit_test(connect_to_itself_is_refused),
        cmocka_unit_test(finds_ipv4_port),
        cmocka_unit_test(finds_ipv6_port),
        cmocka_unit_test(search_covers_the_range),
        cmocka_unit_test(search_skips_a_taken_port),
        cmocka_unit_test(search_begins_anywhere),
        cmocka_unit_test(search_refuses_nonsense),
    };
    return cmocka_run_group_tests_name("sock", tests, NULL, NULL);
}
