%% Agents that want to be spoken to over TLS, with client certificates, by a Unix socket or with a
%% token: rightly configured, nodes start and connect; wrongly, a start fails with one error that
%% names the culprit, the key and what to do. meshx_node_acl_SUITE has the tokens' rights.
%%
%% OpenSSL makes the certificates, new for each run.
-module(meshx_node_agent_access_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

all() ->
    [
        https,
        https_of_the_configuration,
        https_unverified,
        wrong_ca,
        no_ca,
        ca_that_is_none,
        wrong_server_name,
        server_name,
        expired_agent_certificate,
        plain_port,
        client_certificate,
        no_client_certificate,
        client_certificate_of_another_ca,
        expired_client_certificate,
        key_of_another_certificate,
        missing_files,
        unix_socket,
        no_unix_socket,
        open_files_are_warned_about,
        halt_during_requests,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Directory = filename:join(proplists:get_value(priv_dir, Config), "certificates"),
    certificates(Directory),
    Config1 = meshx_ct:init_suite(Config),
    Agents = [
        {https, tls_agent(Config1, Directory, "agent", "")},
        {clients, tls_agent(Config1, Directory, "agent", "verify_incoming_https = true verify_incoming_rpc = false")},
        {expired, tls_agent(Config1, Directory, "expired", "")}
    ],
    [{certificates, Directory} | Agents] ++ Config1.

end_per_suite(Config) -> meshx_ct:end_suite(Config).
end_per_testcase(_, Config) -> meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%%% Certificates and agents

%% ca signs agent (for 127.0.0.1 and server.dc1.consul), client, and the two that have expired;
%% other is another authority, stranger what it has signed.
certificates(Directory) ->
    ok = filelib:ensure_path(Directory),
    [authority(Directory, Name) || Name <- ["ca", "other"]],
    Names = "DNS:server.dc1.consul,DNS:localhost,IP:127.0.0.1",
    [
        certificate(Directory, Name, Ca, Names, Days)
     || {Name, Ca, Days} <- [
            {"agent", "ca", 1},
            {"client", "ca", 1},
            {"expired", "ca", -1},
            {"stranger", "other", 1}
        ]
    ],
    ok.

authority(Directory, Name) ->
    openssl(Directory, [
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj '/CN=", Name,
        "' -keyout ", Name, ".key -out ", Name, ".pem"
    ]).

%% A negative number of days is refused by newer versions of x509 -days: dates are given.
certificate(Directory, Name, Ca, Names, Days) ->
    openssl(Directory, [
        "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj '/CN=", Name, "' -keyout ", Name,
        ".key -out ", Name, ".csr"
    ]),
    Database = filename:join(Directory, Name ++ ".ca"),
    ok = filelib:ensure_path(Database),
    ok = file:write_file(filename:join(Database, "index"), ""),
    ok = file:write_file(filename:join(Database, "config"), [
        ["[ca]\ndefault_ca = ca\n[ca]\ndatabase = ", Database, "/index\nnew_certs_dir = ", Database, "\n"],
        "rand_serial = yes\ndefault_md = sha256\npolicy = any\n[any]\ncommonName = supplied\n",
        ["[extensions]\nsubjectAltName = ", Names, "\nextendedKeyUsage = serverAuth, clientAuth\n"]
    ]),
    openssl(Directory, [
        "ca -batch -notext -config ", Database, "/config -extensions extensions -cert ", Ca, ".pem -keyfile ", Ca,
        ".key -startdate ", date(min(Days, 0) - 1), " -enddate ", date(Days), " -in ", Name, ".csr -out ", Name, ".pem"
    ]).

date(Days) ->
    {{Year, Month, Day}, {Hour, Minute, Second}} =
        calendar:system_time_to_universal_time(erlang:system_time(second) + Days * 86400, second),
    io_lib:format("~4..0b~2..0b~2..0b~2..0b~2..0b~2..0bZ", [Year, Month, Day, Hour, Minute, Second]).

openssl(Directory, Arguments) ->
    Command = unicode:characters_to_list(["cd '", Directory, "' && openssl ", Arguments, " 2>&1 || echo FAILED"]),
    Output = os:cmd(Command),
    ?assertEqual({Output, nomatch}, {Output, string:find(Output, "FAILED")}).

%% One that also has the plain port, which the suite itself and the sidecars use; secure is where it
%% is reached by TLS.
tls_agent(Config, Directory, Certificate, More) ->
    Port = meshx_ct_agent:free_port(),
    File = fun(Name) -> filename:join(Directory, Name) end,
    Text = io_lib:format(
        "ports { https = ~b } addresses { https = \"127.0.0.1\" } ca_file = ~p cert_file = ~p key_file = ~p ~s",
        [Port, File("ca.pem"), File(Certificate ++ ".pem"), File(Certificate ++ ".key"), More]
    ),
    Agent = meshx_ct:add_agent(Config, #{config => lists:flatten(Text)}),
    Agent#{secure => lists:concat(["127.0.0.1:", Port])}.

%%% What the cases share

file(Config, Name) ->
    filename:join(proplists:get_value(certificates, Config), Name).

%% Options of a VM that speaks TLS to an agent, with further variables.
options(Config, Which, More) ->
    #{secure := Address} = Agent = proplists:get_value(Which, Config),
    #{agent => Agent, env => [{"CONSUL_HTTP_ADDR", "https://" ++ Address} | More]}.

ca(Config) -> {"CONSUL_CACERT", file(Config, "ca.pem")}.

client(Config, Name) ->
    [
        ca(Config),
        {"CONSUL_CLIENT_CERT", file(Config, Name ++ ".pem")},
        {"CONSUL_CLIENT_KEY", file(Config, Name ++ ".key")}
    ].

%% Two nodes start, are healthy and connect: carrier and sidecars have what they need.
works(Config, Options) ->
    [One, Two] = meshx_ct:start_all(Config, [one, two], Options#{scope => 'case'}),
    ?assert(meshx_ct:connect(One, Two)),
    {ok, #{agent := Address, request_failures := 0}} = meshx_ct:call(One, meshx_node, info, []),
    Address.

%% One error, at once; nothing is left.
refused(Config, Options, Pattern) ->
    Vm = meshx_ct:vm(Config, Options),
    refused_vm(Vm, Pattern),
    Vm.

refused_vm(Vm, Pattern) ->
    Mark = meshx_ct:mark(Vm),
    {error, _} = meshx_ct:net_start(Vm, refused, []),
    meshx_ct:wait("the line", fun() -> meshx_ct:own_lines(Vm, Mark) =/= [] end),
    [Line] = meshx_ct:own_lines(Vm, Mark),
    Whole = ["^error: meshx_node: node refused@.* does not start: .*", Pattern],
    ?assertEqual({Line, match}, {Line, re:run(Line, Whole, [unicode, {capture, none}])}),
    meshx_ct:wait("the end of guard and sidecar", fun() -> meshx_ct:watch(Vm) =:= [] end, 2000),
    ?assertEqual(none, meshx_ct:service(Vm#{node := meshx_ct:node_name(refused)})).

%%% The agent's certificate

https(Config) ->
    ?assertMatch(<<"https://", _/binary>>, works(Config, options(Config, https, [ca(Config)]))).

%% Where the value came from is where the error points: no variable is set.
https_of_the_configuration(Config) ->
    #{secure := Address} = Agent = proplists:get_value(https, Config),
    Flags = fun(Ca) ->
        Text = fun(Value) -> lists:flatten(io_lib:format("~p", [Value])) end,
        ["-meshx_node", "consul_http_addr", Text("https://" ++ Address), "consul_cacert", Text(file(Config, Ca))]
    end,
    Options = #{agent => Agent, env => [{"CONSUL_HTTP_ADDR", false}]},
    works(Config, Options#{args => Flags("ca.pem")}),
    refused(Config, Options#{args => Flags("other.pem")}, "TLS failed: .*; consul_cacert or .* must be the authority"),
    refused(Config, Options#{args => Flags("none.pem")}, "consul_cacert = .*none.pem: can't be read: No such file").

https_unverified(Config) ->
    works(Config, options(Config, https, [{"CONSUL_HTTP_SSL_VERIFY", "false"}])).

wrong_ca(Config) ->
    Other = {"CONSUL_CACERT", file(Config, "other.pem")},
    Remedy = "consul_cacert \\(CONSUL_CACERT\\) or .* must be the authority",
    Vm = refused(Config, options(Config, https, [Other]), tls(Config, https, Remedy)),
    meshx_ct:call(Vm, os, putenv, tuple_to_list(ca(Config))),
    ?assertNotEqual(none, meshx_ct:service(meshx_ct:net_start(Vm, refused))).

no_ca(Config) ->
    refused(Config, options(Config, https, []), tls(Config, https, "\\(CONSUL_CACERT\\) or .* must be the authority")).

ca_that_is_none(Config) ->
    None = {"CONSUL_CACERT", file(Config, "ca.key")},
    Remedy = "\\(CONSUL_CACERT\\) or .* must hold PEM certificates",
    refused(Config, options(Config, https, [None]), tls(Config, https, Remedy)).

wrong_server_name(Config) ->
    Name = {"CONSUL_TLS_SERVER_NAME", "server.dc2.consul"},
    Remedy = "server.dc2.consul.*; consul_tls_server_name \\(CONSUL_TLS_SERVER_NAME\\) must be",
    refused(Config, options(Config, https, [ca(Config), Name]), tls(Config, https, Remedy)).

server_name(Config) ->
    works(Config, options(Config, https, [ca(Config), {"CONSUL_TLS_SERVER_NAME", "server.dc1.consul"}])).

expired_agent_certificate(Config) ->
    refused(Config, options(Config, expired, [ca(Config)]), tls(Config, expired, "expired.*; the agent needs a certificate that is valid")).

%% TLS spoken to a port that does not, and the other way round.
plain_port(Config) ->
    #{secure := Secure} = Agent = proplists:get_value(https, Config),
    Plain = #{agent => Agent, env => [{"CONSUL_HTTP_ADDR", "https://" ++ meshx_ct_agent:url(Agent)}, ca(Config)]},
    refused(Config, Plain, "TLS failed: .*is consul_http_addr \\(CONSUL_HTTP_ADDR\\) the agent's HTTPS port"),
    refused(Config, #{agent => Agent, env => [{"CONSUL_HTTP_ADDR", Secure}]}, "HTTP request to an HTTPS server").

tls(Config, Which, Pattern) ->
    #{secure := Address} = proplists:get_value(Which, Config),
    ["Consul agent at https://", Address, ": TLS failed: .*", Pattern].

%%% The node's certificate

client_certificate(Config) ->
    works(Config, options(Config, clients, client(Config, "client"))).

no_client_certificate(Config) ->
    refused(Config, options(Config, clients, [ca(Config)]), "CONSUL_CLIENT_CERT").

client_certificate_of_another_ca(Config) ->
    refused(Config, options(Config, clients, client(Config, "stranger")), "CONSUL_CLIENT_CERT").

expired_client_certificate(Config) ->
    refused(Config, options(Config, clients, client(Config, "expired")), "CONSUL_CLIENT_CERT").

key_of_another_certificate(Config) ->
    Key = {"CONSUL_CLIENT_KEY", file(Config, "stranger.key")},
    Variables = lists:keystore("CONSUL_CLIENT_KEY", 1, client(Config, "client"), Key),
    Remedy = "consul_client_key \\(CONSUL_CLIENT_KEY\\) must be a certificate and its key",
    refused(Config, options(Config, clients, Variables), tls(Config, clients, Remedy)).

missing_files(Config) ->
    [
        refused(
            Config,
            options(Config, https, [{Variable, file(Config, "nothing")} | Others]),
            [string:lowercase(Variable), " \\(", Variable, "\\) = .*/nothing: can't be read: No such file"]
        )
     || {Variable, Others} <- [
            {"CONSUL_CACERT", []},
            {"CONSUL_CAPATH", []},
            {"CONSUL_HTTP_TOKEN_FILE", [ca(Config)]},
            {"CONSUL_CLIENT_CERT", [ca(Config), {"CONSUL_CLIENT_KEY", file(Config, "client.key")}]},
            {"CONSUL_CLIENT_KEY", [ca(Config), {"CONSUL_CLIENT_CERT", file(Config, "client.pem")}]}
        ]
    ].

%%% A Unix socket

unix_socket(Config) ->
    {Agent, Address} = socket_agent(Config),
    ?assertEqual(list_to_binary(Address), works(Config, #{agent => Agent, env => [{"CONSUL_HTTP_ADDR", Address}]})).

no_unix_socket(Config) ->
    {Agent, Address} = socket_agent(Config),
    Vm = refused(Config, #{agent => Agent, env => [{"CONSUL_HTTP_ADDR", Address ++ "2"}]}, [
        Address, "2 can't be reached: No such file.*consul_http_addr \\(CONSUL_HTTP_ADDR\\) says where it is"
    ]),
    meshx_ct:call(Vm, os, putenv, ["CONSUL_HTTP_ADDR", Address]),
    ?assertNotEqual(none, meshx_ct:service(meshx_ct:net_start(Vm, refused))).

%% A socket's path has room for 107 bytes, priv_dir for more.
socket_agent(Config) ->
    Directory = filename:dirname(maps:get(directory, proplists:get_value(agent, Config))),
    Path = filename:join(Directory, lists:concat(["http", erlang:unique_integer([positive])])),
    Both = "addresses { http = \"127.0.0.1 unix://" ++ Path ++ "\" } unix_sockets { mode = \"0600\" }",
    {meshx_ct:add_agent(Config, #{config => Both}), "unix://" ++ Path}.

%%% Files

%% One line for each file that every user can read, at each start.
open_files_are_warned_about(Config) ->
    Token = file(Config, "token"),
    ok = file:write_file(Token, "00000000-0000-0000-0000-000000000002"),
    Key = file(Config, "client.key"),
    Options = options(Config, clients, [{"CONSUL_HTTP_TOKEN_FILE", Token} | client(Config, "client")]),
    [file:change_mode(File, 8#640) || File <- [Token, Key]],
    Quiet = meshx_ct:start(Config, quiet, Options),
    ?assertEqual([], meshx_ct:own_lines(Quiet, 0)),
    meshx_ct:stop(Quiet),
    [file:change_mode(File, 8#644) || File <- [Token, Key]],
    Warned = meshx_ct:start(Config, warned, Options),
    [file:change_mode(File, 8#600) || File <- [Token, Key]],
    meshx_ct:wait("the warnings", fun() -> length(meshx_ct:own_lines(Warned, 0)) >= 2 end),
    [First, Second] = lists:sort(meshx_ct:own_lines(Warned, 0)),
    [
        ?assertMatch(
            {match, _},
            re:run(Line, ["^warning: .*", Key1, " = ", File, " can be read or changed by every user .*chmod o= ", File])
        )
     || {Line, Key1, File} <- [
            {First, "consul_client_key \\(CONSUL_CLIENT_KEY\\)", Key},
            {Second, "consul_http_token_file \\(CONSUL_HTTP_TOKEN_FILE\\)", Token}
        ]
    ].

%%% Ends

%% OpenSSL cleans up when the process exits; the control thread may be within it then.
halt_during_requests(Config) ->
    #{env := Env} = Options = options(Config, https, [ca(Config)]),
    Vm = fun(Number) ->
        Eval = "spawn(fun F() -> meshx_node:explain('nobody@nowhere'), F() end), timer:sleep(" ++
            integer_to_list(Number * 5) ++ "), erlang:halt(7).",
        meshx_ct:erl(Config, ["-sname", "halted", "-eval", Eval], Options#{
            env := [{"MESHX_SIDECAR_COMMAND", "none"}, {"MESHX_FORCE_REGISTRATION", "true"} | Env]
        })
    end,
    [?assertMatch({Number, {7, _}}, {Number, Vm(Number)}) || Number <- lists:seq(1, 6)],
    Agent = proplists:get_value(https, Config),
    Id = atom_to_binary(meshx_ct:node_name(halted)),
    {200, _} = meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", uri_string:quote(Id)], <<>>).
