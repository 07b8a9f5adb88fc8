%% A VM that has reached a limit says so in one line; the node lives on, or its start ends with
%% nothing left, and with the limit lifted everything works again.
-module(meshx_node_limits_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(NO_ROOM, "too many processes.*erl \\+P").

all() ->
    [
        process_limit_when_dialling,
        process_limit_when_dialled,
        process_limit_under_a_link,
        no_memory_for_the_thread,
        no_memory_for_the_library,
        no_more_memory_while_it_runs,
        nothing_is_left
    ].

init_per_suite(Config) -> meshx_ct:init_suite(Config).
end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Processes

few_processes() ->
    #{args => ["+P", "1024", "-connect_all", "false"]}.

start_pair(Config) ->
    Few = meshx_ct:start(Config, few, few_processes()),
    Other = meshx_ct:start(Config, other, #{args => ["-connect_all", "false"]}),
    [meshx_ct:auto_connect(Node, never) || Node <- [Few, Other]],
    {Few, Other}.

process_limit_when_dialling(Config) ->
    {Few, #{node := Name} = Other} = start_pair(Config),
    Mark = meshx_ct:mark(Few),
    Result = meshx_ct:call(Few, fun() ->
        Filled = fill(),
        try
            net_kernel:connect_node(Name)
        catch
            exit:{{system_limit, [_, _, {net_kernel, setup_check, _, _} | _]}, _} -> net_kernel_ended
        after
            empty(Filled)
        end
    end),
    case Result of
        false ->
            [Line] = meshx_ct:own_lines(Few, Mark),
            {match, _} = re:run(Line, ["no link to ", atom_to_list(Name), ": .*", ?NO_ROOM]),
            ?assert(meshx_ct:connect(Few, Other));
        net_kernel_ended ->
            {skip, "net_kernel itself needs a process to dial, as OTP 29's does, and ends without"}
    end.

process_limit_when_dialled(Config) ->
    {#{node := Name} = Few, Other} = start_pair(Config),
    Mark = meshx_ct:mark(Few),
    Filler = meshx_ct:call(Few, fun() -> fill_for(2000) end),
    timer:sleep(500),
    %% It dials again until there is room.
    ?assert(meshx_ct:connect(Other, Few)),
    ?assertEqual(false, meshx_ct:call(Few, erlang, is_process_alive, [Filler])),
    [Line] = meshx_ct:own_lines(Few, Mark),
    {match, _} = re:run(Line, ["can't accept a connection: .*", ?NO_ROOM]),
    ?assertEqual(Name, meshx_ct:call(Other, erpc, call, [Name, erlang, node, []])).

%% A link that is up carries on.
process_limit_under_a_link(Config) ->
    {#{node := Name} = Few, #{node := OtherName} = Other} = start_pair(Config),
    ?assert(meshx_ct:connect(Few, Other)),
    pong = meshx_ct:call(Few, fun() ->
        Filled = fill(),
        Result = net_adm:ping(OtherName),
        empty(Filled),
        Result
    end),
    ?assertEqual([OtherName], meshx_ct:call(Few, erlang, nodes, [])),
    ?assertEqual([Name], meshx_ct:call(Other, erlang, nodes, [])).

%% Takes all processes there are.
fill() ->
    try
        Pid = spawn(timer, sleep, [infinity]),
        [Pid | fill()]
    catch
        error:system_limit -> []
    end.

empty(Filled) ->
    [exit(Pid, kill) || Pid <- Filled],
    ok.

%% The same for some time, after the caller has returned.
fill_for(Time) ->
    spawn(fun() ->
        timer:sleep(200),
        Filled = fill(),
        timer:sleep(Time),
        empty(Filled)
    end).

%%% Memory

%% The libraries ours needs are there already, so that only what a thread needs for its stack is not.
no_memory_for_the_thread(Config) ->
    Needed = os:cmd(["ldd ", code:priv_dir(meshx_node), "/meshx_node.so"]),
    {match, Paths} = re:run(Needed, "=> (/\\S+)", [global, {capture, all_but_first, list}]),
    Options = #{env => [{"LD_PRELOAD", lists:flatten(lists:join(" ", Paths))}]},
    refused(Config, Options, 4 * 1024 * 1024, "thread can't be started.*ulimit").

no_memory_for_the_library(Config) ->
    refused(Config, #{}, 0, "can't load .*meshx_node.so.*limit on memory").

%% The emulator itself ends when it needs more and gets none; here it does not need it.
no_more_memory_while_it_runs(Config) ->
    #{process := Process} = Node = meshx_ct:start(Config, limited, #{}),
    [One, Two] = [meshx_ct:start(Config, Name, #{}) || Name <- [one, two]],
    ?assert(meshx_ct:connect(Node, One)),
    limit(Process, 0),
    Mark = meshx_ct:mark(Node),
    Connected = meshx_ct:connect(Node, Two),
    ?assert(Connected orelse meshx_ct:own_lines(Node, Mark) =/= []),
    ?assertEqual(pong, meshx_ct:call(Node, net_adm, ping, [maps:get(node, One)])),
    unlimit(Process),
    ?assert(meshx_ct:connect(Node, Two)).

%% More is how many bytes of address space a VM may take beyond what it has.
refused(Config, Options, More, Pattern) ->
    #{process := Process} = Vm = meshx_ct:vm(Config, Options),
    %% Code that is needed to fail: the VM itself ends when it can't have memory.
    [
        {module, _} = meshx_ct:call(Vm, code, ensure_loaded, [Module])
     || Module <- [meshx_node_dist, meshx_node_nif, meshx_node_path, meshx_node_mesh, 'Elixir.MeshxNode_dist']
    ],
    limit(Process, More),
    Mark = meshx_ct:mark(Vm),
    {error, _} = meshx_ct:net_start(Vm, limited, []),
    [Line] = meshx_ct:own_lines(Vm, Mark),
    ?assertEqual({Line, match}, {Line, re:run(Line, ["node limited@.* does not start: .*", Pattern], [{capture, none}])}),
    unlimit(Process),
    ?assertNotEqual(none, meshx_ct:service(meshx_ct:net_start(Vm, limited))).

limit(Process, More) ->
    {ok, Status} = file:read_file(lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/status"])),
    {match, [KiB]} = re:run(Status, "VmSize:\\s+(\\d+) kB", [{capture, all_but_first, binary}]),
    prlimit(Process, integer_to_list(binary_to_integer(KiB) * 1024 + More)).

unlimit(Process) ->
    prlimit(Process, "unlimited").

prlimit(Process, Limit) ->
    "" = os:cmd(lists:concat(["prlimit --pid ", meshx_ct_proc:pid(Process), " --as=", Limit, ":"])).
