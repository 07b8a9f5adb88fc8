/*
 * Waits for a link's input, of which low_water/2 says how much: see link.h.
 */
#include "link.h"
#include <errno.h>
#include <poll.h>

#define TIMESLICE_MICROSECONDS 1000

/* select(Link) -> ok | {error, closed | Posix}. The calling process gets a select message
 * when there is input, or its end. */
ERL_NIF_TERM nif_select(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    ERL_NIF_TERM result = am_ok;

    (void)argc;
    if (socket == NULL) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    if (socket->fd < 0) {
        result = terms_error_closed(env);
    } else if (enif_select(env, socket->fd, ERL_NIF_SELECT_READ, socket, NULL,
                           am_undefined) < 0) {
        result = terms_error_errno(env, ENOMEM);
    }
    enif_mutex_unlock(socket->read);
    return result;
}

/* await(Link, Microseconds) -> ready | none. Whether there is input, or its end, before
 * that time is over, a time slice at most. Meanwhile the scheduler's thread sleeps. */
ERL_NIF_TERM nif_await(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]) {
    struct socket *socket = socket_get(env, argv[0]);
    struct pollfd input = {.events = POLLIN};
    unsigned most = 0;

    (void)argc;
    if (socket == NULL || !enif_get_uint(env, argv[1], &most) ||
        most > TIMESLICE_MICROSECONDS) {
        return enif_make_badarg(env);
    }
    enif_mutex_lock(socket->read);
    input.fd = socket->fd;
    enif_mutex_unlock(socket->read);
    if (input.fd < 0) {
        return am_ready; /* as the next read finds */
    }
    /* Without the lock, which others may want. If the link is closed meanwhile the answer
     * means nothing, and the next read tells. */
    const struct timespec time = {.tv_nsec = most * 1000L};
    ErlNifTime began = enif_monotonic_time(ERL_NIF_USEC);
    int ready = ppoll(&input, 1, &time, NULL);
    ErlNifTime took = enif_monotonic_time(ERL_NIF_USEC) - began;
    link_consume_timeslice(env, (size_t)took *
                                    (LINK_BYTES_PER_TIMESLICE / TIMESLICE_MICROSECONDS));
    return ready == 0 ? am_none : am_ready;
}
