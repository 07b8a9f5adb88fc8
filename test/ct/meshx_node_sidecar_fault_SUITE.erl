%% The sidecar and its guard die, hang, or find their ports taken; the VM dies without a word.
%% Whatever happens to one of them, the node is reachable again by itself and nothing runs on
%% without its owner.
-module(meshx_node_sidecar_fault_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% Long enough to take a port meanwhile.
-define(PAUSE, "1000").
%% An issue says 100 ms, which a loaded machine may miss.
-define(NODEDOWN_TIME, 1000).

all() ->
    [
        sidecar_killed_again_and_again,
        sidecar_hangs,
        public_port_taken,
        upstream_port_taken,
        guard_killed,
        vm_killed,
        vm_halts,
        vm_crashes,
        hundred_upstreams_at_once,
        departed_node,
        nothing_is_inherited,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    Args = ["-meshx_node", "ttl", "1000", "sidecar_restart_min", "50", "sidecar_restart_max", "200"],
    [{nodes, meshx_ct:start_all(Config1, [a, b], #{scope => suite, args => Args})} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

nodes_of(Config) -> proplists:get_value(nodes, Config).

info(Node, Key) ->
    {ok, Value} = meshx_ct:call(Node, meshx_node, info, [Key]),
    Value.

%% The link can be made, as soon as the faults before, which have been noticed, are mended.
links(#{agent := Agent, node := NameA} = A, #{node := NameB} = B) ->
    [meshx_ct:wait("the sidecar", fun() -> info(Node, sidecar_accepts) end) || Node <- [A, B]],
    [
        meshx_ct:wait([atom_to_list(Name), " to be found"], fun() ->
            meshx_ct_agent:healthy(Agent, atom_to_binary(Name)) =/= []
        end)
     || Name <- [NameA, NameB]
    ],
    ?assert(meshx_ct:connect(A, B)).

is_critical(#{agent := Agent, node := Name}) ->
    Path = ["/v1/agent/health/service/id/", uri_string:quote(atom_to_list(Name)), "-sidecar-proxy"],
    {Status, _} = meshx_ct_agent:request(Agent, "GET", lists:flatten(Path), <<>>),
    Status =:= 503.

%%% Death

%% More often than the 5 restarts that MeshxConsul allowed.
sidecar_killed_again_and_again(Config) ->
    [A, B] = nodes_of(Config),
    Times = lists:append([killed(A, B, Signal) || Signal <- ["TERM", "KILL", "TERM", "KILL", "KILL", "KILL", "KILL", "KILL"]]),
    ct:pal("nodedown, us after the signal was asked for: ~w", [lists:sort(Times)]),
    links(A, B),
    ?assertEqual(9, info(B, sidecar_starts)),
    ?assertEqual(1, info(A, sidecar_starts)),
    meshx_ct:watch(B).

killed(A, B, Signal) ->
    links(A, B),
    Sidecar = meshx_ct:sidecar(B),
    Starts = info(B, sidecar_starts),
    [meshx_ct:call(Node, ?MODULE, note_nodedown, []) || Node <- [A, B]],
    Begin = os:system_time(microsecond),
    meshx_ct_proc:signal(Sidecar, Signal),
    Downs = [noted_nodedown(A, B), noted_nodedown(B, A)],
    Times = [Down - Begin || Down <- Downs],
    [?assert(Time < ?NODEDOWN_TIME * 1000) || Time <- Times],
    meshx_ct:wait("another sidecar", fun() -> info(B, sidecar_starts) > Starts end),
    Times.

noted_nodedown(Node, #{node := Other}) ->
    Noted = fun() -> [Time || {Name, Time} <- meshx_ct:call(Node, ?MODULE, noted, []), Name =:= Other] end,
    meshx_ct:wait("nodedown", fun() -> Noted() =/= [] end),
    hd(Noted()).

%% On the node.
note_nodedown() ->
    Self = self(),
    {Pid, Monitor} = spawn_monitor(fun() ->
        _ = whereis(?MODULE) =/= undefined andalso exit(whereis(?MODULE), kill),
        ?MODULE = ets:new(?MODULE, [named_table, public]),
        register(?MODULE, self()),
        ok = net_kernel:monitor_nodes(true),
        Self ! {self(), ready},
        note()
    end),
    receive
        {Pid, ready} ->
            demonitor(Monitor, [flush]);
        {'DOWN', Monitor, _, _, _} ->
            %% The former one and its table were not gone yet.
            note_nodedown()
    end.

note() ->
    receive
        {nodedown, Node} -> ets:insert(?MODULE, {Node, os:system_time(microsecond)});
        _ -> ok
    end,
    note().

noted() ->
    ets:tab2list(?MODULE).

guard_killed(Config) ->
    [A, B] = nodes_of(Config),
    links(A, B),
    [Guard, Sidecar] = meshx_ct:watch(B),
    ?assertEqual(<<"meshx_guard">>, meshx_ct_proc:program(Guard)),
    meshx_ct_proc:signal(Guard, "KILL"),
    meshx_ct:wait("the sidecar's end", fun() -> not meshx_ct_proc:is_alive(Sidecar) end, 1000),
    meshx_ct:wait("another sidecar", fun() ->
        not lists:member(meshx_ct:sidecar(B), [none, Sidecar])
    end),
    [NewGuard, _] = meshx_ct:watch(B),
    ?assertNotEqual(Guard, NewGuard),
    links(A, B).

vm_killed(Config) -> vm_ends(Config, fun meshx_ct:kill/1).

vm_halts(Config) ->
    vm_ends(Config, fun(#{peer := Peer} = Node) ->
        peer:cast(Peer, erlang, halt, [1, [{flush, false}]]),
        meshx_ct:wait("halt", fun() -> meshx_ct:is_gone(Node) end)
    end).

vm_crashes(Config) -> vm_ends(Config, fun(Node) -> meshx_ct:signal(Node, "SEGV") end).

%% Nothing of it runs on, peers know at once and can't find it soon; its name is free again.
vm_ends(Config, End) ->
    [A, _] = nodes_of(Config),
    Args = ["-meshx_node", "ttl", "1000"],
    #{node := Name} = First = meshx_ct:start(Config, ends, #{args => Args}),
    links(A, First),
    Processes = meshx_ct:watch(First),
    ?assertMatch([_, _ | _], Processes),
    meshx_ct:call(A, ?MODULE, note_nodedown, []),
    End(First),
    meshx_ct:wait("the end of guard and sidecar", fun() -> not lists:any(fun meshx_ct_proc:is_alive/1, Processes) end, 1000),
    _ = noted_nodedown(A, First),
    meshx_ct:wait(
        "its check to be critical",
        fun() -> meshx_ct:call(A, meshx_node, explain, [Name]) =/= ok end,
        2000
    ),
    Again = meshx_ct:start(Config, ends, #{args => Args}),
    %% While that lives, nobody else gets the name.
    Rival = meshx_ct:vm(Config, #{}),
    ?assertMatch({error, _}, meshx_ct:net_start(Rival, ends, [])),
    links(A, Again),
    meshx_ct:stop(Again).

%%% Life without life

%% STOP: its kernel still accepts for it.
sidecar_hangs(Config) ->
    [A, B] = nodes_of(Config),
    links(A, B),
    Mark = meshx_ct:mark(B),
    Sidecar = meshx_ct:sidecar(B),
    Port = info(B, sidecar_port),
    meshx_ct_proc:signal(Sidecar, "STOP"),
    meshx_ct:wait("its check to be critical", fun() -> is_critical(B) end),
    meshx_ct:wait("its end", fun() -> not meshx_ct_proc:is_alive(Sidecar) end),
    ?assert(meshx_ct:has_line(B, Mark, "warning: meshx_node: the sidecar of b@.* hangs")),
    meshx_ct:wait("the old link's end", fun() -> meshx_ct:call(A, erlang, nodes, []) =:= [] end),
    links(A, B),
    ?assertEqual(Port, info(B, sidecar_port)).

%%% Taken ports

take_port(Port) ->
    Options = [binary, {ip, {127, 0, 0, 1}}, {active, false}, {reuseaddr, true}],
    case gen_tcp:listen(Port, Options) of
        {ok, Stranger} ->
            Stranger;
        {error, eaddrinuse} ->
            timer:sleep(5),
            take_port(Port)
    end.

slow_to_restart(Config, Name) ->
    Args = ["-meshx_node", "ttl", "1000", "sidecar_restart_min", ?PAUSE],
    meshx_ct:start(Config, Name, #{args => Args}).

public_port_taken(Config) ->
    [A, _] = nodes_of(Config),
    B = slow_to_restart(Config, shut_out),
    links(A, B),
    Port = info(B, sidecar_port),
    meshx_ct_proc:signal(meshx_ct:sidecar(B), "KILL"),
    Stranger = take_port(Port),
    meshx_ct:wait("another port", fun() -> info(B, sidecar_port) =/= Port end),
    links(A, B),
    meshx_ct:watch(B),
    gen_tcp:close(Stranger).

%% What connects there must not take the stranger for the node.
upstream_port_taken(Config) ->
    [A, _] = nodes_of(Config),
    #{node := NameB} = B = slow_to_restart(Config, robbed),
    #{node := NameA} = A,
    links(B, A),
    Port = upstream_port(B, NameA),
    meshx_ct_proc:signal(meshx_ct:sidecar(B), "KILL"),
    Stranger = take_port(Port),
    Mark = meshx_ct:mark(B),
    meshx_ct:wait("the link's end", fun() -> not lists:member(NameB, meshx_ct:call(A, erlang, nodes, [])) end),
    links(B, A),
    ?assert(meshx_ct:has_line(B, Mark, "another program: the sidecar of robbed@.* will lead there from port")),
    ?assertNotEqual(Port, upstream_port(B, NameA)),
    ?assertEqual({error, timeout}, gen_tcp:accept(Stranger, 0)),
    meshx_ct:watch(B),
    gen_tcp:close(Stranger).

upstream_port(Node, Name) ->
    [Port] = [Port || #{node := To, port := Port} <- info(Node, upstreams), To =:= atom_to_binary(Name)],
    Port.

%%% Upstreams

hundred_upstreams_at_once(Config) ->
    [#{agent := Agent} = A, _] = nodes_of(Config),
    Ids = [iolist_to_binary(["many", integer_to_list(N), "@test"]) || N <- lists:seq(1, 100)],
    [
        meshx_ct_agent:put(Agent, "/v1/agent/service/register", #{
            <<"ID">> => Id,
            <<"Name">> => Id,
            <<"Port">> => 1,
            <<"Meta">> => #{<<"node">> => Id},
            <<"Connect">> => #{<<"Native">> => true}
        })
     || Id <- Ids
    ],
    meshx_ct:wait("the last to be in the catalog", fun() -> meshx_ct_agent:healthy(Agent, lists:last(Ids)) =/= [] end),
    Before = info(A, registrations),
    {Time, Ports} = timer:tc(fun() -> meshx_ct:call(A, ?MODULE, upstreams_at_once, [Ids]) end),
    ?assertEqual(100, length(lists:usort(Ports))),
    %% One or two; one more for each 200 ms in which a loaded agent may have answered nothing.
    ?assert(info(A, registrations) - Before =< 2 + Time div 200000),
    ?assertEqual([], Ids -- meshx_ct_agent:upstreams(Agent, maps:get(node, A))),
    [
        {200, _} = meshx_ct_agent:request(Agent, "PUT", "/v1/agent/service/deregister/" ++ uri_string:quote(binary_to_list(Id)), <<>>)
     || Id <- Ids
    ],
    ok.

%% On the node.
upstreams_at_once(Ids) ->
    Askers = [spawn_monitor(fun() -> exit({asked, meshx_node_mesh:upstream(binary_to_atom(Id), dial)}) end) || Id <- Ids],
    [
        receive
            {'DOWN', Monitor, process, Pid, {asked, {ok, {sidecar, _, Port}}}} -> Port
        end
     || {Pid, Monitor} <- Askers
    ].

departed_node(Config) ->
    [_, #{agent := Agent, node := NameB} = B] = nodes_of(Config),
    A = meshx_ct:start(Config, keeps, #{args => ["-meshx_node", "ttl", "1000", "upstream_keep", "1000"]}),
    #{node := Name} = Gone = meshx_ct:start(Config, departs, #{}),
    links(A, B),
    links(A, Gone),
    HasWay = fun(To) -> lists:member(atom_to_binary(To), meshx_ct_agent:upstreams(Agent, maps:get(node, A))) end,
    ?assertEqual({true, true}, {HasWay(NameB), HasWay(Name)}),
    meshx_ct:stop(Gone),
    meshx_ct:wait("its upstream to be removed", fun() -> not HasWay(Name) end),
    ?assert(HasWay(NameB)),
    ?assert(lists:member(NameB, meshx_ct:call(A, erlang, nodes, []))),
    Back = meshx_ct:start(Config, departs, #{}),
    links(A, Back).

%%% What guard and sidecar have of the VM

nothing_is_inherited(Config) ->
    Secrets = [{"CONSUL_HTTP_TOKEN", "t0ken"}, {"OF_THE_VM", "s3cret"}],
    #{process := Vm} = Node = meshx_ct:start(Config, reserved, #{env => Secrets}),
    [Guard, Sidecar] = meshx_ct:watch(Node),
    ?assertEqual(match, matches(Sidecar, "environ", "t0ken")),
    ?assertEqual(nomatch, matches(Sidecar, "environ", "s3cret")),
    [
        ?assertEqual({Process, File, nomatch}, {Process, File, matches(Process, File, Text)})
     || {Process, File, Text} <- [
            {Guard, "environ", "t0ken"},
            {Guard, "environ", "s3cret"},
            {Guard, "cmdline", "t0ken"},
            {Sidecar, "cmdline", "t0ken"},
            {Guard, "maps", "beam"}
        ]
    ],
    [?assertEqual(match, matches(Process, "status", "NoNewPrivs:\t1\n")) || Process <- [Guard, Sidecar]],
    %% Sockets, pipes and files; of the VM's the guard has standard error alone.
    Own = [Target || {_, Target} <- descriptors(Vm)],
    ?assert(length(Own) > 10),
    [
        ?assertEqual([], [Both || {Fd, Target} = Both <- descriptors(Process), Fd =/= "2", is_of(Target), lists:member(Target, Own)])
     || Process <- [Guard, Sidecar]
    ].

%% The guard's files are root's.
matches(Process, File, Text) ->
    case file:read_file(lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/", File])) of
        {ok, Content} -> re:run(Content, Text, [{capture, none}]);
        {error, eacces} -> nomatch
    end.

descriptors(Process) ->
    Directory = lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/fd"]),
    case file:list_dir(Directory) of
        {ok, Fds} ->
            [{Fd, Target} || Fd <- Fds, {ok, Target} <- [file:read_link_all(filename:join(Directory, Fd))]];
        {error, eacces} ->
            []
    end.

is_of("/dev/null") -> false;
is_of("anon_inode:" ++ _) -> false;
is_of(_) -> true.
