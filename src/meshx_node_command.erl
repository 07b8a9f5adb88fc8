%% The sidecar's command and environment: a text split into words, placeholders filled in,
%% the program found, and an environment that holds nothing but what a sidecar needs.
%%
%% Runs at boot too, when file_server isn't there yet (kernel starts it after the
%% distribution): file functions are called with `raw' only, which is also why this is not
%% os:find_executable/2. Pure functions but for reading files and the OS environment.
-module(meshx_node_command).

-export([words/1, fill/2, find_program/2, absolute/1, read_file/1]).
-export([environment/2, is_harmless/1, native/1]).
-export_type([variables/0]).

-include_lib("kernel/include/file.hrl").

%% `false' removes the variable.
-type variables() :: [{Name :: binary(), Value :: binary() | false}].

-define(MAX_FILE, 1048576).

%% @doc Splits like a shell: white space separates, '...' is literal, "..." is one word in
%% which \ escapes " \ $ and `, elsewhere \ escapes any character. Nothing is expanded.
-spec words(binary()) -> {ok, [binary()]} | {error, unicode:chardata()}.
words(Text) -> between(Text, []).

between(<<C, Rest/binary>>, Words) when C =:= $\s; C =:= $\t; C =:= $\n; C =:= $\r ->
    between(Rest, Words);
between(<<>>, Words) ->
    {ok, lists:reverse(Words)};
between(Text, Words) ->
    word(Text, <<>>, Words).

word(<<"'", Rest/binary>>, Word, Words) ->
    case binary:split(Rest, <<"'">>) of
        [Literal, After] -> word(After, <<Word/binary, Literal/binary>>, Words);
        [_] -> {error, "a single quote is not closed"}
    end;
word(<<"\"", Rest/binary>>, Word, Words) ->
    quoted(Rest, Word, Words);
word(<<"\\", C, Rest/binary>>, Word, Words) ->
    word(Rest, <<Word/binary, C>>, Words);
word(<<"\\">>, _, _) ->
    {error, "a backslash stands at the end"};
word(<<C, _/binary>> = Text, Word, Words) when C =:= $\s; C =:= $\t; C =:= $\n; C =:= $\r ->
    between(Text, [Word | Words]);
word(<<C, Rest/binary>>, Word, Words) ->
    word(Rest, <<Word/binary, C>>, Words);
word(<<>>, Word, Words) ->
    {ok, lists:reverse(Words, [Word])}.

quoted(<<"\"", Rest/binary>>, Word, Words) ->
    word(Rest, Word, Words);
quoted(<<"\\", C, Rest/binary>>, Word, Words) when C =:= $"; C =:= $\\; C =:= $$; C =:= $` ->
    quoted(Rest, <<Word/binary, C>>, Words);
quoted(<<C, Rest/binary>>, Word, Words) ->
    quoted(Rest, <<Word/binary, C>>, Words);
quoted(<<>>, _, _) ->
    {error, "a double quote is not closed"}.

%% @doc Puts values in the place of {{name}}. Anything else of that form, also that of
%% MeshxConsul's templates ({{$port$}}), is an error that lists the names.
-spec fill(binary(), [{Name :: binary(), Value :: binary()}]) ->
    {ok, binary()} | {error, unicode:chardata()}.
fill(Text, Values) ->
    Parts = re:split(Text, "(\\{\\{ *\\$?[A-Za-z_]+\\$? *\\}\\})"),
    try
        {ok, iolist_to_binary([fill_part(Part, Values) || Part <- Parts])}
    catch
        throw:{unknown, Placeholder} ->
            Known = lists:join(", ", [["{{", Name, "}}"] || {Name, _} <- Values]),
            {error, ["unknown placeholder ", Placeholder, "; there are ", Known]}
    end.

fill_part(<<"{{", Rest/binary>> = Part, Values) ->
    case binary:split(Rest, <<"}}">>) of
        [Name, <<>>] ->
            case lists:keyfind(string:trim(Name), 1, Values) of
                {_, Value} -> Value;
                false -> throw({unknown, Part})
            end;
        _ ->
            Part
    end;
fill_part(Part, _) ->
    Part.

