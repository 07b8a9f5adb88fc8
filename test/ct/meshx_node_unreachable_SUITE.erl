%% A node that can't be reached: the connect fails soon, one line of the log says why, and
%% nothing is left of the attempt.
-module(meshx_node_unreachable_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        unknown_node,
        unhealthy_node,
        killed_node,
        wrong_cookie,
        not_a_node,
        sidecar_killed_and_restarted,
        sidecar_can_not_be_restarted,
        far_sidecar_killed,
        agent_goes_down_and_comes_back,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = meshx_ct:start_all(Config1, [a, b]),
    [{a, A}, {b, B} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

actors(Config) ->
    list_to_tuple([proplists:get_value(Key, Config) || Key <- [a, b, agent]]).

upstreams(#{agent := Agent, node := Node}) ->
    meshx_ct_agent:upstreams(Agent, Node).

%%% The far side

unknown_node(Config) ->
    {A, B, _} = actors(Config),
    ?assert(meshx_ct:connect(A, B)),
    Before = upstreams(A),
    Unknown = meshx_ct:node_name(nobody),
    meshx_ct:failed_connect(A, Unknown, ["no link to nobody@.* is not registered in Consul"]),
    ?assertEqual(Before, upstreams(A)),
    ?assertMatch({error, {node_unknown, _}}, meshx_ct:call(A, meshx_node, explain, [Unknown])),
    ?assertEqual({badrpc, nodedown}, meshx_ct:call(A, rpc, call, [Unknown, erlang, node, []])).

%% Registered, but its checks do not pass.
unhealthy_node(Config) ->
    {A, _, Agent} = actors(Config),
    Before = upstreams(A),
    Sick = meshx_ct:node_name(sick),
    Id = atom_to_binary(Sick),
    meshx_ct_agent:put(Agent, "/v1/agent/service/register", #{
        <<"ID">> => Id,
        <<"Name">> => Id,
        <<"Port">> => meshx_ct_agent:free_port(),
        <<"Meta">> => #{<<"node">> => Id},
        <<"Check">> => #{<<"CheckID">> => <<"sick">>, <<"TTL">> => <<"10m">>},
        <<"Connect">> => #{
            <<"SidecarService">> => #{
                <<"Port">> => meshx_ct_agent:free_port(),
                <<"Checks">> => [#{<<"AliasService">> => Id}]
            }
        }
    }),
    meshx_ct_agent:request(Agent, "PUT", "/v1/agent/check/fail/sick?note=has+a+cold", <<>>),
    meshx_ct:wait("the failed check", fun() ->
        element(1, meshx_ct:call(A, meshx_node, explain, [Sick])) =:= error
    end),
    meshx_ct:failed_connect(A, Sick, ["no link to sick@.* not healthy: .*"]),
    ?assertEqual(Before, upstreams(A)),
    {200, _} = meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", uri_string:quote(Id)], <<>>).

%% Its checks pass until their TTL is over; that nothing listens there any more says more. Else a
%% message to it would wait for the whole setup time.
killed_node(Config) ->
    {A, _, _} = actors(Config),
    Killed = meshx_ct:start(Config, killed, #{}),
    ?assert(meshx_ct:connect(A, Killed)),
    Sidecar = meshx_ct:sidecar(Killed),
    meshx_ct:kill(Killed),
    meshx_ct:wait("the end of its sidecar", fun() -> not meshx_ct_proc:is_alive(Sidecar) end),
    meshx_ct:wait("nodedown", fun() ->
        not lists:member(maps:get(node, Killed), meshx_ct:call(A, erlang, nodes, []))
    end),
    meshx_ct:failed_connect(A, Killed, "no link to killed@.*nothing listens at .*sidecar").

wrong_cookie(Config) ->
    {A, _, _} = actors(Config),
    Other = meshx_ct:start(Config, other_cookie, #{cookie => "another"}),
    meshx_ct:failed_connect(A, Other, "no link to other_cookie@.*cookie"),
    meshx_ct:failed_connect(Other, A, "no link to a@.*cookie"),
    ?assertEqual([], meshx_ct:call(Other, erlang, nodes, [])).

not_a_node(Config) ->
    {A, _, _} = actors(Config),
    [?assertEqual(false, meshx_ct:connect(A, Name)) || Name <- [nodename, '@host', 'name@', 'a@b@c', 'a\0b@c']],
    [
        ?assertMatch({error, {node_unknown, _}}, meshx_ct:call(A, meshx_node, explain, [Name]))
     || Name <- ["b@host", <<"b@host">>, 17, nodename, 'a\0b@c']
    ].

%%% Our own side

sidecar_killed_and_restarted(Config) ->
    {A, B, Agent} = actors(Config),
    ?assert(meshx_ct:connect(A, B)),
    Sidecar = meshx_ct:sidecar(A),
    Mark = meshx_ct:mark(A),
    meshx_ct_proc:signal(Sidecar, "KILL"),
    meshx_ct:wait("another sidecar that accepts", fun() ->
        {ok, Info} = meshx_ct:call(A, meshx_node, info, []),
        maps:get(sidecar_accepts, Info) andalso
            maps:get(sidecar_pid, Info) =/= meshx_ct_proc:pid(Sidecar)
    end),
    ?assert(meshx_ct:has_line(A, Mark, "^warning: meshx_node: .*sidecar.*restarted")),
    meshx_ct:watch(A),
    ?assertEqual({ok, 2}, meshx_ct:call(A, meshx_node, info, [sidecar_starts])),
    %% Links come back on demand, both ways.
    ?assert(meshx_ct:connect(A, B)),
    meshx_ct:call(A, erlang, disconnect_node, [maps:get(node, B)]),
    meshx_ct:wait("A to be found again", fun() ->
        meshx_ct_agent:healthy(Agent, atom_to_binary(maps:get(node, A))) =/= []
    end),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(B, erlang, nodes, []) =:= [] end),
    ?assert(meshx_ct:connect(B, A)).

%% Its program vanishes: nothing can be dialled through it, and peers find it unhealthy.
sidecar_can_not_be_restarted(Config) ->
    {_, B, Agent} = actors(Config),
    Program = filename:join(maps:get(directory, Agent), "proxy"),
    ok = file:make_symlink(meshx_ct_agent:binary(), Program),
    Command = lists:flatten(io_lib:format("~0p", [[Program, "connect", "proxy", "-sidecar-for", "{{id}}"]])),
    Lame = meshx_ct:start(Config, lame, #{args => ["-meshx_node", "sidecar_command", Command]}),
    Mark = meshx_ct:mark(Lame),
    ok = file:delete(Program),
    meshx_ct_proc:signal(meshx_ct:sidecar(Lame), "KILL"),
    meshx_ct:wait("the failed restart in the log", fun() ->
        meshx_ct:has_line(Lame, Mark, ["meshx_node: .*sidecar.*", Program])
    end),
    meshx_ct:wait("the check to fail", fun() ->
        element(1, meshx_ct:call(B, meshx_node, explain, [maps:get(node, Lame)])) =:= error
    end),
    ?assertMatch({error, {sidecar_down, _}}, meshx_ct:call(Lame, meshx_node, explain, [maps:get(node, B)])),
    ?assertNot(meshx_ct:connect(Lame, B)),
    meshx_ct:failed_connect(B, Lame, "no link to lame@.* not healthy").

%% Killed with its guard's help: a link ends, and the far node says so at once.
far_sidecar_killed(Config) ->
    {A, B, _} = actors(Config),
    ?assert(meshx_ct:connect(A, B)),
    meshx_ct:call(A, meshx_ct_there, watch, [[]]),
    meshx_ct_proc:signal(meshx_ct:sidecar(B), "KILL"),
    Down = {nodedown, maps:get(node, B)},
    meshx_ct:wait("nodedown", fun() -> lists:member(Down, meshx_ct:call(A, meshx_ct_there, seen, [])) end),
    meshx_ct:wait("a link through the new sidecar", fun() -> meshx_ct:connect(A, B) end),
    meshx_ct:watch(B).

%% Links live on without the agent, new ones are refused with its address; when it is back,
%% empty, the nodes register again by themselves.
agent_goes_down_and_comes_back(Config) ->
    Agent = meshx_ct:add_agent(Config, #{}),
    [One, #{node := NameTwo} = Two, Three] =
        [meshx_ct:start(Config, Name, #{agent => Agent}) || Name <- [one, two, three]],
    ?assert(meshx_ct:connect(One, Two)),
    Address = meshx_ct_agent:url(Agent),
    Mark = meshx_ct:mark(Three),
    meshx_ct:stop_agent(Agent),
    ?assertEqual(NameTwo, meshx_ct:call(One, erpc, call, [NameTwo, erlang, node, []])),
    ?assertEqual([NameTwo], meshx_ct:call(One, erlang, nodes, [])),
    ?assertNot(meshx_ct:connect(Three, One)),
    ?assert(meshx_ct:has_line(Three, Mark, ["no link to one@.*", Address, ".*is it running"])),
    ?assertMatch({error, {agent_unreachable, _}}, meshx_ct:call(Three, meshx_node, explain, [NameTwo])),
    Again = meshx_ct:restart_agent(Agent),
    [
        meshx_ct:wait("a repaired registration", fun() -> meshx_ct:service(Node#{agent := Again}) =/= none end, 30000)
     || Node <- [One, Two, Three]
    ],
    meshx_ct:wait("a new link", fun() -> meshx_ct:connect(Three, One) end, 60000),
    ?assertEqual([NameTwo], meshx_ct:call(One, erlang, nodes, []) -- [maps:get(node, Three)]).
