%% The control plane as a cluster grows: N nodes that are up, each of which connects to the first
%% at the same moment; global makes the full mesh of that. How long until every node has all
%% others, how often the agent was asked for it and is asked by a mesh that rests, and what nodes
%% and sidecars hold then. Last, how soon a shell on the same host is of use.
%%
%% A node counts its own requests; the agent counts all it has served, those of the sidecars and
%% blocking queries that have ended among them. Requests are counted from the first connect until
%% the mesh has settled, a heartbeat or two among them.
-module(meshx_bench_control).

-behaviour(meshx_bench).

-export([title/0, rounds/0, carriers/0, figures/0, ratios/0, steps/0, open/3, measure/2, close/1, derive/1]).
%% in the nodes' VMs
-export([join/2]).

-define(NODES, [2, 5, 10, 20]).
%% Nodes that are booted at the same time.
-define(AT_ONCE, 4).
%% So many VMs have few processors each, and little to do.
-define(SMALL, ["+S", "1:1", "+SDcpu", "1:1", "+SDio", "1", "+A", "1"]).
%% Milliseconds: what new nodes, or a new mesh, have still to ask; then a look at it that has two heartbeats in it.
-define(SETTLE, 2000).
-define(REST, 10000).
-define(SHELLS, 5).

-define(FIGURES, [
    {mesh, "ms", "full mesh of ~b nodes"},
    {started, "", "a node's requests before, of ~b"},
    {requests, "", "its requests for the mesh, of ~b"},
    {agent, "", "the same with its sidecar's, of ~b"},
    {idle, "1/s", "requests of a node at rest, of ~b"},
    {agent_idle, "1/s", "the same with its sidecar's, of ~b"},
    {memory, "MiB", "memory of a node of ~b"},
    {descriptors, "", "its descriptors, of ~b"},
    {sidecar_memory, "MiB", "memory of a sidecar of ~b"},
    {sidecar_descriptors, "", "its descriptors, of ~b"}
]).

%% What one link more costs, from the smallest mesh to the largest.
-define(PER_LINK, [
    {memory, "KiB", 1024, "memory of a node per link"},
    {descriptors, "", 1, "its descriptors per link"},
    {sidecar_memory, "KiB", 1024, "memory of a sidecar per link"},
    {sidecar_descriptors, "", 1, "its descriptors per link"}
]).

-type subject() :: {meshx_bench:config(), meshx_bench:carrier(), Round :: pos_integer()}.

-spec title() -> string().
title() ->
    "Full meshes and shells".

-spec rounds() -> pos_integer().
rounds() ->
    1.

-spec carriers() -> [meshx_bench:carrier()].
carriers() ->
    [inet_tcp, sidecars].

-spec ratios() -> [{meshx_bench:carrier(), meshx_bench:carrier()}].
ratios() ->
    [{sidecars, inet_tcp}].

-spec figures() -> [meshx_bench:figure()].
figures() ->
    [
        {key(What, Count), Unit, io_lib:format(Text, [Count])}
     || {What, Unit, Text} <- ?FIGURES, Count <- ?NODES
    ] ++
        [{key(What, link), Unit, Text} || {What, Unit, _, Text} <- ?PER_LINK] ++
        [
            {shell_rpc, "ms", "erl -sname undefined to first rpc"},
            {shell_named_rpc, "ms", "erl -dist_listen false to first rpc"},
            {shell_prompt, "ms", "erl -remsh to prompt"}
        ].

-spec steps() -> [atom()].
steps() ->
    [key(nodes, Count) || Count <- ?NODES] ++ [shells].

key(What, Count) ->
    list_to_atom(lists:concat([What, "_", Count])).

-spec open(meshx_bench:config(), meshx_bench:carrier(), pos_integer()) -> subject().
open(Config, Carrier, Round) ->
    {Config, Carrier, Round}.

-spec close(subject()) -> ok.
close(_) ->
    ok.

-spec measure(atom(), subject()) -> meshx_bench:measured().
measure(shells, Subject) ->
    shells(Subject);
measure(Step, Subject) ->
    [Count] = [Count || Count <- ?NODES, key(nodes, Count) =:= Step],
    maps:from_list([{key(What, Count), Values} || {What, Values} <- mesh(Count, Subject)]).

