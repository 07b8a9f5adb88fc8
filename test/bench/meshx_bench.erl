%% Benchmarks: runs groups of figures in rounds, shows every figure as soon as it is measured, and
%% at the end tables of medians and of ratios between carriers (meshx_bench_report). Nothing is
%% judged here, and a figure that can't be measured ends the run.
%%
%% A group is a module meshx_bench_<group> with the callbacks below. In each round every carrier
%% gets a fresh subject, usually a pair of nodes. Then each step is measured on one carrier after
%% the other, so that a ratio is of neighbours in time, whatever else the machine does meanwhile.
%% The carriers' order rotates from round to round.
-module(meshx_bench).

-export([main/0]).
-export_type([carrier/0, config/0, figure/0, measured/0, values/0]).

%% inet_tcp, inet_tls: OTP's own. direct: ours from node to node. sidecars: ours through two
%% Consul proxies. tcp, tcp_sidecars: no Erlang, plain TCP over loopback or through two proxies.
-type carrier() :: inet_tcp | inet_tls | direct | sidecars | tcp | tcp_sidecars.
-type config() :: [{atom(), term()}].
-type figure() :: {Key :: atom(), Unit :: string(), Text :: unicode:chardata()}.
-type measured() :: #{Key :: atom() => [number()]}.
%% One list for each round, oldest first.
-type values() :: #{{carrier(), Key :: atom()} => [[number()]]}.

-callback title() -> string().
-callback rounds() -> pos_integer().
%% In the order in which they are shown.
-callback carriers() -> [carrier()].
-callback figures() -> [figure()].
%% Which carriers are compared.
-callback ratios() -> [{carrier(), carrier()}].
-callback steps() -> [Step :: atom()].
-callback open(config(), carrier(), Round :: pos_integer()) -> Subject :: term().
%% Any number of values for each figure; none for one that the carrier doesn't have.
-callback measure(Step :: atom(), Subject :: term()) -> measured().
-callback close(Subject :: term()) -> term().
%% More figures, of all that was measured on one carrier in one round.
-callback derive(measured()) -> measured().
-optional_callbacks([derive/1]).

-define(GROUPS, ["lifecycle", "data", "idle", "control"]).

-spec main() -> no_return().
main() ->
    ok = io:setopts([{encoding, unicode}]),
    Groups =
        case init:get_plain_arguments() of
            [] -> ?GROUPS;
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

%% An agent serves 200 connections from one address unless told otherwise; group idle has more
%% than 200 nodes. It keeps its counts of requests only for Prometheus.
run(Groups) ->
    Config = meshx_ct:init_suite([], #{
        config =>
            "limits { http_max_conns_per_client = 2000 } "
            "telemetry { disable_hostname = true prometheus_retention_time = \"1h\" }"
    }),
    Prepared = meshx_bench_pair:prepare(Config),
    lists:foreach(fun(Group) -> group(Group, Prepared) end, Groups),
    meshx_ct:end_suite(Config).

group(Name, Config) ->
    Module = module("meshx_bench_" ++ Name),
    Rounds =
        case os:getenv("ROUNDS") of
            false -> Module:rounds();
            Text -> list_to_integer(Text)
        end,
    Carriers = chosen("CARRIERS", Module:carriers()),
    Steps = chosen("STEPS", Module:steps()),
    io:format("~n~ts: ~b rounds~n", [Module:title(), Rounds]),
    Values = rounds(Module, Config, Carriers, Steps, 1, Rounds, #{}),
    meshx_bench_report:tables(Module, Carriers, Values),
    File = meshx_bench_report:write(Name, Module, Carriers, Values),
    io:format("~nAll values: ~ts~n", [File]).

module(Name) ->
    Module = list_to_atom(Name),
    case code:ensure_loaded(Module) of
        {module, Module} -> Module;
        {error, _} -> exit({no_such_group, Name, {groups, ?GROUPS}})
    end.

%% All, or those named by an environment variable.
chosen(Variable, All) ->
    Named = [list_to_atom(Word) || Word <- string:lexemes(os:getenv(Variable, ""), " ,")],
    case {Named, Named -- All} of
        {[], []} -> All;
        {_, []} -> [One || One <- All, lists:member(One, Named)];
        {_, Unknown} -> exit({Variable, {unknown, Unknown}, {known, All}})
    end.

rounds(_Module, _Config, _Carriers, _Steps, Round, Rounds, Values) when Round > Rounds ->
    Values;
rounds(Module, Config, Carriers, Steps, Round, Rounds, Values) ->
    io:format("~nRound ~b of ~b~n", [Round, Rounds]),
    meshx_bench_report:head(Carriers),
    Subjects = [{Carrier, Module:open(Config, Carrier, Round)} || Carrier <- rotate(Round, Carriers)],
    Measured = lists:append([step(Module, Carriers, Step, Subjects) || Step <- Steps]),
    Derived = derive(Module, Carriers, Measured),
    lists:foreach(fun({_, Subject}) -> Module:close(Subject) end, Subjects),
    New = lists:foldl(
        fun({Of, Numbers}, Sofar) ->
            maps:update_with(Of, fun(Old) -> Old ++ [Numbers] end, [Numbers], Sofar)
        end,
        Values,
        Measured ++ Derived
    ),
    rounds(Module, Config, Carriers, Steps, Round + 1, Rounds, New).

rotate(Round, Carriers) ->
    {First, Rest} = lists:split(Round rem length(Carriers), Carriers),
    Rest ++ First.

%% [{{Carrier, Key}, Numbers}]
step(Module, Carriers, Step, Subjects) ->
    show(Module, Carriers, [
        {{Carrier, Key}, Numbers}
     || {Carrier, Subject} <- Subjects,
        {Key, Numbers} <- maps:to_list(Module:measure(Step, Subject))
    ]).

derive(Module, Carriers, Measured) ->
    case erlang:function_exported(Module, derive, 1) of
        true ->
            show(Module, Carriers, [
                {{Carrier, Key}, Numbers}
             || Carrier <- Carriers,
                {Key, Numbers} <- maps:to_list(Module:derive(of_carrier(Carrier, Measured)))
            ]);
        false ->
            []
    end.

of_carrier(Carrier, Measured) ->
    maps:from_list([{Key, Numbers} || {{Of, Key}, Numbers} <- Measured, Of =:= Carrier]).

show(Module, Carriers, Measured) ->
    OneRound = maps:from_list([{Of, [Numbers]} || {Of, Numbers} <- Measured]),
    meshx_bench_report:rows(Module:figures(), Carriers, OneRound),
    Measured.
