%% The work whose speed is measured, inside the nodes' VMs: a function called in the first node
%% has its other end in the second, over the link between them.
%%
%% Every measurement runs in a process of its own, whose heap is large enough not to be collected
%% often; when it ends it takes its linked ends in the other node with it.
-module(meshx_bench_work).

-export([roundtrip/2, clients/3, stream/4, store/3, demand/3, beside/3, slow/3, keep/4, collect_garbage/0]).
%% Ends, spawned in the other node.
-export([echo/0, sink/0, table/0, consumer/2, slow_sink/0, shelf/0]).

%% In words.
-define(HEAP, 1000000).
%% Milliseconds.
-define(WARM_UP, 150).
-define(SLOW_WORK, 2).
%% Messages.
-define(DEMAND, 1000).
%% Bytes between two looks at the clock.
-define(BATCH, 65536).

-type microseconds() :: float().
-type latency() :: #{
    p50 := microseconds(),
    p99 := microseconds(),
    p999 := microseconds(),
    max := microseconds(),
    count := pos_integer()
}.
-type payload() :: terms | Size :: pos_integer().

%% One process, one echo, one message under way.
-spec roundtrip(node(), Milliseconds :: pos_integer()) -> latency().
roundtrip(Node, Milliseconds) ->
    measure(fun() ->
        Echo = spawn_link(Node, ?MODULE, echo, []),
        _ = samples(Echo, ?WARM_UP),
        latency(samples(Echo, Milliseconds))
    end).

%% Round trips per second of Count processes, each with an echo of its own.
-spec clients(node(), Count :: pos_integer(), Milliseconds :: pos_integer()) -> float().
clients(Node, Count, Milliseconds) ->
    measure(fun() ->
        _ = trips(Node, Count, ?WARM_UP),
        trips(Node, Count, Milliseconds)
    end).

trips(Node, Count, Milliseconds) ->
    Self = self(),
    Clients = [
        spawn_link(fun() ->
            Echo = spawn_link(Node, ?MODULE, echo, []),
            _ = trip(Echo),
            Self ! {self(), ready},
            receive
                start -> ok
            end,
            Self ! {self(), count_trips(Echo, deadline(Milliseconds), 0)},
            unlink(Echo),
            exit(Echo, kill)
        end)
     || _ <- lists:seq(1, Count)
    ],
    _ = [receive {Client, ready} -> ok end || Client <- Clients],
    Start = now_ns(),
    _ = [Client ! start || Client <- Clients],
    Trips = lists:sum([receive {Client, Done} -> Done end || Client <- Clients]),
    Trips * 1.0e9 / (now_ns() - Start).

count_trips(Echo, Deadline, Done) ->
    case trip(Echo) < Deadline of
        true -> count_trips(Echo, Deadline, Done + 1);
        false -> Done + 1
    end.

%% One way: MB/s of payload from the first send to the acknowledgement of all, and what each of
%% the given processes of the operating system has spent meanwhile, in seconds per GB.
-spec stream(node(), payload(), Milliseconds :: pos_integer(), OsPids :: [pos_integer()]) ->
    {MBs :: float(), SecondsPerGB :: [float()]}.
stream(Node, Payload, Milliseconds, OsPids) ->
    measure(fun() ->
        {Message, Size} = message(Payload),
        Sink = spawn_link(Node, ?MODULE, sink, []),
        _ = pour(Sink, Message, Size, ?WARM_UP),
        Before = [meshx_bench_os:cpu(OsPid) || OsPid <- OsPids],
        Start = now_ns(),
        Bytes = pour(Sink, Message, Size, Milliseconds),
        Time = now_ns() - Start,
        After = [meshx_bench_os:cpu(OsPid) || OsPid <- OsPids],
        {Bytes * 1.0e3 / Time, [(B - A) * 1.0e9 / Bytes || {A, B} <- lists:zip(Before, After)]}
    end).

%% One way, to an end that puts each message into a table and keeps it there: MB/s of payload.
-spec store(node(), Size :: pos_integer(), Milliseconds :: pos_integer()) -> MBs :: float().
store(Node, Size, Milliseconds) ->
    measure(fun() ->
        {Message, Size} = message(Size),
        Table = spawn_link(Node, ?MODULE, table, []),
        Start = now_ns(),
        Bytes = pour(Table, Message, Size, Milliseconds),
        Bytes * 1.0e3 / (now_ns() - Start)
    end).