-spec derive(meshx_bench:measured()) -> meshx_bench:measured().
derive(Measured) ->
    {Least, Most} = {hd(?NODES), lists:last(?NODES)},
    maps:from_list([
        {key(What, link), [(mean(Many) - mean(Few)) * Factor / (Most - Least)]}
     || {What, _, Factor, _} <- ?PER_LINK,
        Few <- [maps:get(key(What, Least), Measured, none)],
        Many <- [maps:get(key(What, Most), Measured, none)],
        is_list(Few),
        is_list(Many)
    ]).

mean(Numbers) ->
    lists:sum(Numbers) / length(Numbers).

%%% Meshes

mesh(Count, {Config, Carrier, _} = Subject) ->
    Agent = proplists:get_value(agent, Config),
    Nodes = start(Config, names(Subject, Count), options(Subject)),
    timer:sleep(?SETTLE),
    Before = {requests(Carrier, Nodes), served(Agent)},
    Time = connect_all(Nodes),
    timer:sleep(?SETTLE),
    Asked = asked(Carrier, Agent, Before, Nodes),
    Pids = [meshx_ct_proc:pid(Process) || #{process := Process} <- Nodes],
    Sidecars = [meshx_ct_proc:pid(meshx_ct:sidecar(Node)) || Node <- Nodes, Carrier =:= sidecars],
    Held = [
        {memory, [meshx_bench_os:resident(Pid) || Pid <- Pids]},
        {descriptors, [meshx_bench_os:descriptors(Pid) || Pid <- Pids]},
        {sidecar_memory, [meshx_bench_os:resident(Pid) || Pid <- Sidecars]},
        {sidecar_descriptors, [meshx_bench_os:descriptors(Pid) || Pid <- Sidecars]}
    ],
    meshx_bench_pair:stop(Nodes),
    [{mesh, [Time]} | Asked ++ [Of || {_, [_ | _]} = Of <- Held]].

%% What was asked of the agent since Before, and what is asked while nothing happens.
asked(sidecars, Agent, {Started, StartedServed}, Nodes) ->
    Made = requests(sidecars, Nodes),
    MadeServed = served(Agent),
    timer:sleep(?REST),
    Rested = requests(sidecars, Nodes),
    RestedServed = served(Agent),
    Seconds = ?REST / 1000,
    [
        {started, Started},
        {requests, lists:zipwith(fun erlang:'-'/2, Made, Started)},
        {agent, [(MadeServed - StartedServed) / length(Nodes)]},
        {idle, [(Later - Earlier) / Seconds || {Earlier, Later} <- lists:zip(Made, Rested)]},
        {agent_idle, [(RestedServed - MadeServed) / Seconds / length(Nodes)]}
    ];
asked(_, _, _, _) ->
    [].

names({_, Carrier, Round}, Count) ->
    [list_to_atom(lists:concat(["n", N, "_", Carrier, "_", Count, "_", Round])) || N <- lists:seq(1, Count)].

%% Unlike pairs', these nodes connect by themselves when there is something to send.
options({Config, Carrier, _}) ->
    (meshx_bench_pair:options(Config, Carrier, #{}))#{
        args := ["-kernel", "net_setuptime", "60" | ?SMALL]
    }.

start(_Config, [], _Options) ->
    [];
start(Config, Names, Options) ->
    {Now, Later} = lists:split(min(?AT_ONCE, length(Names)), Names),
    meshx_ct:start_all(Config, Now, Options) ++ start(Config, Later, Options).

%% Milliseconds from the first one's call to the last one's last link.
connect_all([#{node := First} | _] = Nodes) ->
    Self = self(),
    Callers = [
        spawn_monitor(fun() ->
            Self ! {self(), meshx_ct:call(Node, ?MODULE, join, [First, length(Nodes)])}
        end)
     || Node <- Nodes
    ],
    Times = [
        receive
            {Pid, Time} -> demonitor(Monitor, [flush]) andalso Time;
            {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
        end
     || {Pid, Monitor} <- Callers
    ],
    {Begins, Ends} = lists:unzip(Times),
    (lists:max(Ends) - lists:min(Begins)) / 1000.

%% Connects to First and waits until there are so many nodes. When it began and ended, by the
%% host's clock, microseconds.
-spec join(node(), pos_integer()) -> {integer(), integer()}.
join(First, Count) ->
    ok = net_kernel:monitor_nodes(true),
    Begin = os:system_time(microsecond),
    First =:= node() orelse (true = net_kernel:connect_node(First)),
    await(Count - 1),
    End = os:system_time(microsecond),
    ok = net_kernel:monitor_nodes(false),
    {Begin, End}.

await(Others) ->
    length(nodes()) >= Others orelse
        receive
            {nodeup, _} -> await(Others);
            {nodedown, _} -> await(Others)
        end.

requests(sidecars, Nodes) ->
    [
        begin
            {ok, Requests} = meshx_ct:call(Node, meshx_node, info, [requests]),
            Requests
        end
     || Node <- Nodes
    ];
requests(_, _) ->
    [].

%% All requests this agent has answered.
served(Agent) ->
    {200, Text} = meshx_ct_agent:request(Agent, "GET", "/v1/agent/metrics?format=prometheus", <<>>),
    {match, Counts} = re:run(Text, "^consul_http_[A-Z]+_\\S*_count(?:{[^}]*})? ([0-9.e+]+)", [
        multiline, global, {capture, all_but_first, list}
    ]),
    lists:sum([number(Count) || [Count] <- Counts]).

number(Text) ->
    try
        list_to_integer(Text)
    catch
        error:badarg -> round(list_to_float(Text))
    end.

%%% Shells, at a node of their host

shells({Config, Carrier, Round} = Subject) ->
    Name = list_to_atom(lists:concat(["target_", Carrier, "_", Round])),
    #{node := Target} = Node = meshx_ct:start(Config, Name, options(Subject)),
    Count = lists:seq(1, ?SHELLS),
    Times = #{
        shell_rpc => [rpc(Subject, Target, ["-sname", "undefined"]) || _ <- Count],
        shell_named_rpc => [
            rpc(Subject, Target, ["-sname", lists:concat(["shell", N]), "-dist_listen", "false"])
         || N <- Count
        ],
        shell_prompt => [prompt(Subject, Target) || _ <- Count]
    },
    meshx_bench_pair:stop([Node]),
    Times.

%% From exec to the first answer, by the host's clock.
rpc({Config, Carrier, _}, Target, Naming) ->
    Expression = io_lib:format(
        "true = net_kernel:connect_node(~0p), ~0p = erpc:call(~0p, erlang, node, []), "
        "io:put_chars(integer_to_list(os:system_time(microsecond))), halt().",
        [Target, Target, Target]
    ),
    Options = (meshx_bench_pair:options(Config, Carrier, #{}))#{args := Naming},
    Begin = os:system_time(microsecond),
    {0, Printed} = meshx_ct:erl(Config, ["-eval", lists:flatten(Expression)], Options),
    (binary_to_integer(Printed) - Begin) / 1000.

prompt({Config, Carrier, _}, Target) ->
    #{carrier := Module, env := Environment} = meshx_bench_pair:options(Config, Carrier, #{}),
    Ebin = filename:absname(filename:dirname(code:which(meshx_node_dist))),
    Command = [
        ["erl -pa ", Ebin, " -proto_dist ", Module, " -start_epmd false -setcookie meshx_ct_cookie"],
        [" -sname undefined -remsh ", atom_to_list(Target)]
    ],
    Agent = proplists:get_value(agent, Config),
    Begin = os:system_time(microsecond),
    %% At a dumb terminal erl has only its old shell, which knows no -remsh.
    Terminal = meshx_ct_terminal:open(lists:append(lists:append(Command)), "/", [
        {"TERM", "xterm"} | meshx_ct:environment(Agent, #{env => Environment})
    ]),
    meshx_ct_terminal:expect(Terminal, ["^\\(", atom_to_list(Target), "\\)1> "]),
    End = os:system_time(microsecond),
    unlink(Terminal),
    exit(Terminal, shutdown),
    (End - Begin) / 1000.
