%% meshx_node_dist under the name that users of the Elixir package MeshxNode type:
%% `iex --erl "-proto_dist Elixir.MeshxNode"'.
-module('Elixir.MeshxNode_dist').

-export([
    childspecs/0,
    listen/1,
    listen/2,
    accept/1,
    accept_connection/5,
    setup/5,
    close/1,
    select/1,
    address/0,
    is_node_name/1,
    setopts/2,
    getopts/2
]).

-include_lib("kernel/include/net_address.hrl").

-spec childspecs() -> {ok, [supervisor:child_spec()]}.
childspecs() ->
    meshx_node_dist:childspecs().

-spec listen(atom()) -> {ok, tuple()} | {error, term()}.
listen(Name) ->
    meshx_node_dist:listen(Name).

-spec listen(atom(), string()) -> {ok, tuple()} | {error, term()}.
listen(Name, Host) ->
    meshx_node_dist:listen(Name, Host).

-spec accept(meshx_node_nif:socket()) -> pid().
accept(Listener) ->
    meshx_node_dist:accept(Listener).

-spec accept_connection(pid(), pid(), node(), [node()], non_neg_integer()) -> pid().
accept_connection(AcceptPid, Controller, MyNode, Allowed, SetupTime) ->
    meshx_node_dist:accept_connection(AcceptPid, Controller, MyNode, Allowed, SetupTime).

-spec setup(node(), normal | hidden, node(), longnames | shortnames, non_neg_integer()) -> pid().
setup(Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    meshx_node_dist:setup(Node, Type, MyNode, LongOrShortNames, SetupTime).

-spec close(meshx_node_nif:socket()) -> ok.
close(Listener) ->
    meshx_node_dist:close(Listener).

-spec select(node()) -> boolean().
select(Node) ->
    meshx_node_dist:select(Node).

-spec address() -> #net_address{}.
address() ->
    meshx_node_dist:address().

-spec is_node_name(term()) -> boolean().
is_node_name(Node) ->
    meshx_node_dist:is_node_name(Node).

-spec setopts(meshx_node_nif:socket(), [term()]) -> ok | {error, term()}.
setopts(Socket, Options) ->
    meshx_node_dist:setopts(Socket, Options).

-spec getopts(meshx_node_nif:socket(), [atom()]) -> {ok, [{atom(), term()}]} | {error, term()}.
getopts(Socket, Options) ->
    meshx_node_dist:getopts(Socket, Options).
