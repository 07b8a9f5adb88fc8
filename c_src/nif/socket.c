/*
 * The socket resource: see socket.h for owner, locks and the life of the descriptor.
 */
#include "socket.h"
#include "link.h"
#include "sock.h"
#include "sock_owner.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <unistd.h>

static ErlNifResourceType *socket_type;
static char read_lock_name[] = "meshx_socket_read"; /* the NIF API takes no const name */
static char write_lock_name[] = "meshx_socket_write";

/* ---- life ---- */

static void on_destroy(ErlNifEnv *env, void *object) {
    struct socket *socket = object;

    (void)env;
    /* The descriptor is closed by now: while it was selected the emulator kept the
     * resource, and one that was never selected is closed by nif_close, down, or here. */
    if (socket->fd >= 0) {
        close(socket->fd);
    }
    link_reader_free(socket);
    if (socket->writer.env != NULL) {
        enif_free_env(socket->writer.env);
    }
    if (socket->read != NULL) {
        enif_mutex_destroy(socket->read);
    }
    if (socket->write != NULL) {
        enif_mutex_destroy(socket->write);
    }
}

static void on_stop(ErlNifEnv *env, void *object, ErlNifEvent fd, int is_direct_call) {
    (void)env;
    (void)object;
    (void)is_direct_call;
    close(fd);
}

/* Closes it if |owner| still owns it, which a hand-over may just have changed; NULL:
 * whoever does. */
static void close_of(ErlNifEnv *env, struct socket *socket, const ErlNifPid *owner) {
    int fd = -1;
    int stopped;

    enif_mutex_lock(socket->read);
    enif_mutex_lock(socket->write);
    if (owner == NULL || enif_compare_pids(owner, &socket->owner) == 0) {
        fd = socket->fd;
        socket->fd = -1;
    }
    if (fd >= 0) {
        enif_demonitor_process(env, socket, &socket->monitor);
    }
    enif_mutex_unlock(socket->write);
    enif_mutex_unlock(socket->read);
    if (fd < 0) {
        return;
    }
    stopped = enif_select(env, fd, ERL_NIF_SELECT_STOP, socket, NULL, am_undefined);
    if (stopped < 0 ||
        (stopped & (ERL_NIF_SELECT_STOP_CALLED | ERL_NIF_SELECT_STOP_SCHEDULED)) == 0) {
        close(fd); /* it was never selected, so no stop callback comes */
    }
}

void socket_close(ErlNifEnv *env, struct socket *socket) {
    close_of(env, socket, NULL);
}

static void on_down(ErlNifEnv *env, void *object, ErlNifPid *pid,
                    ErlNifMonitor *monitor) {
    (void)monitor;
    close_of(env, object, pid);
}

bool socket_open_type(ErlNifEnv *env, ErlNifResourceFlags flags) {
    ErlNifResourceTypeInit callbacks = {
        .dtor = on_destroy, .stop = on_stop, .down = on_down};

    socket_type = enif_open_resource_type_x(env, "meshx_socket", &callbacks, flags, NULL);
    return socket_type != NULL;
}

struct socket *socket_get(ErlNifEnv *env, ERL_NIF_TERM term) {
    void *object;

    return enif_get_resource(env, term, socket_type, &object) ? object : NULL;
}

/*
 * Wraps |fd| (steal: closed here on failure) in a resource owned by the calling process.
 * Returns the term, or 0 when memory ran out.
 */
static ERL_NIF_TERM socket_new(ErlNifEnv *env, int fd) {
    struct socket *socket = enif_alloc_resource(socket_type, sizeof *socket);
    ERL_NIF_TERM term = 0;

    if (socket == NULL) {
        close(fd);
        return 0;
    }
    memset(socket, 0, sizeof *socket);
    socket->fd = fd;
    socket->header = FRAME_HANDSHAKE;
    socket->reader.low_water = 1;
    socket->read = enif_mutex_create(read_lock_name);
    socket->write = enif_mutex_create(write_lock_name);
    enif_self(env, &socket->owner);
    if (socket->read != NULL && socket->write != NULL &&
        enif_monitor_process(env, socket, &socket->owner, &socket->monitor) == 0) {
        term = enif_make_resource(env, socket);
    }
    enif_release_resource(socket); /* the term keeps it, or it is destroyed here */
    return term;
}

