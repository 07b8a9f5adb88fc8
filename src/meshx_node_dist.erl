%% The distribution carrier as net_kernel calls it: `-proto_dist meshx_node'.
%%
%% Thin: sockets are meshx_node_options and meshx_node_nif, the node service (registration,
%% sidecar, upstreams) is meshx_node_mesh, who may connect is meshx_node_acceptor, one link is
%% meshx_node_ctrl. What stays here is the order of things: listen opens the listener, then makes
%% it a node service; setup asks the mesh where a node is, then shakes hands.
%%
%% Processes of a link, all linked: the connection process (dist_util's handshake, then ticks),
%% its controller (output) and the input process.
-module(meshx_node_dist).

-export([
    childspecs/0,
    listen/1,
    listen/2,
    accept/1,
    accept_connection/5,
    setup/5,
    close/1,
    select/1,
    has_room/0,
    address/0,
    is_node_name/1,
    setopts/2,
    getopts/2
]).

%% Spawned.
-export([do_accept/5, do_setup/6]).

-include_lib("kernel/include/net_address.hrl").
-include_lib("kernel/include/dist.hrl").
-include_lib("kernel/include/dist_util.hrl").
-include_lib("kernel/include/logger.hrl").

%% Processes a VM must still have room for to take on one more link, which has three: net_kernel, and
%% with it the VM, ends when it can't start the first, and others may be faster than we are.
-define(ROOM, 32).

%% Children of net_sup: there before net_kernel, at boot too, and stopped after it.
-spec childspecs() -> {ok, [supervisor:child_spec()]}.
childspecs() ->
    {ok, [
        #{
            id => meshx_node_mesh,
            start => {meshx_node_mesh, start_link, []},
            restart => permanent,
            shutdown => 10000,
            type => worker,
            modules => [meshx_node_mesh]
        }
    ]}.

%% ---- listening ----

-spec listen(atom()) -> Result when
    Result ::
        {ok, {meshx_node_nif:socket(), #net_address{}, Creation :: non_neg_integer()}} | {error, term()}.
listen(Name) ->
    {ok, Host} = inet:gethostname(),
    listen(Name, Host).

%% Opens the listener and makes it a node service; returns when peers can reach it.
-spec listen(atom(), string()) -> Result when
    Result ::
        {ok, {meshx_node_nif:socket(), #net_address{}, Creation :: non_neg_integer()}} | {error, term()}.
listen(Name, Host) ->
    Node = list_to_atom(atom_to_list(Name) ++ "@" ++ Host),
    case is_node_name(Node) of
        true ->
            maybe_listen(Node, Host, meshx_node_nif:load());
        false ->
            %% erlang:setnode/2 would refuse it, but only when it is registered.
            start_failed(Node, {bad_node_name, "a node name has one @, and something on either side"})
    end.

maybe_listen(Node, Host, ok) ->
    %% For inet:format_error/1, now: when descriptors have run out no module can be loaded.
    _ = code:ensure_loaded(erl_posix_msg),
    case meshx_node_options:listen(listener_port()) of
        {ok, Listener} ->
            {ok, {Ip, Port} = Address} = meshx_node_nif:address(Listener, local),
            case start_service(Node, Ip, Port) of
                ok ->
                    {ok, {Listener, net_address(Address, Host), creation()}};
                {error, Failure} ->
                    meshx_node_nif:close(Listener),
                    start_failed(Node, Failure)
            end;
        {error, Failure} ->
            start_failed(Node, Failure)
    end;
maybe_listen(Node, _Host, {error, Failure}) ->
    start_failed(Node, Failure).

%% Nobody dials a remote shell: it leaves a configured port to the node that stands beside it.
listener_port() ->
    case is_remote_shell() of
        true -> any_port;
        false -> configured_port
    end.

%% Nobody looks for a remote shell, not even for one with a name: it stays without a service.
start_service(Node, Ip, Port) ->
    case is_remote_shell() of
        true -> ok;
        false -> meshx_node_mesh:start_service(Node, Ip, Port)
    end.

%% erl's own flag; what iex and the commands of Elixir's releases (remote, rpc, pid, stop) pass on to
%% Elixir; or an escript with which rebar3's releases run their commands.
is_remote_shell() ->
    Arguments = init:get_plain_arguments(),
    init:get_argument(remsh) =/= error orelse
        lists:any(fun(Argument) -> lists:member(Argument, ["--remsh", "--rpc-eval"]) end, Arguments) orelse
        is_release_escript(Arguments).

is_release_escript([Script | _]) ->
    lists:member(filename:basename(Script), ["nodetool", "install_upgrade.escript"]);
is_release_escript([]) ->
    false.

%% net_kernel knows one reason by name, and prints only an atom of any other. It starts the node with
%% what other carriers there are.
start_failed(Node, {Reason, Text}) ->
    Failed =
        case meshx_node_select:is_alone() of
            true -> "does not start";
            false -> "is not in the mesh"
        end,
    report_start_failure(io_lib:format("node ~ts ~ts: ~ts", [Node, Failed, Text])),
    case Reason of
        name_in_use -> {error, duplicate_name};
        _ -> {error, Reason}
    end.

%% At boot net_kernel halts the VM right after this, before logger has written anything.
report_start_failure(Text) ->
    case started_at_boot() of
        true -> erlang:display_string(lists:flatten(["meshx_node: ", Text, "\n"]));
        false -> ?LOG_ERROR("meshx_node: ~ts", [Text])
    end.

started_at_boot() ->
    lists:any(fun(Flag) -> init:get_argument(Flag) =/= error end, [name, sname]).

%% Without epmd nobody hands out creations: a random one, and none of the small ones that
%% mean something else (net_kernel does the same for nodes without a listener).
creation() ->
    3 + rand:uniform((1 bsl 32) - 4).

-spec address() -> #net_address{}.
address() ->
    {ok, Host} = inet:gethostname(),
    net_address(undefined, Host).

net_address(Address, Host) ->
    #net_address{
        address = Address,
        host = Host,
        protocol = meshx,
        family = family(Address)
    }.

family({Ip, _Port}) when tuple_size(Ip) =:= 8 -> inet6;
family(_Address) -> inet.

%% The node service goes with its listener: peers stop dialing before links are closed. With
%% net_kernel links end, too, and say why in the emulator's words: it does so itself only for ports.
-spec close(meshx_node_nif:socket()) -> ok.
close(Listener) ->
    meshx_node_mesh:drain(),
    [
        exit(Controller, net_kernel_terminated)
     || {_, Controller} <- erlang:system_info(dist_ctrl), is_pid(Controller)
    ],
    meshx_node_nif:close(Listener).

%% ---- accepting ----

-spec accept(meshx_node_nif:socket()) -> pid().
accept(Listener) ->
    meshx_node_acceptor:start(Listener).

%% Whether a VM that is nearly full of processes can take on another link.
-spec has_room() -> boolean().
has_room() ->
    erlang:system_info(process_count) + ?ROOM =< erlang:system_info(process_limit).

%% Controller has read the first packet of the connection and told net_kernel.
-spec accept_connection(pid(), pid(), node(), [node()], non_neg_integer()) -> pid().
accept_connection(_AcceptPid, Controller, MyNode, Allowed, SetupTime) ->
    try
        spawn_opt(
            ?MODULE,
            do_accept,
            [self(), Controller, MyNode, Allowed, SetupTime],
            dist_util:net_ticker_spawn_options()
        )
    catch
        error:system_limit ->
            %% Else net_kernel would end, and all links with it.
            exit(Controller, kill),
            Controller
    end.

-spec do_accept(pid(), pid(), node(), [node()], non_neg_integer()) -> no_return().
do_accept(Kernel, Controller, MyNode, Allowed, SetupTime) ->
    %% The acceptor may have dropped it: it does the same, but only when it knows us.
    link(Controller),
    receive
        {Controller, controller} ->
            Timer = dist_util:start_timer(SetupTime),
            HSData = handshake_data(Kernel, Controller, MyNode, Timer),
            dist_util:handshake_other_started(HSData#hs_data{allowed = Allowed})
    end.

%% ---- connecting ----

%% The only place where net_kernel can be told that setup/5 is not to be called.
-spec select(node()) -> boolean().
select(Node) ->
    is_node_name(Node) andalso (has_room() orelse not_selected(Node)) andalso
        meshx_node_select:takes(Node).

not_selected(Node) ->
    ?LOG_ERROR(
        "meshx_node: no link to ~ts: too many processes; raise this VM's limit on them (erl +P)", [Node]
    ),
    false.

-spec is_node_name(term()) -> boolean().
is_node_name(Node) when is_atom(Node) ->
    Text = atom_to_list(Node),
    case string:split(Text, "@", all) of
        %% NUL would end the text in C.
        [[_ | _], [_ | _]] -> not lists:member(0, Text);
        _ -> false
    end;
is_node_name(_) ->
    false.

-spec setup(node(), Type, node(), longnames | shortnames, non_neg_integer()) -> pid() when
    Type :: normal | hidden.
setup(Node, Type, MyNode, LongOrShortNames, SetupTime) ->
    spawn_opt(
        ?MODULE,
        do_setup,
        [self(), Node, Type, MyNode, LongOrShortNames, SetupTime],
        dist_util:net_ticker_spawn_options()
    ).

%% Long or short names: no difference. Where a node is, its registration says, no resolver, so a
%% node called node1@myhost may be started with long names, as MeshxNode's users do.
-spec do_setup(pid(), node(), Type, node(), longnames | shortnames, non_neg_integer()) ->
    no_return()
when
    Type :: normal | hidden.
do_setup(Kernel, Node, Type, MyNode, _LongOrShortNames, SetupTime) ->
    Timer = dist_util:start_timer(SetupTime),
    %% Earlier than the timer, which ends us without a word.
    Deadline = erlang:monotonic_time(millisecond) + SetupTime - min(500, SetupTime div 4),
    case dial(Node, MyNode, Deadline) of
        {ok, Controller} ->
            dist_util:reset_timer(Timer),
            HSData = handshake_data(Kernel, Controller, MyNode, Timer),
            dist_util:handshake_we_started(HSData#hs_data{
                other_node = Node,
                other_version = ?ERL_DIST_VER_HIGH,
                request_type = request_type(Type)
            });
        {error, {Reason, Text}} ->
            report_no_link(io_lib:format("meshx_node: no link to ~ts: ~ts", [Node, Text])),
            ?shutdown2(Node, Reason)
    end.

%% Since OTP 26 the shell of -remsh, without a link, halts its VM. It is what would print a log line,
%% but waits for the link.
report_no_link(Text) ->
    case init:get_argument(remsh) =/= error andalso erlang:system_info(otp_release) >= "26" of
        true -> io:format(standard_error, "~ts~n", [Text]);
        false -> ?LOG_WARNING("~ts", [Text])
    end.

%% Others can't dial a remote shell, as its links would otherwise make them do. Nodes without a
%% listener are hidden by net_kernel.
request_type(Type) ->
    case is_remote_shell() of
        true -> hidden;
        false -> Type
    end.

%% Of a control node this may be the first that is heard: without a listener (-dist_listen false,
%% -sname undefined) net_kernel has not called listen/2.
dial(Node, MyNode, Deadline) ->
    case meshx_node_mesh:start_control_node(MyNode) of
        ok -> meshx_node_ctrl:dial(Node, Deadline);
        {error, Failure} -> {error, Failure}
    end.

%% What both directions of a handshake have in common. The connection process learns the link
%% when the handshake is complete (it may be dialled more than once until then) and keeps it in
%% its dictionary: dist_util's funs are fixed before.
handshake_data(Kernel, Controller, MyNode, Timer) ->
    #hs_data{
        kernel_pid = Kernel,
        this_node = MyNode,
        socket = Controller,
        timer = Timer,
        this_flags = 0,
        f_send = fun meshx_node_ctrl:send/2,
        f_recv = fun meshx_node_ctrl:recv/3,
        f_setopts_pre_nodeup = fun meshx_node_ctrl:handshaken/1,
        f_setopts_post_nodeup = fun(_Controller) -> ok end,
        f_getll = fun(Pid) -> {ok, Pid} end,
        f_address = fun remote_address/2,
        f_handshake_complete = fun(Pid, Node, Handle) ->
            put(?MODULE, meshx_node_ctrl:link_up(Pid, Node, Handle)),
            ok
        end,
        mf_tick = fun tick/1,
        mf_getstat = fun(_Controller) -> getstat(get(?MODULE)) end,
        mf_setopts = fun(_Controller, Options) -> setopts(get(?MODULE), Options) end,
        mf_getopts = fun(_Controller, Options) -> getopts(get(?MODULE), Options) end
    }.

remote_address(Controller, Node) ->
    [_, Host] = string:split(atom_to_list(Node), "@"),
    net_address(meshx_node_ctrl:peer(Controller), Host).

%% Written by the connection process itself, past the controller: a tick waits behind no data.
tick(Controller) ->
    case meshx_node_nif:tick(get(?MODULE)) of
        ok ->
            ok;
        {error, _} = Error ->
            self() ! {tcp_closed, Controller},
            Error
    end.

getstat(Link) ->
    {FramesIn, FramesOut, _, _, Pending} = meshx_node_nif:statistics(Link),
    {ok, FramesIn, FramesOut, Pending}.

%% ---- socket options ----

-spec setopts(meshx_node_nif:socket(), [term()]) -> ok | {error, term()}.
setopts(Socket, Options) ->
    meshx_node_options:set(Socket, Options).

-spec getopts(meshx_node_nif:socket(), [atom()]) -> {ok, [{atom(), term()}]} | {error, term()}.
getopts(Socket, Options) ->
    meshx_node_options:get(Socket, Options).
