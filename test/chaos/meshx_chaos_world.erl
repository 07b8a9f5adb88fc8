%% What the faults happen to: an agent that keeps its data, and nodes with sidecars, each with
%% traffic to all others. Says what is not yet in order after a fault, and what it has left behind.
%%
%% Members with odd numbers are nodes from boot on, those with even ones by Node.start in a VM.
%% Links are wanted by the traffic only: global neither makes nor cuts any.
-module(meshx_chaos_world).

-export([start/2, end_all/1, rebuild/1, member/2, members/1, agent/1, restart_agent/2, ttl/0]).
-export([start_member/2, settled/1, out_of_order/2, wrong/1, left/1, clear/1, checks/2, services/2]).
-export_type([world/0]).

-type member() :: pos_integer().
-type world() :: #{
    config := [{atom(), term()}],
    agent := meshx_ct_agent:agent(),
    nodes := #{member() => meshx_ct:test_node()},
    count := pos_integer(),
    %% by VM: what it held when it had links to all for the first time
    usual := #{pos_integer() => meshx_ct_resources:taken()}
}.

-define(TTL, 5000).
%% All nodes start, or all is repaired, in this time, ms; else the run ends.
-define(START_TIME, 60000).
%% How long what is no longer used may take to go, ms.
-define(LEAVE_TIME, 10000).

