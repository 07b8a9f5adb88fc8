%% What a node holds of its VM and of its host, to see whether it has returned to where it was.
-module(meshx_ct_resources).

-export([taken/1, returns/3, more/2]).
-export_type([taken/0]).

%% memory: what the emulator's allocators have given out; resident: also what C libraries take.
-type taken() :: #{
    descriptors | threads | processes | ports | atoms | tables | memory | resident => non_neg_integer()
}.

%% How much more is no leak: what is done once in a while, or the first time after long.
-define(ALLOWED, #{
    %% to the agent
    descriptors => 3,
    threads => 0,
    processes => 3,
    ports => 0,
    atoms => 20,
    tables => 0,
    memory => 1048576,
    resident => 32 * 1048576
}).

-spec taken(meshx_ct:test_node()) -> taken().
taken(Node) ->
    meshx_ct:call(Node, fun() ->
        lists:foreach(fun erlang:garbage_collect/1, processes()),
        %% First what loads code or makes atoms when it is called for the first time.
        {Descriptors, Threads, Resident} = {entries("/proc/self/fd"), entries("/proc/self/task"), resident()},
        Memory = erlang:memory(total),
        #{
            descriptors => Descriptors,
            threads => Threads,
            processes => erlang:system_info(process_count),
            ports => erlang:system_info(port_count),
            atoms => erlang:system_info(atom_count),
            tables => erlang:system_info(ets_count),
            memory => Memory,
            resident => Resident
        }
    end).

entries(Directory) ->
    {ok, Names} = file:list_dir(Directory),
    length(Names).

resident() ->
    {ok, Status} = file:read_file("/proc/self/status"),
    {match, [KiB]} = re:run(Status, "VmRSS:\\s+(\\d+) kB", [{capture, all_but_first, binary}]),
    binary_to_integer(KiB) * 1024.

%% Waits until a node has no more than before; what it still has more after Time milliseconds.
-spec returns(meshx_ct:test_node(), taken(), timeout()) -> [{atom(), {non_neg_integer(), non_neg_integer()}}].
returns(Node, Before, Time) ->
    returns_until(Node, Before, erlang:monotonic_time(millisecond) + Time).

returns_until(Node, Before, Deadline) ->
    case more(taken(Node), Before) of
        [_ | _] = More ->
            case erlang:monotonic_time(millisecond) < Deadline of
                true ->
                    timer:sleep(100),
                    returns_until(Node, Before, Deadline);
                false ->
                    More
            end;
        [] ->
            []
    end.

%% [{What, {Before, Now}}] of what is more than before.
-spec more(taken(), taken()) -> [{atom(), {non_neg_integer(), non_neg_integer()}}].
more(Now, Before) ->
    [
        {What, {Was, Is}}
     || {What, Was} <- maps:to_list(Before),
        #{What := Is} <- [Now],
        #{What := Allowed} <- [?ALLOWED],
        Is > Was + Allowed
    ].
