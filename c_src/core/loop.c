/*
 * The control thread: owns one libuv loop, runs posted commands in order, ends in order.
 *
 * Threads: |lock| guards the command queue and |stopping|, which is all that other
 * threads touch; the rest belongs to the control thread. uv_async_send() is called only
 * under the lock and never once |stopping| is set, and |wake| is closed only after
 * |stopping| was seen under the lock: so nobody can wake a handle that is closed.
 *
 * States of the control thread (function that makes the step):
 *   running -> ending   begin_end: the stop was seen and all posted before it has run
 *   ending -> closing   close_own: the last member has left
 *   closing -> ended    uv_run() returns, because no handle is left
 */
#include "loop.h"
#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

struct command {
    void (*run)(void *argument);
    void *argument;
    struct command *next;
};

struct meshx_loop {
    pthread_t thread; /* immutable after the start */

    pthread_mutex_t lock;
    struct command *first; /* guarded by lock, as the next three */
    struct command **last;
    bool stopping;
    uint32_t grace_ms;

    uv_loop_t uv;
    uv_async_t wake;
    uv_timer_t grace;
    struct loop_member *members;
    struct loop_member *next_member; /* the one tell_members() comes to next */
    bool ending;
    bool closed; /* written by the thread as its last act, read after joining it */
};

struct loop_timer {
    uv_timer_t uv;
    void (*fire)(void *argument);
    void *argument;
};

static void close_own(struct meshx_loop *loop) {
    uv_close((uv_handle_t *)&loop->wake, NULL);
    uv_close((uv_handle_t *)&loop->grace, NULL);
}

/* Calls |stop| or |abandon| of every member. Any member may leave meanwhile, so the place
 * in the list is kept where loop_leave() can move it on. */
static void tell_members(struct meshx_loop *loop, bool abandon) {
    loop->next_member = loop->members;
    while (loop->next_member != NULL) {
        struct loop_member *member = loop->next_member;
        loop->next_member = member->next;
        if (abandon) {
            member->abandon(member->self);
        } else {
            member->stop(member->self);
        }
    }
}

static void on_grace_over(uv_timer_t *timer) {
    tell_members(timer->data, true);
}

static void begin_end(struct meshx_loop *loop) {
    loop->ending = true;
    if (loop->members == NULL) {
        close_own(loop);
        return;
    }
    uv_update_time(&loop->uv);
    uv_timer_start(&loop->grace, on_grace_over, loop->grace_ms, 0);
    tell_members(loop, false);
}

static void on_wake(uv_async_t *async) {
    struct meshx_loop *loop = async->data;
    pthread_mutex_lock(&loop->lock);
    struct command *command = loop->first;
    bool stopping = loop->stopping;
    loop->first = NULL;
    loop->last = &loop->first;
    pthread_mutex_unlock(&loop->lock);

    while (command != NULL) {
        struct command *next = command->next;
        command->run(command->argument);
        free(command);
        command = next;
    }
    if (stopping && !loop->ending) {
        begin_end(loop);
    }
}

static void *run_thread(void *argument) {
    struct meshx_loop *loop = argument;
    pthread_setname_np(pthread_self(), "meshx_loop");
    uv_run(&loop->uv, UV_RUN_DEFAULT);
    int error = uv_loop_close(&loop->uv);
    assert(error == 0); /* else someone left without closing its handles */
    loop->closed = error == 0;
    return NULL;
}

/* The new thread inherits the mask, and so do threads that curl makes from it. */
static int create_thread(struct meshx_loop *loop) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&loop->thread, NULL, run_thread, loop);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

