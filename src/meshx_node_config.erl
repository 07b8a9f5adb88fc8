%% The configuration of a node service: found, checked, and put in the form the NIF wants.
%%
%% A key's value comes from the first of: command line flag (-meshx_node key value), OS
%% environment, application environment of meshx_node, default. keys/0 is the one table of
%% all keys; table/0 prints it for the README. Whatever is wrong is one error that names
%% where the value came from, the key, the value unless it may hold a secret, and what is
%% allowed.
%%
%% Called from net_sup's start, so at boot before file_server, logger and all applications.
%% No process.
-module(meshx_node_config).

-export([load/1, load_control_node/1, service_name/2, name_keys/2, open_files/1, redact/1, table/0]).
-export_type([config/0]).

-type milliseconds() :: non_neg_integer().
-type ports() :: {First :: 1..65535, Last :: 1..65535}.
-type level() :: logger:level() | off.
%% What meshx_node_nif:mesh_open/2 takes, but for listen_address and listen_port, which the
%% listener's owner adds, and a few keys that only the Erlang side reads. Texts are UTF-8.
-type config() :: #{
    node := binary(),
    service_id := binary(),
    service_name := binary(),
    %% How service_name/2 maps other nodes.
    naming := meshx_node_name:mapping(),
    service_template := binary() | undefined,
    upstream_template := binary() | undefined,
    %% [{<<"CONSUL_HTTP_ADDR">>, <<"127.0.0.1:8500">>}]: only what is set.
    consul := [{binary(), binary()}],
    %% How name_keys/2 shows the variables of consul.
    consul_names := #{binary() => binary()},
    sidecar_command := [binary(), ...] | none,
    sidecar_environment := [binary()],
    guard_path := binary(),
    sidecar_address := binary() | undefined,
    sidecar_ports := ports(),
    upstream_ports := ports(),
    intention_directions := both | dial,
    %% Read by the Erlang side only.
    upstreams := meshx_node_type:upstreams(),
    allowed_uids := meshx_node_type:uids(),
    sidecar_stdout := level(),
    sidecar_stderr := level(),
    sidecar_restart_min := milliseconds(),
    sidecar_restart_max := milliseconds(),
    ttl := milliseconds(),
    deregister_after := milliseconds(),
    start_timeout := milliseconds(),
    request_timeout := milliseconds(),
    stop_timeout := milliseconds(),
    upstream_keep := milliseconds(),
    force_registration := boolean(),
    control_node => true
}.

-type origin() ::
    {flag, binary()} | {environment, Name :: binary(), binary()} | {application, term()} | default.

-include_lib("kernel/include/file.hrl").

-define(DAY, 86400000).
-define(HIDDEN, <<"[hidden]">>).

%% {Key, Type, Default, an example as it is written in a flag, Meaning}. Values of all
%% sources, the defaults too, go through meshx_node_type.
-spec keys() ->
    [{atom(), meshx_node_type:type(), Default :: term(), Example :: string(), Meaning :: string()}].
