#include "control.h"
#include <errno.h>

struct call {
    void (*run)(void *argument);
    void *argument;
    sem_t ran;
};

void control_wait(sem_t *semaphore) {
    while (sem_wait(semaphore) != 0) {
        assert_int_equal(errno, EINTR);
    }
}

static void run_call(void *argument) {
    struct call *call = argument;
    call->run(call->argument);
    sem_post(&call->ran);
}

void control_run(struct meshx_loop *loop, void (*run)(void *argument), void *argument) {
    struct call call = {.run = run, .argument = argument};
    sem_init(&call.ran, 0, 0);
    assert_int_equal(loop_post(loop, run_call, &call), MESHX_OK);
    control_wait(&call.ran);
    sem_destroy(&call.ran);
}
