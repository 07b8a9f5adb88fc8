%% The ways in which users start nodes on this carrier, done to the letter: commands run in
%% projects made of the templates in test/used_by, lines typed into shells in a terminal.
%% Everywhere two nodes start, connect, work, and leave nothing behind in Consul.
-module(meshx_node_used_by_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).
-export([plain_erl/1, iex/1, mix_git/1, rebar3_git/1, rebar3_checkout/1]).

%% What is typed into both nodes' shells and what must come back.
-record(shell, {
    prompt :: string(),
    %% undefined: the command line has named the node
    start :: undefined | string(),
    connect :: {string(), string()},
    work :: {string(), string()},
    stop :: {string(), string()},
    quit :: string()
}).

-define(ERL, #shell{
    prompt = "1> ",
    connect = {"net_kernel:connect_node(node2@myhost).", "true$"},
    work =
        {"spawn(node2@myhost, uses_meshx_node, answer, [self()]), receive X -> X end.",
            "\\{this_is,node2@myhost\\}$"},
    stop = {"net_kernel:stop().", "ok$"},
    quit = "init:stop()."
}).

-define(IEX, #shell{
    prompt = "^iex\\(.*1\\)?> ",
    start = "Node.start(:node~b@myhost)",
    connect = {"Node.connect(:node2@myhost)", "true$"},
    work =
        {
            "Node.spawn(:node2@myhost, UsesMeshxNode, :answer, [self()]); receive do x -> x end",
            "\\{:this_is, :node2@myhost\\}$"
        },
    stop = {"Node.stop()", ":ok$"},
    quit = "System.stop()"
}).

suite() ->
    [{timetrap, {minutes, 10}}].

all() ->
    [plain_erl, iex, mix_git, rebar3_git, rebar3_checkout].

%% The working tree, uncommitted changes too, becomes a git repository that projects can name.
init_per_suite(Config0) ->
    Config = meshx_ct_project:own_folder(?MODULE, Config0),
    Directory = ?config(directory, Config),
    Source = filename:join(Directory, "source"),
    run(Config, Directory, [
        "mkdir source home && cd source",
        " && tar -C '", meshx_ct:root(), "' --exclude=./_build --exclude=./.git -cf - . | tar -xf -",
        " && git init -q -b main && git add -A",
        " && git -c user.name=test -c user.email=test@localhost commit -q -m source"
    ]),
    [{source, Source} | Config].

end_per_suite(_Config) ->
    ok.

