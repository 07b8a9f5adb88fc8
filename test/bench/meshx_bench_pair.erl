%% Pairs of nodes on one carrier, connected. Only we connect: else a message that global sends
%% after a disconnect of ours may do it. Even on a busy machine the first handshake gets its time.
-module(meshx_bench_pair).

-export([prepare/1, options/3, unnamed/3, start/1, open/3, another/2, close/1, stop/1]).
-export([call/3, other/1, os_pids/1, sidecars/1, connect/1, reconnects/2, timed/4]).
-export_type([pair/0]).

-type pair() :: #{
    config := meshx_bench:config(),
    carrier := meshx_bench:carrier(),
    names := [atom()],
    %% as meshx_ct has them, which knows nothing of names given later
    nodes := [meshx_ct:test_node()]
}.
%% For carrier direct: where a node listens, and where it finds others.
-type addresses() :: #{port => inet:port_number(), upstreams => [{node(), inet:port_number()}]}.

-define(STOP_AT_ONCE, 4).

%% Once for all pairs: an epmd, and certificates.
-spec prepare(meshx_bench:config()) -> meshx_bench:config().
prepare(Config) ->
    [{epmd_port, start_epmd()}, {tls_options, meshx_bench_tls:options_file(temporary(""))} | Config].

start_epmd() ->
    Number = meshx_ct_agent:free_port(),
    _ = meshx_bench_program:start(
        ["epmd", "-port", integer_to_list(Number)], [], temporary("epmd.log")
    ),
    meshx_ct:wait("epmd", fun() ->
        case gen_tcp:connect({127, 0, 0, 1}, Number, []) of
            {ok, Socket} -> gen_tcp:close(Socket) =:= ok;
            {error, _} -> false
        end
    end),
    Number.

temporary(Name) ->
    filename:join(os:getenv("TMPDIR", "/tmp"), Name).

%% Options of one VM.
-spec options(meshx_bench:config(), meshx_bench:carrier(), addresses()) -> meshx_ct:options().
options(Config, Carrier, Addresses) ->
    {Module, Arguments, Environment} = carrier(Config, Carrier, Addresses),
    #{
        scope => suite,
        carrier => Module,
        args => ["-kernel", "dist_auto_connect", "never", "-kernel", "net_setuptime", "60" | Arguments],
        env => Environment
    }.

carrier(Config, inet_tcp, _) ->
    {"inet_tcp", [], epmd(Config)};
carrier(Config, inet_tls, _) ->
    {"inet_tls", ["-ssl_dist_optfile", proplists:get_value(tls_options, Config)], epmd(Config)};
carrier(_Config, sidecars, _) ->
    {"meshx_node", [], []};
carrier(_Config, direct, Addresses) ->
    Listen = [
        Argument
     || #{port := Port} <- [Addresses],
        Key <- ["inet_dist_listen_min", "inet_dist_listen_max"],
        Argument <- ["-kernel", Key, integer_to_list(Port)]
    ],
    Upstreams = [
        lists:concat([Node, "=127.0.0.1:", Port])
     || {Node, Port} <- maps:get(upstreams, Addresses, [])
    ],
    {"meshx_node", ["-meshx_node", "sidecar_command", "none" | Listen], [
        {"MESHX_UPSTREAMS", lists:flatten(lists:join(" ", Upstreams))} || Upstreams =/= []
    ]}.

epmd(Config) ->
    [{"ERL_EPMD_PORT", integer_to_list(proplists:get_value(epmd_port, Config))}].

%% Two VMs on the carrier, without names yet. Part makes the names of this pair its own.
-spec unnamed(meshx_bench:config(), meshx_bench:carrier(), Part :: pos_integer()) -> pair().
unnamed(Config, Carrier, Part) ->
    [One, Two] = Names = [list_to_atom(lists:concat([Name, "_", Carrier, "_", Part])) || Name <- [one, two]],
    [Port1, Port2] = [meshx_ct_agent:free_port() || _ <- Names],
    Addresses = [
        #{port => Port1, upstreams => [{meshx_ct:node_name(Two), Port2}]},
        #{port => Port2, upstreams => [{meshx_ct:node_name(One), Port1}]}
    ],
    Nodes = [meshx_ct:vm(Config, options(Config, Carrier, Of)) || Of <- Addresses],
    #{config => Config, carrier => Carrier, names => Names, nodes => Nodes}.

