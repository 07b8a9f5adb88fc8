%% Other carriers beside this one, with which a cluster moves over node by node: who reaches whom, by
%% which carrier, and that net_kernel is held up by none of it.
-module(meshx_node_carriers_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").
-include_lib("kernel/include/net_address.hrl").

all() ->
    [
        epmd_has_the_nodes_of_inet_tcp,
        nodes_in_the_mesh_are_reached_through_it,
        other_nodes_are_reached_as_before,
        only_one_carrier_each,
        the_last_carrier_is_asked_first,
        a_node_without_a_service,
        who_has_no_service_is_told_why,
        denied_is_not_left_to_others,
        unhealthy_is_not_left_to_others,
        a_silent_agent_holds_nobody_up,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = [{epmd, start_epmd()} | meshx_ct:init_suite(Config)],
    Nodes = [
        {old, "inet_tcp"},
        {one, "inet_tcp meshx_node"},
        {two, "inet_tcp meshx_node"},
        {reverse, "meshx_node inet_tcp"},
        {new, "meshx_node"}
    ],
    [{Name, start(Config1, Name, Carriers)} || {Name, Carriers} <- Nodes] ++ Config1.

end_per_suite(Config) ->
    {_, Epmd} = proplists:get_value(epmd, Config),
    meshx_ct:end_suite(Config),
    meshx_ct_proc:signal(Epmd, "KILL").

end_per_testcase(_, Config) ->
    meshx_ct_agent:delete_intentions(proplists:get_value(agent, Config)),
    meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Nodes

%% global is kept from making links of its own.
start(Config, Name, Carriers) ->
    meshx_ct:start(Config, full_name(Name), options(Config, Carriers)).

options(Config, Carriers) ->
    {Port, _} = proplists:get_value(epmd, Config),
    #{
        longnames => true,
        carrier => Carriers,
        args => ["-connect_all", "false", "-kernel", "inet_dist_use_interface", "{127,0,0,1}"],
        env => [{"ERL_EPMD_PORT", integer_to_list(Port)}],
        scope => suite
    }.

full_name(Name) -> list_to_atom(lists:concat([Name, "@127.0.0.1"])).

node_of(Config, Name) -> proplists:get_value(Name, Config).

%% The carrier of a link that From makes.
carrier(Config, FromKey, ToKey) ->
    carrier(node_of(Config, FromKey), node_of(Config, ToKey)).

%% An agent that is too slow for once leaves a node to inet_tcp.
through_the_mesh(Config, FromKey, ToKey) ->
    meshx_ct:wait("a link through the mesh", fun() -> carrier(Config, FromKey, ToKey) =:= meshx end, 60000).

carrier(From, #{node := Name} = To) ->
    ?assert(meshx_ct:connect(From, Name)),
    ?assertEqual(Name, meshx_ct:call(From, erpc, call, [Name, erlang, node, []])),
    FromName = meshx_ct:call(From, erlang, node, []),
    Carrier = carrier_of_link(From, Name),
    ?assertEqual(Carrier, carrier_of_link(To, FromName)),
    meshx_ct:call(From, erlang, disconnect_node, [Name]),
    meshx_ct:wait("the link's end", fun() ->
        not lists:member(FromName, meshx_ct:call(To, erlang, nodes, [connected]))
    end),
    Carrier.

carrier_of_link(Node, Other) ->
    {ok, #net_address{protocol = Protocol}} = meshx_ct:call(Node, net_kernel, node_info, [Other, address]),
    Protocol.

%%% epmd, at a port of its own

start_epmd() ->
    Port = meshx_ct_agent:free_port(),
    Program = open_port({spawn_executable, os:find_executable("epmd")}, [
        {args, ["-address", "127.0.0.1", "-port", integer_to_list(Port)]}, stderr_to_stdout
    ]),
    {os_pid, OsPid} = erlang:port_info(Program, os_pid),
    meshx_ct:wait("epmd", fun() -> epmd_names(Port) =/= error end),
    {Port, meshx_ct_proc:find(OsPid)}.

%% As erl_epmd:names/1, which knows only one port.
epmd_names(Port) ->
    case gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, false}]) of
        {ok, Socket} ->
            ok = gen_tcp:send(Socket, <<1:16, $n>>),
            <<Port:32, Text/binary>> = receive_all(Socket, <<>>),
            [Name || [<<"name">>, Name | _] <- [string:lexemes(Line, " ") || Line <- string:lexemes(Text, "\n")]];
        {error, _} ->
            error
    end.

