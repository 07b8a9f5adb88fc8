/*
 * meshx_node: the core of an Erlang distribution carrier over Consul Connect.
 *
 * The core owns the life of one "node service": its registration with the local Consul
 * agent, its sidecar proxy, its health checks and its upstreams. It knows nothing of
 * Erlang; the NIF in c_src/nif turns terms into these calls and events into messages.
 *
 * Threads: meshx_loop_start() creates the one control thread. Every other function here
 * may be called from any thread; none of them blocks, except meshx_loop_stop(), which
 * joins. Events are delivered on the control thread; a callback must not block and must
 * not call meshx_loop_stop().
 *
 * Ownership: everything passed in is copied before the call returns (the caller keeps its
 * own). Everything in an event is borrowed for the duration of the callback.
 */
#ifndef MESHX_NODE_H
#define MESHX_NODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Every failure the core can report: X(CONSTANT, value, name). The name is what Erlang
 * sees as an atom; `meshx_error_name()` returns it.
 */
#define MESHX_ERRORS(X)                                                                  \
    X(MESHX_OK, 0, ok)                                                                   \
    X(MESHX_ENOMEM, -1, out_of_memory)                                                   \
    X(MESHX_ECONFIG, -2, bad_configuration)                                              \
    X(MESHX_ESYSTEM, -3,                                                                 \
      system_error) /* a system call failed; the text has errno's words */               \
    X(MESHX_EAGENT_UNREACHABLE, -10, agent_unreachable)                                  \
    X(MESHX_EAGENT_TIMEOUT, -11, agent_timeout)                                          \
    X(MESHX_EAGENT_TLS, -12, agent_tls)                                                  \
    X(MESHX_EAGENT_NO_LEADER, -13, agent_no_leader)                                      \
    X(MESHX_EAGENT_ACL, -14, agent_acl)         /* 403 */                                \
    X(MESHX_EAGENT_REFUSED, -15, agent_refused) /* any other 4xx or 5xx */               \
    X(MESHX_EAGENT_ANSWER, -16, agent_answer)   /* malformed, broken off, too large */   \
    X(MESHX_EAGENT_BUSY, -17, agent_busy)       /* 429 or 503: it may answer later */    \
    X(MESHX_ENAME_IN_USE, -20, name_in_use)                                              \
    X(MESHX_ENODE_UNKNOWN, -21, node_unknown)                                            \
    X(MESHX_ENODE_UNHEALTHY, -22, node_unhealthy)                                        \
    X(MESHX_EDENIED, -23, denied_by_intention)                                           \
    X(MESHX_ESIDECAR_COMMAND, -30, sidecar_command) /* can't be executed */              \
    X(MESHX_ESIDECAR_EXITED, -31, sidecar_exited)                                        \
    X(MESHX_ESIDECAR_TIMEOUT, -32,                                                       \
      sidecar_timeout) /* its public port does not accept */                             \
    X(MESHX_ESIDECAR_DOWN, -33, sidecar_down)                                            \
    X(MESHX_ENO_PORT, -34, no_free_port)                                                 \
    X(MESHX_ESTOPPED, -40, stopped)                                                      \
    X(MESHX_EFRAME, -50, bad_frame)

enum meshx_error {
#define MESHX_ERROR_CONSTANT(constant, value, name) constant = (value),
    MESHX_ERRORS(MESHX_ERROR_CONSTANT)
#undef MESHX_ERROR_CONSTANT
};

/* The name of |code| as in MESHX_ERRORS, "unknown" for anything else. Static storage. */
const char *meshx_error_name(int code);

/* A failure with one line of text for people: the culprit first, then the remedy. */
struct meshx_failure {
    int code;        /* enum meshx_error */
    char text[1024]; /* cut at its end if need be */
};

/* The control thread. */
struct meshx_loop;

/*
 * Starts the control thread. On success stores it in |*out| (new: end it with
 * meshx_loop_stop()) and returns MESHX_OK, else MESHX_ENOMEM or MESHX_ESYSTEM.
 */
int meshx_loop_start(struct meshx_loop **out);

/*
 * Ends the control thread and frees it. Node services that still live get up to
 * |grace_ms| milliseconds for their orderly stop, then are abandoned: their guard stops
 * the sidecar, the agent drops the registration when its checks stay critical. Blocks
 * until the thread ended.
 */
void meshx_loop_stop(struct meshx_loop *loop, uint32_t grace_ms);

struct meshx_port_range {
    uint16_t first;
    uint16_t last;
};

/* A "NAME", "value" pair list ended by a NULL name. */
struct meshx_setting {
    const char *name;
    const char *value;
};

/* All that describes a node service. Times are milliseconds. */
struct meshx_config {
    const char *node;           /* node name, "node1@myhost" */
    const char *service_id;     /* Consul service ID */
    const char *service_name;   /* Consul service Name */
    const char *listen_address; /* numeric address of the node's distribution listener */
    uint16_t listen_port;
    const char *service_template;  /* JSON object merged into the registration, or NULL */
    const char *upstream_template; /* JSON object merged into every upstream, or NULL */

