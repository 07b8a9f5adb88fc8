/*
 * meshx_guard: parent of one sidecar, on behalf of a process that must not fork or wait
 * itself (an Erlang VM ignores SIGCHLD). Single-threaded, libc only; guard_record.h has
 * the protocol on descriptor 3.
 *
 * Invariants:
 * - The sidecar never outlives its owner: EOF on descriptor 3 (however the owner went)
 *   stops it, PR_SET_PDEATHSIG kills it when the guard itself is killed.
 * - The guard exits only when no process of the sidecar is left, also none that left its
 *   process group: as a subreaper it inherits them. A wrapper should exec the sidecar:
 *   what it leaves behind when it ends gets no grace.
 * - The sidecar's output is always drained, because an unread pipe stalls its data path.
 *   When the owner does not read, lines are dropped and counted; STARTED and EXITED are
 *   not. Memory is fixed.
 */
#include "guard_record.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXIT_USAGE 2
#define EXIT_NO_EXEC 127
/* The records of one read always fit into an empty |pending|. */
#define READ_SIZE 4096
/* Takes a burst that outruns an owner who does read. */
#define PENDING_SIZE ((size_t)1024 * 1024)
/* As many as the largest pipe holds, 1 MiB. */
#define FINAL_READS 256

struct stream {
    enum guard_record type;
    int fd;   /* -1 after its end */
    bool cut; /* |line| goes on after a piece that was sent */
    size_t size;
    char line[GUARD_LINE_MAX];
};

/*
 * RUNNING     -> TERMINATING  stop(): the owner's end closed, or a signal to the guard
 * RUNNING     -> KILLING      reap(): the sidecar ended
 * TERMINATING -> KILLING      reap(), or the stop timeout is over
 * KILLING ends when there is no child left.
 */
enum phase { RUNNING, TERMINATING, KILLING };

struct guard {
    enum phase phase;
    uint32_t stop_timeout;
    int64_t deadline; /* of TERMINATING */
    pid_t sidecar;    /* also its process group; 0 once it is reaped */
    int status;       /* as of waitpid() */
    int exec_pipe;    /* end of file: exec succeeded, else errno; -1 once known */
    int exec_error;   /* 0: none */
    int signals;
    bool owner_reads; /* false: its socket is gone, nothing can be told any more */
    bool owner_open;  /* false: it has closed its sending side, which means "stop" */
    struct stream streams[2];
    uint64_t dropped;
    size_t pending_start;
    size_t pending_end;
    uint8_t pending[PENDING_SIZE];
};

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Records to the owner */

static size_t pending_size(const struct guard *guard) {
    return guard->pending_end - guard->pending_start;
}

static void put_number(uint8_t *to, uint32_t number) {
    to[0] = (uint8_t)(number >> 24);
    to[1] = (uint8_t)(number >> 16);
    to[2] = (uint8_t)(number >> 8);
    to[3] = (uint8_t)number;
}

/* The caller made sure that there is room. */
static void put_record(struct guard *guard, enum guard_record type, const void *payload,
                       size_t size) {
    if (guard->pending_end + GUARD_RECORD_HEADER + size > PENDING_SIZE) {
        memmove(guard->pending, guard->pending + guard->pending_start,
                pending_size(guard));
        guard->pending_end = pending_size(guard);
        guard->pending_start = 0;
    }
    uint8_t *to = guard->pending + guard->pending_end;
    to[0] = (uint8_t)type;
    put_number(to + 1, (uint32_t)size);
    memcpy(to + GUARD_RECORD_HEADER, payload, size);
    guard->pending_end += GUARD_RECORD_HEADER + size;
}

static void put_numbers(struct guard *guard, enum guard_record type, size_t count,
                        uint32_t first, uint32_t second) {
    uint8_t payload[8];
    put_number(payload, first);
    put_number(payload + 4, second);
    put_record(guard, type, payload, 4 * count);
}

