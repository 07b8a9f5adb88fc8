%% JSON text from Erlang and Elixir terms, and back.
%%
%% OTP has a json module since 27 only, and no application may be started when a node
%% starts at boot, so the carrier brings the little it needs: templates written as terms
%% become text for the core, and JSON in flags or the OS environment is read and checked
%% with the place of a mistake. Pure functions, no process.
-module(meshx_node_json).

-export([encode/1, decode/1]).
-export_type([json/0]).

%% What decode/1 returns: strings are UTF-8 binaries, objects maps with such keys.
-type json() :: #{binary() => json()} | [json()] | binary() | number() | boolean() | null.

%% @doc JSON text of a term.
%%
%% Maps and keyword lists (keys are atoms, binaries or strings) are objects; other lists
%% arrays; binaries, non-empty lists of printable characters and atoms are strings, but
%% for true, false, null, nil and undefined.
-spec encode(term()) -> {ok, binary()} | {error, unicode:chardata()}.
encode(Term) ->
    try
        {ok, iolist_to_binary(value(Term))}
    catch
        throw:{not_json, Reason} -> {error, Reason}
    end.

%% @doc The term of a JSON text. An error says what is wrong and at which byte.
-spec decode(binary()) -> {ok, json()} | {error, unicode:chardata()}.
decode(Text) ->
    try
        {Value, Rest} = parse(skip(Text)),
        case skip(Rest) of
            <<>> -> {ok, Value};
            More -> wrong(More, "something follows the value")
        end
    catch
        throw:{not_json, At, Reason} ->
            Position = byte_size(Text) - byte_size(At) + 1,
            {error, io_lib:format("not JSON: ~ts at byte ~b", [Reason, Position])}
    end.

%%% Out

