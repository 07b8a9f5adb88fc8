%% Node name -> Name of the Consul service that stands for it.
%%
%% Every node of a cluster must use the same mapping: a node finds another one by mapping
%% the other's name itself. The node name also stands in the service's Meta and is compared
%% on lookup, so a collision of two names can't connect to the wrong node; what it would
%% mix up are intentions. Pure functions, no process.
-module(meshx_node_name).

-export([service_id/1, service_name/2, check_own/2, sha256/1]).
-export_type([mapping/0]).

-type name() :: unicode:chardata() | atom().
-type mapping() ::
    node
    | dns
    | {Module :: module(), Function :: atom()}
    | fun((node()) -> name()).

%% Longest Name tried with real sidecars (longer ones are accepted by the agent).
-define(MAX_SIZE, 200).
%% So that 10 digits, and "-sidecar-proxy" after them, still make a DNS label of 63 bytes.
-define(MAX_PREFIX, 36).

%% @doc The service's ID: the node name as far as it can be one. Consul's catalog takes IDs that
%% differ only in case for one, its proxy does not find those with capitals, and a '/' ends one.
-spec service_id(node()) -> binary().
service_id(Node) ->
    Full = atom_to_binary(Node),
    case re:run(Full, "^[a-z0-9@._:-]+$", [dollar_endonly]) of
        {match, _} -> Full;
        nomatch -> label(Full)
    end.

%% @doc The service's Name. Only a function's result can be wrong; that is an error with a
%% text for people.
-spec service_name(node(), mapping()) -> {ok, binary()} | {error, unicode:chardata()}.
service_name(Node, node) ->
    {ok, atom_to_binary(Node)};
service_name(Node, dns) ->
    {ok, label(atom_to_binary(Node))};
service_name(Node, {Module, Function}) ->
    call(Node, fun() -> Module:Function(Node) end);
service_name(Node, Function) when is_function(Function, 1) ->
    call(Node, fun() -> Function(Node) end).

%% @doc Whether the node may register under this Name, which service_name/2 made. A node
%% name that Consul can't carry is found here, before anything is registered.
-spec check_own(binary(), mapping()) -> ok | {error, unicode:chardata()}.
check_own(Name, node) ->
    case re:run(Name, "^[A-Za-z0-9@._:-]+$", [dollar_endonly]) of
        {match, _} when byte_size(Name) =< ?MAX_SIZE -> ok;
        _ ->
            Format =
                "node name ~ts can't be a Consul service name (1 to ~b of A-Z a-z 0-9 @ . _ : -); "
                "use service_name dns, on all nodes",
            {error, io_lib:format(Format, [Name, ?MAX_SIZE])}
    end;
check_own(_, _) ->
    ok.

call(Node, Call) ->
    try Call() of
        Result ->
            case check(Result) of
                {ok, Name} ->
                    {ok, Name};
                error ->
                    Format =
                        "the function returned ~0tP for ~ts; allowed are 1 to ~b characters "
                        "a-z 0-9 @ . _ : -",
                    {error, io_lib:format(Format, [Result, 20, Node, ?MAX_SIZE])}
            end
    catch
        Class:Reason ->
            Format = "the function failed for ~ts: ~0tP:~0tP",
            {error, io_lib:format(Format, [Node, Class, 5, Reason, 20])}
    end.

%% Upper case is refused: discovery ignores case, intentions don't, so a deny rule could
%% miss. '/' makes a certificate impossible, '*' is a wildcard of intentions.
check(Atom) when is_atom(Atom) ->
    check(atom_to_binary(Atom));
check(Text) ->
    try unicode:characters_to_binary(Text) of
        Name when is_binary(Name), byte_size(Name) =< ?MAX_SIZE ->
            case re:run(Name, "^[a-z0-9@._:-]+$", [dollar_endonly]) of
                {match, _} -> {ok, Name};
                nomatch -> error
            end;
        _ ->
            error
    catch
        error:badarg -> error
    end.

%% "node1@my.host" -> "node1-at-my-host-da2a8f80aa": readable, a DNS label whatever the
%% name is, and told apart by the digest of the whole name (case and all):
%%   printf %s node1@my.host | sha256sum | cut -c1-10
label(Full) ->
    Lower = <<<<(lower(C))>> || <<C>> <= Full>>,
    Spelled = binary:replace(Lower, <<"@">>, <<"-at-">>, [global]),
    Dashed = re:replace(Spelled, "[^a-z0-9]+", "-", [global, {return, binary}]),
    Short = trim(cut(trim(Dashed))),
    <<Digest:40, _/bitstring>> = sha256(Full),
    iolist_to_binary([Short, $-, io_lib:format("~10.16.0b", [Digest])]).

