%% The data path: latency, throughput, processor time and memory of a link. Fresh nodes each round.
%% What is measured, and how, is in meshx_bench_work (Erlang) and tcp.c.
%%
%% Nothing but the distribution itself holds a sender back (see meshx_bench_work:pour/4).
-module(meshx_bench_data).

-behaviour(meshx_bench).

-export([title/0, rounds/0, carriers/0, figures/0, ratios/0, steps/0, open/3, measure/2, derive/1, close/1]).

-define(SIZES, [64, 1024, 16384, 65536, 262144, 4194304]).
%% Where the cost of a byte counts, not that of a message; the sum is over those from 64 KiB up.
-define(CPU_SIZES, [16384, 65536, 262144, 4194304]).
-define(CPU_SUM_SIZES, [65536, 262144, 4194304]).
%% Of messages that are all kept, in a table.
-define(STORED_SIZES, [1024, 16384]).
%% Of messages that are sent when the other end asks for them.
-define(DEMANDED_SIZES, [64, 1024]).
%% Messages of which one of 100 isn't looked at: {Size, Count}.
-define(KEPT, [{4096, 50000}, {16384, 10000}]).
-define(KEEP_ONE_OF, 100).

%% Milliseconds.
-define(ROUNDTRIP_TIME, 1500).
-define(CLIENTS_TIME, 1000).
-define(STREAM_TIME, 800).
-define(BESIDE_TIME, 2000).

-define(CLIENTS, 64).
-define(RECONNECTS, 5).
-define(BESIDE_SIZE, 1048576).
-define(SLOW_SIZE, 65536).
-define(SLOW_COUNT, 1000).

-type subject() :: meshx_bench_pair:pair() | meshx_bench_tcp:subject().

-spec title() -> string().
title() ->
    "The data path".

-spec rounds() -> pos_integer().
rounds() ->
    7.

-spec carriers() -> [meshx_bench:carrier()].
carriers() ->
    [inet_tcp, inet_tls, direct, sidecars, tcp_sidecars, tcp].

-spec ratios() -> [{meshx_bench:carrier(), meshx_bench:carrier()}].
ratios() ->
    [{direct, inet_tcp}, {sidecars, tcp_sidecars}, {sidecars, inet_tcp}, {sidecars, inet_tls}].

-spec figures() -> [meshx_bench:figure()].
figures() ->
    [
        {roundtrip_p50, "us", "round trip p50"},
        {roundtrip_p99, "us", "round trip p99"},
        {roundtrip_p999, "us", "round trip p99.9"},
        {clients, "1/s", "round trips, 64 clients"}
    ] ++
        [{stream(Size), "MB/s", ["one way, ", size_text(Size)]} || Size <- ?SIZES] ++
        [{stream_terms, "MB/s", "one way, 1000 tuples"}] ++
        [{store(Size), "MB/s", ["into a table, ", size_text(Size)]} || Size <- ?STORED_SIZES] ++
        [{demand(Size), "MB/s", ["on demand, ", size_text(Size)]} || Size <- ?DEMANDED_SIZES] ++
        [
            {cpu(Who, Size), "s/GB", ["CPU, ", Text, ", ", size_text(Size)]}
         || Size <- ?CPU_SIZES, {Who, Text} <- [{vms, "VMs"}, {sidecars, "sidecars"}]
        ] ++
        [
            {connect, "ms", "connect"},
            {beside_p50, "us", "beside a stream p50"},
            {beside_p99, "us", "beside a stream p99"},
            {beside_max, "us", "beside a stream, longest"},
            {beside_count, "", "beside a stream, samples"},
            {slow_sender, "MiB", "slow receiver, sender's peak"},
            {slow_receiver, "MiB", "slow receiver, its peak"}
        ] ++
        [
            {keep(What, Size), "MiB", ["1 of 100 unread, ", size_text(Size), ", ", Text]}
         || {Size, _} <- ?KEPT, {What, Text} <- [{peak, "peak"}, {held, "held"}]
        ] ++
        [
            {cpu_sender, "s/GB", "CPU, sender, 64 KiB up"},
            {cpu_receiver, "s/GB", "CPU, receiver, 64 KiB up"},
            {cpu_vms, "s/GB", "CPU, VMs, 64 KiB up"},
            {cpu_sidecars, "s/GB", "CPU, sidecars, 64 KiB up"}
        ].

