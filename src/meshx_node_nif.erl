%% The NIF library's functions, as they are: types, how it is loaded, no policy.
%%
%% Sockets: c_src/nif/socket.h (life, owner, locks), c_src/nif/link.h (framed input and output).
%% Node services: c_src/nif/mesh.h (events), include/meshx_node.h (what they mean).
-module(meshx_node_nif).

-export([
    load/0,
    listen/3,
    accept/2,
    connect/4,
    connected/1,
    controlling_process/2,
    address/2,
    peer_uid/1,
    peer_socket/1,
    close/1,
    setopt/3,
    getopt/2,
    framing/2,
    low_water/2,
    select/1,
    await/2,
    read/1,
    write/2,
    flush/1,
    tick/1,
    statistics/1,
    timer/0,
    timer_start/2,
    mesh_open/2,
    mesh_upstream/6,
    mesh_link_up/5,
    mesh_link_down/2,
    mesh_info/2,
    mesh_renew/1,
    mesh_drain/1,
    mesh_stop/1
]).

-export_type([socket/0, timer/0, mesh/0, options/0, option/0, failure/0, error/0, frame/0]).
-export_type([write_result/0, statistics/0]).

%% In step with ABI_VERSION in c_src/nif/nif.c.
-define(ABI_VERSION, 5).

%% A listener or a link. Its owner's death closes it.
-type socket() :: reference().
-type timer() :: reference().
%% The handle of a node service. The death of the process that opened it stops the service.
-type mesh() :: reference().
-type option() ::
    nodelay
    | keepalive
    | sndbuf
    | recbuf
    | reuseaddr
    | priority
    | tos
    | tclass
    | backlog
    | ipv6_v6only.
-type options() :: #{option() => integer()}.
%% A code of MESHX_ERRORS in include/meshx_node.h and one line of text for people.
-type failure() :: {Code :: atom(), Text :: binary()}.
-type error() :: {error, closed | bad_frame | inet:posix()}.
%% Size is the sum of the binaries' sizes.
-type frame() :: {Size :: non_neg_integer(), [binary()]}.
-type write_result() :: ok | more | wait | error().
-type statistics() ::
    {
        FramesIn :: non_neg_integer(),
        FramesOut :: non_neg_integer(),
        BytesIn :: non_neg_integer(),
        BytesOut :: non_neg_integer(),
        BytesPending :: non_neg_integer()
    }.

%% Loads the library; must come before anything else here, may be repeated. Not by -on_load:
%% in embedded mode its handlers run after net_sup has started, which needs us.
%%
%% The module is sticky from then on: a second load is refused, as for kernel's own modules. For
%% those who insist (cover), new code takes over from old: links and node services go on. But not
%% if the old code is purged before the new is called: its sockets and handles go with it.
-spec load() -> ok | {error, failure()}.
load() ->
    Path = filename:join(meshx_node_path:priv_dir(), "meshx_node"),
    case erlang:load_nif(Path, ?ABI_VERSION) of
        ok ->
            true = code:stick_mod(?MODULE),
            ok;
        %% It has it already; or there is newer code, for whose calls this is.
        {error, {Reason, _}} when Reason =:= reload; Reason =:= old_code ->
            ok;
        {error, {Reason, Text}} ->
            {error,
                {Reason, unicode:characters_to_binary(["can't load ", Path, ".so: ", Text, remedy(Text)])}}
    end.

%% The numbers are those of MESHX_ERRORS.
remedy("Library load-call unsuccessful (-1)" ++ _) ->
    "; out of memory";
remedy("Library load-call unsuccessful (-3)" ++ _) ->
    "; its thread can't be started, is there a limit on memory or processes (ulimit -v, -u)?";
remedy("Failed to load NIF library" ++ _ = Text) ->
    case string:find(Text, "failed to map") =/= nomatch orelse string:find(Text, "annot allocate") =/= nomatch of
        true -> "; is there a limit on memory (ulimit -v)?";
        false -> "; was it built on this machine?"
    end;
remedy(_) ->
    "; was it built on this machine?".

