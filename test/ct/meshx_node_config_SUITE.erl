%% Configuration: sources and their order, types, errors, secrets, names, JSON, the sidecar's
%% command and environment, and that all of it works while a node boots. No agent needed.
%%
%% Flags can't be changed in a running VM, so those cases ask a peer started with them.
-module(meshx_node_config_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(NODE, 'node1@my.host').

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
        errors_name_the_source,
        secrets_in_no_error,
        secrets_in_no_redacted_config,
        consul_settings,
        token_of_higher_rank_than_file,
        service_names,
        service_name_functions,
        own_names_consul_can_not_carry,
        digest,
        labels,
        templates,
        template_files,
        sidecar_commands,
        programs,
        words_as_a_shell,
        sidecar_environment,
        restarts_in_order,
        json_round_trip,
        json_of_terms,
        json_text,
        json_errors,
        table_has_all_keys,
        at_boot
    ].

init_per_suite(Config) ->
    rand:seed(exsss, {1, 2, 3}),
    Environment = os:env(),
    Bin = filename:join(proplists:get_value(priv_dir, Config), "bin"),
    program(Bin, "consul"),
    [{environment, Environment}, {bin, Bin} | Config].

end_per_suite(Config) ->
    restore_environment(Config).

init_per_testcase(_, Config) ->
    restore_environment(Config),
    [os:unsetenv(Name) || {Name, _} <- os:env(), is_ours(Name)],
    os:putenv("PATH", proplists:get_value(bin, Config) ++ ":/usr/bin:/bin"),
    [application:unset_env(meshx_node, Key) || {Key, _} <- application:get_all_env(meshx_node)],
    Config.

restore_environment(Config) ->
    Saved = proplists:get_value(environment, Config),
    [os:unsetenv(Name) || {Name, _} <- os:env(), not lists:keymember(Name, 1, Saved)],
    [os:putenv(Name, Value) || {Name, Value} <- Saved].

