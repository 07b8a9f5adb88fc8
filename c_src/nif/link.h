/*
 * Framed input and output of a link: the data path.
 *
 * Every NIF here makes a bounded number of non-blocking system calls and reports the
 * bytes it moved as a share of the caller's time slice. The wait for readiness is
 * enif_select's message to the calling process: {select, Link, undefined, ready_input |
 * ready_output}.
 */
#ifndef MESHX_NIF_LINK_H
#define MESHX_NIF_LINK_H

#include "socket.h"

/* Frees all input that is not yet delivered. For the last user of |socket|. */
void link_reader_free(struct socket *socket);

/* NIFs; the specs stand in src/meshx_node_nif.erl. */
ERL_NIF_TERM nif_framing(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_read(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_write(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_flush(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_tick(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_statistics(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);

#endif
