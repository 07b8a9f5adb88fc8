%% Mixed traffic from a node to others, until it is stopped: round trips of all sizes, messages
%% whose order is checked, calls. Runs on each of the nodes, of which each also answers the
%% others; whoever is not connected is connected by the traffic.
%%
%% A talker for each other node, linked to the process that answers. What is seen is in a table:
%% when the last message to a node was sent that was answered, when nodes went down (as
%% os:system_time(millisecond), the same clock for all nodes of a host), and what came back wrong.
-module(meshx_ct_traffic).

-export([start/1, stop/0, answered/0, downs/1, wrong/0]).

-define(KIB, 1024).
-define(MIB, 1048576).

%% How long an answer may take on a link that is up, ms; later ones are not counted.
-define(ANSWER_TIME, 3000).
%% Between two things said to one node: at least, and at most so much more, ms.
-define(PAUSE, 20).
-define(PAUSE_MORE, 80).
-define(BURST, 100).

-spec start([node()]) -> ok.
start(Others) ->
    stop(),
    Self = self(),
    {Pid, Monitor} = spawn_monitor(fun() ->
        register(?MODULE, self()),
        ?MODULE = ets:new(?MODULE, [named_table, public]),
        ok = net_kernel:monitor_nodes(true),
        Data = rand:bytes(?MIB),
        _ = [spawn_link(fun() -> talk(Other, Data) end) || Other <- Others],
        Self ! {self(), ready},
        answer()
    end),
    receive
        {Pid, ready} -> demonitor(Monitor, [flush]) andalso ok;
        {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
    end.

-spec stop() -> ok.
stop() ->
    case whereis(?MODULE) of
        undefined ->
            ok;
        Pid ->
            Monitor = monitor(process, Pid),
            exit(Pid, kill),
            receive
                {'DOWN', Monitor, process, Pid, _} -> ok
            end
    end.

%% When the last message was sent that was answered, for each node that ever has.
-spec answered() -> #{node() => Milliseconds :: integer()}.
answered() ->
    maps:from_list([{Node, Time} || [Node, Time] <- ets:match(?MODULE, {{answered, '$1'}, '$2'})]).

%% Which nodes went down since, and when.
-spec downs(Since :: integer()) -> [{node(), Milliseconds :: integer()}].
downs(Since) ->
    [Down || {_, Time} = Down <- all_downs(), Time >= Since].

all_downs() ->
    [{Node, Time} || [Node, Time] <- ets:match(?MODULE, {{down, '_'}, '$1', '$2'})].

%% What came back other than it was sent.
-spec wrong() -> [term()].
wrong() ->
    [What || [What] <- ets:match(?MODULE, {{wrong, '_'}, '$1'})].

answer() ->
    receive
        {echo, From, Ref, Data} ->
            From ! {Ref, Data};
        {count_up, From, Ref, Last} ->
            [From ! {Ref, N} || N <- lists:seq(1, Last)];
        {nodedown, Node} ->
            ets:insert(?MODULE, {{down, make_ref()}, Node, os:system_time(millisecond)});
        _ ->
            ok
    end,
    answer().

talk(Other, Data) ->
    timer:sleep(?PAUSE + rand:uniform(?PAUSE_MORE)),
    SentAt = os:system_time(millisecond),
    case say(rand:uniform(50), Other, Data) of
        ok -> ets:insert(?MODULE, {{answered, Other}, SentAt});
        no_answer -> forget_answers();
        {wrong, What} -> ets:insert(?MODULE, {{wrong, make_ref()}, {Other, What}})
    end,
    talk(Other, Data).

say(1, Other, Data) -> echo(Other, Data, ?MIB);
say(N, Other, Data) when N =< 6 -> echo(Other, Data, 64 * ?KIB);
say(N, Other, _) when N =< 10 -> count_up(Other);
say(N, Other, _) when N =< 14 -> call(Other);
say(_, Other, Data) -> echo(Other, Data, rand:uniform(?KIB)).

echo(Other, Data, Size) ->
    Part = binary:part(Data, rand:uniform(byte_size(Data) - Size + 1) - 1, Size),
    asked(Other, fun(Ref) -> {echo, self(), Ref, Part} end, fun(Ref) ->
        receive
            {Ref, Part} -> ok;
            {Ref, _} -> {wrong, {echo, Size}};
            {'DOWN', Ref, _, _, _} -> no_answer
        after ?ANSWER_TIME -> no_answer
        end
    end).

count_up(Other) ->
    asked(Other, fun(Ref) -> {count_up, self(), Ref, ?BURST} end, fun(Ref) -> counted(Ref, 1) end).

counted(_Ref, N) when N > ?BURST ->
    ok;
counted(Ref, N) ->
    receive
        {Ref, N} -> counted(Ref, N + 1);
        {Ref, Other} -> {wrong, {expected, N, got, Other}};
        {'DOWN', Ref, _, _, _} -> no_answer
    after ?ANSWER_TIME -> no_answer
    end.

%% The end of the link ends the wait for an answer.
asked(Other, Question, Answer) ->
    try monitor(process, {?MODULE, Other}) of
        Ref ->
            {?MODULE, Other} ! Question(Ref),
            Result = Answer(Ref),
            demonitor(Ref, [flush]),
            Result
    catch
        %% This is no node any more, or not yet again.
        error:badarg -> no_answer
    end.

call(Other) ->
    try erpc:call(Other, erlang, node, [], ?ANSWER_TIME) of
        Other -> ok;
        Another -> {wrong, {node, Another}}
    catch
        error:{erpc, _} -> no_answer
    end.

forget_answers() ->
    receive
        _ -> forget_answers()
    after 0 -> ok
    end.
