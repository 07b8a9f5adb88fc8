/*
 * Erlang terms: the atoms made once at load, and small converters. No policy, no state
 * but the atoms, which are written in terms_init() and read from any thread after it.
 */
#ifndef MESHX_NIF_TERMS_H
#define MESHX_NIF_TERMS_H

#include "meshx_node.h"
#include <erl_nif.h>

/* X(name): an atom of the same spelling, reachable as am_<name>. */
/* clang-format off */
#define TERMS_ATOMS(X) \
    X(dial) X(dialed) X(intention_directions) X(link_denied) X(link_health) \
    X(agent) X(applied) X(ask) X(backlog) X(closed) X(consul) X(control_node) X(deregister_after) X(direct) X(drained) \
    X(error) X(failed) X(false) X(find) X(force_registration) X(guard_path) X(handshake) X(info) \
    X(ipv6_v6only) X(keepalive) X(last_failure) X(listen_address) X(listen_port) \
    X(log) X(meshx_event) X(more) X(node) X(nodelay) X(none) X(notice) X(ok) X(output) X(own) X(port) \
    X(priority) X(ready) X(recbuf) X(redial) X(registered) X(registrations) X(repairs) \
    X(request_failures) X(request_timeout) X(requests) X(reuseaddr) X(service_id) \
    X(service_name) X(service_template) X(sidecar) X(sidecar_accepts) X(sidecar_address) \
    X(sidecar_command) X(sidecar_environment) X(sidecar_pid) X(sidecar_port) \
    X(sidecar_ports) X(sidecar_restart_max) X(sidecar_restart_min) X(sidecar_starts) \
    X(sndbuf) X(start_timeout) X(starting) X(state) X(stderr) X(stdout) \
    X(stop_timeout) X(stopped) X(stopping) X(tclass) X(tos) X(true) X(ttl) \
    X(undefined) X(upstream) X(upstream_keep) X(upstream_ports) X(upstream_template) \
    X(upstreams) \
    X(wait) X(warning)
/* clang-format on */

#define TERMS_DECLARE(name) extern ERL_NIF_TERM am_##name;
TERMS_ATOMS(TERMS_DECLARE)
#undef TERMS_DECLARE

/* Makes the atoms. Called by load and upgrade, before anything else here. */
void terms_init(ErlNifEnv *env);

/* {error, Atom} for a positive errno: its POSIX name in lower case (econnrefused). */
ERL_NIF_TERM terms_error_errno(ErlNifEnv *env, int error_number);

/* {error, closed}. */
ERL_NIF_TERM terms_error_closed(ErlNifEnv *env);

/* The lower-case POSIX name of |error_number| as an atom. */
ERL_NIF_TERM terms_errno(ErlNifEnv *env, int error_number);

/* {Code, Text}: an atom of MESHX_ERRORS and a binary; |undefined| for NULL. */
ERL_NIF_TERM terms_failure(ErlNifEnv *env, const struct meshx_failure *failure);

/* A binary with the bytes of |text|; |undefined| for NULL. */
ERL_NIF_TERM terms_text(ErlNifEnv *env, const char *text);

/* A NUL-terminated copy of the binary |term| (new: enif_free()). NULL: not a binary, or
 * it holds a NUL, or no memory. */
char *terms_to_text(ErlNifEnv *env, ERL_NIF_TERM term);

#endif