%% One way, as many messages as the other end has asked for, which it does as GenStage's consumers do
%% by default: for 1000, and for 500 more whenever it has received 500. MB/s of payload.
-spec demand(node(), Size :: pos_integer(), Milliseconds :: pos_integer()) -> MBs :: float().
demand(Node, Size, Milliseconds) ->
    measure(fun() ->
        {Message, Size} = message(Size),
        Consumer = spawn_link(Node, ?MODULE, consumer, [self(), ?DEMAND]),
        Start = now_ns(),
        Count = supply(Consumer, Message, ?DEMAND, Start + Milliseconds * 1000000, 0),
        Count * Size * 1.0e3 / (now_ns() - Start)
    end).

supply(Consumer, Message, 0, Deadline, Count) ->
    receive
        {Consumer, ask, More} ->
            case now_ns() < Deadline of
                true -> supply(Consumer, Message, More, Deadline, Count);
                false -> Count
            end
    end;
supply(Consumer, Message, Asked, Deadline, Count) ->
    Consumer ! Message,
    supply(Consumer, Message, Asked - 1, Deadline, Count + 1).

%% How long small messages take while 1 MiB messages go the same way.
-spec beside(node(), Size :: pos_integer(), Milliseconds :: pos_integer()) -> latency().
beside(Node, Size, Milliseconds) ->
    measure(fun() ->
        Echo = spawn_link(Node, ?MODULE, echo, []),
        Sink = spawn_link(Node, ?MODULE, sink, []),
        _ = samples(Echo, ?WARM_UP),
        {Message, Size} = message(Size),
        Self = self(),
        Stream = spawn_link(fun() ->
            _ = pour(Sink, Message, Size, ?WARM_UP),
            Self ! {self(), started},
            _ = pour(Sink, Message, Size, Milliseconds + ?WARM_UP),
            Self ! {self(), ended}
        end),
        receive
            {Stream, started} -> ok
        end,
        Samples = samples(Echo, Milliseconds),
        receive
            {Stream, ended} -> ok
        end,
        latency(Samples)
    end).

%% Count messages as fast as they go, to an end that needs some milliseconds for each.
-spec slow(node(), Size :: pos_integer(), Count :: pos_integer()) -> ok.
slow(Node, Size, Count) ->
    measure(fun() ->
        {Message, Size} = message(Size),
        Sink = spawn_link(Node, ?MODULE, slow_sink, []),
        ok = send(Sink, Message, Count),
        acknowledged(Sink)
    end).

%% Count messages to an end that takes them, but for one of Every, to a process that doesn't look
%% at its messages: until it does, each holds the memory into which the carrier has read it.
%% Returns by how many MiB their VM's binaries have grown.
-spec keep(node(), Size :: pos_integer(), Count :: pos_integer(), Every :: pos_integer()) -> float().
keep(Node, Size, Count, Every) ->
    measure(fun() ->
        {Message, Size} = message(Size),
        Sink = spawn_link(Node, ?MODULE, sink, []),
        Shelf = spawn_link(Node, ?MODULE, shelf, []),
        Before = binaries(Node),
        lists:foreach(
            fun(_) ->
                ok = send(Sink, Message, Every - 1),
                Shelf ! Message
            end,
            lists:seq(1, Count div Every)
        ),
        _ = acknowledged(Sink),
        binaries(Node) - Before
    end).

-spec collect_garbage() -> ok.
collect_garbage() ->
    lists:foreach(fun erlang:garbage_collect/1, processes()).

measure(Fun) ->
    {Worker, Monitor} = spawn_opt(fun() -> exit({measured, Fun()}) end, [monitor, {min_heap_size, ?HEAP}]),
    receive
        {'DOWN', Monitor, process, Worker, {measured, Result}} -> Result;
        {'DOWN', Monitor, process, Worker, Reason} -> error(Reason)
    end.

%%% Sending

