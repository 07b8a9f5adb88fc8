%% Three nodes: what global, pg and nodeup/nodedown make of the links between them, and how the
%% end of a node or of a link is noticed on both sides.
-module(meshx_node_cluster_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        global_connects_all,
        global_names,
        global_locks,
        pg_groups,
        nodedown_by_disconnect,
        nodedown_by_net_kernel_stop,
        nodedown_by_init_stop,
        nodedown_by_sigkill,
        node_comes_back_under_its_name,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [{nodes, meshx_ct:start_all(Config1, [a, b, c])} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(_, Config) ->
    [A, B, C] = nodes_of(Config),
    ?assert(meshx_ct:connect(A, B)),
    ?assert(meshx_ct:connect(B, C)),
    is_connected([A, B, C]),
    Config.

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

nodes_of(Config) -> proplists:get_value(nodes, Config).

is_connected(Nodes) ->
    Names = [Name || #{node := Name} <- Nodes],
    [
        meshx_ct:wait([atom_to_list(Name), " to have links to all"], fun() ->
            lists:sort(Names -- [Name]) =:= lists:sort(meshx_ct:call(Node, erlang, nodes, []))
        end)
     || #{node := Name} = Node <- Nodes
    ].

%%% global and pg

%% Nobody has connected a to c: init_per_testcase has seen that they are.
global_connects_all(Config) ->
    [A, _, #{node := C}] = nodes_of(Config),
    ?assertEqual(C, meshx_ct:call(A, erpc, call, [C, erlang, node, []])).

global_names(Config) ->
    [A, B, C] = Nodes = nodes_of(Config),
    [synced(Node) || Node <- Nodes],
    Pid = meshx_ct:call(A, erlang, spawn, [timer, sleep, [infinity]]),
    ?assertEqual(yes, meshx_ct:call(A, global, register_name, [a_name, Pid])),
    Where = fun(Node) -> meshx_ct:call(Node, global, whereis_name, [a_name]) end,
    %% Pids as the control channel shows them are of one node only, so they are compared there.
    ?assertEqual(
        [maps:get(node, A), maps:get(node, A)],
        [meshx_ct:call(Node, fun() -> node(global:whereis_name(a_name)) end) || Node <- [B, C]]
    ),
    ?assertEqual(no, meshx_ct:call(C, fun() -> global:register_name(a_name, self()) end)),
    meshx_ct:call(C, fun() -> exit(global:whereis_name(a_name), kill) end),
    [meshx_ct:wait("the name to be free", fun() -> Where(Node) =:= undefined end) || Node <- Nodes].

synced(Node) ->
    ?assertEqual(ok, meshx_ct:call(Node, global, sync, [])).

%% A lock is its process's, so both attempts are one call.
global_locks(Config) ->
    [A, #{node := B}, _] = nodes_of(Config),
    meshx_ct:call(A, fun() ->
        All = [node() | nodes()],
        SetThere = fun() -> erpc:call(B, global, set_lock, [{a_lock, there}, All, 0]) end,
        true = global:set_lock({a_lock, here}, All, 0),
        false = SetThere(),
        true = global:del_lock({a_lock, here}, All),
        true = SetThere()
    end).

pg_groups(Config) ->
    Nodes = nodes_of(Config),
    [{ok, _} = meshx_ct:call(Node, fun start_pg/0) || Node <- Nodes],
    [
        ok = meshx_ct:call(Node, fun() -> pg:join(a_group, spawn(timer, sleep, [infinity])) end)
     || Node <- Nodes
    ],
    Members = fun(Node) ->
        lists:sort(meshx_ct:call(Node, fun() -> [node(Pid) || Pid <- pg:get_members(a_group)] end))
    end,
    All = lists:sort([Name || #{node := Name} <- Nodes]),
    [meshx_ct:wait("three members", fun() -> Members(Node) =:= All end) || Node <- Nodes].

%% Not linked to the caller, which ends with its call.
start_pg() ->
    {ok, Pid} = pg:start_link(),
    unlink(Pid),
    {ok, Pid}.

%%% The end of a link

nodedown_by_disconnect(Config) ->
    goes_down(Config, fun(A, #{node := Name}) ->
        ?assert(meshx_ct:call(A, erlang, disconnect_node, [Name]))
    end).

nodedown_by_net_kernel_stop(Config) ->
    goes_down(Config, fun(_, Node) -> ok = meshx_ct:call(Node, net_kernel, stop, []) end).

nodedown_by_init_stop(Config) ->
    goes_down(Config, fun(_, Node) -> meshx_ct:stop(Node) end).

nodedown_by_sigkill(Config) ->
    goes_down(Config, fun(_, Node) -> meshx_ct:kill(Node) end).

%% A watches a process of a fresh node and the other way round; both see the link's end in all
%% its forms, each once.
goes_down(Config, End) ->
    [A, B, C] = nodes_of(Config),
    Fresh = meshx_ct:net_start(meshx_ct:vm(Config, #{}), fresh),
    ?assert(meshx_ct:connect(A, Fresh)),
    is_connected([A, B, C, Fresh]),
    Ends = [watches(A, Fresh), watches(Fresh, A)],
    End(A, Fresh),
    [
        begin
            meshx_ct:wait("nodedown and the ends of its processes", fun() -> length(of_node(Node, Name)) >= 3 end),
            ?assertMatch(
                [{nodedown, Name}, {down, Pid, noconnection}, {exit, Pid, noconnection}],
                lists:sort(of_node(Node, Name))
            )
        end
     || {Node, Name, Pid} <- Ends, not meshx_ct:is_gone(Node), meshx_ct:call(Node, erlang, is_alive, [])
    ],
    ?assertNot(lists:member(maps:get(node, Fresh), meshx_ct:call(A, erlang, nodes, []))).

watches(Node, #{node := Name}) ->
    meshx_ct:call(Node, fun() ->
        Pid = erpc:call(Name, erlang, spawn, [timer, sleep, [infinity]]),
        register_pid(Pid),
        meshx_ct_there:watch([Pid])
    end),
    {Node, Name, the_pid}.

%% The pid stays there; here it is called the_pid.
register_pid(Pid) ->
    persistent_term:put(?MODULE, Pid).

of_node(Node, Name) ->
    meshx_ct:call(Node, fun() ->
        Pid = persistent_term:get(?MODULE),
        lists:flatmap(
            fun
                ({nodedown, Down}) when Down =:= Name -> [{nodedown, Name}];
                ({Kind, Ended, Reason}) when Ended =:= Pid -> [{Kind, the_pid, Reason}];
                (_) -> []
            end,
            meshx_ct_there:seen()
        )
    end).

node_comes_back_under_its_name(Config) ->
    [A | _] = nodes_of(Config),
    First = meshx_ct:start(Config, comes_back, #{}),
    ?assert(meshx_ct:connect(A, First)),
    Old = meshx_ct:call(A, erpc, call, [maps:get(node, First), os, getpid, []]),
    meshx_ct:kill(First),
    Second = meshx_ct:start(Config, comes_back, #{}),
    meshx_ct:wait("the first one's link to end", fun() ->
        not lists:member(maps:get(node, First), meshx_ct:call(A, erlang, nodes, []))
    end),
    ?assert(meshx_ct:connect(A, Second)),
    ?assertNotEqual(Old, meshx_ct:call(A, erpc, call, [maps:get(node, Second), os, getpid, []])).
