%% Programs beside the benchmark. Each ends when the process that started it does, and so with
%% the VM, however that ends.
-module(meshx_bench_program).

-export([start/3, stop/1, output/1]).
-export_type([program/0]).

-type program() :: #{port := port(), process := meshx_ct_proc:process()}.

%% A shell that waits for the end of its standard input, which is an Erlang port.
-define(SCRIPT,
    "exec 2>/dev/null; log=$1; shift; \"$@\" >>\"$log\" 2>&1 </dev/null & echo $!; cat >/dev/null; kill $!; wait $!"
).

%% A program that runs until it is stopped. What it prints goes to a file.
-spec start([string()], [{string(), string()}], file:filename()) -> program().
start(Command, Environment, Log) ->
    Port = open_port({spawn_executable, "/bin/sh"}, [
        {args, ["-c", ?SCRIPT, "sh", Log | Command]}, {env, Environment}, {line, 100}
    ]),
    receive
        {Port, {data, {eol, Line}}} ->
            #{port => Port, process => meshx_ct_proc:find(list_to_integer(Line))}
    end.

%% Returns when the program is gone.
-spec stop(program()) -> ok.
stop(#{port := Port, process := Process}) ->
    true = port_close(Port),
    meshx_ct:wait("the end of a program", fun() -> not meshx_ct_proc:is_alive(Process) end).

%% Runs a program to its end; its exit status and what it has printed.
-spec output([string()]) -> {Status :: non_neg_integer(), Output :: string()}.
output([Program | Arguments]) ->
    Port = open_port({spawn_executable, Program}, [{args, Arguments}, exit_status, stderr_to_stdout]),
    collect(Port, []).

collect(Port, Output) ->
    receive
        {Port, {data, More}} -> collect(Port, [Output | More]);
        {Port, {exit_status, Status}} -> {Status, lists:flatten(Output)}
    end.