is_ours("CONSUL_" ++ _) -> true;
is_ours("MESHX_" ++ _) -> true;
is_ours(_) -> false.

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
            sidecar_stdout := notice,
            sidecar_stderr := warning,
            sidecar_restart_min := 100,
            sidecar_restart_max := 10000,
            ttl := 15000,
            deregister_after := 60000,
            start_timeout := 30000,
            request_timeout := 15000,
            stop_timeout := 2000,
            force_registration := false
        },
        Loaded
    ),
    Guard = maps:get(guard_path, Loaded),
    ?assert(is_binary(Guard)),
    ?assertEqual({absolute, <<"meshx_guard">>}, {filename:pathtype(Guard), filename:basename(Guard)}),
    %% Exactly what config() says, no more: neither the NIF nor people get raw values.
    ?assertEqual(23, map_size(Loaded)).

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
        {sidecar_stdout, [{off, off}, {debug, debug}, {<<"emergency">>, emergency}, {"off", off}]},
        {sidecar_address, [
            {{127, 0, 0, 1}, <<"127.0.0.1">>},
            {"10.0.0.5", <<"10.0.0.5">>},
            {<<"::1">>, <<"::1">>},
            {{0, 0, 0, 0, 0, 0, 0, 1}, <<"::1">>}
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
        {force_registration, "true or false", [yes, 1, "", [true]]},
        {sidecar_ports, "1 to 65535", [
            {0, 5}, {5, 4}, {1, 65536}, 0, 65536, "a-b", <<"1-2-3">>, "", {1}, #{}, <<"99999">>
        ]},
        {sidecar_stderr, "off or a logger level", [loud, 3, "", false]},
        {sidecar_address, "numeric IP address", [
            "localhost", "1.2.3", {0, 0, 0, 0}, "::", {1, 2}, {}, {256, 1, 1, 1}, 5, "0.0.0.0", ""
        ]},
        {service_name, "node, dns", [names, "a", 1, {1, 2}, "", fun erlang:max/2, <<":f">>, "m:"]},
        {service_template, "JSON", ["{", <<"[]">>, <<"x">>, 5, {file, 5}, [1, 2], {a}, <<255>>]},
        {sidecar_command, "split as a shell", ["", <<"  ">>, [], [<<>>], [<<"a">>, 5], 5, <<"a", 0>>, "[1]"]},
        {sidecar_env, "NAME=value", ["A", <<"=x">>, [{"A=B", "x"}], [{"", "x"}], [a], 5, [{"A", {}}]]},
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
    contains(failure(), ["default of sidecar_command: program consul is not found in PATH /nowhere"]).

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

%%% Names

service_names(_) ->
    ?assertEqual(<<"other@host">>, meshx_node_config:service_name('other@host', load())),
    [
        begin
            set([{service_name, Dns}]),
            #{service_name := Own, service_id := Id} = Loaded = load(),
            %% printf %s node1@my.host | sha256sum | cut -c1-10
            ?assertEqual({<<"node1-at-my-host-da2a8f80aa">>, <<"node1@my.host">>}, {Own, Id}),
            ?assertEqual(Own, meshx_node_config:service_name(?NODE, Loaded)),
            ?assertNotEqual(Own, meshx_node_config:service_name('node1@my-host', Loaded))
        end
     || Dns <- [dns, "dns", <<"dns">>]
    ].

service_name_functions(_) ->
    [
        begin
            set([{service_name, Function}]),
            Loaded = load(),
            ?assertEqual(<<"svc-node1">>, maps:get(service_name, Loaded)),
            ?assertEqual(<<"svc-b">>, meshx_node_config:service_name('b@x', Loaded)),
            ?assertError({bad_configuration, _}, meshx_node_config:service_name('B@x', Loaded)),
            ?assertError({bad_configuration, _}, meshx_node_config:service_name('noat', Loaded))
        end
     || Function <- [
            {?MODULE, short},
            fun ?MODULE:short/1,
            fun(Node) -> binary_to_list(short(Node)) end,
            atom_to_list(?MODULE) ++ ":short"
        ]
    ],
    Wrong = [
        {fun(_) -> "" end, "returned []"},
        {fun(_) -> "a/b" end, "a-z 0-9"},
        {fun(_) -> 'Upper' end, "a-z 0-9"},
        {fun(_) -> lists:duplicate(201, $a) end, "1 to 200"},
        {fun(_) -> <<"a\n">> end, "a-z 0-9"},
        {fun(_) -> {a} end, "returned {a}"},
        {fun(_) -> exit(oops) end, "exit:oops"},
        {{?MODULE, nothing}, "there is no meshx_node_config_SUITE:nothing/1"},
        {{no_such_module, f}, "module no_such_module can't be loaded"}
    ],
    [
        begin
            set([{service_name, Function}]),
            contains(failure(), ["service_name", Part])
        end
     || {Function, Part} <- Wrong
    ].

short(Node) ->
    [Name, _] = string:split(atom_to_list(Node), "@"),
    list_to_binary("svc-" ++ Name).

own_names_consul_can_not_carry(_) ->
    Names = ['a/b@host', 'a@*', 'a b@host', 'ä@host', list_to_atom(lists:duplicate(201, $a))],
    [
        begin
            set([]),
            {error, {bad_configuration, Text}} = meshx_node_config:load(Node),
            contains(Text, ["use service_name dns"]),
            set([{service_name, dns}]),
            {ok, _} = meshx_node_config:load(Node)
        end
     || Node <- Names
    ],
    set([]),
    {ok, #{service_name := <<"Node1@My_Host">>}} = meshx_node_config:load('Node1@My_Host').

digest(_) ->
    [
        begin
            Data = rand:bytes(Size),
            ?assertEqual({Size, crypto:hash(sha256, Data)}, {Size, meshx_node_name:sha256(Data)})
        end
     || Size <- lists:seq(0, 200)
    ].

labels(_) ->
    Random = [
        list_to_atom([lists:nth(rand:uniform(12), "aZ09-_.@é/ *") || _ <- lists:seq(1, rand:uniform(120))])
     || _ <- lists:seq(1, 500)
    ],
    Nodes = lists:usort(['@', '-', '--@--', 'A@b', 'a@b', 'a@B', nonode@nohost, '日本@東京' | Random]),
    Labels = [
        begin
            {ok, Label} = meshx_node_name:service_name(Node, dns),
            ?assertMatch({match, _}, re:run(Label, "^[a-z0-9][a-z0-9-]*-[0-9a-f]{10}$", [dollar_endonly])),
            %% "-sidecar-proxy" still fits into a DNS label.
            ?assert(byte_size(Label) =< 49),
            Label
        end
     || Node <- Nodes
    ],
    ?assertEqual(length(Nodes), length(lists:usort(Labels))).

%%% Templates

templates(_) ->
    Taken = [
        {<<"{\"Tags\":[\"{{node}}\"]}">>, <<"{\"Tags\":[\"node1@my.host\"]}">>},
        {"  {\"a\" : 1} ", <<"  {\"a\" : 1} ">>},
        {#{<<"Meta">> => #{version => "1"}}, <<"{\"Meta\":{\"version\":\"1\"}}">>},
        {[{'Tags', [<<"a">>, b]}, {'Weights', [{'Passing', 10}]}],
            <<"{\"Tags\":[\"a\",\"b\"],\"Weights\":{\"Passing\":10}}">>},
        {#{"CheckID" => "x:{{id}}:{{ name }}"}, <<"{\"CheckID\":\"x:node1@my.host:node1@my.host\"}">>},
        %% Braces that close objects, and other people's templates, are left alone.
        {"{\"a\":{\"b\":{}},\"c\":\"{{ key \\\"k\\\" }}\"}", <<"{\"a\":{\"b\":{}},\"c\":\"{{ key \\\"k\\\" }}\"}">>},
        {[], undefined},
        {#{}, undefined}
    ],
    [
        begin
            set([{Key, Template}]),
            ?assertEqual({Template, Expected}, {Template, maps:get(Key, load())})
        end
     || {Template, Expected} <- Taken, Key <- [service_template, upstream_template]
    ],
    set([{service_template, #{"LocalServicePort" => "{{$port$}}"}}]),
    contains(failure(), ["service_template", "unknown placeholder {{$port$}}", "{{id}}, {{name}}, {{node}}"]),
    os:putenv("MESHX_SERVICE_TEMPLATE", "{\"a\":}"),
    contains(failure(), ["MESHX_SERVICE_TEMPLATE: not JSON: a value is missing at byte 6"]).

template_files(Config) ->
    File = filename:join(proplists:get_value(priv_dir, Config), "template ü.json"),
    ok = file:write_file(File, "{\"Tags\":[\"{{id}}\"]}\n"),
    [
        begin
            set([{service_template, Value}]),
            ?assertMatch(#{service_template := <<"{\"Tags\":[\"node1@my.host\"]}\n">>}, load())
        end
     || Value <- ["@" ++ File, unicode:characters_to_binary("@" ++ File), {file, File}]
    ],
    ok = file:write_file(File, "{"),
    contains(failure(), [File ++ ": not JSON: a key in double quotes is missing at byte 2"]),
    ok = file:write_file(File, <<"{\"a\":\"", 0:(8 * 1048576)>>),
    contains(failure(), ["larger than 1 MiB"]),
    ok = file:write_file(File, <<>>),
    contains(failure(), ["it ends too early"]),
    ok = file:delete(File),
    contains(failure(), [File ++ ": no such file or directory"]),
    set([{service_template, {file, proplists:get_value(priv_dir, Config)}}]),
    contains(failure(), ["illegal operation on a directory"]).

%%% The sidecar

sidecar_commands(Config) ->
    Bin = proplists:get_value(bin, Config),
    File = unicode:characters_to_binary(filename:join(Bin, "consul")),
    set([{service_name, dns}]),
    Filled = [File, <<"x {{">>, <<"node1@my.host:node1-at-my-host-da2a8f80aa:node1@my.host">>],
    [
        begin
            set([{service_name, dns}, {sidecar_command, Command}]),
            ?assertEqual(Filled, maps:get(sidecar_command, load()))
        end
     || Command <- [
            ["consul", "x {{", "{{id}}:{{name}}:{{node}}"],
            [<<"consul">>, <<"x {{">>, <<"{{id}}:{{name}}:{{node}}">>],
            [consul, "x {{", <<"{{id}}:{{name}}:{{node}}">>],
            "consul 'x {{' {{id}}:{{name}}:{{node}}",
            <<"[\"consul\", \"x {{\", \"{{id}}:{{name}}:{{node}}\"]">>
        ]
    ],
    [
        begin
            set([{sidecar_command, None}]),
            os:putenv("PATH", "/nowhere"),
            ?assertMatch(#{sidecar_command := none}, load())
        end
     || None <- [none, "none", <<"none">>]
    ],
    os:putenv("PATH", Bin),
    set([{sidecar_command, "consul {{port}}"}]),
    contains(failure(), ["sidecar_command: unknown placeholder {{port}}"]).

programs(Config) ->
    Directory = proplists:get_value(priv_dir, Config),
    Second = filename:join(Directory, "second"),
    program(Second, "envoy"),
    program(Second, "consul"),
    ok = file:write_file(filename:join(Second, "text"), "no program"),
    ok = filelib:ensure_dir(filename:join([Second, "folder", "x"])),
    Bin = proplists:get_value(bin, Config),
    os:putenv("PATH", Bin ++ "::" ++ Second),
    Find = fun(Command) ->
        set([{sidecar_command, [Command]}]),
        [File] = maps:get(sidecar_command, load()),
        unicode:characters_to_list(File)
    end,
    ?assertEqual(filename:join(Bin, "consul"), Find("consul")),
    ?assertEqual(filename:join(Second, "envoy"), Find("envoy")),
    ?assertEqual(filename:join(Second, "envoy"), Find(filename:join(Second, "envoy"))),
    {ok, Before} = file:get_cwd(),
    try
        ok = file:set_cwd(Directory),
        ?assertEqual(filename:join(Second, "envoy"), Find("second/envoy"))
    after
        file:set_cwd(Before)
    end,
    [
        begin
            set([{sidecar_command, [Missing]}]),
            contains(failure(), [Part, "set sidecar_command"])
        end
     || {Missing, Part} <- [
            {"nope", "program nope is not found in PATH "},
            {"text", "program text is not found"},
            {"folder", "program folder is not found"},
            {"/no/such", "/no/such is not an executable file"}
        ]
    ],
    %% The sidecar's own PATH counts.
    set([{sidecar_command, ["consul"]}, {sidecar_env, [{"PATH", Second}]}]),
    #{sidecar_command := [Own]} = load(),
    ?assertEqual(unicode:characters_to_binary(filename:join(Second, "consul")), Own).

words_as_a_shell(_) ->
    Texts = [
        "a b  c",
        " a\tb\n",
        "'a b' c",
        "\"a b\"c'd e'",
        "'' \"\" x",
        "a\\ b \\\"c \\'",
        "'a\\b' \"a\\b\" a\\b",
        "\"\\\"\\\\\\$\\`\\x\"",
        "-x='{{id}}' \"it's\"",
        "'a'\\''b'"
    ],
    [
        begin
            Script = "for word in " ++ string:trim(Text) ++ "; do printf '%s,' \"$word\"; done",
            Expected = os:cmd("sh -c " ++ quote(Script)),
            {ok, Words} = meshx_node_command:words(list_to_binary(Text)),
            ?assertEqual({Text, Expected}, {Text, lists:append([binary_to_list(Word) ++ "," || Word <- Words])})
        end
     || Text <- Texts
    ],
    [
        ?assertMatch({error, _}, meshx_node_command:words(Text))
     || Text <- [<<"'a">>, <<"\"a">>, <<"a\\">>, <<"\"a\\\"">>]
    ],
    [
        begin
            Words = [random_text() || _ <- lists:seq(1, rand:uniform(4))],
            Text = unicode:characters_to_binary(lists:join(" ", [quote(Word) || Word <- Words])),
            ?assertEqual({ok, [unicode:characters_to_binary(Word) || Word <- Words]}, meshx_node_command:words(Text))
        end
     || _ <- lists:seq(1, 200)
    ].

quote(Text) -> "'" ++ lists:append(string:replace(Text, "'", "'\\''", all)) ++ "'".

sidecar_environment(_) ->
    [os:unsetenv(Name) || {Name, _} <- os:env(), Name =/= "PATH"],
    Passed = [
        {"HOME", "/h"}, {"LANG", "C"}, {"LC_ALL", "C"}, {"TMPDIR", "/t"}, {"TZ", "UTC"},
        {"SSL_CERT_FILE", "/c"}, {"SSL_CERT_DIR", "/d"}, {"CONSUL_GRPC_ADDR", "x:1"}, {"CONSUL_HTTP_ADDR", "a"}
    ],
    Kept = [
        {"RELEASE_COOKIE", "c"}, {"HTTP_PROXY", "p"}, {"DATABASE_URL", "d"}, {"LD_PRELOAD", "l"},
        {"MESHX_TTL", "5000"}, {"LCX", "x"}
    ],
    [os:putenv(Name, Value) || {Name, Value} <- Passed ++ Kept],
    Path = {"PATH", os:getenv("PATH")},
    Text = fun(Pairs) -> lists:sort([unicode:characters_to_binary([N, "=", V]) || {N, V} <- Pairs]) end,
    ?assertEqual(Text([Path | Passed]), maps:get(sidecar_environment, load())),
    %% An application's value of lower rank changes nothing; sidecar_env wins over all.
    Extra = [{"A", "ü"}, {<<"LANG">>, 5}, {'TZ', false}, {"CONSUL_HTTP_ADDR", "b"}, {"B", ""}],
    Expected =
        Text([{"A", "ü"}, {"B", ""}, {"CONSUL_HTTP_ADDR", "b"}, {"LANG", "5"}] ++
            lists:foldl(fun(Name, Pairs) -> lists:keydelete(Name, 1, Pairs) end,
                [Path | Passed], ["LANG", "TZ", "CONSUL_HTTP_ADDR"])),
    [
        begin
            set([{consul_http_addr, "z"}, {sidecar_env, Variables}]),
            ?assertEqual(Expected, maps:get(sidecar_environment, load()))
        end
     || Variables <- [
            Extra,
            maps:from_list(Extra),
            <<"{\"A\":\"ü\",\"LANG\":5,\"TZ\":false,\"CONSUL_HTTP_ADDR\":\"b\",\"B\":\"\"}"/utf8>>
        ]
    ],
    set([]),
    os:putenv("MESHX_SIDECAR_ENV", "A=1 'B=2 3' C="),
    Some = maps:get(sidecar_environment, load()),
    [?assert(lists:member(Variable, Some)) || Variable <- [<<"A=1">>, <<"B=2 3">>, <<"C=">>]].

restarts_in_order(_) ->
    set([{sidecar_restart_min, 20000}]),
    contains(failure(), ["sidecar_restart_min", "20000", "above sidecar_restart_max, 10000"]),
    set([{sidecar_restart_max, 50}]),
    contains(failure(), ["sidecar_restart_max", "50", "below sidecar_restart_min, 100"]),
    set([{sidecar_restart_min, 50}, {sidecar_restart_max, 50}]),
    load().

%%% JSON

json_round_trip(_) ->
    [
        begin
            Term = random_json(4),
            {ok, Text} = meshx_node_json:encode(Term),
            ?assertEqual({Text, {ok, Term}}, {Text, meshx_node_json:decode(Text)})
        end
     || _ <- lists:seq(1, 500)
    ].

random_json(0) ->
    lists:nth(rand:uniform(6), [
        true, null, rand:uniform(1000) - 500, rand:normal() * 1.0e10, <<>>,
        unicode:characters_to_binary(random_text())
    ]);
random_json(Depth) ->
    Size = rand:uniform(4) - 1,
    case rand:uniform(3) of
        1 -> random_json(0);
        %% Numbers alone might spell a word.
        2 -> [<<"x">> | [random_json(Depth - 1) || _ <- lists:seq(1, Size)]];
        3 -> maps:from_list([{unicode:characters_to_binary(random_text()), random_json(Depth - 1)} || _ <- lists:seq(1, Size)])
    end.

random_text() ->
    [lists:nth(rand:uniform(14), "ab '\"\\/\n\t{}é日😀") || _ <- lists:seq(1, rand:uniform(9))].

json_of_terms(_) ->
    Terms = [
        {#{a => 1, <<"b">> => 2.5, "c" => nil}, <<"{\"a\":1,\"b\":2.5,\"c\":null}">>},
        {[{a, [{b, c}]}], <<"{\"a\":{\"b\":\"c\"}}">>},
        {[<<"x">>, "y", z, true], <<"[\"x\",\"y\",\"z\",true]">>},
        {"ü\n", <<"\"ü\\u000a\""/utf8>>},
        {[], <<"[]">>},
        {[[], #{}], <<"[[],{}]">>},
        {[300000000, 1], <<"[300000000,1]">>},
        {undefined, <<"null">>}
    ],
    [?assertEqual({ok, Text}, meshx_node_json:encode(Term)) || {Term, Text} <- Terms],
    Refused = [
        {{a}, "a tuple can't"}, {<<255>>, "UTF-8"}, {[1 | 2], "improper"}, {[{a, 1} | b], "improper"},
        {#{a => 1, "a" => 2}, "twice"}, {#{1 => 2}, "a key"}, {self(), "a pid"},
        {#{'__struct__' => 'Elixir.URI'}, "a struct"}
    ],
    [
        begin
            {error, Reason} = meshx_node_json:encode(Term),
            contains(unicode:characters_to_binary(Reason), [Part])
        end
     || {Term, Part} <- Refused
    ].

json_text(_) ->
    Texts = [
        {<<" [ 1 , -0.5 , 1e2, 1E+2 , 12.5e-1 ] ">>, [1, -0.5, 100.0, 100.0, 1.25]},
        {<<"{ \"a\" : { } , \"b\":[ ] }">>, #{<<"a">> => #{}, <<"b">> => []}},
        {<<"\"\\u00fc\\ud83d\\ude00\\/\\b\\f\\n\\r\\t\\\\\\\"\"">>, <<"ü😀/\b\f\n\r\t\\\""/utf8>>}
    ],
    [?assertEqual({ok, Term}, meshx_node_json:decode(Text)) || {Text, Term} <- Texts].

json_errors(_) ->
    Wrong = [
        {<<>>, "it ends too early at byte 1"},
        {<<"{\"a\":1,}">>, "a key in double quotes is missing at byte 8"},
        {<<"{\"a\" 1}">>, "':' is missing at byte 6"},
        {<<"{\"a\":1 \"b\":2}">>, "',' or '}' is missing at byte 8"},
        {<<"{\"a\":1,\"a\":2}">>, "the same key stands twice in an object at byte 8"},
        {<<"[1 2]">>, "',' or ']' is missing at byte 4"},
        {<<"[1,]">>, "a value is missing at byte 4"},
        {<<"01">>, "something follows the value at byte 2"},
        {<<"-">>, "a number is malformed at byte 1"},
        {<<"1e999">>, "a number is out of range at byte 1"},
        {<<"\"a">>, "a string doesn't end at byte 3"},
        {<<"\"\\x\"">>, "unknown escape at byte 2"},
        {<<"\"\\u12\"">>, "unknown escape at byte 2"},
        {<<"\"\\u12g4\"">>, "unknown escape at byte 2"},
        {<<"\"\\ud83d\"">>, "half a surrogate pair at byte 2"},
        {<<"\"\\ud83d\\u0041\"">>, "half a surrogate pair at byte 2"},
        {<<"\"\n\"">>, "an unescaped control character at byte 2"},
        {<<"\"", 255, "\"">>, "a character isn't UTF-8 at byte 2"},
        {<<"nul">>, "a value is missing at byte 1"}
    ],
    [
        begin
            {error, Reason} = meshx_node_json:decode(Text),
            contains(unicode:characters_to_binary(Reason), ["not JSON: " ++ Part])
        end
     || {Text, Part} <- Wrong
    ].

%%% The whole

%% Each row: a flag whose value is an Erlang term that is accepted, and the right variable.
table_has_all_keys(_) ->
    Rows = tl(tl(string:split(string:trim(unicode:characters_to_list(meshx_node_config:table())), "\n", all))),
    ?assertEqual(31, length(Rows)),
    Cells = [string:split(string:trim(Row, both, "| "), " | ", all) || Row <- Rows],
    [?assertMatch([_, _, _, _, _, _], Row) || Row <- Cells],
    %% As sh reads the examples; all at once.
    Examples = [string:trim(Flag, both, "`") || [_, Flag | _] <- Cells, string:find(Flag, "template") =:= nomatch],
    Words = string:split(string:trim(os:cmd("printf '%s\\n' " ++ lists:join(" ", Examples))), "\n", all),
    {ok, Loaded} = load_in_peer(Words, [], []),
    ?assertMatch(#{sidecar_command := none, sidecar_stderr := off, naming := dns}, Loaded).

%% net_sup starts before file_server, logger's supervisor and user.
at_boot(Config) ->
    Directory = proplists:get_value(priv_dir, Config),
    Source = filename:join(Directory, "boot_probe_dist.erl"),
    ok = file:write_file(Source,
        "-module(boot_probe_dist).\n"
        "-export([childspecs/0]).\n"
        "childspecs() ->\n"
        "    undefined = whereis(file_server_2),\n"
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

%%% Helpers

load() ->
    {ok, Loaded} = meshx_node_config:load(?NODE),
    Loaded.

failure() ->
    {error, {bad_configuration, Text}} = meshx_node_config:load(?NODE),
    ?assert(is_binary(Text)),
    Text.

set(Settings) ->
    [application:unset_env(meshx_node, Key) || {Key, _} <- application:get_all_env(meshx_node)],
    [application:set_env(meshx_node, Key, Value) || {Key, Value} <- Settings],
    ok.

contains(Text, Parts) ->
    [?assertMatch({Part, Text, [_ | _]}, {Part, Text, unicode:characters_to_list(found(Text, Part))}) || Part <- Parts].

found(Text, Part) ->
    case string:find(Text, Part) of
        nomatch -> "";
        Found -> Found
    end.

lacks(Text, Part) -> ?assertEqual({Part, Text, nomatch}, {Part, Text, string:find(Text, Part)}).

program(Directory, Name) ->
    File = filename:join(Directory, Name),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, "#!/bin/sh\n"),
    ok = file:change_mode(File, 8#755).

application_file(Ebin) ->
    File = filename:join(Ebin, "meshx_node.app"),
    ok = filelib:ensure_dir(File),
    Properties = [{vsn, "0"}, {modules, []}, {registered, []}, {applications, []}],
    ok = file:write_file(File, io_lib:format("~p.~n", [{application, meshx_node, Properties}])).

load_in_peer(Flags, Environment, Application) ->
    Ebin = filename:dirname(code:which(meshx_node_config)),
    Path = {"PATH", os:getenv("PATH")},
    {ok, Peer, _} = peer:start_link(#{
        connection => standard_io,
        args => ["-pa", Ebin | Flags],
        env => [Path | Environment],
        wait_boot => 30000
    }),
    [ok = peer:call(Peer, application, set_env, [meshx_node, Key, Value]) || {Key, Value} <- Application],
    Result = peer:call(Peer, meshx_node_config, load, [?NODE]),
    peer:stop(Peer),
    Result.
