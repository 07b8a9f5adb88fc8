%% What the suites run on the nodes, where a plain call isn't enough.
-module(meshx_ct_there).

-export([watch/1, seen/0, connect/1, one_link_to_each/1, count_up/2, counted/2, send_chunks/2, receive_chunks/2, chunk/1]).

%% Starts a process, found by seen/0, that collects nodeup and nodedown, and the end of Pids:
%% it monitors and links to each.
-spec watch([pid()]) -> pid().
watch(Pids) ->
    Self = self(),
    {Watcher, Monitor} = spawn_monitor(fun() ->
        process_flag(trap_exit, true),
        _ = whereis(?MODULE) =/= undefined andalso unregister(?MODULE),
        register(?MODULE, self()),
        ok = net_kernel:monitor_nodes(true),
        _ = [begin link(Pid), monitor(process, Pid) end || Pid <- Pids],
        Self ! {self(), ready},
        collect([])
    end),
    receive
        {Watcher, ready} -> demonitor(Monitor, [flush]);
        {'DOWN', Monitor, _, _, Reason} -> error(Reason)
    end,
    Watcher.

collect(Seen) ->
    receive
        {From, Ref, seen} ->
            From ! {Ref, lists:reverse(Seen)},
            collect(Seen);
        {'DOWN', _, process, Pid, Reason} ->
            collect([{down, Pid, Reason} | Seen]);
        {'EXIT', Pid, Reason} ->
            collect([{exit, Pid, Reason} | Seen]);
        Message ->
            collect([Message | Seen])
    end.

%% What the watcher has collected, oldest first.
-spec seen() -> [term()].
seen() ->
    Ref = make_ref(),
    ?MODULE ! {self(), Ref, seen},
    receive
        {Ref, Seen} -> Seen
    end.

%% Connects to all of Names at once. Returns how many of these connects were false; the next one,
%% alone, must be true.
-spec connect([node()]) -> non_neg_integer().
connect(Names) ->
    Connects = [spawn_monitor(fun() -> exit(net_kernel:connect_node(Name)) end) || Name <- Names],
    Results = [
        receive
            {'DOWN', Monitor, process, _, Result} -> Result
        end
     || {_, Monitor} <- Connects
    ],
    lists:foreach(fun(Name) -> {Name, true} = {Name, net_kernel:connect_node(Name)} end, Names),
    lists:foreach(fun(Name) -> {Name, pong} = {Name, net_adm:ping(Name)} end, Names),
    length([false || false <- Results]).

%% Whether there is one link to each of Names, for the emulator, for net_kernel and for the carrier,
%% and none to others.
-spec one_link_to_each([node()]) -> boolean().
one_link_to_each(Names) ->
    Each = lists:sort(Names),
    {ok, Infos} = net_kernel:nodes_info(),
    Input = {initial_call, {meshx_node_traffic, input, 3}},
    Each =:= lists:sort(nodes()) andalso
        Each =:= lists:sort([Node || {Node, _} <- erlang:system_info(dist_ctrl)]) andalso
        Each =:= lists:sort([Node || {Node, Info} <- Infos, {state, up} <- Info]) andalso
        length(Each) =:= length([Pid || Pid <- processes(), process_info(Pid, initial_call) =:= Input]).

%% Sends 1..Last to a process in counted/2.
-spec count_up(pid(), pos_integer()) -> ok.
count_up(To, Last) ->
    lists:foreach(fun(N) -> To ! {self(), N} end, lists:seq(1, Last)).

%% Returns when 1..Last have come in this order and nothing else.
-spec counted(pid(), pos_integer()) -> ok.
counted(ReportTo, Last) ->
    [
        receive
            {_, Got} -> Got = N
        end
     || N <- lists:seq(1, Last)
    ],
    ReportTo ! {self(), counted},
    ok.

%% Sends numbered binaries, each different.
-spec send_chunks(pid(), pos_integer()) -> ok.
send_chunks(To, Count) ->
    lists:foreach(fun(N) -> To ! {chunk, N, chunk(N)} end, lists:seq(1, Count)).

-spec receive_chunks(pid(), pos_integer()) -> ok.
receive_chunks(ReportTo, Count) ->
    lists:foreach(
        fun(N) ->
            receive
                {chunk, N, Binary} ->
                    Binary = chunk(N);
                {chunk, Other, _} ->
                    error({expected, N, got, Other})
            end
        end,
        lists:seq(1, Count)
    ),
    ReportTo ! {self(), all_chunks},
    ok.

%% 1 MiB in which no 16 bytes are equal to others, nor to those of another chunk.
-spec chunk(non_neg_integer()) -> binary().
chunk(N) ->
    <<<<N:64, Place:64>> || Place <- lists:seq(1, 65536)>>.