-spec start([{atom(), term()}], pos_integer()) -> world().
start(Config, Count) ->
    Agent = meshx_ct:add_agent(Config, #{servers => 1}),
    members_start(#{config => Config, agent => Agent, nodes => #{}, count => Count, usual => #{}}).

members_start(#{count := Count} = World) ->
    Since = os:system_time(millisecond),
    New = lists:foldl(fun(Member, Sofar) -> start_member(Sofar, Member) end, World, lists:seq(1, Count)),
    case await(fun() -> out_of_order(New, Since) end, ?START_TIME) of
        [] -> settled(New);
        Missing -> error({does_not_start, Missing})
    end.

%% After a fault that was not survived: everything anew.
-spec rebuild(world()) -> world().
rebuild(#{agent := Agent} = World) ->
    end_all(World),
    meshx_ct:stop_agent(Agent),
    meshx_ct_agent:forget(Agent),
    members_start(World#{agent := meshx_ct:restart_agent(Agent), nodes := #{}, usual := #{}}).

-spec end_all(world()) -> ok.
end_all(#{nodes := Nodes} = World) ->
    [meshx_ct_proc:signal(Process, "KILL") || #{process := Process} <- maps:values(Nodes)],
    _ = await(fun() -> [Node || Node <- maps:values(Nodes), not meshx_ct:is_gone(Node)] end, ?LEAVE_TIME),
    clear(World#{nodes := #{}}).

-spec ttl() -> pos_integer().
ttl() ->
    ?TTL.

-spec member(world(), member()) -> meshx_ct:test_node().
member(#{nodes := Nodes}, Member) ->
    maps:get(Member, Nodes).

-spec members(world()) -> [member()].
members(#{nodes := Nodes}) ->
    maps:keys(Nodes).

-spec agent(world()) -> meshx_ct_agent:agent().
agent(#{agent := Agent}) ->
    Agent.

%% After meshx_ct:stop_agent/1, with what it has known or without; returns when it has a leader.
-spec restart_agent(world(), kept | lost) -> world().
restart_agent(#{agent := Agent} = World, State) ->
    State =:= kept orelse meshx_ct_agent:forget(Agent),
    World#{agent := meshx_ct:restart_agent(Agent)}.

%% A member that isn't there, or no longer; in the same VM if that lives. With its traffic.
-spec start_member(world(), member()) -> world().
start_member(#{config := Config, nodes := Nodes, count := Count, agent := Agent} = World, Member) ->
    Name = name(Member),
    Options = #{
        scope => suite,
        agent => Agent,
        args => ["-connect_all", "false", "-kernel", "prevent_overlapping_partitions", "false"],
        env => [{"MESHX_TTL", integer_to_list(?TTL)}, {"MESHX_SIDECAR_STDOUT", "off"}]
    },
    Vm =
        case Nodes of
            #{Member := Former} -> [Former || not meshx_ct:is_gone(Former)];
            #{} -> []
        end,
    Node =
        case {Vm, Member rem 2} of
            {[Lives], _} -> meshx_ct:net_start(Lives, Name);
            {[], 1} -> meshx_ct:start(Config, Name, Options);
            {[], 0} -> meshx_ct:net_start(meshx_ct:vm(Config, Options), Name)
        end,
    Others = [meshx_ct:node_name(name(Other)) || Other <- lists:seq(1, Count), Other =/= Member],
    ok = meshx_ct:call(Node, meshx_ct_traffic, start, [Others]),
    World#{nodes := Nodes#{Member => Node}}.

%% With the id of this VM, so that another run beside this one has other nodes.
name(Member) ->
    list_to_atom(lists:concat(["chaos", Member, tag()])).

tag() ->
    lists:concat(["-", os:getpid()]).

%% ---- In order ----

%% All is in order: what new VMs hold now is their usual.
-spec settled(world()) -> world().
settled(#{nodes := Nodes, usual := Usual} = World) ->
    Vms = maps:values(Nodes),
    %% Time to come to rest.
    lists:all(fun(#{id := Id}) -> maps:is_key(Id, Usual) end, Vms) orelse timer:sleep(1000),
    World#{usual := maps:from_list([{Id, usual(Node, Usual)} || #{id := Id} = Node <- Vms])}.

usual(#{id := Id} = Node, Usual) ->
    case Usual of
        #{Id := Held} -> Held;
        #{} -> held(Node)
    end.

%% Under traffic memory says nothing; processes come and go with calls.
held(Node) ->
    maps:with([descriptors, threads, ports, tables], meshx_ct_resources:taken(Node)).

%% What is not as it should be: links that have carried no message sent after Since which was
%% answered, checks that don't pass. Empty: all is repaired.
-spec out_of_order(world(), Since :: integer()) -> [string()].
out_of_order(#{nodes := Nodes} = World, Since) ->
    lists:append([unanswered(World, Node, Since) || Node <- maps:values(Nodes)]) ++
        try
            not_passing(World)
        catch
            error:_ -> ["the agent does not answer"]
        end.

%% What messages came back other than they were sent.
-spec wrong(world()) -> [string()].
wrong(#{nodes := Nodes}) ->
    [
        text("~ts: wrong answer ~0tp", [Name, Wrong])
     || #{node := Name} = Node <- maps:values(Nodes),
        Wrong <- meshx_ct:call(Node, meshx_ct_traffic, wrong, [])
    ].

unanswered(#{nodes := Nodes}, #{node := Name} = Node, Since) ->
    Others = [Other || #{node := Other} <- maps:values(Nodes), Other =/= Name],
    try meshx_ct:call(Node, meshx_ct_traffic, answered, []) of
        Answered ->
            [text("~ts gets no answer from ~ts", [Name, Other]) || Other <- Others, maps:get(Other, Answered, 0) =< Since]
    catch
        _:_ -> [text("~ts does not answer", [Name])]
    end.

not_passing(#{nodes := Nodes} = World) ->
    [
        text("checks of ~ts: ~0tp", [Name, Statuses])
     || #{node := Name} <- maps:values(Nodes),
        Statuses <- [checks(World, Name)],
        Statuses =/= [<<"passing">>, <<"passing">>]
    ].

%% The statuses of a node's checks, its sidecar's included.
-spec checks(world(), node()) -> [binary()].
checks(#{agent := Agent}, Name) ->
    Ids = service_ids(Name),
    Checks = meshx_ct_agent:get(Agent, "/v1/agent/checks"),
    [Status || #{<<"ServiceID">> := Id, <<"Status">> := Status} <- maps:values(Checks), lists:member(Id, Ids)].

%% What is registered of a node.
-spec services(world(), node()) -> [binary()].
services(#{agent := Agent}, Name) ->
    [Id || Id <- service_ids(Name), maps:is_key(Id, meshx_ct_agent:services(Agent))].

service_ids(Name) ->
    [atom_to_binary(Name), <<(atom_to_binary(Name))/binary, "-sidecar-proxy">>].

%% ---- Left behind ----

%% What is there and belongs to nobody, or twice, when all is repaired.
-spec left(world()) -> [string()].
left(World) ->
    await(fun() -> left_now(World) end, ?LEAVE_TIME).

left_now(#{nodes := Nodes, usual := Usual, agent := Agent} = World) ->
    Wanted = lists:append([service_ids(Name) || #{node := Name} <- maps:values(Nodes)]),
    [text("process ~0tp", [Process]) || Process <- stray_processes(World)] ++
        [text("service ~ts", [Id]) || Id <- maps:keys(meshx_ct_agent:services(Agent)) -- Wanted] ++
        ["an intention" || _ <- meshx_ct_agent:get(Agent, "/v1/connect/intentions")] ++
        [
            text("~ts: ~0tp", [Name, What])
         || #{id := Id, node := Name} = Node <- maps:values(Nodes),
            What <- links(Node, maps:size(Nodes) - 1) ++ held_more(Node, maps:get(Id, Usual, none))
        ].

links(Node, Most) ->
    case meshx_ct:call(Node, meshx_node, info, [links]) of
        {ok, Links} when length(Links) > Most -> [{links, length(Links)}];
        {ok, _} -> []
    end.

held_more(_Node, none) -> [];
held_more(Node, Usual) -> meshx_ct_resources:more(held(Node), Usual).

%% Guards and sidecars of this run's nodes that no living member has, or has too many of.
stray_processes(#{nodes := Nodes}) ->
    Owned = [owned(Node) || Node <- maps:values(Nodes)],
    TooMany = lists:append([Processes || Processes <- Owned, length(Processes) > 2]),
    TooMany ++ ((guards_and_sidecars() -- lists:append(Owned))).

owned(#{process := Process}) ->
    [Of || Of <- meshx_ct_proc:descendants(meshx_ct_proc:pid(Process)), is_ours(Of)].

%% Both have the name of the node among their arguments.
guards_and_sidecars() ->
    {ok, Names} = file:list_dir("/proc"),
    Found = [meshx_ct_proc:find(list_to_integer(Name)) || [Digit | _] = Name <- Names, Digit >= $0, Digit =< $9],
    [Process || Process <- Found, Process =/= none, is_ours(Process)].

is_ours(Process) ->
    lists:member(meshx_ct_proc:program(Process), [<<"meshx_guard">>, <<"consul">>]) andalso
        case file:read_file(lists:concat(["/proc/", meshx_ct_proc:pid(Process), "/cmdline"])) of
            {ok, Arguments} -> binary:match(Arguments, list_to_binary(tag() ++ "@")) =/= nomatch;
            {error, _} -> false
        end.

%% Removes what was left behind, so that it is not counted for the next fault too.
-spec clear(world()) -> ok.
clear(#{agent := Agent, nodes := Nodes} = World) ->
    _ = await(fun() -> stray_processes(World) end, 1000),
    [meshx_ct_proc:signal(Process, "KILL") || Process <- stray_processes(World)],
    try
        meshx_ct_agent:delete_intentions(Agent),
        Wanted = lists:append([service_ids(Name) || #{node := Name} <- maps:values(Nodes)]),
        [
            meshx_ct_agent:request(Agent, "PUT", ["/v1/agent/service/deregister/", uri_string:quote(Id)], <<>>)
         || Id <- maps:keys(meshx_ct_agent:services(Agent)) -- Wanted
        ]
    catch
        %% The agent is the fault.
        error:_ -> []
    end,
    ok.

%% Until Fun returns []; what it returned last.
await(Fun, Time) ->
    await_until(Fun, erlang:monotonic_time(millisecond) + Time).

await_until(Fun, Deadline) ->
    case Fun() of
        [_ | _] = Rest ->
            case erlang:monotonic_time(millisecond) < Deadline of
                true ->
                    timer:sleep(20),
                    await_until(Fun, Deadline);
                false ->
                    Rest
            end;
        [] ->
            []
    end.

text(Format, Arguments) ->
    lists:flatten(io_lib:format(Format, Arguments)).
