%% Two hosts, each with an agent, a node and its sidecar, and a wire between them that breaks: what
%% happens when a node vanishes behind the proxies without a word.
-module(meshx_node_network_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% Seconds: long enough for the early warning to come first.
-define(TICK_TIME, 8).

all() ->
    [
        linked_from_host_to_host,
        plaintext_stays_on_its_host,
        a_wire_that_breaks,
        nothing_is_left
    ].

init_per_suite(Config) ->
    case meshx_ct_host:start() of
        {ok, Hosts} -> init_hosts(Hosts, Config);
        {error, Text} -> {skip, "no network namespaces here: " ++ Text}
    end.

%% An agent is a server on one host and its client on the other.
init_hosts([West, East] = Hosts, Config) ->
    Config1 = meshx_ct:init_suite(Config, #{name => "west", host => West}),
    Server = proplists:get_value(agent, Config1),
    Client = meshx_ct:add_agent(Config1, #{name => "east", host => East, join => Server}),
    meshx_ct:wait("both in the catalog", fun() ->
        length(meshx_ct_agent:get(Server, "/v1/catalog/nodes")) =:= 2
    end),
    Options = #{scope => suite, args => ["-kernel", "net_ticktime", integer_to_list(?TICK_TIME)]},
    [Here] = meshx_ct:start_all(Config1, [here], Options),
    [There] = meshx_ct:start_all(Config1, [there], Options#{agent => Client}),
    [meshx_ct:call(Node, ?MODULE, watch, []) || Node <- [Here, There]],
    [{hosts, Hosts}, {here, Here}, {there, There} | Config1].

end_per_suite(Config) ->
    meshx_ct:end_suite(Config),
    meshx_ct_host:stop(proplists:get_value(hosts, Config)).

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

actors(Config) ->
    list_to_tuple([proplists:get_value(Key, Config) || Key <- [hosts, here, there]]).

%% The nodes that went down since the last call, with the reasons; found by downs/0.
watch() ->
    Watcher = spawn(fun() ->
        ok = net_kernel:monitor_nodes(true, [nodedown_reason]),
        watcher([])
    end),
    register(?MODULE, Watcher).

watcher(Downs) ->
    receive
        {nodedown, Node, [{nodedown_reason, Reason}]} -> watcher([{Node, Reason} | Downs]);
        {nodeup, _, _} -> watcher(Downs);
        {From, downs} -> From ! {?MODULE, Downs}, watcher([])
    end.

downs() ->
    ?MODULE ! {self(), downs},
    receive
        {?MODULE, Downs} -> Downs
    end.

are_linked(#{node := HereName} = Here, #{node := ThereName} = There) ->
    ?assertEqual(ThereName, meshx_ct:call(Here, erpc, call, [ThereName, erlang, node, []])),
    ?assertEqual(HereName, meshx_ct:call(There, erpc, call, [HereName, erlang, node, []])).

%% The agents would find each other by themselves, within half a minute.
rejoin(Config) ->
    {_, #{agent := Server}, #{agent := Client}} = actors(Config),
    {200, _} = meshx_ct_agent:request(Client, "PUT", ["/v1/agent/join/", meshx_ct_agent:lan(Server)], <<>>).

%%% Cases

linked_from_host_to_host(Config) ->
    {_, Here, There} = actors(Config),
    ?assert(meshx_ct:connect(Here, There)),
    are_linked(Here, There),
    ?assert(meshx_ct:call(Here, erlang, disconnect_node, [maps:get(node, There)])),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(There, erlang, nodes, []) =:= [] end),
    ?assert(meshx_ct:connect(There, Here)),
    are_linked(Here, There).

%% The sidecar's public port can be reached from the other host, the node's own listener can't.
plaintext_stays_on_its_host(Config) ->
    {[West, East], _, There} = actors(Config),
    {ok, Ip} = inet:parse_address(meshx_ct_host:address(East)),
    Dial = fun(Key) ->
        {ok, Port} = meshx_ct:call(There, meshx_node, info, [Key]),
        gen_tcp:connect(Ip, Port, meshx_ct_host:socket_options(West), 5000)
    end,
    ?assertMatch({ok, _}, Dial(sidecar_port)),
    ?assertEqual({error, econnrefused}, Dial(listen_port)).

%% No connection is closed, nothing is refused. Consul's agents find out and the node warns; that the
%% other node is gone, the ticks decide, on both sides.
a_wire_that_breaks(Config) ->
    {Hosts, #{node := HereName} = Here, #{node := ThereName} = There} = actors(Config),
    ?assert(meshx_ct:connect(Here, There)),
    Mark = meshx_ct:mark(Here),
    Starts = [meshx_ct:call(Node, meshx_node, info, [sidecar_starts]) || Node <- [Here, There]],
    _ = [meshx_ct:call(Node, ?MODULE, downs, []) || Node <- [Here, There]],
    meshx_ct_host:cut(Hosts),
    Warning = ["^warning: .*", atom_to_list(ThereName), " is linked with us, but critical in Consul: .*net ticks"],
    meshx_ct:wait("the early warning", fun() -> meshx_ct:has_line(Here, Mark, Warning) end),
    ?assertEqual([], meshx_ct:call(Here, ?MODULE, downs, [])),
    ?assertEqual([ThereName], meshx_ct:call(Here, erlang, nodes, [])),
    [
        meshx_ct:wait(
            "the ticks to decide",
            fun() -> [{Name, net_tick_timeout}] =:= meshx_ct:call(Node, ?MODULE, downs, []) end,
            2000 * ?TICK_TIME
        )
     || {Node, Name} <- [{Here, ThereName}, {There, HereName}]
    ],
    %% And each side knows why it can't dial: the server is on this one.
    ?assertMatch({error, {node_unhealthy, _}}, meshx_ct:call(Here, meshx_node, explain, [ThereName])),
    ?assertMatch({error, {agent_no_leader, _}}, meshx_ct:call(There, meshx_node, explain, [HereName])),
    meshx_ct_host:mend(Hosts),
    rejoin(Config),
    meshx_ct:wait("a link again", fun() -> meshx_ct:connect(Here, There) end, 60000),
    %% Its agent's own connection to the server was cut, too: till that is noticed, it answers nothing.
    meshx_ct:wait("the agents", fun() -> ok =:= meshx_ct:call(There, meshx_node, explain, [HereName]) end, 60000),
    are_linked(Here, There),
    ?assertEqual(Starts, [meshx_ct:call(Node, meshx_node, info, [sidecar_starts]) || Node <- [Here, There]]).
