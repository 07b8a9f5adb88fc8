%% A program in a pseudo-terminal, for suites that type into a shell as a user does.
%%
%% A process holds the terminal's end (script(1) makes it) and all that was printed. It is linked
%% to its opener: when that ends, in whatever way, so does the program with its descendants.
-module(meshx_ct_terminal).

-export([open/3, type/2, expect/2, ended/1]).
-export_type([terminal/0]).

-type terminal() :: pid().

%% How long anything may take to appear, ms: compilations, first starts on a busy machine.
-define(PATIENCE, 120000).

-record(state, {
    port :: port(),
    program :: meshx_ct_proc:process() | none,
    text = <<>> :: binary(),
    %% where the answer to what was typed last begins in text
    typed = 0 :: non_neg_integer(),
    status :: undefined | non_neg_integer(),
    %% who waits, and for what: a regular expression, or the program's end
    waiting :: undefined | {reference(), pid(), iodata() | ended, reference()}
}).

%% Command is a line for sh, run in Directory with Environment added to ours (as open_port/2).
-spec open(string(), file:filename(), [{string(), string() | false}]) -> terminal().
open(Command, Directory, Environment) ->
    Opener = self(),
    spawn_link(fun() ->
        process_flag(trap_exit, true),
        Port = open_port({spawn_executable, os:find_executable("script")}, [
            {args, ["-qfec", "exec " ++ Command, "/dev/null"]},
            {cd, Directory},
            {env, [{"TERM", "dumb"} | Environment]},
            binary,
            exit_status,
            stderr_to_stdout
        ]),
        {os_pid, OsPid} = erlang:port_info(Port, os_pid),
        loop(Opener, #state{port = Port, program = meshx_ct_proc:find(OsPid)})
    end).

%% Types a line.
-spec type(terminal(), iodata()) -> ok.
type(Terminal, Line) ->
    Terminal ! {type, [Line, "\n"]},
    ok.

%% Waits until something that matches Pattern has been printed since the last type/2 (the echo of
%% what was typed included). ^ is the beginning of a line.
-spec expect(terminal(), iodata()) -> ok.
expect(Terminal, Pattern) ->
    await(Terminal, Pattern).

%% Waits for the program's end, which must be a good one.
-spec ended(terminal()) -> ok.
ended(Terminal) ->
    await(Terminal, ended).

await(Terminal, What) ->
    Monitor = monitor(process, Terminal),
    Terminal ! {await, Monitor, self(), What},
    receive
        {Monitor, ok} ->
            demonitor(Monitor, [flush]),
            ok;
        {Monitor, {missing, Text}} ->
            meshx_ct:fail("~ts~n~n(waited in vain for: ~ts)", [Text, io_lib:format("~0tp", [What])]);
        {'DOWN', Monitor, process, Terminal, Reason} ->
            error({terminal, Reason})
    end.

%%% The process

loop(Opener, #state{port = Port} = S) ->
    receive
        {Port, {data, Data}} ->
            loop(Opener, answer(S#state{text = <<(S#state.text)/binary, (plain(Data))/binary>>}));
        {Port, {exit_status, Status}} ->
            loop(Opener, answer(S#state{status = Status}));
        {type, Line} ->
            port_command(Port, Line),
            loop(Opener, S#state{typed = byte_size(S#state.text)});
        {await, Ref, From, What} ->
            Timer = erlang:send_after(?PATIENCE, self(), {patience, Ref}),
            loop(Opener, answer(S#state{waiting = {Ref, From, What, Timer}}));
        {patience, Ref} ->
            loop(Opener, give_up(Ref, S));
        {'EXIT', Opener, _} ->
            kill(S);
        {'EXIT', _, _} ->
            loop(Opener, S)
    end.

answer(#state{waiting = undefined} = S) ->
    S;
answer(#state{waiting = {Ref, From, What, Timer}, status = Status} = S) ->
    case seen(What, S) of
        true ->
            _ = erlang:cancel_timer(Timer),
            From ! {Ref, ok},
            S#state{waiting = undefined};
        false when Status =/= undefined ->
            _ = erlang:cancel_timer(Timer),
            give_up(Ref, S);
        false ->
            S
    end.

seen(ended, #state{status = Status}) ->
    Status =:= 0;
seen(Pattern, #state{text = Text, typed = Typed}) ->
    <<_:Typed/binary, Since/binary>> = Text,
    re:run(Since, Pattern, [multiline, unicode, {newline, any}, {capture, none}]) =:= match.

give_up(Ref, #state{waiting = {Ref, From, _, _}, text = Text, status = Status} = S) ->
    End = [io_lib:format("(ended with status ~b)~n", [Status]) || Status =/= undefined],
    From ! {Ref, {missing, unicode:characters_to_binary([Text, End])}},
    S#state{waiting = undefined};
give_up(_, S) ->
    S.

%% Without colours and carriage returns.
plain(Data) ->
    re:replace(Data, "\e\\[[0-9;?]*[A-Za-z]|\r", "", [global, {return, binary}]).

%% TERM lets a VM stop in order; what does not is killed.
kill(#state{status = undefined, program = {_, _, _} = Program}) ->
    All = [Program | meshx_ct_proc:descendants(meshx_ct_proc:pid(Program))],
    [meshx_ct_proc:signal(Process, "TERM") || Process <- lists:reverse(All)],
    gone(All, 250);
kill(_) ->
    ok.

gone(Processes, Tries) ->
    case [Process || Process <- Processes, meshx_ct_proc:is_alive(Process)] of
        [] ->
            ok;
        Alive when Tries > 0 ->
            timer:sleep(20),
            gone(Alive, Tries - 1);
        Alive ->
            [meshx_ct_proc:signal(Process, "KILL") || Process <- Alive],
            ok
    end.
