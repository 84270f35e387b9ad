"""One episode's connection to an OpenEnv server."""

from __future__ import annotations

from typing import Any

from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.json_socket import JsonSocket
from icrl_megatron.utils.retries import PassingError

_FULL = "CAPACITY_REACHED"
"""The error of a server whose sessions are all in use."""


class OpenEnvSession:
    """The environment that the server keeps for one socket, and the first observation that it showed."""

    def __init__(self, socket: JsonSocket) -> None:
        self.socket, self.first = socket, ""

    async def call(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """The `data` of the answer; for an error, {"error": code, "message": text}. Raises EnvironmentFailure."""
        found = await self.socket.ask(kind, {"type": kind, "data": data})
        kept = found.get("data")
        if not isinstance(kept, dict) or (found.get("type") == "error" and not {"code", "message"} <= set(kept)):
            raise self.socket.bad(found)
        if found.get("type") == "error":
            return {"error": str(kept["code"]), "message": f"{kept['message']} {kept.get('errors', '')}".strip()}
        return kept

    async def done(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """As `call`. An error is the environment's: raises PassingError if no session is free, else
        EnvironmentFailure."""
        answer = await self.call(kind, data)
        if "error" not in answer:
            return answer
        failure = self.failure(kind, answer)
        raise PassingError(str(failure)) if answer["error"] == _FULL else failure

    def failure(self, kind: str, answer: dict[str, Any]) -> EnvironmentFailure:
        """What an error of `call` means if the model did not cause it."""
        return EnvironmentFailure(
            f"{self.socket.where} answered a {kind} with {answer['error']}: {answer['message'][:300]}"
        )
