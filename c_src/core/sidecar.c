/*
 * The sidecar's process, by way of meshx_guard. L3, control thread only.
 *
 * The VM ignores SIGCHLD (and whoever else embeds us may have it otherwise), so nothing
 * here waits for a process: exit status and output are records on a socket, and its end
 * of file says that the guard, and with it every process of the sidecar, is gone.
 *
 * A struct run is one guard's socket. It is freed in its uv_close callback and may
 * outlive the sidecar; |run->sidecar| is NULL from the moment it is given up. Callbacks
 * come last in every function, because they may stop or free the sidecar.
 */
#include "sidecar.h"

#include "error.h"
#include "record.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Beyond the guard's own grace. A guard that needs longer is killed. */
#define STOP_MARGIN 1000

struct run {
    uv_poll_t poll;
    int socket;
    pid_t guard;
    bool killed;             /* the guard, since it did not end in time */
    struct sidecar *sidecar; /* NULL: given up */
    size_t size;
    uint8_t bytes[4 * RECORD_MAX_SIZE]; /* received, not yet a whole record */
};

/* sidecar.h has the arrows. What the timer is for follows from the state. */
enum state {
    IDLE,
    WAITING, /* timer: start it */
    RUNNING,
    RESTARTING, /* timer: the guard had time enough */
    STOPPING,   /* the same, or there was none */
};

struct sidecar {
    struct meshx_loop *loop;
    struct sidecar_callbacks callbacks;
    char **guard_command; /* guard, stop timeout, sidecar's command, NULL */
    char **environment;
    uint32_t restart_min;
    uint32_t restart_max;
    uint32_t stop_timeout;
    uint32_t back_off; /* before the next restart */
    enum state state;
    struct run *run;     /* RUNNING, RESTARTING; STOPPING unless there was none */
    uint64_t started_at; /* 0: exec has not succeeded yet */
    struct loop_timer *timer;
    char last_error[GUARD_LINE_MAX + 1]; /* last line on standard error of this run */
};

static const char *command_name(const struct sidecar *sidecar) {
    return sidecar->guard_command[2];
}

/* Runs */

static void on_run_closed(uv_handle_t *handle) {
    free(handle->data);
}

/* Closing the socket tells a guard that still runs to stop everything. */
static void give_up_run(struct sidecar *sidecar) {
    struct run *run = sidecar->run;
    if (run != NULL) {
        sidecar->run = NULL;
        run->sidecar = NULL;
        uv_close((uv_handle_t *)&run->poll, on_run_closed);
        close(run->socket);
    }
}

/* Returns errno's value. */
static int spawn_guard(const struct sidecar *sidecar, int guard_socket, pid_t *guard) {
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t all;
    sigset_t none;
    sigfillset(&all);
    sigemptyset(&none);
    int error = posix_spawn_file_actions_init(&actions);
    if (error != 0) {
        return error;
    }
    error = posix_spawnattr_init(&attributes);
    if (error != 0) {
        posix_spawn_file_actions_destroy(&actions);
        return error;
    }
    /* The socket first: |guard_socket| may be 0 or 1. Where closefrom is missing, the
     * guard closes what it inherits itself, a moment later. */
    if ((error = posix_spawn_file_actions_adddup2(&actions, guard_socket,
                                                  GUARD_SOCKET_FD)) == 0 &&
        (error = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null",
                                                  O_RDONLY, 0)) == 0 &&
        (error = posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null",
                                                  O_WRONLY, 0)) == 0 &&
#ifdef __GLIBC__
#if __GLIBC_PREREQ(2, 34)
        (error = posix_spawn_file_actions_addclosefrom_np(&actions,
                                                          GUARD_SOCKET_FD + 1)) == 0 &&
