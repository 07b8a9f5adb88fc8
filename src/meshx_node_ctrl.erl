%% The distribution controller: one process that owns a link from its birth to its end.
%%
%% In the handshake it serves the connection process (dist_util), one packet at a time. Then it
%% becomes the emulator's output process: see meshx_node_traffic. The socket is closed with its
%% owner, us.
%%
%% Dialling again: a sidecar accepts before it reaches the other side, so a connection says
%% nothing until a byte has come back. As long as none has, a connection that is closed is
%% dialled anew, after asking the mesh again, until the setup time is over.
-module(meshx_node_ctrl).

-export([dial/2, adopt/2, send/2, recv/3, handshaken/1, peer/1, link_up/3]).

%% Spawned.
-export([init_dialled/3, init_accepted/2]).

-include_lib("kernel/include/logger.hrl").

%% Pause before dialling again, ms: doubles from the first to the second.
-define(DIAL_PAUSE, 5).
-define(DIAL_PAUSE_MAX, 200).

%% What the last of them has at least, ms: one refused at once must not look like one not answered.
-define(LAST_TRY, 100).

%% How long a stranger may take to send its first packet, ms (dist_util's own setup time).
-define(FIRST_PACKET_TIME, 7000).

%% Bytes of a node name, which goes over the wire in Latin-1: what an atom has. net_kernel, which ends
%% with the whole VM on more, puts up to 12 before the host of a node that asks for a name.
-define(NAME_SIZE_MAX, 255).
-define(HOST_SIZE_MAX, 240).

%% The flag of a node that has no name and asks for one.
-define(NAME_ME, (1 bsl 33)).

%% Off-heap and fullsweep: binaries must not linger in a process that has no live data.
-define(SPAWN_OPTIONS, [{message_queue_data, off_heap}, {fullsweep_after, 0}]).

-record(handshake, {
    link :: meshx_node_nif:socket(),
    supervisor :: pid(),
    %% undefined: we have dialled
    acceptor :: pid() | undefined,
    %% undefined: we were dialled
    node :: node() | undefined,
    how = dialed :: meshx_node_mesh:how(),
    %% where we have dialled it
    upstream :: meshx_node_mesh:upstream() | undefined,
    %% when to stop dialling again
    deadline = 0 :: integer(),
    pause = ?DIAL_PAUSE :: pos_integer(),
    %% packets sent while nothing had come back, newest first
    sent = [] :: [iodata()],
    received = 0 :: non_neg_integer(),
    %% a packet read before dist_util asked for it
    first = none :: none | binary()
}).

%% ---- API, for the connection process ----

%% Dials Node through our sidecar, or at its static address; the caller is linked to the
%% controller. Deadline is in erlang:monotonic_time(millisecond).
-spec dial(node(), integer()) -> {ok, pid()} | {error, meshx_node_nif:failure()}.
dial(Node, Deadline) ->
    Controller = spawn_opt(
        ?MODULE, init_dialled, [self(), Node, Deadline], [link, {priority, max} | ?SPAWN_OPTIONS]
    ),
    receive
        {Controller, Result} -> Result
    end.

%% Takes over an accepted link, owned by the caller, the acceptor, which then monitors the
%% controller. When its first packet has come, net_kernel is told; until then nobody is.
-spec adopt(pid(), meshx_node_nif:socket()) -> {pid(), reference()}.
adopt(Kernel, Link) ->
    {Controller, Monitor} = spawn_opt(
        ?MODULE, init_accepted, [Kernel, Link], [monitor | ?SPAWN_OPTIONS]
    ),
    _ = meshx_node_nif:controlling_process(Link, Controller),
    Controller ! {self(), yours},
    {Controller, Monitor}.

-spec send(pid(), iodata()) -> ok | {error, term()}.
send(Controller, Packet) ->
    call(Controller, {send, Packet}).

-spec recv(pid(), 0, timeout()) -> {ok, [byte()]} | {error, term()}.
recv(Controller, 0, Timeout) ->
    call(Controller, {recv, Timeout}).

%% The handshake's last packet is through: 4-byte lengths from now on.
-spec handshaken(pid()) -> ok.
handshaken(Controller) ->
    call(Controller, handshaken).

-spec peer(pid()) -> {inet:ip_address(), inet:port_number()} | undefined.
peer(Controller) ->
    call(Controller, peer).

%% Traffic may begin. Returns the link for ticks, statistics and options.
-spec link_up(pid(), node(), erlang:dist_handle()) -> meshx_node_nif:socket().
link_up(Controller, Node, Handle) ->
    call(Controller, {link_up, Node, Handle}).

call(Controller, Request) ->
    Monitor = monitor(process, Controller),
    Controller ! {Monitor, self(), Request},
    receive
        {Monitor, Reply} ->
            demonitor(Monitor, [flush]),
            Reply;
        {'DOWN', Monitor, process, Controller, Reason} ->
            exit({dist_controller_exit, Reason})
    end.

%% ---- birth ----

-spec init_dialled(pid(), node(), integer()) -> no_return() | ok.
init_dialled(Supervisor, Node, Deadline) ->
    SetupTime = time_left(Deadline),
    case connect(Node, dial, Deadline, ?DIAL_PAUSE) of
        {ok, Link, Upstream} ->
            Supervisor ! {self(), {ok, self()}},
            %% Supervisor resets its timer now.
            handshake(#handshake{
                link = Link,
                supervisor = Supervisor,
                node = Node,
                upstream = Upstream,
                deadline = deadline(SetupTime)
            });
        {error, Failure} ->
            unlink(Supervisor),
            Supervisor ! {self(), {error, Failure}},
            ok
    end.