%% Opens a listener, owned by the caller. Port 0: any free one.
-spec listen(inet:ip_address(), inet:port_number(), options()) ->
    {ok, socket()} | {error, inet:posix()}.
listen(Ip, Port, Options) ->
    load_and_call(?FUNCTION_NAME, [Ip, Port, Options]).

%% Accepts one connection, owned by the caller. `wait': {select, Listener, undefined,
%% ready_input} will come when there may be one.
-spec accept(socket(), options()) -> {ok, socket()} | wait | error().
accept(Listener, Options) ->
    load_and_call(?FUNCTION_NAME, [Listener, Options]).

%% Begins to connect. `wait': after {select, Link, undefined, ready_output} ask connected/1.
-spec connect(
    inet:ip_address(),
    inet:port_number(),
    undefined | {inet:ip_address(), inet:port_number()},
    options()
) -> {ok, socket()} | {wait, socket()} | {error, inet:posix()}.
connect(Ip, Port, Bind, Options) ->
    load_and_call(?FUNCTION_NAME, [Ip, Port, Bind, Options]).

%% The outcome of connect/4; `wait' as there.
-spec connected(socket()) -> ok | wait | error().
connected(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% Makes another process the owner.
-spec controlling_process(socket(), pid()) -> ok | {error, closed}.
controlling_process(Socket, Pid) ->
    load_and_call(?FUNCTION_NAME, [Socket, Pid]).

-spec address(socket(), local | peer) ->
    {ok, {inet:ip_address(), inet:port_number()}} | error().
address(Socket, Which) ->
    load_and_call(?FUNCTION_NAME, [Socket, Which]).

%% The user of the operating system whose process has the other end; `own': the VM's effective
%% one. enoent: no process of this host has it, since it is closed or elsewhere.
-spec peer_uid(socket()) -> {ok, own | non_neg_integer()} | error().
peer_uid(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% The inode of the socket at the other end, if a process of our own user has it; 0: not so, or not
%% known.
-spec peer_socket(socket()) -> non_neg_integer().
peer_socket(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% Closes at once; what the kernel has not taken is lost. Idempotent.
-spec close(socket()) -> ok.
close(Socket) ->
    load_and_call(?FUNCTION_NAME, [Socket]).

-spec setopt(socket(), option(), integer()) -> ok | error().
setopt(Socket, Option, Value) ->
    load_and_call(?FUNCTION_NAME, [Socket, Option, Value]).

-spec getopt(socket(), option()) -> {ok, integer()} | error().
getopt(Socket, Option) ->
    load_and_call(?FUNCTION_NAME, [Socket, Option]).

%% 2-byte lengths (handshake, as a new link has) or 4-byte ones (distribution).
-spec framing(socket(), handshake | distribution) -> ok.
framing(Link, Framing) ->
    load_and_call(?FUNCTION_NAME, [Link, Framing]).

%% Bytes (of a quarter of the receive buffer at most) that must have arrived before a wait for input
%% ends, if it begins after the next read/1 and the peer doesn't end the link; read/1 then leaves it to
%% select/1 and await/2 to wait. 0: a frame's. Fewer are kept from nobody: read/1 may be called at any time.
-spec low_water(socket(), Bytes :: non_neg_integer()) -> ok.
low_water(Link, Bytes) ->
    load_and_call(?FUNCTION_NAME, [Link, Bytes]).

%% {select, Link, undefined, ready_input} will come when there is input, or the end of it.
-spec select(socket()) -> ok | error().
select(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% Whether there is input, or the end of it, before the time is over. Until then nobody else runs on the
%% caller's scheduler.
-spec await(socket(), Microseconds :: 0..1000) -> ready | none.
await(Link, Microseconds) ->
    load_and_call(?FUNCTION_NAME, [Link, Microseconds]).

%% What has arrived: `more', call again; `wait', a {select, Link, undefined, ready_input} will
%% come, unless low_water/2 has set bytes. In the handshake one frame at most. Ticks are counted, not
%% delivered.
-spec read(socket()) -> {more | wait, [binary()]} | error().
read(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% Writes frames; what does not fit is kept. `more': call flush/1; `wait': call it after
%% {select, Link, undefined, ready_output}. The next write must come after an `ok'.
-spec write(socket(), [frame()]) -> write_result().
write(Link, Frames) ->
    load_and_call(?FUNCTION_NAME, [Link, Frames]).

-spec flush(socket()) -> write_result().
flush(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% Writes an empty frame if nothing else is under way. Any process; never waits.
-spec tick(socket()) -> ok | error().
tick(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% Counts since the link was made. Any process; takes no lock.
-spec statistics(socket()) -> statistics().
statistics(Link) ->
    load_and_call(?FUNCTION_NAME, [Link]).

%% A timer of microseconds; goes with the calling process.
-spec timer() -> {ok, timer()} | {error, inet:posix()}.
timer() ->
    load_and_call(?FUNCTION_NAME, []).

%% {select, Timer, undefined, ready_input} follows. For the process that made it.
-spec timer_start(timer(), Microseconds :: pos_integer()) -> ok | {error, inet:posix()}.
timer_start(Timer, Microseconds) ->
    load_and_call(?FUNCTION_NAME, [Timer, Microseconds]).

%% Begins to start a node service; {meshx_event, Tag, Type, Data} messages follow
%% (c_src/nif/mesh.h lists them). Config is meshx_node_config:load/1's with `listen_address'
%% and `listen_port'. `stopping': the VM's former one has not ended yet, try again.
-spec mesh_open(map(), term()) -> {ok, mesh()} | stopping | {error, failure()}.
mesh_open(Config, Tag) ->
    load_and_call(?FUNCTION_NAME, [Config, Tag]).

%% Asks for the way to a node, or only whether there is one, or whether it is registered; or, of one
%% that has dialled us, whether it may; Socket is peer_socket/1's. An `upstream' event answers.
-spec mesh_upstream(mesh(), non_neg_integer(), Node, ServiceId, ServiceName, Mode) ->
    ok | {error, atom()}
when
    Node :: binary(),
    ServiceId :: binary(),
    ServiceName :: binary(),
    Mode :: dial | redial | ask | find | {accept, Socket :: non_neg_integer()}.
mesh_upstream(Mesh, Request, Node, ServiceId, ServiceName, Mode) ->
    load_and_call(?FUNCTION_NAME, [Mesh, Request, Node, ServiceId, ServiceName, Mode]).

%% A node is linked from now on until mesh_link_down/2: `link_denied' and `link_health' events may
%% tell of it.
-spec mesh_link_up(mesh(), pos_integer(), binary(), binary() | undefined, dialed | accepted) ->
    ok | {error, atom()}.
mesh_link_up(Mesh, Id, Node, ServiceName, How) ->
    load_and_call(?FUNCTION_NAME, [Mesh, Id, Node, ServiceName, How]).

-spec mesh_link_down(mesh(), pos_integer()) -> ok.
mesh_link_down(Mesh, Id) ->
    load_and_call(?FUNCTION_NAME, [Mesh, Id]).

%% Asks for an `info' event.
-spec mesh_info(mesh(), non_neg_integer()) -> ok | {error, atom()}.
mesh_info(Mesh, Request) ->
    load_and_call(?FUNCTION_NAME, [Mesh, Request]).

%% The VM answers: its check may pass for another TTL.
-spec mesh_renew(mesh()) -> ok.
mesh_renew(Mesh) ->
    load_and_call(?FUNCTION_NAME, [Mesh]).

%% Lets the checks fail, so that peers stop dialing.
-spec mesh_drain(mesh()) -> ok.
mesh_drain(Mesh) ->
    load_and_call(?FUNCTION_NAME, [Mesh]).

%% Deregisters and stops the sidecar; a `stopped' event follows.
-spec mesh_stop(mesh()) -> ok.
mesh_stop(Mesh) ->
    load_and_call(?FUNCTION_NAME, [Mesh]).

%% Code that was loaded anew gets the library by its first call. term(): dialyzer must not take
%% the stubs for what they do.
-spec load_and_call(atom(), [term()]) -> term().
load_and_call(Function, Arguments) ->
    case load() of
        ok -> apply(?MODULE, Function, Arguments);
        {error, Failure} -> erlang:nif_error({not_loaded, Failure})
    end.
