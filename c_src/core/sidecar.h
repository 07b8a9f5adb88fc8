/*
 * The sidecar's process: started through meshx_guard, restarted with back-off. L3,
 * control thread only.
 *
 * States (what makes the step):
 *
 *   idle       -> waiting     sidecar_start(), without delay
 *   waiting    -> running     the restart timer; sidecar_restart() sets it to now
 *   running    -> waiting     the guard reports the end, or its socket closes
 *   running    -> restarting  sidecar_restart()
 *   restarting -> running     the guard's socket closed, that is: no process is left
 *   any        -> stopping    sidecar_stop()
 *   stopping   -> idle        the guard's socket closed, or there was no guard
 *
 * A guard that does not close its socket within the stop timeout and one second more is
 * killed, and given up if that does not help within another second. The back-off doubles
 * from restart_min to restart_max and is reset by sidecar_start() and after the sidecar
 * ran for longer than restart_max.
 */
#ifndef MESHX_CORE_SIDECAR_H
#define MESHX_CORE_SIDECAR_H

#include "loop.h"
#include <sys/types.h>

struct sidecar_config {
    const char *guard_path;
    const char *const *command;     /* argv, ended by NULL */
    const char *const *environment; /* envp, ended by NULL */
    uint32_t restart_min;           /* milliseconds */
    uint32_t restart_max;
    uint32_t stop_timeout;
};

struct sidecar_callbacks {
    /* The process runs (exec succeeded). */
    void (*started)(int64_t pid, void *context);
    /*
     * It ended or could not be started: |failure| is MESHX_ESIDECAR_COMMAND (names the
     * command and errno's words), MESHX_ESIDECAR_EXITED (exit status or signal, and the
     * last stderr line), MESHX_ESYSTEM (guard can't be started) or MESHX_ENOMEM.
     * |restart_ms|: when it is tried again.
     */
    void (*ended)(const struct meshx_failure *failure, uint32_t restart_ms,
                  void *context);
    void (*output)(enum meshx_stream stream, const char *line, void *context);
    /* Answer to sidecar_stop(): nothing of it runs any more. */
    void (*stopped)(void *context);
    void *context;
};

struct sidecar;

/* All of |config| is copied. MESHX_OK or MESHX_ENOMEM. Starts nothing yet. */
int sidecar_new(struct meshx_loop *loop, const struct sidecar_config *config,
                const struct sidecar_callbacks *callbacks, struct sidecar **out);

/* Starts the process; |started| or |ended| follows, never from within the call. */
void sidecar_start(struct sidecar *sidecar);

/* Stops it, also while it waits for a restart; |stopped| follows exactly once, never from
 * within the call. */
void sidecar_stop(struct sidecar *sidecar);

/* Restarts a running sidecar at once, without back-off (it hangs, or needs other ports),
 * or ends the wait for a restart; else does nothing. |started| follows, without |ended|
 * for the process that is replaced. */
void sidecar_restart(struct sidecar *sidecar);

/* The process of whose descendants the sidecar is one, whatever state that is in; 0:
 * there is none. */
pid_t sidecar_guard(const struct sidecar *sidecar);

/* Frees in the background, without callbacks; the guard ends what still runs. NULL
 * allowed. */
void sidecar_free(struct sidecar *sidecar);

#endif