%% Asks the mesh and connects to the sidecar. The sidecar opens a new upstream's port some
%% milliseconds after the agent knows it, one that something else runs may be about to start:
%% refused is "not yet".
connect(Node, Mode, Deadline, Pause) ->
    case meshx_node_mesh:upstream(Node, Mode) of
        {ok, Upstream} ->
            connect_upstream(Upstream, Deadline, Pause);
        {error, Failure} ->
            {error, Failure}
    end.

connect_upstream({_, Ip, Port} = Upstream, Deadline, Pause) ->
    {Bind, Options} = meshx_node_options:connect(),
    case connected(meshx_node_nif:connect(Ip, Port, Bind, Options), Deadline) of
        {ok, Link} ->
            {ok, Link, Upstream};
        {error, econnrefused} ->
            case pause(Pause, Deadline) of
                ok -> connect_upstream(Upstream, Deadline, next_pause(Pause));
                timeout -> {error, {sidecar_down, refused(Upstream)}}
            end;
        {error, Reason} ->
            Words = [name(Upstream), inet:format_error(Reason)],
            {error, {system_error, text("can't connect to ~ts: ~ts", Words)}}
    end.

connected({wait, Link}, Deadline) ->
    receive
        {select, Link, _, ready_output} ->
            case meshx_node_nif:connected(Link) of
                ok ->
                    {ok, Link};
                wait ->
                    connected({wait, Link}, Deadline);
                Error ->
                    meshx_node_nif:close(Link),
                    Error
            end
    after max(?LAST_TRY, time_left(Deadline)) ->
        meshx_node_nif:close(Link),
        {error, etimedout}
    end;
connected(Result, _Deadline) ->
    Result.

refused({sidecar, Ip, Port}) ->
    text("our sidecar did not open its upstream ~ts:~b in time; see its log", [inet:ntoa(Ip), Port]);
refused(Upstream) ->
    text("~ts refuses connections; does what it belongs to run?", [name(Upstream)]).

%% For people: a wrong address in the configuration is found by it.
name({sidecar, Ip, Port}) ->
    io_lib:format("our sidecar's upstream ~ts", [place(Ip, Port)]);
name({direct, Ip, Port}) ->
    io_lib:format("its listener ~ts", [place(Ip, Port)]);
name({static, Ip, Port}) ->
    io_lib:format("the upstream ~ts given by `upstreams`", [place(Ip, Port)]).

place(Ip, Port) when tuple_size(Ip) =:= 8 -> io_lib:format("[~ts]:~b", [inet:ntoa(Ip), Port]);
place(Ip, Port) -> io_lib:format("~ts:~b", [inet:ntoa(Ip), Port]).

pause(Pause, Deadline) ->
    case erlang:monotonic_time(millisecond) + Pause < Deadline of
        true ->
            receive
            after Pause -> ok
            end;
        false ->
            timeout
    end.

next_pause(Pause) ->
    min(2 * Pause, ?DIAL_PAUSE_MAX).

