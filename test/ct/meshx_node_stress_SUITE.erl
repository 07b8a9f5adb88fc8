%% Links under all that can happen to them at the same moment, many times over: hand-over from
%% process to process, deaths, closes and every other call at once, new code of the NIF's module.
%% The other end is gen_tcp. MESHX_STRESS=n in the environment makes it n times as long.
-module(meshx_node_stress_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(meshx_ct_link, [bytes/2]).

-define(PATIENCE, 60000).
%% Links at a time.
-define(BATCH, 20).

all() ->
    [
        handed_on_while_data_comes,
        handed_to_one_who_dies,
        taken_from_one_who_dies,
        owner_dies_under_calls_of_others,
        closed_under_calls_of_others,
        closed_while_a_message_is_under_way,
        listener_closed_under_accept,
        new_code_under_running_links,
        old_code_purged_before_the_new_is_called,
        second_load_is_refused,
        new_code_under_a_running_node,
        nothing_is_left
    ].

init_per_suite(Config) ->
    ok = meshx_node_nif:load(),
    meshx_ct:init_suite(Config).

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(_, Config) ->
    [{descriptors, descriptors()} | Config].

%% No case may leave a descriptor open, whoever owned it.
end_per_testcase(_, Config) ->
    Before = proplists:get_value(descriptors, Config),
    Result = meshx_ct:end_case(Config),
    try meshx_ct:wait("as few descriptors as before", fun() -> descriptors() =< Before end) of
        _ -> Result
    catch
        error:_ -> {fail, {descriptors, Before, descriptors(), Result}}
    end.

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Hand-over

%% Frames are read by whoever owns the link when they come, none is lost or read twice.
handed_on_while_data_comes(_Config) ->
    batches(10, fun(_) -> handed_on(30, 2000) end).

handed_on(Owners, Count) ->
    {Link, Peer} = running_pair(),
    Frames = [bytes(N, 1 + N rem 300) || N <- lists:seq(1, Count)],
    Sender = spawn_link(fun() -> send_in_pieces(Peer, framed(Frames)) end),
    ok = gen_tcp:controlling_process(Peer, Sender),
    Self = self(),
    First = spawn_link(fun() -> own(Link, Owners, Count, [], Self) end),
    ok = meshx_node_nif:controlling_process(Link, First),
    First ! yours,
    receive
        {read, Read} -> ?assert(Frames =:= Read)
    after ?PATIENCE -> error(frames_are_missing)
    end.

%% Reads a little, then hands on to the next; the last one reads what is left.
own(Link, Owners, Left, Read, Collector) ->
    receive
        yours -> ok
    end,
    Share = if Owners =:= 1 -> Left; true -> max(1, Left div Owners) end,
    Mine = read_at_least(Link, min(Share, Left)),
    case Left - length(Mine) of
        0 ->
            Collector ! {read, lists:append(lists:reverse([Mine | Read]))};
        More ->
            Next = spawn_link(fun() -> own(Link, max(1, Owners - 1), More, [Mine | Read], Collector) end),
            ok = meshx_node_nif:controlling_process(Link, Next),
            Next ! yours
    end.

read_at_least(_Link, Count) when Count =< 0 ->
    [];
read_at_least(Link, Count) ->
    {Status, Frames} = meshx_node_nif:read(Link),
    Left = Count - length(Frames),
    Left > 0 andalso Status =:= wait andalso await_select(Link),
    Frames ++ read_at_least(Link, Left).

send_in_pieces(_Peer, <<>>) ->
    ok;
send_in_pieces(Peer, Stream) ->
    Size = min(byte_size(Stream), rand:uniform(3000)),
    <<Piece:Size/binary, Rest/binary>> = Stream,
    ok = gen_tcp:send(Peer, Piece),
    send_in_pieces(Peer, Rest).

%% The new owner is dead, is dying, or dies a moment later: the link is closed either way.
handed_to_one_who_dies(_Config) ->
    batches(100, fun(_) ->
        {Link, Peer} = running_pair(),
        Heir = spawn(fun() -> linger() end),
        case meshx_node_nif:controlling_process(Link, Heir) of
            ok -> ok;
            {error, closed} -> ok
        end,
        closed_for_all(Link, Peer)
    end).

%% A third process takes over while the owner dies: either it has a link that stays open, or one
%% that is closed.
taken_from_one_who_dies(_Config) ->
    Taken = batches(100, fun(_) ->
        {Link, Peer} = running_pair(),
        Owner = spawn(fun() ->
            receive
                yours -> linger()
            end
        end),
        ok = meshx_node_nif:controlling_process(Link, Owner),
        Owner ! yours,
        linger(),
        Result = meshx_node_nif:controlling_process(Link, self()),
        gone(Owner),
        case Result of
            ok -> echoes(Link, Peer), ok = meshx_node_nif:close(Link);
            {error, closed} -> ok
        end,
        closed_for_all(Link, Peer),
        Result
    end),
    ct:log("~b of ~b were taken", [length([ok || ok <- Taken]), length(Taken)]).

%%% Closing

owner_dies_under_calls_of_others(_Config) ->
    batches(20, fun(N) ->
        {Link, Peer} = running_pair(),
        Owner = spawn(fun() ->
            receive
                yours -> busy_a_little(Link)
            end
        end),
        ok = meshx_node_nif:controlling_process(Link, Owner),
        Others = callers(Link, Peer),
        Owner ! yours,
        N rem 2 =:= 0 andalso exit(Owner, kill),
        [gone(Pid) || Pid <- [Owner | Others]],
        closed_for_all(Link, Peer)
    end).

closed_under_calls_of_others(_Config) ->
    batches(20, fun(_) ->
        {Link, Peer} = running_pair(),
        Others = callers(Link, Peer),
        Closers = [spawn(fun() -> linger(), ok = meshx_node_nif:close(Link) end) || _ <- [1, 2]],
        [gone(Pid) || Pid <- Closers ++ Others],
        closed_for_all(Link, Peer)
    end).

%% Processes that call everything until the link is closed; the peer sends and reads meanwhile.
callers(Link, Peer) ->
    PeerUser = spawn(fun() -> peer_of_callers(Peer) end),
    ok = gen_tcp:controlling_process(Peer, PeerUser),
    [
        PeerUser
        | [
            spawn(fun() -> until_closed(Call) end)
         || Call <- [
                fun() -> read_or_wait(Link) end,
                fun() -> meshx_node_nif:read(Link) end,
                fun() -> meshx_node_nif:write(Link, [{70000, [binary:copy(<<7>>, 70000)]}]) end,
                fun() -> meshx_node_nif:flush(Link) end,
                fun() -> meshx_node_nif:tick(Link) end,
                fun() -> {counts(Link), meshx_node_nif:tick(Link)} end,
                fun() -> {meshx_node_nif:getopt(Link, sndbuf), meshx_node_nif:setopt(Link, nodelay, 1)} end,
                fun() -> {meshx_node_nif:address(Link, peer), meshx_node_nif:tick(Link)} end,
                fun() -> {meshx_node_nif:framing(Link, distribution), meshx_node_nif:tick(Link)} end
            ]
        ]
    ].

until_closed(Call) ->
    try Call() of
        {error, closed} -> ok;
        {_, {error, closed}} -> ok;
        {error, Unexpected} -> exit({unexpected, Unexpected});
        _ -> until_closed(Call)
    catch
        %% One of the others has a write pending.
        error:badarg -> until_closed(Call)
    end.

counts(Link) ->
    {_, _, _, _, _} = meshx_node_nif:statistics(Link).

read_or_wait(Link) ->
    Result = meshx_node_nif:read(Link),
    case Result of
        {wait, _} ->
            receive
                {select, Link, _, _} -> Result
            after 5 -> Result
            end;
        _ ->
            Result
    end.

busy_a_little(Link) ->
    [meshx_node_nif:tick(Link) || _ <- lists:seq(1, rand:uniform(20))],
    linger().

%% Sends and reads a little of what comes, until the link is closed.
peer_of_callers(Peer) ->
    ok = inet:setopts(Peer, [{send_timeout, 20}]),
    case gen_tcp:send(Peer, [<<3:32, "abc">>, <<0:32>>]) of
        {error, Reason} when Reason =/= timeout -> ok;
        _ ->
            case gen_tcp:recv(Peer, 0, 1) of
                {error, closed} -> ok;
                _ -> peer_of_callers(Peer)
            end
    end.

%% The owner closes, or dies, exactly when the message that it asked for is made.
closed_while_a_message_is_under_way(_Config) ->
    batches(100, fun(N) ->
        {Link, Peer} = running_pair(),
        Self = self(),
        Owner = spawn(fun() ->
            receive
                yours -> ok
            end,
            {wait, []} = meshx_node_nif:read(Link),
            Self ! {self(), waits},
            receive
                {select, Link, _, ready_input} when N rem 3 =:= 0 -> ok;
                close when N rem 3 =:= 1 -> ok = meshx_node_nif:close(Link);
                die -> ok
            end
        end),
        ok = meshx_node_nif:controlling_process(Link, Owner),
        Owner ! yours,
        receive
            {Owner, waits} -> ok
        end,
        Others = [
            spawn(fun() -> linger(), gen_tcp:send(Peer, <<1:32, "x">>) end),
            spawn(fun() -> linger(), Owner ! element(1 + N rem 3, {die, close, die}) end)
        ],
        [gone(Pid) || Pid <- [Owner | Others]],
        closed_for_all(Link, Peer)
    end).

listener_closed_under_accept(_Config) ->
    repeat(30, fun() ->
        {ok, Listener} = meshx_node_nif:listen({127, 0, 0, 1}, 0, #{}),
        {ok, {_, Port}} = meshx_node_nif:address(Listener, local),
        Acceptors = [spawn(fun() -> accept(Listener) end) || _ <- lists:seq(1, 5)],
        Clients = [spawn(fun() -> connect_and_send(Port) end) || _ <- lists:seq(1, 10)],
        linger(),
        ok = meshx_node_nif:close(Listener),
        [gone(Pid) || Pid <- Acceptors ++ Clients],
        ?assertEqual({error, econnrefused}, meshx_ct_link:connect(Port))
    end).

%% Links it accepts are closed by its end.
accept(Listener) ->
    case meshx_node_nif:accept(Listener, #{}) of
        {ok, _Link} ->
            accept(Listener);
        wait ->
            receive
                {select, Listener, _, ready_input} -> accept(Listener)
            after 5 -> accept(Listener)
            end;
        {error, closed} ->
            ok
    end.

connect_and_send(Port) ->
    case gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, false}]) of
        {ok, Socket} ->
            _ = gen_tcp:send(Socket, <<"x">>),
            linger(),
            gen_tcp:close(Socket);
        {error, _} ->
            ok
    end.

