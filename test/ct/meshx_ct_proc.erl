%% Processes of the operating system as /proc shows them: who descends from whom, and is it
%% still alive? A process is its id and its start time, so that a reused id is another process.
-module(meshx_ct_proc).

-export([find/1, children/1, descendants/1, of_programs_below/1, is_alive/1, signal/2, program/1, pid/1]).
-export_type([process/0]).

-type process() :: {OsPid :: pos_integer(), StartTime :: binary(), Program :: binary()}.

-spec find(pos_integer()) -> process() | none.
find(OsPid) ->
    case status(OsPid) of
        {_Parent, Process} -> Process;
        none -> none
    end.

-spec children(pos_integer()) -> [process()].
children(OsPid) ->
    [Process || {Parent, Process} <- all(), Parent =:= OsPid].

-spec descendants(pos_integer()) -> [process()].
descendants(OsPid) ->
    descendants([OsPid], all(), []).

descendants([], _All, Found) ->
    Found;
descendants(Parents, All, Found) ->
    Next = [Process || {Parent, Process} <- All, lists:member(Parent, Parents)],
    descendants([OsPid || {OsPid, _, _} <- Next], All, Next ++ Found).

%% Those whose executable is in a folder, or in one of its folders.
-spec of_programs_below(file:filename()) -> [process()].
of_programs_below(Directory) ->
    [
        Process
     || {_, {OsPid, _, _} = Process} <- all(),
        {ok, Program} <- [file:read_link_all(lists:concat(["/proc/", OsPid, "/exe"]))],
        is_list(Program) andalso lists:prefix(Directory ++ "/", Program)
    ].

-spec is_alive(process()) -> boolean().
is_alive({OsPid, _, _} = Process) ->
    case find(OsPid) of
        none -> false;
        Found -> element(2, Found) =:= element(2, Process)
    end.

%% Only to processes the tests have started; that is why it takes no bare id.
-spec signal(process(), string()) -> ok.
signal({OsPid, _, _} = Process, Signal) ->
    _ = is_alive(Process) andalso
        os:cmd(lists:concat(["kill -", Signal, " ", OsPid, " 2>/dev/null"])),
    ok.

%% At most 15 bytes of the executable's name.
-spec program(process()) -> binary().
program({_, _, Program}) -> Program.

-spec pid(process()) -> pos_integer().
pid({OsPid, _, _}) -> OsPid.

all() ->
    {ok, Names} = file:list_dir("/proc"),
    [
        Status
     || [Digit | _] = Name <- Names,
        Digit >= $0,
        Digit =< $9,
        Status <- [status(list_to_integer(Name))],
        Status =/= none
    ].

%% proc(5), /proc/pid/stat: pid (program) state parent ... starttime is field 22. The program's
%% name may hold spaces and parentheses.
status(OsPid) ->
    case file:read_file(lists:concat(["/proc/", OsPid, "/stat"])) of
        {ok, Stat} ->
            [_, AfterOpen] = binary:split(Stat, <<"(">>),
            {Close, _} = lists:last(binary:matches(AfterOpen, <<")">>)),
            <<Program:Close/binary, ") ", Rest/binary>> = AfterOpen,
            [State, Parent | Fields] = binary:split(Rest, <<" ">>, [global]),
            case lists:member(State, [<<"Z">>, <<"X">>]) of
                false -> {binary_to_integer(Parent), {OsPid, lists:nth(18, Fields), Program}};
                %% Dead, but its parent has not asked for its end.
                true -> none
            end;
        {error, _} ->
            none
    end.
