/*
 * The sidecar module on the real loop with the real guard (MESHX_GUARD) and small real
 * commands. All tests run twice: with SIGCHLD ignored, as in an Erlang VM, and default.
 *
 * Callbacks put events into a queue; the test's thread takes them out, each with a
 * deadline.
 */
#include "support.h"

#include "agent.h"
#include "control.h"
#include "process.h"
#include "sidecar.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define QUEUE_SIZE 1024

enum event_type { STARTED, ENDED, OUTPUT, STOPPED };

struct event {
    enum event_type type;
    int64_t pid;
    struct meshx_failure failure;
    uint32_t restart_ms;
    enum meshx_stream stream;
    char line[5000];
};

struct fixture {
    struct meshx_loop *loop;
    struct sidecar *sidecar; /* control thread only */
    struct sidecar_config config;
    int result;
    bool frees; /* in the callback of an event of type |frees_at| */
    enum event_type frees_at;
    unsigned long
        numbers; /* != 0: lines are this and the following numbers, not queued */
    unsigned long misses;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    size_t first; /* guarded by lock, as the next two */
    size_t count;
    struct event queue[QUEUE_SIZE];
};

static const char *const plain_environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                                                NULL};

/* Callbacks, control thread */

static void add(struct fixture *fixture, const struct event *event) {
    pthread_mutex_lock(&fixture->lock);
    if (fixture->count == QUEUE_SIZE) {
        abort(); /* a test that makes more events than it takes */
    }
    fixture->queue[(fixture->first + fixture->count++) % QUEUE_SIZE] = *event;
    pthread_cond_signal(&fixture->changed);
    pthread_mutex_unlock(&fixture->lock);
    if (fixture->frees && fixture->frees_at == event->type) {
        sidecar_free(fixture->sidecar);
        fixture->sidecar = NULL;
    }
}

static void on_started(int64_t pid, void *context) {
    add(context, &(struct event){.type = STARTED, .pid = pid});
}

static void on_ended(const struct meshx_failure *failure, uint32_t restart_ms,
                     void *context) {
    add(context,
        &(struct event){.type = ENDED, .failure = *failure, .restart_ms = restart_ms});
}

static void on_output(enum meshx_stream stream, const char *line, void *context) {
    struct fixture *fixture = context;
    if (fixture->numbers != 0) {
        fixture->misses += strtoul(line, NULL, 10) != fixture->numbers;
        fixture->numbers++;
        return;
    }
    struct event event = {.type = OUTPUT, .stream = stream};
    snprintf(event.line, sizeof event.line, "%s", line);
    add(fixture, &event);
}

static void on_stopped(void *context) {
    add(context, &(struct event){.type = STOPPED});
}

/* Calls into the module; each runs on the control thread */

static void do_new(void *argument) {
    struct fixture *fixture = argument;
    struct sidecar_callbacks callbacks = {on_started, on_ended, on_output, on_stopped,
                                          fixture};
    fixture->result =
        sidecar_new(fixture->loop, &fixture->config, &callbacks, &fixture->sidecar);
}

/* Nothing may be called back from within a call. */
static void do_quietly(struct fixture *fixture, void (*call)(struct sidecar *)) {
    pthread_mutex_lock(&fixture->lock);
    size_t before = fixture->count;
    pthread_mutex_unlock(&fixture->lock);
    call(fixture->sidecar);
    pthread_mutex_lock(&fixture->lock);
    if (fixture->count > before) {
        abort();
    }
    pthread_mutex_unlock(&fixture->lock);
}

static void do_start(void *argument) {
    do_quietly(argument, sidecar_start);
}

static void do_stop(void *argument) {
    do_quietly(argument, sidecar_stop);
}

static void do_restart(void *argument) {
    do_quietly(argument, sidecar_restart);
}

static void do_free(void *argument) {
    struct fixture *fixture = argument;
    do_quietly(fixture, sidecar_free);
    fixture->sidecar = NULL;
}

static void do_nothing(void *argument) {
    (void)argument;
}

static void call(struct fixture *fixture, void (*run)(void *)) {
    control_run(fixture->loop, run, fixture);
}

/* The test's side */

