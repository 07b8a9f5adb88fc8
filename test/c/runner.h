/*
 * A sidecar under test: the module on the real loop, its callbacks as events in a queue
 * that the test's thread takes out, each with a deadline. Whatever does not work fails
 * the test.
 */
#ifndef MESHX_TEST_RUNNER_H
#define MESHX_TEST_RUNNER_H

#include "support.h"
#include "sidecar.h"
#include <pthread.h>
#include <sys/types.h>

#define RUNNER_QUEUE_SIZE 1024

enum event_type { STARTED, ENDED, OUTPUT, STOPPED };

struct event {
    enum event_type type;
    int64_t pid;
    struct meshx_failure failure;
    uint32_t restart_ms;
    enum meshx_stream stream;
    char line[5000];
};

struct runner {
    struct meshx_loop *loop;
    struct sidecar *sidecar;      /* control thread only */
    struct sidecar_config config; /* for the next runner_make() */
    int result;                   /* of sidecar_new() */
    bool frees;                   /* in the callback of an event of type |frees_at| */
    enum event_type frees_at;
    unsigned long numbers; /* not 0: output is not queued, but counted from here */
    unsigned long misses;  /* lines that were not the next number */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    size_t first; /* guarded by lock, as the next two */
    size_t count;
    struct event queue[RUNNER_QUEUE_SIZE];
};

/* For cmocka: |*state| is a struct runner with the guard of MESHX_GUARD, a PATH, and
 * times that no test reaches. The end fails when there are events nobody expected. */
int runner_set_up(void **state);
int runner_tear_down(void **state);

/* Runs |run(runner)| on the control thread, for which the next five are: they call
 * sidecar_new(), ..., and abort when that calls back at once. */
void runner_call(struct runner *runner, void (*run)(void *runner));
void runner_new_now(void *runner);
void runner_start_now(void *runner);
void runner_stop_now(void *runner);
void runner_restart_now(void *runner);
void runner_free_now(void *runner);

/* New; new and started; the same with a shell script; stopped, with its event. */
void runner_make(struct runner *runner, const char *const *command);
void runner_start(struct runner *runner, const char *const *command);
void runner_start_shell(struct runner *runner, const char *script);
void runner_stop(struct runner *runner);

/* The next event; it must be of this type, have this line, code, part of a text. */
struct event runner_next(struct runner *runner);
struct event runner_expect(struct runner *runner, enum event_type type);
pid_t runner_expect_started(struct runner *runner);
void runner_expect_line(struct runner *runner, const char *line);
pid_t runner_expect_pid_line(struct runner *runner);
struct event runner_expect_ended(struct runner *runner, int code, const char *text);
/* There is none, also not after what the control thread was about to do. */
void runner_expect_silence(struct runner *runner);

#endif