/* ---- arguments ---- */

/* {127,0,0,1} or an 8-tuple, and a port, to a socket address. */
static bool get_address(ErlNifEnv *env, ERL_NIF_TERM ip, ERL_NIF_TERM port_term,
                        struct sock_address *out) {
    const ERL_NIF_TERM *parts;
    char text[64] = "";
    size_t length = 0;
    int arity;
    unsigned port;

    if (!enif_get_tuple(env, ip, &arity, &parts) || (arity != 4 && arity != 8) ||
        !enif_get_uint(env, port_term, &port) || port > UINT16_MAX) {
        return false;
    }
    for (int i = 0; i < arity; i++) {
        unsigned part;
        if (!enif_get_uint(env, parts[i], &part) || part > (arity == 4 ? 255 : 65535)) {
            return false;
        }
        length += (size_t)enif_snprintf(text + length, sizeof text - length,
                                        arity == 4 ? "%s%u" : "%s%x",
                                        i == 0 ? "" : (arity == 4 ? "." : ":"), part);
    }
    return sock_address_parse(text, (uint16_t)port, out) == 0;
}

static ERL_NIF_TERM make_address(ErlNifEnv *env, const struct sock_address *address) {
    const void *storage = &address->storage;
    ERL_NIF_TERM parts[8];

    if (address->storage.ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = storage;
        for (size_t i = 0; i < 8; i++) {
            parts[i] = enif_make_uint(env, (unsigned)(in6->sin6_addr.s6_addr[2 * i] << 8 |
                                                      in6->sin6_addr.s6_addr[2 * i + 1]));
        }
        return enif_make_tuple2(env, enif_make_tuple_from_array(env, parts, 8),
                                enif_make_uint(env, ntohs(in6->sin6_port)));
    }
    const struct sockaddr_in *in = storage;
    uint32_t ip = ntohl(in->sin_addr.s_addr);
    for (size_t i = 0; i < 4; i++) {
        parts[i] = enif_make_uint(env, ip >> (24 - 8 * i) & 255);
    }
    return enif_make_tuple2(env, enif_make_tuple_from_array(env, parts, 4),
                            enif_make_uint(env, ntohs(in->sin_port)));
}

/* Options that a map may hold at creation. Absent keys keep the default. */
static bool get_options(ErlNifEnv *env, ERL_NIF_TERM map, struct sock_options *out) {
    const struct {
        ERL_NIF_TERM key;
        int *value;
    } known[] = {
        {am_nodelay, &out->nodelay},
        {am_keepalive, &out->keepalive},
        {am_sndbuf, &out->sndbuf},
        {am_recbuf, &out->rcvbuf},
        {am_reuseaddr, &out->reuseaddr},
        {am_priority, &out->priority},
        {am_tos, &out->tos},
        {am_tclass, &out->tos},
        {am_backlog, &out->backlog},
        {am_ipv6_v6only, &out->ipv6_v6only},
    };
    ERL_NIF_TERM value;

    if (!enif_is_map(env, map)) {
        return false;
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (enif_get_map_value(env, map, known[i].key, &value) &&
            !enif_get_int(env, value, known[i].value)) {
            return false;
        }
    }
    return true;
}

/* ---- NIFs ---- */

/* listen(Ip, Port, Options) -> {ok, Listener} | {error, Posix} */
ERL_NIF_TERM nif_listen(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct sock_options options = SOCK_OPTIONS_DEFAULT;
    struct sock_address address;
    ERL_NIF_TERM term;
    int fd;
    int rc;

    (void)argc;
    if (!get_address(env, argv[0], argv[1], &address) ||
        !get_options(env, argv[2], &options)) {
        return enif_make_badarg(env);
    }
    rc = sock_listen(&address, &options, &fd);
    if (rc != 0) {
        return terms_error_errno(env, -rc);
    }
    term = socket_new(env, fd);
    return term != 0 ? enif_make_tuple2(env, am_ok, term)
                     : terms_error_errno(env, ENOMEM);
}

