#include "runner.h"

#include "control.h"
#include "process.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *const plain_environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                                                NULL};

/* Callbacks, control thread */

static void add(struct runner *runner, const struct event *event) {
    pthread_mutex_lock(&runner->lock);
    if (runner->count == RUNNER_QUEUE_SIZE) {
        abort(); /* a test that makes more events than it takes */
    }
    runner->queue[(runner->first + runner->count++) % RUNNER_QUEUE_SIZE] = *event;
    pthread_cond_signal(&runner->changed);
    pthread_mutex_unlock(&runner->lock);
    if (runner->frees && runner->frees_at == event->type) {
        sidecar_free(runner->sidecar);
        runner->sidecar = NULL;
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
    struct runner *runner = context;
    if (runner->numbers != 0) {
        runner->misses += strtoul(line, NULL, 10) != runner->numbers;
        runner->numbers++;
        return;
    }
    struct event event = {.type = OUTPUT, .stream = stream};
    snprintf(event.line, sizeof event.line, "%s", line);
    add(runner, &event);
}

static void on_stopped(void *context) {
    add(context, &(struct event){.type = STOPPED});
}

/* Calls into the module; each runs on the control thread */

void runner_new_now(void *argument) {
    struct runner *runner = argument;
    struct sidecar_callbacks callbacks = {on_started, on_ended, on_output, on_stopped,
                                          runner};
    runner->result =
        sidecar_new(runner->loop, &runner->config, &callbacks, &runner->sidecar);
}

/* Nothing may be called back from within a call. */
static void do_quietly(struct runner *runner, void (*call)(struct sidecar *)) {
    pthread_mutex_lock(&runner->lock);
    size_t before = runner->count;
    pthread_mutex_unlock(&runner->lock);
    call(runner->sidecar);
    pthread_mutex_lock(&runner->lock);
    if (runner->count > before) {
        abort();
    }
    pthread_mutex_unlock(&runner->lock);
}

void runner_start_now(void *argument) {
    do_quietly(argument, sidecar_start);
}

void runner_stop_now(void *argument) {
    do_quietly(argument, sidecar_stop);
}

void runner_restart_now(void *argument) {
    do_quietly(argument, sidecar_restart);
}

void runner_free_now(void *argument) {
    struct runner *runner = argument;
    do_quietly(runner, sidecar_free);
    runner->sidecar = NULL;
}

static void do_nothing(void *argument) {
    (void)argument;
}

void runner_call(struct runner *runner, void (*run)(void *)) {
    control_run(runner->loop, run, runner);
}

/* The test's side */

struct event runner_next(struct runner *runner) {
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += PROCESS_DEADLINE_MS / 1000;
    pthread_mutex_lock(&runner->lock);
    int error = 0;
    while (runner->count == 0 && error == 0) {
        error = pthread_cond_timedwait(&runner->changed, &runner->lock, &deadline);
    }
    struct event event = runner->queue[runner->first];
    if (error == 0) {
        runner->first = (runner->first + 1) % RUNNER_QUEUE_SIZE;
        runner->count--;
    }
    pthread_mutex_unlock(&runner->lock);
    assert_int_equal(error, 0);
    return event;
}

struct event runner_expect(struct runner *runner, enum event_type type) {
    struct event event = runner_next(runner);
    if (event.type != type) {
        print_error("event %d, not %d: %s%s\n", (int)event.type, (int)type, event.line,
                    event.failure.text);
    }
    assert_int_equal(event.type, type);
    return event;
}

pid_t runner_expect_started(struct runner *runner) {
    struct event event = runner_expect(runner, STARTED);
    assert_true(event.pid > 1);
    return (pid_t)event.pid;
}

void runner_expect_line(struct runner *runner, const char *line) {
    assert_string_equal(runner_expect(runner, OUTPUT).line, line);
}

pid_t runner_expect_pid_line(struct runner *runner) {
    pid_t pid = (pid_t)strtol(runner_expect(runner, OUTPUT).line, NULL, 10);
    assert_true(pid > 1);
    return pid;
}

struct event runner_expect_ended(struct runner *runner, int code, const char *text) {
    struct event event = runner_expect(runner, ENDED);
    assert_int_equal(event.failure.code, code);
    if (strstr(event.failure.text, text) == NULL) {
        assert_string_equal(event.failure.text, text);
    }
    return event;
}

void runner_expect_silence(struct runner *runner) {
    runner_call(runner, do_nothing);
    pthread_mutex_lock(&runner->lock);
    size_t count = runner->count;
    pthread_mutex_unlock(&runner->lock);
    assert_int_equal(count, 0);
}

void runner_make(struct runner *runner, const char *const *command) {
    runner->config.command = command;
    runner_call(runner, runner_new_now);
    assert_int_equal(runner->result, MESHX_OK);
}

void runner_start(struct runner *runner, const char *const *command) {
    runner_make(runner, command);
    runner_call(runner, runner_start_now);
}

void runner_start_shell(struct runner *runner, const char *script) {
    const char *command[] = {"/bin/sh", "-c", script, NULL};
    runner_start(runner, command); /* all of the configuration is copied */
}

void runner_stop(struct runner *runner) {
    runner_call(runner, runner_stop_now);
    runner_expect(runner, STOPPED);
}

int runner_set_up(void **state) {
    struct runner *runner = calloc(1, sizeof *runner);
    assert_non_null(runner);
    pthread_mutex_init(&runner->lock, NULL);
    pthread_cond_init(&runner->changed, NULL);
    runner->config = (struct sidecar_config){.guard_path = getenv("MESHX_GUARD"),
                                             .environment = plain_environment,
                                             .restart_min = 60000,
                                             .restart_max = 60000,
                                             .stop_timeout = 60000};
    *state = runner;
    return meshx_loop_start(&runner->loop);
}

int runner_tear_down(void **state) {
    struct runner *runner = *state;
    allocation_fail(0);
    runner_call(runner, runner_free_now);
    meshx_loop_stop(runner->loop, 0);
    size_t left = runner->count;
    pthread_cond_destroy(&runner->changed);
    pthread_mutex_destroy(&runner->lock);
    free(runner);
    return left == 0 ? 0 : -1; /* an event nobody expected */
}
