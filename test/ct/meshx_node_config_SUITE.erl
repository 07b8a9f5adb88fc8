%% Configuration: sources and their order, types, errors, secrets, and that all of it works while
%% a node boots. No agent needed.
%%
%% Flags can't be changed in a running VM, so those cases ask a peer started with them.
-module(meshx_node_config_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(meshx_ct_config, [
    application_file/1, contains/2, failure/0, lacks/2, load/0, load_in_peer/3, quote/1, set/1
]).

all() ->
    [
        defaults,
        order_of_sources,
        application_file_is_read,
        flags_are_terms,
        flags_that_fail,
        empty_variables_are_unset,
        unknown_keys,
        values_that_are_taken,
        values_that_are_refused,
        upstreams_of_every_source,
        errors_name_the_source,
        secrets_in_no_error,
        secrets_in_no_redacted_config,
        restarts_in_order,
        consul_settings,
        token_of_higher_rank_than_file,
        variables_and_their_keys,
        table_has_all_keys,
        readme_has_the_table,
        at_boot
    ].

init_per_suite(Config) -> meshx_ct_config:init_suite(Config).
end_per_suite(Config) -> meshx_ct_config:end_suite(Config).
init_per_testcase(_, Config) -> meshx_ct_config:init_case(Config).
end_per_testcase(_, Config) -> meshx_ct_config:end_case(Config).

%%% Sources

defaults(Config) ->
    Loaded = load(),
    Consul = unicode:characters_to_binary(filename:join(proplists:get_value(bin, Config), "consul")),
    Name = <<"node1@my.host">>,
    ?assertMatch(
        #{
            node := Name,
            service_id := Name,
            service_name := Name,
            naming := node,
            consul := [],
            service_template := undefined,
            upstream_template := undefined,
            sidecar_command := [Consul, <<"connect">>, <<"proxy">>, <<"-sidecar-for">>, Name],
            sidecar_address := undefined,
            sidecar_ports := {22000, 23999},
            upstream_ports := {24000, 29999},
            upstreams := #{},
            allowed_uids := [],
            intention_directions := both,
            sidecar_stdout := notice,
            sidecar_stderr := warning,
            sidecar_restart_min := 100,
            sidecar_restart_max := 10000,
            ttl := 15000,
            deregister_after := 60000,
            start_timeout := 30000,
            request_timeout := 15000,
            stop_timeout := 2000,
            upstream_keep := 600000,
            force_registration := false
        },
        Loaded
    ),
    Guard = maps:get(guard_path, Loaded),
    ?assert(is_binary(Guard)),
    ?assertEqual({absolute, <<"meshx_guard">>}, {filename:pathtype(Guard), filename:basename(Guard)}),
    %% Exactly what config() says, no more: neither the NIF nor people get raw values.
    ?assertEqual(28, map_size(Loaded)).

order_of_sources(_) ->
    Flags = ["-meshx_node", "ttl", "4000", "-meshx_node", "stop_timeout", "1", "service_name", "dns"],
    Environment = [{"MESHX_TTL", "3000"}, {"MESHX_START_TIMEOUT", "3000"}],
    Application = [{ttl, 2000}, {start_timeout, 2000}, {sidecar_restart_min, 7}],
    {ok, Loaded} = load_in_peer(Flags, Environment, Application),
    ?assertMatch(
        #{
            ttl := 4000,
            stop_timeout := 1,
            naming := dns,
            start_timeout := 3000,
            sidecar_restart_min := 7,
            sidecar_restart_max := 10000
        },
        Loaded
    ).

