/*
 * Whose listener it is: that of a process, of its family, of others.
 */
#include "listener.h"
#include "support.h"
#include <errno.h>
#include <linux/capability.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* A listener at |text|, and where it is. */
static int open_listener(const char *text, struct sock_address *address) {
    const struct sock_options options = SOCK_OPTIONS_DEFAULT;
    int fd = -1;
    assert_int_equal(sock_address_parse(text, 0, address), 0);
    assert_int_equal(sock_listen(address, &options, &fd), 0);
    assert_int_equal(sock_local(fd, address), 0);
    return fd;
}

static enum listener_owner owner(const struct sock_address *address, pid_t process) {
    uint32_t known = 0;
    return listener_owner(address, process, &known);
}

/* A child that has not got |fd|, with one of its own, whose pid it tells. */
static pid_t fork_family(int fd, pid_t *grandchild) {
    int pids[2];
    assert_int_equal(pipe(pids), 0);
    pid_t child = fork();
    if (child == 0) {
        close(fd);
        pid_t own = fork();
        if (own != 0) {
            (void)!write(pids[1], &own, sizeof own);
        }
        for (;;) {
            pause();
        }
    }
    assert_int_equal(read(pids[0], grandchild, sizeof *grandchild), sizeof *grandchild);
    close(pids[0]);
    close(pids[1]);
    return child;
}

static void nobody_is_there(void **state) {
    (void)state;
    struct sock_address address;
    close(open_listener("127.0.0.1", &address));
    assert_int_equal(owner(&address, getpid()), LISTENER_NOBODY);
}

static void its_own_and_its_childrens_are_the_familys(void **state) {
    (void)state;
    static const char *const places[] = {"127.0.0.1", "0.0.0.0", "::1", "::"};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        struct sock_address address;
        int fd = open_listener(places[i], &address);
        assert_int_equal(owner(&address, getpid()), LISTENER_FAMILY);
        close(fd);
    }
    /* Of two listeners at a port, that which a connection would reach. */
    struct sock_address any;
    int fd = open_listener("0.0.0.0", &any);
    struct sock_address loopback;
    assert_int_equal(sock_address_parse("127.0.0.1", sock_port(&any), &loopback), 0);
    assert_int_equal(owner(&loopback, getpid()), LISTENER_FAMILY);
    close(fd);
}

static void others_are_told_apart(void **state) {
    (void)state;
    struct sock_address address;
    pid_t grandchild = 0;
    uint32_t known = 0;
    int fd = open_listener("127.0.0.1", &address);
    pid_t child = fork_family(fd, &grandchild);
    /* The child's parent has it; the grandchild's has not. */
    assert_int_equal(listener_owner(&address, grandchild, &known), LISTENER_OTHER);
    assert_int_equal(known, 0);
    assert_int_equal(owner(&address, child), LISTENER_OTHER);
    assert_int_equal(listener_owner(&address, getpid(), &known), LISTENER_FAMILY);
    assert_int_not_equal(known, 0);
    /* What is known needs no look at the process. */
    assert_int_equal(listener_owner(&address, grandchild, &known), LISTENER_FAMILY);
    close(fd);
    fd = open_listener("127.0.0.1", &address);
    assert_int_equal(listener_owner(&address, grandchild, &known), LISTENER_OTHER);
    close(fd);
    kill(grandchild, SIGKILL);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
}

/* A sidecar under a wrapper: the process known is the wrapper. */
static void a_grandchilds_is_the_familys(void **state) {
    (void)state;
    struct sock_address address;
    pid_t grandchild = 0;
    int fd = open_listener("127.0.0.1", &address);
    pid_t child = fork();
    if (child == 0) { /* keeps it */
        for (;;) {
            pause();
        }
    }
    close(fd);
    assert_int_equal(owner(&address, getpid()), LISTENER_FAMILY);
    pid_t sibling = fork_family(-1, &grandchild);
    assert_int_equal(owner(&address, sibling), LISTENER_FAMILY);
    assert_int_equal(owner(&address, grandchild), LISTENER_OTHER);
    kill(grandchild, SIGKILL);
    kill(sibling, SIGKILL);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(sibling, NULL, 0), sibling);
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(owner(&address, getpid()), LISTENER_NOBODY);
}

/* Root without CAP_SYS_PTRACE, as in a container. */
static bool drop_ptrace(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2];
    if (syscall(SYS_capget, &header, sets) != 0) {
        return false;
    }
    sets[0].effective &= ~(UINT32_C(1) << CAP_SYS_PTRACE);
    sets[0].permitted &= ~(UINT32_C(1) << CAP_SYS_PTRACE);
    return syscall(SYS_capset, &header, sets) == 0;
}

/* A sidecar that has given up root: its descriptors are listed for root, but where they
 * lead is not told. */
