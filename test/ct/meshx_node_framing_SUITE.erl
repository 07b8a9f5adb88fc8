%% Framing as properties: whatever the frames, and however the kernel cuts the stream at either
%% side, a link delivers and writes exactly these frames. And what one call may do at most.
%%
%% PropEr shrinks a case that fails and prints it. Its header (another Debian package) has only
%% macros for the functions that are called here.
-module(meshx_node_framing_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(proper_types, [list/1, non_empty/1, oneof/1, frequency/1, range/2]).
-import(meshx_ct_link, [written/2, bytes/2]).

%% c_src/nif/link_reader.c: FRAMES_PER_READ, BYTES_PER_READ and STAGE_BULK, LOW_WATER_MIN.
%% c_src/nif/link_writer.c: WRITES_PER_CALL, PIECES_MAX.
-define(FRAMES_PER_READ, 512).
-define(BYTES_PER_READ, (64 + 256) * 1024).
-define(LOW_WATER_MIN, 4096).
-define(WRITES_PER_CALL, 8).
-define(PIECES, 1024).

%% How long a link may be silent, ms, before a lost wake-up is the only explanation.
-define(PATIENCE, 20000).

all() ->
    [
        reads_any_frames_cut_at_every_byte,
        reads_any_frames_cut_anywhere,
        writes_any_frames_into_a_small_socket,
        writes_any_frames_beside_ticks,
        one_read_delivers_512_frames_at_most,
        one_read_takes_64_kib_and_one_stage_at_most,
        a_frame_keeps_four_times_its_size_or_1_kib_at_most,
        one_write_makes_eight_calls_at_most,
        calls_cost_reductions_by_their_bytes
    ].

init_per_suite(Config) ->
    ok = meshx_node_nif:load(),
    Config.

end_per_suite(_Config) ->
    ok.

holds(Type, Property, Tests) ->
    Options = [long_result, {numtests, Tests}, {max_shrinks, 200}, {on_output, fun ct:log/2}],
    case proper:quickcheck(proper:forall(Type, Property), Options) of
        true -> ok;
        Counterexample -> ct:fail("~nno: ~0p", [Counterexample])
    end.

map(Type, Fun) ->
    proper_types:bind(Type, Fun, false).

%%% What frames there are

%% Around every size at which the code or the kernel behaves differently.
size() ->
    KiB = oneof([0, 1, 2, 4, 8, 16, 64, 128, 256, 480, 512, 600]),
    oneof([0, 1, range(2, 300), map({KiB, range(-100, 100)}, fun({K, D}) -> max(0, K * 1024 + D) end)]).

%% A handshake's packets have 4 KiB at most; an empty one is a packet.
packet_size() ->
    oneof([0, 1, range(2, 300), range(2040, 2056), range(4080, 4096)]).

%%% Input

%% {Packets, Frames, Cuts, Pace}: sizes of the handshake's packets, then of the frames (0: a tick),
%% and of the writes that make up the stream, taken in turns. The framing is changed when the last
%% packet has been delivered, wherever the cuts are.
reads_any_frames_cut_at_every_byte(_Config) ->
    Small = oneof([0, 1, range(2, 40), range(2040, 2050)]),
    Type = {list(oneof([0, 1, range(2, 40)])), list(Small), [1], lockstep},
    holds(Type, fun delivered/1, 40).

reads_any_frames_cut_anywhere(_Config) ->
    KiB = oneof([2, 4, 8, 64, 256, 480]),
    Cut = oneof([range(1, 9), map({KiB, range(-9, 9)}, fun({K, D}) -> K * 1024 + D end), 1500000]),
    Type = {list(packet_size()), list(size()), non_empty(list(Cut)), oneof([lockstep, free])},
    holds(map(Type, fun bound_writes/1), fun delivered/1, 500).

%% Some 5000 writes are enough.
bound_writes({Packets, Frames, Cuts, Pace}) ->
    Bytes = lists:sum([2 + Size || Size <- Packets]) + lists:sum([4 + Size || Size <- Frames]),
    Least = Bytes * length(Cuts) div 5000,
    case lists:sum(Cuts) < Least of
        true -> {Packets, Frames, Cuts ++ [Least], Pace};
        false -> {Packets, Frames, Cuts, Pace}
    end.

delivered({Packets, Frames, Cuts, Pace}) ->
    PacketData = payloads(packet, Packets),
    FrameData = payloads(frame, Frames),
    Stream = iolist_to_binary([framed(16, PacketData), framed(32, FrameData)]),
    {Link, Peer} = meshx_ct_link:pair([{nodelay, true}]),
    try
        Sender = spawn_link(fun() -> send_writes(Peer) end),
        Begin = input(Link, {more, length(Packets), []}),
        Ends = ends([2 + Size || Size <- Packets] ++ [4 + Size || Size <- Frames]),
        {wait, 0, Read} = deliver(Pace, Link, Sender, cut(Stream, Cuts, []), Ends, Begin),
        Statistics = {length(Packets) + length(Frames), 0, byte_size(Stream), 0, 0},
        lists:append(lists:reverse(Read)) =:= PacketData ++ not_empty(FrameData) andalso
            meshx_node_nif:statistics(Link) =:= Statistics
    after
        close(Link, Peer)
    end.

%% The offsets in the stream at which frames of these sizes end, with these.
ends(Sizes) ->
    {Ends, _} = lists:mapfoldl(fun(Size, At) -> {{At + Size, Size}, At + Size} end, 0, Sizes),
    Ends.

%% lockstep: what can be delivered of each write is, and the link waits, before the next one.
deliver(lockstep, Link, Sender, Writes, Ends, Begin) ->
    {End, _} = lists:foldl(
        fun(Write, {State, Before}) ->
            Sender ! {send, Write},
            After = Before + byte_size(Write),
            {take(Link, target(After, Ends), State), After}
        end,
        {take(Link, {bytes, 0}, Begin), 0},
        Writes
    ),
    End;
deliver(free, Link, Sender, Writes, _Ends, Begin) ->
    _ = [Sender ! {send, Write} || Write <- Writes],
    take(Link, {bytes, iolist_size(Writes)}, Begin).

%% What of the stream's first bytes a link reads: all, but for a long frame that isn't whole.
target(Bytes, Ends) ->
    case lists:splitwith(fun({End, _}) -> End =< Bytes end, Ends) of
        {Whole, [{_, Size} | _]} when Size >= ?LOW_WATER_MIN -> {frames, length(Whole)};
        _ -> {bytes, Bytes}
    end.

send_writes(Peer) ->
    receive
        {send, Write} ->
            ok = gen_tcp:send(Peer, Write),
            send_writes(Peer)
    end.

%% Reads as a controller does, after `wait' only when told, until as much as Target says has been
%% taken from the socket and the link waits.
take(Link, Target, {wait, _, _} = State) ->
    {Frames, _, Bytes, _, _} = meshx_node_nif:statistics(Link),
    case Target of
        {frames, Frames} ->
            State;
        {bytes, Bytes} ->
            State;
        _ ->
            receive
                {select, Link, _, ready_input} -> take(Link, Target, setelement(1, State, more))
            after ?PATIENCE -> error({no_input, Target, State, Frames, Bytes})
            end
    end;
take(Link, Target, {more, Packets, Read}) ->
    {Status, Frames} = meshx_node_nif:read(Link),
    State = {Status, Packets, [Frames | Read]},
    case Frames of
        [_] when Packets > 0 -> take(Link, Target, input(Link, setelement(2, State, Packets - 1)));
        [_ | _] when Packets > 0 -> error({more_than_one_packet, Frames});
        _ -> take(Link, Target, State)
    end.

%% After the last packet the framing is another one, and bytes may be there already.
input(Link, {_, 0, Read}) ->
    ok = meshx_node_nif:framing(Link, distribution),
    {more, 0, Read};
input(_Link, State) ->
    State.

payloads(Kind, Sizes) ->
    [bytes({Kind, N}, Size) || {N, Size} <- lists:zip(lists:seq(1, length(Sizes)), Sizes)].

framed(Bits, Payloads) ->
    [[<<(byte_size(Data)):Bits>>, Data] || Data <- Payloads].

%% Binary in pieces of these sizes, taken in turns.
cut(<<>>, _Cuts, _Done) ->
    [];
cut(Binary, [], Done) ->
    cut(Binary, lists:reverse(Done), []);
cut(Binary, [Cut | Cuts], Done) when Cut < byte_size(Binary) ->
    {Piece, Rest} = split_binary(Binary, Cut),
    [Piece | cut(Rest, Cuts, [Cut | Done])];
cut(Binary, _Cuts, _Done) ->
    [Binary].

close(Link, Peer) ->
    ok = meshx_node_nif:close(Link),
    ok = gen_tcp:close(Peer),
    flush(Link).

flush(Link) ->
    receive
        {select, Link, _, _} -> flush(Link)
    after 0 -> ok
    end.

%%% Output

%% {Packets, Steps, Buffers, Pace}: the handshake's packets, then ticks and writes of frames, each
%% frame a size and how it is cut into binaries; the sizes of the sockets' buffers; and how many
%% bytes the peer takes at a time, in turns. Ticks are asked for while a write is pending, too.
writes_any_frames_into_a_small_socket(_Config) ->
    holds(output(), fun written_exactly/1, 25).

%% Another process ticks without pause, as net_kernel may at any moment.
writes_any_frames_beside_ticks(_Config) ->
    holds(output(), fun written_beside_ticks/1, 20).

output() ->
    Pieces = oneof([[1000000], [1, 0], [0, 0, 3], [64, 65, 0, 5000], [65536]]),
    Write = map(list({size(), Pieces}), fun(Frames) -> {write, Frames} end),
    Ticks = map(oneof([1, 2, range(3, 3000)]), fun(Count) -> {ticks, Count} end),
    Buffers = {oneof([1, 20000, 300000]), oneof([8192, 65536])},
    Pace = oneof([range(1, 9), range(1000, 9000), 65536, pause]),
    {list(packet_size()), list(frequency([{1, Ticks}, {2, Write}])), Buffers, non_empty(list(Pace))}.

written_exactly(Plan) ->
    {Expected, Statistics, Stream} = write_and_read(Plan, fun(_Link, Write) -> Write() end),
    {_, _, _, Bytes, Pending} = Statistics,
    Stream =:= iolist_to_binary(Expected) andalso {Bytes, Pending} =:= {byte_size(Stream), 0}.

written_beside_ticks({Packets, _, _, _} = Plan) ->
    {Expected, {_, Frames, _, Bytes, 0}, Stream} = write_and_read(Plan, fun(Link, Write) ->
        Ticker = spawn_link(fun() -> tick_on(Link) end),
        Written = Write(),
        Ticker ! {stop, self()},
        receive
            {Ticker, stopped} -> Written
        end
    end),
    Begin = lists:sum([2 + Size || Size <- Packets]),
    <<Handshake:Begin/binary, All/binary>> = iolist_to_binary(Expected),
    <<CameFirst:Begin/binary, Rest/binary>> = Stream,
    Came = frames(Rest),
    CameFirst =:= Handshake andalso
        not_empty(frames(All)) =:= not_empty(Came) andalso
        {Frames, Bytes} =:= {length(Packets) + length(Came), byte_size(Stream)}.

frames(<<Size:32, Frame:Size/binary, Stream/binary>>) -> [Frame | frames(Stream)];
frames(<<>>) -> [].

not_empty(Frames) ->
    [Frame || <<_, _/binary>> = Frame <- Frames].

%% Around(Link, Write) runs Write in the process that owns the link. Returns what was to be
%% written, the link's statistics, and what has come.
write_and_read({Packets, Steps, {SendBuffer, ReceiveBuffer}, Pace}, Around) ->
    {Link, Peer} = meshx_ct_link:pair([{recbuf, ReceiveBuffer}]),
    ok = meshx_node_nif:setopt(Link, sndbuf, SendBuffer),
    PacketData = payloads(packet, Packets),
    Prepared = [prepared(Step) || Step <- lists:zip(lists:seq(1, length(Steps)), Steps)],
    Writer = meshx_ct_link:in_owner(Link, fun() ->
        [ok = push(Link, meshx_node_nif:write(Link, [{byte_size(Data), [Data]}])) || Data <- PacketData],
        ok = meshx_node_nif:framing(Link, distribution),
        Written = Around(Link, fun() -> [step(Link, Step) || Step <- Prepared] end),
        ok = written(Link, meshx_node_nif:flush(Link)),
        {[framed(16, PacketData), Written], meshx_node_nif:statistics(Link)}
    end),
    Self = self(),
    Reader = spawn_link(fun() -> Self ! {self(), read(Peer, Pace, [], 1000)} end),
    ok = gen_tcp:controlling_process(Peer, Reader),
    %% The owner's end closes the link, and so ends the stream.
    {Expected, Statistics} = meshx_ct_link:finished(Writer),
    receive
        {Reader, Stream} -> {Expected, Statistics, Stream}
    end.

prepared({_, {ticks, Count}}) ->
    {ticks, Count};
prepared({N, {write, Frames}}) ->
    Sizes = [Size || {Size, _} <- Frames],
    Data = lists:zip(payloads(N, Sizes), [at_least(Size div 3000, Cuts) || {Size, Cuts} <- Frames]),
    {write, [{byte_size(Payload), cut(Payload, Cuts, [])} || {Payload, Cuts} <- Data]}.

%% The longer a frame, the longer its pieces, but for the empty ones.
at_least(Least, Cuts) ->
    [min(Cut, 1) * max(Cut, Least) || Cut <- Cuts].

%% The bytes a step writes. Ticks may find the socket full.
step(Link, {ticks, Count}) ->
    {_, Before, _, _, _} = meshx_node_nif:statistics(Link),
    lists:foreach(fun(_) -> ok = meshx_node_nif:tick(Link) end, lists:seq(1, Count)),
    {_, After, _, _, _} = meshx_node_nif:statistics(Link),
    binary:copy(<<0:32>>, After - Before);
step(Link, {write, Frames}) ->
    ok = push(Link, meshx_node_nif:write(Link, Frames)),
    [[<<Size:32>>, Pieces] || {Size, Pieces} <- Frames].

%% As meshx_ct_link:written/2, and a tick asked for meanwhile adds nothing.
push(Link, wait) ->
    Before = meshx_node_nif:statistics(Link),
    ok = meshx_node_nif:tick(Link),
    Before = meshx_node_nif:statistics(Link),
    receive
        {select, Link, _, ready_output} -> push(Link, meshx_node_nif:flush(Link))
    after ?PATIENCE -> error({not_writable, Before})
    end;
push(Link, more) ->
    push(Link, meshx_node_nif:flush(Link));
push(_Link, ok) ->
    ok.

tick_on(Link) ->
    ok = meshx_node_nif:tick(Link),
    receive
        {stop, From} -> From ! {self(), stopped}
    after 0 -> tick_on(Link)
    end.

%% To the end; as Pace says for the first Reads, of which a pause counts as many.
read(Peer, [pause | Pace], Read, Reads) when Reads > 0 ->
    receive
    after 1 -> read(Peer, Pace ++ [pause], Read, Reads - 100)
    end;
read(Peer, [Bytes | Pace], Read, Reads) ->
    ok = inet:setopts(Peer, [{buffer, if Reads > 0 -> Bytes; true -> 65536 end}]),
    case gen_tcp:recv(Peer, 0) of
        {ok, Data} -> read(Peer, Pace ++ [Bytes], [Data | Read], Reads - 1);
        {error, closed} -> iolist_to_binary(lists:reverse(Read))
    end.

%%% What one call may do

one_read_delivers_512_frames_at_most(_Config) ->
    {Link, Peer} = running_pair(),
    Frames = [<<N:32>> || N <- lists:seq(1, 20000)],
    Reads = reads(Link, Peer, iolist_to_binary(framed(32, Frames))),
    ?assertEqual(Frames, lists:append([Delivered || {Delivered, _, _} <- Reads])),
    ?assertEqual(?FRAMES_PER_READ, lists:max([length(Delivered) || {Delivered, _, _} <- Reads])).

one_read_takes_64_kib_and_one_stage_at_most(_Config) ->
    {Link, Peer} = running_pair(),
    Reads = reads(Link, Peer, iolist_to_binary(framed(32, large_frames()))),
    ?assert(lists:max([Bytes || {_, Bytes, _} <- Reads]) =< ?BYTES_PER_READ).

a_frame_keeps_four_times_its_size_or_1_kib_at_most(_Config) ->
    {Link, Peer} = running_pair(),
    Frames = [binary:copy(<<"f">>, 65 + Size) || Size <- lists:seq(0, 3000, 7)],
    Reads = reads(Link, Peer, iolist_to_binary(framed(32, Frames ++ lists:reverse(Frames)))),
    Delivered = lists:append([Some || {Some, _, _} <- Reads]),
    ?assertEqual(Frames ++ lists:reverse(Frames), Delivered),
    Kept = [{byte_size(Frame), binary:referenced_byte_size(Frame)} || Frame <- Delivered],
    ?assertEqual([], [{Size, All} || {Size, All} <- Kept, All > max(4 * (4 + Size), 1024)]),
    ?assertEqual([], [{Size, All} || {Size, All} <- Kept, Size > 2 * 1024, All > Size]).

one_write_makes_eight_calls_at_most(_Config) ->
    {Link, _Peer} = running_pair(),
    Pieces = 3 * ?WRITES_PER_CALL * ?PIECES,
    Frame = {Pieces, lists:duplicate(Pieces, <<"x">>)},
    Writes = writes(Link, fun() -> meshx_node_nif:write(Link, [Frame]) end),
    ?assertMatch([_, _, _ | _], Writes),
    ?assertEqual(4 + Pieces, lists:sum([Bytes || {Bytes, _} <- Writes])),
    ?assert(lists:max([Bytes || {Bytes, _} <- Writes]) =< ?WRITES_PER_CALL * ?PIECES + 3).

%% A whole time slice, 4000 reductions, for 4 MiB at the latest; and no call is for free.
calls_cost_reductions_by_their_bytes(_Config) ->
    {Link, Peer} = running_pair(),
    Stream = iolist_to_binary(framed(32, large_frames())),
    Reads = [{Bytes, Cost} || {_, Bytes, Cost} <- reads(Link, Peer, Stream)],
    Reader = spawn_link(fun() -> read(Peer, [65536], [], 0) end),
    ok = gen_tcp:controlling_process(Peer, Reader),
    Half = binary:part(Stream, 0, 512 * 1024),
    Writes = lists:append([
        writes(Link, fun() -> meshx_node_nif:write(Link, [{byte_size(Half), [Half]}]) end)
     || _ <- lists:seq(1, 50)
    ]),
    ct:log("bytes and reductions of reads ~0p~nand of writes ~0p", [Reads, Writes]),
    Fair = fun({Bytes, Cost}) -> Cost >= max(40, Bytes * 4000 div (4 * 1024 * 1024)) end,
    [
        begin
            ?assertEqual([], [Call || Call <- Calls, not Fair(Call)]),
            ?assert(lists:max([Bytes || {Bytes, _} <- Calls]) > 65536)
        end
     || Calls <- [Reads, Writes]
    ].

running_pair() ->
    {Link, Peer} = meshx_ct_link:pair([]),
    ok = meshx_node_nif:framing(Link, distribution),
    {Link, Peer}.

%% As large as the fragments of a distributed message.
large_frames() ->
    payloads(frame, lists:duplicate(400, 65600)).

%% Reads Stream: the frames, bytes and reductions of each call.
reads(Link, Peer, Stream) ->
    Sender = spawn_link(fun() -> send_writes(Peer) end),
    Sender ! {send, Stream},
    reads_until(Link, byte_size(Stream)).

reads_until(Link, Left) ->
    {{Status, Frames}, Moved, Cost} = measured(Link, 3, fun() -> meshx_node_nif:read(Link) end),
    Read = {Frames, Moved, Cost},
    case Status of
        wait when Moved =:= Left ->
            [Read];
        wait ->
            receive
                {select, Link, _, ready_input} -> [Read | reads_until(Link, Left - Moved)]
            end;
        more ->
            [Read | reads_until(Link, Left - Moved)]
    end.

%% Writes to the end: the bytes and reductions of each call.
writes(Link, Call) ->
    {Result, Moved, Cost} = measured(Link, 4, Call),
    Flush = fun() -> meshx_node_nif:flush(Link) end,
    case Result of
        ok ->
            [{Moved, Cost}];
        more ->
            [{Moved, Cost} | writes(Link, Flush)];
        wait ->
            receive
                {select, Link, _, ready_output} -> [{Moved, Cost} | writes(Link, Flush)]
            end
    end.

measured(Link, Count, Call) ->
    Before = element(Count, meshx_node_nif:statistics(Link)),
    %% A call can't cost more than what is left of the slice; after this it is whole.
    erlang:yield(),
    {reductions, Begin} = process_info(self(), reductions),
    Result = Call(),
    {reductions, End} = process_info(self(), reductions),
    {Result, element(Count, meshx_node_nif:statistics(Link)) - Before, End - Begin}.
