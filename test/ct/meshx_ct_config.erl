%% What the suites about configuration share: cases that start with none of our settings in the
%% environment, loading in this VM or in a peer, and looking for words in an error.
-module(meshx_ct_config).

-export([init_suite/1, end_suite/1, init_case/1, end_case/1]).
-export([load/0, load_in_peer/3, failure/0, set/1]).
-export([contains/2, lacks/2]).
-export([program/2, application_file/1, quote/1]).

-include_lib("stdlib/include/assert.hrl").

-define(NODE, 'node1@my.host').

%%% Suites and cases

%% The folder bin, in PATH during each case, has a program named consul.
-spec init_suite(list()) -> list().
init_suite(Config) ->
    Bin = filename:join(proplists:get_value(priv_dir, Config), "bin"),
    program(Bin, "consul"),
    [{environment, os:env()}, {bin, Bin} | Config].

-spec end_suite(list()) -> ok.
end_suite(Config) ->
    restore_environment(Config).

-spec init_case(list()) -> list().
init_case(Config) ->
    %% Here and not in init_suite/1: this is the case's own process.
    rand:seed(exsss, {1, 2, 3}),
    [os:unsetenv(Name) || {Name, _} <- os:env(), is_ours(Name)],
    os:putenv("PATH", proplists:get_value(bin, Config) ++ ":/usr/bin:/bin"),
    set([]),
    Config.

-spec end_case(list()) -> ok.
end_case(Config) ->
    restore_environment(Config).

restore_environment(Config) ->
    Saved = proplists:get_value(environment, Config),
    [os:unsetenv(Name) || {Name, _} <- os:env(), not lists:keymember(Name, 1, Saved)],
    [os:putenv(Name, Value) || {Name, Value} <- Saved],
    ok.

is_ours("CONSUL_" ++ _) -> true;
is_ours("MESHX_" ++ _) -> true;
is_ours(_) -> false.

%%% Loading

%% For node1@my.host, as all of these.
-spec load() -> map().
load() ->
    {ok, Loaded} = meshx_node_config:load(?NODE),
    Loaded.

-spec failure() -> unicode:unicode_binary().
failure() ->
    {error, {bad_configuration, Text}} = meshx_node_config:load(?NODE),
    ?assert(is_binary(Text)),
    Text.

-spec load_in_peer([string()], [{string(), string()}], [{atom(), term()}]) ->
    {ok, map()} | {error, term()}.
load_in_peer(Flags, Environment, Application) ->
    Ebin = filename:dirname(code:which(meshx_node_config)),
    Path = {"PATH", os:getenv("PATH")},
    {ok, Peer, _} = peer:start_link(#{
        connection => standard_io,
        args => ["-pa", Ebin | Flags],
        env => [Path | Environment],
        wait_boot => 30000
    }),
    [ok = peer:call(Peer, application, set_env, [meshx_node, Key, Value]) || {Key, Value} <- Application],
    Result = peer:call(Peer, meshx_node_config, load, [?NODE]),
    peer:stop(Peer),
    Result.

%% Exactly these are in the application environment from now on.
-spec set([{atom(), term()}]) -> ok.
set(Settings) ->
    [application:unset_env(meshx_node, Key) || {Key, _} <- application:get_all_env(meshx_node)],
    [application:set_env(meshx_node, Key, Value) || {Key, Value} <- Settings],
    ok.

%%% Texts

-spec contains(unicode:chardata(), [unicode:chardata()]) -> ok.
contains(Text, Parts) ->
    [?assertMatch({Part, Text, [_ | _]}, {Part, Text, unicode:characters_to_list(found(Text, Part))}) || Part <- Parts],
    ok.

found(Text, Part) ->
    case string:find(Text, Part) of
        nomatch -> "";
        Found -> Found
    end.

-spec lacks(unicode:chardata(), unicode:chardata()) -> ok.
lacks(Text, Part) -> ?assertEqual({Part, Text, nomatch}, {Part, Text, string:find(Text, Part)}).

%%% Files

-spec program(file:filename(), file:filename()) -> ok.
program(Directory, Name) ->
    File = filename:join(Directory, Name),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, "#!/bin/sh\n"),
    ok = file:change_mode(File, 8#755).

-spec application_file(file:filename()) -> ok.
application_file(Ebin) ->
    File = filename:join(Ebin, "meshx_node.app"),
    ok = filelib:ensure_dir(File),
    Properties = [{vsn, "0"}, {modules, []}, {registered, []}, {applications, []}],
    ok = file:write_file(File, io_lib:format("~p.~n", [{application, meshx_node, Properties}])).

%% As one word of a shell's.
-spec quote(string()) -> string().
quote(Text) -> "'" ++ lists:append(string:replace(Text, "'", "'\\''", all)) ++ "'".
