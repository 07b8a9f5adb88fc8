/*
 * The socket resource: a listener or a link, and who owns it.
 *
 * A socket has one owner process (the acceptor's listener belongs to net_kernel, a link
 * to its distribution controller). When the owner dies the socket is closed.
 *
 * Locks: |read| guards the descriptor for input and the reader's fields, |write| for
 * output and the writer's; both are needed to change |fd| or |owner|. Order: read, then
 * write. Neither is held over enif_select(STOP): the emulator may call the stop callback
 * from within it.
 *
 * Life of |fd|, and which function makes the step: open (socket_new; the descriptor is
 * ours), closing (socket_close; |fd| is -1 for everyone and STOP is asked for exactly
 * once), closed (stop callback; its close(2) is the only one).
 */
#ifndef MESHX_NIF_SOCKET_H
#define MESHX_NIF_SOCKET_H

#include "frame.h"
#include "terms.h"
#include <stdatomic.h>

struct socket {
    ErlNifMutex *read;
    ErlNifMutex *write;
    int fd; /* -1: closed; guarded by both locks */
    ErlNifPid owner;
    ErlNifMonitor monitor;
    enum frame_header header; /* set while the handshake's only user calls; both locks */

    struct {            /* guarded by |read|; link_reader_free() frees it */
        uint8_t *stage; /* bytes that were read, of frames not yet delivered */
        size_t capacity;
        size_t start;         /* bytes before it are delivered */
        size_t end;           /* bytes after it are not yet filled */
        ErlNifBinary large;   /* a large frame that is read into place */
        size_t large_size;    /* bytes of it in all; 0: none is under way */
        size_t filled;        /* bytes of it that have come */
        bool bulk;            /* much has come lately: the next stage is the large kind */
        unsigned empty_reads; /* left until the caller is to wait */
        int least; /* bytes for which the caller waits as it likes; 0: for a frame's */
        int low_water; /* bytes that make the socket readable */
    } reader;

    struct {               /* guarded by |write| */
        ErlNifEnv *env;    /* holds |rest|; NULL until the first partial write */
        ERL_NIF_TERM rest; /* frames from the first one that is not wholly written */
        size_t skip;       /* bytes of that one, header included, that are written */
        bool pending;      /* |rest| is valid */
        bool waiting;      /* for room: SOCK_UNSENT_WAITING is set */
        size_t owed;       /* bytes of a tick that the kernel did not take, 0-3 */
    } writer;

    /* What getstat and info read without a lock. */
    atomic_uint_fast64_t frames_in, frames_out, bytes_in, bytes_out, bytes_pending;
};

/* Opens the resource type. False: load must fail. */
bool socket_open_type(ErlNifEnv *env, ErlNifResourceFlags flags);

/* The struct behind |term|, NULL if it is something else. */
struct socket *socket_get(ErlNifEnv *env, ERL_NIF_TERM term);

/* Closes it, whoever asks; idempotent. |env| NULL when called from a callback. */
void socket_close(ErlNifEnv *env, struct socket *socket);

/* NIFs; the specs stand in src/meshx_node_nif.erl. */
ERL_NIF_TERM nif_listen(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_accept(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_connect(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_connected(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_controlling_process(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_peer_uid(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_peer_socket(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_address(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_close(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_setopt(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_getopt(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_statistics(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);

#endif
