%% A TCP relay in front of a Consul agent that does harm on command. It passes everything through,
%% blocking queries too, until set/2 says otherwise; a request already under way keeps the
%% treatment it began with, but for a delay, which ends with its command.
%%
%% One process per relay, one per connection. Requests are read whole, since the command is chosen
%% for each; answers are passed on as they come.
-module(meshx_ct_relay).

-export([start/1, stop/1, address/1, set/2, requests/1, forget_requests/1]).
-export_type([relay/0, action/0]).

-type relay() :: #{pid := pid(), port := inet:port_number()}.
%% pass: as if it weren't there.
%% {delay, Ms}: the agent has the request at once, its answer comes later.
%% {answer, Status}: the relay answers, the agent never hears of it.
%% cut: the agent does what was asked; then the connection ends instead of an answer.
%% cut_answer: the same after two thirds of the answer.
%% garbage: no HTTP at all, and the end; the agent never hears of it.
%% endless: a body without end; the agent never hears of it.
%% {length, Delta}: the agent's answer, with a Content-Length that is off by Delta, and the end.
%% {body, Text}: the agent does what was asked; this is the body of the answer.
-type action() ::
    pass
    | {delay, pos_integer()}
    | {answer, pos_integer()}
    | cut
    | cut_answer
    | garbage
    | endless
    | {length, integer()}
    | {body, binary()}.
-type request() :: {Milliseconds :: integer(), Method :: binary(), Path :: binary(), action()}.