%%% New code

%% Whoever insists gets the new code; links go on as if nothing had happened.
new_code_under_running_links(_Config) ->
    Links = [running_pair() || _ <- lists:seq(1, 5)],
    Self = self(),
    Users = [
        begin
            Pid = spawn_link(fun() ->
                receive
                    yours -> Self ! {self(), echo_until_told(Link, Peer, 0)}
                end
            end),
            ok = meshx_node_nif:controlling_process(Link, Pid),
            ok = gen_tcp:controlling_process(Peer, Pid),
            Pid ! yours,
            Pid
        end
     || {Link, Peer} <- Links
    ],
    Rounds = factor() * 20,
    [load_anew(fun() -> meshx_node_nif:statistics(element(1, hd(Links))) end) || _ <- lists:seq(1, Rounds)],
    Echoes = [
        begin
            Pid ! stop,
            receive
                {Pid, Count} -> Count
            after ?PATIENCE -> error(stuck)
            end
        end
     || Pid <- Users
    ],
    ct:log("~b loads, ~p echoes", [Rounds, Echoes]),
    ?assert(lists:min(Echoes) > 0).

%% Then the library is loaded as if for the first time. What belonged to the purged code is of no
%% use to anyone, and is freed when its owners end.
old_code_purged_before_the_new_is_called(_Config) ->
    repeat(10, fun() ->
        Self = self(),
        Owner = spawn(fun() ->
            {Link, Peer} = running_pair(),
            ok = gen_tcp:controlling_process(Peer, Self),
            Self ! {self(), {Link, Peer}},
            receive
                stop -> ok
            end
        end),
        {Link, Peer} =
            receive
                {Owner, Pair} -> Pair
            end,
        unstick_and_load(),
        ok = purge(),
        ?assertError(badarg, meshx_node_nif:read(Link)),
        ?assertError(badarg, meshx_node_nif:close(Link)),
        {Other, OtherPeer} = running_pair(),
        echoes(Other, OtherPeer),
        ok = meshx_node_nif:close(Other),
        Owner ! stop,
        gone(Owner),
        ?assertEqual({error, closed}, gen_tcp:recv(Peer, 0, 1000))
    end).

