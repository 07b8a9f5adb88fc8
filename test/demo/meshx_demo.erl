%% The demo: a Consul agent and two Erlang nodes, what they can do together, and that nothing is
%% left of them at the end. Every step prints how long it took; the first one that is not what it
%% should be ends the demo with an explanation and exit status 1.
%%
%% The story runs in a process of its own. Whatever becomes of it, and when TERM comes, main/0
%% stops all that it has started.
-module(meshx_demo).

-behaviour(gen_event).

-export([main/0]).
-export([init/1, handle_event/2, handle_call/2]).
%% Run in the nodes.
-export([work/1, echo/1, pour/3, drain/2]).

-define(MIB, 1048576).
%% Size of the large message, and what flows for the throughput.
-define(LARGE, (64 * ?MIB)).
-define(STREAM_MESSAGES, 512).
-define(STREAM_SIZE, ?MIB).

-spec main() -> no_return().
main() ->
    ok = io:setopts([{encoding, unicode}]),
    ok = gen_event:swap_handler(erl_signal_server, {erl_signal_handler, []}, {?MODULE, self()}),
    {Story, Monitor} = spawn_monitor(fun() -> exit({shutdown, told()}) end),
    receive
        {'DOWN', Monitor, process, Story, {shutdown, {done, Steps, Time}}} ->
            io:format("~nAll is as it should be: ~b steps in ~.1f s.~n", [Steps, Time / 1000]),
            halt(0);
        {'DOWN', Monitor, process, Story, {shutdown, {wrong, Text}}} ->
            give_up(1, ["NOT AS IT SHOULD BE: ", Text]);
        {'DOWN', Monitor, process, Story, {shutdown, Crash}} ->
            give_up(1, ["NOT AS IT SHOULD BE: ", io_lib:format("~0tp", [Crash])]);
        sigterm ->
            exit(Story, kill),
            give_up(130, "Interrupted.")
    end.

-spec give_up(1..255, iodata()) -> no_return().
give_up(Status, Text) ->
    io:format("~n~ts~n", [Text]),
    try
        meshx_ct:end_suite([])
    catch
        %% What went wrong has been said.
        _:_ -> ok
    end,
    io:format("All that was started is stopped.~n"),
    halt(Status).

%%% The story

told() ->
    try
        story()
    catch
        throw:Told -> Told;
        Class:Reason -> {Class, Reason}
    end.

story() ->
    Begin = now_ms(),
    put(steps, 0),

    heading("A Consul agent starts"),
    Config = step("agent ready", fun() -> meshx_ct:init_suite([]) end),
    {agent, Agent} = lists:keyfind(agent, 1, Config),
    #{<<"Config">> := #{<<"Version">> := Version}} = meshx_ct_agent:get(Agent, "/v1/agent/self"),
    note("Consul ~ts at http://~ts", [Version, meshx_ct_agent:url(Agent)]),

    heading("Two Erlang nodes start, each a Consul service with a sidecar proxy of its own"),
    note("$ erl -proto_dist meshx_node -sname node1", []),
    One = step("VM booted, node service ready", fun() ->
        meshx_ct:start(Config, node1, node_options())
    end),
    describe(One),
    note("$ erl -proto_dist meshx_node", []),
    Vm = step("VM booted", fun() -> meshx_ct:vm(Config, node_options()) end),
    note("1> net_kernel:start([node2, shortnames]).", []),
    Two = step("node service ready", fun() -> meshx_ct:net_start(Vm, node2) end),
    describe(Two),

    heading("They connect through their sidecars"),
    connect(One, Two),
    picture(One, Two),

    heading("Work goes across"),
    work_across(One, Two),

    heading("What Consul knows"),
    show_services(Agent, [One, Two]),

    heading("An intention denies node1 -> node2"),
    deny(Agent, One, Two),

    heading("Allowed again"),
    step("intention set to allow", fun() -> meshx_ct_agent:allow(Agent, name(One), name(Two)) end),
    connect(One, Two),

    heading("Both stop"),
    stop(Agent, One, Two),
    Directory = maps:get(directory, Agent),
    Process = maps:get(process, Agent),
    step("agent stopped", fun() -> meshx_ct:end_suite(Config) end),
    false = filelib:is_dir(Directory),
    expect(not meshx_ct_proc:is_alive(Process), "the Consul agent still runs"),
    {done, get(steps), now_ms() - Begin}.

%% Nodes that connect only when told so: else global, after a disconnect, may do it by a message.
node_options() ->
    #{scope => suite, args => ["-kernel", "dist_auto_connect", "never"]}.

