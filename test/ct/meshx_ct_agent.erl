%% Consul agents for the suites: started on free ports, asked and changed over their HTTP API.
%%
%% An agent is the child of a shell that waits for the end of its standard input, which is an
%% Erlang port: when the port or the whole VM goes, so does the agent.
-module(meshx_ct_agent).

-export([start/1, stop/1, forget/1, restart/1, url/1, lan/1, host/1, address/1, binary/0, free_port/0]).
-export([get/2, put/3, request/4, request/5]).
-export([services/1, healthy/2, upstreams/2, deny/3, allow/3, delete_intentions/1]).
-export_type([agent/0]).

-type agent() :: #{
    http := inet:port_number(),
    port := port(),
    process := meshx_ct_proc:process(),
    directory := file:filename(),
    options := map(),
    token => string()
}.

-define(SCRIPT,
    "log=$1; shift; \"$@\" >\"$log\" 2>&1 </dev/null & echo $!; cat >/dev/null; kill $! 2>/dev/null; wait $!"
).

%% The calling process owns the agent. Directory is the agent's own. `config' is HCL, `token' is
%% sent with every request of this module. With `servers', it is one of so many, for which it
%% doesn't wait, and has a `name' of its own; lan/1 says where the others join it. Such a one knows
%% after a restart what it knew before, until forget/1; then a leader takes some seconds to be
%% elected. With `host', it runs there (meshx_ct_host). With `join', it is no server but a client of
%% that agent, as on most hosts.
-spec start(#{
    directory := file:filename(),
    config => string(),
    token => string(),
    servers => pos_integer(),
    name => string(),
    host => meshx_ct_host:host(),
    join => agent()
}) -> agent().
start(Options) ->
    start(Options, 5).

%% A port that was free may be taken before Consul binds it: others are tried.
start(#{directory := Directory} = Options, Tries) ->
    ok = filelib:ensure_path(Directory),
    Where = #{options => Options},
    [Http, Grpc, Server, Serf] = Ports = maps:get(ports, Options, free_ports(4)),
    Log = filename:join(Directory, "agent.log"),
    Arguments = [
        "-c",
        ?SCRIPT,
        "sh",
        Log
        | command(Where) ++ [binary(), "agent"]
    ] ++ [
        lists:concat(["-node=", maps:get(name, Options, "meshx-ct")]),
        "-bind=" ++ address(Where),
        "-client=127.0.0.1",
        "-dns-port=-1",
        "-serf-wan-port=-1",
        "-log-level=info",
        lists:concat(["-http-port=", Http]),
        lists:concat(["-grpc-port=", Grpc]),
        lists:concat(["-server-port=", Server]),
        lists:concat(["-serf-lan-port=", Serf]),
        "-hcl",
        maps:get(config, Options, "")
        | mode(Options) ++ newer_arguments()
    ],
    Clean = [{Name, false} || "CONSUL_" ++ _ = Name <- [N || {N, _} <- os:env()]],
    Port = open_port({spawn_executable, "/bin/sh"}, [
        {args, Arguments}, {line, 100}, {env, Clean}, exit_status
    ]),
    OsPid =
        receive
            {Port, {data, {eol, Line}}} -> list_to_integer(Line)
        end,
    Agent = maps:merge(maps:with([token], Options), #{
        options => Options#{ports => Ports},
        http => Http, port => Port, directory => Directory, process => meshx_ct_proc:find(OsPid)
    }),
    Deadline = erlang:monotonic_time(millisecond) + 60000,
    Ready =
        case Options of
            #{servers := Servers} when Servers > 1 -> answers(Agent, Deadline);
            #{} -> has_leader(Agent, Deadline)
        end,
    case Ready of
        true ->
            Agent;
        false when Tries > 1 ->
            stop(Agent),
            start(Options, Tries - 1);
        false ->
            stop(Agent),
            {ok, Text} = file:read_file(Log),
            error({agent_does_not_start, binary:part(Text, byte_size(Text), -min(2000, byte_size(Text)))})
    end.

