%% What processes on two nodes see of the link between them: it is any Erlang distribution.
-module(meshx_node_link_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(KIB, 1024).
-define(MIB, 1048576).

all() ->
    [
        first_connect_right_after_the_start,
        simultaneous_connects,
        rpc_and_erpc,
        spawned_there,
        registered_names,
        exit_reasons_by_link_and_monitor,
        exit_signals,
        messages_of_all_sizes,
        many_small_messages_in_order,
        big_terms,
        bulk_both_ways_at_once,
        slow_reader_holds_the_sender_and_loses_nothing,
        counters,
        socket_options,
        idle_link_stays_up,
        frozen_peer_is_noticed,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = meshx_ct:start_all(Config1, [a, b]),
    [{a, A}, {b, B} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

%% A case does not depend on what the one before has done to the link.
init_per_testcase(_, Config) ->
    {A, B} = pair(Config),
    ?assert(meshx_ct:connect(A, B)),
    Config.

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

pair(Config) ->
    {proplists:get_value(a, Config), proplists:get_value(b, Config)}.

%% Runs Fun(Other) on each of the two nodes, one after the other.
both(Config, Fun) ->
    {#{node := NameA} = A, #{node := NameB} = B} = pair(Config),
    [meshx_ct:call(On, fun() -> Fun(Other) end) || {On, Other} <- [{A, NameB}, {B, NameA}]].

%% The same at the same time.
both_at_once(Config, Fun) ->
    {#{node := NameA} = A, #{node := NameB} = B} = pair(Config),
    meshx_ct:at_once([fun() -> meshx_ct:call(A, fun() -> Fun(NameB) end) end,
             fun() -> meshx_ct:call(B, fun() -> Fun(NameA) end) end]).

%%% Connecting

first_connect_right_after_the_start(Config) ->
    Vms = [meshx_ct:vm(Config, #{}) || _ <- [fresh1, fresh2]],
    [One, Two] = meshx_ct:at_once([
        fun() -> meshx_ct:net_start(Vm, Name) end
     || {Vm, Name} <- lists:zip(Vms, [fresh1, fresh2])
    ]),
    ?assert(meshx_ct:connect(One, Two)),
    %% The one that was dialled may know it a moment later; a message settles it.
    ?assertEqual(pong, meshx_ct:call(One, net_adm, ping, [maps:get(node, Two)])),
    ?assertEqual([maps:get(node, One)], meshx_ct:call(Two, erlang, nodes, [])),
    ?assert(meshx_ct:connect(Two, One)),
    ?assertEqual([], meshx_ct:own_lines(One, 0)),
    ?assertEqual([], meshx_ct:own_lines(Two, 0)).

%% In each round one of the two connections is given up, after its first packet is on the way
%% through two sidecars. When it arrives in the next round, after the disconnect, net_kernel may
%% take it for the new one, and so a connect may now and then be false; the next one is true.
simultaneous_connects(Config) ->
    {A, B} = pair(Config),
    [meshx_ct:auto_connect(Node, never) || Node <- [A, B]],
    Connects = [fun() -> meshx_ct:connect(A, B) end, fun() -> meshx_ct:connect(B, A) end],
    Rounds = [
        begin
            disconnect(A, B),
            Result = meshx_ct:at_once(Connects),
            [?assertEqual({Round, true}, {Round, Connect()}) || Connect <- Connects],
            ?assertEqual(pong, meshx_ct:call(A, net_adm, ping, [maps:get(node, B)])),
            ?assertEqual([maps:get(node, B)], meshx_ct:call(A, erlang, nodes, [])),
            ?assertEqual([maps:get(node, A)], meshx_ct:call(B, erlang, nodes, [])),
            Result
        end
     || Round <- lists:seq(1, 20)
    ],
    [meshx_ct:auto_connect(Node, always) || Node <- [A, B]],
    ?assert(length([ok || [true, true] <- Rounds]) >= 15).

disconnect(A, #{node := B} = NodeB) ->
    _ = meshx_ct:call(A, erlang, disconnect_node, [B]),
    [
        meshx_ct:wait("the link's end", fun() -> meshx_ct:call(Node, erlang, nodes, []) =:= [] end)
     || Node <- [A, NodeB]
    ].

%%% Processes

rpc_and_erpc(Config) ->
    both(Config, fun(Other) ->
        Other = rpc:call(Other, erlang, node, []),
        {badrpc, {'EXIT', {oops, _}}} = rpc:call(Other, erlang, error, [oops]),
        Other = erpc:call(Other, fun() -> node() end),
        ?assertError({exception, oops, _}, erpc:call(Other, fun() -> error(oops) end)),
        [{ok, Other}, {ok, Here}] = erpc:multicall([Other, node()], fun() -> node() end),
        Here = node(),
        ?assertError({erpc, timeout}, erpc:call(Other, timer, sleep, [60000], 50))
    end).

spawned_there(Config) ->
    both(Config, fun(Other) ->
        Self = self(),
        Plain = spawn(Other, erlang, send, [Self, plain]),
        ok = receive plain -> ok after 10000 -> timeout end,
        Other = node(Plain),
        {Monitored, Monitor} = spawn_monitor(Other, fun() -> exit({done, node()}) end),
        Other = node(Monitored),
        {done, Other} = receive {'DOWN', Monitor, process, Monitored, Reason} -> Reason after 10000 -> timeout end,
        Request = spawn_request(Other, fun() -> ok end, [monitor]),
        ok = receive {spawn_reply, Request, ok, _} -> ok after 10000 -> timeout end
    end).

registered_names(Config) ->
    both(Config, fun(Other) ->
        Self = self(),
        Name = meshx_ct_named,
        Pid = spawn(Other, fun() ->
            register(Name, self()),
            Self ! registered,
            receive {From, hello} -> From ! {node(), hello} end
        end),
        receive registered -> ok end,
        Pid = erpc:call(Other, erlang, whereis, [Name]),
        Monitor = monitor(process, {Name, Other}),
        {Name, Other} ! {self(), hello},
        ok = receive {Other, hello} -> ok after 10000 -> timeout end,
        normal = receive {'DOWN', Monitor, process, {Name, Other}, Reason} -> Reason after 10000 -> timeout end
    end).

exit_reasons_by_link_and_monitor(Config) ->
    Reasons = [normal, shutdown, {shutdown, {some, [term]}}, killed, lists:duplicate(1000, <<"big">>)],
    both(Config, fun(Other) ->
        process_flag(trap_exit, true),
        [
            begin
                Pid = spawn_link(Other, fun() -> receive go -> exit(Reason) end end),
                Monitor = monitor(process, Pid),
                Pid ! go,
                Reason = receive {'EXIT', Pid, ByLink} -> ByLink after 10000 -> timeout end,
                Reason = receive {'DOWN', Monitor, process, Pid, ByMonitor} -> ByMonitor after 10000 -> timeout end
            end
         || Reason <- Reasons
        ],
        process_flag(trap_exit, false)
    end).

exit_signals(Config) ->
    both(Config, fun(Other) ->
        {Killed, Monitor1} = spawn_monitor(Other, timer, sleep, [infinity]),
        exit(Killed, kill),
        killed = receive {'DOWN', Monitor1, process, Killed, R1} -> R1 after 10000 -> timeout end,
        %% A linked process takes the other with it.
        {Linked, Monitor2} = spawn_monitor(fun() ->
            spawn_link(Other, fun() -> exit(with_it) end),
            receive never -> ok end
        end),
        with_it = receive {'DOWN', Monitor2, process, Linked, R2} -> R2 after 10000 -> timeout end
    end).

%%% Data

messages_of_all_sizes(Config) ->
    Sizes = [0, 1, ?KIB, 64 * ?KIB - 1, 64 * ?KIB, 64 * ?KIB + 1, ?MIB, 64 * ?MIB],
    both(Config, fun(Other) ->
        Source = iolist_to_binary([meshx_ct_there:chunk(N) || N <- lists:seq(1, 64)]),
        [
            begin
                Binary = binary:part(Source, 0, Size),
                Hash = erlang:md5(Binary),
                {Size, Hash, Back} = erpc:call(Other, fun() -> {byte_size(Binary), erlang:md5(Binary), Binary} end),
                Hash = erlang:md5(Back)
            end
         || Size <- Sizes
        ]
    end).

many_small_messages_in_order(Config) ->
    both_at_once(Config, fun(Other) ->
        Last = 100000,
        Counter = spawn(Other, meshx_ct_there, counted, [self(), Last]),
        Monitor = monitor(process, Counter),
        meshx_ct_there:count_up(Counter, Last),
        ok =
            receive
                {Counter, counted} -> ok;
                {'DOWN', Monitor, process, Counter, Reason} -> Reason
            after 60000 -> timeout
            end
    end).

big_terms(Config) ->
    both(Config, fun(Other) ->
        Atoms = [list_to_atom(lists:concat(["meshx_ct_atom_", N])) || N <- lists:seq(1, 3000)],
        Map = maps:from_list([{Atom, {make_ref(), self(), 1.5, 1 bsl 500, <<5:3>>}} || Atom <- Atoms]),
        Add = fun(N) -> N + map_size(Map) end,
        Term = {Map, Add, fun lists:map/2, [{N, [N, "text", {N}]} || N <- lists:seq(1, 200000)], Atoms},
        {Hash, Back, Sum} = erpc:call(Other, fun() -> {erlang:phash2(Term), Term, Add(1)} end),
        Hash = erlang:phash2(Term),
        true = Back =:= Term,
        3001 = Sum
    end).

bulk_both_ways_at_once(Config) ->
    both_at_once(Config, fun(Other) ->
        Chunks = 128,
        Reader = spawn(Other, meshx_ct_there, receive_chunks, [self(), Chunks]),
        Monitor = monitor(process, Reader),
        meshx_ct_there:send_chunks(Reader, Chunks),
        ok =
            receive
                {Reader, all_chunks} -> ok;
                {'DOWN', Monitor, process, Reader, Reason} -> Reason
            after 60000 -> timeout
            end
    end).

%% B's input process is suspended, so the sockets fill up and A's sender is suspended too: what
%% it sends must not pile up in A. Then all arrives.
slow_reader_holds_the_sender_and_loses_nothing(Config) ->
    {#{node := NameA} = A, #{node := NameB} = B} = pair(Config),
    Chunks = 256,
    %% Spawning there waits for an answer, so it comes before.
    Reader = meshx_ct:call(A, fun() ->
        Caller = spawn(fun() -> receive never -> ok end end),
        spawn(NameB, meshx_ct_there, receive_chunks, [Caller, Chunks])
    end),
    Inputs = meshx_ct:call(B, fun inputs/0),
    ?assertMatch([_], Inputs),
    ok = meshx_ct:call(B, fun() ->
        %% Suspended by a process that lives on: its end would resume them.
        Self = self(),
        spawn(fun() ->
            register(meshx_ct_holder, self()),
            [true = erlang:suspend_process(Input) || Input <- Inputs],
            Self ! suspended,
            receive resume -> ok end
        end),
        receive suspended -> ok end
    end),
    Sender = meshx_ct:call(A, erlang, spawn, [meshx_ct_there, send_chunks, [Reader, Chunks]]),
    Status = fun() -> meshx_ct:call(A, erlang, process_info, [Sender, status]) end,
    %% Not only now and then: what is on the way is bounded.
    Held = fun() -> lists:all(fun(_) -> Status() =:= {status, suspended} end, lists:seq(1, 100)) end,
    meshx_ct:wait("the sender to stay suspended", Held),
    Done = meshx_ct:call(B, fun() ->
        Monitor = monitor(process, Reader),
        meshx_ct_holder ! resume,
        receive {'DOWN', Monitor, process, Reader, Reason} -> Reason after 60000 -> timeout end
    end),
    ?assertEqual(normal, Done),
    meshx_ct:wait("the sender's end", fun() -> Status() =:= undefined end),
    ?assertEqual([NameA], meshx_ct:call(B, erlang, nodes, [])).

%% The input processes of all links of a node.
inputs() ->
    Input = {initial_call, {meshx_node_traffic, input, 3}},
    [Pid || Pid <- processes(), process_info(Pid, initial_call) =:= Input].

%%% What net_kernel tells

counters(Config) ->
    both(Config, fun(Other) ->
        {ok, Before} = net_kernel:node_info(Other),
        [Other = erpc:call(Other, erlang, node, []) || _ <- lists:seq(1, 50)],
        {ok, After} = net_kernel:node_info(Other),
        [true = proplists:get_value(Key, After) >= proplists:get_value(Key, Before) + 50 || Key <- [in, out]],
        {net_address, {Ip, _}, Host, meshx, inet} = proplists:get_value(address, After),
        {127, 0, 0, 1} = Ip,
        [_, Host] = string:split(atom_to_list(Other), "@"),
        up = proplists:get_value(state, After),
        normal = proplists:get_value(type, After)
    end).

socket_options(Config) ->
    both(Config, fun(Other) ->
        {ok, [{nodelay, true}]} = inet_of(Other, [nodelay]),
        ok = net_kernel:setopts(Other, [{nodelay, false}, {keepalive, true}]),
        {ok, [{nodelay, false}, {keepalive, true}]} = inet_of(Other, [nodelay, keepalive]),
        ok = net_kernel:setopts(Other, [{nodelay, true}]),
        {ok, [{nodelay, true}]} = inet_of(Other, [nodelay]),
        {error, {badopts, [{active, false}]}} = net_kernel:setopts(Other, [{active, false}]),
        {ok, [{sndbuf, Size}]} = inet_of(Other, [sndbuf]),
        true = Size > 0,
        Other = erpc:call(Other, erlang, node, [])
    end).

inet_of(Other, Names) ->
    net_kernel:getopts(Other, Names).

%%% Ticks

idle_link_stays_up(Config) ->
    [One, #{node := Two}] = ticking(Config),
    %% More than two tick times without traffic of ours: here time is what is tested.
    timer:sleep(9000),
    ?assertEqual([], meshx_ct:call(One, meshx_ct_there, seen, [])),
    ?assertEqual([Two], meshx_ct:call(One, erlang, nodes, [])).

frozen_peer_is_noticed(Config) ->
    [One, #{node := Name, process := Process}] = ticking(Config),
    meshx_ct_proc:signal(Process, "STOP"),
    Down = fun() -> lists:member({nodedown, Name}, meshx_ct:call(One, meshx_ct_there, seen, [])) end,
    try
        meshx_ct:wait("nodedown by the tick", Down, 15000)
    after
        meshx_ct_proc:signal(Process, "CONT")
    end.

ticking(Config) ->
    Options = #{args => ["-kernel", "net_ticktime", "4"]},
    [One, Two] = meshx_ct:at_once([fun() -> meshx_ct:start(Config, Name, Options) end || Name <- [tick1, tick2]]),
    ?assert(meshx_ct:connect(One, Two)),
    meshx_ct:call(One, meshx_ct_there, watch, [[]]),
    [One, Two].
