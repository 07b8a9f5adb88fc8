%% A node's start makes it a Consul service with a sidecar; its end, whichever way, leaves
%% nothing behind.
-module(meshx_node_start_stop_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        net_kernel_start_1,
        net_kernel_start_2,
        boot_with_sname,
        boot_with_name,
        name_of_the_elixir_package,
        service_name_as_dns_label,
        sidecar_output_is_logged,
        sidecar_output_can_be_switched_off,
        a_flood_of_sidecar_output_is_cut_short,
        info_tells_all,
        net_kernel_stop_leaves_nothing,
        starts_again_in_the_same_vm,
        starts_again_while_the_former_sidecar_still_ends,
        init_restart,
        init_stop_leaves_nothing,
        sigterm_leaves_nothing,
        sigkill_leaves_no_process_and_the_name_starts_again,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Starts

net_kernel_start_1(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    {ok, _} = meshx_ct:call(Vm, net_kernel, start, [[started, shortnames]]),
    Node = Vm#{node := meshx_ct:node_name(started)},
    meshx_ct:watch(Node),
    ?assertEqual(meshx_ct:node_name(started), meshx_ct:call(Vm, erlang, node, [])),
    is_service(Node).

%% As Elixir's Node.start/3 does since 1.13.
net_kernel_start_2(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    {ok, _} = meshx_ct:call(Vm, net_kernel, start, [
        'started@127.0.0.1', #{name_domain => longnames, hidden => false}
    ]),
    meshx_ct:watch(Vm),
    is_service(Vm#{node := 'started@127.0.0.1'}).

boot_with_sname(Config) ->
    Node = meshx_ct:start(Config, booted, #{}),
    ?assertEqual(meshx_ct:node_name(booted), meshx_ct:call(Node, erlang, node, [])),
    is_service(Node).

boot_with_name(Config) ->
    Node = meshx_ct:start(Config, 'booted@127.0.0.1', #{longnames => true}),
    ?assertEqual('booted@127.0.0.1', meshx_ct:call(Node, erlang, node, [])),
    is_service(Node).

name_of_the_elixir_package(Config) ->
    Vm = meshx_ct:vm(Config, #{carrier => "Elixir.MeshxNode"}),
    Dynamic = meshx_ct:net_start(Vm, dynamic),
    Booted = meshx_ct:start(Config, booted, #{carrier => "Elixir.MeshxNode"}),
    is_service(Dynamic),
    is_service(Booted),
    true = meshx_ct:connect(Dynamic, Booted).

service_name_as_dns_label(Config) ->
    Options = #{env => [{"MESHX_SERVICE_NAME", "dns"}]},
    [One, Two] = [meshx_ct:start(Config, Name, Options) || Name <- [one, two]],
    #{<<"ID">> := Id, <<"Service">> := Name, <<"Meta">> := Meta} = meshx_ct:service(One),
    ?assertEqual(atom_to_binary(maps:get(node, One)), Id),
    ?assertMatch({match, _}, re:run(Name, "^one-at-[a-z0-9-]*[0-9a-f]{10}$")),
    ?assertMatch(#{<<"node">> := Id}, Meta),
    passes(One, Name),
    true = meshx_ct:connect(One, Two).

%% What the agent has of a node is what DESIGN.md says, and peers can find it.
is_service(#{node := Node, agent := Agent} = TestNode) ->
    Name = atom_to_binary(Node),
    Sidecar = <<Name/binary, "-sidecar-proxy">>,
    #{Name := Service, Sidecar := Proxy} = meshx_ct_agent:services(Agent),
    ?assertMatch(#{<<"ID">> := Name, <<"Service">> := Name, <<"Meta">> := #{<<"node">> := Name}}, Service),
    ?assertMatch(#{<<"Kind">> := <<"connect-proxy">>}, Proxy),
    ?assertMatch(#{<<"Proxy">> := #{<<"DestinationServiceID">> := Name}}, Proxy),
    ?assert(meshx_ct_proc:is_alive(meshx_ct:sidecar(TestNode))),
    passes(TestNode, Name).

passes(#{node := Node, agent := Agent}, Name) ->
    Sidecar = <<(atom_to_binary(Node))/binary, "-sidecar-proxy">>,
    Passes = fun() -> [Sidecar] =:= meshx_ct_agent:healthy(Agent, Name) end,
    meshx_ct:wait("a passing sidecar", Passes, 1000).

%%% Output and information

sidecar_output_is_logged(Config) ->
    #{node := Name} = Booted = meshx_ct:start(Config, booted, #{}),
    Dynamic = meshx_ct:net_start(meshx_ct:vm(Config, #{}), dynamic),
    Line = fun(Node) -> ["^notice: \\[", Node, "\\]\\[stdout\\]: ==> Consul Connect proxy starting"] end,
    [
        meshx_ct:wait("the proxy's first line", fun() ->
            meshx_ct:has_line(Node, 0, Line(atom_to_list(maps:get(node, Node))))
        end)
     || Node <- [Booted, Dynamic]
    ],
    ?assertNot(meshx_ct:has_line(Dynamic, 0, Line(atom_to_list(Name)))).

sidecar_output_can_be_switched_off(Config) ->
    Node = meshx_ct:start(Config, booted, #{env => [{"MESHX_SIDECAR_STDOUT", "off"}]}),
    ?assertNot(meshx_ct:has_line(Node, 0, "stdout")),
    Debug = meshx_ct:start(Config, debugged, #{env => [{"MESHX_SIDECAR_STDOUT", "error"}]}),
    meshx_ct:wait("a line as an error", fun() ->
        meshx_ct:has_line(Debug, 0, "^error: .*\\[stdout\\]: ")
    end).

%% The node's process stays free for what matters.
a_flood_of_sidecar_output_is_cut_short(Config) ->
    Node = meshx_ct:start(Config, flooded, #{args => shell_sidecar("yes & exec \"$0\" connect proxy -sidecar-for \"$1\"")}),
    meshx_ct:wait("the line that says so", fun() -> meshx_ct:has_line(Node, 0, "^warning: .*lines a second") end),
    ?assertEqual({ok, ready}, meshx_ct:call(Node, meshx_node, info, [state])),
    {message_queue_len, Waiting} =
        meshx_ct:call(Node, fun() -> process_info(whereis(meshx_node_mesh), message_queue_len) end),
    ?assert(Waiting < 10000).

%% Flags for a sidecar that a shell runs: $0 is consul, $1 the service's ID.
shell_sidecar(Script) ->
    Command = ["/bin/sh", "-c", Script, unicode:characters_to_list(meshx_ct_agent:binary()), "{{id}}"],
    ["-meshx_node", "sidecar_command", lists:flatten(io_lib:format("~0p", [Command]))].

info_tells_all(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    ?assertMatch({error, {stopped, _}}, meshx_ct:call(Vm, meshx_node, info, [])),
    #{node := Node, agent := #{http := Http}} = Started = meshx_ct:net_start(Vm, informed),
    Name = atom_to_binary(Node),
    {ok, Info} = meshx_ct:call(Started, meshx_node, info, []),
    ?assertMatch(
        #{
            state := ready,
            service_id := Name,
            service_name := Name,
            sidecar_accepts := true,
            registered := true,
            sidecar_starts := 1,
            registrations := 1,
            repairs := 0,
            request_failures := 0,
            upstreams := [],
            last_failure := undefined
        },
        Info
    ),
    #{agent := Agent, listen_port := Listen, sidecar_port := Sidecar} = Info,
    ?assertMatch({_, _}, binary:match(Agent, integer_to_binary(Http))),
    Proxy = <<Name/binary, "-sidecar-proxy">>,
    #{Name := #{<<"Port">> := Listen}, Proxy := #{<<"Port">> := Sidecar}} =
        meshx_ct_agent:services(maps:get(agent, Started)),
    ?assertEqual({ok, ready}, meshx_ct:call(Started, meshx_node, info, [state])),
    ?assertEqual({error, unknown_key}, meshx_ct:call(Started, meshx_node, info, [nonsense])).

%%% Ends

net_kernel_stop_leaves_nothing(Config) ->
    Node = meshx_ct:net_start(meshx_ct:vm(Config, #{}), stopped),
    net_kernel_stop(Node).

starts_again_in_the_same_vm(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    Other = meshx_ct:start(Config, other, #{}),
    [
        begin
            Node = meshx_ct:net_start(Vm, Name),
            is_service(Node),
            ?assert(meshx_ct:connect(Node, Other)),
            net_kernel_stop(Node)
        end
     || Name <- [again, again, again, again, other_name]
    ].

%% It is deaf to TERM: the former service ends after stop_timeout, and must not take the new one's
%% registration, of the same ID, with it.
starts_again_while_the_former_sidecar_still_ends(Config) ->
    Deaf = "trap '' TERM; \"$0\" connect proxy -sidecar-for \"$1\" & while :; do sleep 1; done",
    Vm = meshx_ct:vm(Config, #{args => shell_sidecar(Deaf)}),
    #{agent := Agent, node := Name} = Node = meshx_ct:net_start(Vm, deaf),
    ok = meshx_ct:call(Node, net_kernel, stop, []),
    meshx_ct:wait("the warning", fun() -> meshx_ct:has_line(Node, 0, "^warning: .*has not ended yet") end),
    Again = meshx_ct:net_start(Vm, deaf),
    is_service(Again),
    ?assertEqual({ok, 0}, meshx_ct:call(Again, meshx_node, info, [repairs])),
    ?assert(maps:is_key(atom_to_binary(Name), meshx_ct_agent:services(Agent))).

net_kernel_stop(#{agent := Agent, node := Name} = Node) ->
    [_, _ | _] = Processes = meshx_ct:watch(Node),
    ok = meshx_ct:call(Node, net_kernel, stop, []),
    ?assertNot(maps:is_key(atom_to_binary(Name), meshx_ct_agent:services(Agent))),
    are_gone(Processes),
    ?assertEqual(nonode@nohost, meshx_ct:call(Node, erlang, node, [])).

%% The guard closes its socket, by which it is known to have ended, just before it has.
are_gone(Processes) ->
    Gone = fun() -> not lists:any(fun meshx_ct_proc:is_alive/1, Processes) end,
    meshx_ct:wait("the end of guard and sidecar", Gone, 2000).

%% In the same VM, by the same name, as the same service; nothing is left of what was before.
init_restart(Config) ->
    #{agent := Agent} = A = meshx_ct:start(Config, asking, #{args => ["-connect_all", "false"]}),
    Name = meshx_ct:node_name(restarted),
    {Run, Monitor} = spawn_monitor(fun() ->
        exit({ended, meshx_ct:erl(Config, ["-sname", "restarted", "-connect_all", "false"], #{})})
    end),
    Ask = fun(Module, Function, Args) -> meshx_ct:call(A, rpc, call, [Name, Module, Function, Args]) end,
    meshx_ct:wait("the node", fun() -> meshx_ct:connect(A, Name) end),
    Before = incarnation(Ask),
    _ = meshx_ct:call(A, meshx_ct_there, watch, [[]]),
    ok = Ask(init, restart, []),
    meshx_ct:wait("nodedown", fun() ->
        lists:member({nodedown, Name}, meshx_ct:call(A, meshx_ct_there, seen, []))
    end),
    meshx_ct:wait("the node again", fun() -> meshx_ct:connect(A, Name) end, 30000),
    After = incarnation(Ask),
    ?assertEqual(maps:get(os_pid, Before), maps:get(os_pid, After)),
    [?assertNotEqual(maps:get(Key, Before), maps:get(Key, After)) || Key <- [creation, sidecar]],
    are_gone([maps:get(sidecar, Before)]),
    ?assertEqual([maps:get(sidecar, After)], maps:get(sidecars, After)),
    Id = atom_to_binary(Name),
    ?assertMatch([Id], [Of || Of <- maps:keys(meshx_ct_agent:services(Agent)), Of =:= Id]),
    ok = Ask(init, stop, []),
    receive
        {'DOWN', Monitor, process, Run, Reason} -> ?assertMatch({ended, {0, _}}, Reason)
    end,
    are_gone([maps:get(sidecar, After)]).

incarnation(Ask) ->
    OsPid = list_to_integer(Ask(os, getpid, [])),
    {ok, Sidecar} = Ask(meshx_node, info, [sidecar_pid]),
    #{
        os_pid => OsPid,
        creation => Ask(erlang, system_info, [creation]),
        sidecar => meshx_ct_proc:find(Sidecar),
        sidecars => [
            Child
         || Guard <- meshx_ct_proc:children(OsPid),
            meshx_ct_proc:program(Guard) =:= <<"meshx_guard">>,
            Child <- meshx_ct_proc:children(meshx_ct_proc:pid(Guard))
        ]
    }.

init_stop_leaves_nothing(Config) ->
    ends_without_rest(Config, fun meshx_ct:stop/1).

sigterm_leaves_nothing(Config) ->
    ends_without_rest(Config, fun(Node) -> meshx_ct:signal(Node, "TERM") end).

%% For a node started at boot and for one started later: nothing is left when the VM has gone.
ends_without_rest(Config, Stop) ->
    Booted = meshx_ct:start(Config, booted, #{}),
    Dynamic = meshx_ct:net_start(meshx_ct:vm(Config, #{}), dynamic),
    [
        begin
            [_, _ | _] = Processes = meshx_ct:watch(Node),
            Stop(Node),
            ?assertEqual(none, meshx_ct:service(Node)),
            are_gone(Processes)
        end
     || Node <- [Booted, Dynamic]
    ].

sigkill_leaves_no_process_and_the_name_starts_again(Config) ->
    Killed = meshx_ct:start(Config, killed, #{}),
    [_, _ | _] = Processes = meshx_ct:watch(Killed),
    ?assertEqual(
        [<<"consul">>, <<"meshx_guard">>],
        lists:usort([meshx_ct_proc:program(Process) || Process <- Processes])
    ),
    meshx_ct:kill(Killed),
    are_gone(Processes),
    ?assertNotEqual(none, meshx_ct:service(Killed)),
    Next = meshx_ct:start(Config, killed, #{}),
    is_service(Next),
    Other = meshx_ct:start(Config, other, #{}),
    ?assert(meshx_ct:connect(Other, Next)).
