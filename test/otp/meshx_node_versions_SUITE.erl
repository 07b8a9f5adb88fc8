%% Nodes of different OTP releases talk to each other: one of the VM that runs this suite, one of
%% the erl that MESHX_CT_OTHER_ERL names (make test-otp). Everything happens in both directions.
%%
%% What runs on the nodes are exported functions: a fun is of the module that its compiler made, and
%% each release has compiled its own.
-module(meshx_node_versions_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(MIB, 1048576).

all() ->
    [
        releases_differ,
        connect,
        rpc_and_erpc,
        terms_of_all_kinds,
        large_messages,
        messages_in_order,
        links_and_monitors,
        global_names,
        nodedown_by_disconnect,
        nodedown_by_init_stop,
        nodedown_by_sigkill,
        nothing_is_left
    ].

init_per_suite(Config) ->
    case os:getenv("MESHX_CT_OTHER_ERL") of
        false ->
            {skip, "MESHX_CT_OTHER_ERL names no erl of another release"};
        Erl ->
            Config1 = [{erl, Erl} | meshx_ct:init_suite(Config)],
            Own = meshx_ct:start(Config1, own, #{scope => suite}),
            Other = meshx_ct:start(Config1, other, #{scope => suite, erl => Erl}),
            [{pairs, [{Own, Other}, {Other, Own}]} | Config1]
    end.

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(_, Config) ->
    [{Own, Other}, _] = pairs(Config),
    ?assert(meshx_ct:connect(Own, Other)),
    Config.

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%% Runs a case's part on either node, with the other's name.
both(Config, Function) ->
    [
        ?assertEqual(ok, meshx_ct:call(Node, ?MODULE, Function, [Other]))
     || {Node, #{node := Other}} <- pairs(Config)
    ].

pairs(Config) -> proplists:get_value(pairs, Config).

%%% Links

releases_differ(Config) ->
    Releases = [
        meshx_ct:call(Node, erlang, system_info, [otp_release])
     || {Node, _} <- pairs(Config)
    ],
    ct:comment("~0tp", [Releases]),
    ?assertMatch([_, _], lists:usort(Releases)).

%% After a disconnect, dialled by either.
connect(Config) ->
    [meshx_ct:auto_connect(Node, never) || {Node, _} <- pairs(Config)],
    [
        begin
            disconnect(Node, Other),
            ?assert(meshx_ct:connect(Node, Other)),
            ?assertEqual(pong, meshx_ct:call(Node, net_adm, ping, [maps:get(node, Other)])),
            ?assertEqual([maps:get(node, Other)], meshx_ct:call(Node, erlang, nodes, [])),
            ?assertEqual([maps:get(node, Node)], meshx_ct:call(Other, erlang, nodes, []))
        end
     || {Node, Other} <- pairs(Config)
    ],
    [meshx_ct:auto_connect(Node, always) || {Node, _} <- pairs(Config)].

disconnect(Node, #{node := Name} = Other) ->
    _ = meshx_ct:call(Node, erlang, disconnect_node, [Name]),
    [
        meshx_ct:wait("the link's end", fun() -> meshx_ct:call(Each, erlang, nodes, []) =:= [] end)
     || Each <- [Node, Other]
    ].

%%% Calls and data

rpc_and_erpc(Config) -> both(Config, calls).

calls(Other) ->
    Other = rpc:call(Other, erlang, node, []),
    {badrpc, {'EXIT', {oops, _}}} = rpc:call(Other, erlang, error, [oops]),
    Other = erpc:call(Other, erlang, node, []),
    ?assertError({exception, oops, _}, erpc:call(Other, erlang, error, [oops])),
    ?assertError({erpc, timeout}, erpc:call(Other, timer, sleep, [60000], 50)),
    Here = node(),
    [{ok, Other}, {ok, Here}] = erpc:multicall([Other, Here], erlang, node, []),
    ok.

terms_of_all_kinds(Config) -> both(Config, terms).

%% Each comes back as it went, and is the same there.
terms(Other) ->
    Pid = erpc:call(Other, erlang, spawn, [timer, sleep, [infinity]]),
    Atoms = [list_to_atom(lists:concat(["meshx_ct_atom_", N])) || N <- lists:seq(1, 3000)],
    Terms = [
        Pid,
        self(),
        make_ref(),
        hd(erlang:ports()),
        alias(),
        fun lists:map/2,
        '\x{43c}\x{435}\x{448}',
        1.5,
        -(1 bsl 500),
        <<5:3>>,
        #{{} => [], [improper | list] => #{}},
        Atoms,
        maps:from_list([{Atom, {N, [N, "text"]}} || {N, Atom} <- lists:enumerate(Atoms)])
    ],
    [
        begin
            ?assertEqual(Term, erpc:call(Other, ?MODULE, same, [Term])),
            ?assertEqual(erlang:phash2(Term), erpc:call(Other, erlang, phash2, [Term]))
        end
     || Term <- Terms
    ],
    exit(Pid, kill),
    ok.

same(Term) -> Term.

large_messages(Config) -> both(Config, large).

large(Other) ->
    Source = iolist_to_binary([meshx_ct_there:chunk(N) || N <- lists:seq(1, 64)]),
    [
        begin
            Binary = binary:part(Source, 0, Size),
            Hash = erlang:md5(Binary),
            Hash = erpc:call(Other, erlang, md5, [Binary]),
            Hash = erlang:md5(erpc:call(Other, ?MODULE, same, [Binary]))
        end
     || Size <- [0, 1, 65535, 65536, 65537, ?MIB, 64 * ?MIB]
    ],
    Tuples = [{N, [N, "text", {N}]} || N <- lists:seq(1, 200000)],
    true = Tuples =:= erpc:call(Other, ?MODULE, same, [Tuples]),
    ok.

messages_in_order(Config) -> both(Config, in_order).

in_order(Other) ->
    Last = 100000,
    Counter = spawn(Other, meshx_ct_there, counted, [self(), Last]),
    Monitor = monitor(process, Counter),
    meshx_ct_there:count_up(Counter, Last),
    receive
        {Counter, counted} -> ok;
        {'DOWN', Monitor, process, Counter, Reason} -> Reason
    after 60000 -> timeout
    end.

%%% Processes

links_and_monitors(Config) -> both(Config, ends).

ends(Other) ->
    process_flag(trap_exit, true),
    [
        begin
            Pid = spawn_link(Other, ?MODULE, ends_with, [self()]),
            Monitor = monitor(process, Pid),
            Pid ! {go, Reason},
            Reason = receive {'EXIT', Pid, ByLink} -> ByLink after 10000 -> timeout end,
            Reason = receive {'DOWN', Monitor, process, Pid, ByMonitor} -> ByMonitor after 10000 -> timeout end
        end
     || Reason <- [normal, shutdown, {shutdown, {some, [term]}}, killed, lists:duplicate(1000, <<"big">>)]
    ],
    {Killed, Killing} = spawn_monitor(Other, timer, sleep, [infinity]),
    exit(Killed, kill),
    killed = receive {'DOWN', Killing, process, Killed, ByKill} -> ByKill after 10000 -> timeout end,
    Request = spawn_request(Other, erlang, send, [self(), spawned], [monitor]),
    ok = receive {spawn_reply, Request, ok, _} -> ok after 10000 -> timeout end,
    ok = receive spawned -> ok after 10000 -> timeout end,
    normal = receive {'DOWN', Request, process, _, BySpawn} -> BySpawn after 10000 -> timeout end,
    process_flag(trap_exit, false),
    ok.

ends_with(_) ->
    receive
        {go, Reason} -> exit(Reason)
    end.

%% Not pg: that of OTP 25 crashes when it hears of one of OTP 29, whatever the carrier.
global_names(Config) -> both(Config, names).

names(Other) ->
    ok = global:sync(),
    Pid = spawn(timer, sleep, [infinity]),
    yes = global:register_name(meshx_ct_name, Pid),
    Pid = erpc:call(Other, global, whereis_name, [meshx_ct_name]),
    exit(Pid, kill),
    meshx_ct:wait("the name to be free", fun() ->
        undefined =:= erpc:call(Other, global, whereis_name, [meshx_ct_name])
    end).

%%% The end of a link

nodedown_by_disconnect(Config) ->
    goes_down(Config, fun(Node, #{node := Name}) ->
        true = meshx_ct:call(Node, erlang, disconnect_node, [Name])
    end).

nodedown_by_init_stop(Config) ->
    goes_down(Config, fun(_, Fresh) -> meshx_ct:stop(Fresh) end).

nodedown_by_sigkill(Config) ->
    goes_down(Config, fun(_, Fresh) -> meshx_ct:kill(Fresh) end).

%% A node watches a process of a fresh one of the other release, which comes to its end.
goes_down(Config, End) ->
    Erls = [#{erl => proplists:get_value(erl, Config)}, #{}],
    [
        begin
            Fresh = #{node := Name} = meshx_ct:start(Config, fresh, Options),
            ?assert(meshx_ct:connect(Node, Fresh)),
            meshx_ct:call(Node, ?MODULE, watch, [Name]),
            End(Node, Fresh),
            meshx_ct:wait("nodedown and the ends of its process", fun() -> length(seen(Node, Name)) >= 3 end),
            ?assertMatch(
                [{nodedown, Name}, {down, _, noconnection}, {exit, _, noconnection}],
                lists:sort(seen(Node, Name))
            ),
            meshx_ct:is_gone(Fresh) orelse meshx_ct:stop(Fresh)
        end
     || {{Node, _}, Options} <- lists:zip(pairs(Config), Erls)
    ].

watch(Name) ->
    Pid = erpc:call(Name, erlang, spawn, [timer, sleep, [infinity]]),
    meshx_ct_there:watch([Pid]).

seen(Node, Name) ->
    [
        Event
     || Event <- meshx_ct:call(Node, meshx_ct_there, seen, []),
        Event =:= {nodedown, Name} orelse lists:member(element(1, Event), [down, exit])
    ].
