"""Environments of verifiers up to 0.3, whose `load_environment` makes them; verifiers_worker.py imports this file."""

from __future__ import annotations

import contextvars
import importlib
import logging
from typing import Any

from icrl_megatron.tasks.stepped_rollout import WaitingModel

Json = dict[str, Any]
FAULT = "Error calling reward function "
RAISED: contextvars.ContextVar[list[str]] = contextvars.ContextVar("raised")
"""What verifiers logged in a rollout when a reward function raised. It would count as a reward of 0."""


class Faults(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(FAULT):
            RAISED.get([]).append(record.getMessage().removeprefix(FAULT))


class Client:
    """The client of one rollout."""

    def __init__(self, model: WaitingModel) -> None:
        self._model = model

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        from verifiers import errors, types

        schemas = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools or []]
        reply = await self._model.reply(prompt, schemas)
        if reply is None:  # as verifiers ends a rollout whose context is full
            raise errors.OverlongPromptError("the attempt has no more turns")
        calls = [types.ToolCall(**call) for call in reply.get("tool_calls", ())]
        said = types.ResponseMessage(
            content=reply["content"], tool_calls=calls or None, finish_reason="stop", is_truncated=False
        )
        return types.Response(id="reply", created=0, model=model, message=said)


class LoadedV0:
    endless = False

    def __init__(self, made: Any) -> None:
        if made.requires_group_rollouts or not any(made.rubric._get_reward_weights()):
            raise ValueError("its rubric has no reward functions that score one attempt alone")
        self._made, self.data = made, {"train": made.get_dataset(), "heldout": made.get_eval_dataset()}
        names, weights = made.rubric._get_reward_func_names(), made.rubric._get_reward_weights()
        self._weights = dict(zip(names, weights, strict=True))

    def content(self, row: Json) -> Json:
        """All of the row except for its number."""
        return {name: value for name, value in row.items() if name != "example_id"}

    async def play(self, row: Json, model: WaitingModel) -> Json:
        RAISED.set(raised := list[str]())
        output = await self._made.run_rollout(row, Client(model), "policy", {})
        if error := output.get("error"):
            raise RuntimeError(f"the rollout ended with {error}")
        if output.get("stop_condition") == "timeout_reached":
            raise RuntimeError("the rollout ended at the environment's own timeout_seconds")
        if bad := [text for text in raised if self._weights.get(text.partition(":")[0], 1.0)]:
            raise RuntimeError(f"its reward function {bad[0]}")
        return {"completion": output.get("completion") or [], "reward": output["reward"], "metrics": output["metrics"]}


async def load(name: str, args: Json, make: Any) -> LoadedV0:
    """`name`: the id of an environment. `make`: called instead, where its function was named."""
    verifiers = importlib.import_module("verifiers")
    clients = importlib.import_module("verifiers.clients")  # sets up the package's log, without our handler
    clients.Client.register(Client)
    logging.getLogger("verifiers").addHandler(Faults())
    return LoadedV0(make(**args) if make else verifiers.load_environment(name, **args))
