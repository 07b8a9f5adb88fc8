/*
 * Does something serve TCP connections at a local port? L3, control thread only.
 *
 * PROBE_CONNECT connects and closes at once: for listeners that may be anybody's. It
 * proves little, since the kernel goes on accepting for a process that hangs. PROBE_HELLO
 * is for a sidecar's public listener: it also says the first words of a TLS handshake and
 * waits for a reaction, which only a process that runs can give, and leaves before the
 * handshake is done. Proxies log nothing about it.
 */
#ifndef MESHX_CORE_PROBE_H
#define MESHX_CORE_PROBE_H

#include "loop.h"

struct probe;

/* For people. */
#define PROBE_NOT_MADE_WHY "too many open files (ulimit -n), or no local port is left"

enum probe_kind { PROBE_CONNECT, PROBE_HELLO };

enum probe_answer {
    PROBE_ACCEPTS, /* HELLO: answers as TLS does, or closes */
    PROBE_REFUSES, /* or can't be reached; HELLO: answers otherwise */
    PROBE_SILENT,  /* neither, within the time for one try */
    PROBE_NOT_MADE /* we have no descriptor or no port left: says nothing about it */
};

typedef void (*probe_done)(enum probe_answer answer, void *argument);

/*
 * Tries |address|:|port| every |interval| ms while it refuses, until |timeout| ms are
 * over (0: once). Each try may take up to 2 s, the last one, too. |done| is called
 * exactly once and never from within the call; the probe frees itself after that. |*out|
 * (borrowed until then) is for probe_cancel(). MESHX_OK, MESHX_ENOMEM or MESHX_ECONFIG
 * (address is not numeric).
 */
int probe_start(struct meshx_loop *loop, enum probe_kind kind, const char *address,
                uint16_t port, uint32_t interval, uint32_t timeout, probe_done done,
                void *argument, struct probe **out);

/* Ends it without the callback. NULL is allowed. */
void probe_cancel(struct probe *probe);

#endif
