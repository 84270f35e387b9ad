"""What processes share that answer a line of JSON with a line of JSON (the other side is `Worker` of grader.py).

`python -P line_worker.py icrl_megatron.tasks.verifiers_worker` serves the `answer` of that module in any interpreter,
also in one that has none of our requirements: this file, and what it serves, import only each other, the standard
library and the environment's package.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

Json = dict[str, Any]
Opened = TypeVar("Opened")
ERROR_CHARS = 900


class JobRefused(Exception):
    """A job that cannot be done, in words that need no name of an exception."""


class OpenEpisodes(Generic[Opened]):
    """What a process holds for each episode, by the number that our side gave it (`ProcessEpisode`)."""

    def __init__(self, close: Callable[[Opened], Awaitable[None]]) -> None:
        self._open: dict[int, Opened] = {}
        self._close = close

    async def end(self, *numbers: int) -> None:
        for number in numbers:
            if (opened := self._open.pop(number, None)) is not None:
                await self._close(opened)

    async def begin(self, number: int, opened: Opened) -> None:
        await self.end(number)
        self._open[number] = opened

    def get(self, number: int) -> Opened | None:
        return self._open.get(number)

    def __getitem__(self, number: int) -> Opened:
        """Raises JobRefused if this process does not hold the episode."""
        if number not in self._open:
            raise JobRefused("this process was restarted and lost its episodes")
        return self._open[number]


def own_streams() -> tuple[TextIO, TextIO]:
    """The streams of the protocol: jobs, and answers. Code that prints or reads input must not reach them."""
    jobs, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return jobs, answers


async def serve(answer: Callable[[Json], Awaitable[Json]], streams: tuple[TextIO, TextIO]) -> None:
    """Answers jobs until there are no more. An exception is an answer: {"error": text}."""
    (jobs, answers), found = streams, Json(ready=True)
    while True:
        print(json.dumps(found), file=answers, flush=True)
        if not (line := await asyncio.to_thread(jobs.readline)):
            return
        try:
            found = await answer(json.loads(line))
        except JobRefused as error:
            found = {"error": str(error)}
        except Exception as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            found = {"error": f"{type(error).__name__}: {error}{cause}"[:ERROR_CHARS]}


def module_alone(name: str) -> Any:
    """Imports a module of this package without the rest of the package and without its requirements. Its folder is not
    searched for other modules, because other packages have modules of the same names as files in it."""
    package = name.partition(".")[0]
    alone = types.ModuleType(package)
    alone.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules[package] = alone
    return importlib.import_module(name)


def main(name: str) -> None:
    streams = own_streams()
    sys.path.append("")  # the folder in which the command runs
    asyncio.run(serve(module_alone(name).answer, streams))


if __name__ == "__main__":
    main(sys.argv[1])
