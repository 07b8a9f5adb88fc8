/*
 * The real guard program (MESHX_GUARD) with small real commands as sidecar. Ends of
 * processes are learnt from pidfds, the rest from the guard's records, all with a
 * deadline.
 */
#include "support.h"

#include "agent.h"
#include "process.h"
#include "record.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define TIMEOUT "60000" /* a stop timeout that no test reaches */

static const char *const plain_environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                                                NULL};

struct guarded {
    pid_t guard;
    int socket;
    size_t size;
    size_t used; /* by the record returned last */
    uint8_t bytes[4 * RECORD_MAX_SIZE];
};

/* The guard with |socket| as descriptor 3; nothing else of ours is hidden from it. */
static pid_t spawn_guard(int socket, int error_output, const char *const *arguments,
                         const char *const *environment) {
    pid_t pid;
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    if (socket >= 0) {
        posix_spawn_file_actions_adddup2(&actions, socket, GUARD_SOCKET_FD);
    } else {
        posix_spawn_file_actions_addclose(&actions, GUARD_SOCKET_FD);
    }
    if (error_output >= 0) {
        posix_spawn_file_actions_adddup2(&actions, error_output, STDERR_FILENO);
    }
    assert_int_equal(posix_spawn(&pid, getenv("MESHX_GUARD"), &actions, NULL,
                                 (char *const *)arguments, (char *const *)environment),
                     0);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

static void start(struct guarded *guarded, const char *const *arguments,
                  const char *const *environment) {
    int sockets[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    *guarded = (struct guarded){.socket = sockets[0]};
    guarded->guard = spawn_guard(sockets[1], -1, arguments, environment);
    close(sockets[1]);
}

static void start_shell(struct guarded *guarded, const char *stop_timeout,
                        const char *script) {
    const char *arguments[] = {"meshx_guard", stop_timeout, "/bin/sh",
                               "-c",          script,       NULL};
    start(guarded, arguments, plain_environment);
}

/* False: end of file. */
static bool next(struct guarded *guarded, struct record *record) {
    guarded->size -= guarded->used;
    memmove(guarded->bytes, guarded->bytes + guarded->used, guarded->size);
    guarded->used = 0;
    for (;;) {
        enum record_status status = record_next(guarded->bytes, guarded->size, record);
        assert_int_not_equal(status, RECORD_INVALID);
        if (status == RECORD_COMPLETE) {
            guarded->used = record->size;
            return true;
        }
        struct pollfd readable = {.fd = guarded->socket, .events = POLLIN};
        assert_int_equal(poll(&readable, 1, PROCESS_DEADLINE_MS), 1);
        ssize_t size = recv(guarded->socket, guarded->bytes + guarded->size,
                            sizeof guarded->bytes - guarded->size, 0);
        if (size <= 0) {
            assert_int_equal(guarded->size, 0); /* no half record */
            return false;
        }
        guarded->size += (size_t)size;
    }
}

static pid_t expect_started(struct guarded *guarded) {
    struct record record;
    assert_true(next(guarded, &record));
    assert_int_equal(record.type, GUARD_STARTED);
    assert_true(record.pid > 1);
    return (pid_t)record.pid;
}

static void expect_line(struct guarded *guarded, enum guard_record type,
                        const char *expected) {
    struct record record;
    char line[GUARD_LINE_MAX + 1];
    assert_true(next(guarded, &record));
    assert_int_equal(record.type, type);
    record_line(&record, line);
    assert_string_equal(line, expected);
}

static pid_t expect_pid_line(struct guarded *guarded) {
    struct record record;
    char line[GUARD_LINE_MAX + 1];
    assert_true(next(guarded, &record));
    assert_int_equal(record.type, GUARD_STDOUT);
    record_line(&record, line);
    pid_t pid = (pid_t)strtol(line, NULL, 10);
    assert_true(pid > 1);
    return pid;
}

static void end(struct guarded *guarded) {
    int status;
    close(guarded->socket);
    assert_true(process_wait_gone(guarded->guard));
    assert_int_equal(waitpid(guarded->guard, &status, 0), guarded->guard);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void expect_end(struct guarded *guarded, enum guard_record type, int first,
                       int second) {
    struct record record;
    assert_true(next(guarded, &record));
    assert_int_equal(record.type, type);
    if (type == GUARD_EXEC_FAILED) {
        assert_int_equal(record.error_number, first);
    } else {
        assert_int_equal(record.exit_status, first);
        assert_int_equal(record.signal_number, second);
    }
    assert_false(next(guarded, &record));
    end(guarded);
}

static void expect_exit(struct guarded *guarded, int status) {
    expect_end(guarded, GUARD_EXITED, status, 0);
}

static void expect_killed(struct guarded *guarded, int signal_number) {
    expect_end(guarded, GUARD_EXITED, -1, signal_number);
}

static void ask_to_stop(struct guarded *guarded) {
    assert_int_equal(shutdown(guarded->socket, SHUT_WR), 0);
}

/* Usage */

static void expect_usage(int socket, const char *const *arguments) {
    int errors[2];
    char text[512];
    int status;
    size_t size = 0;
    ssize_t got;
    assert_int_equal(pipe2(errors, O_CLOEXEC), 0);
    pid_t pid = spawn_guard(socket, errors[1], arguments, plain_environment);
    close(errors[1]);
    while ((got = read(errors[0], text + size, sizeof text - 1 - size)) > 0) {
        size += (size_t)got;
    }
    text[size] = '\0';
    close(errors[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 2);
    assert_non_null(strstr(text, "usage: meshx_guard"));
}

static void refuses_wrong_use(void **state) {
    (void)state;
    int sockets[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    const char *right[] = {"meshx_guard", "100", "true", NULL};
    expect_usage(-1, right);
    int file = open("/dev/null", O_RDWR | O_CLOEXEC);
    expect_usage(file, right);
    close(file);
    const char *wrong[][4] = {
        {"meshx_guard", NULL},
        {"meshx_guard", "100", NULL},
        {"meshx_guard", "soon", "true", NULL},
        {"meshx_guard", "100ms", "true", NULL},
        {"meshx_guard", "-1", "true", NULL},
        {"meshx_guard", "4294967296", "true", NULL},
        {"meshx_guard", "99999999999999999999999", "true", NULL},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        expect_usage(sockets[1], wrong[i]);
    }
    close(sockets[0]);
    close(sockets[1]);
}

/* Start and end */

static void reports_start_output_and_exit(void **state) {
    (void)state;
    struct guarded guarded;
    struct record record;
    bool out = false;
    bool err = false;
    start_shell(&guarded, TIMEOUT, "echo out; echo err >&2; exit 7");
    expect_started(&guarded);
    for (int i = 0; i < 2; i++) { /* the order of two pipes is not defined */
        assert_true(next(&guarded, &record));
        out = out || record.type == GUARD_STDOUT;
        err = err || record.type == GUARD_STDERR;
        assert_int_equal(record.line_size, 3);
        assert_memory_equal(record.line, record.type == GUARD_STDOUT ? "out" : "err", 3);
    }
    assert_true(out && err);
    expect_exit(&guarded, 7);
}

static void reports_death_by_signal(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT, "kill -USR1 $$");
    expect_started(&guarded);
    expect_killed(&guarded, SIGUSR1);
}

static void reports_exec_failure(void **state) {
    (void)state;
    struct guarded guarded;
    const char *missing[] = {"meshx_guard", TIMEOUT, "/nonexistent/sidecar", NULL};
    start(&guarded, missing, plain_environment);
    expect_end(&guarded, GUARD_EXEC_FAILED, ENOENT, 0);
    const char *not_on_path[] = {"meshx_guard", TIMEOUT, "no-such-sidecar", NULL};
    start(&guarded, not_on_path, plain_environment);
    expect_end(&guarded, GUARD_EXEC_FAILED, ENOENT, 0);
    const char *not_executable[] = {"meshx_guard", TIMEOUT, "/etc/passwd", NULL};
    start(&guarded, not_executable, plain_environment);
    expect_end(&guarded, GUARD_EXEC_FAILED, EACCES, 0);
}

static void finds_the_program_in_the_given_path(void **state) {
    (void)state;
    struct guarded guarded;
    const char *arguments[] = {"meshx_guard", TIMEOUT, "true", NULL};
    const char *const nowhere[] = {"PATH=/nonexistent", NULL};
    start(&guarded, arguments, nowhere);
    expect_end(&guarded, GUARD_EXEC_FAILED, ENOENT, 0);
    start(&guarded, arguments, plain_environment);
    expect_started(&guarded);
    expect_exit(&guarded, 0);
}

/* What the sidecar inherits */

static void passes_the_environment_exactly(void **state) {
    (void)state;
    struct guarded guarded;
    const char *arguments[] = {"meshx_guard", TIMEOUT, "env", NULL};
    const char *const environment[] = {"CONSUL_HTTP_TOKEN=a=b c", "PATH=/usr/bin:/bin",
                                       "EMPTY=", NULL};
    start(&guarded, arguments, environment);
    expect_started(&guarded);
    for (size_t i = 0; environment[i] != NULL; i++) {
        expect_line(&guarded, GUARD_STDOUT, environment[i]);
    }
    expect_exit(&guarded, 0);
}

/* What /proc/PID/|file| holds. */
static size_t read_proc(pid_t pid, const char *file, char *bytes, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/%s", (long)pid, file);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t count = fd >= 0 ? read(fd, bytes, size) : 0;
    close(fd);
    return count > 0 ? (size_t)count : 0;
}

static void keeps_no_secret_and_gains_no_privilege(void **state) {
    (void)state;
    struct guarded guarded;
    const char *arguments[] = {"meshx_guard", TIMEOUT, "sleep", "1000", NULL};
    const char *const environment[] = {"CONSUL_HTTP_TOKEN=tops3cret",
                                       "PATH=/usr/bin:/bin", NULL};
    char bytes[8192] = "";
    start(&guarded, arguments, environment);
    pid_t sidecar = expect_started(&guarded);
    size_t size = read_proc(sidecar, "environ", bytes, sizeof bytes);
    assert_non_null(memmem(bytes, size, "tops3cret", 9));
    /* Only root may look: not dumpable. */
    size = read_proc(guarded.guard, "environ", bytes, sizeof bytes);
    assert_int_equal(size > 0, geteuid() == 0);
    assert_null(memmem(bytes, size, "tops3cret", 9));
    size = read_proc(sidecar, "status", bytes, sizeof bytes - 1);
    bytes[size] = '\0';
    assert_non_null(strstr(bytes, "NoNewPrivs:\t1\n"));
    ask_to_stop(&guarded);
    expect_killed(&guarded, SIGTERM);
}

static void passes_no_descriptor_beyond_2(void **state) {
    (void)state;
    struct guarded guarded;
    int stray = open("/dev/zero", O_RDONLY); /* not CLOEXEC, also at a high number */
    int high = fcntl(stray, F_DUPFD, 1000);
    assert_true(stray >= 0 && high >= 1000);
    start_shell(&guarded, TIMEOUT,
                "ls /proc/$$/fd; readlink /proc/$$/fd/0; exec sleep 1000");
    expect_started(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "0");
    expect_line(&guarded, GUARD_STDOUT, "1");
    expect_line(&guarded, GUARD_STDOUT, "2");
    expect_line(&guarded, GUARD_STDOUT, "/dev/null");
    /* The guard itself: 0-3, signalfd, two pipes. Only root may look: not dumpable. */
    assert_int_equal(process_descriptors(guarded.guard), geteuid() == 0 ? 7 : -1);
    ask_to_stop(&guarded);
    expect_killed(&guarded, SIGTERM);
    close(high);
    close(stray);
}

static void resets_signals(void **state) {
    (void)state;
    struct guarded guarded;
    sigset_t blocked;
    sigset_t before;
    sigfillset(&blocked);
    sigprocmask(SIG_SETMASK, &blocked, &before);
    (void)signal(SIGCHLD, SIG_IGN);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGRTMAX, SIG_IGN);
    start_shell(&guarded, TIMEOUT, "exec grep -E '^Sig(Ign|Blk):' /proc/self/status");
    (void)signal(SIGRTMAX, SIG_DFL);
    (void)signal(SIGPIPE, SIG_DFL);
    (void)signal(SIGCHLD, SIG_DFL);
    sigprocmask(SIG_SETMASK, &before, NULL);
    expect_started(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "SigBlk:\t0000000000000000");
    /* glibc's posix_spawn leaves its own two, 32 and 33, ignored in every child. */
    struct record record;
    char line[GUARD_LINE_MAX + 1];
    assert_true(next(&guarded, &record));
    record_line(&record, line);
    assert_memory_equal(line, "SigIgn:\t", 8);
    assert_true((strtoull(line + 8, NULL, 16) & ~(3ULL << 31)) == 0);
    expect_exit(&guarded, 0);
}

static void has_its_own_session_and_the_sidecar_its_group(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT, "exec sleep 1000");
    pid_t sidecar = expect_started(&guarded);
    assert_int_equal(getsid(guarded.guard), guarded.guard);
    assert_int_equal(getsid(sidecar), guarded.guard);
    assert_int_equal(getpgid(sidecar), sidecar);
    ask_to_stop(&guarded);
    expect_killed(&guarded, SIGTERM);
}

/* Stopping */

static void stops_when_the_owner_closes(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT, "exec sleep 1000");
    pid_t sidecar = expect_started(&guarded);
    end(&guarded);
    assert_false(process_runs(sidecar));
}

static void reports_the_end_of_an_orderly_stop(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT,
                "trap 'echo bye; exit 5' TERM; echo ready; sleep 1000 & wait");
    expect_started(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "ready");
    ask_to_stop(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "bye");
    expect_exit(&guarded, 5);
}

