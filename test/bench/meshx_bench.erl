%% Benchmarks: runs groups of figures in rounds, prints how each figure stands after every round,
%% and writes one line of JSON per figure to _build/bench/<group>.jsonl, after those of earlier
%% runs. Nothing is judged here, and a figure that can't be measured ends the run.
%%
%% A group is a module meshx_bench_<group> with the callbacks below. Carriers take turns within
%% each round, so that whatever else the machine does meets both alike.
-module(meshx_bench).

-export([main/0, epmd_port/1]).
-export_type([carrier/0, config/0]).

-type carrier() :: meshx_node | inet_tcp.
-type config() :: [{atom(), term()}].

-callback title() -> string().
-callback rounds() -> pos_integer().
%% {Key, Unit, Text}, in the order in which they are shown.
-callback figures() -> [{Key :: atom(), Unit :: string(), Text :: string()}].
%% One round: any number of values for each figure. Round is unique to it, for names.
-callback round(config(), carrier(), Round :: pos_integer()) -> #{Key :: atom() => [number()]}.

-define(CARRIERS, [meshx_node, inet_tcp]).

-spec main() -> no_return().
main() ->
    ok = io:setopts([{encoding, unicode}]),
    Groups =
        case init:get_plain_arguments() of
            [] -> groups();
            Names -> Names
        end,
    {Run, Monitor} = spawn_monitor(fun() -> run(Groups) end),
    receive
        {'DOWN', Monitor, process, Run, normal} ->
            halt(0);
        {'DOWN', Monitor, process, Run, Reason} ->
            io:format("~nThe benchmark ends here: ~0tp~n", [Reason]),
            halt(1)
    end.

groups() ->
    Sources = filelib:wildcard(filename:join(meshx_ct:root(), "test/bench/meshx_bench_*.erl")),
    [Name || "meshx_bench_" ++ Name <- [filename:basename(Source, ".erl") || Source <- Sources]].

run(Groups) ->
    Config = meshx_ct:init_suite([]),
    Epmd = start_epmd(),
    lists:foreach(fun(Group) -> group(Group, [{epmd_port, Epmd} | Config]) end, Groups),
    meshx_ct:end_suite(Config).

%% For nodes on inet_tcp.
-spec epmd_port(config()) -> string().
epmd_port(Config) ->
    integer_to_list(proplists:get_value(epmd_port, Config)).

%% An epmd of our own, which ends with us.
start_epmd() ->
    Number = meshx_ct_agent:free_port(),
    _ = open_port({spawn_executable, "/bin/sh"}, [
        {args, ["-c", "epmd -port $0 </dev/null >/dev/null 2>&1 & cat >/dev/null; kill $!", integer_to_list(Number)]}
    ]),
    meshx_ct:wait("epmd", fun() ->
        case gen_tcp:connect({127, 0, 0, 1}, Number, []) of
            {ok, Socket} -> gen_tcp:close(Socket) =:= ok;
            {error, _} -> false
        end
    end),
    Number.

group(Name, Config) ->
    Module = list_to_atom("meshx_bench_" ++ Name),
    Rounds =
        case os:getenv("ROUNDS") of
            false -> Module:rounds();
            Text -> list_to_integer(Text)
        end,
    io:format("~ts: ~b rounds; median (lowest-highest)~n", [Module:title(), Rounds]),
    Values = rounds(Module, Config, 1, Rounds, #{}),
    table(Module:figures(), Values),
    File = write(Name, Module, Values),
    io:format("~nAll values: ~ts~n", [File]).

rounds(_Module, _Config, Round, Rounds, Values) when Round > Rounds ->
    Values;
rounds(Module, Config, Round, Rounds, Values) ->
    New = lists:foldl(
        fun(Carrier, Sofar) -> add(Carrier, Module:round(Config, Carrier, Round), Sofar) end,
        Values,
        ?CARRIERS
    ),
    io:format("~n~4b/~b~n", [Round, Rounds]),
    [show_progress(Carrier, Module:figures(), New) || Carrier <- ?CARRIERS],
    rounds(Module, Config, Round + 1, Rounds, New).

%% #{{Carrier, Key} => values, oldest first}
add(Carrier, Measured, Values) ->
    maps:fold(
        fun(Key, New, Sofar) ->
            maps:update_with({Carrier, Key}, fun(Old) -> Old ++ New end, New, Sofar)
        end,
        Values,
        Measured
    ).

show_progress(Carrier, Figures, Values) ->
    Shown = [
        [Text, " ", summary(maps:get({Carrier, Key}, Values)), " ", Unit]
     || {Key, Unit, Text} <- Figures, is_map_key({Carrier, Key}, Values)
    ],
    io:format("  ~-11s ~ts~n", [Carrier, lists:join(", ", Shown)]).

table(Figures, Values) ->
    Row = "~n~-24ts ~22ts ~22ts ~8ts",
    io:format(Row, ["" | [atom_to_list(Carrier) || Carrier <- ?CARRIERS]] ++ ["ratio"]),
    lists:foreach(
        fun({Key, Unit, Text}) ->
            Columns = [maps:get({Carrier, Key}, Values, []) || Carrier <- ?CARRIERS],
            Shown = [summary(Column) || Column <- Columns],
            io:format(Row, [[Text, ", ", Unit] | Shown] ++ [ratio(Columns)])
        end,
        Figures
    ),
    io:format("~n").

ratio([[_ | _] = Ours, [_ | _] = Theirs]) ->
    io_lib:format("~.2f", [median(Ours) / median(Theirs)]);
ratio(_) ->
    "".

summary([]) ->
    "";
summary(Values) ->
    io_lib:format("~ts (~ts-~ts)", [
        number(Value)
     || Value <- [median(Values), lists:min(Values), lists:max(Values)]
    ]).

number(Value) when Value >= 100 -> integer_to_list(round(Value));
number(Value) -> io_lib:format("~.1f", [Value / 1]).

median(Values) ->
    Sorted = lists:sort(Values),
    Count = length(Sorted),
    (lists:nth((Count + 1) div 2, Sorted) + lists:nth(Count div 2 + 1, Sorted)) / 2.

write(Name, Module, Values) ->
    File = filename:join([meshx_ct:root(), "_build/bench", Name ++ ".jsonl"]),
    Run = #{
        time => list_to_binary(calendar:system_time_to_rfc3339(erlang:system_time(second), [{offset, "Z"}])),
        commit => list_to_binary(os:getenv("MESHX_COMMIT", "")),
        otp => list_to_binary(erlang:system_info(otp_release)),
        processors => erlang:system_info(logical_processors_available),
        group => list_to_binary(Name)
    },
    Lines = [
        line(Run#{
            carrier => atom_to_binary(Carrier),
            figure => atom_to_binary(Key),
            unit => list_to_binary(Unit),
            median => median(Measured),
            lowest => lists:min(Measured),
            highest => lists:max(Measured),
            values => Measured
        })
     || {Key, Unit, _} <- Module:figures(),
        Carrier <- ?CARRIERS,
        [_ | _] = Measured <- [maps:get({Carrier, Key}, Values, [])]
    ],
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, Lines, [append]),
    File.

line(Map) ->
    {ok, Json} = meshx_node_json:encode(
        maps:from_list([{atom_to_binary(Key), Value} || {Key, Value} <- maps:to_list(Map)])
    ),
    [Json, "\n"].
