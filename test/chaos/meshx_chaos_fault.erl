%% The faults. inject/2 does one to a member chosen at random, looks at what must happen at once,
%% and ends it; that all is repaired afterwards is the matter of the caller.
%%
%% A stopped process (SIGSTOP) is the affair of a shell that lets it go on when its port is
%% closed: also when this VM ends.
-module(meshx_chaos_fault).

-export([all/0, limit/1, inject/2]).
-export_type([fault/0, outcome/0]).

-type fault() :: atom().
%% since: when the fault was over, or began, if it is over with its injection; from here on the
%%   repair is timed.
%% proven: only messages sent after this show that a link is repaired.
%% failed: what must have happened and has not.
%% noticed: how long until nodedown was seen, ms.
%% undo: what has to be given up when all is repaired.
-type outcome() :: #{
    on := string(),
    since := integer(),
    proven := integer(),
    failed := [string()],
    noticed := [integer()],
    undo := fun(() -> term())
}.
-type world() :: meshx_chaos_world:world().

%% A cut link must be seen on both sides, ms.
-define(NOTICE_TIME, 100).
%% No guard and no sidecar may outlive its VM for longer, ms.
-define(OUTLIVE_TIME, 1000).
%% A denial cuts an open link, ms.
-define(DENY_TIME, 5000).
%% A node may take so long to stop in good order, ms.
-define(STOP_TIME, 20000).
%% A sidecar that hangs is replaced, ms.
-define(HANG_TIME, 60000).
%% One more than the restarts MeshxConsul had.
-define(AGAIN, 6).
-define(AGENT_STOPPED, 10000).

-spec all() -> [fault()].
all() ->
    [
        sidecar_term,
        sidecar_kill,
        sidecar_kill_again,
        sidecars_kill_all,
        sidecar_stop,
        sidecar_port_taken,
        guard_kill,
        agent_restart,
        agent_state_lost,
        agent_stop,
        deregistered,
        node_kill,
        node_lost,
        node_halt,
        node_segv,
        node_term,
        node_init_stop,
        node_stop,
        vm_stop,
        deny,
        disconnect
    ].

%% The longest a repair may take, ms.
-spec limit(fault()) -> pos_integer().
limit(agent_restart) -> 2000;
limit(agent_state_lost) -> 2000;
limit(_) -> 60000.

-spec inject(fault(), world()) -> {world(), outcome()}.
inject(sidecar_term, World) ->
    kill_below(World, fun meshx_ct:sidecar/1, "TERM");
inject(sidecar_kill, World) ->
    kill_below(World, fun meshx_ct:sidecar/1, "KILL");
inject(guard_kill, World) ->
    kill_below(World, fun guard/1, "KILL");
inject(sidecar_kill_again, World) ->
    {_, Node} = pick(World),
    [
        begin
            Sidecar = await_sidecar(Node),
            meshx_ct_proc:signal(Sidecar, "KILL"),
            meshx_ct:wait("its end", fun() -> not meshx_ct_proc:is_alive(Sidecar) end)
        end
     || _ <- lists:seq(1, ?AGAIN)
    ],
    {World, outcome(Node, now_ms())};