static void another_users_are_not_taken_for_others(void **state) {
    (void)state;
    if (geteuid() != 0) {
        skip();
    }
    struct sock_address address;
    int ready[2];
    char byte;
    int status = -1;
    assert_int_equal(pipe(ready), 0);
    int fd = open_listener("127.0.0.1", &address);
    pid_t sidecar = fork();
    if (sidecar == 0) {
        if (setuid(65534) == 0) {
            (void)!write(ready[1], "r", 1);
        }
        for (;;) {
            pause();
        }
    }
    close(fd);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    pid_t asker = fork();
    if (asker == 0) {
        _exit(drop_ptrace() ? (int)owner(&address, sidecar) : 100);
    }
    assert_int_equal(waitpid(asker, &status, 0), asker);
    kill(sidecar, SIGKILL);
    assert_int_equal(waitpid(sidecar, NULL, 0), sidecar);
    assert_int_equal(WEXITSTATUS(status), LISTENER_UNKNOWN);
    close(ready[0]);
    close(ready[1]);
}

/* /proc as with the mount option hidepid=2: who may not look at a process does not see
 * it. */
static bool hide_processes(pid_t process) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%ld", (long)process);
    return unshare(CLONE_NEWNS) == 0 &&
           mount("none", "/", "none", MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("proc", "/proc", "proc", 0, "hidepid=2,gid=4711") == 0 &&
           drop_ptrace() && access(path, F_OK) != 0;
}

static void hidden_ones_are_not_taken_for_others(void **state) {
    (void)state;
    if (geteuid() != 0) {
        skip();
    }
    enum { NOT_HIDDEN = 100 };
    struct sock_address address;
    struct stat file;
    pid_t sidecar = 0;
    int ready[2];
    int status = -1;
    assert_int_equal(pipe(ready), 0);
    int fd = open_listener("127.0.0.1", &address);
    assert_int_equal(fstat(fd, &file), 0);
    uint32_t inode = (uint32_t)file.st_ino;
    pid_t guard = fork();
    if (guard == 0) {
        if (fork() != 0) {
            close(fd);
        } else if (setuid(65534) == 0) {
            sidecar = getpid();
            (void)!write(ready[1], &sidecar, sizeof sidecar);
        }
        for (;;) {
            pause();
        }
    }
    close(fd);
    assert_int_equal(read(ready[0], &sidecar, sizeof sidecar), sizeof sidecar);
    pid_t asker = fork();
    if (asker == 0) {
        bool hidden = hide_processes(sidecar);
        bool right = owner(&address, sidecar) == LISTENER_UNKNOWN &&
                     owner(&address, guard) == LISTENER_UNKNOWN &&
                     listener_descendant(inode, guard) == LISTENER_UNKNOWN;
        _exit(hidden ? right : NOT_HIDDEN);
    }
    assert_int_equal(waitpid(asker, &status, 0), asker);
    kill(sidecar, SIGKILL);
    kill(guard, SIGKILL);
    assert_int_equal(waitpid(guard, NULL, 0), guard);
    close(ready[0]);
    close(ready[1]);
    if (WEXITSTATUS(status) == NOT_HIDDEN) {
        print_message("/proc can't be mounted with hidepid=2 here\n");
        skip();
    }
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), true);
}

/* Elder siblings end one after the other while the list of children is read. */
static void a_list_that_changes_is_not_believed(void **state) {
    (void)state;
    enum { ELDERS = 300 };
    struct stat status;
    struct sock_address address;
    int ready[2];
    pid_t keeper = 0;
    assert_int_equal(pipe(ready), 0);
    int fd = open_listener("127.0.0.1", &address);
    assert_int_equal(fstat(fd, &status), 0);
    pid_t guard = fork();
    if (guard == 0) {
        pid_t children[ELDERS + 1];
        for (int i = 0; i <= ELDERS; i++) {
            children[i] = fork();
            if (children[i] == 0) {
                close(i < ELDERS ? fd : ready[1]); /* the last one keeps it */
                close(i < ELDERS ? ready[1] : ready[0]);
                pause();
            }
        }
        close(fd);
        (void)!write(ready[1], &children[ELDERS], sizeof *children);
        for (int i = 0; i < ELDERS; i++) {
            usleep(200);
            kill(children[i], SIGKILL);
            waitpid(children[i], NULL, 0);
        }
        close(ready[1]);
        pause();
    }
    close(fd);
    close(ready[1]);
    assert_int_equal(read(ready[0], &keeper, sizeof keeper), sizeof keeper);
    struct pollfd end = {.fd = ready[0], .events = POLLIN};
    while (poll(&end, 1, 0) == 0) {
        assert_int_not_equal(listener_descendant((uint32_t)status.st_ino, guard),
                             LISTENER_OTHER);
    }
    assert_int_equal(listener_descendant((uint32_t)status.st_ino, guard),
                     LISTENER_FAMILY);
    kill(keeper, SIGKILL);
    kill(guard, SIGKILL);
    assert_int_equal(waitpid(guard, NULL, 0), guard);
    close(ready[0]);
}

