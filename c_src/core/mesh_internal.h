/*
 * The node service's state, shared by the mesh*.c files and nobody else. L4.
 *
 * Two objects. struct meshx_mesh is the handle: any thread, guarded by its lock, counted
 * (one reference each for the user's handle, the node service and a mailbox run under
 * way). struct mesh is the node service: control thread only, made by meshx_mesh_open(),
 * freed by mesh_finish(), which cuts it off the handle first.
 *
 * States (function that makes the step):
 *   STARTING -> READY     checks pass, others can find us  (become_ready)
 *   STARTING -> STOPPING  a step failed, or the user stops (mesh_stop)
 *   READY    -> STOPPING  the user or the loop stops       (mesh_stop)
 *   STOPPING -> freed     deregistered, sidecar gone       (mesh_finish)
 *
 * mesh.c               public API, mailbox, events, birth and end
 * mesh_config.c        checks and copies the configuration
 * mesh_start.c         claim the name, register, sidecar, first passes, visible: READY
 * mesh_registration.c  desired against applied: the one writer of the registration
 * mesh_health.c        heartbeats, the sidecar's life, the agent's absence
 * mesh_upstream.c      requests and upstreams
 * mesh_lookup.c        what the agent says of a node
 * mesh_departure.c     upstreams of nodes that are gone
 * mesh_watch.c         blocking queries: what Consul says changes
 * mesh_intention.c     which links intentions allow
 * mesh_link.c          linked nodes: are they still allowed, are they healthy?
 * mesh_control_node.c  a control node's way to others, without a service of its own
 * mesh_stop.c          drain, stop
 */
#ifndef MESHX_CORE_MESH_INTERNAL_H
#define MESHX_CORE_MESH_INTERNAL_H

#include "consul.h"
#include "loop.h"
#include "mesh_config.h"
#include "meshx_node.h"
#include "probe.h"
#include "sidecar.h"
#include <pthread.h>
#include <stdatomic.h>

struct mesh;
struct mesh_proxy;

/* Where a node is dialed. */
struct mesh_way {
    const char *address;
    uint16_t port;
    bool direct;
};

/* What a caller asks; becomes exactly one UPSTREAM or INFO event, or none for a link. */
enum mesh_request_kind {
    MESH_REQUEST_DIAL,
    MESH_REQUEST_ASK,
    MESH_REQUEST_FIND,
    MESH_REQUEST_ACCEPT,
    MESH_REQUEST_INFO,
    MESH_REQUEST_LINK_UP,
    MESH_REQUEST_LINK_DOWN
};

struct mesh_request {
    struct mesh_request *next;
    enum mesh_request_kind kind;
    uint64_t id;
    char *node;
    char *service_id; /* DIAL, ASK and FIND, else NULL */
    char *service_name;
    bool dialed;     /* LINK_UP */
    bool again;      /* DIAL: a connection was closed before anything came back */
    uint32_t socket; /* ACCEPT: inode of the connection's other end; 0: not known */
    /* From here on used by mesh_upstream.c, control thread only. */
    struct mesh *mesh;
    unsigned
        lookups; /* answers of the agent still to come; they hold on to this object */
    bool list_wanted; /* waits for the next list of sidecars to be asked for */
    bool list_asked;  /* waits for the one that is under way */
    bool parked;      /* waits for what intentions say */
    bool answered;
    uint64_t revision;            /* waits until this one is applied; 0: does not */
    uint64_t open_by;             /* waits for the listener till then; 0: does not */
    unsigned unknown;             /* looks in a row that did not tell whose that is */
    unsigned moves;               /* of its upstream, to ports nobody else has */
    struct mesh_proxy *proxy;     /* waits until this one accepts; NULL: does not */
    struct probe *probe;          /* of the node's sidecar; counts as a lookup */
    struct meshx_failure found;   /* what the lookup of instances says */
    struct meshx_failure allowed; /* what the lookups of intentions say */
};