keys() ->
    [
        {consul_http_addr, {consul, address}, undefined, "'\"https://consul.example:8501\"'",
            "The Consul agent: host:port, http://, https:// or unix:///path. A port left out is 8500, but "
            "80 or 443 after http:// or https://. Unset: 127.0.0.1:8500."},
        {consul_http_token, {consul, secret}, undefined, "'\"...\"'",
            "ACL token. Better a file or the environment: all users of the host see flags."},
        {consul_http_token_file, {consul, text}, undefined, "'\"/run/consul/token\"'",
            "File with the ACL token, read anew for every request. Wins over consul_http_token, "
            "unless that comes from a source of higher rank."},
        {consul_http_ssl, {consul, boolean}, undefined, "true",
            "HTTPS also if consul_http_addr has no scheme."},
        {consul_http_ssl_verify, {consul, boolean}, undefined, "false",
            "Whether the agent's certificate is checked. Unset: true."},
        {consul_cacert, {consul, text}, undefined, "'\"/etc/consul/ca.pem\"'",
            "CA certificate file for the agent's certificate."},
        {consul_capath, {consul, text}, undefined, "'\"/etc/consul/ca\"'",
            "Directory of CA certificates, as consul_cacert."},
        {consul_client_cert, {consul, text}, undefined, "'\"/etc/consul/cert.pem\"'",
            "Client certificate, where the agent asks for one."},
        {consul_client_key, {consul, text}, undefined, "'\"/etc/consul/key.pem\"'",
            "Its key."},
        {consul_tls_server_name, {consul, text}, undefined, "'\"server.dc1.consul\"'",
            "Name to expect in the agent's certificate."},
        {consul_http_auth, {consul, secret}, undefined, "'\"user:password\"'",
            "HTTP basic authentication, user:password."},
        {consul_namespace, {consul, text}, undefined, "'\"team\"'",
            "Namespace (Consul Enterprise)."},
        {consul_partition, {consul, text}, undefined, "'\"team\"'",
            "Admin partition (Consul Enterprise)."},
        {service_name, naming, node, "dns",
            "The service's Name: node = the node name; dns = a DNS label with a digest "
            "(node1-at-my-host-da2a8f80aa); {Module,Function}, \"Module:function\" or a fun = what "
            "the function returns for a node name (1 to 200 of a-z 0-9 @ . _ : -). "
            "Must be the same on all nodes."},
        {service_template, template, undefined, "'#{\"Tags\" => [\"blue\"]}'",
            "Merged into the service's registration; {{id}}, {{name}}, {{node}} are replaced."},
        {upstream_template, template, undefined, "'\"@/etc/meshx/upstream.json\"'",
            "Merged into every upstream of the sidecar; placeholders as above."},
        {sidecar_command, command, ["consul", "connect", "proxy", "-sidecar-for", "{{id}}"], "none",
            "Program and arguments, no shell; {{id}}, {{name}}, {{node}} are replaced. "
            "none: something else runs the sidecar."},
        {sidecar_env, variables, [], "'[{\"GODEBUG\",\"http2debug=1\"}]'",
            "Variables added to the sidecar's environment; false as value removes one. It gets "
            "nothing else but PATH, HOME, LANG, LC_*, TMPDIR, TZ, SSL_CERT_FILE, SSL_CERT_DIR and "
            "CONSUL_*."},
        {sidecar_address, address, undefined, "'\"10.0.0.5\"'",
            "Address the sidecar binds and peers dial. Unset: all, and the agent's address."},
        {sidecar_ports, ports, {22000, 23999}, "'{22000,23999}'",
            "Where the sidecar's public port is looked for."},
        {upstream_ports, ports, {24000, 29999}, "'{24000,29999}'",
            "Where local ports of upstreams are looked for: one for each node dialed."},
        {upstreams, upstreams, [], "'[{node2@myhost,\"127.0.0.1:24001\"}]'",
            "Nodes that are dialed at a static address, because something else decides how they are "
            "reached: the agent isn't asked, nothing is registered for them. All other nodes are "
            "dialed through the own sidecar."},
        {allowed_uids, uids, [], "1337",
            "Users of the operating system, besides the node's own, whose processes may connect to the "
            "node's listener: the sidecar's, if it runs as another one. any: no check; connections from "
            "elsewhere, a container with a network of its own too, have no user here and need it."},
        {intention_directions, directions, both, "dial",
            "Which intentions keep a link down, or cut it: both = one that denies either node to connect "
            "to the other, since a link carries both ways; dial = only that of the direction in which "
            "it is dialed."},
        {sidecar_stdout, level, notice, "debug",
            "Level at which lines of the sidecar's stdout are logged."},
        {sidecar_stderr, level, warning, "off", "The same for stderr."},
        {sidecar_restart_min, {milliseconds, 1, ?DAY}, 100, "100",
            "Pause before a sidecar that ended is started again; doubles each time."},
        {sidecar_restart_max, {milliseconds, 1, ?DAY}, 10000, "10000",
            "Longest such pause. There is no last restart."},
        {ttl, {milliseconds, 1000, ?DAY}, 15000, "15000",
            "TTL of both checks: a node that hangs is critical after this time."},
        {deregister_after, {milliseconds, 60000, 30 * ?DAY}, 60000, "60000",
            "A registration critical for this long is dropped by the agent, which itself allows "
            "no less than a minute."},
        {start_timeout, {milliseconds, 1000, ?DAY}, 30000, "30000",
            "Until the node service is ready, else the node's start fails."},
        {request_timeout, {milliseconds, 10000, ?DAY}, 15000, "15000",
            "One request to the agent. An agent whose cluster has no leader takes about 7 s to "
            "answer, hence the minimum."},
        {stop_timeout, {milliseconds, 1, ?DAY}, 2000, "2000",
            "From TERM to KILL of the sidecar."},
        {upstream_keep, {milliseconds, 1000, 30 * ?DAY}, 600000, "600000",
            "How long the sidecar keeps a way to a node that has left Consul's catalog and has no "
            "connection."},
        {force_registration, boolean, false, "true",
            "Register even if another live node holds the service ID."}
    ].