%% @doc The absolute file name of a program, looked up in Path ("dir:dir") unless its name
%% has a slash.
-spec find_program(binary(), Path :: binary()) -> {ok, binary()} | {error, unicode:chardata()}.
find_program(Name, Path) ->
    case binary:match(Name, <<"/">>) of
        nomatch ->
            Directories = binary:split(Path, <<":">>, [global]),
            case [File || Directory <- Directories, File <- candidate(Directory, Name)] of
                [First | _] -> {ok, First};
                [] -> {error, ["program ", Name, " is not found in PATH ", Path]}
            end;
        _ ->
            case is_program(Name) of
                true -> {ok, absolute(Name)};
                false -> {error, [Name, " is not an executable file"]}
            end
    end.

%% An empty directory in PATH is the current one.
candidate(<<>>, Name) ->
    candidate(<<".">>, Name);
candidate(Directory, Name) ->
    File = absolute(<<Directory/binary, $/, Name/binary>>),
    [File || is_program(File)].

%% @doc filename:absname/1 needs file_server.
-spec absolute(file:name_all()) -> file:name_all().
absolute(File) ->
    case filename:pathtype(File) of
        absolute ->
            File;
        _ ->
            {ok, Directory} = prim_file:get_cwd(),
            filename:join(Directory, File)
    end.

is_program(File) ->
    case file:read_file_info(File, [raw]) of
        {ok, #file_info{type = regular, mode = Mode}} -> Mode band 8#111 =/= 0;
        _ -> false
    end.

%% @doc What is in a file of at most 1 MiB.
-spec read_file(file:name_all()) -> {ok, binary()} | {error, unicode:chardata()}.
read_file(Name) ->
    case file:open(Name, [read, raw, binary]) of
        {ok, File} ->
            Read = file:read(File, ?MAX_FILE + 1),
            ok = file:close(File),
            case Read of
                {ok, Content} when byte_size(Content) =< ?MAX_FILE -> {ok, Content};
                {ok, _} -> {error, [Name, " is larger than 1 MiB"]};
                eof -> {ok, <<>>};
                {error, Reason} -> {error, [Name, ": ", file:format_error(Reason)]}
            end;
        {error, Reason} ->
            {error, [Name, ": ", file:format_error(Reason)]}
    end.

%% @doc The whole environment of the sidecar as "NAME=value": of the VM's only what is
%% harmless and of use, and Consul's own variables; then Consul, then Extra. So no
%% RELEASE_COOKIE or DATABASE_URL shows up in /proc of another program.
-spec environment(Consul :: variables(), Extra :: variables()) -> [binary()].
environment(Consul, Extra) ->
    Own = [{native(Name), native(Value)} || {Name, Value} <- os:env(), is_passed_on(Name)],
    Given = [{Name, given(Name, Value)} || {Name, Value} <- Consul],
    All = lists:foldl(
        fun({Name, Value}, Map) -> Map#{Name => Value} end, #{}, Own ++ Given ++ Extra
    ),
    [
        <<Name/binary, $=, Value/binary>>
     || {Name, Value} <- lists:sort(maps:to_list(All)), Value =/= false
    ].

%% The agent's address as consul understands what it is to us (c_src/core/endpoint.c): some versions
%% take a slash at the end for a part of the port, those that know a path want a scheme before it, and
%% all take port 80 where none is given.
given(<<"CONSUL_HTTP_ADDR">>, <<"unix://", _/binary>> = Address) ->
    Address;
given(<<"CONSUL_HTTP_ADDR">>, <<_, _/binary>> = Address) ->
    Trimmed = re:replace(Address, "(?<!/)/+$", "", [{return, binary}]),
    case re:run(Trimmed, "^([^:/]*|\\[[^]]*\\])(:[0-9]+)?(/.*)?$", [{capture, [1, 2, 3], binary}]) of
        {match, [Host, Port, Path]} ->
            Scheme = [<<"http://">> || Path =/= <<>>],
            iolist_to_binary([Scheme, Host, [<<":8500">> || Port =:= <<>>], Port, Path]);
        nomatch ->
            Trimmed
    end;
given(_, Value) ->
    Value.

is_passed_on("CONSUL_" ++ _) -> true;
is_passed_on(Name) -> is_harmless(Name).

%% @doc Whether a variable has a use for any program and no secret.
-spec is_harmless(string()) -> boolean().
is_harmless("LC_" ++ _) -> true;
is_harmless(Name) ->
    lists:member(Name, ["PATH", "HOME", "LANG", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR"]).

%% @doc The bytes of a text from the OS (environment, command line) as they were.
-spec native(string()) -> binary().
native(Text) ->
    case file:native_name_encoding() of
        latin1 -> list_to_binary(Text);
        utf8 -> <<_/binary>> = unicode:characters_to_binary(Text)
    end.
