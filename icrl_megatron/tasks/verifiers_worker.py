"""Runs an environment of the package verifiers, in the interpreter that has it (`line_worker.py`).

Jobs: {"do": "load", "environment": "wordle", "args": {}}, {"do": "rows", "split": "train", "first": 0, "end": 100},
{"do": "reset", "env": 3, "split": "train", "row": 7, "digest": ...}, {"do": "step", "env": 3, "reply": "...", "calls":
[], "last": false}; each with "left": [1, 2], the episodes that are over. The environment's own rollout plays and
scores. verifiers_v0.py and verifiers_v1.py know the two APIs of the package.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from icrl_megatron.tasks.line_worker import JobRefused, Json, OpenEpisodes
from icrl_megatron.tasks.stepped_rollout import SteppedRollout, WaitingModel

TESTED = "0.3.1 and 0.4.0"


class LoadedEnvironment(Protocol):
    """What verifiers_v0.py and verifiers_v1.py make with `load`."""

    data: dict[str, Sequence[Any]]
    """The rows of each split. `endless`: they have no number."""
    endless: bool

    def content(self, row: Any) -> Json:
        """What tells a row from others."""
        ...

    async def play(self, row: Any, model: WaitingModel) -> Json:
        """As `SteppedRollout` takes it."""
        ...


class VerifiersEpisodes:
    """The environment and its open episodes."""

    def __init__(self) -> None:
        self._environment: LoadedEnvironment
        self._open = OpenEpisodes(SteppedRollout.close)

    async def answer(self, job: Json) -> Json:
        await self._open.end(*job["left"])
        if job["do"] == "load":
            return await self.load(job["environment"], job["args"])
        if job["do"] == "rows":
            rows = self._environment.data[job["split"]]
            return {"rows": [self._digest(rows[i]) for i in range(job["first"], job["end"])]}
        if job["do"] == "reset":
            row = self._environment.data[job["split"]][job["row"]]
            if self._digest(row) != job["digest"]:
                raise JobRefused(f"row {job['row']} of its dataset has changed; give the environment's args a seed")
            await self._open.begin(job["env"], SteppedRollout(partial(self._environment.play, row)))
        else:
            self._open[job["env"]].say(job["reply"], job["calls"])
        return await self._open[job["env"]].observed(job.get("last", False))

    async def load(self, name: str, args: Json) -> Json:
        """The number of rows of each split; None: without end."""
        module, _, named = name.partition(":")
        make = getattr(importlib.import_module(module), named) if named else None
        verifiers = importlib.import_module("verifiers")
        try:
            api = "verifiers_v0" if hasattr(verifiers, "load_environment") else "verifiers_v1"
            self._environment = await importlib.import_module(f"icrl_megatron.tasks.{api}").load(name, args, make)
        except (ImportError, AttributeError) as error:
            has = getattr(verifiers, "__version__", "?")
            raise type(error)(f"{error} (with verifiers {has}; tested are {TESTED})") from None
        ends = not self._environment.endless
        return {split: len(data) if ends else None for split, data in self._environment.data.items()}

    def _digest(self, row: Any) -> str:
        content = json.dumps(self._environment.content(row), sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(errors="replace"), digest_size=12).hexdigest()


answer = VerifiersEpisodes().answer