static void kills_what_ignores_term(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, "50", "trap '' TERM; echo ready; sleep 1000; sleep 1000");
    expect_started(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "ready");
    ask_to_stop(&guarded);
    expect_killed(&guarded, SIGKILL);
}

static void stops_a_stopped_process(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT, "exec sleep 1000");
    pid_t sidecar = expect_started(&guarded);
    assert_int_equal(kill(sidecar, SIGSTOP), 0);
    ask_to_stop(&guarded);
    expect_killed(&guarded, SIGTERM);
}

static void stops_when_signalled(void **state) {
    (void)state;
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP};
    for (size_t i = 0; i < 3; i++) {
        struct guarded guarded;
        start_shell(&guarded, TIMEOUT, "exec sleep 1000");
        expect_started(&guarded);
        assert_int_equal(kill(guarded.guard, signals[i]), 0);
        expect_killed(&guarded, SIGTERM);
    }
}

/* The stop races with fork and exec: at no moment may anything be left. */
static void stops_at_any_moment_of_the_start(void **state) {
    (void)state;
    for (int i = 0; i < 50; i++) {
        struct guarded guarded;
        struct record record = {.type = GUARD_STDOUT};
        start_shell(&guarded, TIMEOUT, "exec sleep 1000");
        ask_to_stop(&guarded);
        while (next(&guarded, &record)) {
        }
        assert_int_equal(record.type, GUARD_EXITED);
        assert_int_equal(record.signal_number, SIGTERM);
        end(&guarded);
    }
}

