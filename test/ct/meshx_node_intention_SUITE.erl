%% Consul intentions decide who may connect to whom. A denial is told at once, by name.
-module(meshx_node_intention_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        deny_and_allow_again,
        denied_one_way_only,
        denied_by_a_wildcard_but_for_one,
        an_open_link_lives_on,
        explain_names_the_intention,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = meshx_ct:start_all(Config1, [a, b]),
    [meshx_ct:auto_connect(Node, never) || Node <- [A, B]],
    [{a, A}, {b, B} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

end_per_testcase(nothing_is_left, Config) ->
    meshx_ct:end_case(Config);
end_per_testcase(_, Config) ->
    {A, #{node := NameB}, Agent} = actors(Config),
    meshx_ct_agent:delete_intentions(Agent),
    _ = meshx_ct:call(A, erlang, disconnect_node, [NameB]),
    meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

actors(Config) ->
    list_to_tuple([proplists:get_value(Key, Config) || Key <- [a, b, agent]]).

service_name(#{node := Node}) ->
    atom_to_binary(Node).

%% The one line names both ends of the intention and how to allow the connection.
is_denied(From, To) ->
    Line = meshx_ct:failed_connect(From, To, "intention"),
    Ends = iolist_to_binary([service_name(From), " => ", service_name(To)]),
    ?assertNotEqual({Line, nomatch}, {Line, binary:match(Line, Ends)}).

is_allowed(From, To) ->
    ?assert(meshx_ct:connect(From, To)),
    ?assert(meshx_ct:call(From, erlang, disconnect_node, [maps:get(node, To)])),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(To, erlang, nodes, []) =:= [] end).

deny_and_allow_again(Config) ->
    {A, B, Agent} = actors(Config),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(B)),
    is_denied(A, B),
    is_denied(A, B),
    ?assertEqual([], meshx_ct:call(B, erlang, nodes, [])),
    meshx_ct_agent:delete_intentions(Agent),
    is_allowed(A, B),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(B)),
    is_denied(A, B).

denied_one_way_only(Config) ->
    {A, B, Agent} = actors(Config),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(B)),
    is_denied(A, B),
    is_allowed(B, A).

denied_by_a_wildcard_but_for_one(Config) ->
    {A, B, Agent} = actors(Config),
    C = meshx_ct:start(Config, c, #{}),
    meshx_ct:auto_connect(C, never),
    meshx_ct_agent:deny(Agent, <<"*">>, service_name(B)),
    meshx_ct_agent:allow(Agent, service_name(C), service_name(B)),
    is_denied(A, B),
    is_allowed(C, B).

%% Consul's built-in proxy asks once for each connection.
an_open_link_lives_on(Config) ->
    {A, #{node := NameB} = B, Agent} = actors(Config),
    ?assert(meshx_ct:connect(A, B)),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(B)),
    ?assertEqual(NameB, meshx_ct:call(A, erpc, call, [NameB, erlang, node, []])),
    ?assert(meshx_ct:call(A, erlang, disconnect_node, [NameB])),
    is_denied(A, B).

explain_names_the_intention(Config) ->
    {A, #{node := NameB} = B, Agent} = actors(Config),
    ?assertEqual(ok, meshx_ct:call(A, meshx_node, explain, [NameB])),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(B)),
    ?assertMatch({error, {denied_by_intention, _}}, meshx_ct:call(A, meshx_node, explain, [NameB])).
