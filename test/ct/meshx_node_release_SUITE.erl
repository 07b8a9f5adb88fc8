%% Releases as README's section of that name says: assembled by mix and by rebar3 with its very lines,
%% booted in embedded mode, and controlled by all the commands they come with. No command may
%% register anything in Consul, and no epmd runs.
-module(meshx_node_release_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-define(MIX, "_build/dev/rel/uses_meshx_node/bin/uses_meshx_node ").
-define(REBOOTING, "_build/dev/rel/rebooting/bin/rebooting ").
-define(REBAR3, "_build/default/rel/uses_meshx_node/bin/uses_meshx_node ").

%% How long anything may take on a busy machine, ms.
-define(PATIENCE, 120000).

suite() ->
    [{timetrap, {minutes, 10}}].

all() ->
    [
        mix_commands,
        mix_daemon_with_a_long_name,
        mix_without_distribution,
        mix_runtime_configuration,
        rebar3_as_in_readme,
        rebar3_commands,
        rebar3_nodetool,
        rebar3_daemon_with_a_long_name,
        rebar3_shell,
        nothing_is_left
    ].

%% Both releases, made of one copy of this tree that has the C part built.
init_per_suite(Config0) ->
    Config = meshx_ct_project:own_folder(?MODULE, Config0),
    Directory = ?config(directory, Config),
    [MixVmArgs, MixReleases, Relx, VmArgs, Commands] = readme_blocks(),
    Copy = filename:join(Directory, "copy"),
    run(Config, Directory, [
        ["mkdir copy '", meshx_ct_project:home(Config), "' && cd '", meshx_ct:root(), "' && tar -cf -"],
        " --exclude=./_build/c/*/test $(ls -d Makefile rebar.config .ci c_src include priv src _build/c/config.mk",
        [" _build/c/release 2>/dev/null) | tar -C '", Copy, "' -xf -"]
    ]),
    mix_project(filename:join(Directory, "mix"), Copy, MixVmArgs, MixReleases, Config),
    rebar3_project(filename:join(Directory, "rebar3"), Copy, Relx, VmArgs, Config),
    meshx_ct:init_suite([{commands, Commands} | Config]).

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(Case, Config) ->
    [Tool | _] = string:split(atom_to_list(Case), "_"),
    Project = filename:join(?config(directory, Config), Tool),
    [{project, Project} | with(libraries(Case, Project), Config)].

%% Debian's erl of OTP 29 begins in /usr/lib/erlang, also the copy that rebar3 puts into a release, and
%% nodetool with it: then README's ERL_LIBS is what it has the carrier from. With that, rebar3 shell
%% would start two nodes: it has an erl -sname start epmd.
libraries(rebar3_shell, _) ->
    [];
libraries(_, Project) ->
    [
        {"ERL_LIBS", filename:join([Project, filename:dirname(Erts), "lib"])}
     || Erts <- filelib:wildcard("_build/default/rel/*/erts-*", Project),
        {ok, Erl} <- [file:read_file(filename:join([Project, Erts, "bin/erl"]))],
        re:run(Erl, "^ *ROOTDIR=/", [multiline, {capture, none}]) =:= match
    ].

%% What a failed case has left running is found by where its programs are.
end_per_testcase(_, Config) ->
    Left = running(Config),
    [meshx_ct_proc:signal(Process, "KILL") || Process <- Left],
    case {meshx_ct:end_case(Config), Left} of
        {ok, []} -> ok;
        {Result, _} -> {fail, {left_behind, Result, Left}}
    end.

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% The projects

%% All fenced blocks of README's section, with the name of our project.
readme_blocks() ->
    {ok, Readme} = file:read_file(filename:join(meshx_ct:root(), "README.md")),
    [_, After] = string:split(Readme, "\n### Releases\n"),
    [Section | _] = string:split(After, "\n### "),
    {match, Blocks} = re:run(Section, "\n```[a-z]*\n(.*?)\n```\n", [global, dotall, {capture, [1], binary}]),
    [unicode:characters_to_list(string:replace(Block, "my_app", "uses_meshx_node", all)) || [Block] <- Blocks].

mix_project(Project, Copy, VmArgs, Releases, Config) ->
    ok = meshx_ct_project:template("mix_project", Project, ["{:meshx_node, path: \"", Copy, "\"}"]),
    ok = write(Project, "rel/vm.args.eex", [VmArgs, "\n"]),
    ok = write(Project, "rel/remote.vm.args.eex", [VmArgs, "\n"]),
    Configured = "import Config\nconfig :meshx_node, service_template: %{\"Tags\" => [~ts]}\n",
    ok = write(Project, "config/config.exs", io_lib:format(Configured, ["\"sys_config\""])),
    ok = write(Project, "config/runtime.exs", io_lib:format(Configured, ["System.get_env(\"TAG\")"])),
    %% README's is for a release of its own; the other one has no runtime.exs.
    Rebooting = string:replace(Releases, "uses_meshx_node:", "uses_meshx_node: [runtime_config_path: false], rebooting:"),
    {ok, Mix} = file:read_file(filename:join(Project, "mix.exs")),
    ok = write(Project, "mix.exs", string:replace(Mix, "deps: [", [Rebooting, ",\n      deps: ["])),
    run(Config, Project, "mix deps.get && mix release uses_meshx_node && mix release rebooting").

rebar3_project(Project, Copy, Relx, VmArgs, Config) ->
    ok = meshx_ct_project:template("rebar3_project", Project, "meshx_node"),
    {ok, Rebar} = file:read_file(filename:join(Project, "rebar.config")),
    ok = write(Project, "rebar.config", [Rebar, Relx, "\n"]),
    ok = write(Project, "config/vm.args", [VmArgs, "\n"]),
    ok = write(Project, "config/sys.config", "[{meshx_node, [{service_template, #{\"Tags\" => [\"sys_config\"]}}]}].\n"),
    ok = write(Project, "config/long.vm.args", [
        string:replace(VmArgs, "-sname uses_meshx_node", "-name node1@127.0.0.1"),
        "\n-meshx_node service_template '#{\"Tags\" => [\"flag\"]}'\n"
    ]),
    run(Config, Project, [
        "mkdir _checkouts && ln -s '", Copy, "' _checkouts/meshx_node && rebar3 release"
    ]).

write(Project, File, Text) ->
    Path = filename:join(Project, File),
    ok = filelib:ensure_dir(Path),
    file:write_file(Path, unicode:characters_to_binary(Text)).

%%% mix

mix_commands(Config0) ->
    Config = with([{"RELEASE_COOKIE", "my_cookie"}], Config0),
    Node = "uses_meshx_node@" ++ meshx_ct:host(),
    Release = start(Config, ?MIX "start"),
    ready(Config, Node, <<"sys_config">>),
    is_linked_with_others(Config, Node),

    ?assertEqual("uses_meshx_node 0.1.0", answer(Config, ?MIX "version")),
    Pid = answer(Config, ?MIX "pid"),
    is_vm(Pid),
    Asked = "#{node()} #{length(Node.list(:hidden))} #{:code.get_mode()}",
    ?assertEqual(Node ++ " 1 embedded", answer(Config, [?MIX "rpc 'IO.puts(\"", Asked, "\")'"])),
    ?assertEqual("nonode@nohost", answer(Config, ?MIX "eval 'IO.puts(node())'")),
    iex_remote(Config, ?MIX, Node),

    Before = registration(Config, Node),
    _ = answer(Config, ?MIX "restart"),
    meshx_ct:wait(
        "a new registration",
        fun() -> not lists:member(registration(Config, Node), [none, Before]) end,
        ?PATIENCE
    ),
    ready(Config, Node, <<"sys_config">>),
    ?assertEqual(Pid, answer(Config, ?MIX "pid")),
    is_only(Config, Node),

    _ = answer(Config, ?MIX "stop"),
    meshx_ct_terminal:ended(Release),
    is_gone(Config).

%% The OS environment counts for node and commands.
mix_daemon_with_a_long_name(Config0) ->
    Config = with(
        [
            {"RELEASE_DISTRIBUTION", "name"},
            {"RELEASE_NODE", "node1@127.0.0.1"},
            {"MESHX_SERVICE_NAME", "dns"},
            {"MESHX_SERVICE_TEMPLATE", "{\"Tags\":[\"environment\"]}"}
        ],
        Config0
    ),
    _ = answer(Config, ?MIX "daemon"),
    ready(Config, "node1@127.0.0.1", <<"environment">>),
    is_vm(answer(Config, ?MIX "pid")),
    ?assertEqual("node1@127.0.0.1", answer(Config, ?MIX "rpc 'IO.puts(node())'")),
    iex_remote(Config, ?MIX, "node1@127.0.0.1"),
    _ = answer(Config, ?MIX "stop"),
    is_gone(Config).

mix_without_distribution(Config0) ->
    Config = with([{"RELEASE_DISTRIBUTION", "none"}], Config0),
    Release = start(Config, ?MIX "start_iex"),
    meshx_ct_terminal:expect(Release, "^iex\\(1\\)> "),
    ?assertEqual([], registered(Config)),
    ?assertMatch(
        {1, _},
        meshx_ct_project:try_run(Config, ?config(project, Config), ?MIX "pid")
    ),
    ?assertEqual("nonode@nohost", answer(Config, ?MIX "eval 'IO.puts(node())'")),
    ask(Release, "Node.start(:node1@myhost)", "\\{:ok, #PID<[0-9.]+>\\}$"),
    is_only(Config, "node1@myhost"),
    ask(Release, "Node.stop()", ":ok$"),
    ?assertEqual([], registered(Config)),
    meshx_ct_terminal:type(Release, "System.stop()"),
    meshx_ct_terminal:ended(Release),
    is_gone(Config).

mix_runtime_configuration(Config0) ->
    Config = with([{"TAG", "runtime"}, {"RELEASE_MODE", "interactive"}], Config0),
    Release = start(Config, ?REBOOTING "start"),
    ready(Config, "rebooting@" ++ meshx_ct:host(), <<"runtime">>),
    _ = answer(Config, ?REBOOTING "stop"),
    meshx_ct_terminal:ended(Release),
    is_gone(Config).

%%% rebar3

%% What is typed there, and every answer shown.
rebar3_as_in_readme(Config) ->
    Port = integer_to_list(meshx_ct_agent:free_port()),
    Lines = [
        string:replace(string:replace(Line, "22100", Port), "myhost", meshx_ct:host())
     || Line <- string:split(?config(commands, Config), "\n", all)
    ],
    {Typed, Shown} = lists:partition(fun(Line) -> string:prefix(Line, "$ ") =/= nomatch end, Lines),
    Script = [[string:prefix(unicode:characters_to_list(Line), "$ "), "\n"] || Line <- Typed],
    ?assertEqual(
        string:trim(unicode:characters_to_list(lists:join("\n", Shown))), answer(Config, ["set -e\n", Script])
    ),
    is_gone(Config).

rebar3_commands(Config0) ->
    Config = with([{"ERL_DIST_PORT", integer_to_list(meshx_ct_agent:free_port())}], Config0),
    Node = "uses_meshx_node@" ++ meshx_ct:host(),
    Release = start(Config, ?REBAR3 "foreground"),
    ready(Config, Node, <<"sys_config">>),
    is_linked_with_others(Config, Node),
    rebar3_talks(Config, Node),
    ?assertEqual("embedded", answer(Config, ?REBAR3 "rpc code get_mode")),
    Versions = "ERL_FLAGS=\"-proto_dist meshx_node -start_epmd false\" " ?REBAR3 "versions",
    ?assertEqual("Installed versions:\n* 0.1.0\tpermanent", answer(Config, Versions)),
    %% It leaves the port to the node.
    ?assertEqual("pong", answer(Config, ["USE_NODETOOL=1 ", ?REBAR3, "ping"])),
    is_only(Config, Node),
    _ = answer(Config, ?REBAR3 "stop"),
    meshx_ct_terminal:ended(Release),
    is_gone(Config).

%% Without a fixed port.
rebar3_nodetool(Config) ->
    Node = "uses_meshx_node@" ++ meshx_ct:host(),
    Release = start(Config, ?REBAR3 "foreground"),
    ready(Config, Node, <<"sys_config">>),
    %% The commands of newer releases of rebar3 take nodetool by themselves, as there is a -proto_dist.
    ByItself = meshx_ct_project:try_run(Config, ?config(project, Config), ?REBAR3 "ping"),
    ?assert(lists:member(ByItself, [{1, <<"Node is not running!\n">>}, {0, <<"pong\n">>}])),
    NodeTool = with([{"USE_NODETOOL", "1"}], Config),
    rebar3_talks(NodeTool, Node),
    _ = answer(NodeTool, ?REBAR3 "stop"),
    meshx_ct_terminal:ended(Release),
    is_gone(Config).

%% Its flags come before sys.config.
rebar3_daemon_with_a_long_name(Config0) ->
    Config = with(
        [
            {"ERL_DIST_PORT", integer_to_list(meshx_ct_agent:free_port())},
            {"VMARGS_PATH", filename:join(?config(project, Config0), "config/long.vm.args")}
        ],
        Config0
    ),
    Node = "node1@127.0.0.1",
    _ = answer(Config, ?REBAR3 "daemon"),
    ready(Config, Node, <<"flag">>),
    ?assertEqual("pong", answer(Config, ?REBAR3 "ping")),
    erl_remote(Config, Node),
    Console = start(Config, ?REBAR3 "daemon_attach"),
    %% The ping before that, if it is nodetool's, would read what is typed.
    meshx_ct_terminal:expect(Console, "^Attaching to "),
    ask(Console, "\nnode().", "^'" ++ Node ++ "'$"),
    %% The end of its input is not the node's.
    meshx_ct_terminal:type(Console, "\^D"),
    meshx_ct_terminal:ended(Console),
    _ = answer(Config, ?REBAR3 "stop"),
    is_gone(Config).

%% In the project, without a release.
rebar3_shell(Config) ->
    Node = "node1@" ++ meshx_ct:host(),
    Shell = start(Config, "env ERL_FLAGS=\"-proto_dist meshx_node -start_epmd false\" rebar3 shell --sname node1"),
    meshx_ct_terminal:expect(Shell, ["^\\(", Node, "\\)1> "]),
    is_only(Config, Node),
    meshx_ct_terminal:type(Shell, "q()."),
    meshx_ct_terminal:ended(Shell),
    is_gone(Config).

rebar3_talks(Config, Node) ->
    ?assertEqual("pong", answer(Config, ?REBAR3 "ping")),
    is_only(Config, Node),
    is_vm(answer(Config, ?REBAR3 "pid")),
    ?assertEqual(Node, answer(Config, ?REBAR3 "rpc erlang node")),
    ?assertEqual("1", answer(Config, ?REBAR3 "eval 'length(nodes(hidden)).'")),
    is_only(Config, Node),
    erl_remote(Config, Node).

%%% What all of them do

with(Environment, Config) ->
    Given = proplists:get_value(environment, Config, []),
    [{environment, Given ++ Environment} | Config].

environment(Config) ->
    Pipes = [{"PIPE_DIR", filename:join(?config(directory, Config), "pipes") ++ "/"}],
    Address = [{"MESHX_SIDECAR_ADDRESS", "127.0.0.1"}],
    proplists:get_value(environment, Config, []) ++ Pipes ++ Address.

run(Config, Directory, Command) ->
    meshx_ct_project:run(Config, Directory, Command).

%% Everything that a command prints.
answer(Config, Command) ->
    Environment = [{environment, environment(Config)} | Config],
    unicode:characters_to_list(string:trim(run(Environment, ?config(project, Config), Command))).

%% A command that stays, in a terminal.
start(Config, Command) ->
    Environment = meshx_ct_project:environment([{environment, environment(Config)} | Config]),
    %% At a dumb terminal there are no remote shells.
    meshx_ct_terminal:open(Command, ?config(project, Config), [{"TERM", "xterm"} | Environment]).

ask(Terminal, Line, Answer) ->
    meshx_ct_terminal:type(Terminal, Line),
    meshx_ct_terminal:expect(Terminal, Answer).

iex_remote(Config, Command, Node) ->
    Shell = start(Config, Command ++ "remote"),
    meshx_ct_terminal:expect(Shell, ["^iex\\(", Node, "\\)1> "]),
    ask(Shell, "length(Node.list(:hidden))", "^1$"),
    is_only(Config, Node),
    leave(Shell).

erl_remote(Config, Node) ->
    Shell = start(Config, ?REBAR3 "remote_console"),
    meshx_ct_terminal:expect(Shell, ["^\\(", Node, "\\)1> "]),
    ask(Shell, "{node(), length(nodes(hidden))}.", ["^\\{'?", Node, "'?,1\\}$"]),
    is_only(Config, Node),
    leave(Shell).

%% The shell, not the node it talks to.
leave(Shell) ->
    ask(Shell, "\^G", "--> "),
    meshx_ct_terminal:type(Shell, "q"),
    meshx_ct_terminal:ended(Shell).

%% Through the mesh, from a node that is no part of the release.
is_linked_with_others(Config, Node) ->
    Other = meshx_ct:start(Config, other, #{cookie => "my_cookie"}),
    ?assert(meshx_ct:connect(Other, list_to_atom(Node))),
    meshx_ct:stop(Other).

%% Peers can reach it, and it has the configuration with Tag.
ready(Config, Node, Tag) ->
    Agent = ?config(agent, Config),
    Id = list_to_binary(Node),
    meshx_ct:wait(
        "the node service",
        fun() ->
            case meshx_ct_agent:services(Agent) of
                #{Id := #{<<"Service">> := Name}} -> meshx_ct_agent:healthy(Agent, Name) =/= [];
                #{} -> false
            end
        end,
        ?PATIENCE
    ),
    ?assertMatch(#{Id := #{<<"Tags">> := [Tag]}}, meshx_ct_agent:services(Agent)),
    is_only(Config, Node).

%% Another number for each.
registration(Config, Node) ->
    case meshx_ct_agent:get(?config(agent, Config), ["/v1/catalog/service/", Node]) of
        [#{<<"CreateIndex">> := Index}] -> Index;
        [] -> none
    end.

registered(Config) ->
    lists:sort(maps:keys(meshx_ct_agent:services(?config(agent, Config)))).

is_only(Config, Node) ->
    ?assertEqual([list_to_binary(Node), list_to_binary(Node ++ "-sidecar-proxy")], registered(Config)).

is_vm(Pid) ->
    ?assertEqual(<<"beam.smp">>, meshx_ct_proc:program(meshx_ct_proc:find(list_to_integer(Pid)))).

running(Config) ->
    meshx_ct_proc:of_programs_below(?config(directory, Config)).

is_gone(Config) ->
    meshx_ct:wait("the end of all processes", fun() -> running(Config) =:= [] end, ?PATIENCE),
    ?assertEqual([], registered(Config)).