/* A process in a session of its own with a child in another one, both deaf to TERM. */
#define DEAF_DAEMONS                                                                     \
    "trap '' TERM; setsid sh -c 'setsid sleep 1000 & echo $!; echo $$; wait; sleep "     \
    "1000' "

static void kills_descendants_when_the_sidecar_ends(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT, DEAF_DAEMONS "& sleep 1000 & wait");
    pid_t sidecar = expect_started(&guarded);
    pid_t grandchild = expect_pid_line(&guarded);
    pid_t child = expect_pid_line(&guarded);
    assert_int_equal(kill(sidecar, SIGKILL), 0);
    expect_killed(&guarded, SIGKILL);
    assert_false(process_runs(child));
    assert_false(process_runs(grandchild));
}

static void kills_descendants_when_the_owner_closes(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, "50", DEAF_DAEMONS "& sleep 1000; sleep 1000");
    pid_t sidecar = expect_started(&guarded);
    pid_t grandchild = expect_pid_line(&guarded);
    pid_t child = expect_pid_line(&guarded);
    end(&guarded);
    assert_false(process_runs(sidecar));
    assert_false(process_runs(child));
    assert_false(process_runs(grandchild));
}

static void dies_with_its_guard(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT, "trap '' TERM HUP; echo ready; while :; do :; done");
    pid_t sidecar = expect_started(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "ready");
    assert_int_equal(kill(guarded.guard, SIGKILL), 0);
    assert_true(process_wait_gone(sidecar));
    assert_int_equal(waitpid(guarded.guard, NULL, 0), guarded.guard);
    close(guarded.socket);
}