-spec steps() -> [atom()].
steps() ->
    [roundtrip, clients] ++ [stream(Size) || Size <- ?SIZES] ++ [stream_terms] ++
        [store(Size) || Size <- ?STORED_SIZES] ++
        [demand(Size) || Size <- ?DEMANDED_SIZES] ++ [connect, beside, slow] ++
        [keep(Size) || {Size, _} <- ?KEPT].

stream(Size) -> key([stream, Size]).
store(Size) -> key([store, Size]).
demand(Size) -> key([demand, Size]).
keep(Size) -> key([keep, Size]).
keep(What, Size) -> key([keep, What, Size]).
cpu(Who, Size) -> key([cpu, Who, Size]).

key(Words) ->
    list_to_atom(lists:concat(lists:join("_", Words))).

size_text(Size) when Size >= 1048576 -> lists:concat([Size div 1048576, " MiB"]);
size_text(Size) when Size >= 1024 -> lists:concat([Size div 1024, " KiB"]);
size_text(Size) -> lists:concat([Size, " B"]).

-spec open(meshx_bench:config(), meshx_bench:carrier(), pos_integer()) -> subject().
open(Config, Carrier, Round) when Carrier =:= tcp; Carrier =:= tcp_sidecars ->
    meshx_bench_tcp:open(Config, Carrier, Round);
open(Config, Carrier, Round) ->
    meshx_bench_pair:open(Config, Carrier, Round).

