%% The NIF's sockets and framed links by themselves: one end is the NIF, the other gen_tcp,
%% which says byte by byte what goes over the wire. No agent, no distribution.
-module(meshx_node_socket_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(meshx_ct_link, [connect/1, written/2, in_owner/2, finished/1, bytes/1]).

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([
    reads_frames_cut_at_every_byte/1,
    reads_frames_of_every_size_class/1,
    reads_many_small_frames/1,
    reads_handshake_packets_one_at_a_time/1,
    delivers_all_frames_before_the_end/1,
    refuses_a_frame_longer_than_allowed/1,
    refuses_a_packet_longer_than_allowed/1,
    does_not_allocate_for_a_length_alone/1,
    is_not_woken_before_a_frame_is_whole/1,
    is_woken_by_as_much_as_wanted_or_the_end/1,
    awaits_as_much_as_wanted_or_the_end/1,
    is_woken_by_the_end_within_a_frame/1,
    reads_frames_longer_than_its_receive_buffer/1,
    writes_what_is_asked_in_order/1,
    writes_to_a_slow_reader_lose_nothing/1,
    writes_frames_of_very_many_pieces/1,
    refuses_a_write_while_one_is_pending/1,
    refuses_a_frame_whose_size_is_wrong/1,
    ticks_between_frames/1,
    tick_while_data_is_pending_adds_nothing/1,
    ticks_into_a_full_socket_keep_the_framing/1,
    counts_frames_and_bytes/1,
    closes_when_the_owner_dies/1,
    keeps_open_when_a_former_owner_dies/1,
    closes_when_handed_to_a_dead_process/1,
    accepts_a_connection/1,
    connect_to_nobody_is_refused/1,
    options_can_be_set_and_read/1,
    timers_tell_their_owner/1,
    timers_go_with_their_owner/1,
    garbage_arguments_are_badarg/1
]).

all() ->
    [
        Name
     || {Name, 1} <- ?MODULE:module_info(exports),
        not lists:member(Name, [module_info, init_per_suite, end_per_suite])
    ].

init_per_suite(Config) ->
    ok = meshx_node_nif:load(),
    Config.

end_per_suite(_Config) ->
    ok.

%% A listener for the peer of each link.
init_per_testcase(_Case, Config) ->
    {Listener, Port} = meshx_ct_link:listen([]),
    [{listener, Listener}, {port, Port} | Config].

end_per_testcase(_Case, Config) ->
    gen_tcp:close(?config(listener, Config)).

%% ---- reading ----

reads_frames_cut_at_every_byte(Config) ->
    Frames = [<<"a">>, <<>>, <<"bcd">>, binary:copy(<<"x">>, 2047), binary:copy(<<"y">>, 2048)],
    Stream = iolist_to_binary([[<<(byte_size(F)):32>>, F] || F <- Frames]),
    Expected = Frames -- [<<>>],
    {Link, Peer} = link_pair(Config),
    lists:foreach(
        fun(Cut) ->
            <<First:Cut/binary, Second/binary>> = Stream,
            ok = gen_tcp:send(Peer, First),
            %% What can be read of the first part is read before the second is sent.
            Read = read_bytes(Link, byte_size(First)),
            ok = gen_tcp:send(Peer, Second),
            ?assertEqual(Expected, Read ++ read_frames(Link, length(Expected) - length(Read)))
        end,
        lists:seq(0, byte_size(Stream))
    ).

reads_frames_of_every_size_class(Config) ->
    {Link, Peer} = link_pair(Config),
    Sizes = [1, 2047, 2048, 8191, 8192, 8193, 65536, 491516, 491520, 491521, 3000000, 5],
    Frames = [bytes(Size) || Size <- Sizes],
    send_frames(Peer, Frames),
    Read = read_frames(Link, length(Frames)),
    ?assertEqual([erlang:md5(F) || F <- Frames], [erlang:md5(F) || F <- Read]).

reads_many_small_frames(Config) ->
    {Link, Peer} = link_pair(Config),
    Frames = [<<N:32, (binary:copy(<<N>>, N rem 300))/binary>> || N <- lists:seq(1, 20000)],
    send_frames(Peer, Frames),
    ?assert(Frames =:= read_frames(Link, length(Frames))).

reads_handshake_packets_one_at_a_time(Config) ->
    {Link, Peer} = link_pair(Config),
    ok = meshx_node_nif:framing(Link, handshake),
    ok = gen_tcp:send(Peer, <<3:16, "one", 3:16, "two", 5:32, "three">>),
    ?assertEqual([<<"one">>], read_frames(Link, 1)),
    ?assertEqual([<<"two">>], read_frames(Link, 1)),
    ok = meshx_node_nif:framing(Link, distribution),
    ?assertEqual([<<"three">>], read_frames(Link, 1)).

delivers_all_frames_before_the_end(Config) ->
    {Link, Peer} = link_pair(Config),
    Frames = [<<N:32>> || N <- lists:seq(1, 2000)],
    ok = gen_tcp:send(Peer, [[<<4:32>>, F] || F <- Frames]),
    ok = gen_tcp:send(Peer, <<100:32, "cut">>),
    ok = gen_tcp:close(Peer),
    ?assert(Frames =:= read_frames(Link, length(Frames))),
    ?assertEqual({error, closed}, read_to_end(Link)).

refuses_a_frame_longer_than_allowed(Config) ->
    [
        begin
            {Link, Peer} = link_pair(Config),
            ok = gen_tcp:send(Peer, <<2:32, "ok", Length:32, "rest">>),
            ?assertEqual([<<"ok">>], read_frames(Link, 1)),
            ?assertEqual({error, bad_frame}, read_to_end(Link))
        end
     || Length <- [16#FFFFFFFF, 16#80000000, 128 * 1024 * 1024 + 1]
    ].

refuses_a_packet_longer_than_allowed(Config) ->
    {Link, Peer} = link_pair(Config),
    ok = meshx_node_nif:framing(Link, handshake),
    ok = gen_tcp:send(Peer, <<2:16, "ok", 4097:16, "rest">>),
    ?assertEqual([<<"ok">>], read_frames(Link, 1)),
    ?assertEqual({error, bad_frame}, read_to_end(Link)).

does_not_allocate_for_a_length_alone(Config) ->
    try erlang:memory(binary) of
        Before ->
            {Link, Peer} = link_pair(Config),
            ok = gen_tcp:send(Peer, <<(100 * 1024 * 1024):32, "only this much">>),
            ?assertEqual([], read_bytes(Link, 18)),
            ?assertMatch({wait, []}, meshx_node_nif:read(Link)),
            ?assert(erlang:memory(binary) - Before < 2 * 1024 * 1024)
    catch
        error:notsup -> {skip, "the emulator does not count its memory"}
    end.

%% Proxies cut large frames into many pieces, and each wake-up costs two switches of threads.
is_not_woken_before_a_frame_is_whole(Config) ->
    {Link, Peer} = link_pair(Config),
    [
        begin
            Frame = bytes(Size),
            <<First:5000/binary, Second:5000/binary, Third/binary>> = <<Size:32, Frame/binary>>,
            await_more(Link, Peer, First),
            await_nothing(Link),
            ok = gen_tcp:send(Peer, Second),
            receive
                {select, Link, _, ready_input} -> ct:fail({woken_within_a_frame_of, Size})
            after 200 -> ok
            end,
            ok = gen_tcp:send(Peer, Third),
            await_input(Link, wait),
            ?assert([Frame] =:= read_frames(Link, 1)),
            %% And again by little.
            await_more(Link, Peer, <<2:32, "ok">>),
            ?assertEqual([<<"ok">>], read_frames(Link, 1))
        end
     || Size <- [15000, 65000, 70000, 400000]
    ].

is_woken_by_as_much_as_wanted_or_the_end(Config) ->
    {Link, Peer} = link_pair(Config),
    ok = meshx_node_nif:low_water(Link, 20000),
    Few = bytes(1000),
    Many = bytes(19500),
    await_nothing(Link),
    ok = meshx_node_nif:select(Link),
    ok = gen_tcp:send(Peer, <<1000:32, Few/binary>>),
    is_not_woken(Link),
    ok = gen_tcp:send(Peer, <<19500:32, Many/binary>>),
    await_input(Link, wait),
    ?assert([Few, Many] =:= read_frames(Link, 2)),
    %% What has come can be read at any time.
    await_nothing(Link),
    ok = meshx_node_nif:select(Link),
    ok = gen_tcp:send(Peer, <<1000:32, Few/binary>>),
    is_not_woken(Link),
    ?assertEqual({wait, [Few]}, meshx_node_nif:read(Link)),
    %% And again by little.
    ok = meshx_node_nif:low_water(Link, 0),
    await_more(Link, Peer, <<1000:32, Few/binary>>),
    ?assertEqual([Few], read_frames(Link, 1)),
    ok = meshx_node_nif:low_water(Link, 20000),
    await_nothing(Link),
    ok = meshx_node_nif:select(Link),
    ok = gen_tcp:close(Peer),
    await_input(Link, wait),
    ?assertEqual({error, closed}, read_to_end(Link)).

awaits_as_much_as_wanted_or_the_end(Config) ->
    {Link, Peer} = link_pair(Config),
    ok = meshx_node_nif:low_water(Link, 20000),
    Few = bytes(1000),
    Many = bytes(19500),
    await_nothing(Link),
    ?assertEqual(none, meshx_node_nif:await(Link, 0)),
    ?assertEqual(none, meshx_node_nif:await(Link, 1000)),
    ok = gen_tcp:send(Peer, <<1000:32, Few/binary>>),
    ?assertEqual([none], lists:usort([meshx_node_nif:await(Link, 1000) || _ <- lists:seq(1, 200)])),
    ok = gen_tcp:send(Peer, <<19500:32, Many/binary>>),
    meshx_ct:wait("much", fun() -> meshx_node_nif:await(Link, 1000) =:= ready end),
    ?assert([Few, Many] =:= read_frames(Link, 2)),
    await_nothing(Link),
    ?assertEqual(none, meshx_node_nif:await(Link, 1000)),
    ok = gen_tcp:close(Peer),
    meshx_ct:wait("the end", fun() -> meshx_node_nif:await(Link, 1000) =:= ready end),
    ?assertEqual({error, closed}, read_to_end(Link)),
    ok = meshx_node_nif:close(Link),
    ?assertEqual(ready, meshx_node_nif:await(Link, 1000)),
    ?assertEqual({error, closed}, meshx_node_nif:select(Link)).

is_not_woken(Link) ->
    receive
        {select, Link, _, ready_input} -> ct:fail(woken_by_few)
    after 200 -> ok
    end.

is_woken_by_the_end_within_a_frame(Config) ->
    {Link, Peer} = link_pair(Config),
    await_more(Link, Peer, <<70000:32, (bytes(5000))/binary>>),
    await_nothing(Link),
    ok = gen_tcp:close(Peer),
    await_input(Link, wait),
    ?assertEqual({error, closed}, read_to_end(Link)).

reads_frames_longer_than_its_receive_buffer(Config) ->
    {Link, Peer} = link_pair(Config),
    Frames = [bytes(Size) || Size <- [70000, 5000, 65000]],
    <<First:5000/binary, Rest/binary>> = <<<<(byte_size(F)):32, F/binary>> || F <- Frames>>,
    await_more(Link, Peer, First),
    await_nothing(Link),
    ok = meshx_node_options:set(Link, [{recbuf, 8192}]),
    spawn_link(fun() -> ok = gen_tcp:send(Peer, Rest) end),
    ?assert(Frames =:= read_frames(Link, length(Frames))).

%% ---- writing ----

writes_what_is_asked_in_order(Config) ->
    {Link, Peer} = link_pair(Config),
    ok = meshx_node_nif:write(Link, [{0, []}, {3, [<<"abc">>]}, {5, [<<"de">>, <<>>, <<"fgh">>]}]),
    ?assertEqual({ok, <<0:32, 3:32, "abc", 5:32, "defgh">>}, gen_tcp:recv(Peer, 20)),
    ok = meshx_node_nif:write(Link, []),
    ok = meshx_node_nif:framing(Link, handshake),
    ok = meshx_node_nif:write(Link, [{2, [<<"hi">>]}]),
    ?assertEqual({ok, <<2:16, "hi">>}, gen_tcp:recv(Peer, 4)).

writes_to_a_slow_reader_lose_nothing(Config) ->
    {Link, Peer} = link_pair(Config),
    Frames = [bytes(N * 997 rem 100000) || N <- lists:seq(1, 400)],
    Stream = iolist_to_binary([[<<(byte_size(F)):32>>, F] || F <- Frames]),
    Writer = in_owner(Link, fun() -> write_all(Link, Frames) end),
    ?assert(Stream =:= slow_read(Peer, byte_size(Stream))),
    ?assertEqual(ok, finished(Writer)).

writes_frames_of_very_many_pieces(Config) ->
    {Link, Peer} = link_pair(Config),
    Pieces = [<<N:16>> || N <- lists:seq(1, 30000)],
    Writer = in_owner(Link, fun() ->
        written(Link, meshx_node_nif:write(Link, [{60000, Pieces}, {1, [<<"!">>]}]))
    end),
    Expected = iolist_to_binary([<<60000:32>>, Pieces, <<1:32, "!">>]),
    ?assert({ok, Expected} =:= gen_tcp:recv(Peer, byte_size(Expected))),
    ?assertEqual(ok, finished(Writer)).

refuses_a_write_while_one_is_pending(Config) ->
    {Link, _Peer} = link_pair(Config),
    wait = fill(Link),
    ?assertError(badarg, meshx_node_nif:write(Link, [{1, [<<"x">>]}])).

refuses_a_frame_whose_size_is_wrong(Config) ->
    {Link, _Peer} = link_pair(Config),
    ?assertError(badarg, meshx_node_nif:write(Link, [{2, [<<"abc">>]}])),
    ?assertError(badarg, meshx_node_nif:write(Link, [{4, [<<"abc">>]}])),
    ?assertError(badarg, meshx_node_nif:write(Link, [{3, [abc]}])),
    ?assertError(badarg, meshx_node_nif:write(Link, [abc])).

ticks_between_frames(Config) ->
    {Link, Peer} = link_pair(Config),
    ok = meshx_node_nif:write(Link, [{1, [<<"a">>]}]),
    ok = meshx_node_nif:tick(Link),
    ok = meshx_node_nif:write(Link, [{1, [<<"b">>]}]),
    ?assertEqual({ok, <<1:32, "a", 0:32, 1:32, "b">>}, gen_tcp:recv(Peer, 14)).

tick_while_data_is_pending_adds_nothing(Config) ->
    {Link, Peer} = link_pair(Config),
    wait = fill(Link),
    {_, _, _, Written, Pending} = Before = meshx_node_nif:statistics(Link),
    [ok = meshx_node_nif:tick(Link) || _ <- lists:seq(1, 10)],
    ?assertEqual(Before, meshx_node_nif:statistics(Link)),
    Writer = in_owner(Link, fun() -> written(Link, meshx_node_nif:flush(Link)) end),
    Read = slow_read(Peer, Written + Pending),
    ?assertEqual(<<"end">>, binary:part(Read, byte_size(Read), -3)),
    ?assertEqual(ok, finished(Writer)).

%% The kernel may take a part of a tick's four bytes.
ticks_into_a_full_socket_keep_the_framing(Config) ->
    {Link, Peer} = link_pair(Config),
    lists:foreach(fun(_) -> ok = meshx_node_nif:tick(Link) end, lists:seq(1, 2000000)),
    {_, Ticks, _, Written, _} = meshx_node_nif:statistics(Link),
    ?assert(Ticks < 2000000),
    ?assertEqual(Ticks, (Written + 3) div 4),
    Writer = in_owner(Link, fun() ->
        written(Link, meshx_node_nif:write(Link, [{4, [<<"last">>]}]))
    end),
    ?assert(slow_read(Peer, 4 * Ticks + 8) =:= <<0:(32 * Ticks), 4:32, "last">>),
    ?assertEqual(ok, finished(Writer)).

counts_frames_and_bytes(Config) ->
    {Link, Peer} = link_pair(Config),
    ?assertEqual({0, 0, 0, 0, 0}, meshx_node_nif:statistics(Link)),
    ok = meshx_node_nif:write(Link, [{3, [<<"abc">>]}, {0, []}]),
    ok = meshx_node_nif:tick(Link),
    ok = gen_tcp:send(Peer, <<0:32, 2:32, "hi">>),
    [<<"hi">>] = read_frames(Link, 1),
    ?assertEqual({2, 3, 10, 15, 0}, meshx_node_nif:statistics(Link)).

%% ---- life ----

closes_when_the_owner_dies(Config) ->
    Port = ?config(port, Config),
    Owner = spawn(fun() ->
        {ok, _Link} = connect(Port),
        receive
            stop -> ok
        end
    end),
    {ok, Peer} = gen_tcp:accept(?config(listener, Config), 5000),
    Owner ! stop,
    ?assertEqual({error, closed}, gen_tcp:recv(Peer, 0, 5000)).

keeps_open_when_a_former_owner_dies(Config) ->
    Self = self(),
    Port = ?config(port, Config),
    {Owner, Monitor} = spawn_monitor(fun() ->
        {ok, Link} = connect(Port),
        ok = meshx_node_nif:controlling_process(Link, Self),
        Self ! {link, Link}
    end),
    {ok, Peer} = gen_tcp:accept(?config(listener, Config), 5000),
    receive
        {'DOWN', Monitor, process, Owner, normal} -> ok
    end,
    receive
        {link, Link} -> ok = meshx_node_nif:write(Link, [{2, [<<"hi">>]}])
    end,
    ?assertEqual({ok, <<2:16, "hi">>}, gen_tcp:recv(Peer, 4, 5000)).

closes_when_handed_to_a_dead_process(Config) ->
    {Link, Peer} = link_pair(Config),
    {Dead, Monitor} = spawn_monitor(fun() -> ok end),
    receive
        {'DOWN', Monitor, process, Dead, _} -> ok
    end,
    ?assertEqual({error, closed}, meshx_node_nif:controlling_process(Link, Dead)),
    ?assertEqual({error, closed}, gen_tcp:recv(Peer, 0, 5000)),
    ?assertEqual({error, closed}, meshx_node_nif:write(Link, [{1, [<<"x">>]}])),
    ?assertEqual({error, closed}, meshx_node_nif:read(Link)),
    ?assertEqual({error, closed}, meshx_node_nif:tick(Link)),
    ?assertEqual(ok, meshx_node_nif:close(Link)).

accepts_a_connection(_Config) ->
    {ok, Listener} = meshx_node_nif:listen({127, 0, 0, 1}, 0, #{}),
    {ok, {{127, 0, 0, 1}, Port}} = meshx_node_nif:address(Listener, local),
    wait = meshx_node_nif:accept(Listener, #{}),
    {ok, Peer} = gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, false}]),
    ok = gen_tcp:send(Peer, <<2:16, "hi">>),
    {ok, Link} = accept(Listener, wait),
    ?assertEqual([<<"hi">>], read_frames(Link, 1)),
    {ok, PeerAddress} = inet:sockname(Peer),
    ?assertEqual({ok, PeerAddress}, meshx_node_nif:address(Link, peer)),
    ok = meshx_node_nif:close(Listener),
    ?assertEqual({error, closed}, meshx_node_nif:accept(Listener, #{})),
    ?assertEqual({error, econnrefused}, connect(Port)).

connect_to_nobody_is_refused(_Config) ->
    {ok, Listener} = meshx_node_nif:listen({127, 0, 0, 1}, 0, #{}),
    {ok, {_, Port}} = meshx_node_nif:address(Listener, local),
    ok = meshx_node_nif:close(Listener),
    ?assertEqual({error, econnrefused}, connect(Port)).

options_can_be_set_and_read(Config) ->
    {Link, _} = link_pair(Config),
    {ok, [{nodelay, true}]} = meshx_node_options:get(Link, [nodelay]),
    ok = meshx_node_options:set(Link, [{nodelay, false}, {keepalive, true}, {buffer, 1000}]),
    ?assertEqual(
        {ok, [{nodelay, false}, {keepalive, true}]},
        meshx_node_options:get(Link, [nodelay, keepalive])
    ),
    ?assertEqual({error, einval}, meshx_node_options:get(Link, [nodelay, no_such_option])),
    ?assertEqual(
        {error, {badopts, [{active, true}]}}, meshx_node_options:set(Link, [{active, true}])
    ),
    ?assertEqual({error, einval}, meshx_node_options:set(Link, [{no_such_option, 1}])).

%% ---- timers ----

timers_tell_their_owner(_Config) ->
    {ok, Timer} = meshx_node_nif:timer(),
    [
        begin
            ok = meshx_node_nif:timer_start(Timer, Microseconds),
            receive
                {select, Timer, undefined, ready_input} -> ok
            after 10000 -> ct:fail({not_told_after, Microseconds})
            end
        end
     || Microseconds <- [1, 64, 64, 2000, 1100000]
    ],
    ?assertError(badarg, meshx_node_nif:timer_start(Timer, 0)),
    {Other, Monitor} = spawn_monitor(fun() ->
        ?assertError(badarg, meshx_node_nif:timer_start(Timer, 64))
    end),
    receive
        {'DOWN', Monitor, process, Other, Reason} -> ?assertEqual(normal, Reason)
    end.

%% Whether never started, under way or expired.
timers_go_with_their_owner(_Config) ->
    Before = timer_descriptors(),
    {Owner, Monitor} = spawn_monitor(fun() ->
        Timers = [
            begin
                {ok, Timer} = meshx_node_nif:timer(),
                Time =:= none orelse (ok = meshx_node_nif:timer_start(Timer, Time)),
                Timer
            end
         || Time <- [none, 1, 3600000000], _ <- lists:seq(1, 20)
        ],
        receive
            stop -> Timers
        end
    end),
    meshx_ct:wait("the timers", fun() -> timer_descriptors() =:= Before + 60 end),
    Owner ! stop,
    receive
        {'DOWN', Monitor, process, Owner, normal} -> ok
    end,
    meshx_ct:wait("their end", fun() -> timer_descriptors() =:= Before end).

timer_descriptors() ->
    {ok, Names} = file:list_dir("/proc/self/fd"),
    length([Name || Name <- Names, {ok, "anon_inode:[timerfd]"} =:= file:read_link(filename:join("/proc/self/fd", Name))]).

garbage_arguments_are_badarg(Config) ->
    {Link, _} = link_pair(Config),
    [
        ?assertError(badarg, apply(meshx_node_nif, Function, Arguments))
     || {Function, Arguments} <- [
            {listen, [{127, 0, 0}, 0, #{}]},
            {listen, [{127, 0, 0, 256}, 0, #{}]},
            {listen, [{127, 0, 0, 1}, 65536, #{}]},
            {listen, [{127, 0, 0, 1}, 0, []]},
            {listen, [{127, 0, 0, 1}, 0, #{backlog => many}]},
            {connect, [{127, 0, 0, 1}, 1, nowhere, #{}]},
            {accept, [make_ref(), #{}]},
            {low_water, [Link, -1]},
            {select, [self()]},
            {await, [self(), 1]},
            {await, [Link, 1001]},
            {await, [Link, -1]},
            {read, [self()]},
            {write, [Link, frames]},
            {setopt, [Link, nodelay, true]},
            {mesh_info, [Link, 1]},
            {mesh_stop, [make_ref()]}
        ]
    ].

%% ---- support ----

link_pair(Config) ->
    {ok, Link} = connect(?config(port, Config)),
    {ok, Peer} = gen_tcp:accept(?config(listener, Config), 5000),
    ok = meshx_node_nif:framing(Link, distribution),
    {Link, Peer}.

accept(Listener, wait) ->
    receive
        {select, Listener, _, ready_input} -> ok
    end,
    accept(Listener, meshx_node_nif:accept(Listener, #{}));
accept(_Listener, Result) ->
    Result.

read_frames(_Link, 0) ->
    [];
read_frames(Link, Count) when Count > 0 ->
    {Status, Frames} = meshx_node_nif:read(Link),
    case Count - length(Frames) of
        0 ->
            Frames;
        Left ->
            await_input(Link, Status),
            Frames ++ read_frames(Link, Left)
    end.

%% Sends Bytes to a link that waits, and waits until it is told.
await_more(Link, Peer, Bytes) ->
    await_nothing(Link),
    ok = gen_tcp:send(Peer, Bytes),
    await_input(Link, wait).

%% Nothing more can be read, and a message will tell when that changes.
await_nothing(Link) ->
    case meshx_node_nif:read(Link) of
        {wait, []} -> ok;
        {more, []} -> await_nothing(Link)
    end.

%% Reads until Bytes more have been taken from the socket.
read_bytes(Link, Bytes) ->
    {_, _, Before, _, _} = meshx_node_nif:statistics(Link),
    read_bytes_until(Link, Before + Bytes).

read_bytes_until(Link, Target) ->
    case meshx_node_nif:statistics(Link) of
        {_, _, Target, _, _} ->
            [];
        _ ->
            {_, Frames} = meshx_node_nif:read(Link),
            Frames ++ read_bytes_until(Link, Target)
    end.

read_to_end(Link) ->
    case meshx_node_nif:read(Link) of
        {Status, []} ->
            await_input(Link, Status),
            read_to_end(Link);
        Error ->
            Error
    end.

await_input(_Link, more) ->
    ok;
await_input(Link, wait) ->
    receive
        {select, Link, _, ready_input} -> ok
    end.

write_all(_Link, []) ->
    ok;
write_all(Link, Frames) ->
    {Now, Later} = lists:split(min(7, length(Frames)), Frames),
    ok = written(Link, meshx_node_nif:write(Link, [{byte_size(F), halves(F)} || F <- Now])),
    write_all(Link, Later).

halves(Binary) ->
    {First, Second} = split_binary(Binary, byte_size(Binary) div 2),
    [First, Second].

%% Writes more than the socket takes.
fill(Link) ->
    Data = binary:copy(<<0>>, 16 * 1024 * 1024),
    flush_until_wait(Link, meshx_node_nif:write(Link, [{byte_size(Data) + 3, [Data, <<"end">>]}])).

flush_until_wait(Link, more) ->
    flush_until_wait(Link, meshx_node_nif:flush(Link));
flush_until_wait(_Link, Result) ->
    Result.

send_frames(Peer, Frames) ->
    spawn_link(fun() ->
        ok = gen_tcp:send(Peer, [[<<(byte_size(F)):32>>, F] || F <- Frames])
    end).

slow_read(Peer, Size) ->
    slow_read(Peer, Size, []).

slow_read(_Peer, 0, Read) ->
    iolist_to_binary(lists:reverse(Read));
slow_read(Peer, Left, Read) ->
    erlang:yield(),
    {ok, Data} = gen_tcp:recv(Peer, min(Left, 50000), 10000),
    slow_read(Peer, Left - byte_size(Data), [Data | Read]).
