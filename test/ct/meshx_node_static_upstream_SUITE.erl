%% The key `upstreams': nodes that are dialled at a static address, where something else runs the
%% sidecar (here a real pair of `consul connect proxy') or where listeners are dialled directly.
-module(meshx_node_static_upstream_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        direct,
        direct_ipv6,
        beside_the_mesh,
        external_sidecars,
        refuses,
        refused_again_and_again_costs_one_descriptor,
        does_not_accept,
        closes,
        says_nothing,
        leads_to_another_node,
        has_another_cookie,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Nodes

%% To be dialled at Port. Upstreams: [{Name, "ip:port"}].
start(Config, Name, Port, Upstreams, More) ->
    Arguments = meshx_ct:listens_at(Port) ++ meshx_ct:dials(Upstreams),
    meshx_ct:start(Config, Name, #{args => Arguments ++ More}).

listen_at(Port) -> ["-kernel", "inet_dist_listen_min", integer_to_list(Port)].

local(Port) -> lists:concat(["127.0.0.1:", Port]).

free_ports() -> {meshx_ct_agent:free_port(), meshx_ct_agent:free_port()}.

%% A link in both directions, one after the other, with something sent.
work([A, B]) ->
    [meshx_ct:auto_connect(Node, never) || Node <- [A, B]],
    [
        begin
            #{node := ToName} = To,
            ?assert(meshx_ct:connect(From, To)),
            ?assertEqual(ToName, meshx_ct:call(From, erpc, call, [ToName, erlang, node, []])),
            Large = binary:copy(<<"large">>, 300000),
            ?assertEqual(Large, meshx_ct:call(From, erpc, call, [ToName, binary, copy, [Large]])),
            ?assert(meshx_ct:call(From, erlang, disconnect_node, [ToName])),
            [meshx_ct:wait("the link's end", fun() -> meshx_ct:call(Node, erlang, nodes, []) =:= [] end) || Node <- [A, B]]
        end
     || {From, To} <- [{A, B}, {B, A}]
    ].

%% Whether the sidecar of the node, if there were one, would have anything to dial through.
has_no_upstream(#{agent := Agent, node := Node} = Of) ->
    ?assertEqual([], meshx_ct_agent:upstreams(Agent, Node)),
    ?assertEqual({ok, []}, meshx_ct:call(Of, meshx_node, info, [upstreams])).

%%% That dial

%% One by flag, one by the environment. Nobody runs a sidecar, so both nodes' services are critical.
direct(Config) ->
    {PortA, PortB} = free_ports(),
    #{node := NameA} = A = start(Config, a, PortA, [{b, local(PortB)}], []),
    #{node := NameB} = B = meshx_ct:start(Config, b, #{
        args => listen_at(PortB),
        env => [
            {"MESHX_SIDECAR_COMMAND", "none"},
            {"MESHX_UPSTREAMS", lists:concat([NameA, "=", local(PortA), " other@far=10.0.0.1:1"])}
        ]
    }),
    work([A, B]),
    ?assertEqual([], meshx_ct_agent:healthy(maps:get(agent, A), atom_to_binary(NameA))),
    [has_no_upstream(Node) || Node <- [A, B]],
    ?assertEqual({ok, #{NameB => {{127, 0, 0, 1}, PortB}}}, meshx_ct:call(A, meshx_node, info, [static_upstreams])),
    ?assertEqual(ok, meshx_ct:call(A, meshx_node, explain, [NameB])),
    %% All other nodes as before: without a sidecar they can't be dialled.
    meshx_ct:failed_connect(A, meshx_ct:node_name(other), "no link to other@.* the sidecar of a@.*is it started").

direct_ipv6(Config) ->
    {PortA, PortB} = free_ports(),
    Loopback = ["-kernel", "inet_dist_use_interface", "{0,0,0,0,0,0,0,1}"],
    case gen_tcp:listen(0, [inet6, {ip, {0, 0, 0, 0, 0, 0, 0, 1}}]) of
        {ok, Socket} ->
            gen_tcp:close(Socket),
            A = start(Config, a, PortA, [{b, lists:concat(["[::1]:", PortB])}], Loopback),
            B = start(Config, b, PortB, [{a, lists:concat(["[::1]:", PortA])}], Loopback),
            work([A, B]);
        {error, Reason} ->
            {skip, {no_ipv6_loopback, Reason}}
    end.

%% One node dials another directly and a third one through its own sidecar.
beside_the_mesh(Config) ->
    {PortA, PortB} = free_ports(),
    #{node := NameA} = A = meshx_ct:start(Config, a, #{args => listen_at(PortA) ++ meshx_ct:dials([{b, local(PortB)}])}),
    B = start(Config, b, PortB, [{a, local(PortA)}], ["-connect_all", "false"]),
    #{node := NameC} = C = meshx_ct:start(Config, c, #{args => ["-connect_all", "false"]}),
    work([A, B]),
    has_no_upstream(A),
    work([A, C]),
    ?assertEqual([atom_to_binary(NameC)], meshx_ct_agent:upstreams(maps:get(agent, A), NameA)),
    ?assert(meshx_ct:connect(A, B)),
    ?assert(meshx_ct:connect(A, C)),
    ?assertEqual(2, length(meshx_ct:call(A, erlang, nodes, []))).

%%% Sidecars that something else runs

%% Consul's built-in proxy with nothing but its command line, as a unit of systemd would have it.
%% Each node's public port and listener are pinned. It ends with the calling process.
sidecar(#{agent := Agent, node := Node}, Listener, Public, #{node := Other}, Upstream) ->
    Script = "\"$@\" >/dev/null 2>&1 </dev/null & cat >/dev/null; kill $!; wait $!",
    Proxy = [
        meshx_ct_agent:binary(), "connect", "proxy",
        "-http-addr", meshx_ct_agent:url(Agent),
        "-service", atom_to_list(Node),
        "-service-addr", local(Listener),
        "-listen", local(Public),
        "-upstream", lists:concat([Other, ":", Upstream])
    ],
    Port = open_port({spawn_executable, "/bin/sh"}, [{args, ["-c", Script, "sh" | Proxy]}]),
    ?assert(is_port(Port)).

external_sidecars(Config) ->
    {ListenerA, ListenerB} = free_ports(),
    {PublicA, PublicB} = free_ports(),
    {ToA, ToB} = free_ports(),
    Start = fun(Name, Listener, Public, Upstreams) ->
        Pinned = ["-meshx_node", "sidecar_ports", integer_to_list(Public)],
        start(Config, Name, Listener, Upstreams, Pinned ++ short_setup())
    end,
    #{agent := Agent, node := NameA} = A = Start(a, ListenerA, PublicA, [{b, local(ToB)}]),
    #{node := NameB} = B = Start(b, ListenerB, PublicB, [{a, local(ToA)}]),
    sidecar(A, ListenerA, PublicA, B, ToB),
    sidecar(B, ListenerB, PublicB, A, ToA),
    [IdA, IdB] = [atom_to_binary(Name) || Name <- [NameA, NameB]],
    meshx_ct:wait("healthy nodes", fun() ->
        lists:all(fun(Id) -> meshx_ct_agent:healthy(Agent, Id) =/= [] end, [IdA, IdB])
    end),
    work([A, B]),
    [has_no_upstream(Node) || Node <- [A, B]],
    %% The sidecars obey intentions; only they know.
    meshx_ct_agent:deny(Agent, IdA, IdB),
    try
        fails(A, b, ToB, "closes every connection"),
        ?assert(meshx_ct:connect(B, A))
    after
        meshx_ct_agent:delete_intentions(Agent)
    end.

%%% Addresses where the node is not to be had: the log names them

%% So that it is soon given up.
short_setup() -> ["-kernel", "net_setuptime", "2"].

dials_at(Config, Port) ->
    start(Config, a, meshx_ct_agent:free_port(), [{b, local(Port)}], short_setup()).

fails(Node, Other, Port, Pattern) ->
    Start = ["no link to ", atom_to_list(Other), "@[^ ]*: .*"],
    Culprit = ["the upstream ", local(Port), " given by `upstreams`"],
    meshx_ct:failed_connect(Node, meshx_ct:node_name(Other), [Start, Culprit, ".*", Pattern]).

refuses(Config) ->
    Port = meshx_ct_agent:free_port(),
    fails(dials_at(Config, Port), b, Port, "refuses connections").

%% Dialling goes on until the setup time is over; every try has a socket of its own.
refused_again_and_again_costs_one_descriptor(Config) ->
    A = dials_at(Config, meshx_ct_agent:free_port()),
    Other = meshx_ct:node_name(b),
    {Before, Most} = meshx_ct:call(A, fun() ->
        Before = descriptors(),
        {Dial, Monitor} = spawn_monitor(fun() -> false = net_kernel:connect_node(Other) end),
        {Before, most_descriptors(Dial, Monitor, 0)}
    end),
    %% Its own, one that is just being closed, and that of the directory that is read.
    ?assert(Most =< Before + 3).

most_descriptors(Dial, Monitor, Most) ->
    receive
        {'DOWN', Monitor, process, Dial, normal} -> Most
    after 1 -> most_descriptors(Dial, Monitor, max(Most, descriptors()))
    end.

descriptors() ->
    {ok, Names} = file:list_dir("/proc/self/fd"),
    length(Names).

%% As many connections as fit wait to be accepted: the next one is not answered, as by a firewall.
does_not_accept(Config) ->
    {Listener, Port} = listener([{backlog, 0}]),
    Waiting = fill(Port),
    fails(dials_at(Config, Port), b, Port, "connection timed out"),
    [gen_tcp:close(Socket) || Socket <- [Listener | Waiting]].

fill(Port) ->
    case gen_tcp:connect({127, 0, 0, 1}, Port, [], 300) of
        {ok, Socket} -> [Socket | fill(Port)];
        {error, timeout} -> []
    end.

closes(Config) ->
    {Listener, Port} = listener([]),
    spawn_link(fun() -> accept_and_close(Listener) end),
    fails(dials_at(Config, Port), b, Port, "closes every connection").

accept_and_close(Listener) ->
    case gen_tcp:accept(Listener) of
        {ok, Socket} ->
            gen_tcp:close(Socket),
            accept_and_close(Listener);
        {error, closed} ->
            ok
    end.

says_nothing(Config) ->
    {Listener, Port} = listener([]),
    fails(dials_at(Config, Port), b, Port, "or never answers"),
    gen_tcp:close(Listener).

listener(Options) ->
    {ok, Listener} = gen_tcp:listen(0, [{ip, {127, 0, 0, 1}} | Options]),
    {ok, Port} = inet:port(Listener),
    {Listener, Port}.

leads_to_another_node(Config) ->
    Port = meshx_ct_agent:free_port(),
    #{node := NameC} = start(Config, c, Port, [], []),
    fails(dials_at(Config, Port), b, Port, ["leads to ", atom_to_list(NameC)]).

has_another_cookie(Config) ->
    Port = meshx_ct_agent:free_port(),
    meshx_ct:start(Config, b, #{
        args => meshx_ct:listens_at(Port), cookie => "another"
    }),
    fails(dials_at(Config, Port), b, Port, "same cookie").
