"""Runs an environment of the package verifiers, in the interpreter that has it: `python -P verifiers_worker.py`.

Reads one JSON job per line and answers with one line: {"do": "load", "environment": "wordle", "args": {}}, {"do":
"rows", "split": "train", "first": 0, "end": 100}, {"do": "reset", "env": 3, "split": "train", "row": 7, "digest": ...},
{"do": "step", "env": 3, "reply": "...", "calls": [], "last": false}; each with "left": [1, 2], the episodes that are
over. The environment's own `run_rollout` plays and scores; its model is a client that waits for our steps. This file
imports nothing of icrl_megatron, so that the interpreter needs only the environment.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import importlib
import json
import logging
import os
import sys
from typing import Any

Json = dict[str, Any]
FAULT = "Error calling reward function "
RAISED: contextvars.ContextVar[list[str]] = contextvars.ContextVar("raised")
"""What verifiers logged in a rollout when a reward function raised. It would count as a reward of 0."""


class Faults(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(FAULT):
            RAISED.get([]).append(record.getMessage().removeprefix(FAULT))


class Waiting:
    """The client of one rollout: it asks our side for replies."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[list[Json], list[Json]]] = asyncio.Queue()
        self.replies: asyncio.Queue[Json | None] = asyncio.Queue()

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        from verifiers import errors, types

        schemas = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools or []]
        self.asked.put_nowait((list(map(plain, prompt)), schemas))
        reply = await self.replies.get()
        if reply is None:  # as verifiers ends a rollout whose context is full
            raise errors.OverlongPromptError("the attempt has no more turns")
        calls = [types.ToolCall(**call) for call in reply.get("tool_calls", ())]
        said = types.ResponseMessage(
            content=reply["content"], tool_calls=calls or None, finish_reason="stop", is_truncated=False
        )
        return types.Response(id="reply", created=0, model=model, message=said)


class VerifiersEpisode:
    """An episode between the environment's rollout and our steps."""

    def __init__(self, environment: Any, row: Json) -> None:
        self._client, self._raised = Waiting(), list[str]()
        names, weights = environment.rubric._get_reward_func_names(), environment.rubric._get_reward_weights()
        self._weights = dict(zip(names, weights, strict=True))
        self._seen: list[Json] = []
        """The conversation as the environment last sent it, with our last reply."""
        RAISED.set(self._raised)
        self._task = asyncio.create_task(environment.run_rollout(row, self._client, "policy", {}))

    def say(self, text: str, calls: list[Json]) -> None:
        made = [
            {"id": f"call_{len(self._seen)}_{i}", "name": call["name"], "arguments": json.dumps(call["arguments"])}
            for i, call in enumerate(calls)
        ]
        said = {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}
        self._seen.append(said)
        self._client.replies.put_nowait(said)

    async def observed(self, last: bool = False) -> Json:
        """Waits until the rollout asks for a reply or is over. `last`: it gets no more replies, so that it is scored.
        Raises what the rollout raises."""
        asking = asyncio.create_task(self._client.asked.get())
        await asyncio.wait({asking, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            asking.cancel()
            return self._ended(await self._task)
        messages, tools = asking.result()
        new = messages[len(self._seen) :] if messages[: len(self._seen)] == self._seen else messages
        self._seen = messages
        if not last:
            return {"observation": shown(new), "tools": tools, "done": False}
        self._client.replies.put_nowait(None)
        return {**self._ended(await self._task), "observation": shown(new)}

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    def _ended(self, output: Json) -> Json:
        if error := output.get("error"):
            raise RuntimeError(f"the rollout ended with {error}")
        if output.get("stop_condition") == "timeout_reached":
            raise RuntimeError("the rollout ended at the environment's own timeout_seconds")
        if bad := [text for text in self._raised if self._weights.get(text.partition(":")[0], 1.0)]:
            raise RuntimeError(f"its reward function {bad[0]}")
        said = output.get("completion") or []
        after = max((i + 1 for i, message in enumerate(said) if message["role"] == "assistant"), default=0)
        final = shown(list(map(plain, said[after:])))
        return {"observation": final, "done": True, "reward": output["reward"], "metrics": output["metrics"]}


class Episodes:
    """The environment and its open episodes, by the number that our side gave them."""

    def __init__(self) -> None:
        self._environment: Any = None
        self._open: dict[int, VerifiersEpisode] = {}
        self._data: dict[str, Any] = {}

    async def answer(self, job: Json) -> Json:
        for left in job["left"]:
            await self._close(left)
        if job["do"] == "load":
            return self._load(job["environment"], job["args"])
        if job["do"] == "rows":
            return {"rows": [digest(self._data[job["split"]][i]) for i in range(job["first"], job["end"])]}
        if job["do"] == "reset":
            await self._close(job["env"])
            row = self._data[job["split"]][job["row"]]
            if digest(row) != job["digest"]:
                return {"error": f"row {job['row']} of its dataset has changed; give the environment's args a seed"}
            self._open[job["env"]] = VerifiersEpisode(self._environment, row)
        elif job["env"] not in self._open:
            return {"error": "this process was restarted and lost its episodes"}
        else:
            self._open[job["env"]].say(job["reply"], job["calls"])
        return await self._open[job["env"]].observed(job.get("last", False))

    def _load(self, name: str, args: Json) -> Json:
        module, _, named = name.partition(":")
        make = getattr(importlib.import_module(module), named) if named else None
        verifiers = importlib.import_module("verifiers")
        clients = importlib.import_module("verifiers.clients")  # sets up the package's log, without our handler
        clients.Client.register(Waiting)
        logging.getLogger("verifiers").addHandler(Faults())
        self._environment = made = make(**args) if make else verifiers.load_environment(name, **args)
        if made.requires_group_rollouts or not any(made.rubric._get_reward_weights()):
            return {"error": "its rubric has no reward functions that score one attempt alone"}
        self._data = {"train": made.get_dataset(), "heldout": made.get_eval_dataset()}
        return {split: len(data) for split, data in self._data.items()}

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


def digest(row: Json) -> str:
    """What tells one problem from another: all of its row except for its number."""
    content = json.dumps({k: v for k, v in row.items() if k != "example_id"}, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(errors="replace"), digest_size=12).hexdigest()


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
