%% The same again and again: connecting and disconnecting, starting and stopping, traffic. After
%% it nodes and agent must hold what they have held before. For a suite with small numbers, for
%% make chaos with large ones.
-module(meshx_ct_cycles).

-export([connects/3, simultaneous/2, all_at_once/2, starts/3, soak/3]).

%% Cycles before anything is counted: code is loaded, allocators have their first carriers.
-define(WARM_UP, 20).
-define(WARM_UP_STARTS, 5).
%% How long nodes may take to hold no more than before, ms.
-define(RETURN_TIME, 10000).
%% Traffic before a soak begins, ms.
-define(WARM_UP_TRAFFIC, 5000).

-type config() :: [{atom(), term()}].
%% What is left: by node, what it has more than before; and what the agent has otherwise.
-type left() :: [{node() | agent, term()}].

%% Count times: one of the two connects, one of them disconnects.
-spec connects(config(), [meshx_ct:test_node()], pos_integer()) -> left().
connects(Config, [_, _] = Nodes, Count) ->
    lists:foreach(fun never/1, Nodes),
    cycle(Nodes, ?WARM_UP),
    unchanged(Config, Nodes, fun() -> cycle(Nodes, Count) end).

never(Node) ->
    meshx_ct:auto_connect(Node, never).

cycle(_Nodes, 0) ->
    ok;
cycle([A, B] = Nodes, Count) ->
    {One, Other} =
        case Count rem 2 of
            0 -> {A, B};
            1 -> {B, A}
        end,
    {Count, true} = {Count, meshx_ct:connect(One, Other)},
    %% Both know of it when a message has come back.
    pong = meshx_ct:call(One, net_adm, ping, [maps:get(node, Other)]),
    {By, From} =
        case Count rem 4 < 2 of
            true -> {A, B};
            false -> {B, A}
        end,
    true = meshx_ct:call(By, erlang, disconnect_node, [maps:get(node, From)]),
    unlinked(Nodes),
    cycle(Nodes, Count - 1).

%% net_kernel's own table: nodes/0 is empty a little earlier.
unlinked(Nodes) ->
    meshx_ct:wait("the end of the link", fun() ->
        lists:all(fun(Node) -> meshx_ct:call(Node, ets, tab2list, [sys_dist]) =:= [] end, Nodes)
    end).

%% Count times both connect at once, then one of them disconnects, and one connects again. How
%% many connects were false.
-spec simultaneous([meshx_ct:test_node()], pos_integer()) -> #{both | again => non_neg_integer()}.
simultaneous([A, B] = Nodes, Count) ->
    lists:foreach(fun never/1, Nodes),
    Rounds = [
        begin
            Both = meshx_ct:at_once([fun() -> meshx_ct:connect(A, B) end, fun() -> meshx_ct:connect(B, A) end]),
            disconnect(Nodes),
            Again = meshx_ct:connect(A, B),
            disconnect(Nodes),
            {Both, Again}
        end
     || _ <- lists:seq(1, Count)
    ],
    #{
        both => length([false || {Both, _} <- Rounds, false <- Both]),
        again => length([false || {_, false} <- Rounds])
    }.

disconnect([A, B] = Nodes) ->
    _ = meshx_ct:call(A, erlang, disconnect_node, [maps:get(node, B)]),
    meshx_ct:wait("no link", fun() ->
        lists:all(fun(Node) -> meshx_ct:call(Node, erlang, nodes, []) =:= [] end, Nodes)
    end).

