%% What all suites share: a Consul agent, Erlang nodes beside it, waiting with deadlines, and
%% the proof that nothing of a node is left when it is gone.
%%
%% Nodes are controlled over their standard input and output (peer), so a test can talk to one
%% whose distribution is down. Each logs to a file of its own, one line per event.
%% Everything started is in a table until its end: what a case leaves behind, end_case/1 stops
%% and tells. The table, the agents and the nodes' console belong to one process, the world,
%% since Common Test runs every function of a suite in another one.
-module(meshx_ct).

-export([init_suite/1, init_suite/2, end_suite/1, end_case/1, nothing_is_left/1, root/0]).
-export([start/3, start_all/2, start_all/3, vm/2, net_start/2, net_start/3, erl/3, environment/2]).
-export([add_agent/2, stop_agent/1, restart_agent/1]).
-export([call/2, call/4, stop/1, kill/1, crash/1, signal/2, watch/1, is_gone/1, node_name/1, host/0]).
-export([auto_connect/2, connect/2, failed_connect/3, service/1, sidecar/1]).
-export([listens_at/1, dials/1, at_once/1, fail/2]).
-export([wait/2, wait/3, mark/1, lines/2, own_lines/2, has_line/3]).
-export_type([test_node/0, options/0]).

-type config() :: [{atom(), term()}].
-type test_node() :: #{
    id := pos_integer(),
    peer := pid(),
    process := meshx_ct_proc:process(),
    node := node(),
    log := file:filename(),
    agent := meshx_ct_agent:agent()
}.
%% scope: of what is it a part, so that its end is the node's end at the latest.
%% erl: another one than ours.
-type options() :: #{
    erl => file:filename(),
    args => [string()],
    env => [{string(), string() | false}],
    agent => meshx_ct_agent:agent(),
    cookie => string(),
    longnames => boolean(),
    carrier => string(),
    scope => 'case' | suite
}.

-define(WORLD, meshx_ct_world).
-define(TABLE, meshx_ct_table).
-define(CALL_TIME, 120000).
-define(WAIT_TIME, 15000).

%%% Suites and cases