/* accept(Listener, Options) -> {ok, Link} | wait | {error, Posix | closed}
 * wait: the caller gets {select, Listener, undefined, ready_input}. */
ERL_NIF_TERM nif_accept(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct sock_options options = SOCK_OPTIONS_DEFAULT;
    struct socket *listener = socket_get(env, argv[0]);
    struct sock_address peer;
    ERL_NIF_TERM term;
    int fd = -1;
    int rc;

    (void)argc;
    if (listener == NULL || !get_options(env, argv[1], &options)) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(listener->read);
    if (listener->fd < 0) {
        enif_mutex_unlock(listener->read);
        return terms_error_closed(env);
    }
    rc = sock_accept(listener->fd, &options, &fd, &peer);
    if (rc == -EAGAIN) {
        rc = enif_select(env, listener->fd, ERL_NIF_SELECT_READ, listener, NULL,
                         am_undefined) < 0
                 ? -ENOMEM
                 : -EAGAIN;
    }
    enif_mutex_unlock(listener->read);
    if (rc == -EAGAIN) {
        return am_wait;
    }
    if (rc != 0) {
        return terms_error_errno(env, -rc);
    }
    term = socket_new(env, fd);
    return term != 0 ? enif_make_tuple2(env, am_ok, term)
                     : terms_error_errno(env, ENOMEM);
}

/* connect(Ip, Port, Bind, Options) -> {ok, Link} | {wait, Link} | {error, Posix}
 * Bind is {Ip, Port} or undefined. wait: the caller gets {select, Link, undefined,
 * ready_output} and then asks connected/1. */
ERL_NIF_TERM nif_connect(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct sock_options options = SOCK_OPTIONS_DEFAULT;
    struct sock_address address;
    struct sock_address bind_address;
    const ERL_NIF_TERM *bind;
    bool bound;
    int arity;
    ERL_NIF_TERM term;
    int fd;
    int rc;

    (void)argc;
    bound = enif_get_tuple(env, argv[2], &arity, &bind) && arity == 2;
    if (!get_address(env, argv[0], argv[1], &address) ||
        !(bound ? get_address(env, bind[0], bind[1], &bind_address)
                : enif_is_identical(argv[2], am_undefined)) ||
        !get_options(env, argv[3], &options)) {
        return enif_make_badarg(env);
    }
    rc = sock_connect(&address, bound ? &bind_address : NULL, &options, &fd);
    if (rc != 0 && rc != -EINPROGRESS) {
        return terms_error_errno(env, -rc);
    }
    term = socket_new(env, fd);
    if (term == 0) {
        return terms_error_errno(env, ENOMEM);
    }
    if (rc == 0) {
        return enif_make_tuple2(env, am_ok, term);
    }
    if (enif_select(env, fd, ERL_NIF_SELECT_WRITE, socket_get(env, term), NULL,
                    am_undefined) < 0) {
        return terms_error_errno(env, ENOMEM); /* the resource closes the descriptor */
    }
    return enif_make_tuple2(env, am_wait, term);
}

/* connected(Link) -> ok | wait | {error, Posix | closed}. wait: as connect/4. */
ERL_NIF_TERM nif_connected(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    int rc;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->write);
    if (socket->fd < 0) {
        enif_mutex_unlock(socket->write);
        return terms_error_closed(env);
    }
    rc = sock_connected(socket->fd);
    if (rc == -EINPROGRESS && enif_select(env, socket->fd, ERL_NIF_SELECT_WRITE, socket,
                                          NULL, am_undefined) < 0) {
        rc = -ENOMEM;
    }
    enif_mutex_unlock(socket->write);
    if (rc == -EINPROGRESS) {
        return am_wait;
    }
    return rc == 0 ? am_ok : terms_error_errno(env, -rc);
}