    /* Consul's own environment variables (CONSUL_HTTP_ADDR ...), resolved by the caller.
     */
    const struct meshx_setting *consul;

    /* argv and envp of the sidecar, ended by NULL. sidecar_command == NULL: something
     * else runs the sidecar. guard_path is the meshx_guard program. */
    const char *const *sidecar_command;
    const char *const *sidecar_environment;
    const char *guard_path;
    const char
        *sidecar_address; /* address the sidecar binds and advertises, NULL: agent's */
    struct meshx_port_range sidecar_ports;
    struct meshx_port_range upstream_ports;
    uint32_t sidecar_restart_min; /* back-off between restarts */
    uint32_t sidecar_restart_max;

    uint32_t ttl; /* of both TTL checks; heartbeats go out every third of it */
    uint32_t deregister_after; /* DeregisterCriticalServiceAfter */
    uint32_t start_timeout;    /* from meshx_mesh_open() to READY or FAILED */
    uint32_t request_timeout;  /* of one request to the agent */
    uint32_t stop_timeout;     /* from TERM to KILL of the sidecar */
    uint32_t upstream_keep;    /* after its node was last seen in the catalog */
    bool force_registration;   /* register even if another live node holds the name */
    bool dial_direction_only;  /* intentions count in that of the dial, not in both */

    /*
     * A control node (remote shell, command of a release) has no listener that others
     * could look for: nothing is registered, listen_port is 0, and READY follows at once.
     * It only asks for the way to others. sidecar_command is then that of an unregistered
     * proxy without its last word, which is the upstream ("consul connect proxy -service
     * x -upstream"); NULL: there is none.
     */
    bool control_node;
};

enum meshx_event_type {
    MESHX_EVENT_READY,    /* registered, sidecar accepts, checks pass */
    MESHX_EVENT_FAILED,   /* the start failed: |failure|. It is undone, unless that takes
                             more than stop_timeout and a second. STOPPED follows. */
    MESHX_EVENT_UPSTREAM, /* answer to meshx_mesh_upstream(): |request|, |failure| or
                             |port| */
    MESHX_EVENT_LINK_DENIED, /* |request| is the link's, |failure| says why */
    MESHX_EVENT_LINK_HEALTH, /* |request| is the link's; |text|: what makes the other node
                                critical in Consul, NULL: nothing any more */
    MESHX_EVENT_INFO,    /* answer to meshx_mesh_info(): |request|, |failure| or |info| */
    MESHX_EVENT_OUTPUT,  /* a line the sidecar wrote: |stream|, |text| */
    MESHX_EVENT_LOG,     /* something a person should know: |level|, |text| */
    MESHX_EVENT_DRAINED, /* after meshx_mesh_drain(): the agent has answered for both
                            checks, or can't be reached. Not sent once a stop has begun */
    MESHX_EVENT_STOPPED, /* deregistered (or |failure| says why not), sidecar gone.
                            The last event of a node service. */
};

enum meshx_stream { MESHX_STDOUT = 1, MESHX_STDERR = 2 };
enum meshx_level {
    MESHX_LEVEL_INFO,
    MESHX_LEVEL_NOTICE,
    MESHX_LEVEL_WARNING,
    MESHX_LEVEL_ERROR
};

enum meshx_state {
    MESHX_STATE_STARTING,
    MESHX_STATE_READY,
    MESHX_STATE_STOPPING,
    MESHX_STATE_STOPPED,
};

struct meshx_upstream_info {
    const char *node;
    const char *service_name;
    uint16_t port;
    bool applied; /* the agent has acknowledged it */
};

/* What users may want to watch. Counts are since meshx_mesh_open(). */
struct meshx_info {
    enum meshx_state state;
    const char *service_id;
    const char *service_name;
    const char *agent; /* where the agent is, without credentials */
    uint16_t listen_port;
    uint16_t sidecar_port;
    int64_t sidecar_pid; /* 0: none */
    bool sidecar_accepts;
    bool registered;
    uint64_t sidecar_starts;
    uint64_t registrations; /* PUTs of the registration the agent acknowledged */
    uint64_t repairs;       /* registrations made because the agent had lost ours */
    uint64_t requests;      /* requests sent to the agent */
    uint64_t request_failures;
    const struct meshx_upstream_info *upstreams;
    size_t upstream_count;
    const struct meshx_failure *last_failure; /* NULL: none so far */
};

struct meshx_event {
    enum meshx_event_type type;
    uint64_t request;
    const struct meshx_failure *failure; /* NULL: success */
    const char *address;                 /* UPSTREAM: numeric, where to dial */
    uint16_t port;                       /* UPSTREAM: the same */
    bool direct; /* UPSTREAM: it is the node's own listener, there is no proxy */
    const struct meshx_info *info;
    enum meshx_stream stream;
    enum meshx_level level;
    const char *text; /* OUTPUT, LOG: NUL-terminated, without newline */
};