/* New, with copies of the names (NULL stays NULL); NULL: out of memory. */
struct mesh_request *mesh_request_new(enum mesh_request_kind kind, uint64_t id,
                                      const char *node, const char *service_name);
void mesh_request_free(struct mesh_request *request);

struct meshx_mesh {
    pthread_mutex_t lock;
    atomic_uint references;
    _Atomic uint64_t renewed_at; /* loop_now() of the VM's last sign of life */
    /* Guarded by lock: */
    struct meshx_loop *loop; /* NULL: the node service has ended */
    struct mesh *mesh;
    struct mesh_request *first; /* the mailbox, oldest first */
    struct mesh_request *last;
    struct mesh_request *downs; /* LINK_DOWN of each link that is up */
    bool posted;                /* a mailbox run is under way */
    bool drain;
    bool stop;
};

/* A step of a start; it is repeated alone when the agent can't answer for now. */
enum mesh_step { MESH_CLAIM, MESH_REGISTER, MESH_SIDECAR, MESH_PASS, MESH_VISIBLE };

/* Who holds the name already, as far as the answers tell. */
struct mesh_claim {
    unsigned pending; /* answers still to come */
    struct meshx_failure failure;
    bool ours_exists; /* the local agent has our service ID for our node */
    uint16_t ours_port;
    unsigned probes;  /* of that port, at another address each */
    unsigned same_id; /* instances of our node with our service ID, anywhere */
    char holder[256]; /* for people: one of ours that passes; empty: none does */
};

/* What speaks to the agent when all is well, and may be failing. */
enum mesh_talk {
    MESH_TALK_VM_CHECK,
    MESH_TALK_SIDECAR_CHECK,
    MESH_TALK_REGISTRATION,
    MESH_TALK_COUNT
};

/* One TTL check. At most one request for it is under way. */
struct mesh_check {
    struct mesh *mesh;
    enum mesh_talk talk;
    const char *id;
    enum consul_check wanted;
    enum consul_check sent;
    uint64_t registration; /* the one applied when it was sent */
    uint64_t sent_at;
    char note[256];
    bool in_flight;
    bool again;   /* |wanted| has changed while a request is under way */
    bool passed;  /* the agent has acknowledged a pass in this start */
    bool drained; /* failed for draining: the agent has answered, or can't be reached */
};

/* One destination of the sidecar. Applied when revision <= registration.applied. */
struct mesh_upstream {
    char *node;
    char *service_name;
    uint16_t port;
    uint64_t revision;     /* first of the desired state that has it there */
    bool bound;            /* was applied: the sidecar's process may listen there */
    uint32_t socket;       /* as in listener_owner() */
    uint64_t absent_since; /* its node is not in the catalog; 0: it is */
    bool departed;         /* not in the desired state; its port is kept for it */
    uint64_t departure;    /* first revision without it */
};

/* A node that is linked with ours. */
struct mesh_link {
    struct mesh_link *next;
    struct mesh *mesh;
    uint64_t id; /* the caller's */
    char *node;
    char *service_name; /* NULL: not asked about */
    char *agent_node;   /* the Consul node it is registered at; NULL: not known yet */
    bool dialed;
    bool gone;       /* freed with the last answer that refers to it */
    bool denied;     /* that was told */
    unsigned asked;  /* answers to come */
    uint64_t judged; /* |link_news| when it was last asked about */
    bool critical;
    bool critical_told;
    char trouble[256]; /* of a critical one */
};

/* What decides which links are allowed, as the agent last told. */
struct mesh_intentions {
    struct document_intentions from; /* with our service as source */
    struct document_intentions to;   /* with it as destination */
    bool otherwise;                  /* whether all else is allowed */
    bool known;                      /* these three, as of the last change */
    bool wanted;      /* by links, denials, or lookups that come together */
    bool incomplete;  /* an answer of those under way was none */
    bool again;       /* there was a change meanwhile */
    unsigned pending; /* answers to come */
};

