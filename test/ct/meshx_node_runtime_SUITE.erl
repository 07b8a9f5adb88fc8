%% What net_kernel and the emulator offer for links: the same is done on inet_tcp and on our
%% carrier, and must have the same results. Nodes of both have the same names: nobody who isn't told
%% sees a difference.
-module(meshx_node_runtime_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% Seconds.
-define(TICK_TIME, 4).
%% Of node c only.
-define(SETUP_TIME, 2).

all() ->
    [
        nodes_info,
        options_of_a_link,
        options_that_cannot_be_set,
        options_of_new_links,
        ticker_spawn_options,
        reasons_of_nodedown,
        tick_time,
        wrong_cookie,
        frozen_peer_is_given_up_after_setup_time,
        dist_auto_connect_never,
        dist_auto_connect_once,
        hidden_connect,
        what_a_dropped_link_leaves,
        requests_under_way_when_a_link_drops,
        busy_dist_port
    ] ++
        [async_dist || has_async_dist()] ++
        [
            halted_peer,
            net_kernel_stop,
            init_stop_sends_what_was_sent,
            %% There is no way back to allow everyone.
            allow,
            nothing_is_left
        ].

%% OTP 25.3.
has_async_dist() ->
    try
        process_flag(async_dist, process_flag(async_dist, true)) =:= true
    catch
        error:badarg -> false
    end.

init_per_suite(Config) ->
    Port = meshx_ct_agent:free_port(),
    Config1 = [{epmd, start_epmd(Port)}, {epmd_port, Port} | meshx_ct:init_suite(Config)],
    [
        {Carrier,
            start_all(Config1, Carrier, [a, b], []) ++
                start_all(Config1, Carrier, [c], [
                    "-hidden", "-kernel", "net_setuptime", integer_to_list(?SETUP_TIME)
                ])}
     || Carrier <- carriers()
    ] ++ Config1.

end_per_suite(Config) ->
    exit(proplists:get_value(epmd, Config), kill),
    meshx_ct:end_suite(Config).

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

carriers() -> ["inet_tcp", "meshx_node"].

%% Ends with its owner, however that ends.
start_epmd(Port) ->
    Script = lists:concat(["epmd -address 127.0.0.1 -port ", Port, " >/dev/null 2>&1 & cat >/dev/null; kill $!"]),
    Owner = spawn(fun() ->
        _ = open_port({spawn_executable, "/bin/sh"}, [{args, ["-c", Script]}]),
        receive
            never -> ok
        end
    end),
    meshx_ct:wait("epmd", fun() ->
        case gen_tcp:connect({127, 0, 0, 1}, Port, []) of
            {ok, Socket} -> gen_tcp:close(Socket) =:= ok;
            {error, _} -> false
        end
    end),
    Owner.

start_all(Config, Carrier, Names, Arguments) ->
    meshx_ct:start_all(Config, Names, (options(Config, Carrier, Arguments))#{scope => suite}).

start(Config, Carrier, Name) ->
    meshx_ct:start(Config, Name, options(Config, Carrier, [])).

options(Config, Carrier, Arguments) ->
    #{
        carrier => Carrier,
        env => [{"ERL_EPMD_PORT", integer_to_list(proplists:get_value(epmd_port, Config))}],
        args => [
            "-connect_all", "false", "+zdbbl", "1",
            "-kernel", "inet_dist_use_interface", "{127,0,0,1}",
            "-kernel", "net_ticker_spawn_options", "[{min_heap_size,5000},{message_queue_data,off_heap}]"
            | Arguments
        ]
    }.

%% What Fun returns for inet_tcp's nodes a, b, and c, which is hidden, and must return for ours.
same(Config, Fun) ->
    [InetTcp, Ours] = meshx_ct:at_once([fun() -> Fun(proplists:get_value(Carrier, Config)) end || Carrier <- carriers()]),
    ?assertEqual(InetTcp, Ours),
    Ours.

ours(Config) -> proplists:get_value("meshx_node", Config).

%% Both know it when a message has come back.
linked(A, #{node := B}) ->
    true = meshx_ct:connect(A, B),
    pong = meshx_ct:call(A, net_adm, ping, [B]),
    ok.

unlinked(A, #{node := NameB} = B) ->
    _ = meshx_ct:call(A, erlang, disconnect_node, [NameB]),
    [
        meshx_ct:wait("the link's end", fun() ->
            not lists:keymember(Other, 2, meshx_ct:call(Node, ets, tab2list, [sys_dist]))
        end)
     || {Node, Other} <- [{A, NameB}, {B, maps:get(node, A)}]
    ],
    ok.

%% Collects what monitor_nodes/2 tells of nodes; told/1 has it, oldest first.
watch(Node) ->
    meshx_ct:call(Node, fun() ->
        Self = self(),
        spawn(fun() ->
            _ = whereis(?MODULE) =/= undefined andalso unregister(?MODULE),
            register(?MODULE, self()),
            ok = net_kernel:monitor_nodes(true, [nodedown_reason, {node_type, all}]),
            Self ! watched,
            collect([])
        end),
        receive
            watched -> ok
        end
    end).

collect(Seen) ->
    receive
        {From, told} ->
            From ! {told, lists:reverse(Seen)},
            collect(Seen);
        Message ->
            collect([Message | Seen])
    end.

told(Node) ->
    meshx_ct:call(Node, fun() ->
        ?MODULE ! {self(), told},
        receive
            {told, Seen} -> Seen
        end
    end).

told_of_down(Node) ->
    meshx_ct:wait("nodedown", fun() -> lists:keymember(nodedown, 1, told(Node)) end),
    told(Node).

%%% net_kernel

nodes_info(Config) ->
    Info = same(Config, fun([A, #{node := NameB} = B, C]) ->
        [linked(A, Other) || Other <- [B, C]],
        meshx_ct:call(A, fun() ->
            {ok, Nodes} = net_kernel:nodes_info(),
            {
                [
                    {Name, proplists:get_keys(Of), proplists:get_value(state, Of), proplists:get_value(type, Of)}
                 || {Name, Of} <- lists:sort(Nodes)
                ],
                [net_kernel:node_info(NameB, Key) || Key <- [state, type, nothing]],
                [net_kernel:node_info(Name) || Name <- [node(), nobody@nowhere]],
                {lists:sort(nodes()), nodes(hidden), lists:sort(nodes(connected))},
                net_kernel:get_state()
            }
        end)
    end),
    ?assertMatch({[{_, _, up, normal}, {_, _, up, hidden}], _, _, _, _}, Info).

options_of_a_link(Config) ->
    Options = [
        [],
        [{nodelay, false}],
        [{nodelay, true}, {keepalive, true}],
        [{recbuf, 100000}, {sndbuf, 100000}],
        [{priority, 3}],
        [{tos, 16}],
        [{buffer, 100000}, {high_watermark, 100000}, {delay_send, false}, {send_timeout, 1000}],
        %% Refused, and nothing set.
        [nodelay],
        [{nodelay, 1}],
        [{recbuf, large}],
        [{keepalive, false}, {nothing, 1}],
        [{ip, {127, 0, 0, 1}}],
        [{nodelay, false}, {active, false}],
        [{packet, 2}],
        [{deliver, term}]
    ],
    Names = [[nodelay, keepalive], [recbuf, sndbuf], [tos], [keepalive, nothing], [ip], [], [tclass], [nodelay, nodelay]],
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        meshx_ct:call(A, fun() ->
            Set = [{Option, net_kernel:setopts(NameB, Option)} || Option <- Options],
            Get = [{Name, net_kernel:getopts(NameB, Name)} || Name <- Names],
            Unknown = {net_kernel:setopts(nobody@nowhere, []), net_kernel:getopts(nobody@nowhere, [])},
            pong = net_adm:ping(NameB),
            {Set, Get, Unknown}
        end)
    end),
    ?assertMatch({_, [{_, {ok, [{nodelay, true}, {keepalive, true}]}} | _], {{error, noconnection}, _}}, Results).

%% inet_tcp sets some of them, cuts others, and some end its net_kernel. The link stays, and so does
%% the node's distribution.
options_that_cannot_be_set(Config) ->
    [A, #{node := NameB} = B | _] = ours(Config),
    linked(A, B),
    watch(A),
    [
        ?assertEqual({To, Option, {error, einval}}, {To, Option, meshx_ct:call(A, net_kernel, setopts, [To, [Option]])})
     || To <- [NameB, new],
        Option <- [{linger, {true, 0}}, {raw, 6, 18, <<5000:32>>}, {sndbuf, 1 bsl 40}, nodelay, binary]
    ],
    ?assertEqual([], told(A)),
    ?assertEqual({ok, undefined}, {ok, kernel_variable(A, inet_dist_connect_options)}).

kernel_variable(Node, Name) ->
    case meshx_ct:call(Node, application, get_env, [kernel, Name]) of
        {ok, Value} -> Value;
        undefined -> undefined
    end.

options_of_new_links(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        #{node := NameA} = A,
        Link = fun(From, To) ->
            unlinked(A, B),
            linked(From, To),
            [
                meshx_ct:call(Node, net_kernel, getopts, [Other, [nodelay, keepalive]])
             || {Node, Other} <- [{A, NameB}, {B, NameA}]
            ]
        end,
        Set = fun(Options) -> meshx_ct:call(A, net_kernel, setopts, [new, Options]) end,
        First = Set([{nodelay, false}, {keepalive, true}]),
        Dialled = Link(A, B),
        Accepted = Link(B, A),
        Refused = [Set([{nodelay, true} | Option]) || Option <- [[{nothing, 1}], [{active, false}]]],
        Second = Set([{nodelay, true}, {keepalive, false}]),
        {First, Dialled, Accepted, Refused, Second, Link(A, B)}
    end),
    ?assertMatch({ok, [{ok, [{nodelay, false}, {keepalive, true}]}, _], _, _, ok, _}, Results).

ticker_spawn_options(Config) ->
    Items = [priority, min_heap_size, message_queue_data],
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        [
            meshx_ct:call(Node, fun() ->
                {ok, Owner} = net_kernel:node_info(Other, owner),
                {erlang:process_info(Owner, Items), lists:member(whereis(net_kernel), element(2, process_info(Owner, links)))}
            end)
         || {Node, Other} <- [{A, NameB}, {B, maps:get(node, A)}]
        ]
    end),
    ?assertMatch([{[_, {_, Size}, {_, off_heap}], true}, _] when Size >= 5000, Results).

reasons_of_nodedown(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B, #{node := NameC} = C]) ->
        [unlinked(A, Other) || Other <- [B, C]],
        Told = fun(Other, End) ->
            [watch(Node) || Node <- [A, Other]],
            linked(A, Other),
            End(),
            Both = [told_of_down(Node) || Node <- [A, Other]],
            unlinked(A, Other),
            Both
        end,
        Owner = fun(Reason) ->
            meshx_ct:call(A, fun() ->
                {ok, Pid} = net_kernel:node_info(NameB, owner),
                exit(Pid, Reason)
            end)
        end,
        [
            Told(B, fun() -> meshx_ct:call(A, erlang, disconnect_node, [NameB]) end),
            Told(B, fun() -> meshx_ct:call(B, erlang, disconnect_node, [maps:get(node, A)]) end),
            Told(C, fun() -> meshx_ct:call(A, net_kernel, disconnect, [NameC]) end),
            Told(B, fun() -> Owner(kill) end),
            Told(B, fun() -> Owner(some_reason) end)
        ]
    end),
    ?assertMatch([[[{nodeup, _, _}, {nodedown, _, [{nodedown_reason, disconnect}, {node_type, visible}]}], _] | _], Results).

tick_time(Config) ->
    Results = same(Config, fun([A, B | _]) ->
        linked(A, B),
        watch(A),
        First = meshx_ct:call(A, net_kernel, set_net_ticktime, [?TICK_TIME, 0]),
        meshx_ct:wait("the new tick time", fun() -> meshx_ct:call(A, net_kernel, get_net_ticktime, []) =:= ?TICK_TIME end),
        Same = meshx_ct:call(A, net_kernel, set_net_ticktime, [?TICK_TIME]),
        Told = stopped(B, fun() -> told_of_down(A) end),
        Last = meshx_ct:call(A, net_kernel, set_net_ticktime, [60, 0]),
        {First, Same, Told, Last}
    end),
    ?assertMatch({change_initiated, unchanged, [{nodedown, _, [{nodedown_reason, net_tick_timeout} | _]}], _}, Results).

%% Runs Fun while a VM is stopped.
stopped(#{process := Process}, Fun) ->
    meshx_ct_proc:signal(Process, "STOP"),
    try
        Fun()
    after
        meshx_ct_proc:signal(Process, "CONT")
    end.

wrong_cookie(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        #{node := NameA} = A,
        unlinked(A, B),
        [watch(Node) || Node <- [A, B]],
        Mark = meshx_ct:mark(B),
        Cookie = meshx_ct:call(A, erlang, get_cookie, []),
        true = meshx_ct:call(A, erlang, set_cookie, [NameB, wrong]),
        Refused = [meshx_ct:connect(A, B), meshx_ct:connect(B, A)],
        meshx_ct:wait("a log line", fun() -> meshx_ct:has_line(B, Mark, "Connection attempt from node .*rejected") end),
        true = meshx_ct:call(A, erlang, set_cookie, [NameB, Cookie]),
        {Refused, told(A), told(B), meshx_ct:connect(A, B), NameA}
    end),
    ?assertMatch({[false, false], [], [], true, _}, Results).

%% A VM that is stopped accepts, as far as the kernel is concerned, and does not answer.
frozen_peer_is_given_up_after_setup_time(Config) ->
    Results = same(Config, fun([_, B, C]) ->
        unlinked(C, B),
        {Time, Frozen} = stopped(B, fun() -> timer:tc(fun() -> meshx_ct:connect(C, B) end) end),
        meshx_ct:wait("a link", fun() -> meshx_ct:connect(C, B) end),
        {Frozen, Time >= ?SETUP_TIME * 500000, linked(C, B)}
    end),
    ?assertEqual({false, true, ok}, Results).

%%% Who connects

%% None of these connects, nor waits.
dist_auto_connect_never(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        Remote = meshx_ct:call(A, erpc, call, [NameB, erlang, whereis, [init]]),
        unlinked(A, B),
        meshx_ct:auto_connect(A, never),
        Silent = meshx_ct:call(A, fun() -> without_a_link(NameB, Remote) end),
        Connected = {meshx_ct:connect(A, B), meshx_ct:call(A, net_adm, ping, [NameB])},
        meshx_ct:auto_connect(A, always),
        {Silent, Connected}
    end),
    ?assertMatch({_, {true, pong}}, Results).

without_a_link(Name, Remote) ->
    process_flag(trap_exit, true),
    Message = fun() ->
        receive
            {'EXIT', Remote, Reason} -> {exit, Reason};
            {'DOWN', _, process, _, Reason} -> {down, Reason};
            {spawn_reply, _, Result, Reason} -> {spawn_reply, Result, Reason};
            {nodedown, Name} -> nodedown
        after 10000 -> nothing
        end
    end,
    Sent = [
        erlang:send({nobody, Name}, hello, [noconnect]),
        erlang:send(Remote, hello, [noconnect, nosuspend]),
        erlang:send({nobody, Name}, hello, []),
        erlang:send_nosuspend({nobody, Name}, hello),
        erlang:send_nosuspend({nobody, Name}, hello, [noconnect])
    ],
    link(Remote),
    Link = Message(),
    _ = monitor(process, {nobody, Name}),
    Monitor = Message(),
    _ = spawn_request(Name, erlang, node, [], []),
    Request = Message(),
    _ = spawn_monitor(Name, erlang, node, []),
    Spawned = Message(),
    true = monitor_node(Name, true),
    Node = Message(),
    Others = [
        net_adm:ping(Name),
        rpc:call(Name, erlang, node, []),
        [erlang:disconnect_node(Other) || Other <- [Name, node(), nobody@nowhere]],
        net_kernel:connect_node(node()),
        nodes(connected)
    ],
    {Sent, Link, Monitor, Request, Spawned, Node, Others}.

dist_auto_connect_once(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        #{node := NameA} = A,
        unlinked(A, B),
        meshx_ct:call(A, application, set_env, [kernel, dist_auto_connect, once]),
        Ping = fun() -> meshx_ct:call(A, net_adm, ping, [NameB]) end,
        First = Ping(),
        %% Not to be waited for as elsewhere: net_kernel keeps the node, barred.
        true = meshx_ct:call(B, erlang, disconnect_node, [NameA]),
        meshx_ct:wait("the link's end", fun() -> meshx_ct:call(A, erlang, nodes, []) =:= [] end),
        Second = Ping(),
        Third = {meshx_ct:connect(A, B), Ping()},
        meshx_ct:auto_connect(A, always),
        {First, Second, Third}
    end),
    ?assertEqual({pong, pang, {true, pong}}, Results).

hidden_connect(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        unlinked(A, B),
        true = meshx_ct:call(A, net_kernel, hidden_connect_node, [NameB]),
        pong = meshx_ct:call(A, net_adm, ping, [NameB]),
        Seen = [
            [lists:member(Other, meshx_ct:call(Node, erlang, nodes, [Type])) || Type <- [visible, hidden]]
         || {Node, Other} <- [{A, NameB}, {B, maps:get(node, A)}]
        ],
        unlinked(A, B),
        Seen
    end),
    ?assertEqual([[false, true], [false, true]], Results).

%%% Processes

what_a_dropped_link_leaves(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        meshx_ct:call(A, fun() ->
            process_flag(trap_exit, true),
            Remote = spawn_link(NameB, ?MODULE, answer, [self()]),
            receive
                {Remote, traps_exits} -> ok
            end,
            Plain = monitor(process, Remote),
            OneReply = monitor(process, Remote, [{alias, reply_demonitor}]),
            Alias = alias(),
            true = monitor_node(NameB, true),
            true = erlang:disconnect_node(NameB),
            Seen = [
                receive
                    {nodedown, NameB} -> nodedown
                after 10000 -> nothing
                end,
                receive
                    {'EXIT', Remote, Reason} -> {exit, Reason}
                after 10000 -> nothing
                end
                | [
                    receive
                        {'DOWN', Monitor, process, Remote, Reason} -> {down, Reason}
                    after 10000 -> nothing
                    end
                 || Monitor <- [Plain, OneReply]
                ]
            ],
            %% It has lived on, and the alias has, but not the one of the monitor.
            Answers = [{To, make_ref()} || To <- [OneReply, Alias, self()]],
            Last = monitor(process, Remote),
            Remote ! {answer, Answers},
            [
                Came
             || {To, Ref} <- lists:reverse(Answers),
                Came <- [
                    receive
                        {Ref, Answer} -> {name(To, OneReply, Alias), Answer}
                    after
                        %% The last one has come first.
                        if To =:= OneReply -> 0; true -> 10000 end -> nothing
                    end
                ]
            ] ++ [receive {'DOWN', Last, process, Remote, End} -> End end | Seen]
        end)
    end),
    ?assertEqual(
        [
            {itself, hello}, {alias, hello}, nothing,
            normal, nodedown, {exit, noconnection}, {down, noconnection}, {down, noconnection}
        ],
        Results
    ).

name(OneReply, OneReply, _) -> one_reply;
name(Alias, _, Alias) -> alias;
name(_, _, _) -> itself.

%% Ends only by being asked: its link to the asking process must not end it.
answer(Asking) ->
    process_flag(trap_exit, true),
    Asking ! {self(), traps_exits},
    receive
        {answer, Answers} -> [To ! {Ref, hello} || {To, Ref} <- Answers]
    end.

%% The peer doesn't answer any more.
requests_under_way_when_a_link_drops(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        stopped(B, fun() ->
            meshx_ct:call(A, fun() ->
                Callers = [
                    spawn_monitor(fun() -> exit({got, outcome(Call)}) end)
                 || Call <- [
                        fun() -> rpc:call(NameB, erlang, node, []) end,
                        fun() -> erpc:call(NameB, erlang, node, []) end,
                        fun() -> gen_server:call({net_kernel, NameB}, nothing) end
                    ]
                ],
                _ = [
                    spawn_request(NameB, erlang, node, [], Options)
                 || Options <- [[], [monitor], [{reply_tag, tagged}, {monitor, [{tag, tag}]}]]
                ],
                %% Callers have sent their requests when they wait.
                [await_waiting(Caller) || {Caller, _} <- Callers],
                true = erlang:disconnect_node(NameB),
                Replies = [
                    receive
                        {spawn_reply, _, Result, Reason} -> {Result, Reason};
                        {tagged, _, Result, Reason} -> {tagged, Result, Reason}
                    after 10000 -> nothing
                    end
                 || _ <- [1, 2, 3]
                ],
                Rest =
                    receive
                        {Tag, _, process, Pid, Down} when is_pid(Pid), Tag =:= tag -> Down
                    after 0 -> nothing
                    end,
                Ends = [receive {'DOWN', Monitor, process, _, Got} -> Got end || {_, Monitor} <- Callers],
                {lists:sort(Replies), Rest, [Got || {got, Got} <- Ends]}
            end)
        end)
    end),
    ?assertMatch(
        {[{error, noconnection}, {error, noconnection}, {tagged, error, noconnection}], nothing, [{badrpc, nodedown} | _]},
        Results
    ).

await_waiting(Caller) ->
    case process_info(Caller, status) of
        {status, waiting} -> ok;
        _ -> erlang:yield(), await_waiting(Caller)
    end.

outcome(Call) ->
    try
        Call()
    catch
        error:Reason -> Reason;
        exit:{Reason, _Call} -> Reason
    end.

%% The limit that +zdbbl has set is 1 KiB.
busy_dist_port(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        meshx_ct:call(A, fun() ->
            _ = erlang:system_monitor(self(), [busy_dist_port]),
            Sender = spawn_link(fun() ->
                [{nobody, NameB} ! binary:copy(<<N>>, 4194304) || N <- lists:seq(1, 8)]
            end),
            Busy =
                receive
                    {monitor, Sender, busy_dist_port, Controller} ->
                        lists:member({NameB, Controller}, erlang:system_info(dist_ctrl))
                after 30000 -> nothing
                end,
            _ = erlang:system_monitor(undefined),
            {Busy, erlang:system_info(dist_buf_busy_limit)}
        end)
    end),
    ?assertEqual({true, 1024}, Results).

%% Nothing suspends such a sender, though the peer is.
async_dist(Config) ->
    Results = same(Config, fun([A, #{node := NameB} = B | _]) ->
        linked(A, B),
        Receiver = meshx_ct:call(A, erlang, spawn, [NameB, ?MODULE, chunks_came, []]),
        stopped(B, fun() ->
            meshx_ct:call(A, fun() ->
                _ = erlang:process_flag(async_dist, true),
                meshx_ct_there:send_chunks(Receiver, 64)
            end)
        end),
        meshx_ct:call(A, fun() ->
            Receiver ! {self(), did_all_come},
            receive
                {Receiver, Answer} -> Answer
            after 60000 -> nothing
            end
        end)
    end),
    ?assertEqual(all_chunks, Results).

chunks_came() ->
    ok = meshx_ct_there:receive_chunks(self(), 64),
    receive
        {_, all_chunks} -> ok
    end,
    receive
        {From, did_all_come} -> From ! {self(), all_chunks}
    end.

%%% The end of a node

%% What it sent last may be lost, with inet_tcp, too: the emulator doesn't send what it has queued. But
%% nothing of the rest.
halted_peer(Config) ->
    Results = meshx_ct:at_once([
        fun() ->
            [#{node := NameA} = A | _] = proplists:get_value(Carrier, Config),
            #{peer := Peer} = D = start(Config, Carrier, d),
            watch(A),
            linked(D, A),
            meshx_ct:call(D, fun() -> [{?MODULE, NameA} ! {number, N} || N <- lists:seq(1, 1000)], pong = net_adm:ping(NameA) end),
            peer:cast(Peer, erlang, apply, [fun() -> {?MODULE, NameA} ! {number, 1001}, halt(0) end, []]),
            Told = told_of_down(A),
            %% Its registration stays, as after any sudden end.
            ok = meshx_ct:kill(D),
            {[N || {number, N} <- Told] -- [1001], [Event || Event <- Told, element(1, Event) =/= number]}
        end
     || Carrier <- carriers()
    ]),
    [InetTcp, Ours] = Results,
    ?assertEqual(InetTcp, Ours),
    {Numbers, [_, {nodedown, _, [{nodedown_reason, connection_closed} | _]}]} = Ours,
    ?assertEqual(lists:seq(1, 1000), Numbers).

net_kernel_stop(Config) ->
    Results = same(Config, fun([#{node := NameA} = A | _]) ->
        Carrier = carrier(A, Config),
        D = meshx_ct:net_start(meshx_ct:vm(Config, options(Config, Carrier, [])), d),
        [watch(Node) || Node <- [A, D]],
        linked(D, A),
        ok = meshx_ct:call(D, net_kernel, stop, []),
        %% It is told of its own end, too.
        There = [Event || Event <- told_of_down(D), element(2, Event) =:= NameA],
        {told_of_down(A), There, meshx_ct:call(D, fun() -> {node(), nodes(), net_kernel:get_state()} end)}
    end),
    ?assertMatch(
        {
            [_, {nodedown, _, [{nodedown_reason, connection_closed} | _]}],
            [_, {nodedown, _, [{nodedown_reason, net_kernel_terminated} | _]}],
            {nonode@nohost, [], #{started := no}}
        },
        Results
    ).

carrier(Node, Config) ->
    hd([Carrier || Carrier <- carriers(), lists:member(Node, proplists:get_value(Carrier, Config))]).

%% In good order nothing is lost.
init_stop_sends_what_was_sent(Config) ->
    [#{node := NameA} = A | _] = ours(Config),
    D = start(Config, "meshx_node", d),
    watch(A),
    linked(D, A),
    meshx_ct:call(D, fun() ->
        [{?MODULE, NameA} ! {number, N} || N <- lists:seq(1, 1000)],
        init:stop()
    end),
    Told = told_of_down(A),
    ?assertEqual(lists:seq(1, 1000), [N || {number, N} <- Told]),
    meshx_ct:wait("the VM's end", fun() -> meshx_ct:is_gone(D) end).

%%% net_kernel:allow/1

allow(Config) ->
    Results = same(Config, fun([A, B, #{node := NameC} = C]) ->
        [unlinked(Node, B) || Node <- [A, C]],
        Mark = meshx_ct:mark(B),
        First = meshx_ct:call(B, net_kernel, allow, [[NameC]]),
        Connects = [meshx_ct:connect(Node, B) || Node <- [A, C]],
        meshx_ct:wait("a log line", fun() -> meshx_ct:has_line(B, Mark, "disallowed node") end),
        %% It may still dial itself whom it doesn't let in.
        Dialled = meshx_ct:connect(B, A),
        unlinked(B, A),
        Wrong = meshx_ct:call(B, net_kernel, allow, [["no atom"]]),
        More = meshx_ct:call(B, net_kernel, allow, [[maps:get(node, A)]]),
        {First, Connects, Dialled, Wrong, More, meshx_ct:connect(A, B)}
    end),
    ?assertMatch({ok, [false, true], _, _, ok, true}, Results).
