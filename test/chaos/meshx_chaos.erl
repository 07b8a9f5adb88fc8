%% make chaos: faults at length (meshx_chaos_fault, to meshx_chaos_world), in rounds of all kinds,
%% in an order that a printed seed decides; cycles and a soak. After each fault it waits until all
%% is repaired and looks for what was left behind. Everything is shown as it happens; a table and
%% the exit status say at the end whether all was survived.
-module(meshx_chaos).

-export([main/0]).

%% One injection. repair: ms, or none if it was not repaired.
-type result() :: #{
    fault := meshx_chaos_fault:fault(),
    on := string(),
    repair := none | non_neg_integer(),
    noticed := [integer()],
    failed := [string()],
    left := [string()]
}.

-define(MEMBERS, 4).
-define(CONNECTS, 1000).
-define(SIMULTANEOUS, 300).
-define(STARTS, 200).

-spec main() -> no_return().
main() ->
    ok = io:setopts([{encoding, unicode}]),
    Groups =
        case init:get_plain_arguments() of
            [] -> ["cycles", "faults"];
            Names -> Names
        end,
    {Run, Monitor} = spawn_monitor(fun() -> exit({survived, run(Groups)}) end),
    receive
        {'DOWN', Monitor, process, Run, {survived, true}} ->
            halt(0);
        {'DOWN', Monitor, process, Run, {survived, false}} ->
            halt(1);
        {'DOWN', Monitor, process, Run, Reason} ->
            io:format("~nChaos ends here: ~0tp~n", [Reason]),
            halt(2)
    end.

run(Groups) ->
    Seed = number("SEED", erlang:system_time(second)),
    Minutes = number("MINUTES", 10),
    Faults = faults(),
    _ = rand:seed(exsss, Seed),
    io:format("SEED=~b~n", [Seed]),
    Config = meshx_ct:init_suite([]),
    try
        %% Each group runs, whatever became of the one before.
        [] =:= [Group || Group <- Groups, not group(Group, Config, Faults, Minutes * 60000)]
    after
        meshx_ct:end_suite(Config)
    end.

number(Variable, Default) ->
    case os:getenv(Variable, "") of
        "" -> Default;
        Text -> list_to_integer(Text)
    end.

faults() ->
    All = meshx_chaos_fault:all(),
    Named = [list_to_atom(Word) || Word <- string:lexemes(os:getenv("FAULTS", ""), " ,")],
    case {Named, Named -- All} of
        {[], []} -> All;
        {_, []} -> Named;
        {_, Unknown} -> exit({"FAULTS", {unknown, Unknown}, {known, All}})
    end.

group("cycles", Config, _, _) -> cycles(Config);
group("soak", Config, _, Time) -> soak(Config, Time);
group("faults", Config, Faults, Time) -> faults(Config, Faults, Time);
group(Group, _, _, _) -> exit({no_such_group, Group, {groups, ["cycles", "faults", "soak"]}}).

%%% Cycles and soak

