"""The commands of `icrl` about servers of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def env_check(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of an AgentGym server, e.g. http://host:36001.")],
    kind: Annotated[str, typer.Option(help="The expected environment; detected by default.")] = "",
    task: Annotated[int, typer.Option(help="Id of the task whose first step is played.")] = 0,
    timeout: Annotated[float, typer.Option(help="Maximum seconds per call.")] = 30.0,
) -> None:
    """Play the beginning of an episode on a server, and print what the server is."""
    from icrl_megatron.tasks.env_check import check

    raise typer.Exit(check(url, kind, task, timeout))


def serve_search(
    corpus: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="JSONL of documents, as data.corpus (docs/TASKS.md).")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
) -> None:
    """Serve BM25 searches of a corpus through the API of Search-R1's retriever, for data.servers of an entry."""
    from icrl_megatron.tasks.serve_search import serve

    serve(corpus, host, port)
