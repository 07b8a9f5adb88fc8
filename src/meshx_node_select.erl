%% Which nodes are ours, where net_kernel has other carriers too (-proto_dist inet_tcp meshx_node).
%%
%% net_kernel asks its carriers one after the other, the last of -proto_dist first, and takes the
%% first that wants the node. With others beside us we want the nodes that are in the mesh: those
%% registered in Consul, healthy or not and whatever intentions say, since none of these may end in
%% another carrier's plain TCP, and those in `upstreams'. Alone we want all: whoever dials learns
%% from us why a node can't be reached.
%%
%% Called by net_kernel's process, which does nothing else meanwhile; by one of its own for each dial
%% as of OTP 29. So a question has ?TIME, twice at most, and when that has passed without an answer,
%% none is asked for the next ?PAUSE.
-module(meshx_node_select).

-export([takes/1, asks_again/0, is_alone/0, warnings/0, why_not_started/0]).

-include_lib("kernel/include/logger.hrl").

%% ms
-define(TIME, 2000).
-define(PAUSE, 10000).

-spec takes(node()) -> boolean().
takes(Node) ->
    is_alone() orelse
        case is_pausing() of
            true -> meshx_node_mesh:is_static(Node, ?TIME);
            false -> is_in_mesh(Node)
        end.

-spec is_alone() -> boolean().
is_alone() ->
    length(carriers()) < 2.

%% As net_kernel reads it: a flag given twice counts for nothing.
carriers() ->
    case init:get_argument(proto_dist) of
        {ok, [Carriers]} -> Carriers;
        _ -> []
    end.

is_ours(Carrier) ->
    Carrier =:= "meshx_node" orelse Carrier =:= "Elixir.MeshxNode".

is_in_mesh(Node) ->
    case meshx_node_mesh:find(Node, own_name(), ?TIME) of
        ok ->
            true;
        {error, {node_unknown, _}} ->
            false;
        {error, {_, Text}} ->
            left_to_others(Node, Text);
        timeout ->
            persistent_term:put(?MODULE, erlang:monotonic_time(millisecond) + ?PAUSE),
            Format = "the Consul agent has not answered within ~b s, and is not asked for ~b s now",
            left_to_others(Node, io_lib:format(Format, [?TIME div 1000, ?PAUSE div 1000]))
    end.

left_to_others(Node, Why) ->
    ?LOG_WARNING("meshx_node: ~ts is left to the other carriers: ~ts", [Node, Why]),
    false.

%% No process that asks need live till the next question. A small integer: no process is collected
%% when it changes.
is_pausing() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined -> false;
        Until -> erlang:monotonic_time(millisecond) < Until
    end.

%% For a distribution that starts anew, maybe with another agent.
-spec asks_again() -> ok.
asks_again() ->
    _ = persistent_term:erase(?MODULE),
    ok.

%% A node gets its name from the first it is linked with (-sname undefined).
own_name() ->
    case node() of
        nonode@nohost ->
            {ok, Host} = inet:gethostname(),
            list_to_atom("undefined@" ++ Host);
        Node ->
            Node
    end.

%% OTP's own carriers want every node whose host they can resolve.
-spec warnings() -> [unicode:chardata()].
warnings() ->
    case lists:reverse(carriers()) of
        [Last, _ | _] ->
            Text = ", the last in -proto_dist, is asked first for any node, and may take it; put meshx_node last",
            [[Last, Text] || not is_ours(Last)];
        _ ->
            []
    end.

%% For whoever asks for the node service of a node that has none.
-spec why_not_started() -> string().
why_not_started() ->
    case {lists:any(fun is_ours/1, carriers()), init:get_argument(proto_dist)} of
        {true, _} ->
            "it has not started, or failed to, of which the log says why; or it is a remote shell or the like "
            "(-remsh, -dist_listen false, -sname undefined) that has not dialled anybody yet";
        {false, {ok, [_, _ | _]}} ->
            "-proto_dist is given more than once, and OTP then takes none of them; name all carriers in one";
        {false, _} ->
            "it is not started with -proto_dist meshx_node"
    end.
