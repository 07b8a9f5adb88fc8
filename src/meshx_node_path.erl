%% Where our own files are: also under `-pa', where code:priv_dir/1 knows no application.
-module(meshx_node_path).

-export([priv_dir/0]).

-spec priv_dir() -> string().
priv_dir() ->
    case code:priv_dir(meshx_node) of
        {error, bad_name} ->
            {file, Beam} = code:is_loaded(?MODULE),
            Ebin = filename:dirname(Beam),
            unicode:characters_to_list(filename:join(filename:dirname(Ebin), "priv"));
        Dir ->
            unicode:characters_to_list(Dir)
    end.