/* One blocking query. */
enum mesh_query_kind {
    MESH_QUERY_INTENTIONS, /* whether any has changed */
    MESH_QUERY_CRITICAL,   /* critical checks of any node service */
    MESH_QUERY_COUNT
};

struct mesh_query {
    struct mesh *mesh;
    enum mesh_query_kind kind;
    struct loop_timer *timer; /* until it is sent again */
    uint64_t index;
    uint64_t asked_at;
    unsigned failures;      /* in a row */
    uint64_t failing_since; /* the first of them */
    bool active;            /* under way, or the timer is set */
    bool asked;             /* under way */
    bool waiting;           /* under way, and told when there is news */
    bool reported;          /* a person was told that it fails */
};

/*
 * Desired state has a number that grows with each change; a PUT always carries all of it.
 * |lost| and |moving| hold on until they are applied, other changes are given up by the
 * one who asked when the agent refuses them.
 */
struct mesh_registration {
    uint64_t wanted;
    uint64_t sent;
    uint64_t applied;
    uint64_t lost;        /* revision that repairs what the agent has lost; 0: nothing.
                             Also one that has nothing new but the token. */
    uint64_t repaired_at; /* loop_now() when the last such one was applied */
    uint64_t moving; /* revision after which the sidecar restarts at its new port; 0 */
    bool in_flight;
    bool may_exist;   /* something of ours may be registered */
    struct buf token; /* what the token file held when it was last sent */
};

struct mesh {
    struct meshx_mesh *handle;
    struct meshx_loop *loop;
    struct mesh_config config;
    struct meshx_callbacks callbacks;
    struct loop_member member;

    enum meshx_state state;
    enum mesh_step step;
    bool draining;
    bool start_failed; /* |failure| says why */
    bool failure_told; /* FAILED was emitted */
    struct meshx_failure failure;
    bool stop_failed; /* |stop_failure| says why it may still be registered */
    struct meshx_failure stop_failure;
    bool has_last_failure;
    struct meshx_failure last_failure;

    struct loop_timer *deadline;  /* STARTING: start_timeout; then: to undo it */
    struct loop_timer *heartbeat; /* READY; in MESH_VISIBLE: when to look again */
    struct loop_timer *retry;
    struct loop_timer *gather; /* READY: the registration waits no longer */
    struct loop_timer *open;   /* READY: looks whether upstreams have been opened */
    struct loop_timer *finish; /* so that the end never frees what has just called us */
    uint32_t retry_delay;      /* the last one; 0: none since all went well */
    bool retrying;             /* |retry| is set */

    struct consul *consul;
    struct mesh_claim claim;
    struct mesh_registration registration;
    struct mesh_check vm_check;
    struct mesh_check sidecar_check;

    /* Codes of what fails at the agent, and which were logged since all went well. */
    int troubles[MESH_TALK_COUNT];
    uint64_t troubles_logged;
    uint64_t trouble_since;
    bool lease_lapsed;

    struct sidecar *sidecar; /* NULL: something else runs it */
    bool sidecar_begun;
    int64_t sidecar_pid;
    uint16_t sidecar_port;
    bool sidecar_accepts;
    bool sidecar_reported;   /* a person was told that it does not accept */
    bool probe_reported;     /* a person was told that it can't be probed */
    bool listener_reported;  /* a person was told that our own listener is full */
    unsigned sidecar_misses; /* failed probes in a row while the process lives */
    bool sidecar_shut_out;   /* another program has its port */
    uint64_t moved_at;       /* when it was last moved for that, without waiting; 0 */
    uint32_t sidecar_socket; /* as in listener_owner() */
    unsigned looks;          /* MESH_VISIBLE: how often the catalog was asked */
    struct probe *probe;     /* at most one */

