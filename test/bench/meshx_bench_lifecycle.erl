%% The life of a node against a running agent: how long it takes to start, to connect the first
%% time right after both nodes have started, to connect later, and to stop. As a yardstick the
%% same on inet_tcp with epmd.
%%
%% Each round has two fresh VMs and names that Consul has never seen. Times are taken in the VM
%% that acts. Booting the VMs is no part of any figure.
-module(meshx_bench_lifecycle).

-behaviour(meshx_bench).

-export([title/0, rounds/0, figures/0, round/3]).

%% Later connects per round.
-define(RECONNECTS, 5).

-spec title() -> string().
title() ->
    "Start, connect and stop".

-spec rounds() -> pos_integer().
rounds() ->
    15.

-spec figures() -> [{atom(), string(), string()}].
figures() ->
    [
        {start, "ms", "Node.start/3"},
        {first_connect, "ms", "first connect"},
        {later_connect, "ms", "later connects"},
        {stop, "ms", "Node.stop/0"}
    ].

-spec round(meshx_bench:config(), meshx_bench:carrier(), pos_integer()) -> #{atom() => [float()]}.
round(Config, Carrier, Round) ->
    Names = [list_to_atom(lists:concat([Name, Round])) || Name <- [one, two]],
    Vms = [meshx_ct:vm(Config, options(Config, Carrier)) || _ <- Names],
    Starts = [start(Vm, Name) || {Vm, Name} <- lists:zip(Vms, Names)],
    [One, Two] = Vms,
    Other = meshx_ct:node_name(lists:last(Names)),
    First = connect(One, Other),
    Later = [
        begin
            disconnect(One, Two, Other),
            connect(One, Other)
        end
     || _ <- lists:seq(1, ?RECONNECTS)
    ],
    Stops = [timed(Vm, net_kernel, stop, []) || Vm <- Vms],
    Left = meshx_ct_agent:services(proplists:get_value(agent, Config)),
    lists:foreach(fun meshx_ct:stop/1, Vms),
    map_size(Left) =:= 0 orelse error({left_in_consul, maps:keys(Left)}),
    #{
        start => Starts,
        first_connect => [First],
        later_connect => Later,
        stop => [Time || {Time, ok} <- Stops]
    }.

%% Only we connect: else a message that global sends after our disconnect may do it.
options(Config, Carrier) ->
    #{
        scope => suite,
        carrier => atom_to_list(Carrier),
        args => ["-kernel", "dist_auto_connect", "never"],
        env => [{"ERL_EPMD_PORT", meshx_bench:epmd_port(Config)}]
    }.

start(Vm, Name) ->
    case timed(Vm, net_kernel, start, [[Name, shortnames]]) of
        {Time, {ok, _}} -> Time;
        {_, Error} -> error({start, Name, Error})
    end.

connect(Vm, Node) ->
    case timed(Vm, net_kernel, connect_node, [Node]) of
        {Time, true} -> Time;
        {_, Other} -> error({connect, Node, Other, meshx_ct:lines(Vm, 0)})
    end.

%% Both net_kernels have seen it when this returns; nodes/0 is empty a little earlier.
disconnect(One, Two, Node) ->
    true = meshx_ct:call(One, erlang, disconnect_node, [Node]),
    meshx_ct:wait("the end of the link", fun() ->
        lists:all(fun(Vm) -> meshx_ct:call(Vm, ets, tab2list, [sys_dist]) =:= [] end, [One, Two])
    end).

%% {Milliseconds, Result}
timed(Vm, Module, Function, Arguments) ->
    {Time, Result} = meshx_ct:call(Vm, timer, tc, [Module, Function, Arguments]),
    {Time / 1000, Result}.
