/*
 * Framed input and output of a link: the data path.
 *
 * Every NIF here makes a bounded number of non-blocking system calls and reports the
 * bytes it moved as a share of the caller's time slice. The wait for readiness is
 * enif_select's message to the calling process: {select, Link, undefined, ready_input |
 * ready_output}. Only await/2 blocks, for a part of a time slice.
 */
#ifndef MESHX_NIF_LINK_H
#define MESHX_NIF_LINK_H

#include "socket.h"

/* Bytes that count as a whole time slice (1 ms at about 2 GB/s of copying). */
#define LINK_BYTES_PER_TIMESLICE ((size_t)2 * 1024 * 1024)

/* Of the caller's time slice, what |bytes| that were moved have cost. */
static inline void link_consume_timeslice(ErlNifEnv *env, size_t bytes) {
    size_t percent = bytes * 100 / LINK_BYTES_PER_TIMESLICE;

    enif_consume_timeslice(env, percent < 1 ? 1 : percent > 100 ? 100 : (int)percent);
}

/* Frees all input that is not yet delivered. For the last user of |socket|. */
void link_reader_free(struct socket *socket);

/* NIFs; the specs stand in src/meshx_node_nif.erl. */
ERL_NIF_TERM nif_framing(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_low_water(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_select(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_await(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_read(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_write(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_flush(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_tick(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);

#endif
