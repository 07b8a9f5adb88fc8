%% Plain TCP without Erlang (tcp.c), the limit of what a carrier can reach: over loopback for nodes
%% that are linked directly, and through two Consul proxies for those with sidecars. Figures have
%% the keys of group data's.
-module(meshx_bench_tcp).

-export([open/3, close/1, roundtrip/2, clients/3, stream/3, sidecars/1]).
-export_type([subject/0]).

-type subject() :: #{
    carrier := meshx_bench:carrier(),
    server := port(),
    %% where clients connect
    port := inet:port_number(),
    services := [string()],
    agent := meshx_ct_agent:agent(),
    proxies := [meshx_bench_program:program()]
}.

%% Bytes of a message where its size is no part of the figure: about those of a small Erlang
%% message on its way.
-define(SMALL, 64).

-spec open(meshx_bench:config(), meshx_bench:carrier(), pos_integer()) -> subject().
open(Config, Carrier, Round) ->
    {Server, Port} = start_server(),
    Subject = #{
        carrier => Carrier,
        server => Server,
        port => Port,
        services => [],
        agent => proplists:get_value(agent, Config),
        proxies => []
    },
    case Carrier of
        tcp -> Subject;
        tcp_sidecars -> through_proxies(Subject, Round)
    end.

start_server() ->
    Server = open_port({spawn_executable, program()}, [{args, ["server", "0"]}, {line, 100}]),
    receive
        {Server, {data, {eol, "port " ++ Port}}} -> {Server, list_to_integer(Port)}
    end.

program() ->
    filename:join(meshx_ct:root(), "_build/bench/tcp").

%% As two nodes have it: two services, each with a sidecar; the client's has the server upstream.
through_proxies(#{agent := Agent, port := Port} = Subject, Round) ->
    [Server, Client] = Services = [lists:concat(["tcp_", End, "_", Round]) || End <- [server, client]],
    Upstream = meshx_ct_agent:free_port(),
    register_service(Agent, Server, Port, []),
    register_service(Agent, Client, meshx_ct_agent:free_port(), [
        #{'DestinationName' => Server, 'LocalBindPort' => Upstream}
    ]),
    Through = Subject#{
        port := Upstream,
        services := Services,
        proxies := [start_proxy(Agent, Service) || Service <- Services]
    },
    meshx_ct:wait("plain TCP through two proxies", fun() ->
        {Status, _} = meshx_bench_program:output(command(Through, roundtrip, [?SMALL, 1])),
        Status =:= 0
    end),
    Through.

%% The sidecar has a check of our own that passes: Consul's would only after some seconds.
register_service(Agent, Name, Port, Upstreams) ->
    _ = meshx_ct_agent:put(Agent, "/v1/agent/service/register", #{
        'Name' => Name,
        'Port' => Port,
        'Connect' => #{
            'SidecarService' => #{
                'Port' => meshx_ct_agent:free_port(),
                'Checks' => [#{'Name' => "passes", 'TTL' => "1h", 'Status' => "passing"}],
                'Proxy' => #{'Upstreams' => Upstreams}
            }
        }
    }),
    ok.

start_proxy(Agent, Service) ->
    meshx_bench_program:start(
        [meshx_ct_agent:binary(), "connect", "proxy", "-sidecar-for", Service],
        [{"CONSUL_HTTP_ADDR", meshx_ct_agent:url(Agent)}],
        "/dev/null"
    ).

-spec close(subject()) -> ok.
close(#{server := Server, services := Services, agent := Agent, proxies := Proxies}) ->
    [
        {200, _} = meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", Service], "")
     || Service <- Services
    ],
    lists:foreach(fun meshx_bench_program:stop/1, Proxies),
    true = port_close(Server),
    ok.

%% Microseconds.
-spec roundtrip(subject(), Milliseconds :: pos_integer()) ->
    #{p50 := float(), p99 := float(), p999 := float()}.
roundtrip(Subject, Milliseconds) ->
    [P50, P99, P999, _Count] = run(Subject, roundtrip, [?SMALL, Milliseconds]),
    #{p50 => P50, p99 => P99, p999 => P999}.

%% Round trips per second, with Count messages under way.
-spec clients(subject(), Count :: pos_integer(), Milliseconds :: pos_integer()) -> float().
clients(Subject, Count, Milliseconds) ->
    [Rate] = run(Subject, clients, [?SMALL, Count, Milliseconds]),
    Rate.

%% MB/s, and what the proxies have spent, in seconds per GB.
-spec stream(subject(), Size :: pos_integer(), Milliseconds :: pos_integer()) ->
    {MBs :: float(), SecondsPerGB :: [float()]}.
stream(Subject, Size, Milliseconds) ->
    Cpu = fun() -> [meshx_bench_os:cpu(OsPid) || OsPid <- sidecars(Subject)] end,
    Before = Cpu(),
    [Rate, Bytes] = run(Subject, stream, [Size, Milliseconds]),
    {Rate, [(B - A) * 1.0e9 / Bytes || {A, B} <- lists:zip(Before, Cpu())]}.

-spec sidecars(subject()) -> [pos_integer()].
sidecars(#{proxies := Proxies}) ->
    [meshx_ct_proc:pid(Process) || #{process := Process} <- Proxies].

%% The numbers it prints.
run(Subject, What, Arguments) ->
    case meshx_bench_program:output(command(Subject, What, Arguments)) of
        {0, Output} -> [number(Word) || Word <- string:lexemes(Output, " \n")];
        Failed -> error({tcp, What, Arguments, Failed})
    end.

command(#{port := Port}, What, Arguments) ->
    [program() | [lists:concat([Argument]) || Argument <- [What, Port | Arguments]]].

number(Word) ->
    case string:to_float(Word) of
        {error, no_float} -> float(list_to_integer(Word));
        {Number, ""} -> Number
    end.
