%% What configuration makes for Consul and the sidecar: service names, templates, the sidecar's
%% command and environment, and the JSON that some of it is written in. No agent needed.
-module(meshx_node_config_texts_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(meshx_ct_config, [contains/2, failure/0, load/0, program/2, quote/1, set/1]).

-define(NODE, 'node1@my.host').

all() ->
    [
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
        agent_address_for_the_sidecar,
        json_round_trip,
        json_of_terms,
        json_text,
        json_errors
    ].

init_per_suite(Config) -> meshx_ct_config:init_suite(Config).
end_per_suite(Config) -> meshx_ct_config:end_suite(Config).
init_per_testcase(_, Config) -> meshx_ct_config:init_case(Config).
end_per_testcase(_, Config) -> meshx_ct_config:end_case(Config).

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
        {{?MODULE, nothing}, "there is no meshx_node_config_texts_SUITE:nothing/1"},
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

sidecar_environment(_) ->
    [os:unsetenv(Name) || {Name, _} <- os:env(), Name =/= "PATH"],
    Passed = [
        {"HOME", "/h"}, {"LANG", "C"}, {"LC_ALL", "C"}, {"TMPDIR", "/t"}, {"TZ", "UTC"},
        {"SSL_CERT_FILE", "/c"}, {"SSL_CERT_DIR", "/d"}, {"CONSUL_GRPC_ADDR", "x:1"}, {"CONSUL_HTTP_ADDR", "a:1"}
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

agent_address_for_the_sidecar(_) ->
    [
        begin
            set([{consul_http_addr, Address}]),
            ?assert(lists:member(<<"CONSUL_HTTP_ADDR=", Given/binary>>, maps:get(sidecar_environment, load())))
        end
     || {Address, Given} <- [
            {"consul.example", <<"consul.example:8500">>},
            {"10.0.0.1/", <<"10.0.0.1:8500">>},
            {"[::1]", <<"[::1]:8500">>},
            {"[::1]:8501/", <<"[::1]:8501">>},
            {":8501", <<":8501">>},
            {"localhost:8501//", <<"localhost:8501">>},
            {"10.0.0.1:8501/behind/", <<"http://10.0.0.1:8501/behind">>},
            {"[::1]/behind", <<"http://[::1]:8500/behind">>},
            {"http://consul.example/", <<"http://consul.example">>},
            {"https://consul.example:8501/behind/", <<"https://consul.example:8501/behind">>},
            {"unix:///run/consul.sock", <<"unix:///run/consul.sock">>}
        ]
    ].

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
