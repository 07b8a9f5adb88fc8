/*
 * How tests get onto the control thread: run something there and wait until it has run.
 */
#ifndef MESHX_TEST_CONTROL_H
#define MESHX_TEST_CONTROL_H

#include "support.h"
#include "loop.h"
#include <semaphore.h>

/* Runs |run(argument)| on the control thread and returns when it has returned. Must not
 * be called from the control thread. */
void control_run(struct meshx_loop *loop, void (*run)(void *argument), void *argument);

/* sem_wait() that signals do not interrupt. */
void control_wait(sem_t *semaphore);

#endif
