/*
 * The control thread: one libuv loop, a queue of commands, timers, an orderly end. L2.
 *
 * loop_post() is the only way in from other threads. Everything else here is for the
 * control thread alone. All signals are blocked in it, so that the VM's handlers never
 * run there.
 */
#ifndef MESHX_CORE_LOOP_H
#define MESHX_CORE_LOOP_H

#include "meshx_node.h"
#include <uv.h>

/*
 * Runs |run(argument)| on the control thread, in the order of posting. Any thread.
 * MESHX_OK, MESHX_ENOMEM, or MESHX_ESTOPPED once meshx_loop_stop() was called; then it
 * will not run. What was posted before the stop runs.
 */
int loop_post(struct meshx_loop *loop, void (*run)(void *argument), void *argument);

/* The libuv loop; control thread only. */
uv_loop_t *loop_uv(struct meshx_loop *loop);

/*
 * A member keeps the loop alive: meshx_loop_stop() calls |stop| of each at once (begin
 * your orderly end; idempotent) and |abandon| of those left after the grace time (end
 * without waiting for anything). A member leaves with loop_leave() when it is done.
 * Embedded in the member's struct, which sets the callbacks and |self|.
 */
struct loop_member {
    void (*stop)(void *self);
    void (*abandon)(void *self);
    void *self;
    struct loop_member *next;
    struct loop_member *previous;
};
void loop_join(struct meshx_loop *loop, struct loop_member *member);
void loop_leave(struct meshx_loop *loop, struct loop_member *member);

/* A timer that can be freed at any time, also in its own callback. */
struct loop_timer;
int loop_timer_new(struct meshx_loop *loop, void (*fire)(void *argument), void *argument,
                   struct loop_timer **out);
/* Fires once after |delay_ms|; a running one is set anew. */
void loop_timer_start(struct loop_timer *timer, uint64_t delay_ms);
void loop_timer_stop(struct loop_timer *timer);
/* Stops and frees; NULL is allowed. */
void loop_timer_free(struct loop_timer *timer);

/* Monotonic milliseconds, read fresh. Any thread. */
uint64_t loop_now(void);

#endif