%% application:load/1 is load/1's job: without it sys.config is not seen.
application_file_is_read(Config) ->
    Directory = proplists:get_value(priv_dir, Config),
    Ebin = filename:join([Directory, "fresh", "ebin"]),
    application_file(Ebin),
    Sys = filename:join(Directory, "sys.config"),
    ok = file:write_file(Sys, "[{meshx_node, [{ttl, 12345}]}].\n"),
    {ok, Loaded} = load_in_peer(["-pa", Ebin, "-config", Sys, "-meshx_node", "stop_timeout", "5"], [], []),
    ?assertMatch(#{ttl := 12345, stop_timeout := 5}, Loaded).

flags_are_terms(_) ->
    Flags = [
        "-meshx_node",
        "consul_http_addr", "\"127.0.0.1:1\"",
        "service_template", "#{\"Tags\" => [\"a\"]}",
        "sidecar_ports", "{1000,1001}",
        "sidecar_command", "\"consul 'a b'\"",
        "service_name", "{lists,reverse}",
        "sidecar_command", "\"consul 'a b'\""
    ],
    %% lists:reverse/1 fails for an atom, which proves that it was called.
    {error, {bad_configuration, Text}} = load_in_peer(Flags, [], []),
    contains(Text, ["-meshx_node service_name {lists,reverse}", "failed for node1@my.host"]),
    {ok, Loaded} = load_in_peer(lists:sublist(Flags, 9), [], []),
    ?assertMatch(
        #{
            consul := [{<<"CONSUL_HTTP_ADDR">>, <<"127.0.0.1:1">>}],
            service_template := <<"{\"Tags\":[\"a\"]}">>,
            sidecar_ports := {1000, 1001},
            sidecar_command := [_, <<"a b">>]
        },
        Loaded
    ).

flags_that_fail(_) ->
    Failing = [
        {["ttl"], ["-meshx_node ttl: a value is missing"]},
        {["ttl", "5"], ["command line flag -meshx_node ttl 5: must be milliseconds, 1000 to"]},
        {["TTL", "5000"], ["command line flag -meshx_node TTL: ", "did you mean ttl?"]},
        {["tll", "5000"], ["command line flag -meshx_node tll: ", "did you mean ttl?"]},
        {["consul_http_addr", "127.0.0.1:8500"], [
            "-meshx_node consul_http_addr: is not an Erlang term",
            "CONSUL_HTTP_ADDR takes plain text"
        ]},
        {["ttl", "5s"], ["-meshx_node ttl 5s: is not an Erlang term", "MESHX_TTL takes plain text"]},
        {["ttl", "5000", "ttl", "6000"], ["ttl: is given twice"]}
    ],
    [
        begin
            {error, {bad_configuration, Text}} = load_in_peer(["-meshx_node" | Flags], [], []),
            contains(Text, Parts)
        end
     || {Flags, Parts} <- Failing
    ].

