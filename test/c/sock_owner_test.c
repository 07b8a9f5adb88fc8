/* Whose the other end of a connection is: ours, another user's, nobody's. Another user's
 * is a child of ours, so that needs root; the kernel's refusal of netlink sockets is
 * played by a seccomp filter in a child. */
#include "support.h"
#include "sock_owner.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* "nobody", and as good as any. */
#define STRANGER 65534

static const struct sock_options defaults = SOCK_OPTIONS_DEFAULT;

static void wait_for(int fd, short events) {
    struct pollfd ready = {.fd = fd, .events = events};
    assert_int_equal(poll(&ready, 1, 30000), 1);
}

/* A connection and both its addresses, as who has accepted it sees them. */
struct connection {
    int listener;
    int client;
    int accepted;
    struct sock_address local;
    struct sock_address peer;
};

static bool try_listen(const char *address, struct connection *connection) {
    struct sock_address bound;
    memset(connection, 0, sizeof *connection);
    assert_int_equal(sock_address_parse(address, 0, &bound), 0);
    return sock_listen(&bound, &defaults, &connection->listener) == 0;
}

static int dial(int listener, const char *address) {
    struct sock_address bound;
    int fd = -1;
    assert_int_equal(sock_local(listener, &bound), 0);
    assert_int_equal(sock_address_parse(address, sock_port(&bound), &bound), 0);
    int result = sock_connect(&bound, NULL, &defaults, &fd);
    assert_true(result == 0 || result == -EINPROGRESS);
    wait_for(fd, POLLOUT);
    assert_int_equal(sock_connected(fd), 0);
    return fd;
}

static void take(struct connection *connection) {
    wait_for(connection->listener, POLLIN);
    assert_int_equal(
        sock_accept(connection->listener, &defaults, &connection->accepted, NULL), 0);
    assert_int_equal(sock_local(connection->accepted, &connection->local), 0);
    assert_int_equal(sock_peer(connection->accepted, &connection->peer), 0);
}

/* |from|: the address dialled. */
static void open_connection(struct connection *connection, const char *at,
                            const char *from) {
    assert_true(try_listen(at, connection));
    connection->client = dial(connection->listener, from);
    take(connection);
}

static void close_connection(struct connection *connection) {
    close(connection->accepted);
    close(connection->listener);
}

typedef int (*ask)(const struct sock_address *local, const struct sock_address *peer,
                   struct sock_owner *out);
static const ask ways[] = {sock_owner, sock_owner_scan};

static void assert_owner(const struct connection *connection, uid_t expected) {
    for (size_t i = 0; i < 2; i++) {
        struct sock_owner owner = {.uid = 4711};
        assert_int_equal(ways[i](&connection->local, &connection->peer, &owner), 0);
        assert_int_equal(owner.uid, expected);
    }
}

static void assert_nobody(const struct connection *connection) {
    for (size_t i = 0; i < 2; i++) {
        struct sock_owner owner = {.uid = 4711};
        assert_int_equal(ways[i](&connection->local, &connection->peer, &owner), -ENOENT);
        assert_int_equal(owner.uid, 4711);
    }
}

/* The number the next descriptor would get: shows a leak. */
static int next_fd(void) {
    int fd = dup(0);
    assert_true(fd >= 0);
    close(fd);
    return fd;
}

static bool has_ipv6(void) {
    struct connection connection;
    bool has = try_listen("::1", &connection);
    if (has) {
        close(connection.listener);
    }
    return has;
}

static void own_connection(void **state) {
    (void)state;
    struct connection connection;
    open_connection(&connection, "127.0.0.1", "127.0.0.1");
    int before = next_fd();
    assert_owner(&connection, geteuid());
    assert_int_equal(next_fd(), before);
    close(connection.client);
    close_connection(&connection);
}

static void own_ipv6_connection(void **state) {
    (void)state;
    if (!has_ipv6()) {
        skip();
    }
    struct connection connection;
    open_connection(&connection, "::1", "::1");
    assert_owner(&connection, geteuid());
    close(connection.client);
    close_connection(&connection);
}

/* A listener for both, called by IPv4; and one for IPv4, called by a socket of IPv6. */
static void ipv4_within_ipv6(void **state) {
    (void)state;
    if (!has_ipv6()) {
        skip();
    }
    struct connection connection;
    open_connection(&connection, "::", "127.0.0.1");
    assert_int_equal(connection.peer.storage.ss_family, AF_INET6);
    assert_owner(&connection, geteuid());
    close(connection.client);
    close_connection(&connection);

    open_connection(&connection, "127.0.0.1", "::ffff:127.0.0.1");
    assert_int_equal(connection.peer.storage.ss_family, AF_INET);
    assert_owner(&connection, geteuid());
    close(connection.client);
    close_connection(&connection);
}