static void connections_are_seen(void **state) {
    (void)state;
    const struct sock_options options = SOCK_OPTIONS_DEFAULT;
    struct sock_address address;
    int fd = open_listener("127.0.0.1", &address);
    int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_false(listener_has_connections(&address));
    assert_int_equal(
        connect(connection, (struct sockaddr *)&address.storage, address.size), 0);
    assert_int_equal(send(connection, "x", 1, 0), 1); /* its listener defers accept */
    int accepted = -1;
    struct sock_address peer;
    while (sock_accept(fd, &options, &accepted, &peer) == -EAGAIN) {
    }
    assert_true(listener_has_connections(&address));
    close(connection);
    close(accepted);
    close(fd);
    assert_false(listener_has_connections(&address));
}

/* A kernel without tcp_diag says "no such file" of every question. So does ours of a
 * family that it has no diagnostics for. */
static void without_diagnostics_nothing_is_known(void **state) {
    (void)state;
    struct sock_address address;
    int fd = open_listener("127.0.0.1", &address);
    address.storage.ss_family = AF_X25;
    assert_int_equal(owner(&address, getpid()), LISTENER_UNKNOWN);
    assert_true(listener_has_connections(&address));
    close(fd);
}

/* A connection is no listener, though it has the same port. */
static void its_user_is_told(void **state) {
    (void)state;
    const struct sock_options options = SOCK_OPTIONS_DEFAULT;
    static const char *const places[] = {"127.0.0.1", "0.0.0.0", "::1", "::"};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        struct sock_address address;
        struct sock_address peer;
        uid_t user = geteuid() + 1;
        int connection = -1;
        int accepted = -1;
        int fd = open_listener(places[i], &address);
        assert_int_equal(listener_user(&address, &user), 0);
        assert_int_equal(user, geteuid());
        connection = socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(
            connect(connection, (struct sockaddr *)&address.storage, address.size), 0);
        assert_int_equal(send(connection, "x", 1, 0), 1); /* accept is deferred */
        while (sock_accept(fd, &options, &accepted, &peer) == -EAGAIN) {
        }
        close(fd);
        assert_int_equal(listener_user(&address, &user), -ENOENT);
        close(accepted);
        close(connection);
    }
    struct sock_address elsewhere;
    struct sock_address address;
    uid_t user;
    int fd = open_listener("127.0.0.1", &address);
    assert_int_equal(sock_address_parse("127.0.0.2", sock_port(&address), &elsewhere), 0);
    assert_int_equal(listener_user(&elsewhere, &user), -ENOENT);
    close(fd);
}

/* A connection's end, here that of a listener, in the family of a guard. */
static void descendants_are_found(void **state) {
    (void)state;
    struct stat status;
    struct sock_address address;
    pid_t grandchild = 0;
    int fd = open_listener("127.0.0.1", &address);
    assert_int_equal(fstat(fd, &status), 0);
    uint32_t inode = (uint32_t)status.st_ino;
    pid_t guard = fork();
    if (guard == 0) { /* whose child keeps it */
        if (fork() != 0) {
            close(fd);
        }
        for (;;) {
            pause();
        }
    }
    pid_t other = fork_family(fd, &grandchild);
    while (listener_descendant(inode, guard) != LISTENER_FAMILY) {
        usleep(1000);
    }
    while (listener_descendant(inode, other) != LISTENER_OTHER) {
        usleep(1000);
    }
    assert_int_equal(listener_descendant(inode, getpid()), LISTENER_FAMILY);
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/task/%ld/children", (long)guard, (long)guard);
    FILE *children = fopen(path, "r");
    long child = 0;
    assert_non_null(children);
    assert_int_equal(fscanf(children, "%ld", &child), 1);
    fclose(children);
    kill((pid_t)child, SIGKILL);
    kill(guard, SIGKILL);
    kill(grandchild, SIGKILL);
    kill(other, SIGKILL);
    assert_int_equal(waitpid(guard, NULL, 0), guard);
    assert_int_equal(waitpid(other, NULL, 0), other);
    close(fd);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nobody_is_there),
        cmocka_unit_test(its_own_and_its_childrens_are_the_familys),
        cmocka_unit_test(others_are_told_apart),
        cmocka_unit_test(a_grandchilds_is_the_familys),
        cmocka_unit_test(another_users_are_not_taken_for_others),
        cmocka_unit_test(hidden_ones_are_not_taken_for_others),
        cmocka_unit_test(a_list_that_changes_is_not_believed),
        cmocka_unit_test(connections_are_seen),
        cmocka_unit_test(without_diagnostics_nothing_is_known),
        cmocka_unit_test(its_user_is_told),
        cmocka_unit_test(descendants_are_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