value(Atom) when is_boolean(Atom); Atom =:= null -> atom_to_binary(Atom);
value(Atom) when Atom =:= nil; Atom =:= undefined -> <<"null">>;
value(Atom) when is_atom(Atom) -> string(atom_to_binary(Atom));
value(Integer) when is_integer(Integer) -> integer_to_binary(Integer);
value(Float) when is_float(Float) -> float_to_binary(Float, [short]);
value(Binary) when is_binary(Binary) -> string(Binary);
value(#{'__struct__' := _}) -> not_json("a struct");
value(Map) when is_map(Map) -> object(maps:to_list(Map));
value([]) -> <<"[]">>;
value(List) when is_list(List) ->
    case {is_proper(List) andalso lists:all(fun is_pair/1, List), is_text(List)} of
        {true, _} -> object(List);
        {false, true} -> string(unicode:characters_to_binary(List));
        {false, false} -> array(List)
    end;
value(Tuple) when is_tuple(Tuple) -> not_json("a tuple");
value(_) -> not_json("a pid, fun or the like").

array(List) ->
    is_proper(List) orelse not_json("an improper list"),
    [$[, lists:join($,, [value(Item) || Item <- List]), $]].

object(Pairs) ->
    Members = lists:sort([{key(Key), value(Value)} || {Key, Value} <- Pairs]),
    length(lists:ukeysort(1, Members)) =:= length(Members) orelse
        not_json("an object with the same key twice"),
    [${, lists:join($,, [[Key, $:, Value] || {Key, Value} <- Members]), $}].

key(Key) when is_atom(Key) -> string(atom_to_binary(Key));
key(Key) when is_binary(Key) -> string(Key);
key(Key) ->
    case is_text(Key) of
        true -> string(unicode:characters_to_binary(Key));
        false -> not_json("a key that is neither atom, binary nor string")
    end.

is_proper(List) when length(List) >= 0 -> true;
is_proper(_) -> false.

is_pair({Key, _}) -> is_atom(Key) orelse is_binary(Key) orelse is_text(Key);
is_pair(_) -> false.

is_text(Term) -> Term =/= [] andalso io_lib:printable_unicode_list(Term).

string(Binary) ->
    case unicode:characters_to_binary(Binary) of
        Binary -> iolist_to_binary([$", [escape(C) || <<C/utf8>> <= Binary], $"]);
        _ -> not_json("a binary that isn't UTF-8")
    end.

escape($") -> <<"\\\"">>;
escape($\\) -> <<"\\\\">>;
escape(C) when C < 16#20 -> io_lib:format("\\u~4.16.0b", [C]);
escape(C) -> <<C/utf8>>.

%% Without the term: it may hold a secret.
-spec not_json(string()) -> no_return().
not_json(What) -> throw({not_json, What ++ " can't be written as JSON"}).

%%% In: each function takes the text that is left and returns {Value, Rest}

parse(<<"{", Rest/binary>>) ->
    case skip(Rest) of
        <<"}", After/binary>> -> {#{}, After};
        Member -> members(Member, #{})
    end;
parse(<<"[", Rest/binary>>) ->
    case skip(Rest) of
        <<"]", After/binary>> -> {[], After};
        Item -> items(Item, [])
    end;
parse(<<"\"", Rest/binary>>) -> text(Rest, []);
parse(<<"true", Rest/binary>>) -> {true, Rest};
parse(<<"false", Rest/binary>>) -> {false, Rest};
parse(<<"null", Rest/binary>>) -> {null, Rest};
parse(<<C, _/binary>> = Text) when C =:= $-; C >= $0, C =< $9 -> number(Text);
parse(<<>>) -> wrong(<<>>, "it ends too early");
parse(Text) -> wrong(Text, "a value is missing").

members(<<"\"", Text/binary>>, Object) ->
    {Key, Rest} = text(Text, []),
    Value =
        case skip(Rest) of
            <<":", Colon/binary>> -> skip(Colon);
            NoColon -> wrong(NoColon, "':' is missing")
        end,
    {Parsed, After} = parse(Value),
    is_map_key(Key, Object) andalso
        wrong(<<"\"", Text/binary>>, "the same key stands twice in an object"),
    Extended = Object#{Key => Parsed},
    case skip(After) of
        <<",", Next/binary>> -> members(skip(Next), Extended);
        <<"}", End/binary>> -> {Extended, End};
        Other -> wrong(Other, "',' or '}' is missing")
    end;
members(Text, _) ->
    wrong(Text, "a key in double quotes is missing").

items(Text, Items) ->
    {Item, After} = parse(Text),
    case skip(After) of
        <<",", Next/binary>> -> items(skip(Next), [Item | Items]);
        <<"]", End/binary>> -> {lists:reverse(Items, [Item]), End};
        Other -> wrong(Other, "',' or ']' is missing")
    end.

text(<<"\"", Rest/binary>>, Read) -> {unicode:characters_to_binary(lists:reverse(Read)), Rest};
text(<<"\\u", Rest/binary>> = All, Read) -> unicode_escape(Rest, All, Read);
text(<<"\\", C, Rest/binary>> = All, Read) ->
    case lists:keyfind(C, 1, escapes()) of
        {C, Character} -> text(Rest, [Character | Read]);
        false -> wrong(All, "unknown escape")
    end;
text(<<C, _/binary>> = All, _) when C < 16#20 ->
    wrong(All, "an unescaped control character");
text(<<C/utf8, Rest/binary>>, Read) -> text(Rest, [C | Read]);
text(<<>>, _) -> wrong(<<>>, "a string doesn't end");
text(All, _) -> wrong(All, "a character isn't UTF-8").

escapes() ->
    [{$", $"}, {$\\, $\\}, {$/, $/}, {$b, $\b}, {$f, $\f}, {$n, $\n}, {$r, $\r}, {$t, $\t}].

unicode_escape(<<Hex:4/binary, Rest/binary>>, All, Read) ->
    case {hex(Hex), Rest} of
        {High, <<"\\u", LowHex:4/binary, After/binary>>} when High >= 16#D800, High =< 16#DBFF ->
            case hex(LowHex) of
                Low when Low >= 16#DC00, Low =< 16#DFFF ->
                    Character = 16#10000 + (High - 16#D800) * 16#400 + (Low - 16#DC00),
                    text(After, [Character | Read]);
                _ ->
                    wrong(All, "half a surrogate pair")
            end;
        {Half, _} when Half >= 16#D800, Half =< 16#DFFF -> wrong(All, "half a surrogate pair");
        {invalid, _} -> wrong(All, "unknown escape");
        {Character, _} -> text(Rest, [Character | Read])
    end;
unicode_escape(_, All, _) ->
    wrong(All, "unknown escape").

hex(Digits) ->
    case re:run(Digits, "^[0-9a-fA-F]{4}$") of
        {match, _} -> binary_to_integer(Digits, 16);
        nomatch -> invalid
    end.

number(Text) ->
    Pattern = "^(-?(?:0|[1-9][0-9]*))(\\.[0-9]+)?([eE][+-]?[0-9]+)?",
    case re:run(Text, Pattern, [{capture, all_but_first, binary}]) of
        {match, [Integer]} ->
            {binary_to_integer(Integer), drop(byte_size(Integer), Text)};
        {match, [Integer, Fraction | Exponent]} ->
            Size = iolist_size([Integer, Fraction | Exponent]),
            %% binary_to_float/1 insists on a fraction.
            Point =
                case Fraction of
                    <<>> -> <<".0">>;
                    _ -> Fraction
                end,
            try
                {binary_to_float(iolist_to_binary([Integer, Point | Exponent])), drop(Size, Text)}
            catch
                error:badarg -> wrong(Text, "a number is out of range")
            end;
        nomatch ->
            wrong(Text, "a number is malformed")
    end.

drop(Size, Text) -> binary:part(Text, Size, byte_size(Text) - Size).

skip(<<C, Rest/binary>>) when C =:= $\s; C =:= $\t; C =:= $\n; C =:= $\r -> skip(Rest);
skip(Text) -> Text.

-spec wrong(binary(), string()) -> no_return().
wrong(At, Reason) -> throw({not_json, At, Reason}).
