%% What can be read in an Erlang crash dump: binaries stand there in Base64, strings as single
%% cells of a list.
-module(meshx_ct_dump).

-export([contains/2]).

%% Which of Texts are in the dump: as plain text, in a binary, or as a list of characters.
-spec contains(file:filename(), [binary()]) -> [binary()].
contains(File, Texts) ->
    {ok, Dump} = file:read_file(File),
    Readable = iolist_to_binary([Dump, binaries(Dump), strings(Dump)]),
    [Text || Text <- Texts, binary:match(Readable, Text) =/= nomatch].

%% "Address:Yh<size>:<Base64>" on a heap, or "<size>:<Base64>" as all of a =binary section.
binaries(Dump) ->
    {match, Found} = re:run(Dump, "^(?:[0-9A-F]+:Yh|(?<=\\n))[0-9A-F]+:([A-Za-z0-9+/]+=*)$", [
        global, multiline, {capture, [1], binary}
    ]),
    [["\n", base64:decode(Text)] || [Text] <- Found, byte_size(Text) rem 4 =:= 0].

%% "Address:lI<character>|H<address of the rest>", or "|N" at the end.
strings(Dump) ->
    {match, Found} = re:run(Dump, "^([0-9A-F]+):lI([0-9]{1,3})\\|(?:H([0-9A-F]+)|N)$", [
        global, multiline, {capture, all_but_first, binary}
    ]),
    Cells = maps:from_list([cell(Cell) || Cell <- Found]),
    Heads = maps:keys(maps:without([Next || {_, Next} <- maps:values(Cells)], Cells)),
    [["\n", string(Head, Cells)] || Head <- Heads].

cell([Address, Character]) -> {Address, {binary_to_integer(Character), none}};
cell([Address, Character, Next]) -> {Address, {binary_to_integer(Character), Next}}.

string(Address, Cells) ->
    case Cells of
        #{Address := {Character, Next}} when Character < 256 -> [Character | string(Next, Cells)];
        #{} -> []
    end.
