/*
 * The mesh resource: a node service's handle, and its events as messages.
 *
 * Events go to the process that opened the mesh as {meshx_event, Tag, Type, Data}, Tag
 * being a term of its choice:
 *
 *   ready     []
 *   failed    {Code, Text}                                  start failed, undone
 *   upstream  {Request, {ok, {sidecar | direct, Address, Port}} | {error, {Code, Text}}}
 *   link_denied  {Link, {Code, Text}}
 *   link_health  {Link, undefined | Text}
 *   info      {Request, {ok, Map} | {error, {Code, Text}}}
 *   output    {stdout | stderr, Line}                       not all of a flood
 *   log       {info | notice | warning | error, Text}
 *   drained   []                                            peers don't dial us any more
 *   stopped   undefined | {Code, Text}                      the last one
 *
 * When that process dies the node service is stopped in the background.
 */
#ifndef MESHX_NIF_MESH_H
#define MESHX_NIF_MESH_H

#include "terms.h"
#include <stdatomic.h>

/* The library's private data; the module's current code and its old code have the same.
 */
struct library {
    const void *build; /* stays the first field: other builds look at it */
    atomic_uint users; /* 1 or 2 */
    struct meshx_loop *loop;
    atomic_bool occupied; /* from mesh_open to the release of the node service */
};

/* Opens the resource type. False: load must fail. */
bool mesh_open_type(ErlNifEnv *env, ErlNifResourceFlags flags);

/* NIFs; the specs stand in src/meshx_node_nif.erl. */
ERL_NIF_TERM nif_mesh_open(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_upstream(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_link_up(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_link_down(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_info(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_renew(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_drain(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);
ERL_NIF_TERM nif_mesh_stop(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[]);

#endif