empty_variables_are_unset(_) ->
    os:putenv("MESHX_TTL", ""),
    os:putenv("CONSUL_HTTP_ADDR", ""),
    ?assertMatch(#{ttl := 15000, consul := []}, load()),
    %% And nil is what System.get_env/1 returns.
    set([{ttl, nil}, {sidecar_address, undefined}, {consul_http_token, nil}]),
    ?assertMatch(#{ttl := 15000, sidecar_address := undefined, consul := []}, load()).

unknown_keys(_) ->
    set([{sidecar_port, 1}]),
    contains(failure(), ["meshx_node, sidecar_port: there is no such key", "sidecar_ports"]),
    set([{'force_registration?', true}]),
    contains(failure(), ["force_registration?", "use force_registration"]),
    set([{mesh_adapter, 'Elixir.MeshxConsul'}]),
    contains(failure(), ["mesh_adapter", "remove it"]),
    set([{xyz, 1}]),
    contains(failure(), ["allowed are ", "consul_http_addr", "ttl", "force_registration"]),
    set([]),
    %% An unrelated program may use the prefix.
    os:putenv("MESHX_XYZ", "1"),
    load().

%%% Types

values_that_are_taken(_) ->
    Taken = [
        {ttl, [{1000, 1000}, {<<"2000">>, 2000}, {"3000", 3000}]},
        {deregister_after, [{60000, 60000}]},
        {request_timeout, [{10000, 10000}]},
        {force_registration, [
            {true, true}, {<<"true">>, true}, {"1", true}, {<<"0">>, false}, {"false", false}
        ]},
        {sidecar_ports, [
            {{1, 65535}, {1, 65535}},
            {8000, {8000, 8000}},
            {<<"8000">>, {8000, 8000}},
            {"8000-8001", {8000, 8001}},
            {<<"8000..8001">>, {8000, 8001}},
            {<<"{8000, 8001}">>, {8000, 8001}},
            {#{'__struct__' => 'Elixir.Range', first => 5, last => 6, step => 1}, {5, 6}}
        ]},
        {intention_directions, [{both, both}, {dial, dial}, {<<"dial">>, dial}, {"both", both}]},
        {sidecar_stdout, [{off, off}, {debug, debug}, {<<"emergency">>, emergency}, {"off", off}]},
        {sidecar_address, [
            {{127, 0, 0, 1}, <<"127.0.0.1">>},
            {"10.0.0.5", <<"10.0.0.5">>},
            {<<"::1">>, <<"::1">>},
            {{0, 0, 0, 0, 0, 0, 0, 1}, <<"::1">>}
        ]},
        {allowed_uids, [
            {[], []},
            {any, any},
            {"any", any},
            {1337, [1337]},
            {[1337, 33], [33, 1337]},
            {[<<"1337">>, "2"], [2, 1337]},
            {<<"1337">>, [1337]},
            {<<"4294967294, 0">>, [0, 4294967294]}
        ]},
        {upstreams, [
            {[], #{}},
            {#{}, #{}},
            {<<" ">>, #{}},
            {[{a@b, "127.0.0.1:1"}], #{a@b => {{127, 0, 0, 1}, 1}}},
            {[{"a@b", '10.0.0.5:65535'}], #{a@b => {{10, 0, 0, 5}, 65535}}},
            {#{<<"a@b">> => <<"[::1]:24001">>}, #{a@b => {{0, 0, 0, 0, 0, 0, 0, 1}, 24001}}},
            {"a@b=127.0.0.1:1", #{a@b => {{127, 0, 0, 1}, 1}}},
            {<<"  a=1@b.c=1.2.3.4:5\n'ä@b'=[fe80::1]:6 "/utf8>>, #{
                'a=1@b.c' => {{1, 2, 3, 4}, 5}, 'ä@b' => {{16#fe80, 0, 0, 0, 0, 0, 0, 1}, 6}
            }}
        ]}
    ],
    [
        begin
            set([{Key, Value}]),
            ?assertEqual({Key, Value, Expected}, {Key, Value, maps:get(Key, load())})
        end
     || {Key, Values} <- Taken, {Value, Expected} <- Values
    ].

values_that_are_refused(_) ->
    Refused = [
        {ttl, "milliseconds, 1000 to", [999, 86400001, 1.5, "15s", <<"">>, soon, -1, [], {1}]},
        {deregister_after, "60000", [59999]},
        {request_timeout, "10000", [9999]},
        {stop_timeout, "milliseconds", [0]},
        {upstream_keep, "milliseconds", [0, 999]},
        {force_registration, "true or false", [yes, 1, "", [true]]},
        {sidecar_ports, "1 to 65535", [
            {0, 5}, {5, 0}, {1, 65536}, 0, 65536, "a-b", <<"1-2-3">>, "", {1}, #{}, <<"99999">>
        ]},
        {sidecar_ports, "ends before it begins", [{5, 4}, <<"23000-22000">>]},
        {intention_directions, "both or dial", [none, "", "Both", 2, [dial], true]},
        {sidecar_stderr, "off or a logger level", [loud, 3, "", false]},
        {sidecar_address, "numeric IP address", [
            "localhost", "1.2.3", {0, 0, 0, 0}, "::", {1, 2}, {}, {256, 1, 1, 1}, 5, "0.0.0.0", ""
        ]},
        {service_name, "node, dns", [names, "a", 1, {1, 2}, "", fun erlang:max/2, <<":f">>, "m:"]},
        {service_template, "JSON", ["{", <<"[]">>, <<"x">>, 5, {file, 5}, [1, 2], {a}, <<255>>]},
        {sidecar_command, "split as a shell", ["", <<"  ">>, [], [<<>>], [<<"a">>, 5], 5, <<"a", 0>>, "[1]"]},
        {sidecar_env, "NAME=value", ["A", <<"=x">>, [{"A=B", "x"}], [{"", "x"}], [a], 5, [{"A", {}}]]},
        {allowed_uids, "user IDs", [
            "1337", "envoy", [48], [33, 100], "1,2", -1, 4294967295, [1337, -1], envoy, <<"1;2">>, <<",1">>, {1}, #{}, [1 | 2]
        ]},
        {upstreams, "{Node,\"ip:port\"}", [
            "a@b", "a@b=localhost:1", "a=127.0.0.1:1", "=127.0.0.1:1", "a@b=127.0.0.1", "a@b=127.0.0.1:0",
            "a@b=127.0.0.1:65536", "a@b=0.0.0.0:1", "a@b=[::]:1", "a@b=::1:1", "a@b=[127.0.0.1]:1", "a@b=127.1:1",
            "a@b=[]:1", "a@b=127.0.0.1:1,c@d=127.0.0.1:2", 5, a@b, [a@b], [{a@b, 1}], [{a@b, "127.0.0.1:1\n"}],
            [{a@b, "127.0.0.1:1"}, {c, "127.0.0.1:1"}], #{17 => "127.0.0.1:1"}, {a@b, "127.0.0.1:1"},
            [{lists:duplicate(254, $a) ++ "@b", "127.0.0.1:1"}]
        ]},
        {upstreams, "a@b is given twice", [
            "a@b=127.0.0.1:1 a@b=127.0.0.1:1",
            [{a@b, "127.0.0.1:1"}, {"a@b", "127.0.0.1:2"}],
            #{a@b => "127.0.0.1:1", <<"a@b">> => "127.0.0.1:1"}
        ]},
        {upstreams, "quote is not closed", ["a@b='127.0.0.1:1"]},
        {consul_cacert, "text", [{a}, <<0>>, <<255>>, 5]}
    ],
    [
        begin
            set([{Key, Value}]),
            Text = failure(),
            contains(Text, ["application environment of meshx_node, ", atom_to_list(Key), Words])
        end
     || {Key, Words, Values} <- Refused, Value <- Values
    ].

upstreams_of_every_source(_) ->
    One = #{node2@myhost => {{127, 0, 0, 1}, 24001}},
    Flag = ["-meshx_node", "upstreams", "[{node2@myhost,\"127.0.0.1:24001\"}]"],
    Variable = [{"MESHX_UPSTREAMS", "node2@myhost=127.0.0.1:24002 node3@myhost=[::1]:24002"}],
    %% As Elixir's map and keyword list.
    [
        ?assertMatch({ok, #{upstreams := One}}, load_in_peer([], [], [{upstreams, Term}]))
     || Term <- [#{<<"node2@myhost">> => <<"127.0.0.1:24001">>}, [{node2@myhost, <<"127.0.0.1:24001">>}]]
    ],
    ?assertMatch({ok, #{upstreams := One}}, load_in_peer(Flag, Variable, [])),
    Two = #{
        node2@myhost => {{127, 0, 0, 1}, 24002}, node3@myhost => {{0, 0, 0, 0, 0, 0, 0, 1}, 24002}
    },
    ?assertMatch({ok, #{upstreams := Two}}, load_in_peer([], Variable, [{upstreams, #{}}])),
    os:putenv("MESHX_UPSTREAMS", "node2@myhost=localhost:24001"),
    contains(failure(), [
        "environment variable MESHX_UPSTREAMS=node2@myhost=localhost:24001: must be list of {Node,\"ip:port\"}",
        "numeric"
    ]).

errors_name_the_source(_) ->
    set([{ttl, 17}]),
    contains(failure(), ["application environment of meshx_node, ttl = 17: must be milliseconds"]),
    set([{request_timeout, 9999}]),
    contains(failure(), ["request_timeout = 9999: must be milliseconds, 10000 to", "no leader takes about 7 s"]),
    os:putenv("MESHX_TTL", "18"),
    contains(failure(), ["environment variable MESHX_TTL=18: must be milliseconds"]),
    os:putenv("PATH", "/nowhere"),
    os:putenv("MESHX_TTL", ""),
    set([]),
    contains(failure(), ["default of sidecar_command: program consul is not found in PATH /nowhere; install it, or set"]).

secrets_in_no_error(_) ->
    Secret = "tops3cret",
    Term = "\"" ++ Secret,
    [
        begin
            {error, {bad_configuration, Text}} = load_in_peer(["-meshx_node", Key, Term], [], []),
            contains(Text, ["-meshx_node " ++ Key ++ ": is not an Erlang term"]),
            lacks(Text, Secret)
        end
     || Key <- ["consul_http_token", "consul_http_auth", "service_template", "sidecar_env"]
    ],
    Values = [
        {consul_http_token, [<<"tops3cret", 0>>, {"tops3cret"}]},
        {consul_http_auth, [<<"tops3cret", 0>>]},
        {consul_http_addr, [<<"http://me:tops3cret@host", 0>>, {"http://me:tops3cret@host"}]},
        {sidecar_env, [[{"A", {"tops3cret"}}], "A=tops3cret B", <<"{\"A\":\"tops3cret\"">>]},
        {sidecar_command, ["/nope -token tops3cret", "x 'tops3cret", <<"consul {{x}} tops3cret">>]},
        {service_template, [<<"{\"Token\":\"tops3cret\"">>, [{a, {<<"tops3cret">>}}]]}
    ],
    [
        begin
            set([{Key, Value}]),
            Text = failure(),
            contains(Text, [atom_to_list(Key)]),
            lacks(Text, Secret)
        end
     || {Key, Some} <- Values, Value <- Some
    ].

secrets_in_no_redacted_config(_) ->
    os:putenv("CONSUL_GRPC_SECRET", "tops3cret"),
    set([
        {consul_http_addr, "https://me:tops3cret/x@host:1"},
        {consul_http_token, "tops3cret"},
        {consul_http_auth, "me:tops3cret"},
        {consul_cacert, "/ca.pem"},
        {service_template, "{\"Token\":\"tops3cret\"}"},
        {upstream_template, "{\"Config\":{\"x\":\"tops3cret\"}}"},
        {sidecar_env, [{"A", "tops3cret"}]},
        {sidecar_command, "consul -token tops3cret -token=tops3cret --http-auth=tops3cret -x y -token=tops3cret"}
    ]),
    Loaded = load(),
    Redacted = meshx_node_config:redact(Loaded),
    lacks(unicode:characters_to_binary(io_lib:format("~p", [Redacted])), "tops3cret"),
    ?assertEqual(maps:keys(Loaded), maps:keys(Redacted)),
    #{consul := Consul, sidecar_command := [_ | Arguments], sidecar_environment := Environment} = Redacted,
    ?assertEqual(<<"https://[hidden]@host:1">>, proplists:get_value(<<"CONSUL_HTTP_ADDR">>, Consul)),
    ?assertEqual(<<"/ca.pem">>, proplists:get_value(<<"CONSUL_CACERT">>, Consul)),
    ?assert(lists:member(<<"A=[hidden]">>, Environment)),
    ?assert(lists:member(<<"CONSUL_CACERT=/ca.pem">>, Environment)),
    Hidden = <<"[hidden]">>,
    ?assertEqual(
        [
            <<"-token">>, Hidden, <<"-token=[hidden]">>, <<"--http-auth=[hidden]">>,
            <<"-x">>, <<"y">>, <<"-token=[hidden]">>
        ],
        Arguments
    ),
    set([{sidecar_command, none}]),
    None = load(),
    ?assertMatch(#{sidecar_command := none}, meshx_node_config:redact(None)).

restarts_in_order(_) ->
    set([{sidecar_restart_min, 20000}]),
    contains(failure(), ["sidecar_restart_min", "20000", "above sidecar_restart_max, 10000"]),
    set([{sidecar_restart_max, 50}]),
    contains(failure(), ["sidecar_restart_max", "50", "below sidecar_restart_min, 100"]),
    set([{sidecar_restart_min, 50}, {sidecar_restart_max, 50}]),
    load().

%%% Consul's own variables

consul_settings(_) ->
    os:putenv("CONSUL_HTTP_ADDR", "unix:///run/c.sock"),
    os:putenv("CONSUL_NAMESPACE", "team"),
    %% Not under our prefix.
    os:putenv("MESHX_CONSUL_PARTITION", "x"),
    set([
        {consul_http_addr, "10.0.0.1:8500"},
        {consul_http_ssl, true},
        {consul_http_ssl_verify, <<"f">>},
        {consul_tls_server_name, ""},
        {consul_cacert, <<>>}
    ]),
    Loaded = load(),
    ?assertEqual(
        [
            {<<"CONSUL_HTTP_ADDR">>, <<"unix:///run/c.sock">>},
            {<<"CONSUL_HTTP_SSL">>, <<"true">>},
            {<<"CONSUL_HTTP_SSL_VERIFY">>, <<"f">>},
            {<<"CONSUL_NAMESPACE">>, <<"team">>}
        ],
        maps:get(consul, Loaded)
    ),
    %% The sidecar is told the same.
    Environment = maps:get(sidecar_environment, Loaded),
    [?assert(lists:member(<<Name/binary, $=, Value/binary>>, Environment)) || {Name, Value} <- maps:get(consul, Loaded)].

token_of_higher_rank_than_file(_) ->
    os:putenv("CONSUL_HTTP_TOKEN", "t"),
    os:putenv("CONSUL_HTTP_TOKEN_FILE", "/f"),
    Both = [{<<"CONSUL_HTTP_TOKEN">>, <<"t">>}, {<<"CONSUL_HTTP_TOKEN_FILE">>, <<"/f">>}],
    ?assertEqual(Both, maps:get(consul, load())),
    os:unsetenv("CONSUL_HTTP_TOKEN_FILE"),
    set([{consul_http_token_file, "/g"}]),
    #{consul := Consul, sidecar_environment := Environment} = load(),
    ?assertEqual([{<<"CONSUL_HTTP_TOKEN">>, <<"t">>}], Consul),
    ?assertNot(lists:member(<<"CONSUL_HTTP_TOKEN_FILE=/g">>, Environment)),
    os:unsetenv("CONSUL_HTTP_TOKEN"),
    os:putenv("CONSUL_HTTP_TOKEN_FILE", "/f"),
    set([{consul_http_token, "t"}]),
    ?assertEqual(Both, maps:get(consul, load())),
    {ok, FromFlag} = load_in_peer(
        ["-meshx_node", "consul_http_token", "\"t\""], [{"CONSUL_HTTP_TOKEN_FILE", "/f"}], []
    ),
    ?assertEqual([{<<"CONSUL_HTTP_TOKEN">>, <<"t">>}], maps:get(consul, FromFlag)),
    ?assertNot(lists:member(<<"CONSUL_HTTP_TOKEN_FILE=/f">>, maps:get(sidecar_environment, FromFlag))).

%% What the C side says in Consul's words.
variables_and_their_keys(_) ->
    os:putenv("CONSUL_CACERT", "/ca.pem"),
    set([{consul_client_key, "/key.pem"}]),
    Loaded = load(),
    ?assertEqual(
        <<"consul_client_key = /key.pem: no; consul_cacert (CONSUL_CACERT), consul_http_addr (CONSUL_HTTP_ADDR)">>,
        meshx_node_config:name_keys(
            <<"CONSUL_CLIENT_KEY=/key.pem: no; CONSUL_CACERT, CONSUL_HTTP_ADDR">>, Loaded
        )
    ),
    Others = <<"nothing of CONSUL_OTHER=1, ", 255, " or CONSUL_">>,
    ?assertEqual(Others, meshx_node_config:name_keys(Others, Loaded)).

%%% The whole

%% Each row: a flag whose value is an Erlang term that is accepted, and the right variable.
readme_has_the_table(_) ->
    {ok, Readme} = file:read_file(filename:join(meshx_ct:root(), "README.md")),
    Table = unicode:characters_to_binary(meshx_node_config:table()),
    ?assertNotEqual(nomatch, binary:match(Readme, string:trim(Table))).

table_has_all_keys(_) ->
    Rows = tl(tl(string:split(string:trim(unicode:characters_to_list(meshx_node_config:table())), "\n", all))),
    ?assertEqual(35, length(Rows)),
    Cells = [string:split(string:trim(Row, both, "| "), " | ", all) || Row <- Rows],
    [?assertMatch([_, _, _, _, _, _], Row) || Row <- Cells],
    %% As sh reads the examples; all at once.
    Examples = [string:trim(Flag, both, "`") || [_, Flag | _] <- Cells, string:find(Flag, "template") =:= nomatch],
    Words = string:split(string:trim(os:cmd("printf '%s\\n' " ++ lists:join(" ", Examples))), "\n", all),
    {ok, Loaded} = load_in_peer(Words, [], []),
    ?assertMatch(#{sidecar_command := none, sidecar_stderr := off, naming := dns}, Loaded).

%% net_sup starts before logger's supervisor and user, in OTP 25 before file_server, too.
at_boot(Config) ->
    Directory = proplists:get_value(priv_dir, Config),
    Source = filename:join(Directory, "boot_probe_dist.erl"),
    ok = file:write_file(Source,
        "-module(boot_probe_dist).\n"
        "-export([childspecs/0]).\n"
        "childspecs() ->\n"
        "    true = erlang:system_info(otp_release) > \"25\" orelse whereis(file_server_2) =:= undefined,\n"
        "    undefined = whereis(user),\n"
        "    {ok, Config} = meshx_node_config:load('node1@my.host'),\n"
        "    Keys = [service_name, service_template, sidecar_command, ttl],\n"
        "    erlang:display([{result, [maps:get(Key, Config) || Key <- Keys]}]),\n"
        "    erlang:halt(0, [{flush, true}]).\n"),
    {ok, boot_probe_dist} = compile:file(Source, [{outdir, Directory}]),
    Template = filename:join(Directory, "boot.json"),
    ok = file:write_file(Template, "{}"),
    application_file(Directory),
    Sys = filename:join(Directory, "boot.config"),
    ok = file:write_file(Sys, io_lib:format("[{meshx_node, [{ttl, 2345}, {service_template, {file, ~p}}]}].~n", [Template])),
    Ebin = filename:dirname(code:which(meshx_node_config)),
    %% A relative folder in PATH, so that the current directory is asked for too.
    Command = [
        "cd ", quote(Directory), " && PATH=bin:$PATH erl -noshell -proto_dist boot_probe -name probe@127.0.0.1 ",
        "-start_epmd false -pa ", quote(Ebin), " . -config ", quote(Sys), " -meshx_node service_name dns ",
        "2>&1"
    ],
    Output = os:cmd(lists:flatten(Command)),
    {match, [Printed]} = re:run(Output, "\\[\\{result,.*\\]", [{capture, first, list}, dotall]),
    contains(unicode:characters_to_binary(Printed), [
        "node1-at-my-host-da2a8f80aa", "{}", filename:join([Directory, "bin", "consul"]), "2345"
    ]).