/* Sends what the socket takes at once. */
static void send_pending(struct guard *guard) {
    while (guard->owner_reads && pending_size(guard) > 0) {
        ssize_t sent = send(GUARD_SOCKET_FD, guard->pending + guard->pending_start,
                            pending_size(guard), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            guard->pending_start += (size_t)sent;
        } else if (errno == EAGAIN) {
            break;
        } else if (errno != EINTR) {
            guard->owner_reads = false;
            guard->owner_open = false;
        }
    }
    if (!guard->owner_reads || pending_size(guard) == 0) {
        guard->pending_start = guard->pending_end = 0;
    }
    /* Waiting for half the room keeps a slow owner from seeing every other line. */
    if (guard->dropped > 0 && pending_size(guard) <= PENDING_SIZE / 2) {
        char line[64];
        int size = snprintf(line, sizeof line, "meshx_guard: %llu lines dropped",
                            (unsigned long long)guard->dropped);
        put_record(guard, GUARD_STDERR, line, (size_t)size);
        guard->dropped = 0;
    }
}

/* Waits until the owner has taken everything or is gone. */
static void send_all(struct guard *guard) {
    for (;;) {
        send_pending(guard);
        if (!guard->owner_reads || pending_size(guard) == 0) {
            return;
        }
        struct pollfd writable = {.fd = GUARD_SOCKET_FD, .events = POLLOUT};
        (void)poll(&writable, 1, -1);
    }
}

static void put_line(struct guard *guard, enum guard_record type, const char *line,
                     size_t size) {
    if (!guard->owner_reads) {
        return;
    }
    if (guard->dropped > 0 ||
        pending_size(guard) + GUARD_RECORD_HEADER + size > PENDING_SIZE) {
        guard->dropped++;
    } else {
        put_record(guard, type, line, size);
    }
}

/* Output of the sidecar */

static void end_line(struct guard *guard, struct stream *stream) {
    size_t size = stream->size;
    if (size > 0 && stream->line[size - 1] == '\r') {
        size--;
    }
    if (size > 0 || !stream->cut) {
        put_line(guard, stream->type, stream->line, size);
    }
    stream->size = 0;
    stream->cut = false;
}

static void split_lines(struct guard *guard, struct stream *stream, const char *bytes,
                        size_t size) {
    while (size > 0) {
        if (*bytes == '\n') {
            end_line(guard, stream);
            bytes++;
            size--;
            continue;
        }
        if (stream->size == GUARD_LINE_MAX) {
            put_line(guard, stream->type, stream->line, stream->size);
            stream->size = 0;
            stream->cut = true;
        }
        size_t take = GUARD_LINE_MAX - stream->size;
        if (take > size) {
            take = size;
        }
        const char *newline = memchr(bytes, '\n', take);
        if (newline != NULL) {
            take = (size_t)(newline - bytes);
        }
        memcpy(stream->line + stream->size, bytes, take);
        stream->size += take;
        bytes += take;
        size -= take;
    }
}

/* One read. False: nothing more at present. */
static bool read_stream(struct guard *guard, struct stream *stream) {
    char bytes[READ_SIZE];
    ssize_t size = read(stream->fd, bytes, sizeof bytes);
    if (size > 0) {
        split_lines(guard, stream, bytes, (size_t)size);
        return true;
    }
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
        return errno == EINTR;
    }
    close(stream->fd);
    stream->fd = -1;
    return false;
}

/* Processes */

/* KILL to every child. A grandchild becomes a child when its parent dies, which is also
 * when SIGCHLD makes us look again. */
static void kill_children(void) {
    DIR *processes = opendir("/proc");
    if (processes == NULL) {
        return;
    }
    const struct dirent *entry;
    while ((entry = readdir(processes)) != NULL) {
        if (!isdigit((unsigned char)entry->d_name[0])) {
            continue;
        }
        char path[sizeof "/proc//stat" + sizeof entry->d_name];
        snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) {
            continue;
        }
        char stat[512];
        ssize_t size = read(file, stat, sizeof stat - 1);
        close(file);
        stat[size > 0 ? size : 0] = '\0';
        /* "PID (NAME) S PPID ...": NAME may contain anything, S is one character. */
        const char *after_name = strrchr(stat, ')');
        if (after_name != NULL && strlen(after_name) > 4 &&
            strtol(after_name + 4, NULL, 10) == (long)getpid()) {
            /* Not yet reaped by us, so the number can't belong to anyone else. */
            kill((pid_t)strtol(entry->d_name, NULL, 10), SIGKILL);
        }
    }
    closedir(processes);
}

