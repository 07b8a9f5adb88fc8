/*
 * A real Consul agent for tests: its own process, free ports from the kernel, data in a
 * temporary directory.
 *
 * The binary is $MESHX_CONSUL, else _build/consul/usr/bin/consul. The process dies with
 * the thread that started it, so start it from the test's main thread. Whatever does not
 * work fails the test. Nothing here may run while allocation_fail() counts.
 */
#ifndef MESHX_TEST_AGENT_H
#define MESHX_TEST_AGENT_H

#include "support.h"

struct agent;

struct agent_options {
    const char *config; /* HCL added to the agent's configuration, or NULL */
    const char *token;  /* sent by agent_request(), or NULL */
    bool keeps_state;   /* registrations survive agent_restart(); slower to start */
};

/* Starts an agent like `consul agent -dev` and waits until it has a leader and Connect
 * works. |options| may be NULL. The caller ends it with agent_stop(). */
void agent_start(struct agent **out);
void agent_start_with(const struct agent_options *options, struct agent **out);

/* "http://127.0.0.1:8500", "127.0.0.1:8500" and its parts. Borrowed. */
const char *agent_url(const struct agent *agent);
const char *agent_address(const struct agent *agent);
uint16_t agent_port(const struct agent *agent);
uint16_t agent_grpc_port(const struct agent *agent);
/* The agent's own directory, gone after agent_stop(). Borrowed. */
const char *agent_directory(const struct agent *agent);

/* SIGKILL; the ports stay its own. Does nothing when it does not run. */
void agent_kill(struct agent *agent);
/* Starts it again at the same ports (kills it first if it runs) and waits as
 * agent_start(). Without |keeps_state| it has forgotten everything. */
void agent_restart(struct agent *agent);
/* SIGSTOP and SIGCONT: it accepts connections but never answers. */
void agent_freeze(struct agent *agent);
void agent_thaw(struct agent *agent);
/* Ends it, removes its directory, frees. NULL is allowed. */
void agent_stop(struct agent *agent);

/*
 * One blocking request of the test's own, independent of the code under test. Returns the
 * HTTP status, or -1 when nothing answers. |body| and |answer| may be NULL; |*answer| is
 * new: free().
 */
int agent_request(const struct agent *agent, const char *method, const char *path,
                  const char *body, char **answer);

/* The consul program as an absolute path. Borrowed. */
const char *agent_binary(void);

/* A TCP and UDP port that nothing uses just now at 127.0.0.1. */
uint16_t agent_free_port(void);

/* mkdtemp() below $TMPDIR or /tmp; new. And its end: removes everything in it, frees. */
char *agent_make_directory(void);
void agent_remove_directory(char *directory);

#endif
