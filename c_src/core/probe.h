/*
 * Does something accept TCP connections at a local port? L3, control thread only.
 *
 * Connects and closes at once. Used for the sidecar's public listener, where "accepts" is
 * what readiness means, and for listeners of a former owner of our service ID.
 */
#ifndef MESHX_CORE_PROBE_H
#define MESHX_CORE_PROBE_H

#include "loop.h"

struct probe;

/* For people. */
#define PROBE_NOT_MADE_WHY "too many open files (ulimit -n), or no local port is left"

enum probe_answer {
    PROBE_ACCEPTS,
    PROBE_REFUSES, /* or is silent, or can't be reached */
    PROBE_NOT_MADE /* we have no descriptor or no port left: says nothing about it */
};

typedef void (*probe_done)(enum probe_answer answer, void *argument);

/*
 * Tries |address|:|port| every |interval| ms until it accepts or |timeout| ms are over
 * (|timeout| 0: one try, which itself may take up to 1 s). |done| is called exactly once
 * and never from within the call; the probe frees itself after that. |*out| (borrowed
 * until then) is for probe_cancel(). MESHX_OK, MESHX_ENOMEM or MESHX_ECONFIG (address is
 * not numeric).
 */
int probe_start(struct meshx_loop *loop, const char *address, uint16_t port,
                uint32_t interval, uint32_t timeout, probe_done done, void *argument,
                struct probe **out);

/* Ends it without the callback. NULL is allowed. */
void probe_cancel(struct probe *probe);

#endif