receive_all(Socket, Received) ->
    case gen_tcp:recv(Socket, 0, 5000) of
        {ok, More} -> receive_all(Socket, <<Received/binary, More/binary>>);
        {error, closed} -> Received
    end.

%%% Cases

epmd_has_the_nodes_of_inet_tcp(Config) ->
    {Port, _} = proplists:get_value(epmd, Config),
    ?assertEqual([<<"old">>, <<"one">>, <<"reverse">>, <<"two">>], lists:sort(epmd_names(Port))),
    Ids = maps:keys(meshx_ct_agent:services(proplists:get_value(agent, Config))),
    ?assertEqual(
        [<<"new@127.0.0.1">>, <<"one@127.0.0.1">>, <<"reverse@127.0.0.1">>, <<"two@127.0.0.1">>],
        lists:sort([Id || Id <- Ids, binary:match(Id, <<"-sidecar-proxy">>) =:= nomatch])
    ).

nodes_in_the_mesh_are_reached_through_it(Config) ->
    through_the_mesh(Config, one, two),
    through_the_mesh(Config, two, one),
    through_the_mesh(Config, one, new),
    through_the_mesh(Config, new, one).

%% That takes no line in the log, and is no failure.
other_nodes_are_reached_as_before(Config) ->
    One = node_of(Config, one),
    Mark = meshx_ct:mark(One),
    ?assertEqual(tcp, carrier(Config, one, old)),
    ?assertEqual(tcp, carrier(Config, old, one)),
    ?assertNot(meshx_ct:connect(One, 'nobody@127.0.0.1')),
    ?assertEqual({ok, undefined}, meshx_ct:call(One, meshx_node, info, [last_failure])),
    ?assertEqual([], meshx_ct:own_lines(One, Mark)).

%% No way from one to the other, and the mesh says so.
only_one_carrier_each(Config) ->
    New = node_of(Config, new),
    meshx_ct:failed_connect(New, node_of(Config, old), "no link to old@127.0.0.1: .*is not registered in Consul"),
    ?assertNot(meshx_ct:connect(node_of(Config, old), New)).

the_last_carrier_is_asked_first(Config) ->
    Reverse = node_of(Config, reverse),
    meshx_ct:wait("the warning", fun() ->
        meshx_ct:has_line(Reverse, 0, "^warning: meshx_node: inet_tcp, the last in -proto_dist, is asked first")
    end),
    ?assertEqual(tcp, carrier(Config, reverse, one)),
    through_the_mesh(Config, one, reverse),
    through_the_mesh(Config, new, reverse),
    ?assertNot(meshx_ct:connect(Reverse, node_of(Config, new))).

