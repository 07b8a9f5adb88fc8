%% The life of a node against a running agent: how long it takes to start, to connect the first
%% time right after both nodes have started, to connect later, and to stop. As a yardstick the
%% same on inet_tcp with epmd.
%%
%% Each round has two fresh VMs for each carrier and names that Consul has never seen. Times are
%% taken in the VM that acts. Booting the VMs is no part of any figure.
-module(meshx_bench_lifecycle).

-behaviour(meshx_bench).

-export([title/0, rounds/0, carriers/0, figures/0, ratios/0, steps/0, open/3, measure/2, close/1]).

%% Later connects per round.
-define(RECONNECTS, 5).

-spec title() -> string().
title() ->
    "Start, connect and stop".

-spec rounds() -> pos_integer().
rounds() ->
    15.

-spec carriers() -> [meshx_bench:carrier()].
carriers() ->
    [inet_tcp, sidecars].

-spec ratios() -> [{meshx_bench:carrier(), meshx_bench:carrier()}].
ratios() ->
    [{sidecars, inet_tcp}].

-spec figures() -> [meshx_bench:figure()].
figures() ->
    [
        {start, "ms", "Node.start/3"},
        {first_connect, "ms", "first connect"},
        {later_connect, "ms", "later connects"},
        {stop, "ms", "Node.stop/0"}
    ].

-spec steps() -> [atom()].
steps() ->
    [Key || {Key, _, _} <- figures()].

-spec open(meshx_bench:config(), meshx_bench:carrier(), pos_integer()) -> meshx_bench_pair:pair().
open(Config, Carrier, Round) ->
    meshx_bench_pair:unnamed(Config, Carrier, Round).

-spec measure(atom(), meshx_bench_pair:pair()) -> meshx_bench:measured().
measure(start, Pair) ->
    #{start => meshx_bench_pair:start(Pair)};
measure(first_connect, Pair) ->
    #{first_connect => [meshx_bench_pair:connect(Pair)]};
measure(later_connect, Pair) ->
    #{later_connect => meshx_bench_pair:reconnects(Pair, ?RECONNECTS)};
measure(stop, #{names := Names, config := Config, nodes := Nodes}) ->
    Stops = [meshx_bench_pair:timed(Node, net_kernel, stop, []) || Node <- Nodes],
    Left = maps:keys(meshx_ct_agent:services(proplists:get_value(agent, Config))),
    [] = [Name || Name <- Names, lists:member(atom_to_binary(meshx_ct:node_name(Name)), Left)],
    #{stop => [Time || {Time, ok} <- Stops]}.

-spec close(meshx_bench_pair:pair()) -> ok.
close(Pair) ->
    meshx_bench_pair:close(Pair).