int meshx_loop_start(struct meshx_loop **out) {
    int error;
    struct meshx_loop *loop = calloc(1, sizeof *loop);
    if (loop == NULL) {
        return MESHX_ENOMEM;
    }
    pthread_mutex_init(&loop->lock, NULL); /* a plain one can't fail on Linux */
    loop->last = &loop->first;
    error = uv_loop_init(&loop->uv);
    if (error != 0) {
        goto fail;
    }
    error = uv_async_init(&loop->uv, &loop->wake, on_wake);
    if (error != 0) {
        uv_loop_close(&loop->uv);
        goto fail;
    }
    uv_timer_init(&loop->uv, &loop->grace);
    loop->wake.data = loop;
    loop->grace.data = loop;
    error = -create_thread(loop);
    if (error != 0) {
        close_own(loop);
        uv_run(&loop->uv, UV_RUN_DEFAULT);
        uv_loop_close(&loop->uv);
        goto fail;
    }
    *out = loop;
    return MESHX_OK;

fail:
    pthread_mutex_destroy(&loop->lock);
    free(loop);
    return error == UV_ENOMEM ? MESHX_ENOMEM : MESHX_ESYSTEM;
}

void meshx_loop_stop(struct meshx_loop *loop, uint32_t grace_ms) {
    pthread_mutex_lock(&loop->lock);
    loop->stopping = true;
    loop->grace_ms = grace_ms;
    uv_async_send(&loop->wake);
    pthread_mutex_unlock(&loop->lock);
    pthread_join(loop->thread, NULL);
    pthread_mutex_destroy(&loop->lock);
    if (loop->closed) { /* else libuv still points into it: leaking is the lesser evil */
        free(loop);
    }
}

/* Steals the command, unless it is too late for that. */
static int enqueue(struct meshx_loop *loop, struct command *command) {
    int code = MESHX_ESTOPPED;
    pthread_mutex_lock(&loop->lock);
    if (!loop->stopping) {
        *loop->last = command;
        loop->last = &command->next;
        uv_async_send(&loop->wake);
        code = MESHX_OK;
    }
    pthread_mutex_unlock(&loop->lock);
    return code;
}

int loop_post(struct meshx_loop *loop, void (*run)(void *argument), void *argument) {
    struct command *command = malloc(sizeof *command);
    if (command == NULL) {
        return MESHX_ENOMEM;
    }
    *command = (struct command){.run = run, .argument = argument};
    int code = enqueue(loop, command);
    if (code != MESHX_OK) {
        free(command);
    }
    return code;
}

uv_loop_t *loop_uv(struct meshx_loop *loop) {
    return &loop->uv;
}

void loop_join(struct meshx_loop *loop, struct loop_member *member) {
    assert(!loop->ending); /* it would not be told to stop */
    member->previous = NULL;
    member->next = loop->members;
    if (member->next != NULL) {
        member->next->previous = member;
    }
    loop->members = member;
}

void loop_leave(struct meshx_loop *loop, struct loop_member *member) {
    if (loop->next_member == member) {
        loop->next_member = member->next;
    }
    if (member->next != NULL) {
        member->next->previous = member->previous;
    }
    if (member->previous != NULL) {
        member->previous->next = member->next;
    } else {
        loop->members = member->next;
    }
    if (loop->ending && loop->members == NULL) {
        close_own(loop);
    }
}

static void on_timer(uv_timer_t *uv) {
    struct loop_timer *timer = uv->data;
    timer->fire(timer->argument);
}

static void on_timer_closed(uv_handle_t *handle) {
    free(handle->data);
}

int loop_timer_new(struct meshx_loop *loop, void (*fire)(void *argument), void *argument,
                   struct loop_timer **out) {
    struct loop_timer *timer = malloc(sizeof *timer);
    if (timer == NULL) {
        return MESHX_ENOMEM;
    }
    uv_timer_init(&loop->uv, &timer->uv);
    timer->uv.data = timer;
    timer->fire = fire;
    timer->argument = argument;
    *out = timer;
    return MESHX_OK;
}

void loop_timer_start(struct loop_timer *timer, uint64_t delay_ms) {
    /* libuv counts from the beginning of the loop's turn, which may be long ago. */
    uv_update_time(timer->uv.loop);
    uv_timer_start(&timer->uv, on_timer, delay_ms, 0);
}

void loop_timer_stop(struct loop_timer *timer) {
    uv_timer_stop(&timer->uv);
}

void loop_timer_free(struct loop_timer *timer) {
    if (timer != NULL) {
        uv_close((uv_handle_t *)&timer->uv, on_timer_closed);
    }
}

uint64_t loop_now(void) {
    return uv_hrtime() / 1000000;
}
