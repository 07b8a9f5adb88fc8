/*
 * A node service under test: its configuration, a listener that echoes, and a record of
 * its events that the test's thread waits on.
 *
 * The record allocates nothing, so that it may run while allocation_fail() counts. What
 * is waited for and does not come within a minute fails the test.
 */
#ifndef MESHX_TEST_NODE_H
#define MESHX_TEST_NODE_H

#include "agent.h"
#include "meshx_node.h"
#include <pthread.h>

enum { NODE_EVENTS = 1000, NODE_UPSTREAMS = 16 };

struct node_event {
    enum meshx_event_type type;
    uint64_t request;
    int code; /* of the failure, MESHX_OK without one */
    uint16_t port;
    bool direct;
    enum meshx_level level;
    char text[1024];        /* of the failure, the log or the output */
    struct meshx_info info; /* without its pointers */
    uint16_t upstream_ports[NODE_UPSTREAMS];
    bool waited_for;
};

struct node {
    char name[64];
    struct meshx_config config; /* to be changed before node_open() */
    struct meshx_setting settings[3];
    const char *command[7];
    const char *environment[3];
    char environment_text[128];
    int listener;
    int wake[2];    /* a pipe; closing it ends the echo thread */
    pthread_t echo; /* also renews the lease */
    struct meshx_mesh *mesh;
    uint64_t requests;
    bool stuck; /* does not renew its lease; to be set before node_open() */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct meshx_mesh *renewed; /* guarded by lock, as the rest */
    bool released;
    size_t count;
    struct node_event events[NODE_EVENTS];
    struct node_event info; /* of the last node_info() */
};

/* A node that can be opened as it is. Name, service ID and service Name are the same. */
struct node *node_new(const struct agent *agent, const char *name);
/* Opens it and waits for READY. */
struct node *node_start(struct meshx_loop *loop, const struct agent *agent,
                        const char *name);
void node_open(struct node *node, struct meshx_loop *loop);
/* Tries to, and returns what meshx_mesh_open() does. */
int node_try_open(struct node *node, struct meshx_loop *loop);
/* Closes the handle if it is open, waits for release(), frees. */
void node_free(struct node *node);

/* The first event of |type| (with |request|, unless it is 0; with |text| in it, unless it
 * is NULL) not yet waited for. */
const struct node_event *node_wait(struct node *node, enum meshx_event_type type,
                                   uint64_t request, const char *text);
/* READY or FAILED, whichever comes. */
const struct node_event *node_wait_started(struct node *node);
/* How many of them there are so far, waited for or not. */
size_t node_count(struct node *node, enum meshx_event_type type, const char *text);
/* Prints all of them so far, for whoever reads why a test failed. */
void node_show_events(const struct node *node);

/* Ask and wait for the answer; node_info() keeps only its last one. */
const struct node_event *node_info(struct node *node);
const struct node_event *node_upstream(struct node *node, const char *other,
                                       const char *service_name,
                                       enum meshx_upstream_mode mode);
const struct node_event *node_accept(struct node *node, const char *other,
                                     const char *service_name);
/* What meshx_mesh_info() returns; for a node that answers no more. */
int node_info_refused(struct node *node);
/* Stops it and waits for STOPPED. */
const struct node_event *node_stop(struct node *node);

/* Waits until the agent answers |path| with |status|, and with |text| in the body unless
 * it is NULL. */
void node_wait_agent(const struct agent *agent, const char *path, int status,
                     const char *text);

/* Between two looks at something that can't be waited for. Fails the test when there are
 * more of them than any test needs, some minutes; start_loop() begins to count anew. */
void node_pause(void);
void node_pauses_begin(void);

/* Sends some bytes to |port| and awaits their echo. Retries as long as nothing listens
 * there. False: the connection was cut. */
bool node_echo(uint16_t port);

#endif
