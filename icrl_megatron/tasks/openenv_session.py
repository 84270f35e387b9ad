"""One episode's connection to an OpenEnv server: a WebSocket, whose environment the server keeps until it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import aiohttp

from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, shown
from icrl_megatron.tasks.servers import EnvironmentServer
from icrl_megatron.utils.retries import PassingError

_FULL = "CAPACITY_REACHED"
"""The error of a server whose sessions are all in use."""


class OpenEnvSession:
    """One WebSocket, whose environment the server keeps until it is closed."""

    def __init__(self, server: EnvironmentServer, socket: aiohttp.ClientWebSocketResponse, timeout_s: float) -> None:
        self.server, self.first = server, ""
        self._socket, self._timeout_s = socket, timeout_s

    async def call(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """The `data` of the answer; for an error, {"error": code, "message": text}. Raises EnvironmentFailure."""
        where = f"{self.server.url}/ws"
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._socket.send_str(json.dumps({"type": kind, "data": data}))
                message = await self._socket.receive()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self.server.failed()
            late = isinstance(error, TimeoutError)
            what = f"did not answer a {kind} within {self._timeout_s:g} s" if late else f"broke off ({error!r})"
            raise EnvironmentFailure(f"{where} {what}; is the server running?") from error
        if message.type is not aiohttp.WSMsgType.TEXT:
            self.server.failed()
            why = " (more than rollout.max_observation_bytes?)" if self._socket.close_code == 1009 else ""
            raise EnvironmentFailure(f"{where} closed the connection during a {kind}{why}")
        self.server.succeeded()
        try:
            found = json.loads(message.data)
            kept = found["data"]
            if found["type"] == "error":
                return {"error": str(kept["code"]), "message": f"{kept['message']} {kept.get('errors', '')}".strip()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadAnswer(f"{where} answered {shown(message.data)}; is it a server of OpenEnv?") from error
        if not isinstance(kept, dict):
            raise BadAnswer(f"{where} answered {shown(kept)}; is it a server of OpenEnv?")
        return kept

    async def done(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """As `call`. An error is the environment's: raises PassingError if no session is free, else
        EnvironmentFailure."""
        answer = await self.call(kind, data)
        if "error" not in answer:
            return answer
        failure = f"{self.server.url}/ws answered a {kind} with {answer['error']}: {answer['message'][:300]}"
        raise PassingError(failure) if answer["error"] == _FULL else EnvironmentFailure(failure)

    async def close(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._socket.close()