    struct mesh_upstream *upstreams;
    size_t upstream_count;
    uint16_t *used_ports; /* upstream ports this sidecar process may have bound */
    size_t used_count;
    struct mesh_request *requests; /* all in hand, oldest first */
    unsigned lone_lookups;         /* nodes that are asked about one by one */
    bool listing;                  /* a list of sidecars is under way for others */
    uint64_t gathered;             /* revision that waits for other lookups; 0: none */
    uint64_t gather_by;            /* for so long */
    char *swept;                   /* the service whose instances are asked for; NULL */
    size_t sweep_next;             /* whose turn it is then */
    struct mesh_proxy *proxies;    /* of a control node */

    struct mesh_query queries[MESH_QUERY_COUNT];
    struct mesh_intentions intentions;
    struct document_checks critical; /* as last answered */
    bool hosts_asked;                /* where linked nodes are; an answer is to come */
    struct loop_timer *recheck;      /* when links are judged anew, queries or not */
    bool rechecking;                 /* |recheck| is set */
    uint64_t away_since;             /* the agent can't be reached; 0: it can */
    uint64_t heard_at;               /* when the last check that was taken was sent */
    uint64_t away_time;              /* how long that was the last time */
    bool sidecar_outdated; /* it has not noticed that the agent lost its state */
    struct mesh_link *links;
    uint64_t link_news;        /* counts what makes all links be judged anew */
    unsigned links_asked;      /* links that are being judged */
    bool link_acl_reported;    /* a person was told that they can't be */
    struct loop_timer *notice; /* when changes of linked nodes' health are told */

    uint64_t sidecar_starts;
    uint64_t registrations;
    uint64_t repairs;
};