%% Gives both their names; returns how many milliseconds each has needed for it.
-spec start(pair()) -> [float()].
start(#{nodes := Nodes, names := Names}) ->
    [
        case timed(Node, net_kernel, start, [[Name, shortnames]]) of
            {Time, {ok, _}} -> Time;
            {_, Error} -> error({start, Name, Error})
        end
     || {Node, Name} <- lists:zip(Nodes, Names)
    ].

%% Two new nodes, connected.
-spec open(meshx_bench:config(), meshx_bench:carrier(), Part :: pos_integer()) -> pair().
open(Config, Carrier, Part) ->
    Pair = unnamed(Config, Carrier, Part),
    _ = start(Pair),
    _ = connect(Pair),
    Pair.

%% A pair like this one, for what needs nodes that have done nothing else yet.
-spec another(pair(), fun((pair()) -> Result)) -> Result.
another(#{config := Config, carrier := Carrier}, Fun) ->
    Pair = open(Config, Carrier, erlang:unique_integer([positive])),
    Result = Fun(Pair),
    close(Pair),
    Result.

-spec close(pair()) -> ok.
close(#{nodes := Nodes}) ->
    stop(Nodes).

%% Some at once; returns when all are gone.
-spec stop([meshx_ct:test_node()]) -> ok.
stop([]) ->
    ok;
stop(Nodes) ->
    {Now, Later} = lists:split(min(?STOP_AT_ONCE, length(Nodes)), Nodes),
    lists:foreach(fun(#{peer := Peer}) -> peer:cast(Peer, init, stop, []) end, Now),
    lists:foreach(fun meshx_ct:stop/1, Now),
    stop(Later).

%% Runs a function of meshx_bench_work in the first node's VM.
-spec call(pair(), atom(), [term()]) -> term().
call(#{nodes := [One, _]}, Function, Arguments) ->
    meshx_ct:call(One, meshx_bench_work, Function, Arguments).

%% The second node.
-spec other(pair()) -> node().
other(#{names := [_, Two]}) ->
    meshx_ct:node_name(Two).

%% Of the sender's and the receiver's VM.
-spec os_pids(pair()) -> [pos_integer()].
os_pids(#{nodes := Nodes}) ->
    [meshx_ct_proc:pid(Process) || #{process := Process} <- Nodes].

%% Of the sidecars, where there are any.
-spec sidecars(pair()) -> [pos_integer()].
sidecars(#{carrier := sidecars, nodes := Nodes}) ->
    [meshx_ct_proc:pid(meshx_ct:sidecar(Node)) || Node <- Nodes];
sidecars(_) ->
    [].

%% Milliseconds until the first node is connected to the second.
-spec connect(pair()) -> float().
connect(#{nodes := [One, _], carrier := Carrier} = Pair) ->
    case timed(One, net_kernel, connect_node, [other(Pair)]) of
        {Time, true} -> Time;
        {_, Result} -> error({connect, Carrier, Result, meshx_ct:lines(One, 0)})
    end.

%% The same Count times, each after a disconnect.
-spec reconnects(pair(), Count :: pos_integer()) -> [float()].
reconnects(Pair, Count) ->
    [
        begin
            disconnect(Pair),
            connect(Pair)
        end
     || _ <- lists:seq(1, Count)
    ].

%% Both net_kernels have seen it when this returns; nodes/0 is empty a little earlier.
disconnect(#{nodes := [One, _] = Nodes} = Pair) ->
    true = meshx_ct:call(One, erlang, disconnect_node, [other(Pair)]),
    meshx_ct:wait("the end of the link", fun() ->
        lists:all(fun(Node) -> meshx_ct:call(Node, ets, tab2list, [sys_dist]) =:= [] end, Nodes)
    end).

%% {Milliseconds, Result}, the time taken in the VM.
-spec timed(meshx_ct:test_node(), module(), atom(), [term()]) -> {float(), term()}.
timed(Node, Module, Function, Arguments) ->
    {Time, Result} = meshx_ct:call(Node, timer, tc, [Module, Function, Arguments]),
    {Time / 1000, Result}.
