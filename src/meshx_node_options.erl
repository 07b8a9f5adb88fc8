%% Socket options: kernel's own environment variables (`inet_dist_use_interface',
%% `inet_dist_listen_min/max', `inet_dist_listen_options', `inet_dist_connect_options',
%% `dist_nodelay') and net_kernel:setopts/getopts, as OTP's carriers understand them, to what
%% the NIF takes. Without `inet_dist_use_interface' we listen on loopback: the sidecar is the
%% only one that has to reach us.
-module(meshx_node_options).

-export([listen/1, accepted/0, connect/0, set/2, get/2]).

-include_lib("kernel/include/logger.hrl").

-define(LOOPBACK, {127, 0, 0, 1}).
%% What fits into an int, as setsockopt(2) takes it.
-define(INT_MAX, 16#7fffffff).

%% Opens the distribution listener at a port as configured, or at any; owned by the caller.
-spec listen(configured_port | any_port) ->
    {ok, meshx_node_nif:socket()} | {error, {atom(), unicode:chardata()}}.
listen(Port) ->
    Given = kernel_list(inet_dist_listen_options),
    Ip =
        case application:get_env(kernel, inet_dist_use_interface) of
            {ok, Interface} -> Interface;
            undefined -> proplists:get_value(ip, Given, ?LOOPBACK)
        end,
    Ports =
        case Port of
            configured_port -> port_range();
            any_port -> {0, 0}
        end,
    case inet:ntoa(Ip) of
        {error, einval} ->
            {error,
                {bad_configuration,
                    io_lib:format(
                        "kernel's inet_dist_use_interface is ~tp; it takes an address such as "
                        "{127,0,0,1} or {0,0,0,0,0,0,0,1}",
                        [Ip]
                    )}};
        _ ->
            {First, _} = Ports,
            listen(Ip, First, Ports, integers(inet_dist_listen_options, Given))
    end.

listen(Ip, Port, {_, Last} = Ports, Options) ->
    case meshx_node_nif:listen(Ip, Port, Options) of
        {ok, Listener} ->
            {ok, Listener};
        {error, eaddrinuse} when Port < Last ->
            listen(Ip, Port + 1, Ports, Options);
        {error, Reason} ->
            {error,
                {Reason,
                    io_lib:format(
                        "can't listen on ~ts, port ~ts: ~ts; see kernel's inet_dist_use_interface, "
                        "inet_dist_listen_min and inet_dist_listen_max, and the flag -erl_epmd_port",
                        [inet:ntoa(Ip), range_text(Ports), inet:format_error(Reason)]
                    )}}
    end.

%% As OTP's carriers: -erl_epmd_port, which the scripts of rebar3's releases make of ERL_DIST_PORT,
%% comes first.
port_range() ->
    case erl_epmd:listen_port_please(undefined, undefined) of
        {ok, 0} -> kernel_port_range();
        {ok, Port} -> {Port, Port}
    end.

kernel_port_range() ->
    case application:get_env(kernel, inet_dist_listen_min) of
        {ok, First} when is_integer(First) ->
            case application:get_env(kernel, inet_dist_listen_max) of
                {ok, Last} when is_integer(Last) -> {First, Last};
                _ -> {First, First}
            end;
        _ ->
            {0, 0}
    end.

range_text({0, 0}) ->
    "any";
range_text({First, Last}) ->
    io_lib:format("~b to ~b", [First, Last]).

%% For a link that was accepted.
-spec accepted() -> meshx_node_nif:options().
accepted() ->
    maps:with(
        [nodelay, keepalive, priority, tos, tclass],
        maps:merge(
            nodelay(),
            integers(inet_dist_listen_options, kernel_list(inet_dist_listen_options))
        )
    ).

%% For a link that is dialled, with the local address to bind, if one is given.
-spec connect() ->
    {undefined | {inet:ip_address(), inet:port_number()}, meshx_node_nif:options()}.
connect() ->
    Given = kernel_list(inet_dist_connect_options),
    Bind =
        case proplists:get_value(ip, Given) of
            undefined -> undefined;
            Ip -> {Ip, proplists:get_value(port, Given, 0)}
        end,
    {Bind, maps:merge(nodelay(), integers(inet_dist_connect_options, Given))}.

nodelay() ->
    #{
        nodelay =>
            case application:get_env(kernel, dist_nodelay) of
                {ok, false} -> 0;
                _ -> 1
            end
    }.

kernel_list(Key) ->
    case application:get_env(kernel, Key) of
        {ok, List} when is_list(List) -> List;
        _ -> []
    end.