#endif
#endif
        (error = posix_spawnattr_setsigdefault(&attributes, &all)) == 0 &&
        (error = posix_spawnattr_setsigmask(&attributes, &none)) == 0 &&
        (error = posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF |
                                                           POSIX_SPAWN_SETSIGMASK |
                                                           POSIX_SPAWN_SETSID)) == 0) {
        error = posix_spawn(guard, sidecar->guard_command[0], &actions, &attributes,
                            sidecar->guard_command, sidecar->environment);
    }
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return error;
}

static void on_socket(uv_poll_t *poll, int status, int events);

static int start_run(struct sidecar *sidecar, struct meshx_failure *failure) {
    int sockets[2] = {-1, -1};
    struct run *run = calloc(1, sizeof *run);
    if (run == NULL) {
        return error_set(failure, MESHX_ENOMEM, "no memory to start sidecar %s",
                         command_name(sidecar));
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets) !=
        0) {
        error_set_errno(failure, errno, "can't make a socket for %s",
                        sidecar->guard_command[0]);
        goto fail;
    }
    int error = uv_poll_init(loop_uv(sidecar->loop), &run->poll, sockets[0]);
    if (error != 0) {
        error_set_errno(failure, -error, "can't watch the socket of %s",
                        sidecar->guard_command[0]);
        goto fail;
    }
    run->poll.data = run;
    run->socket = sockets[0];
    run->sidecar = sidecar;
    sidecar->run = run;
    error = spawn_guard(sidecar, sockets[1], &run->guard);
    close(sockets[1]);
    if (error == 0) {
        error = -uv_poll_start(&run->poll, UV_READABLE, on_socket);
    }
    if (error != 0) {
        give_up_run(sidecar);
        return error_set_errno(failure, error, "can't start %s",
                               sidecar->guard_command[0]);
    }
    return MESHX_OK;
fail:
    if (sockets[0] >= 0) {
        close(sockets[0]);
        close(sockets[1]);
    }
    free(run);
    return MESHX_ESYSTEM;
}

/* States */

/* The run is over, or there is none: tries again after the back-off. */
static void wait_for_restart(struct sidecar *sidecar,
                             const struct meshx_failure *failure) {
    uint32_t delay = sidecar->back_off;
    if (sidecar->started_at != 0 &&
        loop_now() - sidecar->started_at > sidecar->restart_max) {
        delay = sidecar->restart_min;
    }
    sidecar->back_off =
        delay > sidecar->restart_max / 2 ? sidecar->restart_max : delay * 2;
    give_up_run(sidecar);
    sidecar->state = WAITING;
    loop_timer_start(sidecar->timer, delay);
    sidecar->callbacks.ended(failure, delay, sidecar->callbacks.context);
}

static void run_sidecar(struct sidecar *sidecar) {
    struct meshx_failure failure;
    sidecar->state = RUNNING;
    sidecar->started_at = 0;
    sidecar->last_error[0] = '\0';
    if (start_run(sidecar, &failure) != MESHX_OK) {
        wait_for_restart(sidecar, &failure);
    }
}

/* No guard is left, or it has had its time. */
static void on_run_over(struct sidecar *sidecar) {
    loop_timer_stop(sidecar->timer);
    give_up_run(sidecar);
    if (sidecar->state == STOPPING) {
        sidecar->state = IDLE;
        sidecar->callbacks.stopped(sidecar->callbacks.context);
    } else {
        run_sidecar(sidecar);
    }
}

/* A guard that hangs is killed, and the sidecar goes with it (PR_SET_PDEATHSIG). The
 * number is still its own: it has not closed its socket yet. */
static void on_timer(void *argument) {
    struct sidecar *sidecar = argument;
    struct run *run = sidecar->run;
    if (run != NULL && !run->killed) {
        run->killed = true;
        (void)kill(run->guard, SIGKILL);
        loop_timer_start(sidecar->timer, STOP_MARGIN);
    } else {
        on_run_over(sidecar);
    }
}

