%% Projects that depend on this one, made of the templates in test/used_by, and the commands that a
%% user runs in them. Config has the suite's directory (own_folder/2) and, where commands need one, its agent.
-module(meshx_ct_project).

-export([own_folder/2, home/1, template/3, run/3, try_run/3, environment/1]).

-include_lib("common_test/include/ct.hrl").

-type config() :: [{atom(), term()}].

%% All suites of a run have one priv_dir: gives a suite a directory of its own there.
-spec own_folder(module(), config()) -> config().
own_folder(Suite, Config) ->
    Folder = filename:join(filename:absname(?config(priv_dir, Config)), Suite),
    ok = filelib:ensure_path(Folder),
    [{directory, Folder} | Config].

%% The user's home, in the suite's directory.
-spec home(config()) -> file:filename().
home(Config) ->
    filename:join(?config(directory, Config), "home").

%% Makes the project of a template, its one gap filled, in a folder.
-spec template(string(), file:filename(), iodata()) -> ok.
template(Name, Project, Dependency) ->
    Template = filename:join([meshx_ct:root(), "test/used_by", Name]),
    lists:foreach(
        fun(File) ->
            {ok, Text} = file:read_file(filename:join(Template, File)),
            Path = filename:join(Project, File),
            ok = filelib:ensure_dir(Path),
            ok = file:write_file(Path, string:replace(Text, "{{dependency}}", Dependency))
        end,
        [File || File <- filelib:wildcard("**", Template), filelib:is_regular(filename:join(Template, File))]
    ).

%% A line for sh that must succeed; what it printed.
-spec run(config(), file:filename(), iodata()) -> binary().
run(Config, Directory, Command) ->
    case try_run(Config, Directory, Command) of
        {0, Text} -> Text;
        {Status, Text} -> meshx_ct:fail("~ts~n~n~ts~n~nexit status ~b", [Command, Text, Status])
    end.

-spec try_run(config(), file:filename(), iodata()) -> {non_neg_integer(), binary()}.
try_run(Config, Directory, Command) ->
    Port = open_port({spawn_executable, "/bin/sh"}, [
        {args, ["-c", unicode:characters_to_list(["exec </dev/null\n", Command])]},
        {cd, Directory},
        {env, environment(Config)},
        binary,
        exit_status,
        stderr_to_stdout
    ]),
    {Status, Output} = output(Port, []),
    Text = iolist_to_binary(Output),
    ct:log("~ts~n~n~ts~n~nexit status ~b", [Command, Text, Status]),
    {Status, Text}.

output(Port, Text) ->
    receive
        {Port, {data, Data}} -> output(Port, [Text, Data]);
        {Port, {exit_status, Status}} -> {Status, Text}
    end.

%% A user's: a home of its own (for the cookie), Consul on PATH, nothing of the make and rebar3
%% that run this suite. What a case adds is under `environment' in Config.
-spec environment(config()) -> [{string(), string() | false}].
environment(Config) ->
    Address =
        case ?config(agent, Config) of
            undefined -> [];
            Agent -> [{"CONSUL_HTTP_ADDR", meshx_ct_agent:url(Agent)}]
        end,
    Rebar3 = [{"MIX_REBAR3", Path} || Path <- [os:find_executable("rebar3")], is_list(Path)],
    Consul = filename:dirname(meshx_ct_agent:binary()),
    Foreign = [
        {Name, false}
     || {Name, _} <- os:env(),
        lists:any(
            fun(Prefix) -> lists:prefix(Prefix, Name) end,
            ["MAKE", "MFLAGS", "REBAR", "MIX_", "ERL_", "CONSUL_", "MESHX_", "RELEASE_", "RELX_"]
        )
    ],
    Own = [
        {"HOME", home(Config)},
        {"PATH", Consul ++ ":" ++ os:getenv("PATH")},
        {"LC_ALL", "C.UTF-8"},
        {"GIT_CONFIG_NOSYSTEM", "1"}
    ],
    More = proplists:get_value(environment, Config, []),
    %% The last one of a name counts.
    maps:to_list(maps:from_list(Foreign ++ Address ++ Rebar3 ++ Own ++ More)).