static void kill_all(struct guard *guard) {
    guard->phase = KILLING;
    if (guard->sidecar > 0) {
        kill(-guard->sidecar, SIGKILL);
    }
    kill_children();
}

static void stop(struct guard *guard) {
    if (guard->phase == RUNNING) {
        guard->phase = TERMINATING;
        guard->deadline = now_ms() + guard->stop_timeout;
        kill(-guard->sidecar, SIGTERM);
        kill(-guard->sidecar, SIGCONT); /* a stopped process would not see TERM */
    }
}

/* Reaps all that ended. False: no child is left. */
static bool reap(struct guard *guard) {
    bool reaped = false;
    for (;;) {
        siginfo_t ended = {0};
        if (waitid(P_ALL, 0, &ended, WEXITED | WNOHANG | WNOWAIT) != 0) {
            if (errno == EINTR) {
                continue;
            }
            return false;
        }
        if (ended.si_pid == 0) {
            break;
        }
        reaped = true;
        if (ended.si_pid == guard->sidecar) {
            /* Before it is reaped: until then nobody else can have its group's number.
             * kill_children() would do it step by step, but needs /proc. */
            kill(-guard->sidecar, SIGKILL);
            waitpid(guard->sidecar, &guard->status, 0);
            guard->sidecar = 0;
            guard->phase = KILLING;
        } else {
            waitpid(ended.si_pid, NULL, 0);
        }
    }
    if (reaped && guard->phase == KILLING) {
        kill_children();
    }
    return true;
}

static int pipe_from_child(int *ends) {
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return -1;
    }
    return fcntl(ends[0], F_SETFL, O_NONBLOCK);
}

static _Noreturn void become_sidecar(char **command, pid_t guard_pid, int output,
                                     int errors, int exec_pipe) {
    sigset_t none;
    sigemptyset(&none);
    if (setpgid(0, 0) == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0) {
        if (getppid() != guard_pid) {
            _exit(EXIT_NO_EXEC); /* the guard died before PDEATHSIG was set */
        }
        if (dup2(output, STDOUT_FILENO) >= 0 && dup2(errors, STDERR_FILENO) >= 0 &&
            sigprocmask(SIG_SETMASK, &none, NULL) == 0) {
            execvp(command[0], command);
        }
    }
    int error = errno;
    (void)!write(exec_pipe, &error, sizeof error);
    _exit(EXIT_NO_EXEC);
}

/* The sidecar has its copy. In ours nobody shall find the tokens, neither by
 * /proc/PID/environ nor in a core. */
static void forget_environment(void) {
    for (char **variable = environ; *variable != NULL; variable++) {
        explicit_bzero(*variable, strlen(*variable));
    }
}

/* Leaves an errno in |exec_error| when there is no child. */
static void start_sidecar(struct guard *guard, char **command) {
    int output[2] = {-1, -1};
    int errors[2] = {-1, -1};
    int exec_pipe[2] = {-1, -1};
    pid_t guard_pid = getpid();
    pid_t pid = -1;
    if (pipe_from_child(output) == 0 && pipe_from_child(errors) == 0 &&
        pipe_from_child(exec_pipe) == 0) {
        pid = fork();
    }
    if (pid == 0) {
        become_sidecar(command, guard_pid, output[1], errors[1], exec_pipe[1]);
    }
    if (pid < 0) {
        guard->exec_error = errno;
        return; /* main() ends, and with it the descriptors */
    }
    forget_environment();
    /* Also here, so that the group exists before the first stop(); fails when the child
     * was faster. */
    (void)setpgid(pid, pid);
    close(output[1]);
    close(errors[1]);
    close(exec_pipe[1]);
    guard->sidecar = pid;
    guard->exec_pipe = exec_pipe[0];
    guard->streams[0].fd = output[0];
    guard->streams[1].fd = errors[0];
}

