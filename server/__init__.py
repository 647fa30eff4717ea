"""Wires and words around the runtime: gRPC, CLI, metrics. Its name is loramux.server."""

if __name__ == "server":
    # Under a second name there would be a second class of every error, which no `except` knows.
    raise ImportError(
        "import loramux.server instead of server; a command installed by an older version "
        "is made anew by pip install -e ."
    )
