%% Traffic of a link that is up: its output process, which the controller has become, and its input
%% process. They and the connection process are linked, so that the end of one ends the link.
%%
%% Output takes messages from the emulator only while the socket has room: the emulator's own
%% limit then suspends the senders. Input has nobody whom it could suspend but the peer, by not
%% reading; it does so while those who receive fall behind.
-module(meshx_node_traffic).

-export([run/3, written/2]).

%% Spawned.
-export([input/3]).

%% Output: bytes and frames gathered for one write, behind which what comes next waits: half of what the
%% emulator queues by default before it suspends senders (+zdbbl), so that one or two let them go on.
-define(GATHER_BYTES, 524288).
-define(GATHER_FRAMES, 500).
%% Frames of the first writes, and what part of what was written before may go in one.
-define(FEW_FRAMES, 16).
-define(WRITTEN_PART, 4).
%% Bytes that tell of a stream of large messages, if they are written with nothing left in between.
%% How urgent output is is judged after so many of them, and when nothing is left.
-define(MUCH, 393216).
%% Judgements after the last of them for which the stream counts as going on.
-define(URGENT, 64).
%% Judgements at high priority until others have a turn.
-define(PER_TURN, 8).
%% The shortest rest and the longest, microseconds. Whether there is a stream is judged over the time
%% of the longest, and whether it goes on over a longer one.
-define(REST_MIN, 64).
-define(REST_MAX, 1024).
-define(JUDGED_TIME, 10000).
%% It is a stream if so many frames, or so many bytes, are written in the time of the longest rest.
-define(STREAM_FRAMES, 256).
-define(STREAM_BYTES, 262144).
%% Each frame that comes in may be an answer that a sender waits for, unless so many frames, or bytes
%% as above, are written for each.
-define(FRAMES_PER_ANSWER, 1024).
%% After a rest that brings fewer frames and bytes than this the stream has ended.
-define(STILL_MANY, 64).
-define(STILL_MUCH, 65536).
%% What part of the bytes that the emulator queues before it suspends senders (+zdbbl) a rest should
%% bring, at least and at most. Of a longer queue no more than two gathers are used. More is queued than
%% is sent: size_obuf() in erts/emulator/beam/dist.c counts some 140 bytes more for each message.
-define(QUEUE_MAX, (2 * ?GATHER_BYTES)).
-define(RESTED_LEAST_PART, 4).
-define(RESTED_MOST_PART, 2).

%% Input: bytes that are awaited in a stream of large messages, and how long, ms; where nobody else is
%% runnable in parts of so many microseconds, naps.
-define(AWAITED_BYTES, ?STREAM_BYTES).
-define(AWAITED_TIME, 2).
-define(NAP, 250).
-define(NAPS, (1000 * ?AWAITED_TIME div ?NAP)).
%% If that was in vain in a stream that had not lasted for so many microseconds, what comes in is judged
%% for so many before it counts as a stream once more: what is sent by halts, such as parts of which each
%% is acknowledged, would wait for a part's end again and again.
-define(LASTING, 32768).
-define(VAIN_TIME, 65536).
%% Bytes of messages, weighed, and how many of these, after which it is looked whether they
%% have been received.
-define(WINDOW_BYTES, 1048576).
-define(WINDOW_MESSAGES, 2).
%% How many times as much the bytes of messages in fragments count.
-define(FRAGMENTS_WEIGHT, 4).
%% A message of fewer bytes is small. It is looked at only if it is a read's last: a look at each would
%% cost more than it saves. What such a message costs beside its bytes, and what part of it all counts.
-define(LARGE, 4096).
-define(SMALL_COST, 256).
-define(SMALL_PART, 4).
%% How many of these are looked at, and bytes of the largest binary that is on its process's heap.
-define(SMALL_MESSAGES, 64).
-define(HEAP_BINARY, 64).
%% Frames up to this size share a binary, as link_reader.c has it.
-define(SHARED_FRAME, 2048).
%% The first pause and the last, each of which is twice as long as the one before, microseconds;
%% then input goes on though they haven't: they may never be.
-define(PAUSE, 64).
-define(PAUSE_MAX, 2048).
%% The pause before which it is noted how many are left. If as many are after the last one the look
%% was in vain, and after so many of them nobody waits for these receivers until so many more bytes
%% have come.
-define(PAUSE_NOTED, 1024).
-define(VAIN_LOOKS, 8).
-define(KEPT_BYTES, 8388608).
%% After so long without input, ms, it doesn't matter any more how far receivers were.
-define(FORGET_TIME, 5).