%% A server that keeps its data in its directory, or one that is all a cluster needs and keeps none.
mode(#{servers := Servers, directory := Directory}) ->
    [
        "-server",
        lists:concat(["-bootstrap-expect=", Servers]),
        "-data-dir=" ++ data(Directory),
        "-hcl=connect { enabled = true } performance { raft_multiplier = 1 }"
    ];
mode(#{join := Agent, directory := Directory}) ->
    [
        "-data-dir=" ++ data(Directory),
        "-retry-join=" ++ lan(Agent),
        "-retry-interval=1s",
        %% As -dev has it, which finds out in a second who has gone.
        "-hcl=connect { enabled = true } leave_on_terminate = false gossip_lan { gossip_interval = \"100ms\" "
        "probe_interval = \"100ms\" probe_timeout = \"100ms\" suspicion_mult = 3 }"
    ];
mode(_) ->
    ["-dev"].

command(#{options := #{host := Host}}) -> string:lexemes(meshx_ct_host:command(Host), " ");
command(_) -> [].

data(Directory) ->
    filename:join(Directory, "data").

%% Consul >= 1.14 opens one more port, which older ones do not know how to close.
newer_arguments() ->
    Help = os:cmd(lists:concat(["'", binary(), "' agent -help 2>&1"])),
    ["-grpc-tls-port=-1" || string:find(Help, "grpc-tls-port") =/= nomatch].

%% Not more: it may be without a leader.
answers(#{process := none}, _) ->
    false;
answers(#{http := Http, process := Process} = Agent, Deadline) ->
    case gen_tcp:connect({127, 0, 0, 1}, Http, socket_options(Agent)) of
        {ok, Socket} ->
            gen_tcp:close(Socket),
            true;
        {error, _} ->
            Waits = erlang:monotonic_time(millisecond) < Deadline,
            meshx_ct_proc:is_alive(Process) andalso Waits andalso
                begin
                    timer:sleep(20),
                    answers(Agent, Deadline)
                end
    end.

has_leader(#{process := none}, _) ->
    false;
has_leader(#{process := Process} = Agent, Deadline) ->
    Nodes =
        try
            get(Agent, "/v1/catalog/nodes")
        catch
            error:{badmatch, _} -> []
        end,
    case Nodes of
        [_ | _] ->
            %% The catalog knows the agent: registrations become visible.
            true;
        _ ->
            Waits = erlang:monotonic_time(millisecond) < Deadline,
            meshx_ct_proc:is_alive(Process) andalso Waits andalso
                begin
                    timer:sleep(20),
                    has_leader(Agent, Deadline)
                end
    end.

%% Returns when the process is gone.
-spec stop(agent()) -> ok.
stop(#{port := Port, process := Process}) ->
    try
        port_close(Port)
    catch
        %% It has ended by itself.
        error:badarg -> true
    end,
    Process =:= none orelse gone(Process, 250).

%% What an agent that keeps its data has kept, after stop/1.
-spec forget(agent()) -> ok.
forget(#{directory := Directory}) ->
    ok = file:del_dir_r(data(Directory)).

%% At the same ports, after stop/1, with no state but what it keeps.
-spec restart(agent()) -> agent().
restart(#{options := Options}) ->
    start(Options, 1).

gone(Process, 0) ->
    meshx_ct_proc:signal(Process, "KILL"),
    gone(Process, 250);
gone(Process, Tries) ->
    case meshx_ct_proc:is_alive(Process) of
        true ->
            timer:sleep(20),
            gone(Process, Tries - 1);
        false ->
            ok
    end.

%% host:port, as CONSUL_HTTP_ADDR takes it.
-spec url(agent()) -> string().
url(#{http := Http}) ->
    lists:concat(["127.0.0.1:", Http]).

%% Where other servers join it.
-spec lan(agent()) -> string().
lan(#{options := #{ports := [_, _, _, Serf]}} = Agent) ->
    lists:concat([address(Agent), ":", Serf]).

%% Where it runs.
-spec host(agent()) -> meshx_ct_host:host() | none.
host(#{options := #{host := Host}}) -> Host;
host(_) -> none.

%% At which address others reach its host.
-spec address(agent()) -> string().
address(#{options := #{host := Host}}) -> meshx_ct_host:address(Host);
address(_) -> "127.0.0.1".

socket_options(#{options := #{host := Host}}) -> meshx_ct_host:socket_options(Host);
socket_options(_) -> [].

%% MESHX_CONSUL, else what `make consul' has left in this tree.
-spec binary() -> file:filename().
binary() ->
    case os:getenv("MESHX_CONSUL", "") of
        "" -> filename:join(meshx_ct:root(), "_build/consul/usr/bin/consul");
        Path -> Path
    end.

-spec free_port() -> inet:port_number().
free_port() ->
    hd(free_ports(1)).

%% Held all at once, so that they differ.
free_ports(Count) ->
    Sockets = [element(2, {ok, _} = gen_tcp:listen(0, [{ip, {127, 0, 0, 1}}])) || _ <- lists:seq(1, Count)],
    Ports = [element(2, {ok, _} = inet:port(Socket)) || Socket <- Sockets],
    lists:foreach(fun gen_tcp:close/1, Sockets),
    Ports.

%%% HTTP

%% The decoded answer to a GET.
-spec get(agent(), iodata()) -> term().
get(Agent, Path) ->
    {200, Body} = request(Agent, "GET", Path, <<>>),
    decode(Body).

%% The body of the answer to a PUT.
-spec put(agent(), iodata(), term()) -> binary().
put(Agent, Path, Document) ->
    {ok, Json} = meshx_node_json:encode(Document),
    {200, Body} = request(Agent, "PUT", Path, Json),
    Body.

-spec request(agent(), string(), iodata(), iodata()) -> {Status :: pos_integer(), Body :: binary()}.
request(#{http := Http} = Agent, Method, Path, Body) ->
    request(Http, socket_options(Agent), maps:get(token, Agent, ""), Method, Path, Body).

%% HTTP/1.0, so that the end of the connection ends the body.
-spec request(inet:port_number(), string(), string(), iodata(), iodata()) ->
    {Status :: pos_integer(), Body :: binary()}.
request(Http, Token, Method, Path, Body) ->
    request(Http, [], Token, Method, Path, Body).

request(Http, SocketOptions, Token, Method, Path, Body) ->
    {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Http, [binary, {active, false} | SocketOptions], 5000),
    ok = gen_tcp:send(Socket, [
        [Method, " ", Path, " HTTP/1.0\r\n"],
        [["X-Consul-Token: ", Token, "\r\n"] || Token =/= ""],
        ["Content-Length: ", integer_to_list(iolist_size(Body)), "\r\n\r\n", Body]
    ]),
    Answer = receive_all(Socket, <<>>),
    gen_tcp:close(Socket),
    [Head, Content] = binary:split(Answer, <<"\r\n\r\n">>),
    [_, Status | _] = binary:split(Head, <<" ">>, [global]),
    {binary_to_integer(Status), Content}.

receive_all(Socket, Received) ->
    case gen_tcp:recv(Socket, 0, 30000) of
        {ok, More} -> receive_all(Socket, <<Received/binary, More/binary>>);
        {error, closed} -> Received
    end.

decode(Body) ->
    {ok, Term} = meshx_node_json:decode(Body),
    Term.

%%% What suites ask for

%% #{ServiceId => Service} of what is registered at this agent.
-spec services(agent()) -> #{binary() => map()}.
services(Agent) ->
    get(Agent, "/v1/agent/services").

%% IDs of the sidecars through which the service Name can be reached now.
-spec healthy(agent(), binary()) -> [binary()].
healthy(Agent, Name) ->
    Instances = get(Agent, ["/v1/health/connect/", uri_string:quote(Name), "?passing"]),
    [maps:get(<<"ID">>, maps:get(<<"Service">>, Instance)) || Instance <- Instances].

%% Names of the services for which the sidecar of a node has an upstream.
-spec upstreams(agent(), node()) -> [binary()].
upstreams(Agent, Node) ->
    Id = uri_string:quote(<<(atom_to_binary(Node))/binary, "-sidecar-proxy">>),
    #{<<"Proxy">> := Proxy} = get(Agent, ["/v1/agent/service/", Id]),
    [Name || #{<<"DestinationName">> := Name} <- maps:get(<<"Upstreams">>, Proxy, [])].

-spec deny(agent(), binary(), binary()) -> ok.
deny(Agent, Source, Destination) ->
    intend(Agent, Source, Destination, deny).

-spec allow(agent(), binary(), binary()) -> ok.
allow(Agent, Source, Destination) ->
    intend(Agent, Source, Destination, allow).

%% By name since 1.9, before that by creating it.
intend(Agent, Source, Destination, Action) ->
    Exact = [
        "/v1/connect/intentions/exact?source=",
        uri_string:quote(Source),
        "&destination=",
        uri_string:quote(Destination)
    ],
    {ok, Json} = meshx_node_json:encode(#{<<"Action">> => Action}),
    case request(Agent, "PUT", Exact, Json) of
        {200, _} ->
            ok;
        {_, _} ->
            [
                delete_intention(Agent, Intention)
             || #{<<"SourceName">> := From, <<"DestinationName">> := To} = Intention <- get(
                    Agent, "/v1/connect/intentions"
                ),
                {From, To} =:= {Source, Destination}
            ],
            {ok, Whole} = meshx_node_json:encode(#{
                <<"SourceName">> => Source,
                <<"DestinationName">> => Destination,
                <<"Action">> => Action
            }),
            {200, _} = request(Agent, "POST", "/v1/connect/intentions", Whole),
            ok
    end.

-spec delete_intentions(agent()) -> ok.
delete_intentions(Agent) ->
    [delete_intention(Agent, Intention) || Intention <- get(Agent, "/v1/connect/intentions")],
    ok.

delete_intention(Agent, #{<<"ID">> := Id}) when Id =/= <<>> ->
    {200, _} = request(Agent, "DELETE", ["/v1/connect/intentions/", Id], <<>>);
delete_intention(Agent, #{<<"SourceName">> := Source, <<"DestinationName">> := Destination}) ->
    Query = ["?source=", uri_string:quote(Source), "&destination=", uri_string:quote(Destination)],
    {200, _} = request(Agent, "DELETE", ["/v1/connect/intentions/exact", Query], <<>>).
