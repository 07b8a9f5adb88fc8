%% Connections from processes of another user of the host end before a byte of them is read. The
%% other user is a real one, which only root can be: elsewhere these cases are skipped.
-module(meshx_node_user_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

%% "nobody"; what matters is that it isn't ours.
-define(UID, 65534).

all() ->
    [
        inet_tcp_talks_to_another_user,
        another_user_is_refused,
        own_user_is_let_in,
        another_user_comes_in_masses,
        links_go_on,
        an_allowed_user_is_let_in,
        any_user_is_let_in,
        ipv6_listener,
        kernel_without_netlink,
        wrong_configuration,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = meshx_ct:start_all(Config1, [a, b]),
    ?assert(meshx_ct:connect(B, A)),
    meshx_ct:call(A, meshx_ct_there, watch, [[]]),
    [{a, A}, {b, B} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(Case, Config) ->
    Needs = [own_user_is_let_in, links_go_on, wrong_configuration, nothing_is_left],
    case lists:member(Case, Needs) orelse string:trim(os:cmd("id -u")) =:= "0" of
        true -> Config;
        false -> {skip, "only root can be another user"}
    end.

end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% The other user

%% What a node sends first; the answer begins with the status "ok".
hello(Name) ->
    Packet = <<$N, 16#d07df7fbd:64, 77:32, (byte_size(Name)):16, Name/binary>>,
    <<(byte_size(Packet)):16, Packet/binary>>.

-define(TALKS, <<0, 3, "sok">>).

%% Says hello as a user and returns the first bytes of the answer, if any.
hello_of(User, Port) ->
    hello_of(User, "127.0.0.1", Port).

hello_of(User, Ip, Port) ->
    Octal = [io_lib:format("\\~3.8.0b", [Byte]) || <<Byte>> <= hello(<<"stranger@host">>)],
    Script = io_lib:format("exec 3<>/dev/tcp/~ts/~b; printf '~ts' >&3; timeout 10 head -c 5 <&3", [
        Ip, Port, Octal
    ]),
    run_as(User, lists:flatten(Script)).

run_as(User, Script) ->
    Bash = [os:find_executable("bash"), "-c", Script],
    [Program | Arguments] =
        case User of
            own -> Bash;
            other -> [os:find_executable("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups" | Bash]
        end,
    Port = open_port({spawn_executable, Program}, [
        {args, Arguments}, {cd, "/"}, binary, exit_status, stderr_to_stdout
    ]),
    collect(Port, <<>>).

collect(Port, Output) ->
    receive
        {Port, {data, More}} -> collect(Port, <<Output/binary, More/binary>>);
        {Port, {exit_status, _}} -> Output
    after 60000 -> error({still_running, Output})
    end.

%% Nothing of the protocol: the shell may say that the connection was reset.
is_silence(Answer) ->
    binary:match(Answer, <<"ok">>) =:= nomatch andalso binary:match(Answer, <<0>>) =:= nomatch.

listen_port(Node) ->
    {ok, Port} = meshx_ct:call(Node, meshx_node, info, [listen_port]),
    Port.

%%% Cases

inet_tcp_talks_to_another_user(Config) ->
    EpmdPort = meshx_ct_agent:free_port(),
    Epmd = open_port({spawn_executable, os:find_executable("epmd")}, [
        {args, ["-address", "127.0.0.1", "-port", integer_to_list(EpmdPort)]}, stderr_to_stdout
    ]),
    {os_pid, OsPid} = erlang:port_info(Epmd, os_pid),
    Process = meshx_ct_proc:find(OsPid),
    try
        meshx_ct:wait("epmd", fun() -> is_open(EpmdPort) end),
        Vm = meshx_ct:start(Config, plain, #{
            carrier => "inet_tcp",
            args => ["-kernel", "inet_dist_use_interface", "{127,0,0,1}"],
            env => [{"ERL_EPMD_PORT", integer_to_list(EpmdPort)}]
        }),
        {port, Port, _} = meshx_ct:call(Vm, erl_epmd, port_please, ["plain", {127, 0, 0, 1}]),
        ?assertEqual(?TALKS, hello_of(other, Port)),
        meshx_ct:stop(Vm)
    after
        meshx_ct_proc:signal(Process, "KILL")
    end.

is_open(Port) ->
    case gen_tcp:connect({127, 0, 0, 1}, Port, []) of
        {ok, Socket} -> gen_tcp:close(Socket) =:= ok;
        {error, _} -> false
    end.

another_user_is_refused(Config) ->
    A = proplists:get_value(a, Config),
    Mark = meshx_ct:mark(A),
    ?assert(is_silence(hello_of(other, listen_port(A)))),
    meshx_ct:wait("a log line", fun() -> meshx_ct:own_lines(A, Mark) =/= [] end),
    [Line] = meshx_ct:own_lines(A, Mark),
    {match, _} = re:run(Line, "^warning: .*127.0.0.1:[0-9]+ refused.* user 65534.*set allowed_uids to 65534$").

own_user_is_let_in(Config) ->
    ?assertEqual(?TALKS, hello_of(own, listen_port(proplists:get_value(a, Config)))).

%% The log says of a few who they were, of the rest how many.
another_user_comes_in_masses(Config) ->
    A = proplists:get_value(a, Config),
    Mark = meshx_ct:mark(A),
    Before = meshx_ct:call(A, erlang, system_info, [process_count]),
    Script = io_lib:format(
        "for i in {1..500}; do exec {fd}<>/dev/tcp/127.0.0.1/~b; echo -n x >&$fd; done 2>&1; echo done",
        [listen_port(A)]
    ),
    {match, _} = re:run(run_as(other, lists:flatten(Script)), "done"),
    ?assert(meshx_ct:call(A, erlang, system_info, [process_count]) =< Before + 20),
    meshx_ct:wait("the number", fun() -> meshx_ct:has_line(A, Mark, "[0-9]+ more times") end),
    ?assert(length(meshx_ct:own_lines(A, Mark)) =< 25),
    Late = meshx_ct:start(Config, late, #{}),
    ?assert(meshx_ct:connect(Late, A)).

links_go_on(Config) ->
    [A, #{node := NameB}] = [proplists:get_value(Key, Config) || Key <- [a, b]],
    Seen = meshx_ct:call(A, meshx_ct_there, seen, []),
    ?assertEqual([], [Event || {_, Node} = Event <- Seen, Node =:= NameB]),
    ?assertEqual(NameB, meshx_ct:call(A, erpc, call, [NameB, erlang, node, []])).

an_allowed_user_is_let_in(Config) ->
    Node = meshx_ct:start(Config, allowing, #{args => ["-meshx_node", "allowed_uids", "65534"]}),
    ?assertEqual(?TALKS, hello_of(other, listen_port(Node))),
    ?assertEqual(?TALKS, hello_of(own, listen_port(Node))),
    Other = meshx_ct:start(Config, elsewhere, #{env => [{"MESHX_ALLOWED_UIDS", "1,65533"}]}),
    ?assert(is_silence(hello_of(other, listen_port(Other)))).

any_user_is_let_in(Config) ->
    Node = meshx_ct:start(Config, open, #{env => [{"MESHX_ALLOWED_UIDS", "any"}]}),
    ?assertEqual(?TALKS, hello_of(other, listen_port(Node))).

ipv6_listener(Config) ->
    case gen_tcp:listen(0, [inet6, {ip, {0, 0, 0, 0, 0, 0, 0, 1}}]) of
        {ok, Socket} ->
            gen_tcp:close(Socket),
            Node = meshx_ct:start(Config, six, #{
                args => ["-kernel", "inet_dist_use_interface", "{0,0,0,0,0,0,0,1}"]
            }),
            Port = listen_port(Node),
            ?assertEqual(?TALKS, hello_of(own, "::1", Port)),
            ?assert(is_silence(hello_of(other, "::1", Port)));
        {error, _} ->
            {skip, "no IPv6 here"}
    end.

%% Whose a connection is then stands in /proc/net/tcp.
kernel_without_netlink(Config) ->
    Source = filename:join(proplists:get_value(data_dir, Config), "no_netlink.c"),
    Library = filename:join(proplists:get_value(priv_dir, Config), "no_netlink.so"),
    "" = os:cmd(lists:concat(["cc -D_GNU_SOURCE -shared -fPIC -o '", Library, "' '", Source, "' -ldl"])),
    Node = meshx_ct:start(Config, procfs, #{env => [{"LD_PRELOAD", Library}]}),
    ?assertMatch({error, _}, meshx_ct:call(Node, socket, open, [16, raw, 4])),
    ?assertEqual(?TALKS, hello_of(own, listen_port(Node))),
    ?assert(is_silence(hello_of(other, listen_port(Node)))),
    ?assert(meshx_ct:connect(Node, proplists:get_value(b, Config))),
    ?assert(meshx_ct:connect(proplists:get_value(a, Config), Node)).

wrong_configuration(Config) ->
    {Status, Output} = meshx_ct:erl(Config, ["-sname", "wrong", "-meshx_node", "allowed_uids", "'\"1337\"'"], #{}),
    ?assertNotEqual(0, Status),
    {match, _} = re:run(Output, "allowed_uids").
