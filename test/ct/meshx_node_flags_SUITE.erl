%% The emulator's and kernel's own distribution flags mean what they mean with inet_tcp_dist.
-module(meshx_node_flags_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        start_epmd_false,
        no_epmd,
        epmd_is_not_needed_without_flags,
        connect_all_false,
        hidden,
        use_interface,
        use_interface_ipv6,
        bad_interface,
        listen_ports,
        erl_epmd_port,
        listen_options,
        connect_options,
        nodelay_off,
        our_flags_beat_the_environment,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [{plain, meshx_ct:start(Config1, plain, #{scope => suite})} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

plain(Config) -> proplists:get_value(plain, Config).

start(Config, Name, Arguments) ->
    meshx_ct:start(Config, Name, #{args => Arguments}).

%% A link in each direction, with something sent.
works(Config, #{node := Name} = Node) ->
    #{node := Plain} = Other = plain(Config),
    [
        begin
            ?assert(meshx_ct:connect(From, ToName)),
            ?assertEqual(ToName, meshx_ct:call(From, erpc, call, [ToName, erlang, node, []])),
            ?assert(meshx_ct:call(From, erlang, disconnect_node, [ToName])),
            meshx_ct:wait("the link's end", fun() ->
                not lists:member(maps:get(node, From), meshx_ct:call(To, erlang, nodes, [connected]))
            end)
        end
     || {From, To, ToName} <- [{Node, Other, Plain}, {Other, Node, Name}]
    ].

listener(#{agent := Agent, node := Node}) ->
    #{<<"Port">> := Port} = maps:get(atom_to_binary(Node), meshx_ct_agent:services(Agent)),
    Port.

%%% epmd. All nodes of these suites have a port in ERL_EPMD_PORT where nobody listens.

epmd_port(Node) ->
    list_to_integer(meshx_ct:call(Node, os, getenv, ["ERL_EPMD_PORT"])).

no_epmd_runs(Node) ->
    ?assertEqual({error, econnrefused}, gen_tcp:connect({127, 0, 0, 1}, epmd_port(Node), [])).

start_epmd_false(Config) ->
    Node = start(Config, epmdless, ["-start_epmd", "false"]),
    works(Config, Node),
    no_epmd_runs(Node).

no_epmd(Config) ->
    Booted = start(Config, epmdless1, ["-no_epmd"]),
    Dynamic = meshx_ct:net_start(meshx_ct:vm(Config, #{args => ["-no_epmd"]}), epmdless2),
    [
        begin
            ?assertEqual(undefined, meshx_ct:call(Node, erlang, whereis, [erl_epmd])),
            works(Config, Node),
            no_epmd_runs(Node)
        end
     || Node <- [Booted, Dynamic]
    ].

%% A node that was started later does not start epmd, and finds its peers without it.
epmd_is_not_needed_without_flags(Config) ->
    Node = meshx_ct:net_start(meshx_ct:vm(Config, #{}), dynamic),
    works(Config, Node),
    no_epmd_runs(Node).

%%% Who connects to whom

%% a to b and b to c does not make a to c.
connect_all_false(Config) ->
    [#{node := A} = NodeA, #{node := B} = NodeB, #{node := C} = NodeC] =
        [start(Config, Name, ["-connect_all", "false"]) || Name <- [a, b, c]],
    ?assert(meshx_ct:connect(NodeA, B)),
    ?assert(meshx_ct:connect(NodeB, C)),
    %% Both ends know it: the one that was dialled is the later one.
    ?assertEqual([pong, pong], [meshx_ct:call(NodeB, net_adm, ping, [Name]) || Name <- [A, C]]),
    %% Had global been told to connect a and c, it would have done so before it answers.
    [meshx_ct:call(Node, gen_server, call, [global_name_server, get_known]) || Node <- [NodeA, NodeB, NodeC]],
    ?assertEqual([B], meshx_ct:call(NodeA, erlang, nodes, [])),
    ?assertEqual(lists:sort([A, C]), lists:sort(meshx_ct:call(NodeB, erlang, nodes, []))),
    ?assertEqual([B], meshx_ct:call(NodeC, erlang, nodes, [])).

hidden(Config) ->
    #{node := Plain} = PlainNode = plain(Config),
    #{node := Hidden} = Node = start(Config, secret, ["-hidden"]),
    ?assert(meshx_ct:connect(Node, Plain)),
    ?assertEqual(pong, meshx_ct:call(Node, net_adm, ping, [Plain])),
    ?assertEqual({[], [Hidden]}, meshx_ct:call(PlainNode, fun() -> {nodes(), nodes(hidden)} end)),
    ?assertEqual({[], [Plain]}, meshx_ct:call(Node, fun() -> {nodes(), nodes(hidden)} end)),
    works(Config, Node).

%%% kernel's inet_dist_*

%% Nobody listens at the port but at the address that was asked for.
listens_only_at(Address, Port) ->
    Others = [{127, 0, 0, 1}, {127, 0, 0, 2}, {0, 0, 0, 0, 0, 0, 0, 1}] -- [Address],
    {ok, Socket} = gen_tcp:connect(Address, Port, [family(Address)]),
    gen_tcp:close(Socket),
    [?assertMatch({Other, {error, _}}, {Other, gen_tcp:connect(Other, Port, [family(Other)], 2000)}) || Other <- Others].

family(Address) when tuple_size(Address) =:= 8 -> inet6;
family(_) -> inet.

use_interface(Config) ->
    listens_only_at({127, 0, 0, 1}, listener(plain(Config))),
    [
        begin
            Node = start(Config, Name, ["-kernel", "inet_dist_use_interface", lists:flatten(io_lib:format("~0p", [Address]))]),
            listens_only_at(Address, listener(Node)),
            works(Config, Node)
        end
     || {Name, Address} <- [{first, {127, 0, 0, 1}}, {second, {127, 0, 0, 2}}]
    ].

use_interface_ipv6(Config) ->
    Address = {0, 0, 0, 0, 0, 0, 0, 1},
    case gen_tcp:listen(0, [inet6, {ip, Address}]) of
        {ok, Socket} ->
            gen_tcp:close(Socket),
            Node = start(Config, six, ["-kernel", "inet_dist_use_interface", "{0,0,0,0,0,0,0,1}"]),
            listens_only_at(Address, listener(Node)),
            works(Config, Node);
        {error, Reason} ->
            {skip, {no_ipv6_loopback, Reason}}
    end.

bad_interface(Config) ->
    {Status, Output} = meshx_ct:erl(
        Config, ["-sname", "bad", "-kernel", "inet_dist_use_interface", "{1,2,3}"], #{}
    ),
    ?assert(is_integer(Status) andalso Status =/= 0),
    ?assertMatch({match, _}, re:run(Output, "node bad@.* does not start: .*inet_dist_use_interface is {1,2,3}")).

listen_ports(Config) ->
    %% The first one is taken, the second one is free.
    {Taken, First} = neighbours(),
    Range = [
        "-kernel", "inet_dist_listen_min", integer_to_list(First),
        "inet_dist_listen_max", integer_to_list(First + 1)
    ],
    Node = start(Config, ranged, Range),
    ?assertEqual(First + 1, listener(Node)),
    ?assertEqual({ok, First + 1}, meshx_ct:call(Node, meshx_node, info, [listen_port])),
    works(Config, Node),
    gen_tcp:close(Taken).

%% As OTP's carriers: it counts more than the kernel's range.
erl_epmd_port(Config) ->
    {Taken, First} = neighbours(),
    Node = start(Config, fixed, [
        "-erl_epmd_port", integer_to_list(First + 1),
        "-kernel", "inet_dist_listen_min", integer_to_list(First)
    ]),
    ?assertEqual(First + 1, listener(Node)),
    works(Config, Node),
    gen_tcp:close(Taken).

%% A listener whose next port is free.
neighbours() ->
    {ok, Taken} = gen_tcp:listen(0, [{ip, {127, 0, 0, 1}}]),
    {ok, First} = inet:port(Taken),
    case gen_tcp:listen(First + 1, [{ip, {127, 0, 0, 1}}, {reuseaddr, true}]) of
        {ok, Next} ->
            gen_tcp:close(Next),
            {Taken, First};
        {error, _} ->
            gen_tcp:close(Taken),
            neighbours()
    end.

%% What the option is on both ends of a link from Node to the plain one.
option(Config, Node, Option) ->
    Plain = plain(Config),
    ?assert(meshx_ct:connect(Node, Plain)),
    {ok, [{Option, Value}]} = meshx_ct:call(Node, net_kernel, getopts, [maps:get(node, Plain), [Option]]),
    Value.

listen_options(Config) ->
    #{node := Name} = Node = start(Config, listens, ["-kernel", "inet_dist_listen_options", "[{keepalive,true},{priority,3}]"]),
    ?assert(meshx_ct:connect(plain(Config), Name)),
    #{node := Plain} = plain(Config),
    ?assertEqual(
        {ok, [{keepalive, true}, {priority, 3}]},
        meshx_ct:call(Node, net_kernel, getopts, [Plain, [keepalive, priority]])
    ),
    ?assertEqual(
        {ok, [{keepalive, false}]}, meshx_ct:call(plain(Config), net_kernel, getopts, [Name, [keepalive]])
    ).

connect_options(Config) ->
    Node = start(Config, dials, ["-kernel", "inet_dist_connect_options", "[{keepalive,true}]"]),
    ?assert(option(Config, Node, keepalive)).

nodelay_off(Config) ->
    ?assertNot(option(Config, start(Config, delayed, ["-kernel", "dist_nodelay", "false"]), nodelay)),
    ?assert(option(Config, start(Config, undelayed, []), nodelay)).

%%% Ours

our_flags_beat_the_environment(Config) ->
    #{agent := Agent} = plain(Config),
    Dead = lists:concat(["127.0.0.1:", meshx_ct_agent:free_port()]),
    Node = meshx_ct:start(Config, flagged, #{
        args => [
            "-meshx_node", "consul_http_addr", "\"" ++ meshx_ct_agent:url(Agent) ++ "\"",
            "-meshx_node", "service_template", "\"{\\\"Tags\\\":[\\\"blue\\\"],\\\"Meta\\\":{\\\"of\\\":\\\"{{id}}\\\"}}\""
        ],
        env => [{"CONSUL_HTTP_ADDR", Dead}, {"MESHX_SERVICE_TEMPLATE", "{\"Tags\":[\"red\"]}"}]
    }),
    Name = atom_to_binary(maps:get(node, Node)),
    ?assertMatch(#{<<"Tags">> := [<<"blue">>], <<"Meta">> := #{<<"of">> := Name}}, meshx_ct:service(Node)),
    works(Config, Node).
