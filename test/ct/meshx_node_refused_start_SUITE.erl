%% A node that can't start says so once, in words a person can act on, undoes everything and
%% leaves the VM as it was: with the mistake put right it starts.
-module(meshx_node_refused_start_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        agent_down,
        agent_down_at_boot,
        wrong_agent_addresses,
        answers_that_are_no_agent,
        bad_flag,
        bad_flag_at_boot,
        bad_environment,
        sidecar_command_missing,
        sidecar_command_fails,
        sidecar_that_never_accepts,
        no_sidecar_port,
        name_in_use,
        listen_port_taken,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%% The start fails with one line that matches, and neither process nor service is left.
refused(#{agent := Agent} = Vm, Pattern) ->
    Before = meshx_ct_agent:services(Agent),
    Mark = meshx_ct:mark(Vm),
    {error, _} = meshx_ct:net_start(Vm, refused, []),
    meshx_ct:wait("the line", fun() -> own_lines(Vm, Mark) =/= [] end),
    [Line] = own_lines(Vm, Mark),
    ?assertEqual({Line, match}, {Line, re:run(Line, ["node refused@.* does not start: .*", Pattern], [unicode, {capture, none}])}),
    meshx_ct:wait("the end of guard and sidecar", fun() -> meshx_ct:watch(Vm) =:= [] end, 1000),
    ?assertEqual(nonode@nohost, meshx_ct:call(Vm, erlang, node, [])),
    ?assertEqual(lists:sort(maps:keys(Before)), lists:sort(maps:keys(meshx_ct_agent:services(Agent)))),
    Line.

own_lines(Vm, Mark) ->
    [Line || Line <- meshx_ct:own_lines(Vm, Mark), binary:match(Line, <<"does not start">>) =/= nomatch].

%% And with the mistake put right, in the same VM:
starts(Vm) ->
    Node = meshx_ct:net_start(Vm, refused),
    ?assertNotEqual(none, meshx_ct:service(Node)).

set(Vm, Variable, Value) ->
    meshx_ct:call(Vm, os, putenv, [Variable, Value]).

%% The same at boot: the VM ends, with the line on its output.
refused_at_boot(Config, Arguments, Options, Pattern) ->
    {Status, Output} = meshx_ct:erl(Config, ["-sname", "refused" | Arguments], Options),
    ?assert(is_integer(Status)),
    ?assertNotEqual(0, Status),
    ?assertEqual({Output, match}, {Output, re:run(Output, ["meshx_node: node refused@.* does not start: .*", Pattern], [unicode, {capture, none}])}).

%%% The agent

agent_down(Config) ->
    #{agent := Agent} = Vm = meshx_ct:vm(Config, #{}),
    Address = lists:concat(["127.0.0.1:", meshx_ct_agent:free_port()]),
    set(Vm, "CONSUL_HTTP_ADDR", Address),
    refused(Vm, [Address, ".*can't be reached.*CONSUL_HTTP_ADDR"]),
    set(Vm, "CONSUL_HTTP_ADDR", meshx_ct_agent:url(Agent)),
    starts(Vm).

agent_down_at_boot(Config) ->
    Address = lists:concat(["127.0.0.1:", meshx_ct_agent:free_port()]),
    refused_at_boot(Config, [], #{env => [{"CONSUL_HTTP_ADDR", Address}]}, [Address, ".*can't be reached"]).

wrong_agent_addresses(Config) ->
    #{agent := Agent} = Vm = meshx_ct:vm(Config, #{}),
    [
        begin
            set(Vm, "CONSUL_HTTP_ADDR", Value),
            refused(Vm, "CONSUL_HTTP_ADDR")
        end
     || Value <- [
            "no host",
            "127.0.0.1:99999",
            "127.0.0.1:x",
            "ftp://127.0.0.1:8500",
            "http://",
            "unix://",
            "unix:///nonexistent/socket",
            "http://127.0.0.1:8500?q",
            "does-not-exist.invalid:8500"
        ]
    ],
    set(Vm, "CONSUL_HTTP_ADDR", meshx_ct_agent:url(Agent)),
    starts(Vm).

%% Something else listens where the agent should, or something between that answers for it.
answers_that_are_no_agent(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    Answers = [
        {"HTTP/1.1 500 Oh\r\nContent-Length: 14\r\n\r\nno idea at all", "500 no idea at all"},
        {"HTTP/1.1 403 No\r\nContent-Length: 17\r\n\r\nPermission denied", "Permission denied"},
        {"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found", ""},
        {"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{\"a\": [1", ""},
        {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull", ""},
        {"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n[", ""},
        {"SSH-2.0-OpenSSH_9.2\r\n", ""},
        {"", ""}
    ],
    [
        with_server(Answer, fun(Address) ->
            set(Vm, "CONSUL_HTTP_ADDR", Address),
            refused(Vm, [Address, ".*", Pattern])
        end)
     || {Answer, Pattern} <- Answers
    ].

%% A server that gives every request the same answer and closes.
with_server(Answer, Fun) ->
    Self = self(),
    {Server, Monitor} = spawn_monitor(fun() ->
        {ok, Listener} = gen_tcp:listen(0, [binary, {ip, {127, 0, 0, 1}}, {active, false}, {reuseaddr, true}]),
        {ok, Port} = inet:port(Listener),
        Self ! {self(), Port},
        serve(Listener, Answer)
    end),
    Port =
        receive
            {Server, Listening} -> Listening
        end,
    try
        Fun(lists:concat(["127.0.0.1:", Port]))
    after
        demonitor(Monitor, [flush]),
        exit(Server, kill)
    end.

serve(Listener, Answer) ->
    {ok, Socket} = gen_tcp:accept(Listener),
    _ = gen_tcp:recv(Socket, 0, 5000),
    _ = gen_tcp:send(Socket, Answer),
    gen_tcp:shutdown(Socket, write),
    _ = gen_tcp:recv(Socket, 0, 1000),
    gen_tcp:close(Socket),
    serve(Listener, Answer).

%%% Configuration

bad_flag(Config) ->
    Vm = meshx_ct:vm(Config, #{args => ["-meshx_node", "ttl", "5"]}),
    refused(Vm, "-meshx_node ttl 5: must be milliseconds, 1000 to ").

bad_flag_at_boot(Config) ->
    refused_at_boot(
        Config, ["-meshx_node", "sidecar_ports", "'{0,5}'"], #{}, "-meshx_node sidecar_ports .*must be {First,Last}"
    ).

bad_environment(Config) ->
    Vm = meshx_ct:vm(Config, #{env => [{"MESHX_FORCE_REGISTRATION", "perhaps"}]}),
    refused(Vm, "MESHX_FORCE_REGISTRATION=perhaps: must be true or false"),
    set(Vm, "MESHX_FORCE_REGISTRATION", "false"),
    starts(Vm).

%%% The sidecar

sidecar_command_missing(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    set(Vm, "MESHX_SIDECAR_COMMAND", "/nonexistent/sidecar -x"),
    refused(Vm, "MESHX_SIDECAR_COMMAND.*/nonexistent/sidecar"),
    set(Vm, "MESHX_SIDECAR_COMMAND", "no-such-program-anywhere"),
    refused(Vm, "no-such-program-anywhere"),
    meshx_ct:call(Vm, os, unsetenv, ["MESHX_SIDECAR_COMMAND"]),
    starts(Vm).

sidecar_command_fails(Config) ->
    Vm = meshx_ct:vm(Config, #{env => [{"MESHX_SIDECAR_COMMAND", "/bin/false"}]}),
    refused(Vm, "/bin/false.*status 1"),
    %% What it has to say is told.
    set(Vm, "MESHX_SIDECAR_COMMAND", "/bin/sh -c 'echo no certificate today >&2; exit 3'"),
    refused(Vm, "status 3.*no certificate today"),
    set(Vm, "MESHX_SIDECAR_COMMAND", "/bin/sh -c 'kill -SEGV $$'"),
    refused(Vm, "/bin/sh.*signal"),
    set(Vm, "MESHX_SIDECAR_COMMAND", "/etc/passwd"),
    refused(Vm, "/etc/passwd").

sidecar_that_never_accepts(Config) ->
    Vm = meshx_ct:vm(Config, #{
        env => [{"MESHX_SIDECAR_COMMAND", "/bin/sleep 600"}, {"MESHX_START_TIMEOUT", "1500"}]
    }),
    refused(Vm, "sidecar .*does not accept .* after 1500 ms").

no_sidecar_port(Config) ->
    {ok, Taken} = gen_tcp:listen(0, [{ip, {127, 0, 0, 1}}]),
    {ok, Port} = inet:port(Taken),
    Vm = meshx_ct:vm(Config, #{env => [{"MESHX_SIDECAR_PORTS", integer_to_list(Port)}]}),
    refused(Vm, ["sidecar_ports.*", integer_to_list(Port)]),
    gen_tcp:close(Taken),
    starts(Vm).

%%% Names and ports

name_in_use(Config) ->
    First = meshx_ct:start(Config, refused, #{}),
    #{node := Witness} = Other = meshx_ct:start(Config, witness, #{}),
    ?assert(meshx_ct:connect(First, Other)),
    Service = meshx_ct:service(First),
    Second = meshx_ct:vm(Config, #{}),
    refused(Second, "name refused@.* is in use"),
    refused_at_boot(Config, [], #{}, "is in use"),
    %% The one that has the name does not even notice.
    ?assertEqual(Service, meshx_ct:service(First)),
    ?assertEqual([Witness], meshx_ct:call(First, erlang, nodes, [])),
    ?assertEqual([], meshx_ct:own_lines(First, 0)),
    meshx_ct:stop(First),
    starts(Second).

listen_port_taken(Config) ->
    {ok, Taken} = gen_tcp:listen(0, [{ip, {127, 0, 0, 1}}]),
    {ok, Port} = inet:port(Taken),
    Text = integer_to_list(Port),
    Vm = meshx_ct:vm(Config, #{args => ["-kernel", "inet_dist_listen_min", Text, "inet_dist_listen_max", Text]}),
    refused(Vm, [Text, ".*inet_dist_listen_min"]),
    gen_tcp:close(Taken),
    starts(Vm).
