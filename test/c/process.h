/*
 * Looks at other processes, for the tests of guard and sidecar.
 */
#ifndef MESHX_TEST_PROCESS_H
#define MESHX_TEST_PROCESS_H

#include <stdbool.h>
#include <sys/types.h>

#define PROCESS_DEADLINE_MS 60000 /* of everything that is waited for */

/* Whether the process exists and is not just a zombie. */
bool process_runs(pid_t pid);

/* Waits until it ended. False: it has not within the deadline. */
bool process_wait_gone(pid_t pid);

/* Its memory in KiB as /proc/PID/status has it under |field| ("VmRSS:"), or -1. */
long process_memory(pid_t pid, const char *field);

/* How many descriptors it has open, or -1. */
int process_descriptors(pid_t pid);

/* Waits until it has |count| open. False: it has not within the deadline. */
bool process_wait_descriptors(pid_t pid, int count);

#endif
