%% What links cost that carry nothing: memory and file descriptors of a node, the hub, to which
%% others are connected. Each step has a hub of its own, which has had a link before, so that
%% neither code loaded with the first one nor memory that others have freed is counted.
-module(meshx_bench_idle).

-behaviour(meshx_bench).

-export([title/0, rounds/0, carriers/0, figures/0, ratios/0, steps/0, open/3, measure/2, close/1]).

-define(LINKS, [1, 50, 200]).
%% Nodes that start at the same time.
-define(AT_ONCE, 4).
%% Most of the others are on few processors, and have nothing to do.
-define(SMALL, ["+S", "1:1", "+SDcpu", "1:1", "+SDio", "1", "+A", "1"]).

%% Milliseconds.
-define(REST, 1000).
%% Resident memory grows in steps, and not while the VM has pages to spare; what its allocators
%% have given out is exact, but leaves out what C libraries take.
-define(TAKEN, [
    {memory, "KiB", "resident memory"},
    {allocated, "KiB", "allocated"},
    {descriptors, "", "descriptors"}
]).

-type subject() :: {meshx_bench:config(), meshx_bench:carrier(), Round :: pos_integer()}.

-spec title() -> string().
title() ->
    "Idle links".

-spec rounds() -> pos_integer().
rounds() ->
    1.

-spec carriers() -> [meshx_bench:carrier()].
carriers() ->
    [inet_tcp, inet_tls, direct].

-spec ratios() -> [{meshx_bench:carrier(), meshx_bench:carrier()}].
ratios() ->
    [{direct, inet_tcp}, {direct, inet_tls}].

-spec figures() -> [meshx_bench:figure()].
figures() ->
    [
        {key(What, Links), Unit, lists:concat([Text, " per link of ", Links])}
     || {What, Unit, Text} <- ?TAKEN, Links <- ?LINKS
    ].

-spec steps() -> [atom()].
steps() ->
    [key(links, Links) || Links <- ?LINKS].

key(What, Links) ->
    list_to_atom(lists:concat([What, "_", Links])).

-spec open(meshx_bench:config(), meshx_bench:carrier(), pos_integer()) -> subject().
open(Config, Carrier, Round) ->
    {Config, Carrier, Round}.

-spec close(subject()) -> ok.
close(_) ->
    ok.

-spec measure(atom(), subject()) -> meshx_bench:measured().
measure(Step, {Config, Carrier, Round}) ->
    [Links] = [Links || Links <- ?LINKS, key(links, Links) =:= Step],
    Name = fun(Part) -> list_to_atom(lists:concat([Part, "_", Carrier, "_", Links, "_", Round])) end,
    Port = meshx_ct_agent:free_port(),
    Hub = meshx_ct:start(Config, Name(hub), meshx_bench_pair:options(Config, Carrier, #{port => Port})),
    #{node := HubNode} = Hub,
    #{args := Arguments} =
        Options = meshx_bench_pair:options(Config, Carrier, #{upstreams => [{HubNode, Port}]}),
    OtherOptions = Options#{args := ["-hidden" | ?SMALL] ++ Arguments},
    Others = start(Config, [Name(N) || N <- lists:seq(1, Links)], OtherOptions),
    connect(Hub, [hd(Others)]),
    true = meshx_ct:call(hd(Others), erlang, disconnect_node, [HubNode]),
    linked(Hub, 0),
    Before = taken(Hub),
    connect(Hub, Others),
    After = taken(Hub),
    meshx_bench_pair:stop([Hub | Others]),
    maps:from_list([
        {key(What, Links), [(maps:get(What, After) - maps:get(What, Before)) / Links]}
     || {What, _, _} <- ?TAKEN
    ]).

start(_Config, [], _Options) ->
    [];
start(Config, Names, Options) ->
    {Now, Later} = lists:split(min(?AT_ONCE, length(Names)), Names),
    meshx_ct:start_all(Config, Now, Options) ++ start(Config, Later, Options).

connect(#{node := HubNode} = Hub, Others) ->
    [true = meshx_ct:connect(Other, HubNode) || Other <- Others],
    linked(Hub, length(Others)).

linked(Hub, Count) ->
    meshx_ct:wait("all links", fun() -> length(meshx_ct:call(Hub, ets, tab2list, [sys_dist])) =:= Count end).

%% What it has when it has come to rest. One collection doesn't find all that others have let go.
taken(#{process := Process} = Hub) ->
    lists:foreach(
        fun(_) ->
            timer:sleep(?REST),
            ok = meshx_ct:call(Hub, meshx_bench_work, collect_garbage, [])
        end,
        lists:seq(1, 3)
    ),
    OsPid = meshx_ct_proc:pid(Process),
    #{
        memory => meshx_bench_os:resident(OsPid) * 1024,
        allocated => meshx_ct:call(Hub, erlang, memory, [total]) / 1024,
        descriptors => meshx_bench_os:descriptors(OsPid)
    }.
