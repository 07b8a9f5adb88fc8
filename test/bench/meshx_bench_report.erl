%% What a benchmark shows and leaves: rows of medians, one column for each carrier; a table of
%% ratios; and _build/bench/<group>.jsonl, one line of JSON per figure and carrier and one per
%% figure and ratio, after those of earlier runs. Lines of one run have the same time.
%%
%% A ratio is the median of the rounds' ratios, each of the two medians of that round, and the
%% lowest and highest of them: what one round and its neighbour share cancels out.
-module(meshx_bench_report).

-export([head/1, rows/3, tables/3, write/4]).

-define(TEXT_WIDTH, 40).
-define(COLUMN_WIDTH, 13).
-define(RATIO_WIDTH, 22).

-spec head([meshx_bench:carrier()]) -> ok.
head(Carriers) ->
    row("", [atom_to_list(Carrier) || Carrier <- Carriers], ?COLUMN_WIDTH).

%% Medians of those figures that were measured.
-spec rows([meshx_bench:figure()], [meshx_bench:carrier()], meshx_bench:values()) -> ok.
rows(Figures, Carriers, Values) ->
    lists:foreach(
        fun({Key, Unit, Text}) ->
            Columns = [median_text(maps:get({Carrier, Key}, Values, [])) || Carrier <- Carriers],
            _ = has_text(Columns) andalso row([Text, [[", ", Unit] || Unit =/= ""]], Columns, ?COLUMN_WIDTH)
        end,
        Figures
    ).

%% At the end of a group.
-spec tables(module(), [meshx_bench:carrier()], meshx_bench:values()) -> ok.
tables(Module, Carriers, Values) ->
    Figures = Module:figures(),
    io:format("~nMedians of all rounds~n"),
    head(Carriers),
    rows(Figures, Carriers, Values),
    ratio_table(Figures, pairs(Module, Carriers), Values).

ratio_table(_Figures, [], _Values) ->
    ok;
ratio_table(Figures, Pairs, Values) ->
    io:format("~nRatios, median of the rounds' (lowest-highest)~n"),
    row("", [pair_text(Pair) || Pair <- Pairs], ?RATIO_WIDTH),
    lists:foreach(
        fun({Key, _Unit, Text}) ->
            Columns = [summary(ratios(Pair, Key, Values)) || Pair <- Pairs],
            _ = has_text(Columns) andalso row(Text, Columns, ?RATIO_WIDTH)
        end,
        Figures
    ).

pairs(Module, Carriers) ->
    [Pair || {One, Other} = Pair <- Module:ratios(), lists:member(One, Carriers), lists:member(Other, Carriers)].

pair_text({One, Other}) ->
    lists:concat([One, "/", Other]).

row(Text, Columns, Width) ->
    io:format("~-*ts~ts~n", [?TEXT_WIDTH, Text, [io_lib:format(" ~*ts", [Width, Column]) || Column <- Columns]]).

has_text(Columns) ->
    lists:any(fun(Column) -> Column =/= "" end, Columns).

%% One for each round, if both carriers have the figure; none of a round in which there is
%% nothing to divide by.
ratios({One, Other}, Key, Values) ->
    case Values of
        #{{One, Key} := Ours, {Other, Key} := Theirs} ->
            Medians = [{median(Our), median(Their)} || {Our, Their} <- lists:zip(Ours, Theirs)],
            [Our / Their || {Our, Their} <- Medians, Their > 0];
        #{} ->
            []
    end.

median_text([]) -> "";
median_text(Rounds) -> number(median(lists:append(Rounds))).

summary([]) ->
    "";
summary(Numbers) ->
    io_lib:format("~.2f (~.2f-~.2f)", [median(Numbers), lists:min(Numbers) / 1, lists:max(Numbers) / 1]).

number(Value) when abs(Value) >= 100 -> integer_to_list(round(Value));
number(Value) when abs(Value) >= 10 -> io_lib:format("~.1f", [Value]);
number(Value) -> io_lib:format("~.2f", [Value]).

median(Numbers) ->
    Sorted = lists:sort(Numbers),
    Count = length(Sorted),
    (lists:nth((Count + 1) div 2, Sorted) + lists:nth(Count div 2 + 1, Sorted)) / 2.

%% Returns the file. `values' has a list for each round where it is a figure's, and a number for
%% each round where it is a ratio's.
-spec write(string(), module(), [meshx_bench:carrier()], meshx_bench:values()) -> file:filename().
write(Group, Module, Carriers, Values) ->
    File = filename:join([meshx_ct:root(), "_build/bench", Group ++ ".jsonl"]),
    {ok, Congestion} = file:read_file("/proc/sys/net/ipv4/tcp_congestion_control"),
    Run = #{
        congestion_control => string:trim(Congestion),
        time => list_to_binary(calendar:system_time_to_rfc3339(erlang:system_time(second), [{offset, "Z"}])),
        commit => list_to_binary(os:getenv("MESHX_COMMIT", "")),
        otp => list_to_binary(erlang:system_info(otp_release)),
        processors => erlang:system_info(logical_processors_available),
        group => list_to_binary(Group)
    },
    Medians = [
        line(Run#{carrier => Carrier, figure => Key, unit => list_to_binary(Unit)}, lists:append(Rounds), Rounds)
     || {Key, Unit, _} <- Module:figures(),
        Carrier <- Carriers,
        [_ | _] = Rounds <- [maps:get({Carrier, Key}, Values, [])]
    ],
    Ratios = [
        line(Run#{ratio => list_to_binary(pair_text(Pair)), figure => Key}, Numbers, Numbers)
     || {Key, _, _} <- Module:figures(),
        Pair <- pairs(Module, Carriers),
        [_ | _] = Numbers <- [ratios(Pair, Key, Values)]
    ],
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, [Medians, Ratios], [append]),
    File.

line(What, Numbers, Values) ->
    {ok, Json} = meshx_node_json:encode(What#{
        median => median(Numbers),
        lowest => lists:min(Numbers),
        highest => lists:max(Numbers),
        values => Values
    }),
    [Json, "\n"].