static void dies_with_its_owner(void **state) {
    (void)state;
    int pids[2];
    pid_t told[2];
    assert_int_equal(pipe2(pids, O_CLOEXEC), 0);
    pid_t owner = fork();
    assert_true(owner >= 0);
    if (owner == 0) {
        struct guarded guarded;
        start_shell(&guarded, TIMEOUT, "exec sleep 1000");
        pid_t mine[2] = {guarded.guard, expect_started(&guarded)};
        (void)!write(pids[1], mine, sizeof mine);
        for (;;) {
            pause();
        }
    }
    close(pids[1]);
    assert_int_equal(read(pids[0], told, sizeof told), sizeof told);
    close(pids[0]);
    assert_true(process_runs(told[0]) && process_runs(told[1]));
    assert_int_equal(kill(owner, SIGKILL), 0);
    assert_int_equal(waitpid(owner, NULL, 0), owner);
    assert_true(process_wait_gone(told[0]));
    assert_false(process_runs(told[1]));
}

/* Output */

static void cuts_output_into_lines(void **state) {
    (void)state;
    struct guarded guarded;
    start_shell(&guarded, TIMEOUT,
                "printf 'one\\n\\nthree\\r\\n\\rfour\\r5\\n\\nlast\\r'");
    expect_started(&guarded);
    expect_line(&guarded, GUARD_STDOUT, "one");
    expect_line(&guarded, GUARD_STDOUT, "");
    expect_line(&guarded, GUARD_STDOUT, "three");
    expect_line(&guarded, GUARD_STDOUT, "\rfour\r5");
    expect_line(&guarded, GUARD_STDOUT, "");
    expect_line(&guarded, GUARD_STDOUT, "last");
    expect_exit(&guarded, 0);
}

