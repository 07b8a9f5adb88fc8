%% Node names: each that OTP's own carriers take works, in all modes of service_name, or is refused
%% by one line that names it and says what to do. Starts at boot, in embedded mode too.
-module(meshx_node_names_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        named_as_the_node,
        named_by_dns_label,
        named_by_a_function,
        names_that_are_none,
        a_name_in_capitals,
        a_name_in_latin_1,
        same_name_on_localhost_and_host,
        names_that_differ_in_case,
        a_node_in_capitals_has_a_shell,
        boots,
        nothing_is_left
    ].

%% Two VMs without a name, which take one after the other.
init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = [meshx_ct:vm(Config1, #{scope => suite}) || _ <- [a, b]],
    [{a, A}, {b, B} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

end_per_testcase(nothing_is_left, Config) ->
    meshx_ct:end_case(Config);
end_per_testcase(_, Config) ->
    {A, B} = vms(Config),
    [ok = meshx_ct:call(Vm, fun stop_node/0) || Vm <- [A, B]],
    meshx_ct_agent:delete_intentions(proplists:get_value(agent, Config)),
    meshx_ct:end_case(Config).

stop_node() ->
    case net_kernel:stop() of
        ok -> ok;
        {error, not_found} -> ok
    end.

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Two nodes

vms(Config) -> {proplists:get_value(a, Config), proplists:get_value(b, Config)}.

%% Makes a VM a node, with names for its service as given.
become(Vm, Name, Naming) ->
    {ok, _} = try_to_become(Vm, Name, Naming),
    ?assertEqual(Name, meshx_ct:call(Vm, erlang, node, [])),
    Node = Vm#{node := Name},
    meshx_ct:watch(Node),
    Node.

try_to_become(Vm, Name, Naming) ->
    ok = meshx_ct:call(Vm, application, set_env, [meshx_node, service_name, Naming]),
    meshx_ct:call(Vm, net_kernel, start, [[Name, longnames]]).

%% No start, one line that says why, nothing registered.
refused(Vm, Name, Naming, Pattern) ->
    Mark = meshx_ct:mark(Vm),
    Before = services(Vm),
    ?assertMatch({error, _}, try_to_become(Vm, Name, Naming)),
    meshx_ct:wait("a log line", fun() -> meshx_ct:own_lines(Vm, Mark) =/= [] end),
    [Line] = meshx_ct:own_lines(Vm, Mark),
    ?assertMatch({_, {match, _}}, {Line, re:run(Line, Pattern, [unicode])}),
    ?assertMatch({_, {_, _}}, {Line, binary:match(Line, atom_to_binary(Name))}),
    ?assertEqual(Before, services(Vm)).

services(#{agent := Agent}) ->
    maps:keys(meshx_ct_agent:services(Agent)).

%% Each dials the other, and it is that one who answers.
link_both_ways(One, Other) ->
    [link_from(From, To) || {From, To} <- [{One, Other}, {Other, One}]].

link_from(#{node := FromName} = From, #{node := Name} = To) ->
    ?assert(meshx_ct:connect(From, Name)),
    ?assertEqual(Name, meshx_ct:call(From, erpc, call, [Name, erlang, node, []])),
    ?assertEqual({badrpc, {'EXIT', Name}}, meshx_ct:call(From, rpc, call, [Name, erlang, exit, [Name]])),
    meshx_ct:call(From, erlang, disconnect_node, [Name]),
    meshx_ct:wait("the link's end", fun() ->
        not lists:member(FromName, meshx_ct:call(To, erlang, nodes, [connected]))
    end).

%% All of these names, one after the other.
all_work(Config, Naming, Names) ->
    {A, B} = vms(Config),
    Plain = become(A, 'plain@127.0.0.1', Naming),
    [
        begin
            Node = become(B, Name, Naming),
            link_both_ways(Node, Plain),
            ok = meshx_ct:call(B, net_kernel, stop, []),
            ?assertEqual(services(A), [<<"plain@127.0.0.1">>, <<"plain@127.0.0.1-sidecar-proxy">>])
        end
     || Name <- Names
    ].

long(Size, Host) ->
    list_to_atom(lists:duplicate(Size - 1 - length(Host), $l) ++ "@" ++ Host).

%% For service_name: any such function.
mapped(Node) ->
    "team-" ++ integer_to_list(erlang:phash2(Node)).

%%% Names

named_as_the_node(Config) ->
    all_work(Config, node, ['n@127.0.0.1', 'n@::1', 'n-o_d@ho_st-x.y', 'N1@Host.X', long(200, "host.x")]),
    {_, B} = vms(Config),
    [
        refused(B, Name, node, "can't be a Consul service name.* use service_name dns")
     || Name <- ['n@[::1]', 'a@ho/st', 'a@{{id}}', long(201, "host.x")]
    ].

named_by_dns_label(Config) ->
    all_work(Config, dns, ['n@[::1]', 'a@ho/st', 'a@{{id}}', 'a@b\'"%20*?c', '_@_', long(255, "host.x")]).

named_by_a_function(Config) ->
    all_work(Config, {?MODULE, mapped}, ['N1@Host.X', 'a@ho/st', long(255, "host.x")]),
    {_, B} = vms(Config),
    refused(B, 'N1@Host.X', {erlang, atom_to_list}, "service_name.*allowed are 1 to 200 characters a-z").

%% net_kernel lets them through.
names_that_are_none(Config) ->
    {_, B} = vms(Config),
    [refused(B, 'a@b@c', Naming, "a@b@c does not start: a node name has one @") || Naming <- [node, dns]].

%% The ID of its service is another one, since the catalog ignores the case of IDs.
a_name_in_capitals(Config) ->
    {_, B} = vms(Config),
    Node = become(B, 'NODE@HOST.X', node),
    {ok, Info} = meshx_ct:call(Node, meshx_node, info, []),
    ?assertMatch(#{service_name := <<"NODE@HOST.X">>}, Info),
    #{service_id := <<"node-at-host-x-", Digest:10/binary>> = Id} = Info,
    ?assertMatch({match, _}, re:run(Digest, "^[0-9a-f]+$")),
    #{Id := #{<<"Meta">> := #{<<"node">> := <<"NODE@HOST.X">>}}} = meshx_ct_agent:services(maps:get(agent, Node)).

%% It goes over the wire in Latin-1, and is known to intentions all the same.
a_name_in_latin_1(Config) ->
    {A, B} = vms(Config),
    Name = list_to_atom("n@h" ++ [246] ++ "st"),
    refused(B, Name, node, "use service_name dns"),
    #{agent := Agent} = Plain = become(A, 'plain@127.0.0.1', dns),
    Node = become(B, Name, dns),
    link_both_ways(Node, Plain),
    Services = [element(2, {ok, _} = meshx_ct:call(Vm, meshx_node, info, [service_name])) || Vm <- [Node, Plain]],
    ?assert(meshx_ct:connect(Node, Plain)),
    [PlainService | _] = lists:reverse(Services),
    meshx_ct_agent:deny(Agent, PlainService, hd(Services)),
    meshx_ct:wait("the cut", fun() -> meshx_ct:call(Plain, erlang, nodes, []) =:= [] end).

same_name_on_localhost_and_host(Config) ->
    {A, B} = vms(Config),
    Local = become(A, 'x@localhost', node),
    Host = become(B, meshx_ct:node_name(x), node),
    link_both_ways(Local, Host).

%% Two nodes, where Consul can tell them apart.
names_that_differ_in_case(Config) ->
    {A, B} = vms(Config),
    Lower = become(A, 'node@host.x', node),
    refused(B, 'Node@host.x', node, "name Node@host.x is in use by node@host.x.*service_name dns"),
    %% Nothing has happened to the other one.
    Other = become(B, 'other@host.x', node),
    link_both_ways(Other, Lower),
    [ok = meshx_ct:call(Vm, net_kernel, stop, []) || Vm <- [A, B]],
    Again = become(A, 'node@host.x', dns),
    Upper = become(B, 'Node@host.x', dns),
    link_both_ways(Again, Upper).

%% It reaches the node's listener directly.
a_node_in_capitals_has_a_shell(Config) ->
    {A, _} = vms(Config),
    Node = become(A, 'NODE@host.x', node),
    Shell = meshx_ct:start(Config, 'shell@host.x', #{longnames => true, args => ["-dist_listen", "false"]}),
    link_from(Shell, Node),
    ?assertEqual([], meshx_ct:watch(Shell)).

%%% Boot

%% With short and long names, with and without a release's boot script, in whose mode nothing is loaded
%% on demand, with a sys.config or only a flag.
boots(Config) ->
    Directory = proplists:get_value(priv_dir, Config),
    Sys = filename:join(Directory, "sys.config"),
    ok = file:write_file(Sys, "[{meshx_node, [{service_name, dns}]}].\n"),
    Script = ["-mode", "embedded", "-boot", boot_script(Directory)],
    Flag = ["-meshx_node", "service_name", "dns"],
    boots_with(Config, ["-sname", "booted", "-config", Sys | Script]),
    boots_with(Config, ["-name", "booted@127.0.0.1" | Script ++ Flag]),
    boots_with(Config, ["-name", "booted@127.0.0.1", "-config", Sys]).

boots_with(Config, Arguments) ->
    Expression =
        "{ok, Name} = meshx_node:info(service_name), io:format(\"~ts is ~ts~n\", [node(), Name]), init:stop().",
    {Status, Output} = meshx_ct:erl(Config, Arguments ++ ["-eval", Expression], #{}),
    ?assertMatch({Output, 0}, {Output, Status}),
    ?assertMatch({Output, {match, _}}, {Output, re:run(Output, "^booted@.* is booted-at-.*-[0-9a-f]{10}\\R", [multiline])}).

boot_script(Directory) ->
    Ebin = filename:dirname(code:which(meshx_node_dist)),
    Applications = [
        begin
            _ = application:load(Application),
            {ok, Version} = application:get_key(Application, vsn),
            {Application, Version}
        end
     || Application <- [kernel, stdlib, meshx_node]
    ],
    Release = {release, {"names", "1"}, {erts, erlang:system_info(version)}, Applications},
    ok = file:write_file(filename:join(Directory, "names.rel"), io_lib:format("~p.~n", [Release])),
    {ok, _, _} = systools:make_script(filename:join(Directory, "names"), [
        silent, local, {outdir, Directory}, {path, [Ebin]}
    ]),
    filename:join(Directory, "names").
