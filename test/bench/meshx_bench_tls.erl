%% What inet_tls needs: a file of options for both ends, with certificates made for this run. As
%% in the mesh, both sides show a certificate, and each demands the other's.
-module(meshx_bench_tls).

-export([options_file/1]).

-include_lib("public_key/include/public_key.hrl").

%% Written to a folder; returns the file.
-spec options_file(file:filename()) -> file:filename().
options_file(Directory) ->
    {ok, Host} = inet:gethostname(),
    Names = #'Extension'{extnID = ?'id-ce-subjectAltName', extnValue = [{dNSName, Host}], critical = false},
    %% As Consul's certificates: elliptic curve P-256.
    Key = {key, {namedCurve, secp256r1}},
    Chain = #{root => [Key], intermediates => [], peer => [Key, {extensions, [Names]}]},
    #{server_config := Server, client_config := Client} =
        public_key:pkix_test_data(#{server_chain => Chain, client_chain => Chain}),
    Both = [{versions, ['tlsv1.3']}, {verify, verify_peer}],
    File = filename:join(Directory, "tls_options"),
    Options = [
        {server, Both ++ [{fail_if_no_peer_cert, true} | Server]},
        {client, Both ++ Client}
    ],
    ok = file:write_file(File, io_lib:format("~p.~n", [Options])),
    File.
