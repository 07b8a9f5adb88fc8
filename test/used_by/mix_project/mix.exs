defmodule UsesMeshxNode.MixProject do
  use Mix.Project

  def project do
    [
      app: :uses_meshx_node,
      version: "0.1.0",
      deps: [
        {{dependency}}
      ]
    ]
  end

  def application do
    [extra_applications: [:logger]]
  end
end