/* controlling_process(Socket, Pid) -> ok | {error, closed}. The caller must be the owner
 * or hold the only reference; a dead Pid closes the socket. */
ERL_NIF_TERM nif_controlling_process(ErlNifEnv *env, int argc,
                                     const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    ErlNifPid pid;
    bool open;
    bool alive = false;

    (void)argc;
    if (socket == NULL || !enif_get_local_pid(env, argv[1], &pid)) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    enif_mutex_lock(socket->write);
    open = socket->fd >= 0;
    if (open) {
        enif_demonitor_process(env, socket, &socket->monitor);
        socket->owner = pid;
        alive = enif_monitor_process(env, socket, &pid, &socket->monitor) == 0;
    }
    enif_mutex_unlock(socket->write);
    enif_mutex_unlock(socket->read);
    if (open && !alive) {
        /* No down message comes for a process already dead. */
        close_of(env, socket, &pid);
    }
    return open && alive ? am_ok : terms_error_closed(env);
}

/* address(Socket, local | peer) -> {ok, {Ip, Port}} | {error, Posix | closed} */
ERL_NIF_TERM nif_address(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct sock_address address;
    char which[8];
    int rc;

    (void)argc;
    if (socket == NULL ||
        !enif_get_atom(env, argv[1], which, sizeof which, ERL_NIF_LATIN1)) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    if (socket->fd < 0) {
        rc = -EBADF;
    } else {
        rc = strcmp(which, "peer") == 0 ? sock_peer(socket->fd, &address)
                                        : sock_local(socket->fd, &address);
    }
    enif_mutex_unlock(socket->read);
    if (rc != 0) {
        return rc == -EBADF ? terms_error_closed(env) : terms_error_errno(env, -rc);
    }
    return enif_make_tuple2(env, am_ok, make_address(env, &address));
}

/* Both ends of a connection. 0 or -errno; -EBADF: closed. */
static int get_ends(struct socket *socket, struct sock_address *local,
                    struct sock_address *peer) {
    int rc = -EBADF;

    enif_mutex_lock(socket->read);
    if (socket->fd >= 0) {
        rc = sock_local(socket->fd, local);
        if (rc == 0) {
            rc = sock_peer(socket->fd, peer);
        }
    }
    enif_mutex_unlock(socket->read);
    return rc;
}

static ERL_NIF_TERM make_peer_uid(ErlNifEnv *env, int rc, uid_t uid) {
    if (rc == -EBADF) {
        return terms_error_closed(env);
    }
    if (rc != 0) {
        return terms_error_errno(env, rc == -ENOTCONN ? ENOENT : -rc);
    }
    return enif_make_tuple2(env, am_ok,
                            uid == geteuid() ? am_own : enif_make_uint(env, uid));
}

/* nif_peer_uid where the kernel has no better way; on a dirty scheduler. */
static ERL_NIF_TERM scan_peer_uid(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct sock_address local;
    struct sock_address peer;
    struct sock_owner owner = {0};
    int rc;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    rc = get_ends(socket, &local, &peer);
    if (rc == 0) {
        rc = sock_owner_scan(&local, &peer, &owner);
    }
    return make_peer_uid(env, rc, owner.uid);
}

/* peer_uid(Link) -> {ok, own | Uid} | {error, enoent | closed | Posix}
 * own: the VM's effective user. enoent: no process of this host has the other end. */
ERL_NIF_TERM nif_peer_uid(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct sock_address local;
    struct sock_address peer;
    struct sock_owner owner = {0};
    int rc;

    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    rc = get_ends(socket, &local, &peer);
    if (rc == 0) {
        rc = sock_owner(&local, &peer, &owner);
    }
    if (rc == -EOPNOTSUPP) {
        return enif_schedule_nif(env, "peer_uid", ERL_NIF_DIRTY_JOB_IO_BOUND,
                                 scan_peer_uid, argc, argv);
    }
    return make_peer_uid(env, rc, owner.uid);
}

