%% What the kernel says in /proc about a process that need not be this one.
-module(meshx_bench_os).

-export([cpu/1, resident/1, peak/1, forget_peak/1, descriptors/1]).

%% Processor seconds so far, user and system. The clock ticks 100 times a second for all of
%% Linux's architectures but alpha and ia64.
-spec cpu(OsPid :: pos_integer()) -> float().
cpu(OsPid) ->
    {ok, Stat} = file:read_file(path(OsPid, "stat")),
    %% proc(5): after "pid (program) ", utime and stime are the 12th and the 13th.
    {Close, _} = lists:last(binary:matches(Stat, <<")">>)),
    <<_:Close/binary, ") ", Rest/binary>> = Stat,
    Fields = binary:split(Rest, <<" ">>, [global]),
    (binary_to_integer(lists:nth(12, Fields)) + binary_to_integer(lists:nth(13, Fields))) / 100.

%% Memory, in MiB.
-spec resident(OsPid :: pos_integer()) -> float().
resident(OsPid) ->
    status(OsPid, <<"VmRSS">>).

%% The most that was resident since forget_peak/1.
-spec peak(OsPid :: pos_integer()) -> float().
peak(OsPid) ->
    status(OsPid, <<"VmHWM">>).

-spec forget_peak(OsPid :: pos_integer()) -> ok.
forget_peak(OsPid) ->
    ok = file:write_file(path(OsPid, "clear_refs"), "5").

-spec descriptors(OsPid :: pos_integer()) -> non_neg_integer().
descriptors(OsPid) ->
    {ok, Names} = file:list_dir(path(OsPid, "fd")),
    length(Names).

status(OsPid, Key) ->
    {ok, Status} = file:read_file(path(OsPid, "status")),
    {match, [KiB]} = re:run(Status, [Key, ":\\s+(\\d+) kB"], [{capture, all_but_first, binary}]),
    binary_to_integer(KiB) / 1024.

path(OsPid, Name) ->
    lists:concat(["/proc/", OsPid, "/", Name]).