%% Count times each node connects to each other one, all at once: then every pair has exactly one
%% link, all links carry messages, and none goes down before it is disconnected. How many pairs did
%% so, and how many of their connects were refused, though the next one was not.
-spec all_at_once([meshx_ct:test_node()], pos_integer()) -> #{pairs | refused := non_neg_integer()}.
all_at_once(Nodes, Count) ->
    lists:foreach(fun never/1, Nodes),
    Names = [Name || #{node := Name} <- Nodes],
    Others = [{Node, Names -- [Name]} || #{node := Name} = Node <- Nodes],
    Refused = [connect_all_at_once(Others) || _ <- lists:seq(1, Count)],
    #{pairs => Count * length(Names) * (length(Names) - 1) div 2, refused => lists:sum(Refused)}.

connect_all_at_once(Others) ->
    [meshx_ct:call(Node, meshx_ct_there, watch, [[]]) || {Node, _} <- Others],
    Refused = meshx_ct:at_once([
        fun() -> meshx_ct:call(Node, meshx_ct_there, connect, [Names]) end
     || {Node, Names} <- Others
    ]),
    [
        meshx_ct:wait("one link to each", fun() -> meshx_ct:call(Node, meshx_ct_there, one_link_to_each, [Names]) end)
     || {Node, Names} <- Others
    ],
    [{Node, []} = {Node, down(Node)} || {Node, _} <- Others],
    [[meshx_ct:call(Node, erlang, disconnect_node, [Name]) || Name <- Names] || {Node, Names} <- Others],
    unlinked([Node || {Node, _} <- Others]),
    %% The emulator may say so later, which must not be taken for the next round's.
    [meshx_ct:wait("nodedown of each", fun() -> Names -- down(Node) =:= [] end) || {Node, Names} <- Others],
    lists:sum(Refused).

%% Of which nodes the watcher has seen that they are down.
down(Node) ->
    [Name || {nodedown, Name} <- meshx_ct:call(Node, meshx_ct_there, seen, [])].

%% Count times a VM becomes a node, to which Peer connects, and no node again.
-spec starts(config(), [meshx_ct:test_node()], pos_integer()) -> left().
starts(Config, [Vm, Peer], Count) ->
    never(Peer),
    start_and_stop(Vm, Peer, ?WARM_UP_STARTS),
    unchanged(Config, [Vm, Peer], fun() -> start_and_stop(Vm, Peer, Count) end).

start_and_stop(_Vm, _Peer, 0) ->
    ok;
start_and_stop(Vm, Peer, Count) ->
    Node = meshx_ct:net_start(Vm, cycled),
    {Count, true} = {Count, meshx_ct:connect(Peer, Node)},
    ok = meshx_ct:call(Vm, net_kernel, stop, []),
    unlinked([Peer]),
    start_and_stop(Vm, Peer, Count - 1).

%% Mixed traffic between all nodes for a time. All must have been answered to the end, and nothing
%% have come back wrong.
-spec soak(config(), [meshx_ct:test_node()], Milliseconds :: pos_integer()) -> left().
soak(Config, Nodes, Time) ->
    Names = [Name || #{node := Name} <- Nodes],
    lists:foreach(fun(Node) -> meshx_ct:auto_connect(Node, always) end, Nodes),
    traffic(Nodes, Names, ?WARM_UP_TRAFFIC),
    unchanged(Config, Nodes, fun() -> traffic(Nodes, Names, Time) end).

traffic(Nodes, Names, Time) ->
    Begin = os:system_time(millisecond),
    [ok = meshx_ct:call(Node, meshx_ct_traffic, start, [Names -- [Name]]) || #{node := Name} = Node <- Nodes],
    timer:sleep(Time),
    End = os:system_time(millisecond),
    meshx_ct:wait("an answer to everyone", fun() ->
        lists:all(fun(Node) -> answered(Node, Names, End) end, Nodes)
    end),
    [
        begin
            {Name, []} = {Name, meshx_ct:call(Node, meshx_ct_traffic, wrong, [])},
            {Name, []} = {Name, meshx_ct:call(Node, meshx_ct_traffic, downs, [Begin])},
            ok = meshx_ct:call(Node, meshx_ct_traffic, stop, [])
        end
     || #{node := Name} = Node <- Nodes
    ],
    ok.

answered(#{node := Name} = Node, Names, Since) ->
    Answered = meshx_ct:call(Node, meshx_ct_traffic, answered, []),
    lists:all(fun(Other) -> maps:get(Other, Answered, 0) >= Since end, Names -- [Name]).

%% Runs Fun; what nodes and agent have after it that they did not have before.
unchanged(Config, Nodes, Fun) ->
    Agent = proplists:get_value(agent, Config),
    Registered = registered(Agent),
    Taken = [{Node, meshx_ct_resources:taken(Node)} || Node <- Nodes],
    ok = Fun(),
    More = [
        {Name, More}
     || {#{node := Name} = Node, Before} <- Taken,
        [_ | _] = More <- [meshx_ct_resources:returns(Node, Before, ?RETURN_TIME)]
    ],
    case registered(Agent) of
        Registered -> More;
        Other -> [{agent, {Registered, Other}} | More]
    end.

%% IDs of services and checks.
registered(Agent) ->
    {
        lists:sort(maps:keys(meshx_ct_agent:services(Agent))),
        lists:sort(maps:keys(meshx_ct_agent:get(Agent, "/v1/agent/checks")))
    }.
