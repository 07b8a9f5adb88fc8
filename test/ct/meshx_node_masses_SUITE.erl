%% Strangers of our own user, in masses: however many come and whatever they do, the node spends a
%% bounded amount of everything on them, links go on, and nodes can still connect. And what a node
%% does that has no descriptor left.
-module(meshx_node_masses_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% As in meshx_node_acceptor.
-define(HALF_OPEN_MAX, 512).
-define(NEW_NAMES, 1000).
%% As in meshx_node_mesh.
-define(ACCEPTS_MAX, 256).

%% Beside the strangers' descriptors, the VM's own.
-define(OTHER_DESCRIPTORS, 300).

all() ->
    [
        ten_thousand_of_all_kinds,
        handshakes_are_begun_and_left,
        questions_of_accepted_connections_are_bounded,
        descriptors_run_out,
        processes_run_out,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = meshx_ct:start_all(Config1, [a, b], (apart())#{scope => suite}),
    ?assert(meshx_ct:connect(B, A)),
    meshx_ct:call(A, meshx_ct_there, watch, [[]]),
    [{a, A}, {b, B} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(_, Config) -> Config.

end_per_testcase(nothing_is_left, Config) ->
    meshx_ct:end_case(Config);
end_per_testcase(_, Config) ->
    case link_to_b(Config) of
        up -> meshx_ct:end_case(Config);
        Other -> {fail, Other}
    end.

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%% Otherwise global, when a third node disconnects from one of two, may disconnect these.
apart() ->
    #{args => ["-connect_all", "false"]}.

%% The link between b and a is the one it was.
link_to_b(Config) ->
    #{node := NameB} = proplists:get_value(b, Config),
    A = proplists:get_value(a, Config),
    Seen = [Event || {_, Node} = Event <- meshx_ct:call(A, meshx_ct_there, seen, []), Node =:= NameB],
    case {Seen, meshx_ct:call(A, erpc, call, [NameB, erlang, node, []])} of
        {[], NameB} -> up;
        Other -> Other
    end.

listen_port(Node) ->
    {ok, Port} = meshx_ct:call(Node, meshx_node, info, [listen_port]),
    Port.

%%% The strangers: a VM of their own, with as many descriptors as we may have.

with_strangers(Fun) ->
    {ok, Peer, _} = peer:start(#{
        connection => standard_io,
        exec => {"/bin/sh", ["-c", "ulimit -Sn $(ulimit -Hn); exec erl \"$@\"", "erl"]},
        args => ["-pa", filename:dirname(code:which(?MODULE))]
    }),
    try
        Fun(Peer)
    after
        peer:stop(Peer)
    end.

%% How many we can be.
strangers(Peer, Wanted) ->
    Limit = peer:call(Peer, ?MODULE, descriptor_limit, []),
    min(Wanted, Limit - ?OTHER_DESCRIPTORS).

descriptor_limit() ->
    list_to_integer(string:trim(os:cmd("ulimit -Sn | sed s/unlimited/1000000/"))).

%% Starts them; each connects, does what its number says, and connects again when it is dropped.
crowd(Port, Count, Behaviours) ->
    Connects = counters:new(1, []),
    persistent_term:put(?MODULE, Connects),
    [
        spawn(fun() -> stranger(Port, lists:nth(N rem length(Behaviours) + 1, Behaviours), Connects) end)
     || N <- lists:seq(1, Count)
    ],
    ok.

connects() ->
    counters:get(persistent_term:get(?MODULE), 1).

stranger(Port, Behaviour, Connects) ->
    case gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, true}], 20000) of
        {ok, Socket} ->
            counters:add(Connects, 1, 1),
            behave(Socket, Behaviour);
        {error, _} ->
            ok
    end,
    timer:sleep(500 + rand:uniform(1000)),
    stranger(Port, Behaviour, Connects).

behave(Socket, silent) ->
    until_dropped(Socket);
behave(Socket, random) ->
    _ = gen_tcp:send(Socket, rand:bytes(1 + rand:uniform(200))),
    until_dropped(Socket);
behave(Socket, liar) ->
    _ = gen_tcp:send(Socket, lists:nth(rand:uniform(4), [<<255, 255>>, <<16, 0, $N>>, <<0, 200, $N>>, <<0>>])),
    until_dropped(Socket);
behave(Socket, trickle) ->
    trickle(Socket, <<0, 40, $N, 0:600>>);
behave(Socket, node) ->
    Name = iolist_to_binary(io_lib:format("stranger~b@host", [rand:uniform(1 bsl 60)])),
    Packet = <<$N, 16#d07df7fbd:64, 77:32, (byte_size(Name)):16, Name/binary>>,
    _ = gen_tcp:send(Socket, <<(byte_size(Packet)):16, Packet/binary>>),
    until_dropped(Socket).

trickle(Socket, <<Byte, Rest/binary>>) ->
    _ = gen_tcp:send(Socket, <<Byte>>),
    receive
        {tcp_closed, Socket} -> ok;
        {tcp_error, Socket, _} -> gen_tcp:close(Socket)
    after 1000 -> trickle(Socket, Rest)
    end.