%% It has a name only when it is linked with the first one.
a_node_without_a_service(Config) ->
    Vm = meshx_ct:vm(Config, options(Config, "inet_tcp meshx_node")),
    {ok, _} = meshx_ct:call(Vm, net_kernel, start, ['undefined@127.0.0.1', #{name_domain => longnames}]),
    #{node := Name} = New = node_of(Config, new),
    ?assert(meshx_ct:connect(Vm, Name)),
    ?assertEqual(meshx, carrier_of_link(Vm, Name)),
    ?assertEqual(meshx, carrier(Vm, New)),
    ?assertEqual(tcp, carrier(Vm, node_of(Config, old))),
    meshx_ct:stop(Vm).

who_has_no_service_is_told_why(Config) ->
    [
        begin
            Vm = meshx_ct:vm(Config, options(Config, Carriers)),
            {error, {stopped, Text}} = meshx_ct:call(Vm, meshx_node, info, []),
            ?assertEqual({Text, match}, {Text, re:run(Text, Why, [{capture, none}])}),
            meshx_ct:stop(Vm)
        end
     || {Carriers, Why} <- [
            {"inet_tcp", "not started with -proto_dist meshx_node$"},
            {"inet_tcp -proto_dist meshx_node", "given more than once.*name all carriers in one$"},
            {"inet_tcp meshx_node", "failed to, of which the log says why"}
        ]
    ].

denied_is_not_left_to_others(Config) ->
    [#{node := OneName, agent := Agent} = One, #{node := TwoName}] = [node_of(Config, Key) || Key <- [one, two]],
    meshx_ct_agent:deny(Agent, atom_to_binary(OneName), atom_to_binary(TwoName)),
    meshx_ct:wait("the intention", fun() -> meshx_ct:call(One, meshx_node, explain, [TwoName]) =/= ok end),
    meshx_ct:failed_connect(One, TwoName, "no link to two@127.0.0.1: .*Consul intention .*denies").

unhealthy_is_not_left_to_others(Config) ->
    #{agent := Agent} = One = node_of(Config, one),
    Id = <<"sick@127.0.0.1">>,
    meshx_ct_agent:put(Agent, "/v1/agent/service/register", #{
        <<"ID">> => Id,
        <<"Name">> => Id,
        <<"Port">> => meshx_ct_agent:free_port(),
        <<"Meta">> => #{<<"node">> => Id},
        <<"Check">> => #{<<"TTL">> => <<"10m">>},
        <<"Connect">> => #{
            <<"SidecarService">> => #{
                <<"Port">> => meshx_ct_agent:free_port(), <<"Checks">> => [#{<<"AliasService">> => Id}]
            }
        }
    }),
    meshx_ct:wait("the service", fun() ->
        element(1, element(2, meshx_ct:call(One, meshx_node, explain, [binary_to_atom(Id)]))) =/= node_unknown
    end),
    meshx_ct:failed_connect(One, binary_to_atom(Id), "no link to sick@127.0.0.1: .*not healthy"),
    {200, _} = meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", uri_string:quote(Id)], <<>>).

%% Nodes are left to inet_tcp, and net_kernel waits once only.
a_silent_agent_holds_nobody_up(Config) ->
    Static = {"MESHX_UPSTREAMS", lists:concat(["far@127.0.0.1=127.0.0.1:", meshx_ct_agent:free_port()])},
    #{env := Env} = Options = options(Config, "inet_tcp meshx_node"),
    #{agent := #{process := Agent}} = One =
        meshx_ct:start(Config, full_name(five), Options#{env := [Static | Env], scope := testcase}),
    Mark = meshx_ct:mark(One),
    meshx_ct_proc:signal(Agent, "STOP"),
    try
        ?assertEqual(tcp, carrier(One, node_of(Config, old))),
        ?assertEqual(tcp, carrier(One, node_of(Config, old))),
        ?assertEqual(tcp, carrier(One, node_of(Config, two))),
        %% No question is needed for it.
        ?assertNot(meshx_ct:connect(One, 'far@127.0.0.1')),
        meshx_ct:wait("our refusal", fun() -> meshx_ct:has_line(One, Mark, "no link to far@127.0.0.1: ") end)
    after
        meshx_ct_proc:signal(Agent, "CONT")
    end,
    Left = [Line || Line <- meshx_ct:own_lines(One, Mark), binary:match(Line, <<"left to the other">>) =/= nomatch],
    ?assertMatch([<<"warning: meshx_node: old@127.0.0.1 is left to the other carriers: the Consul agent ", _/binary>>], Left).
