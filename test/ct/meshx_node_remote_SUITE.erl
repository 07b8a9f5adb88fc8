%% Remote shells and other nodes without a service of their own: what they can do, that they
%% register nothing and leave nothing, on the host of the node they talk to and elsewhere.
-module(meshx_node_remote_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        erl_remsh,
        erl_remsh_with_a_name,
        iex_remsh,
        dynamic_name,
        dynamic_name_started_later,
        a_new_name_when_its_node_is_gone,
        dist_listen_false,
        hidden,
        many_at_once,
        unknown_node,
        another_user_goes_through_the_mesh,
        another_user_obeys_intentions,
        another_agent,
        intentions_are_for_the_mesh,
        a_name_that_no_proxy_can_be_told,
        a_proxy_that_dies,
        no_consul_program,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [
        {target, meshx_ct:start(Config1, target, #{scope => suite})},
        {elsewhere, client_agent(Config1)}
        | Config1
    ].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(Case, Config) when
    Case =:= another_user_goes_through_the_mesh; Case =:= another_user_obeys_intentions
->
    case os:cmd("id -u") of
        "0\n" -> Config;
        _ -> {skip, "only root can start a program as another user"}
    end;
init_per_testcase(_, Config) ->
    Config.

end_per_testcase(_, Config) ->
    meshx_ct_agent:delete_intentions(proplists:get_value(agent, Config)),
    meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

target(Config) -> proplists:get_value(target, Config).

%% Only the target, and what its agent knew of it before.
nothing_is_registered(Config) ->
    #{node := Target, agent := Agent} = target(Config),
    Own = atom_to_binary(Target),
    ?assertEqual([Own, <<Own/binary, "-sidecar-proxy">>], maps:keys(meshx_ct_agent:services(Agent))).

%% The target has lost its links to all of them.
is_alone(Config) ->
    meshx_ct:wait("the end of the links", fun() ->
        meshx_ct:call(target(Config), erlang, nodes, [connected]) =:= []
    end).

%% A VM that registers nothing has reached the target; messages go both ways.
works(Config, Node) ->
    #{node := Target} = target(Config),
    ?assert(meshx_ct:connect(Node, Target)),
    Own = meshx_ct:call(Node, erlang, node, []),
    ?assertEqual(
        {Target, [Own]},
        meshx_ct:call(Node, erpc, call, [Target, fun() -> {node(), nodes(hidden)} end])
    ),
    ?assertEqual(Own, meshx_ct:call(target(Config), erpc, call, [Own, erlang, node, []])),
    ?assertEqual([Target], meshx_ct:call(Node, erlang, nodes, [connected])),
    nothing_is_registered(Config),
    Own.

vm(Config, Arguments) ->
    meshx_ct:vm(Config, #{args => Arguments}).

proxies(Node) ->
    [Process || Process <- meshx_ct:watch(Node), meshx_ct_proc:program(Process) =:= <<"consul">>].

%%% Shells

erl_remsh(Config) ->
    remote_shell(Config, erl(Config, "")).

%% A shell's name is no wish to be found.
erl_remsh_with_a_name(Config) ->
    remote_shell(Config, erl(Config, "-sname shell")).

erl(Config, Name) ->
    #{node := Target} = target(Config),
    ["erl ", flags(), " -setcookie meshx_ct_cookie ", Name, " -remsh ", atom_to_list(Target)].

remote_shell(Config, Command) ->
    Prompt = ["^\\(", atom_to_list(maps:get(node, target(Config))), "\\)1> "],
    Terminal = terminal(Config, Command),
    meshx_ct_terminal:expect(Terminal, Prompt),
    meshx_ct_terminal:type(Terminal, "{node(), length(nodes(hidden))}."),
    meshx_ct_terminal:expect(Terminal, [
        "^\\{", atom_to_list(maps:get(node, target(Config))), ",1\\}$"
    ]),
    nothing_is_registered(Config),
    leave(Terminal),
    is_alone(Config),
    nothing_is_registered(Config).

%% Elixir's shell, at a node that knows Elixir. (With --sname undefined it never connects, whatever
%% the carrier: the Elixir tested here asks before it has a name.)
iex_remsh(Config) ->
    Served = terminal(Config, ["iex --erl '", flags(), "' --cookie c --sname served"]),
    meshx_ct_terminal:expect(Served, "^iex\\(served@.*\\)1> "),
    Agent = proplists:get_value(agent, Config),
    Before = maps:keys(meshx_ct_agent:services(Agent)),
    Shell = terminal(Config, [
        "iex --erl '", flags(), "' --cookie c --sname shell --remsh served@", meshx_ct:host()
    ]),
    meshx_ct_terminal:expect(Shell, "^iex\\(served@.*\\)1> "),
    meshx_ct_terminal:type(Shell, "{:here, node(), length(Node.list(:hidden))}"),
    meshx_ct_terminal:expect(Shell, "^\\{:here, :\"?served@.*, 1\\}$"),
    ?assertEqual(Before, maps:keys(meshx_ct_agent:services(Agent))),
    leave(Shell),
    ?assertEqual(Before, maps:keys(meshx_ct_agent:services(Agent))),
    meshx_ct_terminal:type(Served, "System.stop()"),
    meshx_ct_terminal:ended(Served).

%% The shell, not the node it talks to.
leave(Shell) ->
    meshx_ct_terminal:type(Shell, "\^G"),
    meshx_ct_terminal:expect(Shell, "--> "),
    meshx_ct_terminal:type(Shell, "q"),
    meshx_ct_terminal:ended(Shell).

flags() ->
    ["-pa ", ebin(), " -proto_dist meshx_node -start_epmd false"].

ebin() ->
    filename:absname(filename:dirname(code:which(meshx_node_dist))).

terminal(Config, Command) ->
    meshx_ct_terminal:open(
        unicode:characters_to_list(Command),
        proplists:get_value(priv_dir, Config),
        %% At a dumb one erl has only its old shell, which knows no -remsh.
        [{"TERM", "xterm"} | meshx_ct:environment(proplists:get_value(agent, Config), #{})]
    ).

%%% Nodes without a listener

dynamic_name(Config) ->
    Node = vm(Config, ["-sname", "undefined"]),
    ?assertEqual(nonode@nohost, meshx_ct:call(Node, erlang, node, [])),
    Own = works(Config, Node),
    ?assertEqual(meshx_ct:host(), tl(string:find(atom_to_list(Own), "@"))),
    ?assertEqual([], proxies(Node)),
    meshx_ct:stop(Node),
    is_alone(Config).

dynamic_name_started_later(Config) ->
    Node = vm(Config, []),
    {ok, _} = meshx_ct:net_start(Node, undefined, []),
    _ = works(Config, Node),
    ok = meshx_ct:call(Node, net_kernel, stop, []),
    is_alone(Config),
    {ok, _} = meshx_ct:net_start(Node, undefined, []),
    _ = works(Config, Node).

%% Then net_kernel starts all of the distribution anew.
a_new_name_when_its_node_is_gone(Config) ->
    Namer = meshx_ct:start(Config, namer, #{}),
    Node = vm(Config, ["-sname", "undefined"]),
    ?assert(meshx_ct:connect(Node, Namer)),
    First = meshx_ct:call(Node, erlang, node, []),
    meshx_ct:stop(Namer),
    meshx_ct:wait("the loss of the name", fun() ->
        meshx_ct:call(Node, erlang, node, []) =:= nonode@nohost
    end),
    meshx_ct:wait("a new one", fun() -> meshx_ct:connect(Node, target(Config)) =:= true end),
    ?assertNotEqual(nonode@nohost, meshx_ct:call(Node, erlang, node, [])),
    ?assertNotEqual(undefined, First),
    nothing_is_registered(Config).

dist_listen_false(Config) ->
    Node = vm(Config, ["-sname", "mute", "-dist_listen", "false"]),
    ?assertEqual(meshx_ct:node_name(mute), works(Config, Node)),
    ?assertEqual({ok, false}, meshx_ct:call(Node, meshx_node, info, [registered])),
    ?assertEqual(ok, meshx_ct:call(Node, meshx_node, explain, [maps:get(node, target(Config))])),
    Other = meshx_ct:start(Config, other, #{}),
    ?assert(meshx_ct:connect(Node, Other)),
    meshx_ct:stop(Other),
    meshx_ct:stop(Node),
    is_alone(Config).

%% Hidden alone is no reason to be without a service.
hidden(Config) ->
    Node = meshx_ct:start(Config, secret, #{args => ["-hidden"]}),
    ?assertNotEqual(none, meshx_ct:service(Node)),
    ?assert(meshx_ct:connect(Node, target(Config))),
    meshx_ct:stop(Node).

many_at_once(Config) ->
    Nodes = [vm(Config, ["-sname", "undefined"]) || _ <- lists:seq(1, 4)],
    [?assert(meshx_ct:connect(Node, target(Config))) || Node <- Nodes],
    Names = [meshx_ct:call(Node, erlang, node, []) || Node <- Nodes],
    ?assertEqual(4, length(lists:usort(Names))),
    ?assertEqual(
        lists:sort(Names), lists:sort(meshx_ct:call(target(Config), erlang, nodes, [hidden]))
    ),
    nothing_is_registered(Config),
    [meshx_ct:stop(Node) || Node <- Nodes],
    is_alone(Config).

unknown_node(Config) ->
    Node = vm(Config, ["-sname", "undefined"]),
    _ = meshx_ct:failed_connect(Node, meshx_ct:node_name(nobody), "not registered in Consul"),
    ?assertMatch(
        {error, {node_unknown, _}},
        meshx_ct:call(Node, meshx_node, explain, [meshx_ct:node_name(nobody)])
    ).

%%% From elsewhere

%% The agent of another Consul node in the same datacenter.
client_agent(Config) ->
    #{directory := Directory} = proplists:get_value(agent, Config),
    {ok, Log} = file:read_file(filename:join(Directory, "agent.log")),
    {match, [Serf]} = re:run(Log, "Cluster Addr: [0-9.]+ \\(LAN: ([0-9]+)", [{capture, [1], list}]),
    meshx_ct:add_agent(Config, #{
        config => lists:concat([
            "data_dir = \"", filename:absname(proplists:get_value(priv_dir, Config)), "/elsewhere\" ",
            "server = false bootstrap = false node_name = \"elsewhere\" ",
            "retry_join = [\"127.0.0.1:", Serf, "\"] retry_interval = \"1s\""
        ])
    }).

%% What belongs to another user is as far as another host.
another_user_goes_through_the_mesh(Config) ->
    remote_shell(Config, ["setpriv --reuid=65534 --regid=65534 --clear-groups ", erl(Config, "")]).

another_user_obeys_intentions(Config) ->
    #{node := Target, agent := Agent} = target(Config),
    Shell = list_to_binary("undefined@" ++ meshx_ct:host()),
    meshx_ct_agent:deny(Agent, Shell, atom_to_binary(Target)),
    Terminal = terminal(Config, [
        "setpriv --reuid=65534 --regid=65534 --clear-groups ", erl(Config, "")
    ]),
    meshx_ct_terminal:expect(Terminal, ["denies ", Shell, " => ", atom_to_list(Target)]),
    %% OTP's own shell stays without a node then.
    meshx_ct_agent:delete_intentions(Agent),
    exit(Terminal, normal).

another_agent(Config) ->
    Agent = proplists:get_value(elsewhere, Config),
    Node = meshx_ct:vm(Config, #{args => ["-sname", "undefined"], agent => Agent}),
    _ = works(Config, Node),
    [Proxy] = proxies(Node),
    %% A second node there goes through a proxy of its own.
    Other = meshx_ct:start(Config, other, #{}),
    ?assert(meshx_ct:connect(Node, Other)),
    [_, _] = proxies(Node),
    meshx_ct:stop(Other),
    ?assertEqual(#{}, meshx_ct_agent:services(Agent)),
    meshx_ct:stop(Node),
    meshx_ct:wait("the proxy's end", fun() -> not meshx_ct_proc:is_alive(Proxy) end),
    is_alone(Config).

%% What comes through the sidecar is cut, and not let in again; who dials the listener stays, and
%% gets in.
intentions_are_for_the_mesh(Config) ->
    #{node := Target, agent := Agent} = target(Config),
    Shell = list_to_binary("undefined@" ++ meshx_ct:host()),
    Near = vm(Config, ["-sname", "undefined"]),
    Far = meshx_ct:vm(Config, #{
        args => ["-sname", "undefined"], agent => proplists:get_value(elsewhere, Config)
    }),
    ?assert(meshx_ct:connect(Near, Target)),
    ?assert(meshx_ct:connect(Far, Target)),
    meshx_ct_agent:deny(Agent, atom_to_binary(Target), Shell),
    meshx_ct_agent:deny(Agent, <<"*">>, atom_to_binary(Target)),
    meshx_ct:wait("the end of the link through the mesh", fun() ->
        meshx_ct:call(Far, erlang, nodes, [connected]) =:= []
    end),
    ?assertEqual([Target], meshx_ct:call(Near, erlang, nodes, [connected])),
    _ = meshx_ct:failed_connect(Far, Target, "denies"),
    Late = vm(Config, ["-sname", "undefined"]),
    ?assert(meshx_ct:connect(Late, Target)),
    Mute = vm(Config, ["-sname", "mute", "-dist_listen", "false"]),
    ?assert(meshx_ct:connect(Mute, Target)),
    [meshx_ct:stop(Node) || Node <- [Near, Far, Late, Mute]],
    is_alone(Config).

a_name_that_no_proxy_can_be_told(Config) ->
    Agent = proplists:get_value(elsewhere, Config),
    Dotted = meshx_ct:vm(Config, #{args => ["-name", "dotted@127.0.0.1"], longnames => true}),
    Node = meshx_ct:vm(Config, #{args => ["-sname", "undefined"], agent => Agent}),
    _ = meshx_ct:failed_connect(Node, 'dotted@127.0.0.1', "use service_name dns"),
    meshx_ct:stop(Dotted),
    Same = ["-meshx_node", "service_name", "dns"],
    Dns = meshx_ct:vm(Config, #{args => ["-name", "dotted@127.0.0.1" | Same], longnames => true}),
    Client = meshx_ct:vm(Config, #{args => ["-sname", "undefined" | Same], agent => Agent}),
    ?assert(meshx_ct:connect(Client, 'dotted@127.0.0.1')),
    meshx_ct:stop(Dns).

a_proxy_that_dies(Config) ->
    Agent = proplists:get_value(elsewhere, Config),
    Node = meshx_ct:vm(Config, #{args => ["-sname", "mute", "-dist_listen", "false"], agent => Agent}),
    ?assert(meshx_ct:connect(Node, target(Config))),
    [Proxy] = proxies(Node),
    meshx_ct_proc:signal(Proxy, "KILL"),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(Node, erlang, nodes, [connected]) =:= [] end),
    meshx_ct:wait("a log line", fun() -> meshx_ct:has_line(Node, 0, "the way to service .* is gone") end),
    ?assert(meshx_ct:connect(Node, target(Config))),
    ?assertMatch([_], [Other || Other <- proxies(Node), Other =/= Proxy, meshx_ct_proc:is_alive(Other)]).

no_consul_program(Config) ->
    Agent = proplists:get_value(elsewhere, Config),
    Options = #{args => ["-sname", "undefined"], env => [{"PATH", "/usr/bin:/bin"}]},
    Near = meshx_ct:vm(Config, Options),
    ?assert(meshx_ct:connect(Near, target(Config))),
    Far = meshx_ct:vm(Config, Options#{agent => Agent}),
    _ = meshx_ct:failed_connect(Far, target(Config), "consul is not found in PATH").
