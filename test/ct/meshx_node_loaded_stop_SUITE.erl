%% A node that ends under load ends in good order: its checks fail, its links close, it is
%% deregistered, its sidecar ends, its port is free; in this order, and without a report of an
%% error on either side.
-module(meshx_node_loaded_stop_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        net_kernel_stop,
        init_stop,
        init_stop_of_a_node_by_net_kernel_start,
        sigterm,
        net_kernel_stop_and_start_again,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [{peers, meshx_ct:start_all(Config1, [a, b], options(suite))} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

end_per_testcase(nothing_is_left, Config) ->
    meshx_ct:end_case(Config);
end_per_testcase(_, Config) ->
    [ok = meshx_ct:call(Peer, meshx_ct_traffic, stop, []) || Peer <- peers(Config)],
    meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

peers(Config) -> proplists:get_value(peers, Config).

%% Not connected again by the peers' traffic while it ends.
options(Scope) ->
    #{scope => Scope, args => ["-connect_all", "false"], env => [{"MESHX_SIDECAR_STDOUT", "off"}]}.

net_kernel_stop(Config) ->
    Node = meshx_ct:net_start(meshx_ct:vm(Config, options('case')), ends),
    ends(Config, Node, fun() -> ok = meshx_ct:call(Node, net_kernel, stop, []) end),
    ?assertEqual(nonode@nohost, meshx_ct:call(Node, erlang, node, [])).

init_stop(Config) ->
    Node = meshx_ct:start(Config, ends, options('case')),
    ends(Config, Node, fun() -> meshx_ct:stop(Node) end).

%% The kernel application gives such a node one second.
init_stop_of_a_node_by_net_kernel_start(Config) ->
    Node = meshx_ct:net_start(meshx_ct:vm(Config, options('case')), ends),
    ends(Config, Node, fun() -> meshx_ct:stop(Node) end).

sigterm(Config) ->
    Node = meshx_ct:start(Config, ends, options('case')),
    ends(Config, Node, fun() -> meshx_ct:signal(Node, "TERM") end).

net_kernel_stop_and_start_again(Config) ->
    Vm = meshx_ct:vm(Config, options('case')),
    [
        begin
            Node = meshx_ct:net_start(Vm, ends),
            ends(Config, Node, fun() -> ok = meshx_ct:call(Node, net_kernel, stop, []) end)
        end
     || _ <- [1, 2, 3]
    ].

%% Puts a node under load, ends it and looks at everything.
ends(Config, #{node := Name} = Node, End) ->
    Peers = peers(Config),
    Nodes = [Node | Peers],
    loaded(Nodes),
    [meshx_ct:auto_connect(Peer, never) || Peer <- Peers],
    {ok, Port} = meshx_ct:call(Node, meshx_node, info, [listen_port]),
    Marks = [meshx_ct:mark(Of) || Of <- Nodes],
    [_, _ | _] = Processes = meshx_ct:watch(Node),
    Begin = os:system_time(millisecond),
    Watcher = start_watcher(Node, meshx_ct:sidecar(Node)),
    End(),
    Seen = stop_watcher(Watcher),
    ?assertEqual(none, meshx_ct:service(Node)),
    gone(Processes),
    ?assertMatch({ok, _}, listens(Port)),
    [
        meshx_ct:wait("nodedown", fun() -> down(Peer, Name, Begin) =/= [] end, 2000)
     || Peer <- Peers
    ],
    in_order(Seen, lists:max([Time || Peer <- Peers, Time <- down(Peer, Name, Begin)])),
    [
        ?assertEqual({Of, []}, {Of, complaints(Logged, Mark)})
     || {#{node := Of} = Logged, Mark} <- lists:zip(Nodes, Marks)
    ],
    [meshx_ct:auto_connect(Peer, always) || Peer <- Peers].

%% Everyone talks to everyone.
loaded(Nodes) ->
    Names = [Name || #{node := Name} <- Nodes],
    [ok = meshx_ct:call(Node, meshx_ct_traffic, start, [Names -- [Name]]) || #{node := Name} = Node <- Nodes],
    meshx_ct:wait("answers", fun() ->
        lists:all(fun(Node) -> length(Names) - 1 =:= maps:size(meshx_ct:call(Node, meshx_ct_traffic, answered, [])) end, Nodes)
    end).

gone(Processes) ->
    Gone = fun() -> not lists:any(fun meshx_ct_proc:is_alive/1, Processes) end,
    meshx_ct:wait("the end of guard and sidecar", Gone, 2000).

listens(Port) ->
    case gen_tcp:listen(Port, [{ip, {127, 0, 0, 1}}, {reuseaddr, true}]) of
        {ok, Listener} -> {ok, gen_tcp:close(Listener)};
        Error -> Error
    end.

down(Peer, Name, Since) ->
    [Time || {Down, Time} <- meshx_ct:call(Peer, meshx_ct_traffic, downs, [Since]), Down =:= Name].

complaints(Node, Mark) ->
    [
        Line
     || Line <- meshx_ct:lines(Node, Mark),
        re:run(Line, "^(warning|error|critical|alert|emergency): ") =/= nomatch
    ].

%%% The order of things

%% Looks again and again, in the order of what must have ended last: what still is when something
%% is seen that ends after it, is in disorder.
start_watcher(#{node := Name, agent := Agent}, Sidecar) ->
    Self = self(),
    {Pid, Monitor} = spawn_monitor(fun() ->
        Id = atom_to_binary(Name),
        Before = look(Agent, Id, Sidecar),
        Self ! {self(), watching},
        watch(Agent, Id, Sidecar, [Before])
    end),
    receive
        {Pid, watching} -> {Pid, Monitor};
        {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
    end.

stop_watcher({Pid, Monitor}) ->
    Pid ! stop,
    receive
        {'DOWN', Monitor, process, Pid, {seen, Seen}} -> Seen;
        {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
    end.

watch(Agent, Id, Sidecar, Seen) ->
    More = [look(Agent, Id, Sidecar) | Seen],
    receive
        stop -> exit({seen, lists:reverse(More)})
    after 0 -> watch(Agent, Id, Sidecar, More)
    end.

look(Agent, Id, Sidecar) ->
    Alive = meshx_ct_proc:is_alive(Sidecar),
    At = os:system_time(millisecond),
    Checks = meshx_ct_agent:get(Agent, "/v1/agent/checks"),
    Statuses = [Status || #{<<"ServiceID">> := Of, <<"Status">> := Status} <- maps:values(Checks), is_of(Of, Id)],
    #{
        alive => Alive,
        at => At,
        registered => Statuses =/= [],
        passing => lists:member(<<"passing">>, Statuses)
    }.

is_of(Service, Id) ->
    Service =:= Id orelse Service =:= <<Id/binary, "-sidecar-proxy">>.

in_order(Seen, LastDown) ->
    ct:log("~tp", [[One || #{registered := true} = One <- Seen]]),
    ?assertMatch([#{alive := true, registered := true, passing := true} | _], Seen),
    %% Nobody finds a node whose sidecar has ended.
    ?assertEqual([], [One || #{alive := false, registered := true} = One <- Seen]),
    %% Nobody dials a node that closes its links.
    ?assertEqual([], [One || #{passing := true, at := At} = One <- Seen, At > LastDown]).