second_load_is_refused(_Config) ->
    at_once(1, fun(_) ->
        {Link, Peer} = running_pair(),
        ?assert(code:is_sticky(meshx_node_nif)),
        ?assertEqual({error, sticky_directory}, code:load_file(meshx_node_nif)),
        ?assertEqual({error, sticky_directory}, c:l(meshx_node_nif)),
        ?assertEqual(ok, meshx_node_nif:load()),
        ?assertEqual(false, code:purge(meshx_node_nif)),
        echoes(Link, Peer)
    end).

new_code_under_a_running_node(Config) ->
    [#{node := NameA} = A, #{node := NameB} = B] = meshx_ct:start_all(Config, [a, b], #{}),
    ?assert(meshx_ct:connect(A, B)),
    Self = self(),
    Watcher = spawn_link(fun() -> Self ! {self(), meshx_ct:call(B, ?MODULE, echoes_until_told, [NameA])} end),
    meshx_ct:wait("the first echo", fun() -> meshx_ct:call(B, erlang, whereis, [?MODULE]) =/= undefined end),
    ?assertEqual({error, sticky_directory}, meshx_ct:call(A, code, load_file, [meshx_node_nif])),
    Started = info(A, sidecar_starts),
    Load = fun() -> meshx_ct:call(A, ?MODULE, load_anew, [fun() -> meshx_node:info() end]) end,
    [Load() || _ <- lists:seq(1, 20)],
    meshx_ct:wait("calls while code is loaded", fun() ->
        Load(),
        meshx_ct:call(B, ?MODULE, echoes_so_far, []) > 20
    end),
    true = meshx_ct:call(B, ?MODULE, tell, []),
    receive
        {Watcher, Echoes} -> ?assert(is_integer(Echoes))
    after ?PATIENCE -> error(stuck)
    end,
    ?assertEqual([NameB], meshx_ct:call(A, erlang, nodes, [])),
    ?assertEqual(Started, info(A, sidecar_starts)),
    %% It stops as ever.
    ok = meshx_ct:stop(A),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(B, erlang, nodes, []) =:= [] end).