inject(sidecars_kill_all, World) ->
    Nodes = all_nodes(World),
    Sidecars = [await_sidecar(Node) || Node <- Nodes],
    Since = now_ms(),
    [meshx_ct_proc:signal(Sidecar, "KILL") || Sidecar <- Sidecars],
    {World, (outcome(hd(Nodes), Since))#{on := "all"}};
inject(sidecar_stop, World) ->
    {_, Node} = pick(World),
    Sidecar = await_sidecar(Node),
    Since = now_ms(),
    Replaced = while_stopped(Sidecar, fun() ->
        holds(fun() -> not lists:member(meshx_ct:sidecar(Node), [Sidecar, none]) end, ?HANG_TIME)
    end),
    {World, failed(["not replaced" || not Replaced], outcome(Node, Since))};
inject(sidecar_port_taken, World) ->
    {_, Node} = pick(World),
    {ok, Port} = meshx_ct:call(Node, meshx_node, info, [sidecar_port]),
    Since = now_ms(),
    meshx_ct_proc:signal(await_sidecar(Node), "KILL"),
    Undo =
        case take(Port, now_ms() + 1000) of
            {ok, Listener} -> fun() -> gen_tcp:close(Listener) end;
            %% The next sidecar was faster.
            {error, _} -> fun() -> ok end
        end,
    {World, (outcome(Node, Since))#{undo := Undo}};
inject(agent_restart, World) ->
    untouched(fun() ->
        stop_agent(World),
        meshx_chaos_world:restart_agent(World, kept)
    end);
inject(agent_state_lost, World) ->
    stop_agent(World),
    Restarted = meshx_chaos_world:restart_agent(World, lost),
    {Restarted, agent_outcome()};
inject(agent_stop, World) ->
    untouched(fun() ->
        #{process := Agent} = meshx_chaos_world:agent(World),
        while_stopped(Agent, fun() -> timer:sleep(?AGENT_STOPPED) end),
        World
    end);
inject(deregistered, World) ->
    {_, #{node := Name} = Node} = pick(World),
    Agent = meshx_chaos_world:agent(World),
    Path = ["/v1/agent/service/deregister/", uri_string:quote(atom_to_binary(Name))],
    {200, _} = meshx_ct_agent:request(Agent, "PUT", Path, <<>>),
    {World, outcome(Node, now_ms())};
inject(node_kill, World) ->
    dies(World, fun(Node) -> meshx_ct:kill(Node) end);
inject(node_lost, World) ->
    %% For longer than its checks may pass.
    {Member, #{node := Name} = Node} = pick(World),
    meshx_ct:kill(Node),
    NotPassing = fun() -> not lists:member(<<"passing">>, meshx_chaos_world:checks(World, Name)) end,
    Critical = holds(NotPassing, meshx_chaos_world:ttl() + 1000),
    restarted(World, Member, Node, now_ms(), ["not critical" || not Critical]);
inject(node_segv, World) ->
    dies(World, fun(Node) -> meshx_ct:signal(Node, "SEGV") end);
inject(node_halt, World) ->
    dies(World, fun(#{peer := Peer} = Node) ->
        peer:cast(Peer, erlang, halt, [1]),
        gone(Node)
    end);
inject(node_term, World) ->
    stops(World, pick(World), fun(#{process := Process} = Node) ->
        meshx_ct_proc:signal(Process, "TERM"),
        gone(Node)
    end);
inject(node_init_stop, World) ->
    stops(World, pick(World), fun(#{peer := Peer} = Node) ->
        peer:cast(Peer, init, stop, []),
        gone(Node)
    end);
inject(node_stop, World) ->
    %% Only those that are nodes by Node.start can stop to be one.
    Some = [Member || Member <- meshx_chaos_world:members(World), Member rem 2 =:= 0],
    stops(World, pick(World, Some), fun(Node) -> ok = meshx_ct:call(Node, net_kernel, stop, []) end);
inject(vm_stop, World) ->
    {_, #{node := Name, process := Process} = Node} = pick(World),
    Time = rand:uniform(2 * meshx_chaos_world:ttl()),
    Statuses = while_stopped(Process, fun() ->
        timer:sleep(Time),
        meshx_chaos_world:checks(World, Name)
    end),
    %% Twice as long as TTL would be sure; here it had half a second more, and a heartbeat that
    %% was under way.
    Failed = ["not critical" || Time > meshx_chaos_world:ttl() + 500, lists:member(<<"passing">>, Statuses)],
    {World, failed(Failed, outcome(Node, now_ms()))};
inject(deny, World) ->
    {Member, #{node := NameA} = A} = pick(World),
    {_, #{node := NameB} = B} = pick(World, meshx_chaos_world:members(World) -- [Member]),
    Agent = meshx_chaos_world:agent(World),
    meshx_ct_agent:deny(Agent, atom_to_binary(NameA), atom_to_binary(NameB)),
    Linked = fun() ->
        [NameB || lists:member(NameB, nodes_of(A))] ++ [NameA || lists:member(NameA, nodes_of(B))]
    end,
    Cut = holds(fun() -> Linked() =:= [] end, ?DENY_TIME),
    timer:sleep(rand:uniform(2000)),
    StaysCut = Linked() =:= [],
    meshx_ct_agent:delete_intentions(Agent),
    Failed = ["not cut" || not Cut] ++ ["came back" || Cut, not StaysCut],
    Outcome = outcome(A, now_ms()),
    {World, failed(Failed, Outcome#{on := lists:concat([NameA, " => ", NameB])})};
inject(disconnect, World) ->
    {Member, A} = pick(World),
    {_, #{node := NameB}} = pick(World, meshx_chaos_world:members(World) -- [Member]),
    Since = now_ms(),
    _ = meshx_ct:call(A, erlang, disconnect_node, [NameB]),
    {World, outcome(A, Since)}.

%% ---- Sidecars and guards ----

%% Whatever is killed, the links of the member are cut, and both sides see it.
kill_below(World, Find, Signal) ->
    {Member, #{node := Name} = Node} = pick(World),
    Sidecar = await_sidecar(Node),
    Others = [meshx_chaos_world:member(World, Other) || Other <- meshx_chaos_world:members(World) -- [Member]],
    Names = [Other || #{node := Other} <- Others],
    Victim = Find(Node),
    Since = now_ms(),
    meshx_ct_proc:signal(Victim, Signal),
    Ends = [{Other, Name} || Other <- Others] ++ [{Node, Other} || Other <- Names],
    _ = holds(fun() -> lists:all(fun(End) -> down(End, Since) =/= [] end, Ends) end, 1000),
    Noticed = [Time - Since || End <- Ends, {_, Time} <- lists:sublist(down(End, Since), 1)],
    Late = length(Ends) - length([Time || Time <- Noticed, Time =< ?NOTICE_TIME]),
    SidecarGone = holds(fun() -> not meshx_ct_proc:is_alive(Sidecar) end, ?OUTLIVE_TIME),
    Failed =
        [text("~b of ~b saw nodedown too late", [Late, length(Ends)]) || Late > 0] ++
            ["sidecar lives on" || not SidecarGone],
    {World, failed(Failed, (outcome(Node, Since))#{noticed := Noticed})}.

down({Node, Name}, Since) ->
    [Down || {Of, _} = Down <- meshx_ct:call(Node, meshx_ct_traffic, downs, [Since]), Of =:= Name].

await_sidecar(Node) ->
    meshx_ct:wait("a sidecar", fun() -> is_tuple(meshx_ct:sidecar(Node)) end, 30000),
    meshx_ct:sidecar(Node).

guard(#{process := Process}) ->
    [Guard] = [
        Child
     || Child <- meshx_ct_proc:children(meshx_ct_proc:pid(Process)),
        meshx_ct_proc:program(Child) =:= <<"meshx_guard">>
    ],
    Guard.

take(Port, Deadline) ->
    case gen_tcp:listen(Port, [{ip, {127, 0, 0, 1}}, {reuseaddr, true}]) of
        {error, eaddrinuse} = InUse ->
            case now_ms() < Deadline of
                true -> take(Port, Deadline);
                false -> InUse
            end;
        Result ->
            Result
    end.

%% ---- The agent ----

stop_agent(World) ->
    meshx_ct:stop_agent(meshx_chaos_world:agent(World)),
    timer:sleep(rand:uniform(4000)).

agent_outcome() ->
    #{
        on => "agent",
        since => now_ms(),
        proven => now_ms(),
        failed => [],
        noticed => [],
        undo => fun() -> ok end
    }.

%% Nothing of the agent's absence may be noticed by who has a link.
untouched(Fun) ->
    Begin = now_ms(),
    Changed = Fun(),
    Outcome = agent_outcome(),
    Downs = [
        Down
     || Member <- meshx_chaos_world:members(Changed),
        Down <- meshx_ct:call(meshx_chaos_world:member(Changed, Member), meshx_ct_traffic, downs, [Begin])
    ],
    {Changed, failed([text("~b ends of links cut", [length(Downs)]) || Downs =/= []], Outcome)}.

%% ---- The end of nodes ----

%% At once and without a word. Its name starts again at once, while it is still registered.
dies(World, End) ->
    {Member, Node} = pick(World),
    Processes = [_, _ | _] = meshx_ct:watch(Node),
    Since = now_ms(),
    End(Node),
    Failed = outlived(Processes, ?OUTLIVE_TIME),
    restarted(World, Member, Node, Since, Failed).

%% In good order: nothing is left of it, and no log complains.
stops(World, {Member, #{node := Name} = Node}, Stop) ->
    Processes = [_, _ | _] = meshx_ct:watch(Node),
    Marks = [{Of, meshx_ct:mark(Of)} || Of <- all_nodes(World)],
    Since = now_ms(),
    Stop(Node),
    Left = meshx_chaos_world:services(World, Name),
    Failed =
        [text("still registered: ~ts", [Id]) || Id <- Left] ++
            outlived(Processes, ?OUTLIVE_TIME) ++
            [text("~ts logs ~ts", [Of, Line]) || {#{node := Of} = Logged, Mark} <- Marks, Line <- complaints(Logged, Mark)],
    restarted(World, Member, Node, Since, Failed).

complaints(Node, Mark) ->
    [
        Line
     || Line <- meshx_ct:lines(Node, Mark),
        re:run(Line, "^(error|critical|alert|emergency): ") =/= nomatch
    ].

outlived(Processes, Time) ->
    _ = holds(fun() -> not lists:any(fun meshx_ct_proc:is_alive/1, Processes) end, Time),
    [text("outlives its VM: ~0tp", [Process]) || Process <- Processes, meshx_ct_proc:is_alive(Process)].

restarted(World, Member, Node, Since, Failed) ->
    {meshx_chaos_world:start_member(World, Member), failed(Failed, outcome(Node, Since))}.

gone(Node) ->
    meshx_ct:wait("the VM's end", fun() -> meshx_ct:is_gone(Node) end, ?STOP_TIME).

%% ---- The same for many ----

pick(World) ->
    pick(World, meshx_chaos_world:members(World)).

pick(World, Members) ->
    Member = lists:nth(rand:uniform(length(Members)), Members),
    {Member, meshx_chaos_world:member(World, Member)}.

all_nodes(World) ->
    [meshx_chaos_world:member(World, Member) || Member <- meshx_chaos_world:members(World)].

nodes_of(Node) ->
    meshx_ct:call(Node, erlang, nodes, []).

outcome(#{node := Name}, Since) ->
    #{
        on => atom_to_list(Name),
        since => Since,
        proven => now_ms(),
        failed => [],
        noticed => [],
        undo => fun() -> ok end
    }.

failed(Failed, Outcome) ->
    Outcome#{failed := Failed, proven := now_ms()}.

while_stopped(Process, Fun) ->
    Script = "kill -STOP $0; echo; cat >/dev/null; kill -CONT $0 2>/dev/null",
    Port = open_port({spawn_executable, "/bin/sh"}, [
        {args, ["-c", Script, integer_to_list(meshx_ct_proc:pid(Process))]}, {line, 10}
    ]),
    receive
        {Port, {data, _}} -> ok
    end,
    try
        Fun()
    after
        %% Its end of the pipe is closed with it; the shell then lets the process go on.
        port_close(Port),
        meshx_ct:wait("it to go on", fun() -> not is_stopped(Process) end)
    end.

is_stopped(Process) ->
    case file:read_file(lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/stat"])) of
        {ok, Stat} -> binary:match(Stat, <<") T ">>) =/= nomatch;
        {error, _} -> false
    end.

holds(Fun, Time) ->
    holds_until(Fun, now_ms() + Time).

holds_until(Fun, Deadline) ->
    Fun() orelse
        (now_ms() < Deadline andalso
            begin
                timer:sleep(10),
                holds_until(Fun, Deadline)
            end).

%% The clock of meshx_ct_traffic.
now_ms() ->
    os:system_time(millisecond).

text(Format, Arguments) ->
    lists:flatten(io_lib:format(Format, Arguments)).
