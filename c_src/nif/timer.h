/*
 * A timer of microseconds: `receive ... after' knows milliseconds.
 *
 * Of the kernel, and waited for as a socket is, so that it holds up no thread. It belongs
 * to the process that made it and goes with it.
 */
#ifndef MESHX_NIF_TIMER_H
#define MESHX_NIF_TIMER_H

#include "terms.h"

/* Opens the resource type. False: load must fail. */
bool timer_open_type(ErlNifEnv *env, ErlNifResourceFlags flags);

/* NIFs; the specs stand in src/meshx_node_nif.erl. */
ERL_NIF_TERM nif_timer(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_timer_start(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);

#endif
