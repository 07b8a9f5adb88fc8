%% Links at full load, beside each other, and towards a VM that is stopped: fairness, ticks, and
%% what is kept of messages that can't be sent. Nothing here is timed but the ticks, whose subject
%% is time; everything else is counted.
-module(meshx_node_load_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(KIB, 1024).
-define(MIB, 1048576).

%% Round trips that must be through before that many messages of 1 MiB are.
-define(ROUND_TRIPS, 200).
-define(BULK, 4096).

%% Seconds; a peer from which nothing comes for 6 to 10 of them is down.
-define(TICK_TIME, 8).

%% Senders towards a stopped VM, and what each sends: 1 GiB in all.
-define(SENDERS, 20).
-define(MESSAGES, 200).
-define(MESSAGE, 256 * ?KIB).
%% What of this a sender's VM may hold: every sender's first message, and room for allocators.
-define(HELD, 64 * ?MIB).

all() ->
    [
        outgoing_bulk_leaves_another_link_its_turns,
        incoming_bulk_leaves_another_link_its_turns,
        bulk_leaves_others_on_its_link_their_turns,
        a_part_of_a_stream_arrives_before_the_next,
        a_stream_does_not_outrun_its_receiver,
        small_messages_do_not_outrun_who_works_on_them,
        messages_nobody_receives_stop_no_others,
        messages_that_wait_take_little_memory,
        ticks_are_in_time_at_full_load,
        stopped_peers_are_down_at_full_load,
        stopped_peer_holds_the_senders,
        stopped_peer_behind_sidecars_holds_the_senders,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(Case, Config) when
    Case =:= a_stream_does_not_outrun_its_receiver;
    Case =:= small_messages_do_not_outrun_who_works_on_them;
    Case =:= messages_that_wait_take_little_memory
->
    try erlang:memory(binary) of
        _ -> Config
    catch
        error:notsup -> {skip, "the emulator does not count its memory"}
    end;
init_per_testcase(_, Config) ->
    Config.

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Nodes

%% To be dialled at Port.
start_direct(Config, Name, Port, Arguments) ->
    meshx_ct:start(Config, Name, #{args => meshx_ct:listens_at(Port) ++ Arguments}).

dials(Others) ->
    meshx_ct:dials([{Name, lists:concat(["127.0.0.1:", Port])} || {Name, Port} <- Others]).

%% A node, one to which it has a direct link, and one to which it has one through two sidecars.
direct_and_behind_sidecars(Config, Arguments) ->
    Port = meshx_ct_agent:free_port(),
    More = ["-connect_all", "false" | Arguments],
    A = meshx_ct:start(Config, a, #{args => dials([{b, Port}]) ++ More}),
    B = start_direct(Config, b, Port, More),
    C = meshx_ct:start(Config, c, #{args => More}),
    [connect(A, Other) || Other <- [B, C]],
    [A, B, C].

%% No message connects again what the case has seen going down.
connect(A, B) ->
    ?assert(meshx_ct:connect(A, B)),
    meshx_ct:auto_connect(A, never).

%% Runs Fun while a VM is stopped.
while_stopped(Nodes, Fun) ->
    [meshx_ct_proc:signal(Process, "STOP") || #{process := Process} <- Nodes],
    try
        Fun()
    after
        [meshx_ct_proc:signal(Process, "CONT") || #{process := Process} <- Nodes]
    end.

%%% Fairness

outgoing_bulk_leaves_another_link_its_turns(Config) ->
    fair(Config, fun send_bulk_to/2).

incoming_bulk_leaves_another_link_its_turns(Config) ->
    fair(Config, fun(Bulk, Count) ->
        Sink = spawn(fun() -> sink(Count) end),
        _ = spawn(Bulk, ?MODULE, send_bulk, [Sink]),
        Sink
    end).

%% The node in the middle has one scheduler. Start returns the process there that counts the
%% messages of the bulk and ends with the last one.
fair(Config, Start) ->
    Ports = [{b, meshx_ct_agent:free_port()}, {c, meshx_ct_agent:free_port()}],
    A = start_direct(
        Config, a, meshx_ct_agent:free_port(), ["+S", "1:1", "-connect_all", "false" | dials(Ports)]
    ),
    [B, C] = [start_direct(Config, Name, Port, ["-connect_all", "false"]) || {Name, Port} <- Ports],
    [connect(A, Other) || Other <- [B, C]],
    turns(A, B, C, Start).

%% Small messages of one process while another sends as much as it can: both are suspended whenever
%% the link's queue is full.
bulk_leaves_others_on_its_link_their_turns(Config) ->
    [A, B] = two_directly(Config),
    turns(A, B, B, fun send_bulk_to/2).

%% Round trips between A and B while bulk goes on between A and Bulk.
turns(A, #{node := Bulk}, #{node := B}, Start) ->
    {First, Last, Running} = meshx_ct:call(A, fun() ->
        Echo = spawn(B, ?MODULE, echo, []),
        Count = counters:new(1, []),
        Sender = Start(Bulk, Count),
        wait_for_count(Count, 10),
        Begin = counters:get(Count, 1),
        [round_trip(Echo, N) || N <- lists:seq(1, ?ROUND_TRIPS)],
        {Begin, counters:get(Count, 1), is_process_alive(Sender)}
    end),
    ct:log("~b round trips beside ~b messages of 1 MiB", [?ROUND_TRIPS, Last - First]),
    ?assert(Running),
    ?assert(Last > First),
    ?assert(Last < ?BULK).

send_bulk_to(Node, Count) ->
    Sink = spawn(Node, ?MODULE, sink, []),
    spawn(fun() -> send_bulk(Sink, Count) end).

send_bulk(To) ->
    send_bulk(To, counters:new(1, [])).

send_bulk(To, Count) ->
    Data = binary:copy(<<"bulk">>, ?MIB div 4),
    [
        begin
            To ! {data, Data},
            counters:add(Count, 1, 1)
        end
     || _ <- lists:seq(1, ?BULK)
    ].

sink() ->
    receive
        {stop, From} -> From ! {self(), stopped};
        _ -> sink()
    end.

worker() ->
    worker(ets:new(?MODULE, []), 0).

worker(Table, N) ->
    receive
        {stop, From} ->
            From ! {self(), stopped};
        {data, Data} ->
            ets:insert(Table, {N, byte_size(Data)}),
            worker(Table, N + 1)
    end.

sink(Count) ->
    sink(Count, ?BULK).

sink(_Count, 0) ->
    ok;
sink(Count, Left) ->
    receive
        {data, _} -> counters:add(Count, 1, 1)
    end,
    sink(Count, Left - 1).

echo() ->
    receive
        {data, _} -> ok;
        {From, N} -> From ! {self(), N}
    end,
    echo().

round_trip(Echo, N) ->
    Echo ! {self(), N},
    receive
        {Echo, N} -> ok
    end.

wait_for_count(Count, Least) ->
    counters:get(Count, 1) >= Least orelse
        begin
            timer:sleep(1),
            wait_for_count(Count, Least)
        end.

%%% Pace

%% Input waits for much at once in a stream, but its end must not wait for more.
-define(PARTS, 500).
-define(MESSAGES_PER_PART, 64).

a_part_of_a_stream_arrives_before_the_next() ->
    [{timetrap, {minutes, 3}}].

a_part_of_a_stream_arrives_before_the_next(Config) ->
    [A, #{node := Node} = B] = two_directly(Config),
    Waits = [{meshx_node_nif, low_water, 2}, {meshx_node_nif, await, 2}],
    meshx_ct:call(B, fun() -> [1 = erlang:trace_pattern(Wait, true, [call_count]) || Wait <- Waits] end),
    meshx_ct:call(A, fun() ->
        Echo = spawn(Node, ?MODULE, echo, []),
        Data = binary:copy(<<"part">>, 16 * ?KIB),
        [
            begin
                [Echo ! {data, Data} || _ <- lists:seq(1, ?MESSAGES_PER_PART)],
                round_trip(Echo, Part)
            end
         || Part <- lists:seq(1, ?PARTS)
        ]
    end),
    %% They came as a stream.
    Counts = meshx_ct:call(B, fun() -> [erlang:trace_info(Wait, call_count) || Wait <- Waits] end),
    [?assert(Count > 0) || {call_count, Count} <- Counts].

%% What is read and not yet received is kept in the receiver's VM.
-define(STREAM, 16384).
-define(STREAMED, 64 * ?KIB).
-define(UNRECEIVED, 32 * ?MIB).

a_stream_does_not_outrun_its_receiver(Config) ->
    [A, #{node := Node} = B] = two_directly(Config),
    Meter = meshx_ct:call(B, fun() -> spawn(?MODULE, meter, [0]) end),
    meshx_ct:call(A, fun() -> stream(spawn(Node, ?MODULE, sink, [])) end),
    Peak = meshx_ct:call(B, fun() -> reading(Meter) end),
    ct:log("~b MiB of binaries at most", [Peak div ?MIB]),
    ?assert(Peak > 0),
    ?assert(Peak < ?UNRECEIVED).

%% A receiver that is a little slower than the link.
-define(SMALL_STREAM, 500 * ?KIB).
-define(SMALL_UNRECEIVED, 64 * ?MIB).

small_messages_do_not_outrun_who_works_on_them(Config) ->
    [A, #{node := Node} = B] = two_directly(Config),
    Meter = meshx_ct:call(B, fun() -> spawn(?MODULE, meter, [0]) end),
    meshx_ct:call(A, fun() ->
        Worker = spawn(Node, ?MODULE, worker, []),
        Data = binary:copy(<<"work">>, ?KIB div 4),
        [Worker ! {data, Data} || _ <- lists:seq(1, ?SMALL_STREAM)],
        Worker ! {stop, self()},
        receive
            {Worker, stopped} -> ok
        end
    end),
    Peak = meshx_ct:call(B, fun() -> reading(Meter) end),
    ct:log("~b MiB of binaries at most", [Peak div ?MIB]),
    ?assert(Peak > 0),
    ?assert(Peak < ?SMALL_UNRECEIVED).

messages_nobody_receives_stop_no_others(Config) ->
    [A, #{node := Node}] = two_directly(Config),
    meshx_ct:call(A, fun() ->
        Shelf = spawn(Node, timer, sleep, [infinity]),
        [Shelf ! binary:copy(<<"kept">>, 16 * ?KIB) || _ <- lists:seq(1, 512)],
        stream(spawn(Node, ?MODULE, sink, []))
    end).

%% Beside others that are received at once, and small: what they share with these is kept too.
-define(WAITING, 10000).

messages_that_wait_take_little_memory(Config) ->
    [A, #{node := Node} = B] = two_directly(Config),
    Before = meshx_ct:call(B, erlang, memory, [total]),
    meshx_ct:call(A, fun() ->
        Shelf = spawn(Node, timer, sleep, [infinity]),
        Sink = spawn(Node, ?MODULE, sink, []),
        Small = binary:copy(<<"k">>, 64),
        Send = fun(_) ->
            Shelf ! {self(), Small},
            [Sink ! {self(), Small} || _ <- lists:seq(1, 20)]
        end,
        lists:foreach(Send, lists:seq(1, ?WAITING)),
        Sink ! {stop, self()},
        receive
            {Sink, stopped} -> ok
        end
    end),
    %% What only passed through is freed when the VM gets to it.
    meshx_ct:wait("little memory for each message that waits", fun() ->
        meshx_ct:call(B, fun() -> [garbage_collect(Pid) || Pid <- processes()] end),
        Each = (meshx_ct:call(B, erlang, memory, [total]) - Before) div ?WAITING,
        ct:log("~b bytes for each message that waits", [Each]),
        Each > 0 andalso Each < 2 * ?KIB
    end).

two_directly(Config) ->
    Port = meshx_ct_agent:free_port(),
    A = meshx_ct:start(Config, a, #{args => dials([{b, Port}])}),
    B = start_direct(Config, b, Port, []),
    connect(A, B),
    [A, B].

%% Returns when all has been received.
stream(Sink) ->
    Data = binary:copy(<<"flow">>, ?STREAMED div 4),
    [Sink ! {data, Data} || _ <- lists:seq(1, ?STREAM)],
    Sink ! {stop, self()},
    receive
        {Sink, stopped} -> ok
    end.

%% The most that binaries have had.
meter(Peak) ->
    process_flag(priority, max),
    receive
        {read, From} -> From ! {self(), Peak}
    after 1 -> meter(max(Peak, erlang:memory(binary)))
    end.

reading(Meter) ->
    Meter ! {read, self()},
    receive
        {Meter, Peak} -> Peak
    end.

%%% Ticks

%% Two tick times of each kind of load, on a direct link and on one through sidecars at once.
ticks_are_in_time_at_full_load(Config) ->
    [A | Others] = Nodes = direct_and_behind_sidecars(Config, tick_time()),
    [watch(Node) || Node <- Nodes],
    Out = [load(A, Other) || Other <- Others],
    passes(Nodes, Out),
    In = [load(Other, A) || Other <- Others],
    passes(Nodes, Out ++ In),
    %% Receivers that read nothing for a second, again and again.
    [pause_input(Other, 4) || Other <- Others],
    passes(Nodes, Out ++ In),
    [unload(Load) || Load <- Out ++ In],
    ?assertEqual([Name || #{node := Name} <- Others], lists:sort(meshx_ct:call(A, erlang, nodes, []))).

stopped_peers_are_down_at_full_load(Config) ->
    [A | Others] = direct_and_behind_sidecars(Config, tick_time()),
    watch(A),
    Loads = [load(A, Other) || Other <- Others],
    Names = [Name || #{node := Name} <- Others],
    while_stopped(Others, fun() ->
        meshx_ct:wait("both to be down", fun() -> length(downs(A)) =:= 2 end, 40000),
        ?assertEqual([{Name, net_tick_timeout} || Name <- Names], lists:sort(downs(A))),
        %% No sender waits for ever.
        [unload(Load) || Load <- Loads]
    end).

tick_time() ->
    ["-kernel", "net_ticktime", integer_to_list(?TICK_TIME), "net_tickintensity", "4"].

%% Two tick times in which every load goes on, and all links stay.
passes(Nodes, Loads) ->
    Before = [sent(Load) || Load <- Loads],
    timer:sleep(2000 * ?TICK_TIME),
    [?assert(sent(Load) > Begin) || {Load, Begin} <- lists:zip(Loads, Before)],
    [?assertEqual({Node, []}, {Node, downs(Node)}) || Node <- Nodes].

%% Two processes at From that send as fast as they may to one at To; in messages that are no work
%% to receive, so that none queue up.
load(From, #{node := To}) ->
    Senders = meshx_ct:call(From, fun() ->
        Sink = spawn(To, ?MODULE, sink, []),
        Data = binary:copy(<<"load">>, 8 * ?KIB),
        [spawn(fun() -> send_on(Sink, Data, 0) end) || _ <- [1, 2]]
    end),
    {From, Senders}.

send_on(To, Data, Sent) ->
    To ! Data,
    receive
        {From, sent} ->
            From ! {self(), Sent},
            send_on(To, Data, Sent + 1);
        stop ->
            ok
    after 0 -> send_on(To, Data, Sent + 1)
    end.

sent({At, Senders}) ->
    meshx_ct:call(At, fun() -> lists:sum([answer_of(Sender) || Sender <- Senders]) end).

answer_of(Sender) ->
    Sender ! {self(), sent},
    receive
        {Sender, Sent} -> Sent
    end.

unload({At, Senders}) ->
    meshx_ct:call(At, fun() ->
        [
            begin
                Monitor = monitor(process, Sender),
                Sender ! stop,
                receive
                    {'DOWN', Monitor, _, _, _} -> ok
                end
            end
         || Sender <- Senders
        ]
    end).

%% The process that suspends lives on: its end would resume the suspended.
pause_input(Node, Times) ->
    meshx_ct:call(Node, fun() ->
        [_ | _] = Inputs = meshx_node_link_SUITE:inputs(),
        spawn(fun() ->
            [
                begin
                    [erlang:suspend_process(Input) || Input <- Inputs],
                    timer:sleep(1000),
                    [erlang:resume_process(Input) || Input <- Inputs],
                    timer:sleep(500)
                end
             || _ <- lists:seq(1, Times)
            ]
        end)
    end).

%% Collects which nodes go down, and why.
watch(Node) ->
    meshx_ct:call(Node, fun() ->
        Self = self(),
        spawn(fun() ->
            register(?MODULE, self()),
            ok = net_kernel:monitor_nodes(true, [nodedown_reason]),
            Self ! watched,
            collect_downs([])
        end),
        receive
            watched -> ok
        end
    end).

collect_downs(Downs) ->
    receive
        {nodedown, Node, [{nodedown_reason, Reason}]} ->
            collect_downs([{Node, Reason} | Downs]);
        {From, downs} ->
            From ! {downs, Downs},
            collect_downs(Downs);
        {nodeup, _, _} ->
            collect_downs(Downs)
    end.

downs(Node) ->
    meshx_ct:call(Node, fun() ->
        ?MODULE ! {self(), downs},
        receive
            {downs, Downs} -> Downs
        end
    end).

%%% Queues

stopped_peer_holds_the_senders(Config) ->
    Port = meshx_ct_agent:free_port(),
    A = start_direct(Config, a, meshx_ct_agent:free_port(), dials([{b, Port}])),
    holds_the_senders(A, start_direct(Config, b, Port, [])).

stopped_peer_behind_sidecars_holds_the_senders(Config) ->
    [A, B] = [meshx_ct:start(Config, Name, #{}) || Name <- [a, b]],
    holds_the_senders(A, B).

%% Nothing piles up in the senders' VM while the other one is stopped; later all of it arrives,
%% each sender's messages in order.
holds_the_senders(A, #{node := NameB} = B) ->
    connect(A, B),
    Senders = meshx_ct:call(A, fun() -> idle_senders(NameB) end),
    Before = memory(A),
    while_stopped([B], fun() ->
        meshx_ct:call(A, fun() -> [Sender ! go || Sender <- Senders] end),
        again_and_again(A, "all senders to be suspended", fun() ->
            lists:all(fun(Sender) -> process_info(Sender, status) =:= {status, suspended} end, Senders)
        end),
        again_and_again(A, "nosuspend", fun() ->
            nosuspend =:= erlang:send({nobody, NameB}, message(0), [nosuspend])
        end),
        Held = [Now - Then || {Now, Then} <- lists:zip(memory(A), Before)],
        ct:log("held by the kernel's count, and by the emulator's: ~p bytes", [Held]),
        [?assert(Bytes < ?HELD) || Bytes <- Held]
    end),
    ?assertEqual(
        lists:duplicate(?SENDERS, normal),
        meshx_ct:call(A, fun() -> [answer_of(Sender) || Sender <- Senders] end)
    ),
    ?assertEqual([NameB], meshx_ct:call(A, erlang, nodes, [])).

%% Not only now and then: what is on the way still moves for a while.
again_and_again(Node, What, Fun) ->
    Hundredfold = fun() -> lists:all(fun(_) -> Fun() end, lists:seq(1, 100)) end,
    meshx_ct:wait(What, fun() -> meshx_ct:call(Node, Hundredfold) end).

%% Each with a receiver of its own, which is there before the link is full.
idle_senders(To) ->
    Self = self(),
    Senders = [spawn(fun() -> idle_sender(Self, To) end) || _ <- lists:seq(1, ?SENDERS)],
    [
        receive
            {Sender, idle} -> Sender
        end
     || Sender <- Senders
    ].

idle_sender(Starter, To) ->
    {Receiver, Monitor} = spawn_monitor(To, ?MODULE, receive_numbered, []),
    Starter ! {self(), idle},
    receive
        go -> ok
    end,
    [Receiver ! message(N) || N <- lists:seq(1, ?MESSAGES)],
    receive
        {'DOWN', Monitor, _, _, Reason} ->
            receive
                {From, sent} -> From ! {self(), Reason}
            end
    end.

%% A new binary each time: a message that waits takes its place.
message(N) ->
    {N, binary:copy(<<N:32>>, ?MESSAGE div 4)}.

receive_numbered() ->
    [
        receive
            Message -> Message = message(N)
        end
     || N <- lists:seq(1, ?MESSAGES)
    ].

%% Bytes that the process takes of the machine, and that the emulator counts, if it does.
memory(#{process := Process} = Node) ->
    {ok, Status} = file:read_file(lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/status"])),
    {match, [Resident]} = re:run(Status, "VmRSS:\\s+([0-9]+) kB", [{capture, all_but_first, binary}]),
    Counted = meshx_ct:call(Node, fun() ->
        try
            [erlang:memory(total)]
        catch
            error:notsup -> []
        end
    end),
    [binary_to_integer(Resident) * ?KIB | Counted].
