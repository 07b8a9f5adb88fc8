%% An agent that denies by default: without a token nothing works and the refusal is named, with
%% the README's smallest policy everything does.
-module(meshx_node_acl_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(MASTER, "11111111-2222-3333-4444-555555555555").

all() ->
    [
        no_token,
        no_token_at_boot,
        unknown_token,
        smallest_policy,
        token_from_a_file,
        token_that_is_replaced,
        token_never_shows,
        token_in_no_crash_dump,
        nobody_is_allowed_without_an_intention,
        without_the_right_to_read_intentions,
        nothing_is_left
    ].

init_per_suite(Config) ->
    Acl = "acl { enabled = true default_policy = \"deny\" tokens { master = \"" ?MASTER "\" } }",
    Config1 = meshx_ct:init_suite(Config, #{config => Acl, token => ?MASTER}),
    Agent = proplists:get_value(agent, Config1),
    meshx_ct:wait("the token to work", fun() ->
        element(1, meshx_ct_agent:request(Agent, "GET", "/v1/acl/tokens", <<>>)) =:= 200
    end),
    Config1.

end_per_suite(Config) -> meshx_ct:end_suite(Config).

end_per_testcase(_, Config) ->
    meshx_ct_agent:delete_intentions(proplists:get_value(agent, Config)),
    meshx_ct:end_case(Config).

nothing_is_left(Config) -> meshx_ct:nothing_is_left(Config).

%% A token with the rights a node needs and no other.
token(Config, Name) ->
    element(2, token_with_id(Config, Name)).

token_with_id(Config, Name) ->
    Agent = proplists:get_value(agent, Config),
    Node = atom_to_binary(meshx_ct:node_name(Name)),
    Rules = [
        ["service \"", Node, "\" { policy = \"write\" }\n"],
        ["service \"", Node, "-sidecar-proxy\" { policy = \"write\" }\n"],
        "service_prefix \"\" { policy = \"read\" }\n"
        "node_prefix \"\" { policy = \"read\" }\n"
    ],
    token_of(Agent, Rules).

token_of(Agent, Rules) ->
    Policy = <<"policy-", (integer_to_binary(erlang:unique_integer([positive])))/binary>>,
    meshx_ct_agent:put(Agent, "/v1/acl/policy", #{<<"Name">> => Policy, <<"Rules">> => iolist_to_binary(Rules)}),
    {ok, #{<<"SecretID">> := Secret, <<"AccessorID">> := Accessor}} = meshx_node_json:decode(
        meshx_ct_agent:put(Agent, "/v1/acl/token", #{<<"Policies">> => [#{<<"Name">> => Policy}]})
    ),
    {Accessor, binary_to_list(Secret)}.

with_token(Config, Name) ->
    meshx_ct:start(Config, Name, #{env => [{"CONSUL_HTTP_TOKEN", token(Config, Name)}]}).

%% A link carries both ways.
allow(Config, One, Two) ->
    allow_one_way(Config, One, Two),
    allow_one_way(Config, Two, One).

allow_one_way(Config, #{node := From}, #{node := To}) ->
    meshx_ct_agent:allow(proplists:get_value(agent, Config), atom_to_binary(From), atom_to_binary(To)).

refused(Vm, Pattern) ->
    Mark = meshx_ct:mark(Vm),
    {error, _} = meshx_ct:net_start(Vm, refused, []),
    ?assert(meshx_ct:has_line(Vm, Mark, ["^error: meshx_node: node refused@.* does not start: .*", Pattern])),
    meshx_ct:wait("the end of guard and sidecar", fun() -> meshx_ct:watch(Vm) =:= [] end, 1000),
    ?assertEqual(none, meshx_ct:service(Vm#{node := meshx_ct:node_name(refused)})).

no_token(Config) ->
    Vm = meshx_ct:vm(Config, #{}),
    refused(Vm, "403 .*Permission denied.*CONSUL_HTTP_TOKEN"),
    meshx_ct:call(Vm, os, putenv, ["CONSUL_HTTP_TOKEN", token(Config, refused)]),
    meshx_ct:net_start(Vm, refused).

no_token_at_boot(Config) ->
    {Status, Output} = meshx_ct:erl(Config, ["-sname", "refused"], #{}),
    ?assert(is_integer(Status) andalso Status =/= 0),
    ?assertMatch({match, _}, re:run(Output, "meshx_node: node refused@.* does not start: .*403 ")).

unknown_token(Config) ->
    Secret = "00000000-dead-beef-0000-000000000000",
    Vm = meshx_ct:vm(Config, #{env => [{"CONSUL_HTTP_TOKEN", Secret}]}),
    refused(Vm, "403 .*ACL not found.*Consul doesn.t know the token").

smallest_policy(Config) ->
    [One, Two] = [with_token(Config, Name) || Name <- [one, two]],
    allow(Config, One, Two),
    ?assert(meshx_ct:connect(One, Two)),
    ?assertEqual(maps:get(node, Two), meshx_ct:call(One, erpc, call, [maps:get(node, Two), erlang, node, []])),
    meshx_ct:failed_connect(One, meshx_ct:node_name(nobody), "is not registered in Consul").

%% Also one that changes while the node runs: it is read for every request.
token_from_a_file(Config) ->
    File = filename:join(maps:get(directory, proplists:get_value(agent, Config)), "token"),
    ok = file:write_file(File, [token(Config, filed), "\n"]),
    Node = meshx_ct:start(Config, filed, #{env => [{"CONSUL_HTTP_TOKEN_FILE", File}]}),
    Other = with_token(Config, other),
    allow(Config, Node, Other),
    ?assert(meshx_ct:connect(Node, Other)),
    ?assert(meshx_ct:call(Node, erlang, disconnect_node, [maps:get(node, Other)])),
    ok = file:write_file(File, "00000000-dead-beef-0000-000000000000"),
    ?assertMatch({error, {agent_acl, _}}, meshx_ct:call(Node, meshx_node, explain, [maps:get(node, Other)])),
    %% Without it the node could not even deregister.
    ok = file:write_file(File, token(Config, filed)).

%% The old one is revoked while the node runs. Heartbeats go on; the agent, which keeps the token of
%% a registration to tell its servers of it, gets the new one; so does the next sidecar.
token_that_is_replaced(Config) ->
    Agent = proplists:get_value(agent, Config),
    File = filename:join(maps:get(directory, Agent), "replaced"),
    {OldId, Old} = token_with_id(Config, replaced),
    ok = file:write_file(File, Old),
    Node = meshx_ct:start(Config, replaced, #{env => [{"CONSUL_HTTP_TOKEN_FILE", File}, {"MESHX_TTL", "3000"}]}),
    Other = with_token(Config, other),
    allow(Config, Node, Other),
    allow(Config, Other, Node),
    ?assert(meshx_ct:connect(Other, Node)),
    Mark = meshx_ct:mark(Node),
    ok = file:write_file(File, token(Config, replaced)),
    meshx_ct:wait("the new registration", fun() -> {ok, 2} =:= meshx_ct:call(Node, meshx_node, info, [registrations]) end),
    ?assertMatch([_, _], meshx_ct:own_lines(Node, Mark)),
    ?assert(meshx_ct:has_line(Node, Mark, "^notice: .*consul_http_token_file \\(CONSUL_HTTP_TOKEN_FILE\\).* has changed")),
    {200, _} = meshx_ct_agent:request(Agent, "DELETE", ["/v1/acl/token/", OldId], <<>>),
    %% The link lived on; the sidecar has the token it was started with.
    ?assertEqual([maps:get(node, Node)], meshx_ct:call(Other, erlang, nodes, [])),
    #{node := Name} = Node,
    Sidecar = meshx_ct:sidecar(Node),
    meshx_ct_proc:signal(Sidecar, "KILL"),
    meshx_ct:wait("another sidecar", fun() ->
        {ok, Info} = meshx_ct:call(Node, meshx_node, info, []),
        maps:get(sidecar_accepts, Info) andalso maps:get(sidecar_pid, Info) =/= meshx_ct_proc:pid(Sidecar)
    end),
    meshx_ct:wait("a link through it", fun() -> meshx_ct:connect(Other, Node) end),
    meshx_ct:call(Other, erlang, disconnect_node, [Name]),
    meshx_ct:wait("a link from it", fun() -> meshx_ct:connect(Node, Other) end),
    ?assertEqual({ok, 0}, meshx_ct:call(Node, meshx_node, info, [request_failures])),
    %% What the servers know follows the agent to the end.
    meshx_ct:stop(Node),
    Path = ["/v1/catalog/service/", uri_string:quote(atom_to_binary(Name))],
    meshx_ct:wait("the catalog without it", fun() -> meshx_ct_agent:get(Agent, Path) =:= [] end).

%% Neither in the log nor in the arguments of any process.
token_never_shows(Config) ->
    Secret = token(Config, secretive),
    #{log := Log} = Node = meshx_ct:start(Config, secretive, #{env => [{"CONSUL_HTTP_TOKEN", Secret}]}),
    meshx_ct:failed_connect(Node, meshx_ct:node_name(nobody), "is not registered"),
    {ok, Logged} = file:read_file(Log),
    ?assertEqual(nomatch, binary:match(Logged, list_to_binary(Secret))),
    State = meshx_ct:call(Node, fun() -> io_lib:format("~0p", [sys:get_status(meshx_node_mesh)]) end),
    ?assertEqual(nomatch, string:find(lists:flatten(State), Secret)),
    [_, _ | _] = Processes = meshx_ct:watch(Node),
    [
        begin
            {ok, Arguments} = file:read_file(lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/cmdline"])),
            ?assertEqual(nomatch, binary:match(Arguments, list_to_binary(Secret)))
        end
     || Process <- Processes
    ].

%% The secrets were read from the environment and from a file, and were used by requests.
token_in_no_crash_dump(Config) ->
    Directory = maps:get(directory, proplists:get_value(agent, Config)),
    Dump = filename:join(Directory, "erl_crash.dump"),
    File = filename:join(Directory, "dumped"),
    Secret = token(Config, dumped),
    ok = file:write_file(File, Secret),
    ok = file:change_mode(File, 8#600),
    [
        begin
            Node = meshx_ct:start(Config, dumped, #{
                env => [
                    {"CONSUL_HTTP_AUTH", "user:tops3cret"},
                    {"MESHX_SIDECAR_ENV", "SOME=tops4cret"},
                    {"MESHX_SERVICE_TEMPLATE", "{\"Meta\": {\"some\": \"tops5cret\"}}"},
                    {"ERL_CRASH_DUMP", Dump},
                    Variable
                ]
            }),
            meshx_ct:failed_connect(Node, meshx_ct:node_name(nobody), "is not registered"),
            meshx_ct:watch(Node),
            %% What would be found.
            Held = [<<"tops6cret">>, binary:copy(<<"tops7cret">>, 10), <<"tops8cret">>],
            meshx_ct:call(Node, ?MODULE, hold, Held),
            %% As an error of the emulator's ends a VM.
            meshx_ct:crash(Node),
            Texts = [list_to_binary(Secret), base64:encode("user:tops3cret")] ++
                [<<"tops", (integer_to_binary(N))/binary, "cret">> || N <- lists:seq(3, 8)],
            ?assertEqual([<<"tops6cret">>, <<"tops7cret">>, <<"tops8cret">>], meshx_ct_dump:contains(Dump, Texts)),
            ok = file:delete(Dump)
        end
     || Variable <- [{"CONSUL_HTTP_TOKEN", Secret}, {"CONSUL_HTTP_TOKEN_FILE", File}]
    ].

hold(Small, Large, String) ->
    Pid = spawn(fun() ->
        Characters = binary_to_list(String),
        receive
            end_of_holding -> {Small, Large, Characters}
        end
    end),
    is_pid(Pid).

nobody_is_allowed_without_an_intention(Config) ->
    [One, Two] = [with_token(Config, Name) || Name <- [one, two]],
    %% Either direction is denied; the first answer is told.
    meshx_ct:failed_connect(One, Two, "intention.*(one@.* => two@|two@.* => one@)"),
    allow_one_way(Config, One, Two),
    meshx_ct:failed_connect(One, Two, "intention.*two@.* => one@"),
    allow_one_way(Config, Two, One),
    ?assert(meshx_ct:connect(One, Two)),
    %% Without any again.
    Mark = meshx_ct:mark(One),
    meshx_ct:auto_connect(One, never),
    meshx_ct:auto_connect(Two, never),
    meshx_ct_agent:delete_intentions(proplists:get_value(agent, Config)),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(One, erlang, nodes, []) =:= [] end, 5000),
    [?assertMatch({match, _}, re:run(Line, "default policy")) || Line <- meshx_ct:own_lines(One, Mark)].

%% But for the own service's, which the sidecar reads too: the nodes may not see which intention it is,
%% and are cut off all the same.
without_the_right_to_read_intentions(Config) ->
    Agent = proplists:get_value(agent, Config),
    Blind = fun(Name) ->
        Node = atom_to_binary(meshx_ct:node_name(Name)),
        {_, Token} = token_of(Agent, [
            ["service \"", Node, "\" { policy = \"write\" }\n"],
            ["service \"", Node, "-sidecar-proxy\" { policy = \"write\" }\n"],
            "service_prefix \"\" { policy = \"read\" intentions = \"deny\" }\n"
            "node_prefix \"\" { policy = \"read\" }\n"
        ]),
        Token
    end,
    [One, Two] = [
        meshx_ct:start(Config, Name, #{env => [{"CONSUL_HTTP_TOKEN", Blind(Name)}]})
     || Name <- [one, two]
    ],
    [meshx_ct:auto_connect(Node, never) || Node <- [One, Two]],
    allow(Config, One, Two),
    Mark = meshx_ct:mark(One),
    ?assert(meshx_ct:connect(One, Two)),
    meshx_ct_agent:deny(Agent, atom_to_binary(maps:get(node, One)), atom_to_binary(maps:get(node, Two))),
    meshx_ct:wait("the link's end", fun() -> meshx_ct:call(One, erlang, nodes, []) =:= [] end, 5000),
    [
        ?assertMatch({match, _}, re:run(Line, "denies one@.* => two@"))
     || Line <- meshx_ct:own_lines(One, Mark)
    ].