until_dropped(Socket) ->
    receive
        {tcp_closed, Socket} -> ok;
        {tcp_error, Socket, _} -> gen_tcp:close(Socket);
        {tcp, Socket, _} -> until_dropped(Socket)
    end.

assert_bounded(Before, Now) ->
    Grown = maps:map(fun(Key, Value) -> Value - maps:get(Key, Before) end, Now),
    ct:log("grown by ~0p", [Grown]),
    ?assert(maps:get(processes, Grown) =< 3 * ?HALF_OPEN_MAX + 150),
    ?assert(maps:get(descriptors, Grown) =< ?HALF_OPEN_MAX + 150),
    ?assert(maps:get(atoms, Grown) =< ?NEW_NAMES + 200),
    ?assert(maps:get(memory, Grown) =< 64 * 1024 * 1024).

as_before(A, Before) ->
    Waited = maps:with([processes, descriptors], Before),
    ?assertEqual([], meshx_ct_resources:returns(A, Waited, 30000)).

%%% Cases

ten_thousand_of_all_kinds(Config) ->
    A = proplists:get_value(a, Config),
    Late = meshx_ct:start(Config, late, apart()),
    Before = meshx_ct_resources:taken(A),
    with_strangers(fun(Peer) ->
        Count = strangers(Peer, 10000),
        ct:comment("~b strangers", [Count]),
        ok = peer:call(Peer, ?MODULE, crowd, [listen_port(A), Count, [silent, trickle, random, liar]], 60000),
        meshx_ct:wait("masses", fun() -> peer:call(Peer, ?MODULE, connects, []) >= Count end, 30000),
        [
            begin
                %% A slow handshake may be dropped at its end: then it's not there to be disconnected.
                meshx_ct:wait(
                    "a new link",
                    fun() ->
                        meshx_ct:connect(Late, A) andalso
                            meshx_ct:call(Late, erlang, disconnect_node, [maps:get(node, A)])
                    end,
                    30000
                ),
                ?assertEqual(up, link_to_b(Config)),
                assert_bounded(Before, meshx_ct_resources:taken(A))
            end
         || _ <- lists:seq(1, 5)
        ]
    end),
    as_before(A, Before).

%% They say a name, a new one each time, and nothing more. A node whose name is known comes through.
handshakes_are_begun_and_left(Config) ->
    A = proplists:get_value(a, Config),
    Late = meshx_ct:start(Config, later, apart()),
    ?assert(meshx_ct:connect(Late, A)),
    ?assert(meshx_ct:call(Late, erlang, disconnect_node, [maps:get(node, A)])),
    Before = meshx_ct_resources:taken(A),
    Mark = meshx_ct:mark(A),
    with_strangers(fun(Peer) ->
        Count = strangers(Peer, 2000),
        ok = peer:call(Peer, ?MODULE, crowd, [listen_port(A), Count, [node]], 60000),
        meshx_ct:wait(
            "refused names",
            fun() -> meshx_ct:has_line(A, Mark, "new node names") end,
            30000
        ),
        assert_bounded(Before, meshx_ct_resources:taken(A)),
        meshx_ct:wait("a new link", fun() -> meshx_ct:connect(Late, A) end, 30000),
        ?assertEqual(up, link_to_b(Config))
    end),
    meshx_ct:stop(Late),
    as_before(A, Before).

%% While the agent is silent, so many questions wait for it and no more. What else is asked is none
%% of these.
questions_of_accepted_connections_are_bounded(Config) ->
    %% A node that has a link knows the intentions, and needs not ask.
    Unlinked = meshx_ct:start(Config, unlinked, apart()),
    #{node := NameB} = proplists:get_value(b, Config),
    #{process := Agent} = proplists:get_value(agent, Config),
    Waiting = fun(Askers) -> length([Pid || Pid <- Askers, meshx_ct:call(Unlinked, erlang, is_process_alive, [Pid])]) end,
    meshx_ct_proc:signal(Agent, "STOP"),
    Accepts = meshx_ct:call(Unlinked, ?MODULE, ask, [NameB, {accept, 0}, ?ACCEPTS_MAX + 100]),
    Others = meshx_ct:call(Unlinked, ?MODULE, ask, [NameB, ask, 100]),
    try
        meshx_ct:wait("the refusals", fun() -> Waiting(Accepts) =:= ?ACCEPTS_MAX end),
        ?assertEqual(100, Waiting(Others))
    after
        meshx_ct_proc:signal(Agent, "CONT")
    end,
    meshx_ct:wait("the answers", fun() -> Waiting(Accepts ++ Others) =:= 0 end),
    Again = meshx_ct:call(Unlinked, ?MODULE, ask, [NameB, {accept, 0}, 1]),
    meshx_ct:wait("an answer", fun() -> Waiting(Again) =:= 0 end).

ask(Node, Mode, Count) ->
    Ask = fun() -> gen_server:call(meshx_node_mesh, {upstream, Node, Mode}, infinity) end,
    [spawn(Ask) || _ <- lists:seq(1, Count)].