-spec close(subject()) -> ok.
close(#{server := _} = Tcp) -> meshx_bench_tcp:close(Tcp);
close(Pair) -> meshx_bench_pair:close(Pair).

-spec measure(atom(), subject()) -> meshx_bench:measured().
measure(Step, #{server := _} = Tcp) ->
    measure_tcp(Step, Tcp);
measure(Step, Pair) ->
    measure_nodes(Step, Pair).

measure_tcp(roundtrip, Tcp) ->
    roundtrip(meshx_bench_tcp:roundtrip(Tcp, ?ROUNDTRIP_TIME));
measure_tcp(clients, Tcp) ->
    #{clients => [meshx_bench_tcp:clients(Tcp, ?CLIENTS, ?CLIENTS_TIME)]};
measure_tcp(Step, Tcp) ->
    case [Size || Size <- ?SIZES, stream(Size) =:= Step] of
        [] ->
            #{};
        [Size] ->
            {Rate, Sidecars} = meshx_bench_tcp:stream(Tcp, Size, ?STREAM_TIME),
            maps:merge(#{Step => [Rate]}, spent_by_sidecars(Size, Sidecars))
    end.

measure_nodes(roundtrip, Pair) ->
    roundtrip(work(Pair, roundtrip, [?ROUNDTRIP_TIME]));
measure_nodes(clients, Pair) ->
    #{clients => [work(Pair, clients, [?CLIENTS, ?CLIENTS_TIME])]};
measure_nodes(stream_terms, Pair) ->
    {Rate, []} = work(Pair, stream, [terms, ?STREAM_TIME, []]),
    #{stream_terms => [Rate]};
measure_nodes(connect, Pair) ->
    #{connect => meshx_bench_pair:reconnects(Pair, ?RECONNECTS)};
measure_nodes(beside, Pair) ->
    #{p50 := P50, p99 := P99, max := Max, count := Count} =
        work(Pair, beside, [?BESIDE_SIZE, ?BESIDE_TIME]),
    #{beside_p50 => [P50], beside_p99 => [P99], beside_max => [Max], beside_count => [Count]};
measure_nodes(slow, Pair) ->
    {[Sender, Receiver], ok} = growth(Pair, slow, [?SLOW_SIZE, ?SLOW_COUNT]),
    #{slow_sender => [Sender], slow_receiver => [Receiver]};
measure_nodes(Step, Pair) ->
    Kinds = [
        {fun streamed/2, ?SIZES, fun stream/1},
        {fun stored/2, ?STORED_SIZES, fun store/1},
        {fun demanded/2, ?DEMANDED_SIZES, fun demand/1},
        {fun kept/2, [Size || {Size, _} <- ?KEPT], fun keep/1}
    ],
    [{Measure, Size}] = [
        {Measure, Size}
     || {Measure, Sizes, Key} <- Kinds, Size <- Sizes, Key(Size) =:= Step
    ],
    Measure(Size, Pair).

streamed(Size, Pair) ->
    OsPids = meshx_bench_pair:os_pids(Pair) ++ meshx_bench_pair:sidecars(Pair),
    {Rate, [Sender, Receiver | Sidecars]} = work(Pair, stream, [Size, ?STREAM_TIME, OsPids]),
    maps:merge(#{stream(Size) => [Rate]}, spent(Size, Sender, Receiver, Sidecars)).

stored(Size, Pair) ->
    #{store(Size) => [work(Pair, store, [Size, ?STREAM_TIME])]}.

demanded(Size, Pair) ->
    #{demand(Size) => [work(Pair, demand, [Size, ?STREAM_TIME])]}.

kept(Size, Pair) ->
    {Size, Count} = lists:keyfind(Size, 1, ?KEPT),
    {[_, Receiver], Held} = growth(Pair, keep, [Size, Count, ?KEEP_ONE_OF]),
    #{keep(peak, Size) => [Receiver], keep(held, Size) => [Held]}.

work(Pair, Function, Arguments) ->
    meshx_bench_pair:call(Pair, Function, [meshx_bench_pair:other(Pair) | Arguments]).

roundtrip(#{p50 := P50, p99 := P99, p999 := P999}) ->
    #{roundtrip_p50 => [P50], roundtrip_p99 => [P99], roundtrip_p999 => [P999]}.

spent(Size, Sender, Receiver, Sidecars) ->
    maps:merge(
        maps:from_list([
            {cpu(Who, Size), [Seconds]}
         || lists:member(Size, ?CPU_SIZES),
            {Who, Seconds} <- [{sender, Sender}, {receiver, Receiver}, {vms, Sender + Receiver}]
        ]),
        spent_by_sidecars(Size, Sidecars)
    ).

spent_by_sidecars(Size, [_ | _] = Sidecars) ->
    maps:from_list([{cpu(sidecars, Size), [lists:sum(Sidecars)]} || lists:member(Size, ?CPU_SIZES)]);
spent_by_sidecars(_Size, []) ->
    #{}.

%% By how many MiB the two VMs' resident memory grew at most while the work was done. In nodes
%% that have done nothing else yet: what others have freed could be used again unseen.
growth(Old, Function, Arguments) ->
    meshx_bench_pair:another(Old, fun(#{nodes := Nodes} = Pair) ->
        lists:foreach(fun(Node) -> meshx_ct:call(Node, meshx_bench_work, collect_garbage, []) end, Nodes),
        OsPids = meshx_bench_pair:os_pids(Pair),
        Before = [meshx_bench_os:resident(OsPid) || OsPid <- OsPids],
        lists:foreach(fun meshx_bench_os:forget_peak/1, OsPids),
        Result = work(Pair, Function, Arguments),
        After = [meshx_bench_os:peak(OsPid) || OsPid <- OsPids],
        {[max(0.0, B - A) || {A, B} <- lists:zip(Before, After)], Result}
    end).

%% The cost of a byte in large messages: the mean over their sizes, if all were measured.
-spec derive(meshx_bench:measured()) -> meshx_bench:measured().
derive(Measured) ->
    maps:from_list([
        {key([cpu, Who]), [lists:sum(Spent) / length(Spent)]}
     || Who <- [sender, receiver, vms, sidecars],
        Spent <- [lists:append([maps:get(cpu(Who, Size), Measured, []) || Size <- ?CPU_SUM_SIZES])],
        length(Spent) =:= length(?CPU_SUM_SIZES)
    ]).