struct meshx_callbacks {
    /* Called on the control thread. */
    void (*event)(const struct meshx_event *event, void *context);
    /* Called once, on the control thread, after the last event: |context| may be freed.
     */
    void (*release)(void *context);
    void *context;
};

/* One node service. */
struct meshx_mesh;

/*
 * Begins to start a node service on |loop|; READY or FAILED follows. On success stores
 * the handle in |*out| (new: give it up with meshx_mesh_close()) and returns MESHX_OK;
 * the callbacks' context then belongs to the core until release(). Else returns
 * MESHX_ECONFIG
 * (|failure| names key and value), MESHX_ENOMEM or MESHX_ESTOPPED; no callback will be
 * made.
 */
int meshx_mesh_open(struct meshx_loop *loop, const struct meshx_config *config,
                    const struct meshx_callbacks *callbacks, struct meshx_mesh **out,
                    struct meshx_failure *failure);

/* What to find out: whether our sidecar accepts, the node exists, is healthy, and
 * allowed. */
enum meshx_upstream_mode {
    MESHX_UPSTREAM_DIAL,   /* and then make sure that the sidecar has an upstream */
    MESHX_UPSTREAM_REDIAL, /* the same, and whether the node's sidecar is still there:
                            * when a connection was closed before anything came back */
    MESHX_UPSTREAM_ASK,    /* no more than that */
    MESHX_UPSTREAM_FIND,   /* only whether it is registered, healthy or not */
};

/*
 * Asks where to dial |node|, whose service has this ID and Name: at the local port at
 * which the sidecar forwards to it. A control node gets the listener itself if that is on
 * this host and of this user, else the port of a proxy that is started for it.
 * An UPSTREAM event with |request| answers, always exactly one (ESTOPPED
 * when the node service stops first). The port of an upstream never changes while the
 * sidecar process lives, once that listens there. Returns MESHX_OK, or MESHX_ENOMEM or
 * MESHX_ESTOPPED (STOPPED was sent, or the loop is stopping) and makes no event.
 */
int meshx_mesh_upstream(struct meshx_mesh *mesh, uint64_t request, const char *node,
                        const char *service_id, const char *service_name,
                        enum meshx_upstream_mode mode);

/*
 * Asks only whether intentions allow a link to |node|, which has dialed us; if they can't
 * be asked, they do. |socket| is the inode of the connection's other end, which a process
 * of our own user has; 0: another user's, or not known. Intentions are not for those who
 * have surely not come through our sidecar: then |direct| is true in the UPSTREAM event
 * that answers, whose port is 0. Returns as above.
 */
int meshx_mesh_accept(struct meshx_mesh *mesh, uint64_t request, const char *node,
                      const char *service_name, uint32_t socket);

/*
 * |node|, whose service Name is |service_name|, is linked with ours from now on, until
 * meshx_mesh_link_down(). |link| is a number that no other link has; |dialed|: it was us.
 * LINK_DENIED, once, says that intentions do not allow the link any more, or, with
 * MESHX_ENOMEM, that they can't be watched; what cannot be asked leaves it alone.
 * LINK_HEALTH tells changes. |service_name| NULL: nothing is asked
 * about it. Returns MESHX_OK, MESHX_ENOMEM or MESHX_ESTOPPED; the end of a link that is
 * up can always be told.
 */
int meshx_mesh_link_up(struct meshx_mesh *mesh, uint64_t link, const char *node,
                       const char *service_name, bool dialed);
void meshx_mesh_link_down(struct meshx_mesh *mesh, uint64_t link);

/* Asks for an INFO event with |request| (|info|, or |failure|). Returns as above. */
int meshx_mesh_info(struct meshx_mesh *mesh, uint64_t request);

/*
 * Renews the lease of the VM's check: without a renewal for one TTL the check is left to
 * go critical. Never fails.
 */
void meshx_mesh_renew(struct meshx_mesh *mesh);

/*
 * Begins the orderly stop's first half: fails the checks, so that peers stop dialing.
 * Returns at once, DRAINED follows; may be left out. Then meshx_mesh_stop():
 * deregisters and stops the sidecar. STOPPED follows when both are done or have failed.
 * Idempotent.
 */
void meshx_mesh_drain(struct meshx_mesh *mesh);
void meshx_mesh_stop(struct meshx_mesh *mesh);

/*
 * Gives up the handle, after which it must not be used. A node service that is not yet
 * stopped is stopped in the background; events go on until STOPPED, then release() is
 * called.
 */
void meshx_mesh_close(struct meshx_mesh *mesh);

#ifdef __cplusplus
}
#endif
#endif
