%% What users may ask of their node's place in the mesh. Any process, any time.
-module(meshx_node).

-export([info/0, info/1, explain/1]).

-export_type([info/0]).

%% state: starting | ready | stopping | stopped.
%% service_id, service_name, agent, listen_port.
%% sidecar_port, sidecar_pid, sidecar_accepts, sidecar_starts (a count).
%% registered; registrations: how many the agent has taken; repairs: of these, because it had
%% lost the one before.
%% requests, request_failures: of the agent, since the start.
%% upstreams: [#{node, service_name, port, applied}]; applied: the agent has it.
%% static_upstreams: #{Node => {Ip, Port}}, the key `upstreams' as it was read.
%% last_failure: undefined | {Code, Text}.
%% links: [#{node, trouble, frames_in, frames_out, bytes_in, bytes_out, bytes_pending}]; trouble:
%% what makes the linked node critical in Consul, or undefined; bytes_pending: taken from the
%% emulator, not yet by the socket.
-type info() :: map().

%% The node service and its links.
-spec info() -> {ok, info()} | {error, meshx_node_nif:failure()}.
info() ->
    meshx_node_mesh:info().

%% One key of info/0.
-spec info(atom()) -> {ok, term()} | {error, meshx_node_nif:failure() | unknown_key}.
info(Key) ->
    case info() of
        {ok, #{Key := Value}} -> {ok, Value};
        {ok, _} -> {error, unknown_key};
        Error -> Error
    end.

%% Why a node can or can't be reached: does our sidecar accept, and as our Consul agent sees it:
%% does the node exist, is it healthy, do intentions allow us to dial it? Dials nobody and
%% changes nothing. Of a node in `upstreams', where something else decides all that: ok.
-spec explain(node()) -> ok | {error, meshx_node_nif:failure()}.
explain(Node) ->
    case meshx_node_mesh:upstream(Node, ask) of
        {ok, _} -> ok;
        {error, Failure} -> {error, Failure}
    end.