/* peer_socket(Link) -> Inode of the other end, 0: it is not our own user's, or not known
 */
ERL_NIF_TERM nif_peer_socket(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct sock_address local;
    struct sock_address peer;
    struct sock_owner owner = {0};
    bool is_own;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    is_own = get_ends(socket, &local, &peer) == 0 &&
             sock_owner(&local, &peer, &owner) == 0 && owner.uid == geteuid();
    return enif_make_uint(env, is_own ? owner.inode : 0);
}

/* close(Socket) -> ok */
ERL_NIF_TERM nif_close(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    socket_close(env, socket);
    return am_ok;
}

/* Level and name of an option that can be changed or read while a link runs. */
static bool find_option(ERL_NIF_TERM key, int *level, int *name) {
    const struct {
        ERL_NIF_TERM key;
        int level;
        int name;
    } known[] = {
        {am_nodelay, IPPROTO_TCP, TCP_NODELAY},
        {am_keepalive, SOL_SOCKET, SO_KEEPALIVE},
        {am_sndbuf, SOL_SOCKET, SO_SNDBUF},
        {am_recbuf, SOL_SOCKET, SO_RCVBUF},
        {am_reuseaddr, SOL_SOCKET, SO_REUSEADDR},
        {am_priority, SOL_SOCKET, SO_PRIORITY},
        {am_tos, IPPROTO_IP, IP_TOS},
        {am_tclass, IPPROTO_IPV6, IPV6_TCLASS},
    };

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (enif_is_identical(known[i].key, key)) {
            *level = known[i].level;
            *name = known[i].name;
            return true;
        }
    }
    return false;
}

/* setopt(Socket, Name, Integer) -> ok | {error, Posix | closed}; {error, enoprotoopt} for
 * a name that is not known. */
ERL_NIF_TERM nif_setopt(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    int level;
    int name;
    int value;
    int rc;

    (void)argc;
    if (socket == NULL || !enif_get_int(env, argv[2], &value)) {
        return enif_make_badarg(env);
    }
    if (!find_option(argv[1], &level, &name)) {
        return terms_error_errno(env, ENOPROTOOPT);
    }
    enif_mutex_lock(socket->write);
    rc = socket->fd < 0                                                   ? EBADF
         : setsockopt(socket->fd, level, name, &value, sizeof value) == 0 ? 0
                                                                          : errno;
    enif_mutex_unlock(socket->write);
    if (rc == EBADF) {
        return terms_error_closed(env);
    }
    return rc == 0 ? am_ok : terms_error_errno(env, rc);
}

/* getopt(Socket, Name) -> {ok, Integer} | {error, Posix | closed} */
ERL_NIF_TERM nif_getopt(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    int level;
    int name;
    int value = 0;
    socklen_t size = sizeof value;
    int rc;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    if (!find_option(argv[1], &level, &name)) {
        return terms_error_errno(env, ENOPROTOOPT);
    }
    enif_mutex_lock(socket->write);
    rc = socket->fd < 0                                            ? EBADF
         : getsockopt(socket->fd, level, name, &value, &size) == 0 ? 0
                                                                   : errno;
    enif_mutex_unlock(socket->write);
    if (rc == EBADF) {
        return terms_error_closed(env);
    }
    return rc == 0 ? enif_make_tuple2(env, am_ok, enif_make_int(env, value))
                   : terms_error_errno(env, rc);
}

/* statistics(Link) -> {FramesIn, FramesOut, BytesIn, BytesOut, BytesPending}; takes no
 * lock. */
ERL_NIF_TERM nif_statistics(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    return enif_make_tuple5(env, enif_make_uint64(env, atomic_load(&socket->frames_in)),
                            enif_make_uint64(env, atomic_load(&socket->frames_out)),
                            enif_make_uint64(env, atomic_load(&socket->bytes_in)),
                            enif_make_uint64(env, atomic_load(&socket->bytes_out)),
                            enif_make_uint64(env, atomic_load(&socket->bytes_pending)));
}