%% Options of MeshxNode and MeshxConsul 0.1 that someone may have left in the configuration.
former(<<"mesh_adapter">>) -> "an option of MeshxNode 0.1; Consul is built in now: remove it";
former(<<"service_params">>) -> "an option of MeshxNode 0.1; use service_name";
former(<<"service_reg">>) -> "an option of MeshxNode 0.1; use service_template and sidecar_command";
former(<<"upstream_params">>) -> "an option of MeshxNode 0.1; use service_name";
former(<<"upstream_reg">>) -> "an option of MeshxNode 0.1; use upstream_template";
former(<<"upstream_proxy">>) -> "an option of MeshxNode 0.1; the own sidecar is used: remove it";
former(<<"force_registration?">>) -> "an option of MeshxNode 0.1; use force_registration";
former(<<"timeout">>) -> "an option of MeshxNode 0.1; use start_timeout";
former(_) -> none.

%%% API

-spec load(node()) -> {ok, config()} | {error, {bad_configuration, unicode:chardata()}}.
load(Node) ->
    try_build(Node, fun command/3).

%% @doc Of a node without a service: its sidecar_command is the proxy's of which only the upstream
%% is missing. None is not an error before it is needed.
-spec load_control_node(node()) ->
    {ok, config()} | {error, {bad_configuration, unicode:chardata()}}.
