defmodule UsesMeshxNode do
  @doc "What nodes spawn on each other: tells `asker` where it runs."
  def answer(asker) do
    send(asker, {:this_is, Node.self()})
  end
end