cycles(Config) ->
    [A, B] = meshx_ct:start_all(Config, [cycle_a, cycle_b]),
    %% Links are those that are asked for, none of global's.
    Five = meshx_ct:start_all(Config, [cycle_1, cycle_2, cycle_3, cycle_4, cycle_5], #{
        scope => suite, args => ["-connect_all", "false"]
    }),
    Vm = meshx_ct:vm(Config, #{scope => suite}),
    io:format("~nCycles~n", []),
    Survived = [
        cycle("connect and disconnect", ?CONNECTS, fun() ->
            meshx_ct_cycles:connects(Config, [A, B], ?CONNECTS)
        end),
        cycle("connect at once, disconnect, connect again", ?SIMULTANEOUS, fun() ->
            #{both := Both, again := Again} = meshx_ct_cycles:simultaneous([A, B], ?SIMULTANEOUS),
            [{false_connects, Both, Again} || Both + Again > 0]
        end),
        cycle("all five nodes connect to each other at once", ?SIMULTANEOUS, fun() ->
            #{refused := Refused} = meshx_ct_cycles:all_at_once(Five, ?SIMULTANEOUS),
            [{false_connects, Refused} || Refused > 0]
        end),
        cycle("Node.start and Node.stop", ?STARTS, fun() ->
            meshx_ct_cycles:starts(Config, [Vm, B], ?STARTS)
        end)
    ],
    lists:foreach(fun meshx_ct:stop/1, [A, B, Vm | Five]),
    lists:all(fun(Ok) -> Ok end, Survived).

soak(Config, Time) ->
    Nodes = meshx_ct:start_all(Config, [soak_a, soak_b, soak_c]),
    io:format("~nSoak~n", []),
    Survived = cycle("minutes of mixed traffic", Time div 60000, fun() -> meshx_ct_cycles:soak(Config, Nodes, Time) end),
    lists:foreach(fun meshx_ct:stop/1, Nodes),
    Survived.

cycle(Title, Count, Fun) ->
    {Time, Left} = timer:tc(fun() ->
        try
            Fun()
        catch
            Class:Reason -> [{Class, Reason}]
        end
    end),
    io:format("~7b ~ts, ~b s: ~ts~n", [
        Count,
        Title,
        Time div 1000000,
        case Left of
            [] -> "nothing left";
            _ -> io_lib:format("~0tp", [Left])
        end
    ]),
    Left =:= [].

%%% Faults

faults(Config, Faults, Time) ->
    World = meshx_chaos_world:start(Config, ?MEMBERS),
    io:format("~nFaults for ~b minutes, to ~b nodes~n", [Time div 60000, ?MEMBERS]),
    Begin = now_ms(),
    {Last, Results} = rounds(World, Faults, [], Begin, Begin + Time, []),
    meshx_chaos_world:end_all(Last),
    Survived = table(Faults, Results),
    io:format("~nEach of them: ~ts~n", [write(Results)]),
    Survived.

rounds(World, Faults, [], Begin, End, Results) ->
    Order = [Fault || {_, Fault} <- lists:sort([{rand:uniform(), Fault} || Fault <- Faults])],
    rounds(World, Faults, Order, Begin, End, Results);
rounds(World, Faults, [Fault | Rest], Begin, End, Results) ->
    {Next, Result} = fault(World, Fault),
    show(Result, Begin),
    case now_ms() < End of
        true -> rounds(Next, Faults, Rest, Begin, End, [Result | Results]);
        false -> {Next, lists:reverse([Result | Results])}
    end.

-spec fault(meshx_chaos_world:world(), meshx_chaos_fault:fault()) -> {meshx_chaos_world:world(), result()}.
fault(World, Fault) ->
    try meshx_chaos_fault:inject(Fault, World) of
        {Changed, Outcome} -> repaired(Changed, Fault, Outcome)
    catch
        %% The fault itself could not be done, or the member did not start again.
        Class:Reason:Stack ->
            Failed = lists:flatten(io_lib:format("~0tp", [{Class, Reason, hd(Stack)}])),
            {meshx_chaos_world:rebuild(World), #{
                fault => Fault, on => "", repair => none, noticed => [], failed => [Failed], left => []
            }}
    end.