%% One line says it, the node goes on, and what waits is accepted when there are descriptors again.
descriptors_run_out(Config) ->
    [Poor, Rich] = meshx_ct:start_all(Config, [poor, rich], #{}),
    B = #{node := NameB} = proplists:get_value(b, Config),
    ?assert(meshx_ct:connect(B, Poor)),
    Port = listen_port(Poor),
    Mark = meshx_ct:mark(Poor),
    limit_descriptors(Poor, 20),
    Sockets = [
        begin
            {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, [binary]),
            Socket
        end
     || _ <- lists:seq(1, 60)
    ],
    meshx_ct:wait("the line", fun() -> meshx_ct:has_line(Poor, Mark, "too many open files.*ulimit -n") end),
    ?assertEqual(NameB, meshx_ct:call(Poor, erpc, call, [NameB, erlang, node, []])),
    %% No busy loop.
    Acceptor = meshx_ct:call(Poor, fun acceptor/0),
    Reductions = fun() -> element(2, meshx_ct:call(Poor, erlang, process_info, [Acceptor, reductions])) end,
    First = Reductions(),
    timer:sleep(2000),
    ?assert(Reductions() - First < 100000),
    ?assertEqual(Acceptor, meshx_ct:call(Poor, fun acceptor/0)),
    %% Nor can it dial, and says why.
    ?assertEqual(false, meshx_ct:connect(Poor, Rich)),
    meshx_ct:wait("why", fun() -> meshx_ct:has_line(Poor, Mark, "no link to rich@") end),
    Own = meshx_ct:own_lines(Poor, Mark),
    ct:log("~p", [Own]),
    ?assertEqual(1, length([Line || Line <- Own, re:run(Line, "can't accept") =/= nomatch])),
    ?assert(length(Own) =< 5),
    [gen_tcp:close(Socket) || Socket <- Sockets],
    meshx_ct:wait("a link", fun() -> meshx_ct:connect(Rich, Poor) end, 30000),
    ?assertEqual(NameB, meshx_ct:call(Poor, erpc, call, [NameB, erlang, node, []])).

%% For two seconds the node can't start a process: a link that is up goes on, net_kernel too.
processes_run_out(Config) ->
    Crowded = meshx_ct:start(Config, crowded, #{args => ["+P", "1024"]}),
    B = #{node := NameB} = proplists:get_value(b, Config),
    ?assert(meshx_ct:connect(B, Crowded)),
    Port = listen_port(Crowded),
    Mark = meshx_ct:mark(Crowded),
    meshx_ct:call(Crowded, meshx_ct_there, watch, [[]]),
    NetKernel = meshx_ct:call(Crowded, erlang, whereis, [net_kernel]),
    _ = meshx_ct:call(Crowded, erlang, spawn, [?MODULE, fill_processes, [500, 2000]]),
    timer:sleep(1000),
    %% Not closed before it has looked whose they are.
    Sockets = [
        begin
            {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, false}]),
            ok = gen_tcp:send(Socket, <<0, 20, $N, 16#d07df7fbd:64, 77:32, 5:16, "n@hst">>),
            Socket
        end
     || _ <- lists:seq(1, 20)
    ],
    %% Asking it anything takes a process.
    timer:sleep(2500),
    meshx_ct:wait("the line", fun() -> meshx_ct:has_line(Crowded, Mark, "too many processes.*\\+P") end),
    [gen_tcp:close(Socket) || Socket <- Sockets],
    ?assertEqual(NetKernel, meshx_ct:call(Crowded, erlang, whereis, [net_kernel])),
    ?assertEqual([], [Event || {nodedown, _} = Event <- meshx_ct:call(Crowded, meshx_ct_there, seen, [])]),
    ?assertEqual(NameB, meshx_ct:call(Crowded, erpc, call, [NameB, erlang, node, []])),
    ?assert(meshx_ct:connect(proplists:get_value(a, Config), Crowded)).

fill_processes(After, Time) ->
    timer:sleep(After),
    process_flag(priority, max),
    Filled = fill([]),
    receive
    after Time -> [exit(Pid, kill) || Pid <- Filled]
    end.

fill(Pids) ->
    try spawn(fun() -> receive after infinity -> ok end end) of
        Pid -> fill([Pid | Pids])
    catch
        error:system_limit -> Pids
    end.

%% The node may open so many more.
limit_descriptors(#{process := Process} = Node, More) ->
    {ok, Open} = meshx_ct:call(Node, file, list_dir, ["/proc/self/fd"]),
    Highest = lists:max([list_to_integer(Number) || Number <- Open]),
    Pid = meshx_ct_proc:pid(Process),
    "" = os:cmd(lists:concat(["prlimit --pid ", Pid, " --nofile=", Highest + More, ":"])),
    ok.

acceptor() ->
    [Acceptor] = [
        Pid
     || Pid <- processes(), {initial_call, {meshx_node_acceptor, init, 2}} =:= process_info(Pid, initial_call)
    ],
    Acceptor.