lower(C) when C >= $A, C =< $Z -> C + 32;
lower(C) -> C.

cut(<<Prefix:?MAX_PREFIX/binary, _/binary>>) -> Prefix;
cut(Short) -> Short.

trim(Text) ->
    case string:trim(Text, both, "-") of
        <<>> -> <<"node">>;
        Trimmed -> Trimmed
    end.

%% @doc SHA-256 (FIPS 180-4). Not crypto:hash/2, because crypto may be absent or its NIF
%% not loadable when a node starts at boot, and the names must not depend on that. A name
%% takes one or two blocks of 64 bytes.
-spec sha256(binary()) -> binary().
sha256(Data) ->
    Size = bit_size(Data),
    Zeros = 511 - (Size + 64) rem 512,
    State = blocks(<<Data/binary, 1:1, 0:Zeros, Size:64>>, initial_state()),
    <<<<Word:32>> || Word <- State>>.

blocks(<<Block:64/binary, Rest/binary>>, State) ->
    Rounds = rounds(round_constants(), [Word || <<Word:32>> <= Block], State),
    blocks(Rest, lists:zipwith(fun add/2, State, Rounds));
blocks(<<>>, State) ->
    State.

%% The list of words is a window of the 16 next ones of the message schedule.
rounds([K | Ks], [W | Window], [A, B, C, D, E, F, G, H]) ->
    Choice = (E band F) bxor (bnot E band G),
    Majority = (A band B) bxor (A band C) bxor (B band C),
    T1 = H + (rotate(E, 6) bxor rotate(E, 11) bxor rotate(E, 25)) + Choice + K + W,
    T2 = (rotate(A, 2) bxor rotate(A, 13) bxor rotate(A, 22)) + Majority,
    W1 = hd(Window),
    W9 = lists:nth(9, Window),
    W14 = lists:nth(14, Window),
    Sigma0 = rotate(W1, 7) bxor rotate(W1, 18) bxor (W1 bsr 3),
    Sigma1 = rotate(W14, 17) bxor rotate(W14, 19) bxor (W14 bsr 10),
    Next = add(W + Sigma0 + W9, Sigma1),
    rounds(Ks, Window ++ [Next], [add(T1, T2), A, B, C, add(D, T1), E, F, G]);
rounds([], _, State) ->
    State.

add(X, Y) -> (X + Y) band 16#FFFFFFFF.

rotate(X, N) -> (X bsr N) bor ((X bsl (32 - N)) band 16#FFFFFFFF).

initial_state() ->
    [
        16#6A09E667, 16#BB67AE85, 16#3C6EF372, 16#A54FF53A,
        16#510E527F, 16#9B05688C, 16#1F83D9AB, 16#5BE0CD19
    ].

round_constants() ->
    [
        16#428A2F98, 16#71374491, 16#B5C0FBCF, 16#E9B5DBA5, 16#3956C25B, 16#59F111F1,
        16#923F82A4, 16#AB1C5ED5, 16#D807AA98, 16#12835B01, 16#243185BE, 16#550C7DC3,
        16#72BE5D74, 16#80DEB1FE, 16#9BDC06A7, 16#C19BF174, 16#E49B69C1, 16#EFBE4786,
        16#0FC19DC6, 16#240CA1CC, 16#2DE92C6F, 16#4A7484AA, 16#5CB0A9DC, 16#76F988DA,
        16#983E5152, 16#A831C66D, 16#B00327C8, 16#BF597FC7, 16#C6E00BF3, 16#D5A79147,
        16#06CA6351, 16#14292967, 16#27B70A85, 16#2E1B2138, 16#4D2C6DFC, 16#53380D13,
        16#650A7354, 16#766A0ABB, 16#81C2C92E, 16#92722C85, 16#A2BFE8A1, 16#A81A664B,
        16#C24B8B70, 16#C76C51A3, 16#D192E819, 16#D6990624, 16#F40E3585, 16#106AA070,
        16#19A4C116, 16#1E376C08, 16#2748774C, 16#34B0BCB5, 16#391C0CB3, 16#4ED8AA4A,
        16#5B9CCA4F, 16#682E6FF3, 16#748F82EE, 16#78A5636F, 16#84C87814, 16#8CC70208,
        16#90BEFFFA, 16#A4506CEB, 16#BEF9A3F7, 16#C67178F2
    ].