init_per_testcase(Case, Config) ->
    Directory = filename:join(?config(directory, Config), Case),
    Agent = meshx_ct_agent:start(#{directory => filename:join(Directory, "agent")}),
    [{agent, Agent}, {project, filename:join(Directory, "project")} | Config].

end_per_testcase(_Case, Config) ->
    meshx_ct_agent:stop(?config(agent, Config)).

%%% Cases

%% What this tree's own build has made, without any project.
plain_erl(Config) ->
    Ebin = filename:dirname(code:which(meshx_node)),
    template(rebar3_project, "", Config),
    run(Config, ?config(project, Config), "mkdir ebin && erlc -o ebin src/uses_meshx_node.erl"),
    two_nodes(Config, ?ERL, fun(N) ->
        io_lib:format("erl -pa '~ts' ebin -proto_dist meshx_node -start_epmd false -name node~b@myhost", [Ebin, N])
    end).

%% As in MeshxNode's documentation.
iex(Config) ->
    Copy = copy_of_source(Config),
    Project = template(mix_project, ["{:meshx_node, path: \"", Copy, "\"}"], Config),
    run(Config, Project, "mix deps.get && mix compile"),
    native_files(Project, "_build/dev/lib/meshx_node"),
    two_nodes(Config, ?IEX, fun(_) ->
        "iex -pa _build/dev/lib/meshx_node/ebin --erl \"-proto_dist Elixir.MeshxNode\" -S mix"
    end).

%% The node has its name at boot, where only erl's own -pa is in time.
mix_git(Config) ->
    Dependency = ["{:meshx_node, git: \"file://", ?config(source, Config), "\"}"],
    Project = template(mix_project, Dependency, Config),
    run(Config, Project, "mix deps.get && mix compile"),
    native_files(Project, "_build/dev/lib/meshx_node"),
    two_nodes(Config, with_start(?IEX, undefined), fun(N) ->
        io_lib:format(
            "iex --erl \"-pa _build/dev/lib/meshx_node/ebin -proto_dist meshx_node -start_epmd false\" "
            "--name node~b@myhost -S mix",
            [N]
        )
    end).

rebar3_git(Config) ->
    Dependency = ["{meshx_node, {git, \"file://", ?config(source, Config), "\", {branch, \"main\"}}}"],
    Project = template(rebar3_project, Dependency, Config),
    run(Config, Project, "rebar3 compile"),
    native_files(Project, "_build/default/lib/meshx_node"),
    two_nodes(Config, ?ERL, fun(N) ->
        io_lib:format(
            "erl -pa _build/default/lib/*/ebin -proto_dist meshx_node -start_epmd false -name node~b@myhost", [N]
        )
    end).

%% The node is started from the shell here.
rebar3_checkout(Config) ->
    Copy = copy_of_source(Config),
    Project = template(rebar3_project, "meshx_node", Config),
    run(Config, Project, ["mkdir _checkouts && mv '", Copy, "' _checkouts/meshx_node && rebar3 compile"]),
    native_files(Project, "_build/default/checkouts/meshx_node"),
    Shell = with_start(?ERL, "net_kernel:start(node~b@myhost, #{name_domain => longnames})."),
    two_nodes(Config, Shell, fun(_) -> "erl -pa $(rebar3 path) -proto_dist meshx_node" end).

%%% What all of them do

with_start(Shell, Start) -> Shell#shell{start = Start}.

two_nodes(Config, Shell, Command) ->
    [One, Two] = [start_node(N, Config, Shell, Command(N)) || N <- [1, 2]],
    Agent = ?config(agent, Config),
    ?assertEqual(
        [
            <<"node1@myhost">>,
            <<"node1@myhost-sidecar-proxy">>,
            <<"node2@myhost">>,
            <<"node2@myhost-sidecar-proxy">>
        ],
        maps:keys(meshx_ct_agent:services(Agent))
    ),
    ?assertEqual([<<"node2@myhost-sidecar-proxy">>], meshx_ct_agent:healthy(Agent, <<"node2@myhost">>)),

    ask(One, Shell#shell.connect),
    ask(One, Shell#shell.work),

    %% kernel lets a node that its command line has named be stopped only with its VM.
    Shell#shell.start =/= undefined andalso ask(One, Shell#shell.stop),
    quit(One, Shell),
    ?assertEqual(
        [<<"node2@myhost">>, <<"node2@myhost-sidecar-proxy">>],
        maps:keys(meshx_ct_agent:services(Agent))
    ),
    quit(Two, Shell),
    ?assertEqual(#{}, meshx_ct_agent:services(Agent)).

%% The sidecar's first line is logged under the name of the node.
start_node(N, Config, #shell{prompt = Prompt, start = Start}, Command) ->
    Terminal = meshx_ct_terminal:open(
        unicode:characters_to_list(Command),
        ?config(project, Config),
        meshx_ct_project:environment(Config)
    ),
    meshx_ct_terminal:expect(Terminal, Prompt),
    case Start of
        undefined -> ok;
        _ -> ask(Terminal, {io_lib:format(Start, [N]), "\\{:?ok, ?(#PID)?<[0-9.]+>\\}$"})
    end,
    meshx_ct_terminal:expect(Terminal, [
        "\\[node", integer_to_list(N), "@myhost\\]\\[stdout\\]: ==> Consul Connect proxy starting\\.\\.\\.$"
    ]),
    Terminal.

ask(Terminal, {Line, Answer}) ->
    meshx_ct_terminal:type(Terminal, Line),
    meshx_ct_terminal:expect(Terminal, Answer).

quit(Terminal, #shell{quit = Line}) ->
    meshx_ct_terminal:type(Terminal, Line),
    meshx_ct_terminal:ended(Terminal).

%%% Projects

%% The project of a case.
template(Name, Dependency, Config) ->
    Project = ?config(project, Config),
    ok = meshx_ct_project:template(Name, Project, Dependency),
    Project.

copy_of_source(Config) ->
    Directory = filename:dirname(?config(project, Config)),
    run(Config, Directory, ["git clone -q '", ?config(source, Config), "' copy"]),
    filename:join(Directory, "copy").

native_files(Project, Library) ->
    Files = [filename:join([Project, Library, "priv", File]) || File <- ["meshx_node.so", "meshx_guard"]],
    ?assertEqual([], [File || File <- Files, not filelib:is_regular(File)]).

run(Config, Directory, Command) ->
    meshx_ct_project:run(Config, Directory, Command).
