%% Whoever connects to a node's listener and is no node, or a broken one, loses that connection
%% and harms nothing else. b is linked to a all the while, and that link must not even flicker.
-module(meshx_node_stranger_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        connects_and_leaves,
        comes_through_the_sidecar_port,
        sends_no_handshake,
        has_too_long_a_name,
        lies_about_lengths,
        breaks_the_handshake,
        claims_the_name_of_a_linked_node,
        stays_silent,
        arrives_in_masses,
        lies_about_lengths_as_a_node,
        node_sends_what_is_no_term,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Config1 = meshx_ct:init_suite(Config),
    [A, B] = meshx_ct:start_all(Config1, [a, b]),
    ?assert(meshx_ct:connect(B, A)),
    meshx_ct:call(A, meshx_ct_there, watch, [[]]),
    {ok, Info} = meshx_ct:call(A, meshx_node, info, []),
    [{a, A}, {b, B}, {info, Info} | Config1].

end_per_suite(Config) -> meshx_ct:end_suite(Config).

init_per_testcase(_, Config) ->
    [{mark, meshx_ct:mark(proplists:get_value(a, Config))} | Config].

end_per_testcase(nothing_is_left, Config) ->
    meshx_ct:end_case(Config);
end_per_testcase(_, Config) ->
    %% The link is the one it was, and no process of the node has crashed.
    {A, #{node := NameB}} = actors(Config),
    Lines = meshx_ct:lines(A, proplists:get_value(mark, Config)),
    Found = #{
        seen => [Event || {_, Node} = Event <- meshx_ct:call(A, meshx_ct_there, seen, []), Node =:= NameB],
        linked => lists:member(NameB, meshx_ct:call(A, erlang, nodes, [])),
        rpc => meshx_ct:call(A, erpc, call, [NameB, erlang, node, []]),
        crashes => [Line || Line <- Lines, re:run(Line, "CRASH|[Cc]rash|Error in process|badmatch") =/= nomatch]
    },
    case Found of
        #{seen := [], linked := true, rpc := NameB, crashes := []} -> meshx_ct:end_case(Config);
        _ -> {fail, Found}
    end.

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

actors(Config) ->
    {proplists:get_value(a, Config), proplists:get_value(b, Config)}.

dial(Config) ->
    dial(Config, listen_port).

dial(Config, Which) ->
    Port = maps:get(Which, proplists:get_value(info, Config)),
    {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, [binary, {active, false}]),
    Socket.

%% The node ends the connection; what it has sent before is returned.
is_dropped(Socket) ->
    is_dropped(Socket, <<>>).

is_dropped(Socket, Received) ->
    case gen_tcp:recv(Socket, 0, 20000) of
        {ok, More} ->
            is_dropped(Socket, <<Received/binary, More/binary>>);
        {error, Reason} ->
            ?assert(lists:member(Reason, [closed, econnreset])),
            gen_tcp:close(Socket),
            Received
    end.

%% 2-byte length, as in the handshake.
packet(Data) ->
    Binary = iolist_to_binary(Data),
    <<(byte_size(Binary)):16, Binary/binary>>.

%%% Strangers

%% With FIN and with RST, as health checks and proxies do.
connects_and_leaves(Config) ->
    [
        begin
            Socket = dial(Config),
            ok = inet:setopts(Socket, [{linger, Linger}]),
            gen_tcp:close(Socket)
        end
     || Linger <- [{false, 0}, {true, 0}], _ <- lists:seq(1, 50)
    ],
    {A, _} = actors(Config),
    ?assertEqual([], meshx_ct:own_lines(A, proplists:get_value(mark, Config))).

%% Complete packets that are none of the protocol: one line each names the sender.
sends_no_handshake(Config) ->
    {A, _} = actors(Config),
    Packets = [
        packet("hello"),
        packet(<<131, 104, 2, 97, 1, 97, 2>>),
        packet(<<0>>),
        packet(binary:copy(<<"x">>, 65535)),
        %% "GE" is the length 18245.
        ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", binary:copy(<<"y">>, 20000)]
    ],
    [
        begin
            Mark = meshx_ct:mark(A),
            Socket = dial(Config),
            {ok, {_, Port}} = inet:sockname(Socket),
            ok = gen_tcp:send(Socket, Packet),
            ?assertEqual(<<>>, is_dropped(Socket)),
            meshx_ct:wait("a line", fun() -> meshx_ct:own_lines(A, Mark) =/= [] end),
            [Line] = meshx_ct:own_lines(A, Mark),
            ?assertMatch({_, _}, binary:match(Line, integer_to_binary(Port)))
        end
     || Packet <- Packets
    ].

%% OTP's net_kernel makes an atom of the name, or of the host of a node that asks for a name (the
%% flag 1 bsl 33), and would end, with the VM, on one that is too long: it puts 12 bytes before that.
has_too_long_a_name(Config) ->
    {A, _} = actors(Config),
    [
        begin
            Sent = <<(binary:copy(<<"n">>, Size - 5))/binary, "@host">>,
            Mark = meshx_ct:mark(A),
            Socket = dial(Config),
            ok = gen_tcp:send(Socket, packet([<<$N, Flags:64, 0:32, (byte_size(Sent)):16>>, Sent])),
            ?assertEqual(<<>>, is_dropped(Socket)),
            meshx_ct:wait("a line", fun() -> meshx_ct:own_lines(A, Mark) =/= [] end)
        end
     || {Flags, Size} <- [
            {16#D07DF7FBD, 256}, {16#D07DF7FBD, 1000}, {16#D07DF7FBD bor (1 bsl 33), 241}, {16#D07DF7FBD bor (1 bsl 33), 255}
        ]
    ].

%% More is announced than comes; less is announced than comes; nothing is announced.
lies_about_lengths(Config) ->
    [
        begin
            Socket = dial(Config),
            ok = gen_tcp:send(Socket, Data),
            gen_tcp:shutdown(Socket, write),
            ?assertEqual(<<>>, is_dropped(Socket))
        end
     || Data <- [
            <<>>,
            <<0>>,
            <<255>>,
            <<255, 255>>,
            <<255, 255, $N>>,
            <<0, 0>>,
            <<0, 0, 0, 0, 0, 0>>,
            <<0, 1, $X, 255, 255, 1, 2, 3>>,
            rand:bytes(10000),
            rand:bytes(100000)
        ]
    ].

%% Someone with the cookie: after its handshake a frame may have 128 MiB, and no memory is given
%% to a length alone.
lies_about_lengths_as_a_node(Config) ->
    {A, _} = actors(Config),
    Before = meshx_ct:call(A, erlang, memory, [total]),
    Refused = [16#FFFFFFFF, 16#80000000, 16#7FFFFFFF, 128 * 1024 * 1024 + 1],
    [
        begin
            Socket = shake_hands(Config, <<"liar", (integer_to_binary(N))/binary, "@host">>),
            ok = gen_tcp:send(Socket, [<<Length:32>>, rand:bytes(1000)]),
            is_dropped(Socket)
        end
     || {N, Length} <- lists:zip(lists:seq(1, length(Refused)), Refused)
    ],
    Largest = [
        begin
            Socket = shake_hands(Config, <<"patient", (integer_to_binary(N))/binary, "@host">>),
            ok = gen_tcp:send(Socket, [<<(128 * 1024 * 1024):32>>, rand:bytes(1000)]),
            Socket
        end
     || N <- lists:seq(1, 8)
    ],
    timer:sleep(200),
    ?assert(meshx_ct:call(A, erlang, memory, [total]) < Before + 32 * 1024 * 1024),
    [gen_tcp:close(Socket) || Socket <- Largest].

%% The handshake of a node, https://www.erlang.org/doc/apps/erts/erl_dist_protocol.
shake_hands(Config, Name) ->
    Socket = dial(Config),
    Flags = 16#d07df7fbd,
    ok = gen_tcp:send(Socket, packet([<<$N, Flags:64, 77:32, (byte_size(Name)):16>>, Name])),
    <<"sok">> = next_packet(Socket),
    <<$N, _:64, Challenge:32, _/binary>> = next_packet(Socket),
    Digest = erlang:md5(["meshx_ct_cookie", integer_to_list(Challenge)]),
    ok = gen_tcp:send(Socket, packet([<<$r, 4711:32>>, Digest])),
    <<$a, _:16/binary>> = next_packet(Socket),
    Socket.

next_packet(Socket) ->
    {ok, <<Length:16>>} = gen_tcp:recv(Socket, 2, 10000),
    {ok, Packet} = gen_tcp:recv(Socket, Length, 10000),
    Packet.

%% Begins as a node does, then goes wrong: the node's answers, if any, and then the end.
breaks_the_handshake(Config) ->
    Name = fun(Length, Node) -> [$N, <<16#0000000d07df7fbd:64, 77:32, Length:16>>, Node] end,
    Broken = [
        packet("N"),
        packet(["N", <<0:64, 1:32>>]),
        packet(Name(60000, "x@vm")),
        packet(Name(0, "")),
        packet(Name(4, "nonode")),
        packet(Name(300, lists:duplicate(300, $x))),
        packet(Name(12, <<255, 254, 0, 1, "@", 0, 0, 0, 0, 0, 0, 0>>)),
        %% What comes after a right beginning is no answer to the challenge.
        [packet(Name(11, "stranger@vm")), packet("r"), packet("garbage")],
        [packet(Name(11, "stranger@vm")), packet([$r, <<1:32>>, lists:duplicate(16, 0)])],
        [packet(Name(11, "stranger@vm")), <<0, 0, 0, 0>>]
    ],
    [
        begin
            Socket = dial(Config),
            ok = gen_tcp:send(Socket, Data),
            gen_tcp:shutdown(Socket, write),
            is_dropped(Socket)
        end
     || Data <- Broken
    ].

%% The node it claims to be keeps its link, whether the stranger answers the status or not.
claims_the_name_of_a_linked_node(Config) ->
    {_, #{node := NameB}} = actors(Config),
    Name = atom_to_binary(NameB),
    [
        begin
            Socket = dial(Config),
            ok = gen_tcp:send(Socket, packet([<<$N, 16#d07df7fbd:64, 77:32, (byte_size(Name)):16>>, Name])),
            ?assertEqual(<<"salive">>, next_packet(Socket)),
            ok = gen_tcp:send(Socket, Answer),
            gen_tcp:shutdown(Socket, write),
            is_dropped(Socket)
        end
     || Answer <- ["", packet("strue"), [packet("strue"), packet([$r, <<1:32>>, lists:duplicate(16, 0)])]]
    ].

%% It is given up after a while, not kept for ever.
stays_silent(Config) ->
    Silent = dial(Config),
    Half = dial(Config),
    ok = gen_tcp:send(Half, <<0, 100, $N>>),
    ?assertEqual(<<>>, is_dropped(Half)),
    ?assertEqual(<<>>, is_dropped(Silent)).

arrives_in_masses(Config) ->
    {A, _} = actors(Config),
    Before = meshx_ct:call(A, fun resources/0),
    Sockets = [dial(Config) || _ <- lists:seq(1, 300)],
    [gen_tcp:send(Socket, rand:bytes(rand:uniform(100))) || Socket <- Sockets],
    Late = meshx_ct:start(Config, late, #{}),
    ?assert(meshx_ct:connect(Late, A)),
    %% Then A knows the link, too.
    ?assertEqual(pong, meshx_ct:call(Late, net_adm, ping, [maps:get(node, A)])),
    ?assert(meshx_ct:call(A, erlang, disconnect_node, [maps:get(node, Late)])),
    [gen_tcp:close(Socket) || Socket <- Sockets],
    meshx_ct:wait("processes and descriptors to be as before", fun() ->
        {Processes, Descriptors} = meshx_ct:call(A, fun resources/0),
        Processes =< element(1, Before) andalso Descriptors =< element(2, Before)
    end).

resources() ->
    {ok, Descriptors} = file:list_dir("/proc/self/fd"),
    {erlang:system_info(process_count), length(Descriptors)}.

%% Without a certificate: the sidecar drops it, and the node may see a connection come and go.
comes_through_the_sidecar_port(Config) ->
    {A, _} = actors(Config),
    [
        begin
            Socket = dial(Config, sidecar_port),
            ok = gen_tcp:send(Socket, Data),
            gen_tcp:shutdown(Socket, write),
            is_dropped(Socket)
        end
     || Data <- ["", packet("hello"), rand:bytes(1000)]
    ],
    ?assertEqual([], meshx_ct:own_lines(A, proplists:get_value(mark, Config))).

%%% A node gone mad

%% The frame is right, what is in it is not: the emulator ends this link and no other.
node_sends_what_is_no_term(Config) ->
    {#{node := NameA} = A, _} = actors(Config),
    [
        begin
            Mad = meshx_ct:start(Config, Name, #{}),
            ?assert(meshx_ct:connect(Mad, A)),
            meshx_ct:call(Mad, meshx_ct_there, watch, [[]]),
            meshx_ct:call(Mad, fun() -> raw(NameA, Data) end),
            meshx_ct:wait("the end of the link", fun() ->
                lists:member({nodedown, NameA}, meshx_ct:call(Mad, meshx_ct_there, seen, []))
            end),
            ?assert(meshx_ct:connect(Mad, A)),
            ?assert(meshx_ct:call(Mad, erlang, disconnect_node, [NameA])),
            meshx_ct:wait("the other side to know", fun() ->
                not lists:member(maps:get(node, Mad), meshx_ct:call(A, erlang, nodes, []))
            end),
            meshx_ct:stop(Mad)
        end
     || {Name, Data} <- [{mad1, <<131, 255, 1, 2, 3>>}, {mad2, rand:bytes(5000)}, {mad3, <<131, 68, 200>>}]
    ].

%% Past the emulator, through the controller's door for OTP's own tests.
raw(Node, Data) ->
    {_, Controller} = lists:keyfind(Node, 1, erlang:system_info(dist_ctrl)),
    %% It may have lost its link before it can answer.
    Ref = monitor(process, Controller),
    Controller ! {send, self(), Ref, Data},
    receive
        {Ref, ok} -> ok;
        {'DOWN', Ref, process, _, _} -> ok
    after 5000 -> error(no_answer)
    end.