static struct event next(struct fixture *fixture) {
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += PROCESS_DEADLINE_MS / 1000;
    pthread_mutex_lock(&fixture->lock);
    int error = 0;
    while (fixture->count == 0 && error == 0) {
        error = pthread_cond_timedwait(&fixture->changed, &fixture->lock, &deadline);
    }
    struct event event = fixture->queue[fixture->first];
    if (error == 0) {
        fixture->first = (fixture->first + 1) % QUEUE_SIZE;
        fixture->count--;
    }
    pthread_mutex_unlock(&fixture->lock);
    assert_int_equal(error, 0);
    return event;
}

static struct event expect(struct fixture *fixture, enum event_type type) {
    struct event event = next(fixture);
    if (event.type != type) {
        print_error("event %d, not %d: %s%s\n", (int)event.type, (int)type, event.line,
                    event.failure.text);
    }
    assert_int_equal(event.type, type);
    return event;
}

static pid_t expect_started(struct fixture *fixture) {
    struct event event = expect(fixture, STARTED);
    assert_true(event.pid > 1);
    return (pid_t)event.pid;
}

static void expect_line(struct fixture *fixture, const char *line) {
    assert_string_equal(expect(fixture, OUTPUT).line, line);
}

static pid_t expect_pid_line(struct fixture *fixture) {
    pid_t pid = (pid_t)strtol(expect(fixture, OUTPUT).line, NULL, 10);
    assert_true(pid > 1);
    return pid;
}

static struct event expect_ended(struct fixture *fixture, int code, const char *text) {
    struct event event = expect(fixture, ENDED);
    assert_int_equal(event.failure.code, code);
    if (strstr(event.failure.text, text) == NULL) {
        assert_string_equal(event.failure.text, text);
    }
    return event;
}

/* Nothing is queued, also not after what the control thread was about to do. */
static void expect_silence(struct fixture *fixture) {
    call(fixture, do_nothing);
    pthread_mutex_lock(&fixture->lock);
    size_t count = fixture->count;
    pthread_mutex_unlock(&fixture->lock);
    assert_int_equal(count, 0);
}

static void make(struct fixture *fixture, const char *const *command) {
    fixture->config.command = command;
    call(fixture, do_new);
    assert_int_equal(fixture->result, MESHX_OK);
}

static void start(struct fixture *fixture, const char *const *command) {
    make(fixture, command);
    call(fixture, do_start);
}

static void start_shell(struct fixture *fixture, const char *script) {
    const char *command[] = {"/bin/sh", "-c", script, NULL};
    start(fixture, command); /* all of the configuration is copied */
}

static void stop(struct fixture *fixture) {
    call(fixture, do_stop);
    expect(fixture, STOPPED);
}

static int set_up(void **state) {
    struct fixture *fixture = calloc(1, sizeof *fixture);
    assert_non_null(fixture);
    pthread_mutex_init(&fixture->lock, NULL);
    pthread_cond_init(&fixture->changed, NULL);
    fixture->config = (struct sidecar_config){.guard_path = getenv("MESHX_GUARD"),
                                              .environment = plain_environment,
                                              .restart_min = 60000,
                                              .restart_max = 60000,
                                              .stop_timeout = 60000};
    *state = fixture;
    return meshx_loop_start(&fixture->loop);
}

static int tear_down(void **state) {
    struct fixture *fixture = *state;
    allocation_fail(0);
    call(fixture, do_free);
    meshx_loop_stop(fixture->loop, 0);
    size_t left = fixture->count;
    pthread_cond_destroy(&fixture->changed);
    pthread_mutex_destroy(&fixture->lock);
    free(fixture);
    return left == 0 ? 0 : -1; /* an event nobody expected */
}

/* Start and end */

static void reports_start_output_and_end(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "echo out; echo err >&2; exit 3");
    expect_started(fixture);
    struct event event = expect(fixture, OUTPUT);
    struct event other = expect(fixture, OUTPUT);
    if (event.stream == MESHX_STDERR) { /* the order of two pipes is not defined */
        struct event swap = event;
        event = other;
        other = swap;
    }
    assert_int_equal(event.stream, MESHX_STDOUT);
    assert_string_equal(event.line, "out");
    assert_int_equal(other.stream, MESHX_STDERR);
    assert_string_equal(other.line, "err");
    event = expect_ended(fixture, MESHX_ESIDECAR_EXITED, "");
    assert_string_equal(event.failure.text, "sidecar /bin/sh exited with status 3: err");
    assert_int_equal(event.restart_ms, 60000);
}