message(terms) ->
    Terms = [{key, N, 2 * N} || N <- lists:seq(1, 1000)],
    {Terms, erlang:external_size(Terms)};
message(Size) ->
    {binary:copy(<<"m">>, Size), Size}.

%% Returns the number of bytes. What holds the sender back is the distribution alone, which suspends
%% whoever sends to a link whose queue is full; so there is no window of credits. A sink slower
%% than the link falls behind for a while (34,000 messages of 64 bytes were seen), and what it needs
%% to catch up counts, since it acknowledges last.
pour(Sink, Message, Size, Milliseconds) ->
    Batch = max(1, ?BATCH div Size),
    Count = pour_batches(Sink, Message, Batch, deadline(Milliseconds), 0),
    Count = acknowledged(Sink),
    Count * Size.

pour_batches(Sink, Message, Batch, Deadline, Sent) ->
    ok = send(Sink, Message, Batch),
    case now_ns() < Deadline of
        true -> pour_batches(Sink, Message, Batch, Deadline, Sent + Batch);
        false -> Sent + Batch
    end.

send(_Sink, _Message, 0) ->
    ok;
send(Sink, Message, Count) ->
    Sink ! Message,
    send(Sink, Message, Count - 1).

%% The answer to all that was sent to Sink since the last one.
acknowledged(Sink) ->
    Sink ! {self(), acknowledge},
    receive
        {Sink, Answer} -> Answer
    end.

%% The time after it.
trip(Echo) ->
    Echo ! {self(), ping},
    receive
        pong -> now_ns()
    end.

%% In nanoseconds.
samples(Echo, Milliseconds) ->
    samples(Echo, deadline(Milliseconds), now_ns(), []).

samples(Echo, Deadline, Start, Samples) ->
    case trip(Echo) of
        End when End < Deadline -> samples(Echo, Deadline, End, [End - Start | Samples]);
        End -> [End - Start | Samples]
    end.

latency(Samples) ->
    Sorted = lists:sort(Samples),
    Count = length(Sorted),
    Quantile = fun(Part) -> lists:nth(max(1, ceil(Part * Count)), Sorted) / 1000 end,
    #{
        p50 => Quantile(0.5),
        p99 => Quantile(0.99),
        p999 => Quantile(0.999),
        max => lists:last(Sorted) / 1000,
        count => Count
    }.

deadline(Milliseconds) ->
    now_ns() + Milliseconds * 1000000.

now_ns() ->
    erlang:monotonic_time(nanosecond).

%%% Ends

-spec echo() -> no_return().
echo() ->
    receive
        {From, ping} -> From ! pong
    end,
    echo().

%% Counts messages.
-spec sink() -> no_return().
sink() ->
    sink(0).

sink(Count) ->
    receive
        {From, acknowledge} ->
            From ! {self(), Count},
            sink(0);
        _ ->
            sink(Count + 1)
    end.

-spec table() -> no_return().
table() ->
    table(ets:new(?MODULE, []), 0).

table(Table, Count) ->
    receive
        {From, acknowledge} ->
            From ! {self(), Count},
            table(Table, 0);
        Message ->
            ets:insert(Table, {Count, Message}),
            table(Table, Count + 1)
    end.

-spec consumer(Producer :: pid(), Demand :: pos_integer()) -> no_return().
consumer(Producer, Demand) ->
    consumer(Producer, Demand div 2, 0).

consumer(Producer, Ask, Ask) ->
    Producer ! {self(), ask, Ask},
    consumer(Producer, Ask, 0);
consumer(Producer, Ask, Count) ->
    receive
        _ -> consumer(Producer, Ask, Count + 1)
    end.

-spec slow_sink() -> no_return().
slow_sink() ->
    receive
        {From, acknowledge} -> From ! {self(), ok};
        _ -> timer:sleep(?SLOW_WORK)
    end,
    slow_sink().

-spec shelf() -> no_return().
shelf() ->
    receive
    after infinity -> ok
    end,
    shelf().

%% MiB that the node's binaries have. What isn't kept is collected before.
binaries(Node) ->
    ok = erpc:call(Node, ?MODULE, collect_garbage, []),
    erpc:call(Node, erlang, memory, [binary]) / 1048576.