static void on_ended(struct sidecar *sidecar, int code, const char *how) {
    struct meshx_failure failure;
    const char *last = sidecar->last_error;
    error_set(&failure, code, "sidecar %s (sidecar_command) %s%s%s",
              command_name(sidecar), how, *last == '\0' ? "" : ": ", last);
    wait_for_restart(sidecar, &failure);
}

static void on_exec_failed(struct sidecar *sidecar, int error_number) {
    struct meshx_failure failure;
    const char *command = command_name(sidecar);
    if (error_number == ENOENT) {
        error_set(&failure, MESHX_ESIDECAR_COMMAND,
                  "sidecar command %s is not found%s; install it, or set sidecar_command",
                  command, strchr(command, '/') == NULL ? " in PATH" : "");
    } else {
        error_set_errno(&failure, error_number, "can't execute sidecar command %s",
                        command);
    }
    failure.code = MESHX_ESIDECAR_COMMAND;
    wait_for_restart(sidecar, &failure);
}

static void on_exited(struct sidecar *sidecar, int exit_status, int signal_number) {
    char how[64];
    if (signal_number != 0) {
        snprintf(how, sizeof how, "was killed by signal %d", signal_number);
    } else {
        snprintf(how, sizeof how, "exited with status %d", exit_status);
    }
    on_ended(sidecar, MESHX_ESIDECAR_EXITED, how);
}

static void on_output(struct sidecar *sidecar, const struct record *record) {
    char line[GUARD_LINE_MAX + 1];
    record_line(record, line);
    if (record->type == GUARD_STDERR && line[strspn(line, " \t")] != '\0') {
        memcpy(sidecar->last_error, line, record->line_size + 1);
    }
    sidecar->callbacks.output(record->type == GUARD_STDERR ? MESHX_STDERR : MESHX_STDOUT,
                              line, sidecar->callbacks.context);
}

/* While it stops or restarts, only the end of file counts as the end. */
static void on_record(struct sidecar *sidecar, const struct record *record) {
    bool running = sidecar->state == RUNNING;
    switch (record->type) {
    case GUARD_STARTED:
        if (running) {
            sidecar->started_at = loop_now();
            sidecar->callbacks.started(record->pid, sidecar->callbacks.context);
        }
        break;
    case GUARD_EXEC_FAILED:
        if (running) {
            on_exec_failed(sidecar, record->error_number);
        }
        break;
    case GUARD_EXITED:
        if (running) {
            on_exited(sidecar, record->exit_status, record->signal_number);
        }
        break;
    case GUARD_STDOUT:
    case GUARD_STDERR:
        on_output(sidecar, record);
        break;
    }
}

static void on_eof(struct sidecar *sidecar) {
    if (sidecar->state == RUNNING) {
        on_ended(sidecar, MESHX_ESIDECAR_EXITED, "is gone, its guard died");
    } else {
        on_run_over(sidecar);
    }
}

/* One receive at a time, so that a flood of output leaves room for the loop's others. */
static void on_socket(uv_poll_t *poll, int status, int events) {
    struct run *run = poll->data;
    (void)events;
    ssize_t size = 0;
    if (status == 0) {
        size = recv(run->socket, run->bytes + run->size, sizeof run->bytes - run->size,
                    MSG_DONTWAIT);
        if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
            return;
        }
    }
    if (size <= 0) {
        on_eof(run->sidecar);
        return;
    }
    run->size += (size_t)size;
    size_t used = 0;
    while (run->sidecar != NULL) { /* a record's callback may have given it up */
        struct record record;
        enum record_status next =
            record_next(run->bytes + used, run->size - used, &record);
        if (next == RECORD_INVALID) {
            on_eof(run->sidecar); /* as good as dead */
            return;
        }
        if (next == RECORD_PARTIAL) {
            run->size -= used;
            memmove(run->bytes, run->bytes + used, run->size);
            return;
        }
        used += record.size;
        on_record(run->sidecar, &record);
    }
}

