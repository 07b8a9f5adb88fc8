%% The same again and again leaves nothing: `make chaos' has the large numbers.
-module(meshx_node_cycles_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(CONNECTS, 150).
-define(SIMULTANEOUS, 30).
-define(STARTS, 15).
%% Milliseconds.
-define(SOAK, 5000).

all() ->
    [
        connect_and_disconnect,
        connect_at_once_and_again,
        start_and_stop,
        mixed_traffic,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    %% Links are those the cases make, none of global's.
    Options = #{scope => suite, args => ["-connect_all", "false"]},
    [{nodes, meshx_ct:start_all(Config1, [a, b], Options)} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

nodes_of(Config) -> proplists:get_value(nodes, Config).

connect_and_disconnect(Config) ->
    ?assertEqual([], meshx_ct_cycles:connects(Config, nodes_of(Config), ?CONNECTS)).

connect_at_once_and_again(Config) ->
    ?assertEqual(#{both => 0, again => 0}, meshx_ct_cycles:simultaneous(nodes_of(Config), ?SIMULTANEOUS)).

start_and_stop(Config) ->
    [_, B] = nodes_of(Config),
    Vm = meshx_ct:vm(Config, #{args => ["-connect_all", "false"]}),
    ?assertEqual([], meshx_ct_cycles:starts(Config, [Vm, B], ?STARTS)).

mixed_traffic(Config) ->
    C = meshx_ct:start(Config, c, #{args => ["-connect_all", "false"]}),
    ?assertEqual([], meshx_ct_cycles:soak(Config, [C | nodes_of(Config)], ?SOAK)).
