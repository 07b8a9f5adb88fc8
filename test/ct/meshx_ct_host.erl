%% Two hosts and a wire between them: network namespaces, which take the rights of root.
%%
%% A namespace lives while a process is in it: a cat that reads from an Erlang port, so that it goes
%% with the process that keeps both, or with the whole VM. The wire ends with them.
-module(meshx_ct_host).

-export([start/0, stop/1, cut/1, mend/1]).
-export([address/1, command/1, socket_options/1]).
-export_type([host/0]).

-type host() :: #{keeper := pid(), pid := pos_integer(), address := string(), other := string()}.

%% Anything will do: nobody else is in these namespaces.
-define(ADDRESSES, ["10.99.0.1", "10.99.0.2"]).

-define(HOLD, "exec unshare --net sh -c 'ip link set lo up && echo $$ && exec cat' 2>&1").

%% Or what the system says when it does not let us.
-spec start() -> {ok, [host()]} | {error, string()}.
start() ->
    Self = self(),
    {Keeper, Monitor} = spawn_monitor(fun() -> keep(Self) end),
    receive
        {Keeper, Hosts} -> demonitor(Monitor, [flush]) andalso {ok, Hosts};
        {'DOWN', Monitor, process, Keeper, {refused, Text}} -> {error, Text}
    end.

keep(Starter) ->
    [One, Two] = [hold() || _ <- ?ADDRESSES],
    [Here, There] = ?ADDRESSES,
    Hosts = [
        #{keeper => self(), pid => One, address => Here, other => There},
        #{keeper => self(), pid => Two, address => There, other => Here}
    ],
    run("ip link add wire netns ~b type veth peer name wire netns ~b", [One, Two]),
    [
        begin
            run("~ts ip address add ~ts/24 dev wire", [command(Host), Address]),
            run("~ts ip link set wire up", [command(Host)])
        end
     || #{address := Address} = Host <- Hosts
    ],
    Starter ! {self(), Hosts},
    receive
        {From, stop} -> From ! {self(), stopped}
    end.

hold() ->
    Port = open_port({spawn_executable, "/bin/sh"}, [{args, ["-c", ?HOLD]}, {line, 200}, exit_status]),
    receive
        {Port, {data, {eol, Line}}} ->
            try list_to_integer(Line)
            catch
                error:badarg -> exit({refused, Line})
            end;
        {Port, {exit_status, Status}} ->
            exit({refused, lists:concat(["unshare ends with status ", Status])})
    end.

run(Format, Arguments) ->
    Command = lists:flatten(io_lib:format(Format, Arguments)),
    case os:cmd(Command ++ " 2>&1") of
        "" -> ok;
        Text -> exit({refused, Command ++ ": " ++ Text})
    end.

%% The namespaces end with the last process that was started in them.
-spec stop([host()]) -> ok.
stop([#{keeper := Keeper} | _]) ->
    Keeper ! {self(), stop},
    receive
        {Keeper, stopped} -> ok
    end.

%% From now on nothing arrives, and nobody is told: each sends to a station that isn't there.
-spec cut([host()]) -> ok.
cut(Hosts) ->
    [
        run("~ts ip neigh replace ~ts lladdr 02:00:00:00:00:01 nud permanent dev wire", [command(Host), Other])
     || #{other := Other} = Host <- Hosts
    ],
    ok.

-spec mend([host()]) -> ok.
mend(Hosts) ->
    [run("~ts ip neigh delete ~ts dev wire", [command(Host), Other]) || #{other := Other} = Host <- Hosts],
    ok.

%% Where others find it.
-spec address(host()) -> string().
address(#{address := Address}) -> Address.

%% What a command that runs there begins with.
-spec command(host()) -> string().
command(#{pid := Pid}) -> lists:concat(["nsenter --net --target ", Pid]).

%% For sockets there.
-spec socket_options(host()) -> [gen_tcp:option()].
socket_options(#{pid := Pid}) -> [{netns, lists:concat(["/proc/", Pid, "/ns/net"])}].
