%% Consul intentions decide who may connect to whom. A denial is told at once, by name.
-module(meshx_node_intention_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        deny_and_allow_again,
        denied_one_way_is_denied_both_ways,
        denied_by_a_wildcard_but_for_one,
        a_deny_cuts_an_open_link,
        a_deny_by_wildcard_cuts_and_allow_brings_back,
        other_intentions_leave_a_link_alone,
        one_direction_by_option,
        refused_by_the_node_that_is_dialed,
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

denied_one_way_is_denied_both_ways(Config) ->
    {A, #{node := NameB} = B, Agent} = actors(Config),
    meshx_ct_agent:deny(Agent, service_name(B), service_name(A)),
    Line = meshx_ct:failed_connect(A, B, "intention"),
    names_intention(Line, B, A),
    ?assertMatch({error, {denied_by_intention, _}}, meshx_ct:call(A, meshx_node, explain, [NameB])),
    is_denied(B, A).

names_intention(Line, From, To) ->
    Ends = iolist_to_binary([service_name(From), " => ", service_name(To)]),
    ?assertNotEqual({Line, nomatch}, {Line, binary:match(Line, Ends)}).

denied_by_a_wildcard_but_for_one(Config) ->
    {A, B, Agent} = actors(Config),
    C = meshx_ct:start(Config, c, #{}),
    meshx_ct:auto_connect(C, never),
    meshx_ct_agent:deny(Agent, <<"*">>, service_name(B)),
    meshx_ct_agent:allow(Agent, service_name(C), service_name(B)),
    is_denied(A, B),
    is_allowed(C, B).

%% Whoever has dialled, and whichever direction is denied.
a_deny_cuts_an_open_link(Config) ->
    {A, B, Agent} = actors(Config),
    [
        begin
            ?assert(meshx_ct:connect(A, B)),
            Lines = cut_by(A, B, fun() -> meshx_ct_agent:deny(Agent, service_name(From), service_name(To)) end),
            [names_intention(Line, From, To) || Line <- Lines],
            [?assertMatch({match, _}, re:run(Line, "precedence 9, ID [0-9a-f-]{36}")) || Line <- Lines],
            meshx_ct_agent:delete_intentions(Agent),
            is_allowed(A, B)
        end
     || {From, To} <- [{A, B}, {B, A}]
    ].

%% Both see the link's end within 5 s of Deny, and one of them, or both, say why in one line.
cut_by(#{node := NameA} = A, #{node := NameB} = B, Deny) ->
    Marks = [{Node, meshx_ct:mark(Node)} || Node <- [A, B]],
    Deny(),
    meshx_ct:wait(
        "the link's end",
        fun() ->
            not lists:member(NameB, meshx_ct:call(A, erlang, nodes, [])) andalso
                not lists:member(NameA, meshx_ct:call(B, erlang, nodes, []))
        end,
        5000
    ),
    Lines = [[Line || Line <- meshx_ct:own_lines(Node, Mark)] || {Node, Mark} <- Marks],
    [?assert(length(OfNode) =< 1) || OfNode <- Lines],
    [?assertMatch({match, _}, re:run(Line, "the link to .* is cut")) || Line <- lists:append(Lines)],
    ?assertNotEqual([], lists:append(Lines)),
    lists:append(Lines).

a_deny_by_wildcard_cuts_and_allow_brings_back(Config) ->
    {A, B, Agent} = actors(Config),
    ?assert(meshx_ct:connect(A, B)),
    Lines = cut_by(A, B, fun() -> meshx_ct_agent:deny(Agent, <<"*">>, service_name(B)) end),
    [?assertMatch({match, _}, re:run(Line, "intention \\* => b@.*precedence 8")) || Line <- Lines],
    meshx_ct_agent:allow(Agent, service_name(A), service_name(B)),
    is_allowed(A, B).

other_intentions_leave_a_link_alone(Config) ->
    {A, #{node := NameB} = B, Agent} = actors(Config),
    ?assert(meshx_ct:connect(A, B)),
    Marks = [{Node, meshx_ct:mark(Node)} || Node <- [A, B]],
    Before = requests(A),
    meshx_ct_agent:deny(Agent, <<"*">>, <<"elsewhere">>),
    meshx_ct_agent:allow(Agent, <<"*">>, service_name(B)),
    %% Both have looked at it.
    [meshx_ct:wait("what the agent tells", fun() -> requests(Node) > Before + 4 end) || Node <- [A]],
    ?assertEqual([NameB], meshx_ct:call(A, erlang, nodes, [])),
    [?assertEqual([], meshx_ct:own_lines(Node, Mark)) || {Node, Mark} <- Marks].

requests(Node) ->
    {ok, Requests} = meshx_ct:call(Node, meshx_node, info, [requests]),
    Requests.

one_direction_by_option(Config) ->
    {_, _, Agent} = actors(Config),
    [C, D] = meshx_ct:start_all(Config, [c, d], #{env => [{"MESHX_INTENTION_DIRECTIONS", "dial"}]}),
    [meshx_ct:auto_connect(Node, never) || Node <- [C, D]],
    meshx_ct_agent:deny(Agent, service_name(C), service_name(D)),
    is_denied(C, D),
    ?assert(meshx_ct:connect(D, C)),
    Marks = [{Node, meshx_ct:mark(Node), requests(Node)} || Node <- [C, D]],
    meshx_ct_agent:deny(Agent, service_name(C), <<"elsewhere">>),
    [meshx_ct:wait("what the agent tells", fun() -> requests(Node) > Before + 2 end) || {Node, _, Before} <- Marks],
    ?assertEqual([maps:get(node, C)], meshx_ct:call(D, erlang, nodes, [])),
    Lines = cut_by(D, C, fun() -> meshx_ct_agent:deny(Agent, service_name(D), service_name(C)) end),
    [names_intention(Line, D, C) || Line <- Lines].

%% One that dials and doesn't ask for the other direction is told by the node that does.
refused_by_the_node_that_is_dialed(Config) ->
    {A, _, Agent} = actors(Config),
    C = meshx_ct:start(Config, c, #{env => [{"MESHX_INTENTION_DIRECTIONS", "dial"}]}),
    meshx_ct:auto_connect(C, never),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(C)),
    Mark = meshx_ct:mark(A),
    meshx_ct:failed_connect(C, A, "it does not allow this node"),
    meshx_ct:wait("a log line", fun() -> meshx_ct:own_lines(A, Mark) =/= [] end),
    [Line] = meshx_ct:own_lines(A, Mark),
    ?assertMatch({match, _}, re:run(Line, "a connection from c@.* is refused")),
    names_intention(Line, A, C).

explain_names_the_intention(Config) ->
    {A, #{node := NameB} = B, Agent} = actors(Config),
    ?assertEqual(ok, meshx_ct:call(A, meshx_node, explain, [NameB])),
    meshx_ct_agent:deny(Agent, service_name(A), service_name(B)),
    ?assertMatch({error, {denied_by_intention, _}}, meshx_ct:call(A, meshx_node, explain, [NameB])).