%% A connection counts when its first packet has come: proxies dial us before they have
%% authenticated anyone, and health checks dial and leave. dist_util crashes on a packet that
%% isn't built like this, the first one of every handshake since OTP 25. Until here it is
%% anyone's, and has no priority.
-spec init_accepted(pid(), meshx_node_nif:socket()) -> no_return() | ok.
init_accepted(Kernel, Link) ->
    Acceptor =
        receive
            {From, yours} -> From
        after ?FIRST_PACKET_TIME -> exit(normal)
        end,
    case read_packet(Link, ?FIRST_PACKET_TIME) of
        {ok, <<$N, Flags:64, _Creation:32, Size:16, Name:Size/binary, _/binary>> = First} when
            Size =< ?HOST_SIZE_MAX; Size =< ?NAME_SIZE_MAX, Flags band ?NAME_ME =:= 0
        ->
            meshx_node_acceptor:admit_name(Acceptor, Name, Flags) orelse exit(normal),
            How = check_intentions(Link, Name, Flags),
            awaits_answer(Link) orelse exit(normal),
            process_flag(priority, max),
            accepted(Kernel, Link, Acceptor, First, How);
        {error, Reason} when Reason =/= bad_frame ->
            ok;
        _ ->
            exit({no_handshake, peer_of(Link)})
    end.

%% Of two connections made at once one is given up, and its first packet may come late, through two
%% sidecars: net_kernel would take it for a new one, and for its sake give up what we dial by then.
awaits_answer(Link) ->
    meshx_node_nif:read(Link) =:= {wait, []}.

accepted(Kernel, Link, Acceptor, First, How) ->
    {ok, {Ip, _}} = meshx_node_nif:address(Link, local),
    Family =
        case tuple_size(Ip) of
            4 -> inet;
            8 -> inet6
        end,
    KernelMonitor = monitor(process, Kernel),
    Kernel ! {accept, self(), self(), Family, meshx},
    receive
        {Kernel, controller, Supervisor} ->
            demonitor(KernelMonitor, [flush]),
            link(Supervisor),
            Supervisor ! {self(), controller},
            handshake(#handshake{
                link = Link, supervisor = Supervisor, acceptor = Acceptor, first = First, how = How
            });
        {Kernel, unsupported_protocol} ->
            exit(unsupported_protocol);
        {'DOWN', KernelMonitor, process, Kernel, _} ->
            ok
    end.

%% Does an intention forbid the link? If so, the other side is told in dist_util's words, so that
%% it doesn't dial again and again.
check_intentions(Link, Name, Flags) ->
    User = service_user(Name, Flags),
    %% What is no name dist_util deals with.
    case meshx_node_dist:is_node_name(User) andalso meshx_node_mesh:accepts(User, Link) of
        direct ->
            direct;
        {error, {_, Text}} ->
            _ = write_packet(Link, "snot_allowed"),
            exit({not_allowed, Name, Text});
        _ ->
            {accepted, User}
    end.

%% The node by whose name the other side calls itself a service. One that asks for a name sends only
%% its host, and uses the name it has until it gets one.
service_user(Host, Flags) when Flags band ?NAME_ME =/= 0 ->
    service_user(<<"undefined@", Host/binary>>, 0);
service_user(Name, _Flags) ->
    try
        binary_to_atom(Name, latin1)
    catch
        error:_ -> nonode@nohost
    end.

%% ---- handshake ----

