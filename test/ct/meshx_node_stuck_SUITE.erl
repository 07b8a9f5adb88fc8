%% A VM that can't run for a while: its checks go critical within the TTL, and when it runs again
%% it is as it was, without help.
-module(meshx_node_stuck_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(TTL, 3000).

all() ->
    [
        stopped,
        all_schedulers_busy,
        suspended_until_it_was_forgotten,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

pair(Config) ->
    Options = #{env => [{"MESHX_TTL", integer_to_list(?TTL)}]},
    [Stuck, Other] = meshx_ct:start_all(Config, [stuck, other], Options#{scope => 'case'}),
    ?assert(meshx_ct:connect(Stuck, Other)),
    ?assert(is_healthy(Stuck)),
    {Stuck, Other}.

is_healthy(#{agent := Agent, node := Name}) ->
    meshx_ct_agent:healthy(Agent, atom_to_binary(Name)) =/= [].

%% One second more than the TTL for what the agent and a busy machine take.
goes_critical(Node) ->
    meshx_ct:wait("its checks to go critical", fun() -> not is_healthy(Node) end, ?TTL + 1000).

recovers(Node) ->
    meshx_ct:wait("its checks to pass again", fun() -> is_healthy(Node) end, ?TTL).

is_linked(#{node := Name}, Other) ->
    ?assertEqual([Name], meshx_ct:call(Other, erlang, nodes, [])),
    ?assertEqual(Name, meshx_ct:call(Other, erpc, call, [Name, erlang, node, []])).

stopped(Config) ->
    {#{process := Process} = Stuck, #{node := OtherName} = Other} = pair(Config),
    Before = meshx_ct:watch(Stuck),
    Registrations = meshx_ct:call(Stuck, meshx_node, info, [registrations]),
    meshx_ct_proc:signal(Process, "STOP"),
    goes_critical(Stuck),
    ?assertMatch({error, {node_unhealthy, _}}, meshx_ct:call(Other, meshx_node, explain, [maps:get(node, Stuck)])),
    meshx_ct_proc:signal(Process, "CONT"),
    recovers(Stuck),
    is_linked(Stuck, Other),
    ?assertEqual(ok, meshx_ct:call(Stuck, meshx_node, explain, [OtherName])),
    ?assertEqual(lists:sort(Before), lists:sort(meshx_ct:watch(Stuck))),
    ?assertEqual(Registrations, meshx_ct:call(Stuck, meshx_node, info, [registrations])).

%% The control thread runs on, so the checks don't just expire: they are failed, and the log says so.
all_schedulers_busy(Config) ->
    {Stuck, Other} = pair(Config),
    Mark = meshx_ct:mark(Stuck),
    meshx_ct:call(Stuck, ?MODULE, be_busy, [2 * ?TTL]),
    goes_critical(Stuck),
    meshx_ct:wait("the end of it", fun() -> is_healthy(Stuck) end, 4 * ?TTL),
    is_linked(Stuck, Other),
    meshx_ct:wait("the line", fun() -> meshx_ct:has_line(Stuck, Mark, "answers again") end),
    [Began, Ended] = meshx_ct:own_lines(Stuck, Mark),
    ?assertMatch({match, _}, re:run(Began, "^warning: .*the VM of stuck@.* has not answered for [0-9]+ ms")),
    ?assertMatch({match, _}, re:run(Ended, "^notice: .*the VM of stuck@.* answers again")).

%% No process of another priority gets a scheduler meanwhile.
be_busy(Time) ->
    Until = erlang:monotonic_time(millisecond) + Time,
    [
        spawn_opt(fun() -> spin(Until) end, [{priority, max}])
     || _ <- lists:seq(1, 4 * erlang:system_info(schedulers_online))
    ],
    ok.

spin(Until) ->
    erlang:monotonic_time(millisecond) < Until andalso spin(Until).

%% As a host that sleeps: nothing of the node runs, and the agent, which does, drops the service.
%% That takes it a minute or two; here it is told to.
suspended_until_it_was_forgotten(Config) ->
    {#{process := Process, agent := Agent, node := Name} = Stuck, Other} = pair(Config),
    Processes = [Process | meshx_ct:watch(Stuck)],
    Mark = meshx_ct:mark(Stuck),
    [meshx_ct_proc:signal(Each, "STOP") || Each <- Processes],
    goes_critical(Stuck),
    Id = uri_string:quote(atom_to_binary(Name)),
    {200, _} = meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", Id], <<>>),
    timer:sleep(500),
    [meshx_ct_proc:signal(Each, "CONT") || Each <- lists:reverse(Processes)],
    meshx_ct:wait("to be registered and healthy again", fun() -> is_healthy(Stuck) end, ?TTL + 2000),
    ?assert(meshx_ct:has_line(Stuck, Mark, "^notice: .*is registered again")),
    is_linked(Stuck, Other),
    Third = meshx_ct:start(Config, third, #{}),
    meshx_ct:wait("others to reach it", fun() -> meshx_ct:connect(Third, Stuck) end).