/* What |size| bytes and |ending| become: |pieces| pieces, the last of |last| bytes. */
static void expect_pieces(int size, const char *ending, int pieces, size_t last) {
    struct guarded guarded;
    char script[128];
    snprintf(script, sizeof script,
             "head -c %d /dev/zero | tr '\\0' x; printf '%send\\n'", size, ending);
    start_shell(&guarded, TIMEOUT, script);
    expect_started(&guarded);
    for (int piece = 1; piece <= pieces; piece++) {
        struct record record;
        assert_true(next(&guarded, &record));
        assert_int_equal(record.type, GUARD_STDOUT);
        assert_int_equal(record.line_size, piece < pieces ? GUARD_LINE_MAX : last);
        assert_int_equal(record.line[record.line_size - 1], 'x');
    }
    expect_line(&guarded, GUARD_STDOUT, "end");
    expect_exit(&guarded, 0);
}

static void cuts_long_lines(void **state) {
    (void)state;
    expect_pieces(GUARD_LINE_MAX, "\\n", 1, GUARD_LINE_MAX);
    expect_pieces(GUARD_LINE_MAX, "\\r\\n", 1, GUARD_LINE_MAX);
    expect_pieces(2 * GUARD_LINE_MAX, "\\n", 2, GUARD_LINE_MAX);
    expect_pieces(10000, "\\n", 3, 10000 - 2 * GUARD_LINE_MAX);
}

static void flushes_a_long_line_without_newline(void **state) {
    (void)state;
    struct guarded guarded;
    struct record record;
    size_t total = 0;
    start_shell(&guarded, TIMEOUT, "head -c 1000000 /dev/zero | tr '\\0' x");
    expect_started(&guarded);
    while (next(&guarded, &record) && record.type == GUARD_STDOUT) {
        total += record.line_size;
    }
    assert_int_equal(total, 1000000);
    assert_int_equal(record.type, GUARD_EXITED);
    end(&guarded);
}

#define FLOOD 100000000

/* Nobody reads while 100 MB of lines come: the sidecar is not held up, the guard does not
 * grow, and afterwards every line was either told or counted. */
static void survives_a_flood(void **state) {
    (void)state;
    struct guarded guarded;
    struct record record;
    char line[GUARD_LINE_MAX + 1];
    unsigned long long told = 0;
    unsigned long long dropped = 0;
    int notes = 0;
    start_shell(&guarded, TIMEOUT, "yes | head -c 100000000; exit 3");
    pid_t sidecar = expect_started(&guarded);
    long before = process_memory(guarded.guard, "VmRSS:");
    assert_true(process_wait_gone(sidecar));
    assert_true(process_runs(guarded.guard)); /* it has EXITED to tell */
    long after = process_memory(guarded.guard, "VmHWM:");
    assert_true(before > 0 && after > 0);
    assert_true(after - before < 16384);
    while (next(&guarded, &record) && record.type != GUARD_EXITED) {
        record_line(&record, line);
        if (record.type == GUARD_STDERR) {
            unsigned long long count = 0;
            assert_int_equal(sscanf(line, "meshx_guard: %llu lines dropped", &count), 1);
            dropped += count;
            notes++;
        } else {
            assert_string_equal(line, "y");
            told++;
        }
    }
    assert_true(notes >= 1);
    assert_true(told > 0);
    assert_true(told + dropped == FLOOD / 2);
    assert_int_equal(record.exit_status, 3);
    end(&guarded);
}