-spec init_suite(config()) -> config().
init_suite(Config) ->
    init_suite(Config, #{}).

%% With an agent of the suite's own; AgentOptions as for meshx_ct_agent:start/1.
-spec init_suite(config(), map()) -> config().
init_suite(Config, AgentOptions) ->
    Directory = string:trim(os:cmd("mktemp -d -t meshx_ct.XXXXXX")),
    Self = self(),
    {World, Monitor} = spawn_monitor(fun() -> world(Self, Directory) end),
    receive
        {World, ready} -> demonitor(Monitor, [flush])
    end,
    put_item(directory, Directory),
    put_item(epmd_port, meshx_ct_agent:free_port()),
    try
        [{agent, add_agent(Config, AgentOptions)} | Config]
    catch
        Class:Reason:Stack ->
            end_suite(Config),
            erlang:raise(Class, Reason, Stack)
    end.

%% One more agent, until the end of the suite.
-spec add_agent(config(), map()) -> meshx_ct_agent:agent().
add_agent(_Config, AgentOptions) ->
    Number = erlang:unique_integer([positive]),
    Directory = filename:join(item(directory), lists:concat(["agent", Number])),
    Agent = in_world(fun() -> meshx_ct_agent:start(AgentOptions#{directory => Directory}) end),
    put_item({agent, Number}, Agent),
    Agent.

-spec stop_agent(meshx_ct_agent:agent()) -> ok.
stop_agent(Agent) ->
    in_world(fun() -> meshx_ct_agent:stop(Agent) end).

%% An agent that was stopped: at the same address; it knows only what it keeps (meshx_ct_agent).
-spec restart_agent(meshx_ct_agent:agent()) -> meshx_ct_agent:agent().
restart_agent(#{http := Http} = Agent) ->
    Again = in_world(fun() -> meshx_ct_agent:restart(Agent) end),
    [put_item(Key, Again) || {{agent, _} = Key, #{http := Of}} <- items(), Of =:= Http],
    Again.

-spec end_suite(config()) -> ok.
end_suite(_Config) ->
    _ = clean(suite),
    [in_world(fun() -> meshx_ct_agent:stop(Agent) end) || {{agent, _}, Agent} <- items()],
    Directory = item(directory),
    in_world(fun() -> exit(normal) end),
    ok = file:del_dir_r(Directory).

%% For end_per_testcase: stops the nodes the case has started, and fails it if anything is left.
-spec end_case(config()) -> ok | {fail, term()}.
end_case(Config) ->
    case proplists:get_value(tc_status, Config) of
        ok -> ok;
        _ -> show_logs()
    end,
    case clean('case') of
        [] -> ok;
        Left -> {fail, {left_behind, Left}}
    end.

%% A suite's last case: stops all nodes; nothing may be left of any of them.
-spec nothing_is_left(config()) -> ok.
nothing_is_left(_Config) ->
    [] = clean(suite),
    ok.

show_logs() ->
    [show(Log) || {{node, _}, #{log := Log}, _} <- ets:tab2list(?TABLE)].

show(Log) ->
    ct:log("~ts:~n~ts", [Log, read(Log)]).

%% Stops the nodes of a scope; what is left of them, after it was stopped too.
clean(Scope) ->
    Nodes = [Node || {{node, _}, Node, NodeScope} <- ets:tab2list(?TABLE), ends_with(NodeScope, Scope)],
    Running = [Node || Node <- Nodes, not is_gone(Node)],
    _ = [watch(Node) || Node <- Running],
    _ = [peer:cast(Peer, init, stop, []) || #{peer := Peer} <- Running],
    Stuck = [{does_not_stop, name(Node)} || Node <- Running, not holds(fun() -> is_gone(Node) end, 20000)],
    _ = [meshx_ct_proc:signal(Process, "KILL") || #{process := Process} <- Running],
    _ = [deregister(Agent, Id) || {killed, Agent, Id} <- items_of(killed)],
    ets:match_delete(?TABLE, {{killed, '_', '_'}, '_', '_'}),
    Left = Stuck ++ left_processes(Nodes) ++ left_services(Scope),
    [ets:delete(?TABLE, {node, Id}) || #{id := Id} <- Nodes],
    Left.

ends_with(NodeScope, Scope) ->
    NodeScope =:= Scope orelse Scope =:= suite.

items_of(killed) ->
    [{killed, Agent, Id} || {{killed, _, Id}, Agent, _} <- ets:tab2list(?TABLE)].

%% Guards, sidecars and whatever they had started.
left_processes(Nodes) ->
    Ids = [Id || #{id := Id} <- Nodes],
    Seen = [Process || {{process, Process}, Id, _} <- ets:tab2list(?TABLE), lists:member(Id, Ids)],
    _ = holds(fun() -> not lists:any(fun meshx_ct_proc:is_alive/1, Seen) end, 5000),
    Left = [Process || Process <- Seen, meshx_ct_proc:is_alive(Process)],
    [meshx_ct_proc:signal(Process, "KILL") || Process <- Left],
    [ets:delete(?TABLE, {process, Process}) || Process <- Seen],
    [{process, Process} || Process <- Left].

left_services(Scope) ->
    Kept = [
        atom_to_binary(Node)
     || {{node, _}, #{node := Node}, NodeScope} <- ets:tab2list(?TABLE), not ends_with(NodeScope, Scope)
    ],
    lists:append([
        left_services(Agent, Kept)
     || {{agent, _}, #{process := Process} = Agent, _} <- ets:tab2list(?TABLE),
        meshx_ct_proc:is_alive(Process)
    ]).

left_services(Agent, Kept) ->
    Others = fun() ->
        Services = meshx_ct_agent:services(Agent),
        [Id || Id <- maps:keys(Services), not lists:any(fun(Node) -> is_of(Id, Node) end, Kept)]
    end,
    _ = holds(fun() -> Others() =:= [] end, 5000),
    Left = Others(),
    [deregister(Agent, Id) || Id <- Left],
    [{service, Id} || Id <- Left].

is_of(Id, Node) ->
    Id =:= Node orelse Id =:= <<Node/binary, "-sidecar-proxy">>.

deregister(Agent, Id) ->
    meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", uri_string:quote(Id)], <<>>).

%% The repository.
-spec root() -> file:filename().
root() ->
    root(filename:dirname(filename:absname(code:which(?MODULE)))).

root("/") ->
    error({no_rebar_config_above, code:which(?MODULE)});
root(Directory) ->
    case filelib:is_regular(filename:join(Directory, "rebar.config")) of
        true -> Directory;
        false -> root(filename:dirname(Directory))
    end.

%%% The world

world(Starter, Directory) ->
    register(?WORLD, self()),
    ?TABLE = ets:new(?TABLE, [named_table, public]),
    {ok, Console} = file:open(filename:join(Directory, "console"), [write]),
    group_leader(Console, self()),
    Starter ! {self(), ready},
    world().

world() ->
    receive
        {From, Ref, Fun} when is_function(Fun) ->
            From ! {Ref, run(Fun)};
        _ ->
            ok
    end,
    world().

run(Fun) ->
    try
        {ok, Fun()}
    catch
        error:Reason -> {error, Reason}
    end.

in_world(Fun) ->
    Ref = monitor(process, ?WORLD),
    ?WORLD ! {self(), Ref, Fun},
    receive
        {Ref, {ok, Result}} ->
            demonitor(Ref, [flush]),
            Result;
        {Ref, {error, Reason}} ->
            error(Reason);
        {'DOWN', Ref, process, _, _} ->
            ok
    end.

put_item(Key, Value) ->
    true = ets:insert(?TABLE, {Key, Value, suite}).

item(Key) ->
    ets:lookup_element(?TABLE, Key, 2).

items() ->
    [{Key, Value} || {Key, Value, _} <- ets:tab2list(?TABLE)].

%%% Nodes

%% A node that has its name from the command line (-sname, or -name).
-spec start(config(), atom(), options()) -> test_node().
start(Config, Name, Options) ->
    start_vm(Config, #{name => Name}, Options).

%% Several at once, with equal options.
-spec start_all(config(), [atom()]) -> [test_node()].
start_all(Config, Names) ->
    start_all(Config, Names, #{scope => suite}).

-spec start_all(config(), [atom()], options()) -> [test_node()].
start_all(Config, Names, Options) ->
    at_once([fun() -> start(Config, Name, Options) end || Name <- Names]).

%% A VM with the carrier, but without a name yet.
-spec vm(config(), options()) -> test_node().
vm(Config, Options) ->
    start_vm(Config, #{}, Options).

start_vm(Config, Naming, Options) ->
    Id = erlang:unique_integer([positive]),
    Log = filename:join(item(directory), lists:concat(["node", Id, ".log"])),
    Agent = maps:get(agent, Options, proplists:get_value(agent, Config)),
    PeerOptions = Naming#{
        longnames => maps:get(longnames, Options, false),
        connection => standard_io,
        exec => executable(Agent, maps:get(erl, Options, erl_program())),
        args => arguments(Log, Options),
        env => environment(Agent, Options),
        wait_boot => 60000
    },
    Own = group_leader(),
    {group_leader, Console} = process_info(whereis(?WORLD), group_leader),
    group_leader(Console, self()),
    try peer:start(PeerOptions) of
        {ok, Peer, Name} ->
            OsPid = list_to_integer(peer:call(Peer, os, getpid, [], ?CALL_TIME)),
            Node = #{
                id => Id,
                peer => Peer,
                process => meshx_ct_proc:find(OsPid),
                node => Name,
                log => Log,
                agent => Agent
            },
            watch(Node),
            remember(Node, maps:get(scope, Options, 'case'))
    catch
        Class:Reason:Stack ->
            [show(File) || File <- [Log, errors()]],
            erlang:raise(Class, Reason, Stack)
    after
        group_leader(Own, self())
    end.

%% Standard error goes to a file: logger fails there when peer itself has a report to make at the
%% end of a VM. A node runs where its agent does.
executable(Agent, Erl) ->
    Errors = errors(),
    There =
        case meshx_ct_agent:host(Agent) of
            none -> "";
            Host -> meshx_ct_host:command(Host)
        end,
    {"/bin/sh", ["-c", "exec " ++ There ++ " \"$0\" \"$@\" 2>>'" ++ Errors ++ "'", Erl]}.

errors() ->
    filename:join(item(directory), "stderr").

%% Another one of make ct-asan.
erl_program() ->
    os:getenv("MESHX_CT_ERL", os:find_executable("erl")).

remember(#{id := Id} = Node, Scope) ->
    true = ets:insert(?TABLE, {{node, Id}, Node, Scope}),
    Node.

%% Makes a VM a node, as Node.start/3 does.
-spec net_start(test_node(), atom()) -> test_node().
net_start(Node, Name) ->
    {ok, _} = net_start(Node, Name, []),
    Started = Node#{node := node_name(Name)},
    watch(Started),
    ets:update_element(?TABLE, {node, maps:get(id, Node)}, {2, Started}),
    Started.

%% The same, returning what net_kernel:start/1 does.
-spec net_start(test_node(), atom(), list()) -> {ok, pid()} | {error, term()}.
net_start(Node, Name, More) ->
    call(Node, net_kernel, start, [[Name, shortnames | More]]).

%% Runs erl, for a start that ends by itself. Returns its exit status and all it has printed.
-spec erl(config(), [string()], options()) -> {non_neg_integer() | still_running, binary()}.
erl(Config, Arguments, Options) ->
    Log = filename:join(item(directory), "erl.log"),
    Agent = maps:get(agent, Options, proplists:get_value(agent, Config)),
    Port = open_port({spawn_executable, erl_program()}, [
        {args, ["-noinput" | arguments(Log, Options)] ++ Arguments},
        {env, [{"ERL_CRASH_DUMP_SECONDS", "0"} | environment(Agent, Options)]},
        binary,
        exit_status,
        stderr_to_stdout
    ]),
    {os_pid, OsPid} = erlang:port_info(Port, os_pid),
    collect(Port, meshx_ct_proc:find(OsPid), <<>>).

collect(Port, Process, Output) ->
    receive
        {Port, {data, More}} -> collect(Port, Process, <<Output/binary, More/binary>>);
        {Port, {exit_status, Status}} -> {Status, Output}
    after 60000 ->
        Process =:= none orelse meshx_ct_proc:signal(Process, "KILL"),
        port_close(Port),
        {still_running, Output}
    end.

arguments(Log, Options) ->
    Ebin = filename:dirname(code:which(meshx_node_dist)),
    Tests = filename:dirname(code:which(?MODULE)),
    Handler =
        {handler, default, logger_std_h, #{
            config => #{file => Log, modes => [raw, append]},
            formatter =>
                {logger_formatter, #{single_line => true, template => [level, ": ", msg, "\n"]}}
        }},
    [
        "-pa",
        filename:absname(Ebin),
        filename:absname(Tests),
        "-start_epmd",
        "false",
        "-setcookie",
        maps:get(cookie, Options, "meshx_ct_cookie"),
        "-kernel",
        "logger",
        lists:flatten(io_lib:format("~0p", [[Handler]])),
        "-proto_dist"
        | string:lexemes(maps:get(carrier, Options, "meshx_node"), " ") ++ maps:get(args, Options, [])
    ].

%% Of our own environment only what says nothing about Consul, this library or Erlang's flags.
-spec environment(meshx_ct_agent:agent(), options()) -> [{string(), string() | false}].
environment(Agent, Options) ->
    Unset = [
        {Name, false}
     || {Name, _} <- os:env(),
        lists:any(fun(Prefix) -> lists:prefix(Prefix, Name) end, ["CONSUL_", "MESHX_", "ERL_"])
    ],
    Set = [
        {"CONSUL_HTTP_ADDR", meshx_ct_agent:url(Agent)},
        {"MESHX_SIDECAR_ADDRESS", meshx_ct_agent:address(Agent)},
        {"PATH", filename:dirname(meshx_ct_agent:binary()) ++ ":" ++ os:getenv("PATH")},
        {"HOME", item(directory)},
        {"ERL_EPMD_PORT", integer_to_list(item(epmd_port))}
    ],
    %% The last one of a name counts.
    maps:to_list(maps:from_list(Unset ++ Set ++ maps:get(env, Options, []))).

%% Arguments of a node that is to be dialled directly.
-spec listens_at(inet:port_number()) -> [string()].
listens_at(Port) ->
    ["-meshx_node", "sidecar_command", "none", "-kernel", "inet_dist_listen_min", integer_to_list(Port)].

%% Arguments of a node that dials others directly, at "ip:port".
-spec dials([{atom(), string()}]) -> [string()].
dials(Others) ->
    Upstreams = [{node_name(Name), Address} || {Name, Address} <- Others],
    ["-meshx_node", "upstreams", lists:flatten(io_lib:format("~0p", [Upstreams]))].

-spec host() -> string().
host() ->
    {ok, Host} = inet:gethostname(),
    Host.

-spec node_name(atom()) -> node().
node_name(Name) ->
    list_to_atom(lists:concat([Name, "@", host()])).

name(#{node := Node, id := Id}) ->
    {Node, Id}.

%% Runs a fun there, without the distribution.
-spec call(test_node(), fun(() -> Result)) -> Result.
call(Node, Fun) ->
    call(Node, erlang, apply, [Fun, []]).

-spec call(test_node(), module(), atom(), [term()]) -> term().
call(#{peer := Peer}, Module, Function, Arguments) ->
    peer:call(Peer, Module, Function, Arguments, ?CALL_TIME).

%% init:stop/0, until the VM is gone.
-spec stop(test_node()) -> ok.
stop(#{peer := Peer} = Node) ->
    watch(Node),
    peer:cast(Peer, init, stop, []),
    wait("the VM's end after init:stop/0", fun() -> is_gone(Node) end).

%% kill -9, until the VM is gone. Its registration stays, until a later node of the name or the
%% end of the case.
-spec kill(test_node()) -> ok.
kill(#{node := Name, agent := Agent, id := Id} = Node) ->
    Service = atom_to_binary(Name),
    true = ets:insert(?TABLE, {{killed, Id, Service}, Agent, 'case'}),
    signal(Node, "KILL").

%% As kill/1, with a crash dump.
-spec crash(test_node()) -> ok.
crash(#{node := Name, agent := Agent, id := Id, peer := Peer} = Node) ->
    true = ets:insert(?TABLE, {{killed, Id, atom_to_binary(Name)}, Agent, 'case'}),
    peer:cast(Peer, erlang, halt, ["crash"]),
    wait("the VM's crash", fun() -> is_gone(Node) end).

-spec signal(test_node(), string()) -> ok.
signal(#{process := Process} = Node, Signal) ->
    watch(Node),
    meshx_ct_proc:signal(Process, Signal),
    wait(["the VM's end by SIG", Signal], fun() -> is_gone(Node) end).

%% Notes the guards and sidecars a VM has now: they must be gone when it is.
-spec watch(test_node()) -> [meshx_ct_proc:process()].
watch(#{id := Id, process := Process}) ->
    Guards = [
        Guard
     || Guard <- meshx_ct_proc:children(meshx_ct_proc:pid(Process)),
        meshx_ct_proc:program(Guard) =:= <<"meshx_guard">>
    ],
    Sidecars = lists:append([meshx_ct_proc:descendants(meshx_ct_proc:pid(Guard)) || Guard <- Guards]),
    Seen = Guards ++ Sidecars,
    _ = [ets:insert(?TABLE, {{process, Found}, Id, 'case'}) || Found <- Seen],
    Seen.

-spec is_gone(test_node()) -> boolean().
is_gone(#{process := Process}) ->
    not meshx_ct_proc:is_alive(Process).

%% The service as the agent has it, or none.
-spec service(test_node()) -> map() | none.
service(#{node := Node, agent := Agent}) ->
    maps:get(atom_to_binary(Node), meshx_ct_agent:services(Agent), none).

-spec sidecar(test_node()) -> meshx_ct_proc:process() | none.
sidecar(Node) ->
    case call(Node, meshx_node, info, [sidecar_pid]) of
        {ok, Pid} when is_integer(Pid) -> meshx_ct_proc:find(Pid);
        {ok, undefined} -> none
    end.

%% Whether a message to a node connects to it. If so, one of global's may undo a disconnect at once.
-spec auto_connect(test_node(), never | always) -> ok.
auto_connect(Node, never) -> call(Node, application, set_env, [kernel, dist_auto_connect, never]);
auto_connect(Node, always) -> call(Node, application, unset_env, [kernel, dist_auto_connect]).

-spec connect(test_node(), test_node() | node()) -> boolean() | ignored.
connect(Node, #{node := Other}) ->
    connect(Node, Other);
connect(Node, Other) ->
    call(Node, net_kernel, connect_node, [Other]).

%% A connect that must fail, sooner than by any timer of the distribution, with exactly one line
%% of ours in the log, which must match. Returns it.
-spec failed_connect(test_node(), test_node() | node(), unicode:chardata()) -> binary().
failed_connect(Node, Other, Pattern) ->
    Mark = mark(Node),
    {Time, false} = timer:tc(fun() -> connect(Node, Other) end),
    wait("a log line", fun() -> own_lines(Node, Mark) =/= [] end),
    [Line] = own_lines(Node, Mark),
    {match, _} = re:run(Line, Pattern, [unicode]),
    true = Time < 6000000,
    Line.

%%% Logs

%% Where the log of a node ends now.
-spec mark(test_node()) -> non_neg_integer().
mark(Node) ->
    byte_size(read_log(Node)).

%% What was logged since.
-spec lines(test_node(), non_neg_integer()) -> [binary()].
lines(Node, Mark) ->
    <<_:Mark/binary, New/binary>> = read_log(Node),
    binary:split(New, <<"\n">>, [global, trim]).

%% With all that was logged before.
read_log(#{log := Log} = Node) ->
    is_gone(Node) orelse call(Node, logger_std_h, filesync, [default]),
    read(Log).

%% Only what the carrier itself has to say.
-spec own_lines(test_node(), non_neg_integer()) -> [binary()].
own_lines(Node, Mark) ->
    [Line || Line <- lines(Node, Mark), binary:match(Line, <<": meshx_node: ">>) =/= nomatch].

-spec has_line(test_node(), non_neg_integer(), unicode:chardata()) -> boolean().
has_line(Node, Mark, Pattern) ->
    lists:any(fun(Line) -> re:run(Line, Pattern, [unicode]) =/= nomatch end, lines(Node, Mark)).

read(File) ->
    case file:read_file(File) of
        {ok, Content} -> Content;
        {error, enoent} -> <<>>
    end.

%%% Failing

%% Common Test itself, and with it all suites, ends at a character that its terminal doesn't have.
-spec fail(io:format(), [term()]) -> no_return().
fail(Format, Arguments) ->
    Text = lists:flatten(io_lib:format(Format, Arguments)),
    ct:fail([case Character < 128 of true -> Character; false -> $? end || Character <- Text]).

%%% Waiting

%% Their results, in order.
-spec at_once([fun(() -> Result)]) -> [Result].
at_once(Funs) ->
    Runs = [spawn_monitor(fun() -> exit({result, Fun()}) end) || Fun <- Funs],
    [
        receive
            {'DOWN', Monitor, process, _, {result, Result}} -> Result;
            {'DOWN', Monitor, process, _, Reason} -> error(Reason)
        end
     || {_, Monitor} <- Runs
    ].

%% Until Fun returns true.
-spec wait(unicode:chardata(), fun(() -> boolean())) -> ok.
wait(What, Fun) ->
    wait(What, Fun, ?WAIT_TIME).

-spec wait(unicode:chardata(), fun(() -> boolean()), timeout()) -> ok.
wait(What, Fun, Time) ->
    holds(Fun, Time) orelse error({not_seen, unicode:characters_to_list(What), {within_ms, Time}}),
    ok.

holds(Fun, Time) ->
    holds_until(Fun, erlang:monotonic_time(millisecond) + Time).

holds_until(Fun, Deadline) ->
    Fun() orelse
        (erlang:monotonic_time(millisecond) < Deadline andalso
            begin
                timer:sleep(10),
                holds_until(Fun, Deadline)
            end).