/* Asks the guard to stop everything, but still listens to it. */
static void end_run(struct sidecar *sidecar, enum state next) {
    sidecar->state = next;
    (void)shutdown(sidecar->run->socket, SHUT_WR); /* fails when the guard is gone */
    loop_timer_start(sidecar->timer, (uint64_t)sidecar->stop_timeout + STOP_MARGIN);
}

/* Interface */

static void free_list(char **list) {
    for (char **item = list; list != NULL && *item != NULL; item++) {
        free(*item);
    }
    free(list);
}

/* New list of |first| (ended by NULL) and then |second|, or NULL. */
static char **join_lists(const char *const *first, const char *const *second) {
    size_t first_count = 0;
    size_t count = 0;
    while (first[first_count] != NULL) {
        first_count++;
    }
    while (second[count] != NULL) {
        count++;
    }
    count += first_count;
    char **list = calloc(count + 1, sizeof *list);
    if (list == NULL) {
        return NULL;
    }
    for (size_t i = 0; i < count; i++) {
        list[i] = strdup(i < first_count ? first[i] : second[i - first_count]);
        if (list[i] == NULL) {
            free_list(list);
            return NULL;
        }
    }
    return list;
}

int sidecar_new(struct meshx_loop *loop, const struct sidecar_config *config,
                const struct sidecar_callbacks *callbacks, struct sidecar **out) {
    char stop_timeout[16];
    snprintf(stop_timeout, sizeof stop_timeout, "%lu",
             (unsigned long)config->stop_timeout);
    const char *guard[] = {config->guard_path, stop_timeout, NULL};
    const char *nothing[] = {NULL};
    struct sidecar *sidecar = calloc(1, sizeof *sidecar);
    if (sidecar == NULL) {
        return MESHX_ENOMEM;
    }
    sidecar->loop = loop;
    sidecar->callbacks = *callbacks;
    /* Never 0: that would not double, but spin. */
    sidecar->restart_min = config->restart_min > 0 ? config->restart_min : 1;
    sidecar->restart_max = config->restart_max > sidecar->restart_min
                               ? config->restart_max
                               : sidecar->restart_min;
    sidecar->stop_timeout = config->stop_timeout;
    sidecar->guard_command = join_lists(guard, config->command);
    sidecar->environment = join_lists(config->environment, nothing);
    if (sidecar->guard_command == NULL || sidecar->environment == NULL ||
        loop_timer_new(loop, on_timer, sidecar, &sidecar->timer) != MESHX_OK) {
        sidecar_free(sidecar);
        return MESHX_ENOMEM;
    }
    *out = sidecar;
    return MESHX_OK;
}

void sidecar_start(struct sidecar *sidecar) {
    if (sidecar->state == IDLE) {
        sidecar->back_off = sidecar->restart_min;
        sidecar->state = WAITING;
        loop_timer_start(sidecar->timer, 0);
    }
}

void sidecar_stop(struct sidecar *sidecar) {
    if (sidecar->state == STOPPING) {
        return;
    }
    if (sidecar->run != NULL) {
        end_run(sidecar, STOPPING);
    } else {
        sidecar->state = STOPPING;
        loop_timer_start(sidecar->timer, 0);
    }
}

void sidecar_restart(struct sidecar *sidecar) {
    if (sidecar->state == RUNNING) {
        end_run(sidecar, RESTARTING);
    } else if (sidecar->state == WAITING) {
        loop_timer_start(sidecar->timer, 0);
    }
}

pid_t sidecar_guard(const struct sidecar *sidecar) {
    return sidecar->run != NULL ? sidecar->run->guard : 0;
}

void sidecar_free(struct sidecar *sidecar) {
    if (sidecar != NULL) {
        give_up_run(sidecar);
        loop_timer_free(sidecar->timer);
        free_list(sidecar->environment);
        free_list(sidecar->guard_command);
        free(sidecar);
    }
}