%% Lives until stop/1, or until the agents of the suite end.
-spec start(meshx_ct_agent:agent()) -> relay().
start(#{http := AgentPort}) ->
    Self = self(),
    {Pid, Monitor} = spawn_monitor(fun() ->
        monitor(process, meshx_ct_world),
        Options = [binary, {ip, {127, 0, 0, 1}}, {active, false}, {reuseaddr, true}, {backlog, 128}],
        {ok, Listener} = gen_tcp:listen(0, Options),
        {ok, Port} = inet:port(Listener),
        Relay = self(),
        spawn_link(fun() -> accept(Relay, Listener, AgentPort) end),
        Self ! {self(), Port},
        relay(#{action => pass, requests => [], connections => []})
    end),
    receive
        {Pid, Port} ->
            demonitor(Monitor, [flush]),
            #{pid => Pid, port => Port};
        {'DOWN', Monitor, process, Pid, Reason} ->
            error(Reason)
    end.

-spec stop(relay()) -> ok.
stop(#{pid := Pid}) ->
    Monitor = monitor(process, Pid),
    exit(Pid, kill),
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    end.

%% As CONSUL_HTTP_ADDR takes it.
-spec address(relay()) -> string().
address(#{port := Port}) ->
    lists:concat(["127.0.0.1:", Port]).

%% A fun chooses for each request.
-spec set(relay(), action() | fun((Method :: binary(), Path :: binary()) -> action())) -> ok.
set(Relay, Action) ->
    call(Relay, {set, Action}).

%% What was asked so far, oldest first.
-spec requests(relay()) -> [request()].
requests(Relay) ->
    call(Relay, requests).

-spec forget_requests(relay()) -> ok.
forget_requests(Relay) ->
    call(Relay, forget_requests).

call(#{pid := Pid}, Request) ->
    call(Pid, Request);
call(Pid, Request) ->
    Ref = monitor(process, Pid),
    Pid ! {self(), Ref, Request},
    receive
        {Ref, Reply} ->
            demonitor(Ref, [flush]),
            Reply;
        {'DOWN', Ref, process, Pid, Reason} ->
            exit(Reason)
    end.

relay(#{requests := Requests, connections := Connections} = S) ->
    receive
        {From, Ref, {set, Action}} ->
            [Connection ! new_action || Connection <- Connections],
            From ! {Ref, ok},
            relay(S#{action := Action});
        {From, Ref, requests} ->
            From ! {Ref, lists:reverse(Requests)},
            relay(S);
        {From, Ref, forget_requests} ->
            From ! {Ref, ok},
            relay(S#{requests := []});
        {From, Ref, {request, Method, Path}} ->
            Action = choose(maps:get(action, S), Method, Path),
            From ! {Ref, Action},
            Request = {erlang:monotonic_time(millisecond), Method, Path, Action},
            relay(S#{requests := [Request | Requests]});
        {connection, Connection} ->
            relay(S#{connections := [Connection | Connections]});
        {'DOWN', _, process, _, _} ->
            exit(shutdown)
    end.

choose(Action, Method, Path) when is_function(Action) -> Action(Method, Path);
choose(Action, _, _) -> Action.

%%% Connections

accept(Relay, Listener, AgentPort) ->
    {ok, Client} = gen_tcp:accept(Listener),
    Connection = spawn(fun() ->
        monitor(process, Relay),
        receive
            go -> connection(Relay, Client, AgentPort)
        end
    end),
    ok = gen_tcp:controlling_process(Client, Connection),
    Relay ! {connection, Connection},
    Connection ! go,
    accept(Relay, Listener, AgentPort).

connection(Relay, Client, AgentPort) ->
    case gen_tcp:connect({127, 0, 0, 1}, AgentPort, [binary, {active, true}, {nodelay, true}]) of
        {ok, Agent} ->
            ok = inet:setopts(Client, [{active, true}, {nodelay, true}]),
            connection(#{
                relay => Relay,
                client => Client,
                agent => Agent,
                received => <<>>,
                action => pass,
                timer => none,
                held => []
            });
        {error, _} ->
            gen_tcp:close(Client)
    end.

connection(#{client := Client, agent := Agent, received := Received, timer := Timer} = S) ->
    receive
        {tcp, Client, Data} ->
            connection(requested(S#{received := <<Received/binary, Data/binary>>}));
        {tcp, Agent, Data} ->
            connection(answered(S, Data));
        new_action ->
            connection(release(S));
        {timeout, Timer, release} ->
            connection(release(S));
        {timeout, _, release} ->
            connection(S);
        {'DOWN', _, process, _, _} ->
            exit(shutdown);
        %% Either has gone: the sockets go with this process.
        {tcp_closed, _} ->
            ok;
        {tcp_error, _, _} ->
            ok
    end.

release(#{client := Client, action := {delay, _}, held := Held} = S) ->
    _ = gen_tcp:send(Client, lists:reverse(Held)),
    S#{action := pass, held := []};
release(S) ->
    S.

%% Takes a request as soon as it is whole.
requested(#{relay := Relay, received := Received} = S) ->
    case take_request(Received) of
        {Request, Rest} ->
            [Method, Path | _] = binary:split(Request, <<" ">>, [global]),
            Action = call(Relay, {request, Method, Path}),
            act(Action, Request, S#{received := Rest, action := Action});
        more ->
            S
    end.

take_request(Received) ->
    case binary:split(Received, <<"\r\n\r\n">>) of
        [Head, Rest] ->
            case content_length(Head) of
                Length when byte_size(Rest) >= Length ->
                    split_binary(Received, byte_size(Head) + 4 + Length);
                _ ->
                    more
            end;
        [_] ->
            more
    end.

content_length(Head) ->
    case re:run(Head, "\r\ncontent-length: *([0-9]+)", [caseless, {capture, [1], binary}]) of
        {match, [Length]} -> binary_to_integer(Length);
        nomatch -> 0
    end.

act({answer, Status}, _, #{client := Client} = S) ->
    Body = lists:concat(["the relay says ", Status]),
    ok = gen_tcp:send(Client, [
        ["HTTP/1.1 ", integer_to_list(Status), " Relay\r\nContent-Length: ", integer_to_list(length(Body))],
        ["\r\n\r\n", Body]
    ]),
    S;
act(garbage, _, #{client := Client}) ->
    _ = gen_tcp:send(Client, binary:copy(<<0, 255, 13, 7, "garbage", 10>>, 50)),
    close(Client);
act(endless, _, #{client := Client}) ->
    _ = gen_tcp:send(Client, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n["),
    flood(Client, binary:copy(<<"{\"a\": [1, 2, 3]}, ">>, 3000));
act({delay, Time}, Request, #{agent := Agent} = S) ->
    _ = gen_tcp:send(Agent, Request),
    S#{timer := erlang:start_timer(Time, self(), release)};
act(_, Request, #{agent := Agent} = S) ->
    _ = gen_tcp:send(Agent, Request),
    S.

-spec flood(gen_tcp:socket(), binary()) -> no_return().
flood(Client, Part) ->
    case gen_tcp:send(Client, Part) of
        ok -> flood(Client, Part);
        {error, _} -> close(Client)
    end.

%% Something of an answer has come: the agent has done what it was asked.
answered(#{action := {delay, _}, held := Held} = S, Data) ->
    S#{held := [Data | Held]};
answered(#{action := cut, client := Client}, _) ->
    close(Client);
answered(#{action := cut_answer, client := Client}, Data) ->
    _ = gen_tcp:send(Client, binary:part(Data, 0, byte_size(Data) * 2 div 3)),
    close(Client);
answered(#{action := {length, Delta}, client := Client}, Data) ->
    [Head, Body] = binary:split(Data, <<"\r\n\r\n">>),
    Length = integer_to_binary(max(0, content_length(Head) + Delta)),
    Wrong = re:replace(Head, "(content-length: *)[0-9]+", ["\\g{1}", Length], [caseless]),
    _ = gen_tcp:send(Client, [Wrong, "\r\n\r\n", Body]),
    close(Client);
answered(#{action := {body, Text}, client := Client}, _) ->
    Length = integer_to_list(byte_size(Text)),
    _ = gen_tcp:send(Client, ["HTTP/1.1 200 OK\r\nContent-Length: ", Length, "\r\n\r\n", Text]),
    close(Client);
answered(#{client := Client} = S, Data) ->
    _ = gen_tcp:send(Client, Data),
    S.

%% What was sent still arrives.
-spec close(gen_tcp:socket()) -> no_return().
close(Client) ->
    _ = gen_tcp:shutdown(Client, write),
    _ = gen_tcp:close(Client),
    exit(normal).