static void names_the_last_error_line(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "echo first >&2; echo '==> Error preparing configuration' >&2;"
                         "echo >&2; echo ' ' >&2; exit 1");
    expect_started(fixture);
    for (int i = 0; i < 4; i++) {
        expect(fixture, OUTPUT);
    }
    expect_ended(fixture, MESHX_ESIDECAR_EXITED,
                 "exited with status 1: ==> Error preparing configuration");
}

static void forgets_the_error_line_of_the_run_before(void **state) {
    struct fixture *fixture = *state;
    char *directory = agent_make_directory();
    char script[512];
    snprintf(script, sizeof script,
             "mkdir %s/second 2> /dev/null && echo oops >&2; exit 1", directory);
    start_shell(fixture, script);
    expect_started(fixture);
    expect_line(fixture, "oops");
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "oops");
    call(fixture, do_restart); /* this time there is nothing to say */
    expect_started(fixture);
    struct event event = expect_ended(fixture, MESHX_ESIDECAR_EXITED, "");
    assert_string_equal(event.failure.text, "sidecar /bin/sh exited with status 1");
    agent_remove_directory(directory);
}

static void reports_death_by_signal(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "kill -9 $$");
    expect_started(fixture);
    struct event event = expect_ended(fixture, MESHX_ESIDECAR_EXITED, "");
    assert_string_equal(event.failure.text, "sidecar /bin/sh was killed by signal 9");
}

static void reports_a_command_that_cannot_be_executed(void **state) {
    struct fixture *fixture = *state;
    const char *missing[] = {"no-such-sidecar", NULL};
    const char *forbidden[] = {"/etc/passwd", NULL};
    start(fixture, missing);
    struct event event = expect_ended(fixture, MESHX_ESIDECAR_COMMAND, "no-such-sidecar");
    assert_non_null(strstr(event.failure.text, strerror(ENOENT)));
    call(fixture, do_free);
    start(fixture, forbidden);
    event = expect_ended(fixture, MESHX_ESIDECAR_COMMAND, "/etc/passwd");
    assert_non_null(strstr(event.failure.text, strerror(EACCES)));
}

static void reports_a_missing_guard(void **state) {
    struct fixture *fixture = *state;
    fixture->config.guard_path = "/nonexistent/meshx_guard";
    start_shell(fixture, "true");
    struct event event = expect_ended(fixture, MESHX_ESYSTEM, "/nonexistent/meshx_guard");
    assert_non_null(strstr(event.failure.text, strerror(ENOENT)));
    assert_int_equal(event.restart_ms, 60000);
    stop(fixture);
}

static void reports_a_guard_that_died(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "echo $PPID; exec sleep 1000");
    pid_t sidecar = expect_started(fixture);
    pid_t guard = expect_pid_line(fixture);
    assert_int_equal(kill(guard, SIGKILL), 0);
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "guard died");
    assert_true(process_wait_gone(sidecar));
}

/* A program in the guard's place. */
static char *make_script(const char *directory, const char *text) {
    char *path = NULL;
    assert_true(asprintf(&path, "%s/script", directory) > 0);
    char new_path[256];
    snprintf(new_path, sizeof new_path, "%s.new", path);
    FILE *file = fopen(new_path, "we");
    assert_non_null(file);
    assert_true(fprintf(file, "#!/bin/sh\n%s\n", text) > 0);
    assert_int_equal(fchmod(fileno(file), 0755), 0);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(rename(new_path, path), 0); /* all of it appears at once */
    return path;
}

static void gives_up_a_guard_that_talks_nonsense(void **state) {
    struct fixture *fixture = *state;
    char *directory = agent_make_directory();
    char *path = make_script(directory, "printf 'nonsense' >&3; read end <&3");
    fixture->config.guard_path = path;
    start_shell(fixture, "true");
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "guard died");
    stop(fixture);
    free(path);
    agent_remove_directory(directory);
}

