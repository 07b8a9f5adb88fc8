/*
 * The sidecar's process: started through meshx_guard, restarted with back-off. L3,
 * control thread only.
 *
 * States (function that makes the step):
 *   idle -> running     sidecar_start, restart timer
 *   running -> waiting  guard reports the end, or its socket closes      (on_record,
 * on_eof) waiting -> running  restart timer after the back-off any -> stopping
 * sidecar_stop stopping -> idle    guard's socket closed, that is: no process is left The
 * back-off doubles from restart_min to restart_max and is reset after the sidecar ran for
 * longer than restart_max.
 */
#ifndef MESHX_CORE_SIDECAR_H
#define MESHX_CORE_SIDECAR_H

#include "loop.h"

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
     * last stderr line) or MESHX_ESYSTEM (guard can't be started). |restart_ms|: when it
     * is tried again.
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

/* Restarts a running sidecar at once, without back-off (it hangs, or needs other ports).
 */
void sidecar_restart(struct sidecar *sidecar);

/* Frees in the background, without callbacks; the guard ends what still runs. NULL
 * allowed. */
void sidecar_free(struct sidecar *sidecar);

#endif