/* Learns from the pipe whether exec succeeded. */
static void learn_exec(struct guard *guard, pid_t pid) {
    int error = 0;
    ssize_t size = read(guard->exec_pipe, &error, sizeof error);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    close(guard->exec_pipe);
    guard->exec_pipe = -1;
    if (size == (ssize_t)sizeof error) {
        guard->exec_error = error;
    } else {
        put_numbers(guard, GUARD_STARTED, 1, (uint32_t)pid, 0);
    }
}

/* Events */

/* False: no child is left. */
static bool on_signals(struct guard *guard) {
    struct signalfd_siginfo info;
    while (read(guard->signals, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo != SIGCHLD) {
            stop(guard);
        }
    }
    return reap(guard);
}

static void on_owner(struct guard *guard, short events) {
    char ignored[256];
    if (events & (POLLHUP | POLLERR)) {
        guard->owner_reads = false;
        guard->owner_open = false;
    } else if (events & POLLIN) {
        ssize_t size = recv(GUARD_SOCKET_FD, ignored, sizeof ignored, MSG_DONTWAIT);
        if (size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR)) {
            guard->owner_open = false;
        }
    }
    if (!guard->owner_open) {
        stop(guard);
    }
    send_pending(guard);
}

static void run(struct guard *guard) {
    const pid_t pid = guard->sidecar;
    bool children = true;
    while (children) {
        bool learning = guard->exec_pipe >= 0; /* STARTED comes before any output */
        struct pollfd polled[5] = {
            {.fd = guard->owner_reads ? GUARD_SOCKET_FD : -1,
             .events = (short)((guard->owner_open ? POLLIN : 0) |
                               (pending_size(guard) > 0 ? POLLOUT : 0))},
            {.fd = guard->signals, .events = POLLIN},
            {.fd = guard->exec_pipe, .events = POLLIN},
            {.fd = learning ? -1 : guard->streams[0].fd, .events = POLLIN},
            {.fd = learning ? -1 : guard->streams[1].fd, .events = POLLIN},
        };
        int timeout = -1;
        if (guard->phase == TERMINATING) {
            int64_t left = guard->deadline - now_ms();
            timeout = left <= 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left;
        }
        if (poll(polled, 5, timeout) < 0) {
            continue; /* EINTR; |polled| is rubbish */
        }
        if (polled[2].revents != 0) {
            learn_exec(guard, pid);
        }
        for (size_t i = 0; i < 2; i++) {
            if (polled[3 + i].revents != 0) {
                (void)read_stream(guard, &guard->streams[i]);
            }
        }
        if (polled[0].revents != 0) {
            on_owner(guard, polled[0].revents);
        }
        if (polled[1].revents != 0) {
            children = on_signals(guard);
        }
        if (guard->phase == TERMINATING && now_ms() >= guard->deadline) {
            kill_all(guard);
        }
    }
    if (guard->exec_pipe >= 0) {
        learn_exec(guard, pid);
    }
}

/* Nobody is left who could be held up, so from here on it waits for the owner. */
static void report_end(struct guard *guard) {
    for (size_t i = 0; i < 2; i++) {
        struct stream *stream = &guard->streams[i];
        for (int reads = 0; stream->fd >= 0 && reads < FINAL_READS; reads++) {
            send_all(guard);
            if (!read_stream(guard, stream)) {
                break;
            }
        }
        if (stream->size > 0) {
            end_line(guard, stream);
        }
    }
    send_all(guard); /* room for what must not be dropped */
    if (guard->exec_error != 0) {
        put_numbers(guard, GUARD_EXEC_FAILED, 1, (uint32_t)guard->exec_error, 0);
    } else if (WIFSIGNALED(guard->status)) {
        put_numbers(guard, GUARD_EXITED, 2, UINT32_MAX,
                    (uint32_t)WTERMSIG(guard->status));
    } else {
        put_numbers(guard, GUARD_EXITED, 2, (uint32_t)WEXITSTATUS(guard->status), 0);
    }
    send_all(guard);
}

