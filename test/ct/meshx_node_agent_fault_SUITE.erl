%% An agent that is slow, busy, broken or without a leader: links don't notice, the node goes on
%% asking at growing intervals, says once what is wrong and once that it is over, and nothing is
%% registered or started twice. A start meanwhile fails in time and leaves nothing.
%%
%% The agent is a real one; a relay between it and the node does the harm.
-module(meshx_node_agent_fault_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% Short, so that a fault outlasts heartbeats.
-define(TTL, 3000).
-define(FAULT_TIME, 2000).

all() ->
    [
        answers_429,
        answers_500,
        answers_503,
        cut_after_the_request,
        garbage,
        endless_body,
        length_too_long,
        part_of_a_document,
        faults_that_take_turns,
        blocking_queries_alone,
        slow,
        start_during_faults,
        start_during_slowness,
        start_that_outlasts_a_fault,
        registration_done_but_not_acknowledged,
        upstream_done_but_not_acknowledged,
        no_leader,
        leader_lost,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    Relay = meshx_ct_relay:start(proplists:get_value(agent, Config1)),
    A = meshx_ct:start(Config1, a, (through(Relay, Config1))#{scope => suite}),
    B = meshx_ct:start(Config1, b, #{scope => suite}),
    [{relay, Relay}, {a, A}, {b, B} | Config1].

end_per_suite(Config) ->
    meshx_ct:end_suite(Config).

end_per_testcase(_, Config) ->
    meshx_ct_relay:set(proplists:get_value(relay, Config), pass),
    meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%% Options of a node whose requests, but not those of its sidecar, go by way of the relay.
through(Relay, Config) ->
    Direct = "CONSUL_HTTP_ADDR=" ++ meshx_ct_agent:url(proplists:get_value(agent, Config)),
    #{
        env => [
            {"CONSUL_HTTP_ADDR", meshx_ct_relay:address(Relay)},
            {"MESHX_SIDECAR_ENV", Direct},
            {"MESHX_TTL", integer_to_list(?TTL)}
        ]
    }.

actors(Config) ->
    list_to_tuple([proplists:get_value(Key, Config) || Key <- [relay, a, b]]).

%%% A running node

answers_429(Config) -> fault(Config, {answer, 429}, " 429 .*http_max_conns_per_client").
answers_500(Config) -> fault(Config, {answer, 500}, " 500 the relay says 500").
answers_503(Config) -> fault(Config, {answer, 503}, " 503 ").
cut_after_the_request(Config) -> fault(Config, cut, "broke the connection").
garbage(Config) -> fault(Config, garbage, "not HTTP").
endless_body(Config) -> fault(Config, endless, "larger than 16 MiB").
length_too_long(Config) -> fault(Config, {length, 100}, "broke the connection").

fault(Config, Action, Pattern) ->
    {Relay, #{agent := Agent, node := Name} = A, B} = actors(Config),
    {Mark, Before} = begin_watch(A, B),
    meshx_ct_relay:forget_requests(Relay),
    meshx_ct_relay:set(Relay, Action),
    timer:sleep(?FAULT_TIME),
    Requests = meshx_ct_relay:requests(Relay),
    meshx_ct_relay:set(Relay, pass),
    well_within_2_s(A),
    %% One line when it began, one when it ended.
    [Began, Ended] = settled_lines(A, Mark),
    matches(Began, ["^warning: meshx_node: .*", meshx_ct_relay:address(Relay), ".*", Pattern, ".*; trying again$"]),
    matches(Ended, ["^notice: meshx_node: the agent at .* works again after [0-9]+ ms$"]),
    %% The pauses grow from 50 ms to a second, each for two checks of which curl may send again.
    ?assert(length(Requests) >= 4),
    ?assert(length(Requests) =< 50),
    same_as_before(A, B, Before),
    ?assertEqual([<<(atom_to_binary(Name))/binary, "-sidecar-proxy">>], meshx_ct_agent:healthy(Agent, atom_to_binary(Name))).

%% All that a fault must not touch: links, sidecar, registration.
begin_watch(A, #{node := NameB} = B) ->
    ?assert(meshx_ct:connect(A, B)),
    meshx_ct:call(A, ?MODULE, begin_flow, [NameB]),
    {meshx_ct:mark(A), counts(A)}.

same_as_before(A, #{node := NameB}, Before) ->
    {Count, MaxGap} = meshx_ct:call(A, ?MODULE, end_flow, []),
    ?assert(Count > 20),
    %% A stall of the machine's, not of the agent's 10 s.
    ?assert(MaxGap < 5000),
    ?assertEqual([NameB], meshx_ct:call(A, erlang, nodes, [])),
    ?assertEqual(Before, counts(A)),
    ?assertMatch([_, _], meshx_ct:watch(A)).

counts(A) ->
    {ok, Info} = meshx_ct:call(A, meshx_node, info, []),
    maps:with([sidecar_pid, sidecar_starts, registrations, repairs, upstreams], Info).

well_within_2_s(#{agent := Agent, node := Name} = A) ->
    meshx_ct:wait(
        "the agent to be used again",
        fun() ->
            {ok, Failures} = meshx_ct:call(A, meshx_node, info, [request_failures]),
            meshx_ct_agent:healthy(Agent, atom_to_binary(Name)) =/= [] andalso
                begin
                    timer:sleep(100),
                    {ok, Failures} =:= meshx_ct:call(A, meshx_node, info, [request_failures])
                end
        end,
        2000
    ).

%% Our own lines, when none has come for a heartbeat.
settled_lines(Node, Mark) ->
    meshx_ct:wait("the fault's end in the log", fun() -> meshx_ct:has_line(Node, Mark, "works again") end),
    timer:sleep(?TTL div 3 + 200),
    meshx_ct:own_lines(Node, Mark).

matches(Line, Pattern) ->
    ?assertEqual({Line, match}, {Line, re:run(Line, Pattern, [unicode, {capture, none}])}).

%% Run on A: sends a number every 20 ms and has it sent back, notes how long that took.
begin_flow(Node) ->
    Pid = spawn(fun() ->
        register(?MODULE, self()),
        flow(spawn(Node, ?MODULE, echo, []), 0, 0)
    end),
    monitor(process, Pid),
    ok.

echo() ->
    receive
        {From, N} ->
            From ! {self(), N},
            echo()
    end.

flow(Echo, Count, MaxGap) ->
    Begin = erlang:monotonic_time(millisecond),
    Echo ! {self(), Count},
    receive
        {Echo, Count} -> ok
    end,
    Gap = max(MaxGap, erlang:monotonic_time(millisecond) - Begin),
    receive
        {stop, From, Ref} ->
            exit(Echo, kill),
            From ! {Ref, {Count, Gap}}
    after 20 ->
        flow(Echo, Count + 1, Gap)
    end.

end_flow() ->
    Ref = make_ref(),
    ?MODULE ! {stop, self(), Ref},
    receive
        {Ref, Result} -> Result
    after 5000 -> error(no_answer_over_the_link)
    end.

%% To a PUT the status is all the answer; a lookup names the trouble and works afterwards. Blocking
%% queries, which meet it too, may have told of it: that depends on how long this takes.
part_of_a_document(Config) ->
    {Relay, A, #{node := NameB} = B} = actors(Config),
    {Mark, Before} = begin_watch(A, B),
    [
        begin
            meshx_ct_relay:set(Relay, Action),
            {error, {agent_answer, Text}} = meshx_ct:call(A, meshx_node, explain, [NameB]),
            matches(Text, [meshx_ct_relay:address(Relay), ".*(JSON|broke the connection)"])
        end
     || Action <- [{body, <<"[{\"Node\": {\"Node\": \"x">>}, cut_answer]
    ],
    meshx_ct_relay:set(Relay, pass),
    ?assertEqual(ok, meshx_ct:call(A, meshx_node, explain, [NameB])),
    timer:sleep(?TTL div 3),
    Others = [Line || Line <- meshx_ct:own_lines(A, Mark), nomatch =:= binary:match(Line, <<"blocking quer">>)],
    ?assertEqual([], Others),
    same_as_before(A, B, Before).

%% One line for each kind of failure, not for each change between them.
faults_that_take_turns(Config) ->
    {Relay, A, B} = actors(Config),
    {Mark, Before} = begin_watch(A, B),
    [
        begin
            meshx_ct_relay:set(Relay, Action),
            timer:sleep(800)
        end
     || Action <- [{answer, 500}, cut, {answer, 500}, cut]
    ],
    meshx_ct_relay:set(Relay, pass),
    well_within_2_s(A),
    Lines = settled_lines(A, Mark),
    ?assertEqual(2, length([Line || <<"warning: ", _/binary>> = Line <- Lines])),
    ?assertEqual(3, length(Lines)),
    same_as_before(A, B, Before).

%% The agent answers all but what tells of changes: another line, since heartbeats don't notice.
blocking_queries_alone(Config) ->
    {Relay, A, B} = actors(Config),
    {Mark, Before} = begin_watch(A, B),
    meshx_ct_relay:set(Relay, fun
        (<<"GET">>, <<"/v1/health/state/critical", _/binary>>) -> {answer, 500};
        (_, _) -> pass
    end),
    %% Its registration ends the query under way.
    meshx_ct:start(Config, newcomer, #{}),
    meshx_ct:wait("the warning", fun() -> meshx_ct:has_line(A, Mark, "a blocking query fails") end, 20000),
    meshx_ct_relay:set(Relay, pass),
    meshx_ct:wait("the query to work", fun() -> meshx_ct:has_line(A, Mark, "blocking queries work") end, 20000),
    [Began, Ended] = meshx_ct:own_lines(A, Mark),
    matches(Began, "^warning: meshx_node: a blocking query fails; linked nodes that turn critical .* 500 the relay says 500"),
    matches(Ended, "^notice: meshx_node: blocking queries work again$"),
    same_as_before(A, B, Before).

%% Each check has one request under way; with the default TTL a node stays healthy. Two nodes by
%% themselves: of three, global would cut links when one can't reach another.
slow(Config) ->
    B = meshx_ct:start(Config, brisk, #{}),
    Relay = meshx_ct_relay:start(proplists:get_value(agent, Config)),
    Options = through(Relay, Config),
    Slow = meshx_ct:start(Config, slow, Options#{env := proplists:delete("MESHX_TTL", maps:get(env, Options))}),
    #{agent := Agent, node := Name} = Slow,
    {Mark, Before} = begin_watch(Slow, B),
    meshx_ct_relay:forget_requests(Relay),
    meshx_ct_relay:set(Relay, {delay, 10000}),
    [
        begin
            timer:sleep(500),
            ?assertMatch([_], meshx_ct_agent:healthy(Agent, atom_to_binary(Name)))
        end
     || _ <- lists:seq(1, 25)
    ],
    Checks = [Request || {_, <<"PUT">>, <<"/v1/agent/check/", _/binary>>, _} = Request <- meshx_ct_relay:requests(Relay)],
    ?assert(length(Checks) =< 4),
    meshx_ct_relay:set(Relay, pass),
    well_within_2_s(Slow),
    ?assertEqual([], meshx_ct:own_lines(Slow, Mark)),
    same_as_before(Slow, B, Before).

%%% A start

%% A VM whose node does not start while the relay does harm, but as soon as it doesn't.
start_during_faults(Config) ->
    {Relay, Vm} = starter(Config, 2000),
    [
        begin
            meshx_ct_relay:set(Relay, Action),
            refused(Vm, Pattern, 5000)
        end
     || {Action, Pattern} <- [
            {{answer, 429}, "not started after 2000 ms.* 429 "},
            {{answer, 500}, " 500 the relay says 500"},
            {{answer, 503}, "not started after 2000 ms.* 503 "},
            {cut, "broke the connection"},
            {cut_answer, "JSON|broke the connection"},
            {garbage, "not HTTP"},
            {endless, "larger than 16 MiB"},
            {{length, 100}, "broke the connection"},
            {{body, <<"{\"Node\": {\"Node\": ">>}, "JSON"}
        ]
    ],
    starts(Relay, Vm).

%% The request under way is waited for, because it may still register the node; but not for ever.
start_during_slowness(Config) ->
    {Relay, Vm} = starter(Config, 1000),
    meshx_ct_relay:set(Relay, {delay, 10000}),
    refused(Vm, "not answered within 1000 ms", 6000),
    %% As late as it can be: the registration is done, its answer is not there.
    meshx_ct_relay:set(Relay, fun
        (<<"PUT">>, <<"/v1/agent/service/register">>) -> {delay, 6000};
        (_, _) -> pass
    end),
    refused(Vm, "not answered within 1000 ms", 6000),
    starts(Relay, Vm).

start_that_outlasts_a_fault(Config) ->
    {Relay, Vm} = starter(Config, 20000),
    meshx_ct_relay:set(Relay, {answer, 503}),
    Mark = meshx_ct:mark(Vm),
    Self = self(),
    {_, Monitor} = spawn_monitor(fun() -> Self ! {started, meshx_ct:net_start(Vm, starter)} end),
    meshx_ct:wait("the reason to wait", fun() -> meshx_ct:has_line(Vm, Mark, "503 .*trying again until start_timeout") end),
    timer:sleep(1500),
    meshx_ct_relay:set(Relay, pass),
    receive
        {started, Node} ->
            ?assertNotEqual(none, meshx_ct:service(Node)),
            ?assertEqual({ok, 1}, meshx_ct:call(Node, meshx_node, info, [registrations]));
        {'DOWN', Monitor, _, _, Reason} when Reason =/= normal ->
            error(Reason)
    after 3000 -> error(not_started)
    end,
    ?assertMatch([_, _], meshx_ct:own_lines(Vm, Mark)).

%% The connection ends instead of the answer, but the agent has registered the node.
registration_done_but_not_acknowledged(Config) ->
    {Relay, #{agent := Agent} = Vm} = starter(Config, 5000),
    meshx_ct_relay:set(Relay, fun
        (<<"PUT">>, <<"/v1/agent/service/register">>) -> cut;
        (_, _) -> pass
    end),
    refused(Vm, "registering the service: .*broke the connection", 5000),
    ?assertNot(maps:is_key(atom_to_binary(meshx_ct:node_name(starter)), meshx_ct_agent:services(Agent))),
    starts(Relay, Vm).

starter(Config, StartTimeout) ->
    Relay = meshx_ct_relay:start(proplists:get_value(agent, Config)),
    Options = #{env := Env} = through(Relay, Config),
    Timeout = {"MESHX_START_TIMEOUT", integer_to_list(StartTimeout)},
    {Relay, meshx_ct:vm(Config, Options#{env := [Timeout | Env]})}.

refused(#{agent := Agent} = Vm, Pattern, Time) ->
    Mark = meshx_ct:mark(Vm),
    {Took, {error, _}} = timer:tc(fun() -> meshx_ct:net_start(Vm, starter, []) end),
    ?assert(Took < Time * 1000),
    Error = ["^error: .*node starter@.* does not start: .*(", Pattern, ")"],
    meshx_ct:wait("the line", fun() -> meshx_ct:has_line(Vm, Mark, Error) end),
    ?assertEqual(1, length([Line || <<"error: ", _/binary>> = Line <- meshx_ct:own_lines(Vm, Mark)])),
    Name = atom_to_binary(meshx_ct:node_name(starter)),
    meshx_ct:wait("the end of guard and sidecar", fun() -> meshx_ct:watch(Vm) =:= [] end, 3000),
    meshx_ct:wait("nothing to be registered", fun() -> not maps:is_key(Name, meshx_ct_agent:services(Agent)) end, 12000).

starts(Relay, Vm) ->
    meshx_ct_relay:set(Relay, pass),
    Node = meshx_ct:net_start(Vm, starter),
    ?assertNotEqual(none, meshx_ct:service(Node)),
    ?assertMatch([_, _], meshx_ct:watch(Node)).

%%% Upstreams

%% The dial fails, the next one works, and the sidecar has one upstream for that node.
upstream_done_but_not_acknowledged(Config) ->
    {Relay, #{agent := Agent, node := NameA} = A, _} = actors(Config),
    #{node := NameC} = C = meshx_ct:start(Config, c, #{}),
    meshx_ct_relay:set(Relay, fun
        (<<"PUT">>, <<"/v1/agent/service/register">>) -> cut;
        (_, _) -> pass
    end),
    meshx_ct:failed_connect(A, C, "no link to c@.*broke the connection"),
    meshx_ct_relay:set(Relay, pass),
    ?assert(meshx_ct:connect(A, C)),
    Name = atom_to_binary(NameC),
    ?assertEqual([Name], [To || To <- meshx_ct_agent:upstreams(Agent, NameA), To =:= Name]),
    ?assert(meshx_ct:call(A, erlang, disconnect_node, [NameC])).

%%% No leader

%% One server of two: it answers, but knows nothing of its cluster.
no_leader(Config) ->
    Lonely = meshx_ct:add_agent(Config, #{servers => 2, name => "lonely"}),
    Vm = meshx_ct:vm(Config, #{agent => Lonely, env => [{"MESHX_START_TIMEOUT", "3000"}]}),
    Mark = meshx_ct:mark(Vm),
    {Took, {error, _}} = timer:tc(fun() -> meshx_ct:net_start(Vm, starter, []) end),
    ?assert(Took < 12000000),
    Error = ["^error: .*node starter@.* does not start: .*", meshx_ct_agent:url(Lonely), ".*leader"],
    meshx_ct:wait("the line", fun() -> meshx_ct:has_line(Vm, Mark, Error) end),
    meshx_ct:wait("the end of guard and sidecar", fun() -> meshx_ct:watch(Vm) =:= [] end, 1000),
    ?assertEqual(#{}, meshx_ct_agent:services(Lonely)),
    meshx_ct:stop_agent(Lonely).

%% One of two servers goes and comes back with its data.
leader_lost(Config) ->
    One = meshx_ct:add_agent(Config, #{servers => 2, name => "one"}),
    Join = lists:flatten(io_lib:format("retry_join = [~p] retry_interval = \"1s\"", [meshx_ct_agent:lan(One)])),
    Two = meshx_ct:add_agent(Config, #{servers => 2, name => "two", config => Join}),
    meshx_ct:wait("a leader", fun() -> meshx_ct_agent:get(One, "/v1/status/leader") =/= <<>> end, 30000),
    meshx_ct:wait("its catalog", fun() ->
        {Status, _} = meshx_ct_agent:request(One, "GET", "/v1/connect/ca/roots", <<>>),
        Status =:= 200
    end, 30000),
    [A, B] = [meshx_ct:start(Config, Name, #{agent => One}) || Name <- [e, f]],
    #{node := Name} = A,
    {Mark, Before} = begin_watch(A, B),
    meshx_ct:stop_agent(Two),
    meshx_ct:wait("the warning", fun() ->
        meshx_ct:has_line(A, Mark, "^warning: meshx_node: .*leader") orelse
            meshx_ct:call(A, meshx_node, explain, [maps:get(node, B)]) =/= ok
    end, 30000),
    ?assertMatch({error, {Reason, _}} when Reason =:= agent_no_leader; Reason =:= agent_timeout,
        meshx_ct:call(A, meshx_node, explain, [maps:get(node, B)])),
    meshx_ct:restart_agent(Two),
    meshx_ct:wait("the leader to be used", fun() -> meshx_ct:call(A, meshx_node, explain, [maps:get(node, B)]) =:= ok end, 30000),
    meshx_ct:wait("to be found", fun() -> meshx_ct_agent:healthy(One, atom_to_binary(Name)) =/= [] end, 30000),
    same_as_before(A, B, Before).