/* A user's process that connects, and closes when told: by the end of |*control|. */
static pid_t stranger_dials(int listener, const char *address, int *control) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        char byte;
        close(ends[1]);
        if (setresuid(STRANGER, STRANGER, STRANGER) != 0) {
            _exit(1);
        }
        int fd = dial(listener, address);
        ssize_t got = read(ends[0], &byte, 1);
        close(fd);
        _exit(got == 0 ? 0 : 1);
    }
    close(ends[0]);
    *control = ends[1];
    return child;
}

static void check_stranger(const char *at, const char *from) {
    struct connection connection;
    int control = -1;
    int status = -1;
    assert_true(try_listen(at, &connection));
    pid_t child = stranger_dials(connection.listener, from, &control);
    take(&connection);
    assert_owner(&connection, STRANGER);

    /* Closed, its end is still in the kernel: of user 0, it says. */
    close(control);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    wait_for(connection.accepted, POLLIN);
    assert_nobody(&connection);
    close_connection(&connection);
}

static void other_user(void **state) {
    (void)state;
    if (geteuid() != 0) {
        print_message("not root: there is no other user to be\n");
        skip();
    }
    check_stranger("127.0.0.1", "127.0.0.1");
    if (has_ipv6()) {
        check_stranger("::1", "::1");
        check_stranger("::", "127.0.0.1");
    }
}

static void closed_by_its_owner(void **state) {
    (void)state;
    struct connection connection;
    open_connection(&connection, "127.0.0.1", "127.0.0.1");
    close(connection.client);
    wait_for(connection.accepted, POLLIN);
    assert_nobody(&connection);
    close_connection(&connection);
}

/* Of a connection that is no more the kernel names a listener at that port. */
static void listener_is_not_taken_for_it(void **state) {
    (void)state;
    struct connection connection;
    struct connection other;
    open_connection(&connection, "127.0.0.1", "127.0.0.1");
    assert_true(try_listen("127.0.0.1", &other));
    assert_int_equal(sock_local(other.listener, &connection.peer), 0);
    for (size_t i = 0; i < 2; i++) {
        struct sock_owner owner = {.uid = 4711};
        assert_true(ways[i](&connection.local, &connection.peer, &owner) < 0);
        assert_int_equal(owner.uid, 4711);
    }
    close(other.listener);
    close(connection.client);
    close_connection(&connection);
}

static void no_descriptor_left(void **state) {
    (void)state;
    struct connection connection;
    struct rlimit before;
    open_connection(&connection, "127.0.0.1", "127.0.0.1");
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    struct rlimit limit = {(rlim_t)next_fd(), before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    struct sock_owner owner = {.uid = 4711};
    int results[] = {sock_owner(&connection.local, &connection.peer, &owner),
                     sock_owner_scan(&connection.local, &connection.peer, &owner)};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(results[0], -EMFILE);
    assert_int_equal(results[1], -EMFILE);
    assert_int_equal(owner.uid, 4711);
    assert_owner(&connection, geteuid());
    close(connection.client);
    close_connection(&connection);
}

static void refuse_netlink_sockets(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_socket, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_NETLINK, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof filter[0], filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        _exit(2);
    }
}

/* As in a container whose seccomp profile is stricter than usual. */
static void without_netlink(void **state) {
    (void)state;
    struct connection connection;
    int status = -1;
    open_connection(&connection, "127.0.0.1", "127.0.0.1");
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct sock_owner owner = {.uid = 4711};
        refuse_netlink_sockets();
        bool right =
            sock_owner(&connection.local, &connection.peer, &owner) == -EOPNOTSUPP &&
            sock_owner_scan(&connection.local, &connection.peer, &owner) == 0 &&
            owner.uid == geteuid();
        _exit(right ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    close(connection.client);
    close_connection(&connection);
}

static void no_internet_address(void **state) {
    (void)state;
    struct sock_address none;
    struct sock_owner owner;
    memset(&none, 0, sizeof none);
    none.storage.ss_family = AF_UNIX;
    assert_int_equal(sock_owner(&none, &none, &owner), -EAFNOSUPPORT);
    assert_int_equal(sock_owner_scan(&none, &none, &owner), -EAFNOSUPPORT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(own_connection),
        cmocka_unit_test(own_ipv6_connection),
        cmocka_unit_test(ipv4_within_ipv6),
        cmocka_unit_test(other_user),
        cmocka_unit_test(closed_by_its_owner),
        cmocka_unit_test(listener_is_not_taken_for_it),
        cmocka_unit_test(no_descriptor_left),
        cmocka_unit_test(without_netlink),
        cmocka_unit_test(no_internet_address),
    };
    return cmocka_run_group_tests_name("sock_owner", tests, NULL, NULL);
}