%% First bytes of the frames that carry a message in fragments (erl_dist_protocol, "Distribution
%% header for fragmented messages"); the last fragment has number 1.
-define(VERSION, 131).
-define(FIRST_FRAGMENT, 69).
-define(FRAGMENT, 70).

%% Off-heap and fullsweep: binaries must not linger in a process that has no live data.
-define(SPAWN_OPTIONS, [link, {message_queue_data, off_heap}, {fullsweep_after, 0}]).

%% How urgent output is: judgements left for which the stream counts as going on, and for how many
%% of them we may keep the scheduler.
-type urgency() :: normal | {pos_integer(), non_neg_integer()}.

%% What was written since there was nothing left.
-record(drain, {
    %% the rest before it, microseconds, and what half of that rest has brought, if this one is the
    %% first of its length
    rest = 0 :: non_neg_integer(),
    half = 0 :: non_neg_integer(),
    frames = 0 :: non_neg_integer(),
    bytes = 0 :: non_neg_integer(),
    %% of them, in the first write
    first = 0 :: non_neg_integer(),
    %% of them, since the urgency was last judged
    unjudged = 0 :: non_neg_integer()
}).

%% A link's counts at a time, microseconds, for one of its directions.
-record(sample, {
    time :: integer(),
    frames :: non_neg_integer(),
    bytes :: non_neg_integer(),
    %% frames of the other direction
    answers :: non_neg_integer()
}).

%% A stream that comes in.
-record(inflow, {
    %% since when there is one, microseconds: a wait ends when much has come, or a moment after
    since = none :: none | integer(),
    %% what is judged, from when on, and for how long at least, microseconds
    sample :: #sample{},
    judged_time = ?REST_MAX :: pos_integer()
}).

%% Messages given to the emulator since the last look.
-record(window, {
    %% a frame of each that is looked at, newest first, and how many these are
    messages = [] :: [binary()],
    count = 0 :: non_neg_integer(),
    %% of all, weighed; negative: as long as none is looked at
    bytes = 0 :: integer(),
    %% looks in vain, one after the other
    vain = 0 :: non_neg_integer()
}).

%% The calling process, owner of the link, becomes its output process.
-spec run(erlang:dist_handle(), meshx_node_nif:socket(), pid()) -> no_return().
run(Handle, Link, Supervisor) ->
    Input = spawn_opt(?MODULE, input, [Handle, Link, Supervisor], ?SPAWN_OPTIONS),
    ok = erlang:dist_ctrl_input_handler(Handle, Input),
    _ = erlang:dist_ctrl_set_opt(Handle, get_size, true),
    Input ! {self(), start},
    process_flag(priority, normal),
    erlang:dist_ctrl_get_data_notification(Handle),
    output(Handle, Link, normal, sample(Link, output)).

%% Follows a write to its end.
-spec written(meshx_node_nif:socket(), meshx_node_nif:write_result()) -> ok | {error, term()}.
written(_Link, ok) ->
    ok;
written(Link, more) ->
    written(Link, meshx_node_nif:flush(Link));
written(Link, wait) ->
    receive
        {select, Link, _, ready_output} -> ok
    end,
    written(Link, meshx_node_nif:flush(Link));
written(_Link, {error, _} = Error) ->
    Error.

%% ---- output ----

-spec output(erlang:dist_handle(), meshx_node_nif:socket(), urgency(), #sample{}) -> no_return().
output(Handle, Link, Urgency, Sample) ->
    receive
        dist_data ->
            try drain(Handle, Link, Urgency, Sample, #drain{}) of
                {NextUrgency, NextSample} -> output(Handle, Link, NextUrgency, NextSample)
            catch
                error:badarg -> death_row(connection_closed)
            end;
        {select, Link, _, ready_output} ->
            %% The rest of a tick.
            write(Link, meshx_node_nif:flush(Link)),
            output(Handle, Link, Urgency, Sample);
        {send, From, Ref, Data} ->
            %% A back door that OTP's distribution test suites use on carriers like this one.
            Binary = iolist_to_binary(Data),
            write(Link, meshx_node_nif:write(Link, [{byte_size(Binary), [Binary]}])),
            From ! {Ref, ok},
            output(Handle, Link, Urgency, Sample);
        _ ->
            output(Handle, Link, Urgency, Sample)
    end.

%% Writes all that the emulator has for this link, then asks to be told of more. While the
%% socket is full nothing is taken from the emulator, which then suspends the senders.
%%
%% What many processes send is not written at once: the far side works on the first part while the
%% next is made, and both have something to do. What goes on for longer is a stream, of which more
%% and more goes into one write.
-spec drain(erlang:dist_handle(), meshx_node_nif:socket(), urgency(), #sample{}, #drain{}) ->
    {urgency(), #sample{}}.
drain(Handle, Link, Urgency, Sample, #drain{unjudged = Bytes} = Drain) when Bytes >= ?MUCH ->
    drain(Handle, Link, urgency(Bytes, Urgency), Sample, Drain#drain{unjudged = 0});
drain(Handle, Link, Urgency, Sample, Drain) ->
    case gather(Handle, 0, most(Drain), []) of
        {[], _} ->
            Judged = urgency(Drain#drain.unjudged, Urgency),
            case rest(Link, Sample, Drain) of
                {#drain{rest = 0}, NextSample} ->
                    erlang:dist_ctrl_get_data_notification(Handle),
                    {Judged, NextSample};
                {#drain{rest = Rest} = Next, NextSample} ->
                    pause(Rest),
                    drain(Handle, Link, Judged, NextSample, Next)
            end;
        {Frames, Bytes} ->
            write(Link, meshx_node_nif:write(Link, Frames)),
            drain(Handle, Link, Urgency, Sample, add(length(Frames), Bytes, Drain))
    end.

add(Frames, Bytes, #drain{frames = 0} = Drain) ->
    Drain#drain{frames = Frames, bytes = Bytes, first = Bytes, unjudged = Bytes};
add(Frames, Bytes, #drain{frames = OldFrames, bytes = OldBytes, unjudged = Unjudged} = Drain) ->
    Drain#drain{frames = OldFrames + Frames, bytes = OldBytes + Bytes, unjudged = Unjudged + Bytes}.

most(#drain{rest = 0, frames = Written}) ->
    min(?GATHER_FRAMES, max(?FEW_FRAMES, Written div ?WRITTEN_PART));
most(_) ->
    ?GATHER_FRAMES.

%% Who sends a stream and we, beside each other on two schedulers, have much more work with it than
%% one after the other: we would wait and be woken for every few messages, the locks and memory of the
%% queue between us go to and fro, and where processors are few a thread of the far side waits for
%% ours. So in a stream we rest until a good part of the queue is full; but not where the sender may be
%% waiting for answers.
-spec rest(meshx_node_nif:socket(), #sample{}, #drain{}) -> {#drain{}, #sample{}}.
rest(Link, #sample{time = Time} = Sample, #drain{rest = 0}) ->
    case erlang:monotonic_time(microsecond) - Time < ?REST_MAX of
        true ->
            {#drain{}, Sample};
        false ->
            Now = sample(Link, output),
            case is_stream(Sample, Now) of
                true -> {#drain{rest = ?REST_MIN}, Now};
                false -> {#drain{}, Now}
            end
    end;
rest(Link, #sample{time = Time} = Sample, Drain) ->
    Now = sample(Link, output),
    Short = Now#sample.time - Time < ?JUDGED_TIME,
    case is_one_way(Sample, Now) andalso (Short orelse is_stream(Sample, Now)) of
        true when Short -> {next_rest(Drain), Sample};
        true -> {next_rest(Drain), Now};
        false -> {#drain{}, Now}
    end.

-spec sample(meshx_node_nif:socket(), output | input) -> #sample{}.
sample(Link, Direction) ->
    Time = erlang:monotonic_time(microsecond),
    {FramesIn, FramesOut, BytesIn, BytesOut, _Pending} = meshx_node_nif:statistics(Link),
    case Direction of
        output -> #sample{time = Time, frames = FramesOut, bytes = BytesOut, answers = FramesIn};
        input -> #sample{time = Time, frames = FramesIn, bytes = BytesIn, answers = FramesOut}
    end.

is_stream(Before, Now) ->
    Rests = rests(Before, Now),
    is_moved(Before, Now, ?STREAM_FRAMES * Rests, ?STREAM_BYTES * Rests) andalso is_one_way(Before, Now).

is_one_way(Before, Now) ->
    Answers = Now#sample.answers - Before#sample.answers,
    is_moved(Before, Now, ?FRAMES_PER_ANSWER * Answers, ?STREAM_BYTES * Answers).

is_moved(Before, Now, Frames, Bytes) ->
    Now#sample.frames - Before#sample.frames >= Frames orelse is_moved(Before, Now, Bytes).

is_moved(Before, Now, Bytes) ->
    Now#sample.bytes - Before#sample.bytes >= Bytes.

rests(Before, Now) ->
    (Now#sample.time - Before#sample.time) / ?REST_MAX.

next_rest(#drain{frames = Frames, bytes = Bytes}) when Frames < ?STILL_MANY, Bytes < ?STILL_MUCH ->
    #drain{};
next_rest(#drain{rest = Rest, half = Half, frames = Frames, bytes = Bytes, first = First}) ->
    Queue = min(?QUEUE_MAX, erlang:system_info(dist_buf_busy_limit)),
    if
        %% It is not time that the senders need: they wait for something else. Of a few frames, one
        %% more or less doesn't tell.
        Frames >= ?STILL_MANY, 4 * Bytes < 5 * Half -> #drain{};
        %% A rest that fills the queue suspends senders. Those who then send little are suspended again
        %% and again by those who send much, until we rest no more.
        Rest =:= ?REST_MIN, First >= Queue div ?RESTED_MOST_PART -> #drain{};
        Bytes > Queue div ?RESTED_MOST_PART -> #drain{rest = max(?REST_MIN, Rest div 2)};
        Bytes < Queue div ?RESTED_LEAST_PART, Rest < ?REST_MAX -> #drain{rest = 2 * Rest, half = Bytes};
        true -> #drain{rest = Rest}
    end.

%% At most Most frames.
gather(_Handle, Bytes, Most, Frames) when Bytes >= ?GATHER_BYTES; Most =:= 0 ->
    {lists:reverse(Frames), Bytes};
gather(Handle, Bytes, Most, Frames) ->
    case erlang:dist_ctrl_get_data(Handle) of
        none -> {lists:reverse(Frames), Bytes};
        {Size, _} = Frame -> gather(Handle, Bytes + Size, Most - 1, [Frame | Frames])
    end.

write(Link, Result) ->
    case written(Link, Result) of
        ok -> ok;
        {error, Reason} -> death_row(end_reason(Reason))
    end.

%% When its queue is full the emulator suspends all senders, and resumes all when the queue is
%% half empty. The first to run, usually one with much to send, fills it again, and the others
%% are suspended once more: for seconds, if they are unlucky. So while much is sent, and a while
%% after, we run before the senders, and take what the first of them has queued before the next
%% one runs. Otherwise we run like all others: by then several messages have come together.
-spec urgency(non_neg_integer(), urgency()) -> urgency().
urgency(0, Urgency) ->
    Urgency;
urgency(Bytes, normal) when Bytes >= ?MUCH ->
    process_flag(priority, high),
    {?URGENT, ?PER_TURN};
urgency(_, normal) ->
    normal;
urgency(Bytes, {_, Turn}) when Bytes >= ?MUCH ->
    {?URGENT, turn(Turn)};
urgency(_, {1, _}) ->
    process_flag(priority, normal),
    normal;
urgency(_, {Writes, Turn}) ->
    {Writes - 1, turn(Turn)}.

%% A process of high priority that never waits would keep its scheduler's others from running for
%% ever, our own input among them, and with it the ticks.
turn(0) ->
    process_flag(priority, normal),
    erlang:yield(),
    process_flag(priority, high),
    ?PER_TURN;
turn(Turn) ->
    Turn - 1.

%% ---- input ----

-spec input(erlang:dist_handle(), meshx_node_nif:socket(), pid()) -> no_return().
input(Handle, Link, Supervisor) ->
    link(Supervisor),
    %% Nothing may be put before we are registered as the input process.
    receive
        {_Controller, start} -> input_loop(Handle, Link, #window{}, #inflow{sample = sample(Link, input)})
    end.

-spec input_loop(erlang:dist_handle(), meshx_node_nif:socket(), #window{}, #inflow{}) -> no_return().
input_loop(Handle, Link, Window, Inflow) ->
    case meshx_node_nif:read(Link) of
        {more, []} ->
            erlang:yield(),
            input_loop(Handle, Link, Window, Inflow);
        {more, Frames} ->
            yield_if_quiet(),
            put_frames(Handle, Frames),
            %% Those who receive it come first.
            erlang:yield(),
            yield_if_quiet(),
            input_loop(Handle, Link, keep_pace(Frames, Window), Inflow);
        {wait, Frames} ->
            put_frames(Handle, Frames),
            {NextWindow, NextInflow} = await_input(Link, keep_pace_waiting(Frames, Window), Inflow),
            input_loop(Handle, Link, NextWindow, NextInflow);
        {error, Reason} ->
            exit(end_reason(Reason))
    end.

%% Ends our turn where no more than a receiver waits for one. The emulator counts the turns at whose end
%% somebody waits against those at whose end nobody does, and wakes another scheduler if there is too much
%% for one (wakeup_other_check() in erts/emulator/beam/erl_process.c). On two schedulers a receiver that
%% has little to do and we would wake each other for every few messages, which costs more than these. So
%% a read has a turn of its own; but not where others are busy, each of whom would come before us.
yield_if_quiet() ->
    case erlang:statistics(total_run_queue_lengths) of
        Waiting when Waiting =< 1 -> erlang:yield();
        _ -> true
    end.

%% In a stream we wait for much at once, since each wait that ends costs switches of threads.
-spec await_input(meshx_node_nif:socket(), #window{}, #inflow{}) -> {#window{}, #inflow{}}.
await_input(Link, Window, #inflow{since = Since} = Inflow) when is_integer(Since) ->
    case await_much(Link, ?NAPS) of
        ready -> {Window, judge(Link, Inflow)};
        none -> {Window, in_vain(Link, Inflow)}
    end;
await_input(Link, #window{count = 0, bytes = 0, vain = 0} = Window, Inflow) ->
    receive
        {select, Link, _, ready_input} -> {Window, judge(Link, Inflow)}
    end;
await_input(Link, Window, Inflow) ->
    receive
        {select, Link, _, ready_input} -> {Window, judge(Link, Inflow)}
    after ?FORGET_TIME ->
        erlang:garbage_collect(),
        await_input(Link, #window{}, Inflow)
    end.

%% Where nobody else is runnable the scheduler would go to sleep, and before that it spins, for most of
%% so short a wait, on a processor that the sidecars may need. So it sleeps with us, a moment at a time:
%% somebody may become runnable.
await_much(_Link, 0) ->
    none;
await_much(Link, Naps) ->
    %% Those who receive it come first.
    erlang:yield(),
    case erlang:statistics(total_run_queue_lengths) of
        0 ->
            case meshx_node_nif:await(Link, ?NAP) of
                ready -> ready;
                none -> await_much(Link, Naps - 1)
            end;
        _ ->
            select_much(Link, meshx_node_nif:select(Link))
    end.

select_much(Link, ok) ->
    receive
        {select, Link, _, ready_input} -> ready
    after ?AWAITED_TIME -> none
    end;
select_much(_Link, {error, _}) ->
    %% As the next read finds.
    ready.

judge(Link, #inflow{since = Since, sample = #sample{time = Time} = Before, judged_time = JudgedTime} = Inflow) ->
    case erlang:monotonic_time(microsecond) - Time < JudgedTime of
        true ->
            Inflow;
        false ->
            Now = sample(Link, input),
            case is_inflow(Before, Now) of
                true when is_integer(Since) -> Inflow#inflow{sample = Now};
                true ->
                    ok = meshx_node_nif:low_water(Link, ?AWAITED_BYTES),
                    #inflow{since = Now#sample.time, sample = Now, judged_time = ?JUDGED_TIME};
                false when is_integer(Since) -> no_stream(Link, Now, ?REST_MAX);
                false -> Inflow#inflow{sample = Now, judged_time = ?REST_MAX}
            end
    end.

%% Whether it is a stream of large messages: with small ones the receiver has enough to do, and what is
%% awaited would be many of them.
is_inflow(Before, Now) ->
    is_moved(Before, Now, ?STREAM_BYTES * rests(Before, Now)) andalso
        is_moved(Before, Now, ?LARGE * (Now#sample.frames - Before#sample.frames)) andalso
        is_one_way(Before, Now).

in_vain(Link, #inflow{since = Since}) ->
    case sample(Link, input) of
        #sample{time = Time} = Now when Time - Since >= ?LASTING -> no_stream(Link, Now, ?REST_MAX);
        Now -> no_stream(Link, Now, ?VAIN_TIME)
    end.

no_stream(Link, Now, JudgedTime) ->
    ok = meshx_node_nif:low_water(Link, 0),
    #inflow{sample = Now, judged_time = JudgedTime}.

put_frames(Handle, Frames) ->
    try
        lists:foreach(fun(Frame) -> erlang:dist_ctrl_put_data(Handle, Frame) end, Frames)
    catch
        error:_ -> death_row(connection_closed)
    end.

%% Input that outruns the receivers makes their message queues long, and a long queue is not only
%% memory: a receiver's garbage collection decodes all of it (unless its message_queue_data is
%% off_heap), so that from some length on, a few MiB, it gets ever slower.
%%
%% A message in one frame is not copied by the emulator: a binary in it refers to the frame until
%% the receiver has collected its garbage, which may be some 400 KiB, or for as long as it keeps the
%% binary. So of such messages more is let through before the look than of those in fragments, which
%% are copied when they are received. Of small ones, which share a binary and are copied too, many
%% more are: they are received in less time than a pause takes.
-spec keep_pace([binary()], #window{}) -> #window{}.
keep_pace([Frame | Frames], #window{bytes = Bytes} = W) when Bytes < 0 ->
    keep_pace(Frames, W#window{bytes = min(0, Bytes + byte_size(Frame))});
keep_pace([Frame | Frames], #window{bytes = Bytes} = W) when byte_size(Frame) >= ?LARGE ->
    case fragment_number(Frame) of
        none ->
            keep_pace(Frames, look_at(Frame, W#window{bytes = Bytes + byte_size(Frame)}));
        %% Held by the emulator until the message is whole. The last one may be too small to be
        %% looked at: the last but one stands for the message.
        2 ->
            Weighed = Bytes + ?FRAGMENTS_WEIGHT * byte_size(Frame),
            keep_pace(Frames, look_at(Frame, W#window{bytes = Weighed}));
        _ ->
            keep_pace(Frames, W#window{bytes = Bytes + ?FRAGMENTS_WEIGHT * byte_size(Frame)})
    end;
keep_pace([Small | Frames], #window{count = Count, bytes = Bytes} = W) ->
    Weighed = W#window{bytes = Bytes + (byte_size(Small) + ?SMALL_COST) div ?SMALL_PART},
    case Frames =:= [] andalso Count < ?SMALL_MESSAGES andalso can_be_looked_at(Small) of
        true -> keep_pace([], look_at(Small, Weighed));
        false -> keep_pace(Frames, Weighed)
    end;
keep_pace([], #window{messages = Messages, count = Count, bytes = Bytes, vain = Vain}) when
    Bytes >= ?WINDOW_BYTES, Count >= ?WINDOW_MESSAGES
->
    case await_receivers(Messages, Count, ?PAUSE, Count) of
        ok -> #window{};
        vain when Vain + 1 < ?VAIN_LOOKS -> #window{vain = Vain + 1};
        vain -> #window{vain = Vain, bytes = -?KEPT_BYTES}
    end;
keep_pace([], W) ->
    W.

look_at(Frame, #window{messages = Messages, count = Count} = W) ->
    W#window{messages = [Frame | Messages], count = Count + 1}.

%% Before a wait for more: there may be one after each read of small messages. It is different with
%% large ones, of which the next takes a while to come, and with one alone.
keep_pace_waiting([Large | _], #window{bytes = Bytes, vain = Vain}) when byte_size(Large) >= ?LARGE ->
    #window{bytes = min(0, Bytes), vain = Vain};
keep_pace_waiting([_], #window{count = 0} = W) ->
    W;
keep_pace_waiting(Frames, W) ->
    keep_pace(Frames, W).

%% No binary on our heap: nobody else can refer to it; no last fragment: see above.
can_be_looked_at(Small) ->
    byte_size(Small) > ?HEAP_BINARY andalso fragment_number(Small) =:= none.

%% The number of a message's fragment: the first has the greatest, the last 1.
fragment_number(<<?VERSION, Type, _Sequence:64, Number:64, _/binary>>) when
    Type =:= ?FIRST_FRAGMENT; Type =:= ?FRAGMENT
->
    Number;
fragment_number(_) ->
    none.

%% Waits until half of Messages have been received, or in vain: none was for long, and all may be
%% kept by those who received them. If one of them is copied, that one may be waiting.
await_receivers(Messages, Count, Pause, Noted) ->
    case held(Messages) of
        Held when 2 * Held =< Count ->
            ok;
        Held when Pause > ?PAUSE_MAX ->
            case Held < Noted orelse lists:any(fun is_copied/1, Messages) of
                true -> ok;
                false -> vain
            end;
        Held ->
            pause(Pause),
            case Pause of
                ?PAUSE_NOTED -> await_receivers(Messages, Count, 2 * Pause, Held);
                _ -> await_receivers(Messages, Count, 2 * Pause, Noted)
            end
    end.

%% Whether no message that has been received refers to Frame any more.
is_copied(Frame) ->
    byte_size(Frame) =< ?SHARED_FRAME orelse fragment_number(Frame) =/= none.

%% A millisecond, the least that `after' can do, is what MiBs take: nobody would have work meanwhile.
pause(Microseconds) ->
    case start_timer(get(?MODULE), Microseconds) of
        {ok, Timer} ->
            put(?MODULE, Timer),
            receive
                {select, Timer, _, ready_input} -> ok
            end;
        {error, _} ->
            receive
            after 1 -> ok
            end
    end.

%% Opened when it is first needed.
start_timer(undefined, Microseconds) ->
    case meshx_node_nif:timer() of
        {ok, Timer} -> start_timer(Timer, Microseconds);
        Error -> Error
    end;
start_timer(Timer, Microseconds) ->
    case meshx_node_nif:timer_start(Timer, Microseconds) of
        ok -> {ok, Timer};
        Error -> Error
    end.

%% How many of Messages the emulator, or a receiver's garbage, still has. An emulator that doesn't tell
%% it in this form has none, for us.
held(Messages) ->
    %% Only Messages are on our heap then.
    erlang:garbage_collect(),
    {binary, Binaries} = process_info(self(), binary),
    Held = length([Id || {Id, _Size, References} <- Binaries, References > 1]),
    min(Held, length(Messages)).

%% ---- the end ----

end_reason(closed) -> connection_closed;
end_reason(Reason) -> Reason.

%% Once a link goes down its operations begin to fail in all its processes. The one that failed
%% first gives the reason; the others wait here for its exit signal so as not to overwrite it.
-spec death_row(term()) -> no_return().
death_row(Reason) ->
    receive
    after 5000 -> exit(Reason)
    end.
