%% The acceptor: who may connect to the listener, and how many may be strangers at once.
%%
%% The listener's port is open to every process of the host, and through our sidecar's public
%% port to every host that reaches it: the sidecar dials us before it knows who has called it.
%% So nothing that a stranger does may cost more than a bounded amount of anything:
%%
%% - the other end must belong to our own user, or to one of `allowed_uids', else the connection
%%   is closed before a byte of it is read;
%% - a connection is half-open until its handshake is complete. There are so many of them at
%%   most; then a new one takes the place of the oldest. A node is through its handshake in
%%   milliseconds, so the oldest is hardly one;
%% - the controller of a half-open connection gives up after a time (meshx_node_ctrl, then
%%   dist_util's timer), reads packets of 4 KiB at most (FRAME_HANDSHAKE_MAX_SIZE), and says
%%   what was wrong by its exit reason: so many log lines within some time, then only their
%%   number;
%% - names become atoms, which are never freed: of those that name no node known here, so many
%%   are let in within some time. A handshake that is completed doesn't count.
%%
%% Linked to net_kernel; ends with it, and when the listener is closed.
-module(meshx_node_acceptor).

-export([start/1, admit_name/3, linked/1]).

%% Spawned.
-export([init/2]).

-include_lib("kernel/include/logger.hrl").

%% Half-open connections. What one holds: a descriptor, 8 KiB read ahead, a process, and two of
%% dist_util's when its first packet was right.
-define(HALF_OPEN_MAX, 512).
%% The time each of them has at least, ms: many nodes may call at once.
-define(HALF_OPEN_TIME, 50).

%% Connections accepted without a rest of 1 ms: our priority is above that of those who work.
-define(ACCEPTS_PER_TURN, 64).
%% How long to rest when there is no descriptor, process or memory left, ms.
-define(SHORTAGE_REST, 100).

%% New names: so many at once, and one more each time this many ms have passed: the atom table
%% has room for a million.
-define(NEW_NAMES, 1000).
-define(NEW_NAME_TIME, 10000).

%% The flag of a node that has no name and asks for one, which is a new one each time.
-define(NAME_ME, (1 bsl 33)).

-record(half_open, {
    controller :: pid(),
    monitor :: reference(),
    since :: integer(),
    has_new_name = false :: boolean()
}).

-record(state, {
    kernel :: pid(),
    listener :: meshx_node_nif:socket(),
    allowed :: any | [non_neg_integer()],
    accepted = 0 :: non_neg_integer(),
    next = 0 :: non_neg_integer(),
    %% by age, and where each controller is in it
    half_open = gb_trees:empty() :: gb_trees:tree(non_neg_integer(), #half_open{}),
    places = #{} :: #{pid() => non_neg_integer()},
    %% that may still be let in
    new_names = ?NEW_NAMES :: non_neg_integer(),
    %% lines logged, and held back, since a kind's first
    reports = #{} :: #{atom() => {pos_integer(), non_neg_integer()}}
}).

%% ---- API ----

%% Called by net_kernel.
-spec start(meshx_node_nif:socket()) -> pid().
start(Listener) ->
    spawn_opt(?MODULE, init, [self(), Listener], [link, {priority, max}]).

%% Called by a controller: whether the handshake of a node may go on that sends this name and
%% these flags.
-spec admit_name(pid(), binary(), non_neg_integer()) -> boolean().
admit_name(Acceptor, Name, Flags) ->
    (Flags band ?NAME_ME =:= 0 andalso is_atom_already(Name)) orelse ask_for_name(Acceptor).

%% A name goes over the wire in Latin-1 (dist_util).
is_atom_already(Name) ->
    try is_atom(binary_to_existing_atom(Name, latin1))
    catch
        error:_ -> false
    end.

ask_for_name(Acceptor) ->
    Monitor = monitor(process, Acceptor),
    Acceptor ! {new_name, self(), Monitor},
    receive
        {Monitor, Admitted} ->
            demonitor(Monitor, [flush]),
            Admitted;
        {'DOWN', Monitor, process, _, _} ->
            false
    end.

%% Called by a controller when its handshake is complete.
-spec linked(pid()) -> ok.
linked(Acceptor) ->
    Acceptor ! {linked, self()},
    ok.

%% ---- accepting ----

-spec init(pid(), meshx_node_nif:socket()) -> no_return().
init(Kernel, Listener) ->
    Allowed = meshx_node_mesh:allowed_uids(),
    _ = erlang:send_after(?NEW_NAME_TIME, self(), new_name_time),
    loop(#state{kernel = Kernel, listener = Listener, allowed = Allowed}).

-spec loop(#state{}) -> no_return().
loop(#state{accepted = ?ACCEPTS_PER_TURN} = S) ->
    loop(rest(1, S#state{accepted = 0}));
loop(#state{listener = Listener, accepted = Accepted} = S0) ->
    S = make_room(S0),
    case meshx_node_nif:accept(Listener, meshx_node_options:accepted()) of
        {ok, Link} -> loop(check_user(Link, S#state{accepted = Accepted + 1}));
        wait -> loop(await(S#state{accepted = 0}));
        {error, closed} -> exit(closed);
        {error, Reason} -> loop(shortage(Reason, S))
    end.

await(#state{listener = Listener} = S) ->
    receive
        {select, Listener, _, ready_input} -> S;
        Message -> await(handle(Message, S))
    end.

rest(Time, S) ->
    rest_until(erlang:monotonic_time(millisecond) + Time, S).

rest_until(Deadline, S) ->
    receive
        Message -> rest_until(Deadline, handle(Message, S))
    after max(0, Deadline - erlang:monotonic_time(millisecond)) -> S
    end.

%% What waits in the listener's queue is accepted when there is something to accept it with.
shortage(Reason, S) ->
    Text = ["can't accept a connection: ", shortage_text(Reason)],
    rest(?SHORTAGE_REST, report(shortage, Text, S)).

shortage_text(emfile) -> "too many open files; raise this VM's limit on them (ulimit -n)";
shortage_text(enfile) -> "too many open files in the system; raise its limit (fs.file-max)";
shortage_text(system_limit) -> "too many processes; raise this VM's limit on them (erl +P)";
shortage_text(Reason) -> inet:format_error(Reason).

%% ---- whose connection ----

check_user(Link, #state{allowed = any} = S) ->
    adopt(Link, S);
check_user(Link, #state{allowed = Allowed} = S) ->
    case meshx_node_nif:peer_uid(Link) of
        {ok, own} ->
            adopt(Link, S);
        {ok, Uid} ->
            case lists:member(Uid, Allowed) of
                true -> adopt(Link, S);
                false -> refuse(Link, {user, Uid}, S)
            end;
        {error, Reason} when Reason =:= emfile; Reason =:= enfile; Reason =:= enomem ->
            meshx_node_nif:close(Link),
            shortage(Reason, S);
        {error, Reason} ->
            refuse(Link, Reason, S)
    end.

refuse(Link, Why, S) ->
    Ends = {meshx_node_nif:address(Link, local), meshx_node_nif:address(Link, peer)},
    meshx_node_nif:close(Link),
    case refusal(Why, Ends) of
        none -> S;
        Text -> report(refused, Text, S)
    end.

refusal(_, {_, {error, _}}) ->
    none;
refusal({user, Uid}, {_, {ok, Peer}}) ->
    io_lib:format(
        "connection from ~ts refused, it is user ~b's; if that user runs the sidecar, set allowed_uids "
        "to ~b",
        [place(Peer), Uid, Uid]
    );
refusal(enoent, {{ok, {Local, _}}, {ok, {Ip, _} = Peer}}) ->
    case is_loopback(Ip) orelse Ip =:= Local of
        true ->
            %% Of this host, and closed already: health checks and proxies come and go.
            none;
        false ->
            io_lib:format(
                "connection from ~ts refused, no process of this host has its other end, so it "
                "doesn't come through a sidecar here; if it should be let in, set allowed_uids to any",
                [place(Peer)]
            )
    end;
refusal(Reason, {_, {ok, Peer}}) ->
    io_lib:format(
        "connection from ~ts refused, the kernel doesn't say whose it is: ~ts; allowed_uids set to any "
        "lets every user in",
        [place(Peer), inet:format_error(Reason)]
    ).

is_loopback({127, _, _, _}) -> true;
is_loopback({0, 0, 0, 0, 0, 0, 0, 1}) -> true;
is_loopback({0, 0, 0, 0, 0, 16#FFFF, High, _}) -> High bsr 8 =:= 127;
is_loopback(_) -> false.

place({Ip, Port}) when tuple_size(Ip) =:= 8 -> io_lib:format("[~ts]:~b", [inet:ntoa(Ip), Port]);
place({Ip, Port}) -> io_lib:format("~ts:~b", [inet:ntoa(Ip), Port]).

%% ---- half-open connections ----

adopt(Link, #state{kernel = Kernel} = S) ->
    case meshx_node_dist:has_room() of
        true ->
            {Controller, Monitor} = meshx_node_ctrl:adopt(Kernel, Link),
            adopted(Controller, Monitor, S);
        false ->
            meshx_node_nif:close(Link),
            shortage(system_limit, S)
    end.

adopted(Controller, Monitor, #state{next = Next, half_open = HalfOpen, places = Places} = S) ->
    Entry = #half_open{
        controller = Controller,
        monitor = Monitor,
        since = erlang:monotonic_time(millisecond)
    },
    S#state{
        next = Next + 1,
        half_open = gb_trees:insert(Next, Entry, HalfOpen),
        places = Places#{Controller => Next}
    }.

make_room(#state{places = Places} = S) when map_size(Places) < ?HALF_OPEN_MAX ->
    S;
make_room(#state{half_open = HalfOpen} = S) ->
    {_, #half_open{controller = Controller, since = Since}} = gb_trees:smallest(HalfOpen),
    case Since + ?HALF_OPEN_TIME - erlang:monotonic_time(millisecond) of
        Time when Time > 0 ->
            receive
                Message -> make_room(handle(Message, S))
            after Time -> make_room(S)
            end;
        _ ->
            receive
                %% It has completed its handshake; the news waits behind that of others.
                {linked, Controller} = Message -> make_room(handle(Message, S))
            after 0 -> drop(Controller, S)
            end
    end.

drop(Controller, S) ->
    exit(Controller, kill),
    {_, Left} = forget(Controller, S),
    Text = io_lib:format(
        "~b connections have not completed their handshake: the oldest are dropped in favour of new ones",
        [?HALF_OPEN_MAX]
    ),
    report(full, Text, Left).

forget(Controller, #state{half_open = HalfOpen, places = Places} = S) ->
    case maps:take(Controller, Places) of
        {Place, OtherPlaces} ->
            {Entry, Others} = gb_trees:take(Place, HalfOpen),
            demonitor(Entry#half_open.monitor, [flush]),
            {Entry, S#state{half_open = Others, places = OtherPlaces}};
        error ->
            {none, S}
    end.

%% ---- messages ----

handle({linked, Controller}, S) ->
    case forget(Controller, S) of
        {#half_open{has_new_name = true}, Left} -> return_name(Left);
        {_, Left} -> Left
    end;
handle({'DOWN', _, process, Controller, Reason}, S) ->
    case forget(Controller, S) of
        {none, _} -> S;
        {_, Left} -> ended(Reason, Left)
    end;
handle({new_name, Controller, Ref}, #state{places = Places, half_open = HalfOpen} = S) ->
    case {Places, S#state.new_names} of
        {#{Controller := Place}, NewNames} when NewNames > 0 ->
            Controller ! {Ref, true},
            Entry = (gb_trees:get(Place, HalfOpen))#half_open{has_new_name = true},
            S#state{
                new_names = NewNames - 1, half_open = gb_trees:update(Place, Entry, HalfOpen)
            };
        {#{}, NewNames} when NewNames > 0 ->
            %% Dropped meanwhile.
            S;
        {_, 0} ->
            Controller ! {Ref, false},
            Text =
                "too many handshakes under new node names were begun and not completed: new names are "
                "let in one every 10 seconds",
            report(new_names, Text, S)
    end;
handle(new_name_time, S) ->
    _ = erlang:send_after(?NEW_NAME_TIME, self(), new_name_time),
    return_name(S);
handle({period_over, Kind}, #state{reports = Reports} = S) ->
    {{_, HeldBack}, Others} = maps:take(Kind, Reports),
    HeldBack > 0 andalso
        ?LOG_WARNING("meshx_node: ~b more times within ~b s: ~ts", [
            HeldBack, period(Kind) div 1000, subject(Kind)
        ]),
    S#state{reports = Others};
handle(_, S) ->
    S.

return_name(#state{new_names = NewNames} = S) ->
    S#state{new_names = min(?NEW_NAMES, NewNames + 1)}.

%% Why a controller ended before its handshake was complete.
ended({no_handshake, {_, _} = Peer}, S) ->
    Text = io_lib:format(
        "~ts sent something that is no Erlang distribution handshake, connection dropped", [place(Peer)]
    ),
    report(no_handshake, Text, S);
ended({not_allowed, Name, Why}, S) ->
    report(not_allowed, io_lib:format("a connection from ~ts is refused: ~ts", [Name, Why]), S);
ended(_, S) ->
    S.

%% ---- log lines ----

%% So many of a kind within its period; then, at the end of it, how many there would have been.
report(Kind, Text, #state{reports = Reports} = S) ->
    case Reports of
        #{Kind := {Logged, HeldBack}} ->
            case Logged < lines(Kind) of
                true ->
                    log(Kind, Text),
                    S#state{reports = Reports#{Kind := {Logged + 1, HeldBack}}};
                false ->
                    S#state{reports = Reports#{Kind := {Logged, HeldBack + 1}}}
            end;
        #{} ->
            log(Kind, Text),
            _ = erlang:send_after(period(Kind), self(), {period_over, Kind}),
            S#state{reports = Reports#{Kind => {1, 0}}}
    end.

log(shortage, Text) -> ?LOG_ERROR("meshx_node: ~ts", [Text]);
log(_, Text) -> ?LOG_WARNING("meshx_node: ~ts", [Text]).

%% Strangers are named one by one, as long as they are few; the rest are conditions.
lines(refused) -> 10;
lines(no_handshake) -> 10;
lines(not_allowed) -> 10;
lines(_) -> 1.

period(refused) -> 10000;
period(no_handshake) -> 10000;
period(not_allowed) -> 10000;
period(_) -> 60000.

subject(refused) -> "connection refused because of its user, see allowed_uids";
subject(no_handshake) -> "connection dropped that sent no Erlang distribution handshake";
subject(not_allowed) -> "connection refused because of an intention";
subject(full) -> "half-open connection dropped in favour of a new one";
subject(new_names) -> "handshake under a new node name refused";
subject(shortage) -> "no descriptor, process or memory to accept a connection".
