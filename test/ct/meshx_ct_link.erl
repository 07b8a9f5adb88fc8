%% One of the NIF's links with gen_tcp at its other end, for suites that say byte by byte what
%% goes over the wire.
-module(meshx_ct_link).

-export([listen/1, pair/1, connect/1, written/2, in_owner/2, finished/1, bytes/1, bytes/2]).

%% A listener for the peers of links, and its port.
-spec listen([gen_tcp:listen_option()]) -> {gen_tcp:socket(), inet:port_number()}.
listen(Options) ->
    {ok, Listener} = gen_tcp:listen(0, [binary, {active, false}, {ip, {127, 0, 0, 1}} | Options]),
    {ok, Port} = inet:port(Listener),
    {Listener, Port}.

%% A link in handshake framing, owned by the caller, and its peer, a socket with these options.
-spec pair([gen_tcp:listen_option()]) -> {meshx_node_nif:socket(), gen_tcp:socket()}.
pair(Options) ->
    {Listener, Port} = listen(Options),
    {ok, Link} = connect(Port),
    {ok, Peer} = gen_tcp:accept(Listener, 5000),
    ok = gen_tcp:close(Listener),
    {Link, Peer}.

-spec connect(inet:port_number()) -> {ok, meshx_node_nif:socket()} | {error, term()}.
connect(Port) ->
    case meshx_node_nif:connect({127, 0, 0, 1}, Port, undefined, #{}) of
        {wait, Link} ->
            receive
                {select, Link, _, ready_output} -> ok
            end,
            case meshx_node_nif:connected(Link) of
                ok -> {ok, Link};
                Error -> Error
            end;
        Other ->
            Other
    end.

%% Follows a write or flush, by its first result, to its end.
-spec written(meshx_node_nif:socket(), Result) -> Result when
    Result :: ok | more | wait | meshx_node_nif:error().
written(Link, wait) ->
    receive
        {select, Link, _, ready_output} -> ok
    end,
    written(Link, meshx_node_nif:flush(Link));
written(Link, more) ->
    written(Link, meshx_node_nif:flush(Link));
written(_Link, Result) ->
    Result.

%% Runs Fun in a new process that owns Link and keeps it until finished/1, which waits for
%% Fun's result.
-spec in_owner(meshx_node_nif:socket(), fun(() -> term())) -> pid().
in_owner(Link, Fun) ->
    Self = self(),
    Pid = spawn_link(fun() ->
        receive
            go -> Self ! {finished, self(), Fun()}
        end,
        receive
            stop -> ok
        end
    end),
    ok = meshx_node_nif:controlling_process(Link, Pid),
    Pid ! go,
    Pid.

-spec finished(pid()) -> term().
finished(Pid) ->
    receive
        {finished, Pid, Result} ->
            Pid ! stop,
            Result
    end.

%% Bytes that differ from place to place and from size to size, or from key to key.
-spec bytes(non_neg_integer()) -> binary().
bytes(Size) ->
    bytes(Size, Size).

-spec bytes(term(), non_neg_integer()) -> binary().
bytes(Key, Size) ->
    Words = <<<<(erlang:phash2({Key, N})):32>> || N <- lists:seq(1, min(251, Size))>>,
    binary:part(binary:copy(Words, Size div max(1, byte_size(Words)) + 1), 0, Size).