info(Node, Key) ->
    {ok, Value} = meshx_ct:call(Node, meshx_node, info, [Key]),
    Value.

%% On a node: calls to another one, over one and the same link, until tell/0. Returns how many, or
%% that the link went down.
echoes_until_told(Name) ->
    register(?MODULE, self()),
    true = erlang:monitor_node(Name, true),
    echoes_until_told(Name, 0).

echoes_until_told(Name, Count) ->
    Count = erpc:call(Name, erlang, abs, [Count], 20000),
    receive
        {nodedown, Name} -> {nodedown, Count};
        stop -> Count
    after 0 ->
        put(?MODULE, Count),
        echoes_until_told(Name, Count + 1)
    end.

echoes_so_far() ->
    {dictionary, Dictionary} = process_info(whereis(?MODULE), dictionary),
    proplists:get_value(?MODULE, Dictionary, 0).

tell() ->
    ?MODULE ! stop,
    true.

load_anew(Call) ->
    unstick_and_load(),
    Call(),
    purge().

%% A process may just be giving the library to what is old code by now; it is not to be killed.
purge() ->
    case code:soft_purge(meshx_node_nif) of
        true -> ok;
        false -> purge()
    end.

unstick_and_load() ->
    ok = purge(),
    true = code:unstick_mod(meshx_node_nif),
    {module, meshx_node_nif} = code:load_file(meshx_node_nif).