/* The worst moment for the last record: all room is taken, and no output is left to be
 * read that would make some. */
static void reports_the_end_when_all_room_is_taken(void **state) {
    (void)state;
    struct guarded guarded;
    struct record record;
    if (geteuid() != 0) {
        skip(); /* can't see the guard's descriptors */
    }
    char *directory = agent_make_directory();
    char gate[256];
    char script[512];
    snprintf(gate, sizeof gate, "%s/gate", directory);
    snprintf(script, sizeof script,
             "read go < %s; yes | head -c 3000000; exec sleep 1000 >&- 2>&-", gate);
    assert_int_equal(mkfifo(gate, 0600), 0);
    start_shell(&guarded, TIMEOUT, script);
    pid_t sidecar = expect_started(&guarded);
    int go = open(gate, O_WRONLY | O_CLOEXEC); /* from here on nobody reads */
    assert_int_equal(write(go, "\n", 1), 1);
    close(go);
    agent_remove_directory(directory);
    assert_true(process_wait_descriptors(guarded.guard, 5)); /* without the two pipes */
    assert_int_equal(kill(sidecar, SIGKILL), 0);
    assert_true(process_wait_gone(sidecar));
    while (next(&guarded, &record) && record.type != GUARD_EXITED) {
    }
    assert_int_equal(record.type, GUARD_EXITED);
    assert_int_equal(record.signal_number, SIGKILL);
    end(&guarded);
}

/* An owner that does read misses nothing, not even what was in the pipe at the end. */
static void loses_nothing_when_read(void **state) {
    (void)state;
    struct guarded guarded;
    char text[32];
    start_shell(&guarded, TIMEOUT, "seq 1 5000");
    expect_started(&guarded);
    for (int i = 1; i <= 5000; i++) {
        snprintf(text, sizeof text, "%d", i);
        expect_line(&guarded, GUARD_STDOUT, text);
    }
    expect_exit(&guarded, 0);
}

int main(void) {
    if (getenv("MESHX_GUARD") == NULL) {
        fputs("MESHX_GUARD must name the guard program\n", stderr);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_wrong_use),
        cmocka_unit_test(reports_start_output_and_exit),
        cmocka_unit_test(reports_death_by_signal),
        cmocka_unit_test(reports_exec_failure),
        cmocka_unit_test(finds_the_program_in_the_given_path),
        cmocka_unit_test(passes_the_environment_exactly),
        cmocka_unit_test(keeps_no_secret_and_gains_no_privilege),
        cmocka_unit_test(passes_no_descriptor_beyond_2),
        cmocka_unit_test(resets_signals),
        cmocka_unit_test(has_its_own_session_and_the_sidecar_its_group),
        cmocka_unit_test(stops_when_the_owner_closes),
        cmocka_unit_test(reports_the_end_of_an_orderly_stop),
        cmocka_unit_test(kills_what_ignores_term),
        cmocka_unit_test(stops_a_stopped_process),
        cmocka_unit_test(stops_when_signalled),
        cmocka_unit_test(stops_at_any_moment_of_the_start),
        cmocka_unit_test(kills_descendants_when_the_sidecar_ends),
        cmocka_unit_test(kills_descendants_when_the_owner_closes),
        cmocka_unit_test(dies_with_its_guard),
        cmocka_unit_test(dies_with_its_owner),
        cmocka_unit_test(cuts_output_into_lines),
        cmocka_unit_test(cuts_long_lines),
        cmocka_unit_test(flushes_a_long_line_without_newline),
        cmocka_unit_test(survives_a_flood),
        cmocka_unit_test(reports_the_end_when_all_room_is_taken),
        cmocka_unit_test(loses_nothing_when_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