describe(Node) ->
    {ok, #{sidecar_pid := Pid, sidecar_port := Sidecar, listen_port := Listen}} =
        meshx_ct:call(Node, meshx_node, info, []),
    note("~ts listens on 127.0.0.1:~b; its sidecar, process ~b, on port ~b", [
        name(Node), Listen, Pid, Sidecar
    ]).

connect(One, Two) ->
    true = step(["net_kernel:connect_node('", name(Two), "') on node1"], fun() ->
        should_be(true, meshx_ct:connect(One, Two), "the connect")
    end),
    should_be([maps:get(node, Two)], meshx_ct:call(One, erlang, nodes, []), "nodes() of node1"),
    meshx_ct:wait("node1 in nodes() of node2", fun() ->
        meshx_ct:call(Two, erlang, nodes, []) =:= [maps:get(node, One)]
    end).

%% Every port of the way, as both nodes know them.
picture(One, Two) ->
    {ok, #{upstreams := Upstreams}} = meshx_ct:call(One, meshx_node, info, []),
    {ok, #{sidecar_port := Public, listen_port := Listen}} =
        meshx_ct:call(Two, meshx_node, info, []),
    [Upstream] = [Port || #{node := Name, port := Port} <- Upstreams, Name =:= name(Two)],
    note("node1 -> 127.0.0.1:~b sidecar == mTLS ==> sidecar :~b -> 127.0.0.1:~b node2", [
        Upstream, Public, Listen
    ]).

work_across(One, #{node := Node2} = Two) ->
    step("rpc: node2 was asked for its name", fun() ->
        should_be(Node2, meshx_ct:call(One, erpc, call, [Node2, erlang, node, []]), "the answer")
    end),
    step("spawn: a process on node2 answered, and its end was seen on node1", fun() ->
        should_be(
            [{answer, Node2}, {ended, done}],
            meshx_ct:call(One, ?MODULE, work, [Node2]),
            "what node1 saw"
        )
    end),
    {Echo, Same} = meshx_ct:call(One, ?MODULE, echo, [Node2]),
    should_be(true, Same, "whether 64 MiB came back unchanged"),
    report(Echo / 1000, "a message of 64 MiB went there and back unchanged", []),
    Time = meshx_ct:call(One, ?MODULE, pour, [Node2, ?STREAM_MESSAGES, ?STREAM_SIZE]),
    Bytes = ?STREAM_MESSAGES * ?STREAM_SIZE,
    report(Time / 1000, "~b messages of 1 MiB went there: ~b MB/s", [
        ?STREAM_MESSAGES, round(Bytes / Time)
    ]),
    {ok, [#{bytes_in := In, bytes_out := Out}]} = meshx_ct:call(Two, meshx_node, info, [links]),
    expect(In > Bytes + ?LARGE andalso Out > ?LARGE, "node2's link counts fewer bytes than were sent"),
    note("node2's counters of the link: ~b MiB in, ~b MiB out", [In div ?MIB, Out div ?MIB]).

show_services(Agent, Nodes) ->
    Expected = lists:sort(lists:append([[name(Node), sidecar_name(Node)] || Node <- Nodes])),
    Services = step("two services, two sidecars, all of their checks pass", fun() ->
        Found = meshx_ct_agent:services(Agent),
        should_be(Expected, lists:sort(maps:keys(Found)), "the registered services"),
        Checks = maps:values(meshx_ct_agent:get(Agent, "/v1/agent/checks")),
        Failing = [Check || #{<<"Status">> := Status} = Check <- Checks, Status =/= <<"passing">>],
        should_be([], Failing, "the checks that fail"),
        Found
    end),
    lists:foreach(
        fun(Id) ->
            #{Id := #{<<"Service">> := Name, <<"Port">> := Port}} = Services,
            note("~-32ts service ~-32ts port ~b", [Id, Name, Port])
        end,
        Expected
    ).

deny(Agent, One, Two) ->
    Mark = meshx_ct:mark(One),
    step("intention set to deny", fun() -> meshx_ct_agent:deny(Agent, name(One), name(Two)) end),
    step("the open link is cut", fun() ->
        meshx_ct:wait("the end of the link on both nodes", fun() ->
            [meshx_ct:call(Node, erlang, nodes, []) || Node <- [One, Two]] =:= [[], []]
        end)
    end),
    step("node1 can't connect: false", fun() ->
        should_be(false, meshx_ct:connect(One, Two), "the connect, although denied,")
    end),
    Lines = meshx_ct:own_lines(One, Mark),
    note("node1 logs:", []),
    [note("  ~ts", [Line]) || Line <- Lines],
    expect(
        lists:any(fun(Line) -> string:find(Line, "intention") =/= nomatch end, Lines),
        "node1 logs nothing of an intention"
    ).

stop(Agent, One, Two) ->
    Processes =
        [maps:get(process, Node) || Node <- [One, Two]] ++ meshx_ct:watch(One) ++ meshx_ct:watch(Two),
    expect(length(Processes) >= 6, "a guard or a sidecar is missing"),
    step("node2: net_kernel:stop()", fun() ->
        should_be(ok, meshx_ct:call(Two, net_kernel, stop, []), "its result")
    end),
    should_be(
        lists:sort([name(One), sidecar_name(One)]),
        lists:sort(maps:keys(meshx_ct_agent:services(Agent))),
        "what is still registered"
    ),
    step("node1: init:stop(), VM gone", fun() -> meshx_ct:stop(One) end),
    step("node2: VM gone", fun() -> meshx_ct:stop(Two) end),
    should_be(#{}, meshx_ct_agent:services(Agent), "what is still registered"),
    note("nothing is registered in Consul any more", []),
    step("no VM, guard or sidecar runs any more", fun() ->
        meshx_ct:wait("the end of all processes", fun() ->
            not lists:any(fun meshx_ct_proc:is_alive/1, Processes)
        end)
    end).

%%% In the nodes

%% On node1: spawns on Node, collects what comes back.
-spec work(node()) -> [term()].
work(Node) ->
    Self = self(),
    {Pid, Monitor} = spawn_monitor(Node, fun() ->
        Self ! {self(), {answer, node()}},
        exit(done)
    end),
    [
        receive
            {Pid, Answer} -> Answer
        end,
        receive
            {'DOWN', Monitor, process, Pid, Reason} -> {ended, Reason}
        end
    ].

%% Sends a large binary to Node and back: {Microseconds, whether it is unchanged}.
-spec echo(node()) -> {integer(), boolean()}.
echo(Node) ->
    Large = rand:bytes(?LARGE),
    {Time, Back} = timer:tc(fun() -> erpc:call(Node, erlang, hd, [[Large]]) end),
    {Time, Back =:= Large}.

%% Sends Count messages of Size bytes to a process on Node. Returns the microseconds until it has
%% told that it got all.
-spec pour(node(), pos_integer(), pos_integer()) -> integer().
pour(Node, Count, Size) ->
    {Drain, Monitor} = spawn_monitor(Node, ?MODULE, drain, [self(), Count]),
    Message = rand:bytes(Size),
    Begin = erlang:monotonic_time(microsecond),
    [Drain ! Message || _ <- lists:seq(1, Count)],
    receive
        {Drain, all} ->
            demonitor(Monitor, [flush]),
            erlang:monotonic_time(microsecond) - Begin;
        {'DOWN', Monitor, process, Drain, Reason} ->
            error(Reason)
    end.

-spec drain(pid(), non_neg_integer()) -> ok.
drain(From, 0) ->
    From ! {self(), all},
    ok;
drain(From, Count) ->
    receive
        Message when is_binary(Message) -> drain(From, Count - 1)
    end.

%%% Steps

step(Text, Fun) ->
    Begin = erlang:monotonic_time(microsecond),
    Result =
        try
            Fun()
        catch
            throw:{wrong, Why} -> throw({wrong, [Text, ": ", Why]});
            Class:Reason -> throw({wrong, io_lib:format("~ts: ~0tp", [Text, {Class, Reason}])})
        end,
    report((erlang:monotonic_time(microsecond) - Begin) / 1000, "~ts", [Text]),
    Result.

should_be(Expected, Expected, _What) ->
    Expected;
should_be(Expected, Found, What) ->
    throw({wrong, io_lib:format("~ts is ~0tp, not ~0tp", [What, Found, Expected])}).

expect(true, _) -> ok;
expect(false, Text) -> throw({wrong, Text}).

report(Milliseconds, Format, Arguments) ->
    put(steps, get(steps) + 1),
    Time =
        case Milliseconds < 10 of
            true -> io_lib:format("~.1f", [Milliseconds]);
            false -> integer_to_list(round(Milliseconds))
        end,
    io:format("~7ts ms  ~ts~n", [Time, io_lib:format(Format, Arguments)]).

note(Format, Arguments) ->
    io:format("            ~ts~n", [io_lib:format(Format, Arguments)]).

heading(Text) ->
    io:format("~n~ts~n", [Text]).

name(#{node := Node}) ->
    atom_to_binary(Node).

sidecar_name(Node) ->
    <<(name(Node))/binary, "-sidecar-proxy">>.

now_ms() ->
    erlang:monotonic_time(millisecond).

%%% TERM, as the emulator's signal server tells it

-spec init(term()) -> {ok, pid()}.
init({Main, _}) when is_pid(Main) ->
    {ok, Main};
init(Main) ->
    {ok, Main}.

-spec handle_event(atom(), pid()) -> {ok, pid()}.
handle_event(sigterm, Main) ->
    Main ! sigterm,
    {ok, Main};
handle_event(_, Main) ->
    {ok, Main}.

-spec handle_call(term(), pid()) -> {ok, ok, pid()}.
handle_call(_, Main) ->
    {ok, ok, Main}.