load_control_node(Node) ->
    case try_build(Node, fun proxy_command/3) of
        {ok, Config} -> {ok, Config#{control_node => true}};
        Error -> Error
    end.

try_build(Node, Command) ->
    try
        {ok, build(Node, settings(), Command)}
    catch
        throw:{bad_configuration, Text} ->
            {error, {bad_configuration, unicode:characters_to_binary(Text)}}
    end.

%% @doc The Name of any node's service. Only a user's function can fail; then the error
%% {bad_configuration, Text} is raised.
-spec service_name(node(), config()) -> binary().
service_name(Node, #{naming := Naming}) ->
    case meshx_node_name:service_name(Node, Naming) of
        {ok, Name} ->
            Name;
        {error, Reason} ->
            Text = unicode:characters_to_binary(["service_name: ", Reason]),
            error({bad_configuration, Text})
    end.

%% @doc A text of the C side, which knows Consul's variables only, with the keys they are the
%% values of; and with the variable itself unless flag or application environment set the key.
-spec name_keys(binary(), config() | map()) -> binary().
name_keys(Text, #{consul_names := Names}) ->
    Parts = re:split(Text, "(CONSUL_[A-Z_]*[A-Z])(=?)"),
    iolist_to_binary(named_parts(Parts, Names)).

named_parts([Text, Variable, Equals | Rest], Names) ->
    Shown =
        case {Names, Equals} of
            {#{Variable := Name}, <<>>} -> Name;
            {#{Variable := Name}, <<"=">>} -> [Name, " = "];
            {#{}, _} -> [Variable, Equals]
        end,
    [Text, Shown | named_parts(Rest, Names)];
named_parts(Text, _) ->
    Text.

%% @doc A warning for each file with a secret in it that every user of the host can read. A group
%% may: that is how a host shares a token among its services.
-spec open_files(config()) -> [unicode:chardata()].
open_files(#{consul := Consul, consul_names := Names}) ->
    [
        [
            maps:get(Variable, Names), " = ", File, " can be read or changed by every user of this host: chmod o= ", File
        ]
     || Variable <- [<<"CONSUL_HTTP_TOKEN_FILE">>, <<"CONSUL_CLIENT_KEY">>],
        {_, File} <- [lists:keyfind(Variable, 1, Consul)],
        is_open(file:read_file_info(File, [raw]))
    ].

is_open({ok, #file_info{mode = Mode}}) -> Mode band 8#006 =/= 0;
is_open({error, _}) -> false.

%% @doc The same for people: nothing secret is left in it.
-spec redact(config()) -> config().
redact(#{consul := Consul, sidecar_environment := Environment} = Config) ->
    #{service_template := Service, upstream_template := Upstream, sidecar_command := Command} =
        Config,
    Config#{
        consul := [{Name, redact_variable(Name, Value)} || {Name, Value} <- Consul],
        sidecar_environment := [redact_assignment(Assignment) || Assignment <- Environment],
        sidecar_command := redact_command(Command),
        service_template := redact_template(Service),
        upstream_template := redact_template(Upstream)
    }.

%% @doc The table of all keys in Markdown, for the README.
-spec table() -> unicode:chardata().
table() ->
    Head =
        "| Key | As a flag | In the OS environment | Type | Default | Meaning |\n"
        "|---|---|---|---|---|---|\n",
    [Head | [row(Entry) || Entry <- keys()]].

row({Key, Type, Default, Example, Meaning}) ->
    Shown =
        case Default of
            undefined -> "unset";
            [] -> "empty";
            [First | _] when is_list(First) -> ["`", lists:join(" ", Default), "`"];
            _ -> io_lib:format("`~0p`", [Default])
        end,
    Cells = [
        ["`", atom_to_list(Key), "`"],
        ["`-meshx_node ", atom_to_list(Key), " ", Example, "`"],
        ["`", variable(Key, Type), "`"],
        meshx_node_type:describe(Type),
        Shown,
        Meaning
    ],
    Escaped = [string:replace(Cell, "|", "\\|", all) || Cell <- Cells],
    ["| ", lists:join(" | ", Escaped), " |\n"].

%%% Values of all keys, checked one by one: #{Key => {Origin, Value}}

settings() ->
    %% Before application:load/1, which fails with an unclear report on such flags.
    Flags = flags(),
    Application = application(),
    maps:from_list([{element(1, Entry), setting(Entry, Flags, Application)} || Entry <- keys()]).

setting({Key, Type, Default, _, Meaning}, Flags, Application) ->
    Origins = [
        fun() -> maps:get(Key, Flags, unset) end,
        fun() -> environment(variable(Key, Type)) end,
        fun() -> maps:get(Key, Application, unset) end
    ],
    case first(Origins, Default) of
        {Origin, undefined} -> {Origin, undefined};
        {Origin, Given} ->
            case meshx_node_type:check(Type, Given) of
                {ok, Value} -> {Origin, Value};
                error -> fail(Origin, Key, [must_be(Type), why(Type, Meaning)]);
                {error, Reason} -> fail(Origin, Key, Reason)
            end
    end.

must_be(Type) -> ["must be ", meshx_node_type:describe(Type)].

%% The reason for a limit stands in the meaning.
why({milliseconds, _, _}, Meaning) -> [". ", Meaning];
why(_, _) -> "".

first([Origin | Origins], Default) ->
    case Origin() of
        unset -> first(Origins, Default);
        Found -> Found
    end;
first([], Default) ->
    {default, Default}.

%% Every -meshx_node flag, with Erlang terms as values like all flags that bear an
%% application's name: the application controller parses them too, and one that isn't a
%% term makes it refuse to load the application, which would even end a release's boot.
flags() ->
    case init:get_argument(meshx_node) of
        {ok, Lists} -> lists:foldl(fun flag_pairs/2, #{}, Lists);
        error -> #{}
    end.

flag_pairs([Name, Text | Rest], Flags) ->
    Key = flag_key(Name),
    Value = flag_value(Key, Text),
    case Flags of
        #{Key := {_, Other}} when Other =/= Value ->
            fail("command line flag -meshx_node", Key, "is given twice, with different values");
        _ ->
            flag_pairs(Rest, Flags#{Key => {{flag, meshx_node_command:native(Text)}, Value}})
    end;
flag_pairs([Name], _) ->
    Key = flag_key(Name),
    fail("command line flag -meshx_node", Key, "a value is missing");
flag_pairs([], Flags) ->
    Flags.

flag_key(Name) ->
    case [Key || {Key, _, _, _, _} <- keys(), atom_to_list(Key) =:= Name] of
        [Key] -> Key;
        [] -> unknown("command line flag -meshx_node ", meshx_node_command:native(Name))
    end.

flag_value(Key, Text) ->
    Characters = unicode:characters_to_list(meshx_node_command:native(Text)),
    try
        {ok, Tokens, _} = erl_scan:string(Characters ++ "."),
        {ok, Term} = erl_parse:parse_term(Tokens),
        Term
    catch
        error:_ ->
            {Key, Type, _, Example, _} = lists:keyfind(Key, 1, keys()),
            Format =
                "is not an Erlang term, and a flag's value must be one (text in double quotes); "
                "in a shell for example: -meshx_node ~ts ~ts. The environment variable ~ts takes "
                "plain text",
            Reason = io_lib:format(Format, [Key, Example, variable(Key, Type)]),
            fail({flag, meshx_node_command:native(Text)}, Key, Reason)
    end.

variable(Key, {consul, _}) -> string:uppercase(atom_to_list(Key));
variable(Key, _) -> "MESHX_" ++ string:uppercase(atom_to_list(Key)).

%% An empty variable is an unset one, as for Consul's tools.
environment(Name) ->
    case os:getenv(Name, "") of
        "" ->
            unset;
        Text ->
            Value = meshx_node_command:native(Text),
            {{environment, list_to_binary(Name), Value}, Value}
    end.

application() ->
    _ = application:load(meshx_node),
    Known = [Key || {Key, _, _, _, _} <- keys()],
    maps:from_list([
        {Key, {{application, Value}, Value}}
     || {Key, Value} <- application:get_all_env(meshx_node),
        lists:member(Key, Known) orelse
            unknown("application environment of meshx_node, ", atom_to_binary(Key)),
        %% What System.get_env/1 returns in a runtime.exs.
        Value =/= nil andalso Value =/= undefined
    ]).

-spec unknown(string(), binary()) -> no_return().
unknown(Place, Name) ->
    Keys = [atom_to_binary(Key) || {Key, _, _, _, _} <- keys()],
    Hint =
        case former(Name) of
            none -> near(Name, Keys);
            Former -> Former
        end,
    throw({bad_configuration, [Place, Name, ": there is no such key; ", Hint]}).

near(Name, Keys) ->
    Scored = lists:reverse(lists:sort([{similarity(Name, Key), Key} || Key <- Keys])),
    case [Key || {Score, Key} <- Scored, Score > 0.5] of
        [] -> ["allowed are ", lists:join(", ", Keys)];
        Near -> ["did you mean ", lists:join(" or ", lists:sublist(Near, 3)), "?"]
    end.

%% Share of common pairs of neighbouring characters (Dice).
similarity(A, B) ->
    PairsA = pairs([$\s | string:lowercase(binary_to_list(A)) ++ " "]),
    PairsB = pairs([$\s | binary_to_list(B) ++ " "]),
    Common = length(PairsA) - length(PairsA -- PairsB),
    2 * Common / (length(PairsA) + length(PairsB)).

pairs([A | [B | _] = Rest]) -> [{A, B} | pairs(Rest)];
pairs(_) -> [].

%%% All together

build(Node, Settings, Command) ->
    Name = atom_to_binary(Node),
    Id = meshx_node_name:service_id(Node),
    Naming = value(service_name, Settings),
    Consul = consul(Settings),
    check_restarts(Settings),
    ServiceName = own_service_name(Node, Naming, Settings),
    Values = [{<<"id">>, Id}, {<<"name">>, ServiceName}, {<<"node">>, Name}],
    Removed = [{Variable, false} || {Variable, _} <- consul_variables(Settings)],
    Variables = value(sidecar_env, Settings),
    Environment = meshx_node_command:environment(Removed ++ Consul, Variables),
    Guard = meshx_node_command:absolute(filename:join(meshx_node_path:priv_dir(), "meshx_guard")),
    Computed = #{
        node => Name,
        service_id => Id,
        service_name => ServiceName,
        naming => Naming,
        consul => Consul,
        consul_names => consul_names(Settings),
        service_template => template(service_template, Settings, Values),
        upstream_template => template(upstream_template, Settings, Values),
        sidecar_command => Command(Settings, Values, Environment),
        sidecar_environment => Environment,
        guard_path => unicode:characters_to_binary(Guard)
    },
    Hidden = [sidecar_env | [Key || {Key, {consul, _}, _, _, _} <- keys()]],
    Plain = maps:map(fun(_, {_, Value}) -> Value end, maps:without(Hidden, Settings)),
    maps:merge(Plain, Computed).

value(Key, Settings) ->
    {_, Value} = maps:get(Key, Settings),
    Value.

%% Only what is set. A token given by a flag must not lose against a token file of the
%% environment, so the file is dropped then, for the sidecar too.
consul(Settings) ->
    #{consul_http_token := {TokenOrigin, _}, consul_http_token_file := {FileOrigin, _}} = Settings,
    Dropped = [<<"CONSUL_HTTP_TOKEN_FILE">> || rank(TokenOrigin) > rank(FileOrigin)],
    [
        {Variable, Value}
     || {Variable, Value} <- consul_variables(Settings),
        Value =/= undefined,
        Value =/= <<>>,
        not lists:member(Variable, Dropped)
    ].

consul_variables(Settings) ->
    [
        {list_to_binary(variable(Key, Type)), value(Key, Settings)}
     || {Key, {consul, _} = Type, _, _, _} <- keys()
    ].

consul_names(Settings) ->
    maps:from_list([
        begin
            Variable = list_to_binary(variable(Key, Type)),
            {Origin, _} = maps:get(Key, Settings),
            {Variable, consul_name(Origin, atom_to_binary(Key), Variable)}
        end
     || {Key, {consul, _} = Type, _, _, _} <- keys()
    ]).

consul_name({flag, _}, Key, _) -> Key;
consul_name({application, _}, Key, _) -> Key;
consul_name(_, Key, Variable) -> <<Key/binary, " (", Variable/binary, ")">>.

rank({flag, _}) -> 3;
rank({environment, _, _}) -> 2;
rank({application, _}) -> 1;
rank(default) -> 0.

check_restarts(Settings) ->
    #{sidecar_restart_min := {MinOrigin, Min}, sidecar_restart_max := {MaxOrigin, Max}} = Settings,
    case {Min =< Max, rank(MinOrigin) > rank(MaxOrigin)} of
        {true, _} ->
            ok;
        {false, true} ->
            Reason = io_lib:format("is above sidecar_restart_max, ~b", [Max]),
            fail(MinOrigin, sidecar_restart_min, Reason);
        {false, false} ->
            Reason = io_lib:format("is below sidecar_restart_min, ~b", [Min]),
            fail(MaxOrigin, sidecar_restart_max, Reason)
    end.

own_service_name(Node, Naming, Settings) ->
    {Origin, _} = maps:get(service_name, Settings),
    case meshx_node_name:service_name(Node, Naming) of
        {ok, Name} ->
            case meshx_node_name:check_own(Name, Naming) of
                ok -> Name;
                {error, Reason} -> fail(Origin, service_name, Reason)
            end;
        {error, Reason} ->
            fail(Origin, service_name, Reason)
    end.

%% The values stand within JSON strings, so they are written as such.
template(Key, Settings, Values) ->
    case maps:get(Key, Settings) of
        {_, undefined} ->
            undefined;
        {Origin, Template} ->
            Escaped = [{Name, escape(Value)} || {Name, Value} <- Values],
            case meshx_node_command:fill(Template, Escaped) of
                {ok, Text} -> Text;
                {error, Reason} -> fail(Origin, Key, Reason)
            end
    end.

escape(Value) ->
    {ok, Quoted} = meshx_node_json:encode(Value),
    binary:part(Quoted, 1, byte_size(Quoted) - 2).

command(Settings, Values, Environment) ->
    case maps:get(sidecar_command, Settings) of
        {_, none} ->
            none;
        {Origin, Words} ->
            Filled = [fill(Origin, Word, Values) || Word <- Words],
            case meshx_node_command:find_program(hd(Filled), path(Environment)) of
                {ok, File} ->
                    [File | tl(Filled)];
                {error, Reason} ->
                    Remedy = "; install it, or set sidecar_command, to none if something else runs the sidecar",
                    fail(Origin, sidecar_command, [Reason, Remedy])
            end
    end.

%% The consul of the user's command, if it has one.
proxy_command(Settings, Values, Environment) ->
    Program =
        case value(sidecar_command, Settings) of
            [Word, <<"connect">> | _] -> Word;
            _ -> <<"consul">>
        end,
    {_, ServiceName} = lists:keyfind(<<"name">>, 1, Values),
    case meshx_node_command:find_program(Program, path(Environment)) of
        {ok, File} ->
            [File, <<"connect">>, <<"proxy">>, <<"-service">>, ServiceName, <<"-upstream">>];
        {error, _} ->
            none
    end.

fill(Origin, Word, Values) ->
    case meshx_node_command:fill(Word, Values) of
        {ok, Text} -> Text;
        {error, Reason} -> fail(Origin, sidecar_command, Reason)
    end.

path([<<"PATH=", Path/binary>> | _]) -> Path;
path([_ | Environment]) -> path(Environment);
path([]) -> <<"/usr/local/bin:/usr/bin:/bin">>.

%%% Errors

-spec fail(origin() | string(), atom(), unicode:chardata()) -> no_return().
fail(Origin, Key, Reason) ->
    throw({bad_configuration, [place(Origin, Key), ": ", Reason]}).

place({flag, Text}, Key) ->
    io_lib:format("command line flag -meshx_node ~ts~ts", [Key, shown(Key, " ", Text)]);
place({environment, Name, Text}, Key) ->
    ["environment variable ", Name, shown(Key, "=", Text)];
place({application, Value}, Key) ->
    io_lib:format("application environment of meshx_node, ~ts~ts", [
        Key, shown(Key, " = ", io_lib:format("~0tP", [Value, 20]))
    ]);
place(default, Key) ->
    io_lib:format("default of ~ts", [Key]);
place(Place, Key) ->
    [Place, " ", atom_to_binary(Key)].

shown(Key, Between, Value) ->
    {Key, Type, _, _, _} = lists:keyfind(Key, 1, keys()),
    case meshx_node_type:may_hold_secret(Type) of
        true -> "";
        false -> [Between, printable(Value)]
    end.

printable(Text) ->
    case unicode:characters_to_list(Text) of
        Characters when is_list(Characters) -> string:slice(Characters, 0, 200);
        _ -> io_lib:format("~0tP", [Text, 20])
    end.

%% A user and password may stand before the host of an address.
redact_variable(<<"CONSUL_HTTP_ADDR">>, Value) ->
    re:replace(Value, "^([a-z]+://)?.*@", ["\\1", ?HIDDEN, "@"], [{return, binary}]);
redact_variable(Name, Value) ->
    Shown = [
        variable(Key, Type)
     || {Key, {consul, Kind} = Type, _, _, _} <- keys(), Kind =/= secret
    ],
    Text = binary_to_list(Name),
    case meshx_node_command:is_harmless(Text) orelse lists:member(Text, Shown) of
        true -> Value;
        false -> ?HIDDEN
    end.

redact_assignment(Assignment) ->
    [Name, Value] = binary:split(Assignment, <<"=">>),
    <<Name/binary, $=, (redact_variable(Name, Value))/binary>>.

%% Consul's and Envoy's flags for secrets, as "-token=x" and "-token x".
redact_command([Flag, Value | Rest]) ->
    case re:run(Flag, "^--?(token|http-auth|password|secret)(=|$)", [{capture, [2], list}]) of
        {match, [""]} -> [Flag, ?HIDDEN | redact_command(Rest)];
        {match, ["="]} -> [hide_after_equals(Flag) | redact_command([Value | Rest])];
        nomatch -> [Flag | redact_command([Value | Rest])]
    end;
redact_command([Flag]) ->
    case re:run(Flag, "^--?(token|http-auth|password|secret)=") of
        {match, _} -> [hide_after_equals(Flag)];
        nomatch -> [Flag]
    end;
redact_command(NoneOrEnd) ->
    NoneOrEnd.

hide_after_equals(Flag) ->
    [Name, _] = binary:split(Flag, <<"=">>),
    <<Name/binary, $=, ?HIDDEN/binary>>.

redact_template(undefined) -> undefined;
redact_template(Text) -> iolist_to_binary(io_lib:format("[hidden, ~b bytes]", [byte_size(Text)])).
