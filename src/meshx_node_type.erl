%% The types of configuration values: what is allowed in words, and the check that brings a
%% value of any source into the one form the rest of the code knows.
%%
%% A value may be text from the OS environment, an Erlang term of a flag or sys.config, or an
%% Elixir term: text is a binary, a string or an atom everywhere. Pure functions, but for
%% template files.
-module(meshx_node_type).

-export([describe/1, check/2, may_hold_secret/1]).
-export_type([type/0, upstreams/0, uids/0]).

-type type() ::
    {consul, text | address | secret | boolean}
    | {milliseconds, Min :: non_neg_integer(), Max :: pos_integer()}
    | boolean
    | ports
    | level
    | directions
    | address
    | naming
    | template
    | command
    | variables
    | upstreams
    | uids.

-type upstreams() :: #{node() => {inet:ip_address(), inet:port_number()}}.
-type uids() :: any | [non_neg_integer()].

%% The last one of 32 bits means "none" to the kernel.
-define(UID_MAX, 16#FFFFFFFE).

%% @doc What is allowed, for errors and the README.
-spec describe(type()) -> unicode:chardata().
describe({consul, boolean}) -> "true or false";
describe({consul, _}) -> "text";
describe({milliseconds, Min, Max}) -> io_lib:format("milliseconds, ~b to ~b", [Min, Max]);
describe(boolean) -> "true or false";
describe(ports) -> "{First,Last}, \"First-Last\" or one port, each 1 to 65535";
describe(level) -> "off or a logger level, debug to emergency";
describe(directions) -> "both or dial";
describe(address) -> "numeric IP address, not 0.0.0.0 or ::";
describe(naming) -> "node, dns, {Module,Function}, \"Module:function\" or a fun of one argument";
describe(template) -> "JSON object as text, \"@file\", {file,Path}, map or keyword list";
describe(command) -> "none, list of strings, JSON array, or text with words split as a shell does";
describe(variables) -> "list of {Name,Value}, map, JSON object, or text NAME=value NAME=value";
describe(upstreams) ->
    "list of {Node,\"ip:port\"}, map, or text node=ip:port node=[ip6]:port; addresses are numeric";
describe(uids) ->
    "any, a user ID, list of user IDs, or text with IDs between commas".

%% @doc The value in our form; a plain `error' means that it isn't what describe/1 says.
-spec check(type(), term()) -> {ok, term()} | error | {error, unicode:chardata()}.
check({consul, _}, "") ->
    {ok, <<>>};
check({consul, boolean}, Value) ->
    case check(boolean, Value) of
        {ok, Boolean} -> {ok, atom_to_binary(Boolean)};
        %% More spellings than ours are official; endpoint.c judges them.
        error -> text(Value)
    end;
check({consul, _}, Value) ->
    text(Value);
check({milliseconds, Min, Max}, Value) ->
    case integer(Value) of
        {ok, Integer} when Integer >= Min, Integer =< Max -> {ok, Integer};
        _ -> error
    end;
check(boolean, Value) when is_boolean(Value) ->
    {ok, Value};
check(boolean, Value) ->
    case text(Value) of
        {ok, <<"true">>} -> {ok, true};
        {ok, <<"1">>} -> {ok, true};
        {ok, <<"false">>} -> {ok, false};
        {ok, <<"0">>} -> {ok, false};
        _ -> error
    end;
check(ports, {First, Last}) ->
    case {integer(First), integer(Last)} of
        {{ok, A}, {ok, B}} when A >= 1, B >= A, B =< 65535 -> {ok, {A, B}};
        {{ok, A}, {ok, B}} when B >= 1, A > B, A =< 65535 -> {error, "ends before it begins"};
        _ -> error
    end;
check(ports, #{'__struct__' := 'Elixir.Range', first := First, last := Last}) ->
    check(ports, {First, Last});
check(ports, Port) when is_integer(Port) ->
    check(ports, {Port, Port});
check(ports, Value) ->
    {ok, Text} = default_text(Value),
    Pattern = "^\\{?([0-9]{1,5})(?: *(?:-|,|\\.\\.) *([0-9]{1,5}))?\\}?$",
    case re:run(Text, Pattern, [{capture, all_but_first, binary}]) of
        {match, [Port]} -> check(ports, {Port, Port});
        {match, [First, Last]} -> check(ports, {First, Last});
        nomatch -> error
    end;
check(level, Value) ->
    {ok, Text} = default_text(Value),
    Levels = [off, debug, info, notice, warning, error, critical, alert, emergency],
    case [Level || Level <- Levels, atom_to_binary(Level) =:= Text] of
        [Level] -> {ok, Level};
        [] -> error
    end;
check(directions, Value) ->
    case default_text(Value) of
        {ok, <<"both">>} -> {ok, both};
        {ok, <<"dial">>} -> {ok, dial};
        {ok, _} -> error
    end;
check(address, Value) ->
    {ok, Text} = default_text(Value),
    case inet:parse_strict_address(unicode:characters_to_list(Text)) of
        {ok, Address} -> check_address(Address);
        {error, einval} when is_tuple(Value) -> check_address(Value);
        {error, einval} -> error
    end;
check(naming, Value) ->
    check_naming(Value);
check(template, Value) ->
    check_template(Value);
check(command, Value) ->
    check_command(Value);
check(variables, Value) ->
    check_variables(Value);
check(upstreams, Value) ->
    check_upstreams(Value);
check(uids, Value) ->
    check_uids(Value).

%% @doc Whether values of a type must not be shown: an address may hold a password, a command
%% or template a token.
-spec may_hold_secret(type()) -> boolean().
may_hold_secret({consul, Kind}) -> Kind =:= secret orelse Kind =:= address;
may_hold_secret(Type) -> lists:member(Type, [template, command, variables]).

check_address(Address) ->
    Zero = lists:all(fun(Part) -> Part =:= 0 end, tuple_to_list(Address)),
    case not Zero andalso inet:ntoa(Address) of
        Text when is_list(Text) -> {ok, list_to_binary(Text)};
        _ -> error
    end.

check_naming(Value) when Value =:= node; Value =:= dns ->
    {ok, Value};
check_naming({Module, Function}) when is_atom(Module), is_atom(Function) ->
    case code:ensure_loaded(Module) of
        {module, Module} ->
            case erlang:function_exported(Module, Function, 1) of
                true -> {ok, {Module, Function}};
                false -> {error, io_lib:format("there is no ~tp:~tp/1", [Module, Function])}
            end;
        {error, Reason} ->
            {error, io_lib:format("module ~tp can't be loaded: ~tp", [Module, Reason])}
    end;
check_naming(Function) when is_function(Function, 1) ->
    {ok, Function};
check_naming(Value) ->
    {ok, Text} = default_text(Value),
    case {Text, binary:split(Text, <<":">>)} of
        {<<"node">>, _} -> {ok, node};
        {<<"dns">>, _} -> {ok, dns};
        {_, [<<_, _/binary>> = Module, <<_, _/binary>> = Function]} when byte_size(Text) < 256 ->
            check_naming({binary_to_atom(Module), binary_to_atom(Function)});
        _ -> error
    end.

%% The JSON text. An empty template is none.
check_template(Empty) when Empty =:= []; Empty =:= #{} ->
    {ok, undefined};
check_template({file, Name}) ->
    case text(Name) of
        {ok, <<_, _/binary>> = File} ->
            case meshx_node_command:read_file(File) of
                {ok, Text} -> in_file(File, check_object(Text));
                {error, Reason} -> {error, Reason}
            end;
        _ ->
            error
    end;
check_template(Value) ->
    case text(Value) of
        {ok, <<"@", File/binary>>} -> check_template({file, File});
        {ok, Text} -> check_object(Text);
        error when is_map(Value); is_list(Value) -> check_term_template(Value);
        error -> error
    end.

check_term_template(Value) ->
    case meshx_node_json:encode(Value) of
        {ok, Text} -> check_object(Text);
        {error, Reason} -> {error, Reason}
    end.

check_object(Text) ->
    case meshx_node_json:decode(Text) of
        {ok, #{}} -> {ok, Text};
        {ok, _} -> {error, "is not a JSON object"};
        {error, Reason} -> {error, Reason}
    end.

in_file(File, {error, Reason}) -> {error, [File, ": ", Reason]};
in_file(_, Ok) -> Ok.

check_command(none) ->
    {ok, none};
check_command([First | _] = List) when not is_integer(First) ->
    words([text(Word) || Word <- List]);
check_command(Value) ->
    case text(Value) of
        {ok, <<"none">>} -> {ok, none};
        {ok, <<"[", _/binary>> = Json} ->
            case meshx_node_json:decode(Json) of
                {ok, List} -> words([is_binary(Word) andalso text(Word) || Word <- List]);
                {error, Reason} -> {error, Reason}
            end;
        {ok, Text} ->
            case meshx_node_command:words(Text) of
                {ok, [<<_, _/binary>> | _] = Words} -> {ok, Words};
                {ok, _} -> error;
                {error, Reason} -> {error, Reason}
            end;
        error -> error
    end.

words([{ok, <<_, _/binary>>} | _] = Checked) ->
    case [Word || {ok, Word} <- Checked] of
        Words when length(Words) =:= length(Checked) -> {ok, Words};
        _ -> error
    end;
words(_) ->
    error.

check_variables(Map) when is_map(Map) ->
    check_variables(maps:to_list(Map));
check_variables([First | _] = List) when not is_integer(First) ->
    variables([variable_pair(Pair) || Pair <- List]);
check_variables([]) ->
    {ok, []};
check_variables(Value) ->
    case text(Value) of
        {ok, <<"{", _/binary>> = Json} ->
            case meshx_node_json:decode(Json) of
                {ok, Map} -> check_variables(Map);
                {error, Reason} -> {error, Reason}
            end;
        {ok, Text} ->
            case meshx_node_command:words(Text) of
                {ok, Words} -> variables([assignment(Word) || Word <- Words]);
                {error, Reason} -> {error, Reason}
            end;
        error ->
            error
    end.

variables(Pairs) ->
    case lists:member(error, Pairs) of
        true -> error;
        false -> {ok, Pairs}
    end.

assignment(Word) ->
    case binary:split(Word, <<"=">>) of
        [Name, Value] -> variable_pair({Name, Value});
        [_] -> error
    end.

variable_pair({Name, Value}) ->
    case {variable_name(Name), variable_value(Value)} of
        {{ok, NameText}, {ok, ValueText}} -> {NameText, ValueText};
        _ -> error
    end;
variable_pair(_) ->
    error.

variable_name(Name) ->
    case text(Name) of
        {ok, <<_, _/binary>> = Text} ->
            case binary:match(Text, <<"=">>) of
                nomatch -> {ok, Text};
                _ -> error
            end;
        _ ->
            error
    end.

variable_value(false) -> {ok, false};
variable_value("") -> {ok, <<>>};
variable_value(Integer) when is_integer(Integer) -> {ok, integer_to_binary(Integer)};
variable_value(Value) -> text(Value).

check_upstreams(Map) when is_map(Map) ->
    check_upstreams(maps:to_list(Map));
check_upstreams([First | _] = List) when not is_integer(First), length(List) > 0 ->
    upstreams([upstream(Pair) || Pair <- List], #{});
check_upstreams([]) ->
    {ok, #{}};
check_upstreams(Value) ->
    case text(Value) of
        {ok, Text} ->
            case meshx_node_command:words(Text) of
                %% The last "=": a node's name may have one, an address has none.
                {ok, Words} ->
                    Pairs = [list_to_tuple(string:split(Word, "=", trailing)) || Word <- Words],
                    upstreams([upstream(Pair) || Pair <- Pairs], #{});
                {error, Reason} ->
                    {error, Reason}
            end;
        error ->
            error
    end.

upstreams([{ok, Node, _} | _], Checked) when is_map_key(Node, Checked) ->
    {error, [atom_to_binary(Node), " is given twice"]};
upstreams([{ok, Node, Address} | Rest], Checked) ->
    upstreams(Rest, Checked#{Node => Address});
upstreams([error | _], _) ->
    error;
upstreams([], Checked) ->
    {ok, Checked}.

upstream({Name, Place}) ->
    case {node_name(Name), ip_and_port(Place)} of
        {{ok, Node}, {ok, Address}} -> {ok, Node, Address};
        _ -> error
    end;
upstream(_) ->
    error.

node_name(Name) ->
    case text(Name) of
        {ok, Text} ->
            try binary_to_atom(Text) of
                Node ->
                    case meshx_node_dist:is_node_name(Node) of
                        true -> {ok, Node};
                        false -> error
                    end
            catch
                error:system_limit -> error
            end;
        error ->
            error
    end.

ip_and_port(Value) ->
    {ok, Text} = default_text(Value),
    Pattern = "^(?:\\[([0-9a-fA-F:.]+)\\]|([0-9.]+)):([0-9]{1,5})$",
    case re:run(Text, Pattern, [dollar_endonly, {capture, all_but_first, list}]) of
        {match, [Six, "", Port]} -> ip_and_port(inet:parse_ipv6strict_address(Six), Port);
        {match, ["", Four, Port]} -> ip_and_port(inet:parse_ipv4strict_address(Four), Port);
        nomatch -> error
    end.

ip_and_port({ok, Ip}, Digits) ->
    case {check_address(Ip), list_to_integer(Digits)} of
        {{ok, _}, Port} when Port >= 1, Port =< 65535 -> {ok, {Ip, Port}};
        _ -> error
    end;
ip_and_port({error, einval}, _) ->
    error.

check_uids(Any) when Any =:= any; Any =:= "any" ->
    {ok, any};
check_uids(Uid) when is_integer(Uid) ->
    uids([Uid]);
check_uids(List) when is_list(List), length(List) > 0 ->
    %% "48" is [52,56] to Erlang: to let the wrong user in is worse than an error.
    case lists:all(fun(Element) -> lists:member(Element, lists:seq($\s, $~)) end, List) of
        true ->
            {error,
                "may be a list of user IDs as well as a string: write one ID as a number, several as a "
                "binary, <<\"48,49\">>"};
        false ->
            uids(List)
    end;
check_uids([]) ->
    {ok, []};
check_uids(Value) ->
    case text(Value) of
        {ok, <<"any">>} -> {ok, any};
        {ok, Text} -> uids(re:split(Text, "[, ]+", [trim]));
        error -> error
    end.

uids(List) ->
    Checked = [integer(Element) || Element <- List],
    case [Uid || {ok, Uid} <- Checked, Uid >= 0, Uid =< ?UID_MAX] of
        Uids when length(Uids) =:= length(List) -> {ok, lists:usort(Uids)};
        _ -> error
    end.

integer(Integer) when is_integer(Integer) ->
    {ok, Integer};
integer(Value) ->
    case text(Value) of
        {ok, Text} ->
            try
                {ok, binary_to_integer(Text)}
            catch
                error:badarg -> error
            end;
        error ->
            error
    end.

%% UTF-8 without NUL, which would end the text in C, of a binary, string or atom.
text(Atom) when is_atom(Atom), Atom =/= nil ->
    {ok, atom_to_binary(Atom)};
text(Value) when is_binary(Value); is_list(Value), Value =/= [] ->
    try unicode:characters_to_binary(Value) of
        Text when is_binary(Text) ->
            case is_list(Value) andalso not io_lib:char_list(Value) of
                true -> error;
                false -> without_nul(Text)
            end;
        _ ->
            error
    catch
        error:badarg -> error
    end;
text(_) ->
    error.

without_nul(Text) ->
    case binary:match(Text, <<0>>) of
        nomatch -> {ok, Text};
        _ -> error
    end.

%% For types that spell out their values: whatever isn't text is none of them.
default_text(Value) ->
    case text(Value) of
        {ok, Text} -> {ok, Text};
        error -> {ok, <<>>}
    end.