/* What it inherits */

static void passes_environment_signals_and_descriptors(void **state) {
    struct fixture *fixture = *state;
    const char *environment[] = {"A=1 2", "PATH=/usr/bin:/bin", "B=", NULL};
    const char *command[] = {"env", NULL};
    fixture->config.environment = environment;
    start(fixture, command);
    expect_started(fixture);
    for (size_t i = 0; environment[i] != NULL; i++) {
        expect_line(fixture, environment[i]);
    }
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "status 0");
    call(fixture, do_free);

    int stray = open("/dev/zero", O_RDONLY); /* not CLOEXEC */
    start_shell(fixture, "ls /proc/$$/fd; echo $PPID; "
                         "exec grep -E '^Sig(Blk|Ign)' /proc/self/status");
    expect_started(fixture);
    expect_line(fixture, "0");
    expect_line(fixture, "1");
    expect_line(fixture, "2");
    expect_pid_line(fixture);
    expect_line(fixture, "SigBlk:\t0000000000000000");
    /* glibc's posix_spawn leaves its own two, 32 and 33, ignored in every child. */
    struct event event = expect(fixture, OUTPUT);
    assert_memory_equal(event.line, "SigIgn:\t", 8);
    assert_true((strtoull(event.line + 8, NULL, 16) & ~(3ULL << 31)) == 0);
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "status 0");
    close(stray);
}

static void guard_is_in_a_session_of_its_own(void **state) {
    struct fixture *fixture = *state;
    int stray = open("/dev/zero", O_RDONLY);
    start_shell(fixture, "echo $PPID; exec sleep 1000");
    pid_t sidecar = expect_started(fixture);
    pid_t guard = expect_pid_line(fixture);
    assert_int_equal(getsid(guard), guard);
    assert_int_equal(getpgid(sidecar), sidecar);
    /* 0-3, signalfd, two pipes. Only root may look: it is not dumpable. */
    assert_int_equal(process_descriptors(guard), geteuid() == 0 ? 7 : -1);
    close(stray);
    stop(fixture);
}

/* Output */

static void delivers_all_of_a_burst_in_order(void **state) {
    struct fixture *fixture = *state;
    fixture->numbers = 1;
    start_shell(fixture, "seq 1 20000");
    expect_started(fixture);
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "status 0");
    assert_int_equal(fixture->misses, 0);
    assert_int_equal(fixture->numbers, 20001);
}

static void delivers_the_longest_line(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "head -c 4100 /dev/zero | tr '\\0' x; printf 'a\\0b\\n'");
    expect_started(fixture);
    assert_int_equal(strlen(expect(fixture, OUTPUT).line), 4096);
    expect_line(fixture, "xxxxa b");
    expect_ended(fixture, MESHX_ESIDECAR_EXITED, "status 0");
}

/* Restarts */

/* There may be some more of them before it stops. */
static void stop_between_restarts(struct fixture *fixture) {
    call(fixture, do_stop);
    while (next(fixture).type != STOPPED) {
    }
}

static void back_off_doubles_up_to_the_maximum(void **state) {
    struct fixture *fixture = *state;
    const char *missing[] = {"no-such-sidecar", NULL};
    static const uint32_t expected[] = {1, 2, 4, 8, 9, 9};
    fixture->config.restart_min = 1;
    fixture->config.restart_max = 9;
    start(fixture, missing);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct event event = expect_ended(fixture, MESHX_ESIDECAR_COMMAND, "no-such");
        assert_int_equal(event.restart_ms, expected[i]);
    }
    stop_between_restarts(fixture);
    call(fixture, do_start); /* begins anew */
    assert_int_equal(expect(fixture, ENDED).restart_ms, 1);
    assert_int_equal(expect(fixture, ENDED).restart_ms, 2);
    stop_between_restarts(fixture);
}

