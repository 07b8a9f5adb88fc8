%% Nodes that connect to each other at the same time, and what global makes of links that are missing
%% between others.
-module(meshx_node_at_once_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% Rounds in which five nodes connect to each other, ten pairs at a time.
-define(ROUNDS, 40).
-define(ROUNDS_DIRECT, 60).

all() ->
    [
        all_connect_at_once,
        all_connect_at_once_without_sidecars,
        a_late_first_packet_disturbs_no_connect,
        overlapping_partitions,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

all_connect_at_once(Config) ->
    Nodes = meshx_ct:start_all(Config, [r1, r2, r3, r4, r5], #{args => ["-connect_all", "false"]}),
    ?assertEqual(#{pairs => 10 * ?ROUNDS, refused => 0}, meshx_ct_cycles:all_at_once(Nodes, ?ROUNDS)).

%% Without the proxies' delays.
all_connect_at_once_without_sidecars(Config) ->
    Ports = [{Name, meshx_ct_agent:free_port()} || Name <- [s1, s2, s3, s4, s5]],
    Dials = meshx_ct:dials([{Name, lists:concat(["127.0.0.1:", Port])} || {Name, Port} <- Ports]),
    Nodes = meshx_ct:at_once([
        fun() ->
            Arguments = ["-connect_all", "false" | meshx_ct:listens_at(Port) ++ Dials],
            meshx_ct:start(Config, Name, #{args => Arguments})
        end
     || {Name, Port} <- Ports
    ]),
    ?assertEqual(
        #{pairs => 10 * ?ROUNDS_DIRECT, refused => 0}, meshx_ct_cycles:all_at_once(Nodes, ?ROUNDS_DIRECT)
    ).

%% As one comes when both have connected at once, and the other connection is given up: net_kernel of
%% the node with the lesser name would give up its own for it.
a_late_first_packet_disturbs_no_connect(Config) ->
    Options = #{args => ["-kernel", "dist_auto_connect", "never"]},
    [A, #{node := NameB} = B] = meshx_ct:start_all(Config, [a, b], Options),
    Name = atom_to_binary(NameB),
    Packet = <<$N, 16#d07df7fbd:64, 77:32, (byte_size(Name)):16, Name/binary>>,
    {ok, Port} = meshx_ct:call(A, meshx_node, info, [listen_port]),
    Self = self(),
    #{process := Process} = B,
    meshx_ct_proc:signal(Process, "STOP"),
    Dialler = spawn_link(fun() -> Self ! {self(), meshx_ct:connect(A, B)} end),
    try
        meshx_ct:wait("A to dial", fun() -> meshx_ct:call(A, ets, member, [sys_dist, NameB]) end),
        meshx_ct:call(A, fun() ->
            Before = accepted(),
            {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, [{packet, 2}]),
            Controller = accepted_since(Before),
            Monitor = monitor(process, Controller),
            true = erlang:suspend_process(Controller),
            ok = gen_tcp:send(Socket, Packet),
            ok = gen_tcp:close(Socket),
            true = erlang:resume_process(Controller),
            receive
                {'DOWN', Monitor, process, _, _} -> ok
            end
        end)
    after
        meshx_ct_proc:signal(Process, "CONT")
    end,
    receive
        {Dialler, Connected} -> ?assert(Connected)
    end.

%% Controllers of the connections that were accepted.
accepted() ->
    Accepted = {initial_call, {meshx_node_ctrl, init_accepted, 2}},
    [Pid || Pid <- processes(), process_info(Pid, initial_call) =:= Accepted].

accepted_since(Before) ->
    case accepted() -- Before of
        [Controller] -> Controller;
        [] -> erlang:yield(), accepted_since(Before)
    end.

%% By default global disconnects a node from one that has lost another one.
overlapping_partitions(Config) ->
    Cluster = fun(Names, Arguments) ->
        [One, Two, Three] = Nodes = meshx_ct:start_all(Config, Names, #{args => Arguments}),
        [?assert(meshx_ct:connect(One, Other)) || Other <- [Two, Three]],
        meshx_ct:wait("full mesh", fun() -> [length(meshx_ct:call(Node, erlang, nodes, [])) || Node <- Nodes] =:= [2, 2, 2] end),
        %% What global has to do for that is done.
        [meshx_ct:call(Node, global, sync, []) || Node <- Nodes],
        true = meshx_ct:call(One, erlang, disconnect_node, [maps:get(node, Two)]),
        Nodes
    end,
    [[P1, P2, P3], [Q1, Q2, Q3]] = meshx_ct:at_once([
        fun() -> Cluster([p1, p2, p3], []) end,
        fun() -> Cluster([q1, q2, q3], ["-kernel", "prevent_overlapping_partitions", "false"]) end
    ]),
    meshx_ct:wait("global to disconnect", fun() ->
        lists:any(fun(Node) -> meshx_ct:has_line(Node, 0, "prevent overlapping partitions") end, [P1, P2, P3])
    end),
    meshx_ct:wait("no overlapping partitions", fun() -> not overlap([P1, P2, P3]) end),
    meshx_ct:wait("two partitions", fun() -> meshx_ct:call(Q2, erlang, nodes, []) =:= [maps:get(node, Q3)] end),
    ?assertEqual([maps:get(node, Q3)], meshx_ct:call(Q1, erlang, nodes, [])),
    ?assert(overlap([Q1, Q2, Q3])).

%% Whether one of three nodes has links to two that have none between them.
overlap(Nodes) ->
    Links = [length(meshx_ct:call(Node, erlang, nodes, [])) || Node <- Nodes],
    lists:sort(Links) =:= [1, 1, 2].
