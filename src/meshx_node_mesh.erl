%% The node service of this VM: the process in front of the C mesh (include/meshx_node.h).
%%
%% Owns the mesh handle, turns its events into replies and log lines, and renews the lease of
%% the VM's health check: when this process can't run, neither can the VM do its work, and the
%% check goes critical. A child of net_sup, so it is there before net_kernel and ends after it.
-module(meshx_node_mesh).

-behaviour(gen_server).

-export([start_link/0, start_service/3, start_control_node/1, drain/0, upstream/2, find/3, is_static/2]).
-export([accepts/2]).
-export([link_up/4, info/0, service_name/1, allowed_uids/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).
-export_type([upstream/0, how/0]).

-include_lib("kernel/include/logger.hrl").

%% How long net_kernel waits until peers stop dialling, before it closes its links, ms.
-define(DRAIN_TIME, 100).

%% How long terminate waits for the orderly stop, ms. net_sup as a whole has 1 s when the node
%% was started by Node.start/3, some of it for draining; what is not done by then goes on in the
%% C thread.
-define(STOP_TIME, 800).

%% How often it is looked whether boot is over, while lines are held, ms.
-define(HOLD_TIME, 50).

%% How often it is looked whether the VM's former node service has ended, ms.
-define(FORMER_TIME, 20).

%% How long an accepted connection waits for what the agent says of intentions, ms: less than the
%% other side, which has net_setuptime, waits for us.
-define(ACCEPT_TIME, 2000).

%% Questions about accepted connections under way at the agent. More would only keep the heartbeats
%% waiting; who isn't asked about is judged when the link is up.
-define(ACCEPTS_MAX, 256).

%% Where a node is dialled: at an upstream of our sidecar, at the static address the key `upstreams'
%% gives, or, by a control node on the same host, directly at its listener.
-type upstream() :: {sidecar | static | direct, inet:ip_address(), inet:port_number()}.

%% How a link was made; one that was accepted, with the node whose service the other side uses.
-type how() :: dialed | {accepted, node()} | direct.

%% Who waits for an answer of the C side, and what it is about.
-type asker() :: {accept | other, gen_server:from()}.

-record(link, {
    %% number of this link for the C side
    id :: pos_integer(),
    node :: node(),
    controller :: pid(),
    socket :: meshx_node_nif:socket(),
    %% what makes the node critical in Consul
    trouble :: undefined | binary()
}).

-record(state, {
    mesh :: undefined | meshx_node_nif:mesh(),
    %% tells this mesh's events from those of one given up before
    tag :: undefined | reference(),
    %% what is read after the start; no secrets, which would show in reports and crash dumps
    config = #{} :: map(),
    %% who waits for the start
    starter :: undefined | gen_server:from(),
    %% who waits until peers stop dialling
    drainer :: undefined | gen_server:from(),
    requests = #{} :: #{non_neg_integer() => asker()},
    %% of them, those about accepted connections
    accepts = 0 :: non_neg_integer(),
    %% by the monitor of the controller
    links = #{} :: #{reference() => #link{}},
    %% log lines not yet given to logger, newest first
    held = [] :: [{logger:level(), io:format(), [term()]}],
    next = 1 :: pos_integer()
}).

-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% Makes the listener at Ip:Port the node service of Node. Returns when peers can reach it, or
%% when everything is undone. After a Node.stop/0 the former one may still be ending: it would
%% deregister the new one too, which has the same service ID.
-spec start_service(node(), inet:ip_address(), inet:port_number()) ->
    ok | {error, meshx_node_nif:failure()}.
start_service(Node, Ip, Port) ->
    %% The C side keeps start_timeout, and the times of a stop.
    case call({start_service, Node, Ip, Port}) of
        stopping ->
            timer:sleep(?FORMER_TIME),
            start_service(Node, Ip, Port);
        Result ->
            Result
    end.

%% Lets Node, which has no listener, dial others; nothing is registered. Nothing to do if this VM
%% is a node service or a control node already.
-spec start_control_node(node()) -> ok | {error, meshx_node_nif:failure()}.
start_control_node(Node) ->
    case call({start_control_node, Node}) of
        stopping ->
            timer:sleep(?FORMER_TIME),
            start_control_node(Node);
        Result ->
            Result
    end.

%% Peers stop dialing; open links live on. Returns when the agent knows it, or takes too long.
-spec drain() -> ok.
drain() ->
    try
        _ = gen_server:call(?MODULE, drain, ?DRAIN_TIME),
        ok
    catch
        exit:_ -> ok
    end.

%% Where to dial Node (`dial'; `redial' when it has closed a connection before a word), or only whether
%% it could be (`ask'). A failure names its reason.
%% Of a node with a static address nothing is asked: whether it is there and may be dialled, only
%% the owner of that address knows.
-spec upstream(node(), dial | redial | ask) ->
    {ok, upstream()} | {error, meshx_node_nif:failure()}.
upstream(Node, Mode) ->
    case meshx_node_dist:is_node_name(Node) of
        %% The C side keeps request_timeout.
        true -> call({upstream, Node, Mode});
        false -> {error, {node_unknown, text("~0tP is not a node name", [Node, 20])}}
    end.

%% Whether Node is in the mesh, asked for at most so many ms; as many again if we, Own, are a control
%% node that dials for the first time.
-spec find(node(), node(), pos_integer()) -> ok | timeout | {error, meshx_node_nif:failure()}.
find(Node, Own, Time) ->
    try
        case gen_server:call(?MODULE, {start_control_node, Own}, Time) of
            ok -> gen_server:call(?MODULE, {upstream, Node, find}, Time);
            stopping -> not_started();
            {error, _} = Error -> Error
        end
    of
        {ok, _} -> ok;
        {error, Failure} -> {error, Failure}
    catch
        exit:{timeout, _} -> timeout;
        exit:{_, _} -> not_started()
    end.

%% Whether Node has a static address, for which the agent isn't asked; not, if that isn't known in so
%% many ms.
-spec is_static(node(), pos_integer()) -> boolean().
is_static(Node, Time) ->
    try
        gen_server:call(?MODULE, {is_static, Node}, Time) =:= true
    catch
        exit:{_, _} -> false
    end.

%% Whether intentions allow a link to Node, which has dialled us. Where they can't be asked (in
%% time) they do: its sidecar and ours have let it through. `direct': a process of our own user that
%% is not our sidecar has dialled, a control node on this host; they don't concern it.
-spec accepts(node(), meshx_node_nif:socket()) -> ok | direct | {error, meshx_node_nif:failure()}.
accepts(Node, Link) ->
    Mode = {accept, meshx_node_nif:peer_socket(Link)},
    try gen_server:call(?MODULE, {upstream, Node, Mode}, ?ACCEPT_TIME) of
        {ok, {direct, _, _}} -> direct;
        {error, {denied_by_intention, _} = Failure} -> {error, Failure};
        _ -> ok
    catch
        exit:{_, _} -> ok
    end.

%% Called by a link's controller: the link is listed in info/0 while the controller lives, which
%% is ended when intentions no longer allow the link.
-spec link_up(node(), pid(), meshx_node_nif:socket(), how()) -> ok.
link_up(Node, Controller, Link, How) ->
    gen_server:cast(?MODULE, {link_up, Node, Controller, Link, How}).

%% What the C side counts and knows (include/meshx_node.h, struct meshx_info), and the links.
-spec info() -> {ok, map()} | {error, meshx_node_nif:failure()}.
info() ->
    call(info).

%% The Consul service name of any node, as our configuration maps it.
-spec service_name(node()) -> {ok, binary()} | {error, meshx_node_nif:failure()}.
service_name(Node) when is_atom(Node) ->
    call({service_name, Node}).

%% The users beside our own whose processes may connect to the listener.
-spec allowed_uids() -> meshx_node_type:uids().
allowed_uids() ->
    case call(allowed_uids) of
        {error, _} -> [];
        Uids -> Uids
    end.

call(Request) ->
    try
        gen_server:call(?MODULE, Request, infinity)
    catch
        exit:{Reason, _} when
            Reason =:= noproc; Reason =:= normal; Reason =:= shutdown; Reason =:= killed
        ->
            not_started()
    end.

not_started() ->
    {error, {stopped, text("this node has no node service: ~ts", [meshx_node_select:why_not_started()])}}.

text(Format, Arguments) ->
    unicode:characters_to_binary(io_lib:format(Format, Arguments)).

%% ---- gen_server ----

-spec init([]) -> {ok, #state{}}.
init([]) ->
    process_flag(trap_exit, true),
    ok = meshx_node_select:asks_again(),
    {ok, #state{}}.

-spec handle_call(term(), gen_server:from(), #state{}) ->
    {reply, term(), #state{}} | {noreply, #state{}}.
handle_call({start_service, Node, Ip, Port}, From, #state{mesh = undefined} = S) ->
    Listener = #{listen_address => list_to_binary(inet:ntoa(Ip)), listen_port => Port},
    open(meshx_node_config:load(Node), Listener, From, S);
handle_call({start_service, Node, _, _}, _From, S) ->
    {reply, {error, {name_in_use, text("~ts: this VM already is a node service", [Node])}}, S};
handle_call({start_control_node, Node}, From, #state{mesh = undefined} = S) ->
    case meshx_node_nif:load() of
        ok ->
            Listener = #{listen_address => <<"127.0.0.1">>, listen_port => 0},
            open(meshx_node_config:load_control_node(Node), Listener, From, S);
        {error, Failure} ->
            {reply, {error, Failure}, S}
    end;
handle_call({start_control_node, _}, _From, #state{mesh = Mesh} = S) when Mesh =/= undefined ->
    {reply, ok, S};
handle_call(_Request, _From, #state{mesh = undefined} = S) ->
    {reply, not_started(), S};
handle_call(drain, From, #state{mesh = Mesh} = S) ->
    meshx_node_nif:mesh_drain(Mesh),
    {noreply, S#state{drainer = From}};
handle_call({upstream, _, {accept, _}}, _From, #state{accepts = Accepts} = S) when
    Accepts >= ?ACCEPTS_MAX
->
    {reply, {error, {agent_busy, <<"too many connections to ask about">>}}, S};
handle_call({upstream, Node, Mode}, From, #state{config = #{upstreams := Static}} = S) ->
    case Static of
        #{Node := {Ip, Port}} -> {reply, {ok, {static, Ip, Port}}, S};
        #{} -> ask_mesh(Node, Mode, From, S)
    end;
handle_call({is_static, Node}, _From, #state{config = #{upstreams := Static}} = S) ->
    {reply, is_map_key(Node, Static), S};
handle_call(info, From, S) ->
    request({other, From}, S, fun(Request) -> meshx_node_nif:mesh_info(S#state.mesh, Request) end);
handle_call(allowed_uids, _From, #state{config = #{allowed_uids := Uids}} = S) ->
    {reply, Uids, S};
handle_call({service_name, Node}, _From, #state{config = Config} = S) ->
    try
        {reply, {ok, meshx_node_config:service_name(Node, Config)}, S}
    catch
        error:{bad_configuration, _} = Failure -> {reply, {error, Failure}, S}
    end.

-spec handle_cast({link_up, node(), pid(), meshx_node_nif:socket(), how()}, #state{}) ->
    {noreply, #state{}}.
handle_cast({link_up, Node, Controller, Socket, How}, #state{links = Links, next = Id} = S) ->
    Link = #link{id = Id, node = Node, controller = Controller, socket = Socket},
    Linked = S#state{next = Id + 1, links = Links#{monitor(process, Controller) => Link}},
    case watch_link(Link, How, Linked) of
        {error, out_of_memory} ->
            {noreply, cut(Link, out_of_memory, "out of memory, so no intention could cut it", Linked)};
        %% Stopped: the links are closed anyway.
        _ ->
            {noreply, Linked}
    end.

-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({meshx_event, Tag, Type, Data}, #state{tag = Tag} = S) ->
    {noreply, event(Type, Data, S)};
handle_info({renew, Tag}, #state{tag = Tag} = S) ->
    meshx_node_nif:mesh_renew(S#state.mesh),
    renew_later(S),
    {noreply, S};
handle_info(release, S) ->
    case is_booting() of
        true ->
            release_later(),
            {noreply, S};
        false ->
            {noreply, release(S)}
    end;
handle_info({'DOWN', Monitor, process, _, _}, #state{mesh = Mesh, links = Links} = S) ->
    case maps:take(Monitor, Links) of
        {#link{id = Id}, Others} when Mesh =/= undefined ->
            meshx_node_nif:mesh_link_down(Mesh, Id),
            {noreply, S#state{links = Others}};
        {_, Others} ->
            {noreply, S#state{links = Others}};
        error ->
            {noreply, S}
    end;
handle_info(_, S) ->
    {noreply, S}.

-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, #state{mesh = undefined}) ->
    ok;
terminate(_Reason, #state{mesh = Mesh, tag = Tag} = S) ->
    meshx_node_nif:mesh_stop(Mesh),
    await_stopped(Tag, release(S), erlang:monotonic_time(millisecond) + ?STOP_TIME).

await_stopped(Tag, S, Deadline) ->
    receive
        {meshx_event, Tag, stopped, Data} ->
            _ = event(stopped, Data, S),
            ok;
        {meshx_event, Tag, output, {_Stream, Line}} ->
            %% What a sidecar says while it is being stopped is no news.
            ?LOG_DEBUG("[~ts][stopping]: ~ts", [maps:get(node, S#state.config), Line]),
            await_stopped(Tag, S, Deadline);
        {meshx_event, Tag, Type, Data} ->
            await_stopped(Tag, event(Type, Data, S), Deadline)
    after max(0, Deadline - erlang:monotonic_time(millisecond)) ->
        ?LOG_WARNING(
            "meshx_node: the node service has not ended yet (does the Consul agent answer, does the "
            "sidecar stop?); that goes on in the background while the VM lives, and the next start "
            "waits for it, else Consul drops the service by itself"
        )
    end.

%% ---- start and requests ----

%% Answers From when the node service is up, or can't be.
open({ok, Loaded}, Listener, From, S) ->
    Config = maps:merge(Loaded, Listener),
    Tag = make_ref(),
    case meshx_node_nif:mesh_open(Config, Tag) of
        {ok, Mesh} ->
            Kept = maps:with(
                [
                    node,
                    naming,
                    ttl,
                    sidecar_stdout,
                    sidecar_stderr,
                    upstreams,
                    allowed_uids,
                    consul_names,
                    control_node
                ],
                Config
            ),
            Opened = S#state{mesh = Mesh, tag = Tag, config = Kept, starter = From},
            renew_later(Opened),
            Warned = lists:foldl(
                fun warn/2, Opened, meshx_node_select:warnings() ++ meshx_node_config:open_files(Loaded)
            ),
            %% What was read may hold secrets; here, it would be in a crash dump.
            true = erlang:garbage_collect(),
            {noreply, Warned};
        stopping ->
            {reply, stopping, S};
        {error, Failure} ->
            {reply, {error, named(Failure, Config)}, S}
    end;
open({error, Failure}, _Listener, _From, S) ->
    {reply, {error, Failure}, S}.

%% A failure of the C side.
named({Code, Text}, Config) ->
    {Code, meshx_node_config:name_keys(Text, Config)}.

renew_later(#state{config = #{control_node := true}}) ->
    ok;
renew_later(#state{tag = Tag, config = #{ttl := Ttl}}) ->
    erlang:send_after(Ttl div 3, self(), {renew, Tag}).

%% The node a control node is linked with watches the link.
watch_link(_Link, _How, #state{mesh = undefined}) ->
    ok;
watch_link(_Link, _How, #state{config = #{control_node := true}}) ->
    ok;
watch_link(#link{id = Id, node = Node}, How, #state{mesh = Mesh, config = Config}) ->
    {Side, ServiceName} =
        case How of
            dialed -> {dialed, watched_name(Node, Config)};
            {accepted, User} -> {accepted, watched_name(User, Config)};
            direct -> {accepted, undefined}
        end,
    %% Who knows the cookie can have any name, which needn't be one for Consul.
    Result =
        case meshx_node_dist:is_node_name(Node) of
            true -> meshx_node_nif:mesh_link_up(Mesh, Id, atom_to_binary(Node), ServiceName, Side);
            false -> ok
        end,
    case ServiceName of
        %% No intention counts for it.
        undefined -> ok;
        _ -> Result
    end.

cut(#link{node = Node, controller = Controller}, Reason, Text, S) ->
    exit(Controller, Reason),
    log(warning, "meshx_node: the link to ~ts is cut: ~ts", [Node, Text], S).

%% What belongs to a static address isn't asked about.
watched_name(Node, #{upstreams := Static}) when is_map_key(Node, Static) ->
    undefined;
watched_name(Node, Config) ->
    try
        meshx_node_config:service_name(Node, Config)
    catch
        error:_ -> undefined
    end.

ask_mesh(Node, Mode, From, #state{mesh = Mesh, config = Config} = S) ->
    Kind =
        case Mode of
            {accept, _} -> accept;
            _ -> other
        end,
    try meshx_node_config:service_name(Node, Config) of
        ServiceName ->
            request({Kind, From}, S, fun(Request) ->
                meshx_node_nif:mesh_upstream(
                    Mesh,
                    Request,
                    atom_to_binary(Node),
                    meshx_node_name:service_id(Node),
                    ServiceName,
                    Mode
                )
            end)
    catch
        error:{bad_configuration, _} = Failure -> {reply, {error, Failure}, S}
    end.

request(Asker, #state{next = Next, requests = Requests} = S, Send) ->
    case Send(Next) of
        ok ->
            {noreply, count(Asker, 1, S#state{next = Next + 1, requests = Requests#{Next => Asker}})};
        {error, stopped} ->
            {reply, {error, {stopped, <<"this node is stopping">>}}, S};
        {error, out_of_memory} ->
            {reply, {error, {out_of_memory, <<"out of memory">>}}, S}
    end.

%% ---- events of the C side, listed in c_src/nif/mesh.h ----

event(ready, _, #state{starter = Starter} = S) ->
    gen_server:reply(Starter, ok),
    S#state{starter = undefined};
event(failed, Failure, #state{starter = Starter} = S) ->
    %% At boot net_kernel halts the VM now: there will be no default handler.
    Released = release(S),
    gen_server:reply(Starter, {error, named(Failure, S#state.config)}),
    Released#state{starter = undefined};
event(upstream, {Request, {ok, {Kind, Address, Port}}}, S) ->
    {ok, Ip} = inet:parse_strict_address(binary_to_list(Address)),
    answer(Request, {ok, {Kind, Ip, Port}}, S);
event(upstream, {Request, {error, Failure}}, #state{config = Config} = S) ->
    answer(Request, {error, named(Failure, Config)}, S);
event(link_denied, {Id, {Code, Text}}, S) ->
    case [Link || #link{id = LinkId} = Link <- maps:values(S#state.links), LinkId =:= Id] of
        [Link] -> cut(Link, Code, Text, S);
        [] -> S
    end;
event(link_health, {Id, Trouble}, #state{links = Links} = S) ->
    case [{Key, Link} || {Key, #link{id = LinkId} = Link} <- maps:to_list(Links), LinkId =:= Id] of
        [{Monitor, #link{node = Node} = Link}] ->
            Told = S#state{links = Links#{Monitor := Link#link{trouble = Trouble}}},
            log_health(Node, Trouble, Told);
        [] ->
            S
    end;
event(info, {Request, {ok, Info}}, #state{config = #{upstreams := Static}} = S) ->
    answer(Request, {ok, Info#{links => link_infos(S), static_upstreams => Static}}, S);
event(info, {Request, {error, Failure}}, S) ->
    answer(Request, {error, Failure}, S);
event(output, {_Stream, <<>>}, S) ->
    S;
event(output, {Stream, Line}, #state{config = #{node := Node} = Config} = S) ->
    Key =
        case Stream of
            stdout -> sidecar_stdout;
            stderr -> sidecar_stderr
        end,
    case maps:get(Key, Config) of
        off -> S;
        %% A person sits at a remote shell, who has not asked for a proxy.
        _ when is_map_key(control_node, Config), Stream =:= stdout -> S;
        Level -> log(Level, "[~ts][~ts]: ~ts", [Node, Stream, Line], S)
    end;
event(log, {Level, Text}, #state{config = Config} = S) ->
    log(Level, "meshx_node: ~ts", [meshx_node_config:name_keys(Text, Config)], S);
event(drained, _, #state{drainer = Drainer} = S) ->
    Drainer =:= undefined orelse gen_server:reply(Drainer, ok),
    S#state{drainer = undefined};
event(stopped, Failure, #state{} = S) ->
    case Failure of
        undefined -> ok;
        {_, _} -> ?LOG_WARNING("meshx_node: ~ts", [element(2, named(Failure, S#state.config))])
    end,
    S#state{mesh = undefined, tag = undefined}.

log_health(Node, undefined, S) ->
    log(notice, "meshx_node: ~ts is healthy in Consul again", [Node], S);
log_health(Node, Trouble, S) ->
    Format = "meshx_node: ~ts is linked with us, but critical in Consul: ~ts; if it has gone, net ticks will tell",
    log(warning, Format, [Node, Trouble], S).

link_infos(#state{links = Links}) ->
    [link_info(Link) || Link <- maps:values(Links)].

link_info(#link{node = Node, socket = Socket, trouble = Trouble}) ->
    {FramesIn, FramesOut, BytesIn, BytesOut, Pending} = meshx_node_nif:statistics(Socket),
    #{
        node => Node,
        trouble => Trouble,
        frames_in => FramesIn,
        frames_out => FramesOut,
        bytes_in => BytesIn,
        bytes_out => BytesOut,
        bytes_pending => Pending
    }.

answer(Request, Reply, #state{requests = Requests} = S) ->
    case maps:take(Request, Requests) of
        {{_, From} = Asker, Rest} ->
            gen_server:reply(From, Reply),
            count(Asker, -1, S#state{requests = Rest});
        error ->
            S
    end.

count({accept, _}, Difference, #state{accepts = Accepts} = S) ->
    S#state{accepts = Accepts + Difference};
count({other, _}, _, S) ->
    S.

%% ---- log lines ----

%% At boot the lines wait for logger's default handler: what reaches its simple one before is
%% printed twice (logger_simple_h replays to the default handler what it has printed).
log(Level, Format, Arguments, #state{held = []} = S) ->
    case is_booting() of
        true ->
            release_later(),
            S#state{held = [{Level, Format, Arguments}]};
        false ->
            logger:log(Level, Format, Arguments),
            S
    end;
log(Level, Format, Arguments, #state{held = Held} = S) ->
    S#state{held = [{Level, Format, Arguments} | Held]}.

warn(Text, S) ->
    log(warning, "meshx_node: ~ts", [Text], S).

is_booting() ->
    element(1, init:get_status()) =:= starting andalso
        lists:member(simple, logger:get_handler_ids()).

release_later() ->
    erlang:send_after(?HOLD_TIME, self(), release).

release(#state{held = Held} = S) ->
    lists:foreach(
        fun({Level, Format, Arguments}) -> logger:log(Level, Format, Arguments) end,
        lists:reverse(Held)
    ),
    S#state{held = []}.