static void back_off_is_reset_by_a_long_run(void **state) {
    struct fixture *fixture = *state;
    char *directory = agent_make_directory();
    char *path = NULL;
    assert_true(asprintf(&path, "%s/script", directory) > 0);
    const char *command[] = {path, NULL};
    fixture->config.restart_min = 3;
    fixture->config.restart_max = 12;
    start(fixture, command);
    assert_int_equal(expect(fixture, ENDED).restart_ms, 3);
    assert_int_equal(expect(fixture, ENDED).restart_ms, 6);
    free(make_script(directory, "sleep 0.1"));
    while (next(fixture).type != STARTED) { /* perhaps some more in vain */
    }
    for (int i = 0; i < 2; i++) {
        struct event event = expect_ended(fixture, MESHX_ESIDECAR_EXITED, "status 0");
        assert_int_equal(event.restart_ms, 3);
        expect_started(fixture);
    }
    stop_between_restarts(fixture);
    free(path);
    agent_remove_directory(directory);
}

static void restarts_on_request(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait");
    pid_t before = expect_started(fixture);
    expect_line(fixture, "ready");
    call(fixture, do_restart);
    expect_line(fixture, "bye");
    pid_t after = expect_started(fixture); /* ENDED is for what nobody asked for */
    assert_false(process_runs(before));
    assert_int_not_equal(before, after);
    expect_line(fixture, "ready");
    call(fixture, do_restart);
    call(fixture, do_restart); /* once more changes nothing */
    expect_line(fixture, "bye");
    expect_started(fixture);
    expect_line(fixture, "ready");
    call(fixture, do_stop);
    expect_line(fixture, "bye");
    expect(fixture, STOPPED);
}

static void restarts_at_once_while_it_waits(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "exit 1");
    expect_started(fixture);
    assert_int_equal(expect(fixture, ENDED).restart_ms, 60000);
    call(fixture, do_restart);
    expect_started(fixture);
    expect(fixture, ENDED);
}

static void restarts_nothing_that_is_not_started(void **state) {
    struct fixture *fixture = *state;
    const char *command[] = {"true", NULL};
    make(fixture, command);
    call(fixture, do_restart);
    stop(fixture);
    call(fixture, do_restart);
    expect_silence(fixture);
}

/* Stopping */

static void stops_a_running_one(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "exec sleep 1000");
    pid_t sidecar = expect_started(fixture);
    call(fixture, do_start); /* it is: changes nothing */
    stop(fixture);
    assert_false(process_runs(sidecar));
    expect_silence(fixture);
}

static void stops_while_it_waits_for_a_restart(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "exit 1");
    expect_started(fixture);
    expect(fixture, ENDED);
    stop(fixture);
    expect_silence(fixture);
}

static void stops_while_it_restarts(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait");
    expect_started(fixture);
    expect_line(fixture, "ready");
    call(fixture, do_restart);
    call(fixture, do_stop);
    call(fixture, do_restart); /* too late */
    expect_line(fixture, "bye");
    expect(fixture, STOPPED);
    expect_silence(fixture);
}

static void do_start_and_stop(void *argument) {
    do_start(argument);
    do_stop(argument);
    do_stop(argument);
}

static void stops_once_and_starts_again(void **state) {
    struct fixture *fixture = *state;
    const char *command[] = {"sleep", "1000", NULL};
    make(fixture, command);
    stop(fixture); /* never started */
    call(fixture, do_start_and_stop);
    expect(fixture, STOPPED);
    call(fixture, do_start);
    expect_started(fixture);
    call(fixture, do_stop);
    call(fixture, do_stop);
    expect(fixture, STOPPED);
    call(fixture, do_start);
    expect_started(fixture);
    stop(fixture);
}

static void stops_what_ignores_term(void **state) {
    struct fixture *fixture = *state;
    fixture->config.stop_timeout = 50;
    start_shell(fixture, "trap '' TERM; echo ready; sleep 1000; sleep 1000");
    pid_t sidecar = expect_started(fixture);
    expect_line(fixture, "ready");
    stop(fixture);
    assert_false(process_runs(sidecar));
}

/* The last resort: a guard that neither ends nor closes its socket. */
static void gives_up_a_guard_that_does_not_end(void **state) {
    struct fixture *fixture = *state;
    char *directory = agent_make_directory();
    char *path = make_script(
        directory, "printf '\\004\\000\\000\\000\\006%06d' $$ >&3; exec sleep 1000");
    fixture->config.guard_path = path;
    fixture->config.stop_timeout = 1;
    start_shell(fixture, "true");
    pid_t guard = expect_pid_line(fixture);
    call(fixture, do_restart);
    pid_t second_guard = expect_pid_line(fixture);
    stop(fixture);
    assert_true(process_runs(guard));
    assert_int_equal(kill(guard, SIGKILL), 0);
    assert_int_equal(kill(second_guard, SIGKILL), 0);
    free(path);
    agent_remove_directory(directory);
}