/* Preparations */

static void close_above(int last_kept) {
#ifdef SYS_close_range
    if (syscall(SYS_close_range, (unsigned)last_kept + 1, ~0U, 0) == 0) {
        return;
    }
#endif
    DIR *open_files = opendir("/proc/self/fd"); /* a kernel before 5.9 */
    if (open_files == NULL) {
        return;
    }
    const struct dirent *entry;
    while ((entry = readdir(open_files)) != NULL) {
        long fd = strtol(entry->d_name, NULL, 10);
        if (fd > last_kept && fd != dirfd(open_files)) {
            close((int)fd);
        }
    }
    closedir(open_files);
}

/* Standard input and output are /dev/null, standard error is the owner's if it has one.
 */
static bool settle_descriptors(void) {
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0 ||
        (fcntl(STDERR_FILENO, F_GETFD) < 0 && dup2(null, STDERR_FILENO) < 0)) {
        return false;
    }
    close_above(GUARD_SOCKET_FD);
    return fcntl(GUARD_SOCKET_FD, F_SETFD, FD_CLOEXEC) == 0;
}

/* Default dispositions, for the sidecar inherits them; what concerns us comes by
 * signalfd. Returns that, or -1. */
static int settle_signals(void) {
    for (int number = 1; number < NSIG; number++) {
        (void)signal(number, SIG_DFL); /* fails for KILL, STOP and libc's own */
    }
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGCHLD);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGHUP);
    if (sigprocmask(SIG_SETMASK, &ours, NULL) != 0) {
        return -1;
    }
    return signalfd(-1, &ours, SFD_NONBLOCK | SFD_CLOEXEC);
}

/* The arguments and descriptor 3. */
static bool usable(int argc, char **argv, uint32_t *stop_timeout) {
    struct stat socket_status;
    if (argc < 3 || !isdigit((unsigned char)argv[1][0]) ||
        fstat(GUARD_SOCKET_FD, &socket_status) != 0 || !S_ISSOCK(socket_status.st_mode)) {
        return false;
    }
    char *end;
    errno = 0;
    unsigned long number = strtoul(argv[1], &end, 10);
    *stop_timeout = (uint32_t)number;
    return errno == 0 && *end == '\0' && number <= UINT32_MAX;
}

int main(int argc, char **argv) {
    static struct guard guard; /* its megabyte of buffer must not stand in the file */
    guard.exec_pipe = -1;
    guard.owner_reads = true;
    guard.owner_open = true;
    guard.streams[0].type = GUARD_STDOUT;
    guard.streams[0].fd = -1;
    guard.streams[1].type = GUARD_STDERR;
    guard.streams[1].fd = -1;
    if (!usable(argc, argv, &guard.stop_timeout)) {
        fputs("usage: meshx_guard STOP_TIMEOUT_MS PROGRAM [ARGUMENT ...]\n"
              "Runs PROGRAM until descriptor 3, a stream socket, reaches its end.\n"
              "meshx_node starts it; it is not meant to be started by hand.\n",
              stderr);
        return EXIT_USAGE;
    }
    /* A session of its own, so that ^C in the owner's terminal does not reach us. Fails
     * when the owner has seen to it. */
    (void)setsid();
    /* No core file of ours, which may be readable by others (the sidecar's own exec sets
     * the flag anew), and no privilege but those we have: not by set-user-ID programs or
     * file capabilities, for which the kernel would drop PDEATHSIG, too. */
    if (!settle_descriptors() || (guard.signals = settle_signals()) < 0 ||
        prctl(PR_SET_CHILD_SUBREAPER, 1) != 0 || prctl(PR_SET_DUMPABLE, 0) != 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
        perror("meshx_guard");
        return EXIT_FAILURE;
    }
    start_sidecar(&guard, argv + 2);
    if (guard.sidecar > 0) {
        run(&guard);
    }
    report_end(&guard);
    return EXIT_SUCCESS;
}