%% ---- options of a running socket ----

%% All of Options or, if one of them can't be set, none. Only pairs: net_kernel adds what it sets
%% for new links to kernel's lists, and ends, with the whole distribution, on anything else.
-spec set(meshx_node_nif:socket(), [term()]) -> ok | {error, term()}.
set(Socket, Options) ->
    case [Option || {Name, _} = Option <- Options, is_ours(Name)] of
        [] ->
            case lists:all(fun is_settable/1, Options) of
                true -> set_each(Socket, Options);
                false -> {error, einval}
            end;
        Bad ->
            {error, {badopts, Bad}}
    end.

is_settable({Name, _} = Option) -> kind(Name) =/= elsewhere andalso to_integer(Option) =/= unknown;
is_settable(_) -> false.

set_each(_Socket, []) ->
    ok;
set_each(Socket, [Option | Rest]) ->
    case set_one(Socket, to_integer(Option)) of
        ok -> set_each(Socket, Rest);
        %% Of this kind of socket, as inet:setopts/2 says it.
        {error, enoprotoopt} -> {error, einval};
        Error -> Error
    end.

set_one(Socket, {Name, Value}) -> meshx_node_nif:setopt(Socket, Name, Value);
set_one(_Socket, ignored) -> ok.

-spec get(meshx_node_nif:socket(), [atom()]) -> {ok, [{atom(), term()}]} | {error, term()}.
get(Socket, Names) ->
    case lists:any(fun(Name) -> lists:member(kind(Name), [elsewhere, unknown]) end, Names) of
        true -> {error, einval};
        false -> get_each(Socket, Names, [])
    end.

get_each(_Socket, [], Found) ->
    {ok, lists:reverse(Found)};
get_each(Socket, [Name | Rest], Found) ->
    case meshx_node_nif:getopt(Socket, Name) of
        {ok, Value} ->
            get_each(Socket, Rest, [{Name, from_integer(Name, Value)} | Found]);
        {error, closed} ->
            {error, closed};
        {error, _} ->
            %% inet:getopts/2 leaves out what the system does not know.
            get_each(Socket, Rest, Found)
    end.

%% ---- conversion ----

%% Options that are the carrier's own affair.
is_ours(Name) ->
    lists:member(Name, [active, deliver, packet]).

integers(Key, Options) ->
    lists:foldl(
        fun(Option, Map) ->
            case to_integer(Option) of
                {Name, Value} ->
                    Map#{Name => Value};
                ignored ->
                    Map;
                unknown ->
                    ?LOG_WARNING("meshx_node: ~tp in kernel's ~ts is not supported, ignored", [
                        Option, Key
                    ]),
                    Map
            end
        end,
        #{},
        Options
    ).

to_integer({Name, Value}) ->
    case kind(Name) of
        boolean when Value -> {Name, 1};
        boolean when not Value -> {Name, 0};
        integer when is_integer(Value), Value >= -?INT_MAX, Value =< ?INT_MAX -> {Name, Value};
        driver -> ignored;
        elsewhere -> ignored;
        _ -> unknown
    end;
to_integer(Option) when is_atom(Option) ->
    ignored;
to_integer(_) ->
    unknown.

from_integer(Name, Value) ->
    case kind(Name) of
        boolean -> Value =/= 0;
        integer -> Value
    end.

%% driver: makes sense for OTP's port drivers only; elsewhere: of a new socket, read elsewhere in
%% this module.
kind(nodelay) -> boolean;
kind(keepalive) -> boolean;
kind(reuseaddr) -> boolean;
kind(ipv6_v6only) -> boolean;
kind(sndbuf) -> integer;
kind(recbuf) -> integer;
kind(priority) -> integer;
kind(tos) -> integer;
kind(tclass) -> integer;
kind(backlog) -> integer;
kind(active) -> driver;
kind(buffer) -> driver;
kind(delay_send) -> driver;
kind(deliver) -> driver;
kind(header) -> driver;
kind(high_msgq_watermark) -> driver;
kind(high_watermark) -> driver;
kind(low_msgq_watermark) -> driver;
kind(low_watermark) -> driver;
kind(mode) -> driver;
kind(packet) -> driver;
kind(send_timeout) -> driver;
kind(send_timeout_close) -> driver;
kind(ifaddr) -> elsewhere;
kind(inet_backend) -> elsewhere;
kind(ip) -> elsewhere;
kind(port) -> elsewhere;
kind(_) -> unknown.