/* Freeing */

static void frees_while_it_runs(void **state) {
    struct fixture *fixture = *state;
    start_shell(fixture, "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 & wait");
    pid_t sidecar = expect_started(fixture);
    expect_line(fixture, "ready");
    call(fixture, do_free);
    assert_true(process_wait_gone(sidecar));
    expect_silence(fixture);
}

static void frees_at_any_state(void **state) {
    struct fixture *fixture = *state;
    const char *command[] = {"sleep", "1000", NULL};
    make(fixture, command);
    call(fixture, do_free); /* idle */
    start(fixture, command);
    call(fixture, do_free); /* at some moment of the start */
    start(fixture, command);
    pid_t sidecar = expect_started(fixture);
    call(fixture, do_stop);
    call(fixture, do_free); /* stopping */
    assert_true(process_wait_gone(sidecar));
    start(fixture, command);
    sidecar = expect_started(fixture);
    call(fixture, do_restart);
    call(fixture, do_free); /* restarting */
    assert_true(process_wait_gone(sidecar));
    start_shell(fixture, "exit 1");
    expect_started(fixture);
    expect(fixture, ENDED);
    call(fixture, do_free); /* waiting */
    call(fixture, do_free); /* NULL */
    pthread_mutex_lock(&fixture->lock);
    fixture->count = 0; /* the second may have got as far as STARTED */
    pthread_mutex_unlock(&fixture->lock);
}

static void frees_in_every_callback(void **state) {
    struct fixture *fixture = *state;
    fixture->frees = true;
    for (int type = STARTED; type <= STOPPED; type++) {
        fixture->frees_at = (enum event_type)type;
        start_shell(fixture, "echo one; echo two; exit 1");
        struct event event;
        while ((event = next(fixture)).type != fixture->frees_at) {
            if (event.type == ENDED) {
                call(fixture, do_stop);
            }
        }
        expect_silence(fixture);
    }
    const char *missing[] = {"no-such-sidecar", NULL};
    fixture->frees_at = ENDED;
    start(fixture, missing);
    expect_ended(fixture, MESHX_ESIDECAR_COMMAND, "no-such-sidecar");
    fixture->config.guard_path = "/nonexistent";
    start(fixture, missing);
    expect_ended(fixture, MESHX_ESYSTEM, "/nonexistent");
    expect_silence(fixture);
}

/* Failures of our own */

static unsigned failing;

static void do_new_and_start_failing(void *argument) {
    struct fixture *fixture = argument;
    allocation_fail(failing);
    do_new(fixture);
    if (fixture->result == MESHX_OK) {
        sidecar_start(fixture->sidecar);
    }
}

static void survives_every_failed_allocation(void **state) {
    struct fixture *fixture = *state;
    const char *command[] = {"sleep", "1000", NULL};
    fixture->config.command = command;
    fixture->config.restart_min = 1;
    unsigned refused = 0;
    unsigned late = 0;
    bool done = false;
    for (failing = 1; !done; failing++) {
        fixture->sidecar = NULL;
        call(fixture, do_new_and_start_failing);
        if (fixture->result != MESHX_OK) {
            assert_int_equal(fixture->result, MESHX_ENOMEM);
            assert_null(fixture->sidecar);
            refused++;
            continue;
        }
        struct event event = next(fixture);
        if (event.type == ENDED) {
            assert_int_equal(event.failure.code, MESHX_ENOMEM);
            late++;
            event = next(fixture);
        }
        assert_int_equal(event.type, STARTED);
        done = !allocation_failed();
        allocation_fail(0);
        stop(fixture);
        call(fixture, do_free);
    }
    assert_int_equal(late, 1);
    assert_true(refused >= 8);
}