echo_until_told(Link, Peer, Count) ->
    receive
        stop -> Count
    after 0 ->
        echoes(Link, Peer),
        echo_until_told(Link, Peer, Count + 1)
    end.

%%% Support

factor() ->
    list_to_integer(os:getenv("MESHX_STRESS", "1")).

repeat(Times, Fun) ->
    [at_once(1, fun(_) -> Fun() end) || _ <- lists:seq(1, Times * factor())].

%% Times batches of processes that run Fun(Number) at the same time; the results.
batches(Times, Fun) ->
    lists:append([at_once(?BATCH, Fun) || _ <- lists:seq(1, Times * factor())]).

%% The sockets a process has opened are closed by its end.
at_once(Count, Fun) ->
    Runs = [spawn_monitor(fun() -> exit({result, Fun(N)}) end) || N <- lists:seq(1, Count)],
    [
        receive
            {'DOWN', Monitor, process, _, {result, Result}} -> Result;
            {'DOWN', Monitor, process, _, Reason} -> error(Reason)
        after ?PATIENCE -> error({stuck, process_info(Pid, [current_stacktrace, messages])})
        end
     || {Pid, Monitor} <- Runs
    ].

running_pair() ->
    {Link, Peer} = meshx_ct_link:pair([]),
    ok = meshx_node_nif:framing(Link, distribution),
    {Link, Peer}.

framed(Frames) ->
    iolist_to_binary([[<<(byte_size(Frame)):32>>, Frame] || Frame <- Frames]).

await_select(Link) ->
    receive
        {select, Link, _, ready_input} -> true
    after ?PATIENCE -> error({no_input, meshx_node_nif:statistics(Link)})
    end.

%% Something goes in both directions.
echoes(Link, Peer) ->
    ok = gen_tcp:send(Peer, <<4:32, "ping">>),
    [<<"ping">>] = read_at_least(Link, 1),
    ok = meshx_node_nif:write(Link, [{4, [<<"pong">>]}]),
    {ok, <<4:32, "pong">>} = gen_tcp:recv(Peer, 8, ?PATIENCE).

%% From nothing to a few hundred microseconds.
linger() ->
    case rand:uniform(4) of
        1 -> ok;
        2 -> erlang:yield();
        3 -> lists:foreach(fun(_) -> erlang:yield() end, lists:seq(1, rand:uniform(20)));
        4 -> lists:sum(lists:seq(1, rand:uniform(20000)))
    end.

gone(Pid) ->
    Monitor = monitor(process, Pid),
    receive
        {'DOWN', Monitor, process, Pid, Reason} when Reason =:= normal; Reason =:= noproc; Reason =:= killed -> ok;
        {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
    after ?PATIENCE -> error({stuck, process_info(Pid, [current_stacktrace, messages])})
    end.

%% The peer's end comes, and no call finds the link open.
closed_for_all(Link, Peer) ->
    drained(Peer),
    ?assertEqual({error, closed}, meshx_node_nif:read(Link)),
    ?assertEqual({error, closed}, meshx_node_nif:write(Link, [{1, [<<"x">>]}])),
    ?assertEqual({error, closed}, meshx_node_nif:flush(Link)),
    ?assertEqual({error, closed}, meshx_node_nif:tick(Link)),
    ?assertEqual({error, closed}, meshx_node_nif:getopt(Link, nodelay)),
    ?assertEqual({error, closed}, meshx_node_nif:address(Link, peer)),
    ?assertEqual({error, closed}, meshx_node_nif:controlling_process(Link, self())),
    ?assertEqual(ok, meshx_node_nif:close(Link)),
    gen_tcp:close(Peer).

drained(Peer) ->
    case gen_tcp:recv(Peer, 0, ?PATIENCE) of
        {ok, _} -> drained(Peer);
        {error, timeout} -> error(still_open);
        {error, _} -> ok
    end.

descriptors() ->
    {ok, Names} = file:list_dir("/proc/self/fd"),
    length(Names).