repaired(World, Fault, #{since := Since, proven := Proven, failed := Failed, undo := Undo} = Outcome) ->
    Limit = meshx_chaos_fault:limit(Fault),
    Result = maps:merge(#{fault => Fault, left => []}, maps:with([on, noticed], Outcome)),
    %% Longer than it may take, so that the next fault finds all in order.
    case await_order(World, Proven, now_ms() + max(Limit, 60000)) of
        [] ->
            Repair = now_ms() - Since,
            Undo(),
            Left = meshx_chaos_world:left(World),
            Left =:= [] orelse meshx_chaos_world:clear(World),
            Late = ["repaired too late" || Repair > Limit],
            Wrong = meshx_chaos_world:wrong(World),
            {meshx_chaos_world:settled(World), Result#{
                repair => Repair, failed => Failed ++ Late ++ Wrong, left := Left
            }};
        Missing ->
            Undo(),
            {meshx_chaos_world:rebuild(World), Result#{repair => none, failed => Failed ++ Missing}}
    end.

await_order(World, Since, Deadline) ->
    case meshx_chaos_world:out_of_order(World, Since) of
        [_ | _] = Missing ->
            case now_ms() < Deadline of
                true ->
                    timer:sleep(10),
                    await_order(World, Since, Deadline);
                false ->
                    Missing
            end;
        [] ->
            []
    end.

survived(#{repair := Repair, failed := Failed, left := Left}) ->
    is_integer(Repair) andalso Failed =:= [] andalso Left =:= [].

now_ms() ->
    os:system_time(millisecond).

%%% What is shown

show(#{fault := Fault, on := On, repair := Repair, failed := Failed, left := Left}, Begin) ->
    Seconds = (now_ms() - Begin) div 1000,
    io:format("~3b:~2..0b  ~-20ts ~-34ts ~ts~n", [
        Seconds div 60,
        Seconds rem 60,
        Fault,
        On,
        case Repair of
            none -> "NOT REPAIRED";
            _ -> io_lib:format("repaired after ~b ms", [Repair])
        end
    ]),
    [io:format("~8tsFAILED ~ts~n", ["", Text]) || Text <- Failed],
    [io:format("~8tsLEFT BEHIND ~ts~n", ["", Text]) || Text <- Left],
    ok.

-define(ROW, "~-20ts ~8ts ~8ts ~12ts ~12ts ~12ts ~12ts ~11ts~n").

%% Whether everything was survived.
table(Faults, Results) ->
    io:format("~n" ++ ?ROW, [
        "fault", "injected", "survived", "noticed ms", "worst", "repair ms", "worst", "left behind"
    ]),
    lists:foreach(fun(Fault) -> row(Fault, [Of || #{fault := F} = Of <- Results, F =:= Fault]) end, Faults),
    row("all", Results),
    lists:all(fun survived/1, Results).

row(_, []) ->
    ok;
row(Title, Results) ->
    Noticed = [Time || #{noticed := Times} <- Results, Time <- Times],
    Repairs = [Repair || #{repair := Repair} <- Results, is_integer(Repair)],
    io:format(?ROW, [
        text(Title),
        text(length(Results)),
        text(length([Result || Result <- Results, survived(Result)])),
        median(Noticed),
        worst(Noticed),
        median(Repairs),
        worst(Repairs),
        text(length([Left || #{left := Lefts} <- Results, Left <- Lefts]))
    ]).

text(Value) -> lists:concat([Value]).

median([]) -> "";
median(Numbers) -> text(lists:nth((length(Numbers) + 1) div 2, lists:sort(Numbers))).

worst([]) -> "";
worst(Numbers) -> text(lists:max(Numbers)).

%% One line of JSON for each injection.
write(Results) ->
    File = filename:join([meshx_ct:root(), "_build/chaos/faults.jsonl"]),
    Run = #{
        time => list_to_binary(calendar:system_time_to_rfc3339(erlang:system_time(second), [{offset, "Z"}])),
        commit => list_to_binary(os:getenv("MESHX_COMMIT", "")),
        otp => list_to_binary(erlang:system_info(otp_release))
    },
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, [line(maps:merge(Run, Result)) || Result <- Results], [append]),
    File.

line(#{on := On, repair := Repair, failed := Failed, left := Left} = Result) ->
    {ok, Json} = meshx_node_json:encode(Result#{
        on := unicode:characters_to_binary(On),
        repair :=
            case Repair of
                none -> null;
                _ -> Repair
            end,
        failed := [unicode:characters_to_binary(Text) || Text <- Failed],
        left := [unicode:characters_to_binary(Text) || Text <- Left]
    }),
    [Json, "\n"].