static void reports_a_lack_of_descriptors(void **state) {
    struct fixture *fixture = *state;
    const char *command[] = {"sleep", "1000", NULL};
    fixture->config.restart_min = 10;
    fixture->config.restart_max = 10;
    make(fixture, command);
    int taken[4096];
    size_t count = 0;
    while (count < 4096 && (taken[count] = dup(STDIN_FILENO)) >= 0) {
        count++;
    }
    assert_true(count > 2 && count < 4096); /* main() has set the limit */
    call(fixture, do_start);
    expect_ended(fixture, MESHX_ESYSTEM, strerror(EMFILE));
    close(taken[--count]); /* one is not enough for a pair */
    expect_ended(fixture, MESHX_ESYSTEM, strerror(EMFILE));
    while (count > 0) {
        close(taken[--count]);
    }
    struct event event;
    while ((event = next(fixture)).type == ENDED) { /* until it is tried again */
    }
    assert_int_equal(event.type, STARTED);
    stop(fixture);
}

/* The real thing */

static void names_what_consul_says(void **state) {
    struct fixture *fixture = *state;
    const char *consul = getenv("MESHX_CONSUL");
    if (consul == NULL) {
        consul = "_build/consul/usr/bin/consul";
    }
    if (access(consul, X_OK) != 0) {
        skip();
    }
    struct agent *agent;
    char address[128];
    agent_start(&agent);
    snprintf(address, sizeof address, "CONSUL_HTTP_ADDR=%s", agent_address(agent));
    const char *environment[] = {address, NULL};
    const char *command[] = {consul, "connect", "proxy", "-sidecar-for", "nobody", NULL};
    fixture->config.environment = environment;
    start(fixture, command);
    expect_started(fixture);
    struct event event;
    while ((event = next(fixture)).type == OUTPUT) {
    }
    assert_int_equal(event.type, ENDED);
    assert_int_equal(event.failure.code, MESHX_ESIDECAR_EXITED);
    assert_non_null(strstr(event.failure.text, "exited with status 1: "));
    assert_non_null(strstr(event.failure.text, "No sidecar proxy registered"));
    agent_stop(agent);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

static int run_all(const char *group) {
    const struct CMUnitTest tests[] = {
        TEST(reports_start_output_and_end),
        TEST(names_the_last_error_line),
        TEST(forgets_the_error_line_of_the_run_before),
        TEST(reports_death_by_signal),
        TEST(reports_a_command_that_cannot_be_executed),
        TEST(reports_a_missing_guard),
        TEST(reports_a_guard_that_died),
        TEST(gives_up_a_guard_that_talks_nonsense),
        TEST(passes_environment_signals_and_descriptors),
        TEST(guard_is_in_a_session_of_its_own),
        TEST(delivers_all_of_a_burst_in_order),
        TEST(delivers_the_longest_line),
        TEST(back_off_doubles_up_to_the_maximum),
        TEST(back_off_is_reset_by_a_long_run),
        TEST(restarts_on_request),
        TEST(restarts_at_once_while_it_waits),
        TEST(restarts_nothing_that_is_not_started),
        TEST(stops_a_running_one),
        TEST(stops_while_it_waits_for_a_restart),
        TEST(stops_while_it_restarts),
        TEST(stops_once_and_starts_again),
        TEST(stops_what_ignores_term),
        TEST(gives_up_a_guard_that_does_not_end),
        TEST(frees_while_it_runs),
        TEST(frees_at_any_state),
        TEST(frees_in_every_callback),
        TEST(survives_every_failed_allocation),
        TEST(reports_a_lack_of_descriptors),
        TEST(names_what_consul_says),
    };
    return cmocka_run_group_tests_name(group, tests, NULL, NULL);
}

int main(void) {
    if (getenv("MESHX_GUARD") == NULL) {
        fputs("MESHX_GUARD must name the guard program\n", stderr);
        return 1;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = 256;
    setrlimit(RLIMIT_NOFILE, &limit);
    (void)signal(SIGCHLD, SIG_IGN);
    int failures = run_all("SIGCHLD ignored, as in the VM");
    (void)signal(SIGCHLD, SIG_DFL);
    failures += run_all("SIGCHLD default");
    while (waitpid(-1, NULL, WNOHANG) > 0) { /* the guards of the second group */
    }
    return failures;
}
