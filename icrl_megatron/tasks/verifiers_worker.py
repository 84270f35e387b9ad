"""Runs an environment of the package verifiers, in the interpreter that has it: `python -P verifiers_worker.py`.

Reads one JSON job per line and answers with one line: {"do": "load", "environment": "wordle", "args": {}}, {"do":
"rows", "split": "train", "first": 0, "end": 100}, {"do": "reset", "env": 3, "split": "train", "row": 7, "digest": ...},
{"do": "step", "env": 3, "reply": "...", "calls": [], "last": false}; each with "left": [1, 2], the episodes that are
over. The environment's own rollout plays and scores; its model waits for our steps. verifiers_v0.py and verifiers_v1.py
know the two APIs of the package. None of the three files imports anything of icrl_megatron, so that the interpreter
needs only the environment.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Json = dict[str, Any]
TESTED = "0.3.1 and 0.4.0"


class LoadedEnvironment(Protocol):
    """What verifiers_v0.py and verifiers_v1.py make with `load`."""

    data: dict[str, Sequence[Any]]
    """The rows of each split. `endless`: they have no number."""
    endless: bool

    def content(self, row: Any) -> Json:
        """What tells a row from others."""
        ...

    async def play(self, row: Any, model: Waiting) -> Json:
        """Plays and scores a row: {"completion": messages, "reward", "metrics"}. Raises what costs the episode."""
        ...


class Waiting:
    """The model of one rollout: our side writes its replies."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[list[Json], list[Json]]] = asyncio.Queue()
        self.replies: asyncio.Queue[Json | None] = asyncio.Queue()

    async def reply(self, messages: list[Json], tools: list[Json]) -> Json | None:
        """`messages`: {"role", "content", "tool_calls"}; `tools`: {"name", "description", "parameters"}. Returns a
        message, or None if the attempt has no more turns."""
        self.asked.put_nowait((list(map(plain, messages)), tools))
        return await self.replies.get()


class VerifiersEpisode:
    """An episode between the environment's rollout and our steps."""

    def __init__(self, environment: LoadedEnvironment, row: Any) -> None:
        self._model = Waiting()
        self._seen: list[Json] = []
        """The conversation as the environment last sent it, with our last reply."""
        self._task = asyncio.create_task(environment.play(row, self._model))

    def say(self, text: str, calls: list[Json]) -> None:
        made = [
            {"id": f"call_{len(self._seen)}_{i}", "name": call["name"], "arguments": json.dumps(call["arguments"])}
            for i, call in enumerate(calls)
        ]
        said = {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}
        self._seen.append(said)
        self._model.replies.put_nowait(said)

    async def observed(self, last: bool = False) -> Json:
        """Waits until the rollout asks for a reply or is over. `last`: it gets no more replies, so that it is scored.
        Raises what the rollout raises."""
        asking = asyncio.create_task(self._model.asked.get())
        await asyncio.wait({asking, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            asking.cancel()
            return self._ended(await self._task)
        messages, tools = asking.result()
        new = messages[len(self._seen) :] if messages[: len(self._seen)] == self._seen else messages
        self._seen = messages
        if not last:
            return {"observation": shown(new), "tools": tools, "done": False}
        self._model.replies.put_nowait(None)
        return {**self._ended(await self._task), "observation": shown(new)}

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    def _ended(self, output: Json) -> Json:
        said = output["completion"]
        after = max((i + 1 for i, message in enumerate(said) if message["role"] == "assistant"), default=0)
        final = shown(list(map(plain, said[after:])))
        return {"observation": final, "done": True, "reward": output["reward"], "metrics": output["metrics"]}


class Episodes:
    """The environment and its open episodes, by the number that our side gave them."""

    def __init__(self) -> None:
        self._environment: LoadedEnvironment
        self._open: dict[int, VerifiersEpisode] = {}

    async def answer(self, job: Json) -> Json:
        for left in job["left"]:
            await self._close(left)
        if job["do"] == "load":
            return await self._load(job["environment"], job["args"])
        if job["do"] == "rows":
            rows = self._environment.data[job["split"]]
            return {"rows": [self._digest(rows[i]) for i in range(job["first"], job["end"])]}
        if job["do"] == "reset":
            await self._close(job["env"])
            row = self._environment.data[job["split"]][job["row"]]
            if self._digest(row) != job["digest"]:
                return {"error": f"row {job['row']} of its dataset has changed; give the environment's args a seed"}
            self._open[job["env"]] = VerifiersEpisode(self._environment, row)
        elif job["env"] not in self._open:
            return {"error": "this process was restarted and lost its episodes"}
        else:
            self._open[job["env"]].say(job["reply"], job["calls"])
        return await self._open[job["env"]].observed(job.get("last", False))

    async def _load(self, name: str, args: Json) -> Json:
        module, _, named = name.partition(":")
        make = getattr(importlib.import_module(module), named) if named else None
        verifiers = importlib.import_module("verifiers")
        try:
            api = sibling("verifiers_v0" if hasattr(verifiers, "load_environment") else "verifiers_v1")
            self._environment = await api.load(name, args, make)
        except (ImportError, AttributeError) as error:
            has = getattr(verifiers, "__version__", "?")
            raise type(error)(f"{error} (with verifiers {has}; tested are {TESTED})") from None
        ends = not self._environment.endless
        return {split: len(data) if ends else None for split, data in self._environment.data.items()}

    def _digest(self, row: Any) -> str:
        content = json.dumps(self._environment.content(row), sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(errors="replace"), digest_size=12).hexdigest()

    async def _close(self, number: int) -> None:
        if conversation := self._open.pop(number, None):
            await conversation.close()


def plain(message: Any) -> Json:
    """A message with what is compared and shown of it. Raises ValueError for images and sounds."""
    given = message if isinstance(message, dict) else message.model_dump()
    content = given.get("content") or ""
    if not isinstance(content, str):
        if other := [part["type"] for part in content if part["type"] != "text"]:
            raise ValueError(f"a message has a part of type {other[0]}, but the model reads only text")
        content = "".join(part["text"] for part in content)
    calls = [{name: call[name] for name in ("id", "name", "arguments")} for call in given.get("tool_calls") or ()]
    return {"role": given["role"], "content": content, **({"tool_calls": calls} if calls else {})}


def shown(messages: list[Json]) -> str:
    """The text that the solver reads. In a prompt with examples of a conversation, messages have their roles."""
    several = any(message["role"] == "assistant" for message in messages)
    texts = [f"{m['role'].title()}: {m['content']}" if several else m["content"] for m in messages]
    return "\n\n".join(text for text in texts if text)


def sibling(name: str) -> Any:
    """A file beside this one. Its folder is not searched for modules, because other packages have modules of the same
    names as files in it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def main() -> None:
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the environment must not reach the streams of the protocol
    os.dup2(2, 1)
    sys.path.append("")  # the folder in which the command runs
    episodes, answer = Episodes(), Json(ready=True)
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        if not (line := await asyncio.to_thread(jobs.readline)):
            return
        try:
            answer = await episodes.answer(json.loads(line))
        except Exception as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            answer = {"error": f"{type(error).__name__}: {error}{cause}"[:900]}


if __name__ == "__main__":
    asyncio.run(main())