/* mesh.c */
void mesh_emit(struct mesh *mesh, const struct meshx_event *event);
void mesh_log(struct mesh *mesh, enum meshx_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void mesh_note_failure(struct mesh *mesh, const struct meshx_failure *failure);
/* FAILED, once, if the start has failed. */
void mesh_tell_failure(struct mesh *mesh);
/* Takes what other threads have left; also called by timers, because a wish for drain or
 * stop may have come without memory to post it. */
void mesh_read_mailbox(struct mesh *mesh);
/* Ends and frees the node service: last answers, FAILED, STOPPED, release. Not from
 * within a callback of one of its parts: start |finish| for that. */
void mesh_finish(struct mesh *mesh);

/* mesh_start.c */
void mesh_start(struct mesh *mesh);
void mesh_start_registered(struct mesh *mesh, const struct meshx_failure *failure);
void mesh_start_checked(struct mesh *mesh, struct mesh_check *check,
                        const struct meshx_failure *failure);
void mesh_start_sidecar_ended(struct mesh *mesh, const struct meshx_failure *failure);
void mesh_start_shut_out(struct mesh *mesh, const char *text);
void mesh_start_accepts(struct mesh *mesh);
void mesh_start_retry(struct mesh *mesh);
void mesh_start_overdue(struct mesh *mesh);
void mesh_start_look(struct mesh *mesh);
/* Chooses sidecar_port, another than the current one unless it is pinned. */
int mesh_choose_sidecar_port(struct mesh *mesh, struct meshx_failure *failure);

/* mesh_registration.c */
/* The desired state has changed: counts it and sends it as soon as possible. */
uint64_t mesh_registration_change(struct mesh *mesh);
/* Sends it if something is to be sent and nothing is under way. */
void mesh_registration_apply(struct mesh *mesh);
/* Whether a registration that failed with |code| was surely not done. */
bool mesh_registration_is_refused(int code);
/* Sends it again if the token file has changed. */
void mesh_registration_follow_token(struct mesh *mesh);
void mesh_registration_fini(struct mesh_registration *registration);
/* The agent does not know us any more. */
void mesh_registration_lost(struct mesh *mesh);

/* mesh_health.c */
void mesh_health_begin(struct mesh *mesh);
void mesh_heartbeat(struct mesh *mesh);
void mesh_check_set(struct mesh_check *check, enum consul_check status, const char *note);
/* Passes both checks as far as they deserve it. */
void mesh_check_both(struct mesh *mesh);
/* Tells the outcome of one of our own requests to the agent (NULL: it worked): logs
 * changes, schedules the retry. */
void mesh_agent_result(struct mesh *mesh, enum mesh_talk talk,
                       const struct meshx_failure *failure);
/* Sets |retry| with the next back-off, unless it is set. */
void mesh_retry_later(struct mesh *mesh);
/* Probes the public port every |interval| ms for |timeout| ms, unless one is under way.
 */
void mesh_probe_sidecar(struct mesh *mesh, uint32_t interval, uint32_t timeout);
extern const struct sidecar_callbacks mesh_sidecar_callbacks; /* but for |context| */

/* mesh_upstream.c */
/* Takes over |request|; queued until READY. */
void mesh_upstream_request(struct mesh *mesh, struct mesh_request *request);
/* READY: begins what was queued. */
void mesh_upstream_ready(struct mesh *mesh);
/* Up to |revision| the desired state is applied, or refused with |failure|. */
void mesh_upstream_applied(struct mesh *mesh, uint64_t revision,
                           const struct meshx_failure *failure);
/* Sends what was gathered; lookups still under way go into the next registration. */
void mesh_upstream_send(struct mesh *mesh);
/* Answers those whose upstream is open by now; moves those that someone else has. */
void mesh_upstream_look(struct mesh *mesh);
/* That of a service, or NULL. */
struct mesh_upstream *mesh_upstream_find(struct mesh *mesh, const char *service_name);
/* A new sidecar process: only the ports of current upstreams are in use. */
void mesh_upstream_new_sidecar(struct mesh *mesh);
bool mesh_upstream_port_used(void *mesh, uint16_t port);
/* Answers all with ESTOPPED. */
void mesh_upstream_stop(struct mesh *mesh);
/* Frees requests and upstreams; the agent's answers can't come any more. */
void mesh_upstream_fini(struct mesh *mesh);
/* One of |request|'s lookups has been answered. */
void mesh_upstream_looked_up(struct mesh_request *request);
/* Answers with the |failure|, or where to dial. |request| may be freed by this. */
void mesh_upstream_answer(struct mesh_request *request,
                          const struct meshx_failure *failure,
                          const struct mesh_way *way);
void mesh_upstream_out_of_memory(struct mesh_request *request);

/* What the agent appends to a service's name and ID for its sidecar's. */
#define MESH_SIDECAR_SUFFIX "-sidecar-proxy"

/* mesh_lookup.c */
/* Asks the agent about |request|'s node; mesh_upstream_looked_up() follows. */
void mesh_lookup(struct mesh_request *request);
/* Is |text| |begin| with the suffix Consul gives to names and IDs of sidecars? */
bool mesh_lookup_is_sidecar(const char *text, const char *begin);
/* Intentions are known now, or can't be had. */
void mesh_lookup_unpark(struct mesh *mesh);
/* Whether |allowed| (unless |failure|) lets |source| connect to |destination|; else
 * |*out| says why not. */
bool mesh_lookup_allowed(const struct mesh *mesh, const struct meshx_failure *failure,
                         bool allowed, const char *source, const char *destination,
                         struct meshx_failure *out);

/* mesh_control_node.c */
/* READY, with nothing registered. */
void mesh_control_node_start(struct mesh *mesh);
/* Is the node on this host and of this user? Else goes on with mesh_lookup().
 */
void mesh_control_node_find(struct mesh_request *request);
/* The node is elsewhere, there and may be dialed: through a proxy. */
void mesh_control_node_dial(struct mesh_request *request);
void mesh_control_node_fini(struct mesh *mesh);

/* mesh_departure.c */
/* Asks the agent about the node of one upstream; which one, changes from call to call. */
void mesh_departure_sweep(struct mesh *mesh);

/* mesh_watch.c */
int mesh_watch_init(struct mesh *mesh);   /* on failure mesh_watch_end() is called, too */
void mesh_watch_begin(struct mesh *mesh); /* READY; and when a link has come up */
void mesh_watch_end(struct mesh *mesh);   /* nothing is begun any more */
void mesh_watch_fini(struct mesh *mesh);  /* the agent's answers can't come any more */
/* We are registered again at an agent that had lost us; and the last link is down. */
void mesh_watch_lost(struct mesh *mesh);
void mesh_watch_unlinked(struct mesh *mesh);
/* Something could not be asked: links are judged anew after |delay| ms at the latest. */
#define MESH_RECHECK_TIME 3000 /* of the 5 s in which a denial must count */
void mesh_watch_recheck(struct mesh *mesh, uint32_t delay);

/* Would it be told at once if an intention changed now? */
bool mesh_watch_sees_intentions(const struct mesh *mesh);
/* Is it about to begin? mesh_intention_refresh() or mesh_lookup_unpark() follows. */
bool mesh_watch_begins_intentions(const struct mesh *mesh);

/* Is there anything to watch or to judge? */
static inline bool mesh_is_running(const struct mesh *mesh) {
    return mesh->state == MESHX_STATE_READY && !mesh->draining;
}

/* mesh_intention.c */
enum mesh_verdict {
    MESH_VERDICT_ASK, /* the agent must be asked: consul_allowed() */
    MESH_VERDICT_ALLOW,
    MESH_VERDICT_DENY
};
/* One of both is our service. |*decides| is the intention that does, borrowed until the
 * next refresh; NULL: none, or not known. */
enum mesh_verdict mesh_intention_verdict(const struct mesh *mesh, const char *source,
                                         const char *destination,
                                         const struct document_intention **decides);
/* Whether such a verdict is good for a link that is to be made now. */
bool mesh_intention_is_current(const struct mesh *mesh);
/* Whether such verdicts are on their way. */
bool mesh_intention_is_coming(const struct mesh *mesh);
/* Intentions may have changed: asks for them; mesh_link_judge() and mesh_lookup_unpark()
 * follow, also when they can't be had. */
void mesh_intention_refresh(struct mesh *mesh);
void mesh_intention_fini(struct mesh *mesh);

/* mesh_link.c */
/* Takes the names out of |request|. */
void mesh_link_up(struct mesh *mesh, struct mesh_request *request);
void mesh_link_down(struct mesh *mesh, uint64_t id);
/* Is any link one that is asked about? */
bool mesh_link_any(const struct mesh *mesh);
/* Judges all links anew. */
void mesh_link_judge(struct mesh *mesh);
/* Is the agent of that Consul node itself in trouble? */
bool mesh_link_is_host_critical(const struct mesh *mesh, const char *agent_node);
/* |mesh->critical| has changed. */
void mesh_link_compare(struct mesh *mesh);
void mesh_link_notice(struct mesh *mesh);
/* Writes which intention denies it, by name while intentions are watched. */
void mesh_link_describe_denial(const struct mesh *mesh, const char *source,
                               const char *destination, char *out, size_t size);
void mesh_link_fini(struct mesh *mesh);

/* mesh_stop.c */
void mesh_drain(struct mesh *mesh);
/* An answer for a check has come while draining. */
void mesh_drain_checked(struct mesh_check *check, const struct meshx_failure *failure);
/* Says again what there was no memory for. */
void mesh_drain_retry(struct mesh *mesh);
void mesh_stop(struct mesh *mesh);
/* Goes on with a stop when the registration in flight is done. */
void mesh_stop_continue(struct mesh *mesh);
void mesh_sidecar_stopped(struct mesh *mesh);
/* Loop member: ends at once. */
void mesh_abandon(void *self);

#endif