handshake(#handshake{link = Link} = S) ->
    receive
        {Ref, From, {send, Packet}} ->
            Result = write_packet(Link, Packet),
            From ! {Ref, Result},
            handshake(remember(S, Packet));
        {Ref, From, {recv, Timeout}} ->
            {Result, S1} = receive_packet(S, Timeout),
            From ! {Ref, Result},
            handshake(S1);
        {Ref, From, handshaken} ->
            ok = meshx_node_nif:framing(Link, distribution),
            From ! {Ref, ok},
            handshake(S);
        {Ref, From, peer} ->
            From ! {Ref, peer_of(Link)},
            handshake(S);
        {Ref, From, {link_up, Node, Handle}} ->
            %% Before anyone else can think that the link is up.
            S#handshake.acceptor =:= undefined orelse
                meshx_node_acceptor:linked(S#handshake.acceptor),
            From ! {Ref, Link},
            meshx_node_mesh:link_up(Node, self(), Link, S#handshake.how),
            meshx_node_traffic:run(Handle, Link, S#handshake.supervisor);
        {select, _, _, _} ->
            %% Of a link that was given up, or a wait that timed out.
            handshake(S)
    end.

peer_of(Link) ->
    case meshx_node_nif:address(Link, peer) of
        {ok, Address} -> Address;
        {error, _} -> undefined
    end.

remember(#handshake{received = 0, sent = Sent} = S, Packet) ->
    S#handshake{sent = [Packet | Sent]};
remember(S, _Packet) ->
    S.

receive_packet(#handshake{first = First} = S, _Timeout) when First =/= none ->
    {{ok, binary_to_list(First)}, S#handshake{first = none, received = 1}};
receive_packet(#handshake{received = 0, node = Node} = S, _Timeout) when Node =/= undefined ->
    case read_packet_until(S#handshake.link, S#handshake.deadline) of
        {ok, Packet} ->
            explain_status(S, Packet),
            {{ok, binary_to_list(Packet)}, S#handshake{received = 1, sent = []}};
        {error, _} ->
            dial_again(S)
    end;
receive_packet(#handshake{link = Link, received = Received} = S, Timeout) ->
    case read_packet(Link, Timeout) of
        {ok, Packet} ->
            explain_challenge(S, Packet),
            {{ok, binary_to_list(Packet)}, S#handshake{received = Received + 1}};
        {error, Reason} ->
            explain_end(S),
            {{error, Reason}, S}
    end.

%% Nothing has come back yet: the far side isn't there, or doesn't let us in. The mesh knows
%% which, or soon will.
dial_again(#handshake{link = Old, node = Node, deadline = Deadline, pause = Pause} = S) ->
    meshx_node_nif:close(Old),
    case pause(Pause, Deadline) of
        ok ->
            case connect(Node, redial, Deadline, Pause) of
                {ok, Link, Upstream} ->
                    [_ = write_packet(Link, Packet) || Packet <- lists:reverse(S#handshake.sent)],
                    receive_packet(
                        S#handshake{link = Link, upstream = Upstream, pause = next_pause(Pause)},
                        infinity
                    );
                {error, {Code, Text}} ->
                    ?LOG_WARNING("meshx_node: no link to ~ts: ~ts", [Node, Text]),
                    {{error, Code}, S}
            end;
        timeout ->
            ?LOG_WARNING(
                "meshx_node: no link to ~ts: ~ts closes every connection, or never answers; is the "
                "node's listener up, and what do the sidecars log?",
                [Node, static_or("its sidecar, or ours,", S)]
            ),
            {{error, closed}, S}
    end.

explain_status(#handshake{node = Node}, <<"snot_allowed">>) ->
    ?LOG_WARNING(
        "meshx_node: no link to ~ts: it does not allow this node (an intention, or "
        "net_kernel:allow/1, there); its log says why",
        [Node]
    );
explain_status(_, _) ->
    ok.

%% A static address may be that of another node, which dist_util gives up without a word.
explain_challenge(
    #handshake{node = Node, upstream = {Kind, _, _} = Upstream, received = 1},
    <<$N, _Flags:64, _Challenge:32, _Creation:32, Size:16, Name:Size/binary, _/binary>>
) when Kind =/= sidecar ->
    atom_to_list(Node) =:= binary_to_list(Name) orelse
        ?LOG_WARNING("meshx_node: no link to ~ts: ~ts leads to ~s", [Node, name(Upstream), Name]);
explain_challenge(_, _) ->
    ok.

%% Status and challenge came, then our reply was not liked.
explain_end(#handshake{node = Node, received = 2} = S) when Node =/= undefined ->
    ?LOG_WARNING(
        "meshx_node: no link to ~ts: ~ts closed the connection after our answer to its challenge; "
        "do both nodes have the same cookie?",
        [Node, static_or("it", S)]
    );
explain_end(_) ->
    ok.

static_or(Other, #handshake{upstream = {sidecar, _, _}}) -> Other;
static_or(_, #handshake{upstream = Upstream}) -> name(Upstream).

%% One packet of the handshake.
read_packet(Link, Timeout) ->
    read_packet_until(Link, deadline(Timeout)).

read_packet_until(Link, Deadline) ->
    case meshx_node_nif:read(Link) of
        {_, [Packet]} ->
            {ok, Packet};
        {more, []} ->
            read_packet_until(Link, Deadline);
        {wait, []} ->
            receive
                {select, Link, _, ready_input} -> read_packet_until(Link, Deadline)
            after time_left(Deadline) -> {error, timeout}
            end;
        {error, Reason} ->
            {error, Reason}
    end.

deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

time_left(infinity) -> infinity;
time_left(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).

write_packet(Link, Packet) ->
    Binary = iolist_to_binary(Packet),
    meshx_node_traffic:written(Link, meshx_node_nif:write(Link, [{byte_size(Binary), [Binary]}])).

text(Format, Arguments) ->
    unicode:characters_to_binary(io_lib:format(Format, Arguments)).
