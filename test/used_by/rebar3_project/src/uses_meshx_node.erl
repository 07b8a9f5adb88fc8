-module(uses_meshx_node).

-export([answer/1]).

%% What nodes spawn on each other: tells Asker where it runs.
answer(Asker) ->
    Asker ! {this_is, node()}.
