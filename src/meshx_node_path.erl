%% Where our own files are: also under `-pa', where code:priv_dir/1 knows no application.
-module(meshx_node_path).

-export([priv_dir/0]).

-spec priv_dir() -> file:filename().
priv_dir() ->
    case code:priv_dir(meshx_node) of
        {error, bad_name} ->
            Ebin = filename:dirname(code:which(?MODULE)),
            filename:join(filename:dirname(Ebin), "priv");
        Dir ->
            Dir
    end.
