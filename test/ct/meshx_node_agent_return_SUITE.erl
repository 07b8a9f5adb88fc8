%% The agent goes and comes back, with its data or without any: nodes are found again within 2 s,
%% and the very same links carry messages all the while. And what Consul says of linked nodes.
-module(meshx_node_agent_return_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% After the agent's return, ms.
-define(REPAIR_TIME, 2000).

all() ->
    [
        returns_without_data,
        returns_with_its_data,
        returns_late_without_data,
        a_linked_node_turns_critical,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

returns_without_data(Config) ->
    returns(Config, meshx_ct:add_agent(Config, #{}), 1).

returns_with_its_data(Config) ->
    returns(Config, meshx_ct:add_agent(Config, #{servers => 1}), 0).

%% Two linked nodes and a third that has an upstream to the first. Repairs: how often each node
%% has to register again.
returns(Config, Agent, Repairs) ->
    Nodes = [A, B, C] = meshx_ct:start_all(Config, [a, b, c], #{agent => Agent}),
    [meshx_ct:auto_connect(Node, never) || Node <- Nodes],
    ?assert(meshx_ct:connect(C, A)),
    ?assert(meshx_ct:call(C, erlang, disconnect_node, [maps:get(node, A)])),
    ?assert(meshx_ct:connect(A, B)),
    Upstreams = upstreams(Agent, A),
    meshx_ct:call(A, meshx_ct_there, watch, [[]]),
    Before = [info(Node) || Node <- Nodes],
    meshx_ct:stop_agent(Agent),
    [
        meshx_ct:wait("the agent to be missed", fun() ->
            {error, {Reason, _}} = meshx_ct:call(Node, meshx_node, explain, [maps:get(node, Other)]),
            Reason =:= agent_unreachable
        end)
     || {Node, Other} <- [{A, B}, {B, A}, {C, A}]
    ],
    ?assertEqual(maps:get(node, B), meshx_ct:call(A, erpc, call, [maps:get(node, B), erlang, node, []])),
    Back = meshx_ct:restart_agent(Agent),
    has_leader(Back),
    Returned = erlang:monotonic_time(millisecond),
    meshx_ct:wait(
        "all to be found again",
        fun() ->
            [ok =:= meshx_ct:call(Node, meshx_node, explain, [maps:get(node, Other)])
             || {Node, Other} <- [{A, B}, {B, A}, {C, A}]] =:= [true, true, true]
        end,
        ?REPAIR_TIME
    ),
    ?assert(meshx_ct:connect(C, A)),
    ct:pal("repaired and linked again ~b ms after the agent's return", [
        erlang:monotonic_time(millisecond) - Returned
    ]),
    ?assertEqual(Upstreams, upstreams(Back, A)),
    ?assertEqual(maps:get(node, B), meshx_ct:call(A, erpc, call, [maps:get(node, B), erlang, node, []])),
    ?assertEqual([], [Event || {nodedown, Node} = Event <- meshx_ct:call(A, meshx_ct_there, seen, []), Node =:= maps:get(node, B)]),
    %% Each of the three with its sidecar, nothing twice.
    meshx_ct:wait("all services", fun() -> maps:size(meshx_ct_agent:services(Back)) =:= 6 end),
    [
        begin
            After = info(Node),
            ?assertEqual(Repairs, maps:get(repairs, After)),
            ?assertEqual(maps:get(sidecar_starts, Was), maps:get(sidecar_starts, After)),
            ?assertEqual(maps:get(sidecar_port, Was), maps:get(sidecar_port, After))
        end
     || {Node, Was} <- lists:zip(Nodes, Before)
    ].

%% By then the built-in proxy asks the agent only every now and then: a new node, with a certificate
%% of the new CA, could not reach one with the former sidecar for a long time.
returns_late_without_data(Config) ->
    Agent = meshx_ct:add_agent(Config, #{}),
    A = meshx_ct:start(Config, a, #{agent => Agent}),
    meshx_ct:stop_agent(Agent),
    timer:sleep(7000),
    Back = meshx_ct:restart_agent(Agent),
    meshx_ct:wait("a new sidecar", fun() -> maps:get(sidecar_starts, info(A)) =:= 2 end),
    meshx_ct:wait("it to accept", fun() -> meshx_ct_agent:healthy(Back, atom_to_binary(maps:get(node, A))) =/= [] end),
    B = meshx_ct:start(Config, b, #{agent => Back}),
    {Time, true} = timer:tc(fun() -> meshx_ct:connect(B, A) end),
    ?assert(Time < ?REPAIR_TIME * 1000).

info(Node) ->
    {ok, Info} = meshx_ct:call(Node, meshx_node, info, []),
    Info.

upstreams(Agent, #{node := Node}) ->
    lists:sort(meshx_ct_agent:upstreams(Agent, Node)).

has_leader(Agent) ->
    meshx_ct:wait("a leader", fun() ->
        {Status, Body} = meshx_ct_agent:request(Agent, "GET", "/v1/catalog/nodes", <<>>),
        Status =:= 200 andalso byte_size(Body) > 10
    end).

a_linked_node_turns_critical(Config) ->
    [A, #{node := NameB} = B] = meshx_ct:start_all(Config, [a, b], #{env => [{"MESHX_TTL", "3000"}]}),
    ?assert(meshx_ct:connect(A, B)),
    Agent = proplists:get_value(agent, Config),
    ?assertMatch(#{links := [#{node := NameB, trouble := undefined}]}, info(A)),
    Mark = meshx_ct:mark(A),
    meshx_ct:call(B, sys, suspend, [meshx_node_mesh]),
    meshx_ct:wait("the early warning", fun() -> meshx_ct:own_lines(A, Mark) =/= [] end),
    #{links := [#{trouble := Trouble}]} = info(A),
    ?assert(is_binary(Trouble)),
    ?assertEqual([NameB], meshx_ct:call(A, erlang, nodes, [])),
    meshx_ct:call(B, sys, resume, [meshx_node_mesh]),
    meshx_ct:wait("the good news", fun() -> length(meshx_ct:own_lines(A, Mark)) >= 2 end),
    [Bad, Good] = meshx_ct:own_lines(A, Mark),
    ?assertMatch({match, _}, re:run(Bad, "^warning: meshx_node: b@.* is linked with us, but critical in Consul: ")),
    ?assertMatch({match, _}, re:run(Good, "^notice: meshx_node: b@.* is healthy in Consul again")),
    ?assertMatch(#{links := [#{trouble := undefined}]}, info(A)),
    ?assertNotEqual([], meshx_ct_agent:healthy(Agent, atom_to_binary(NameB))).
