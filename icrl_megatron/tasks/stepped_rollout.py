"""Turns a rollout that a package plays by itself into steps of our side: its model waits for our replies.

Imported by processes that have only the package (`line_worker.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

Json = dict[str, Any]


class WaitingModel:
    """The model of one rollout: our side writes its replies."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[list[Json], list[Json]]] = asyncio.Queue()
        self.replies: asyncio.Queue[Json | None] = asyncio.Queue()

    async def reply(self, messages: list[Json], tools: list[Json]) -> Json | None:
        """`messages`: {"role", "content", "tool_calls"}; `tools`: {"name", "description", "parameters"}. Returns a
        message, or None if the attempt has no more turns."""
        self.asked.put_nowait((list(map(plain, messages)), tools))
        return await self.replies.get()


class SteppedRollout:
    """An episode between the package's rollout and our steps."""

    def __init__(self, play: Callable[[WaitingModel], Coroutine[Any, Any, Json]]) -> None:
        """`play` plays and scores one attempt: {"completion": messages, "reward", "metrics"}. It raises what costs the
        episode."""
        self._model = WaitingModel()
        self._seen: list[Json] = []
        """The conversation as the package last sent it, with our last reply."""
        self._task = asyncio.create_task(play(self._model))

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
