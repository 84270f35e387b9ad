"""The WebSocket of one episode on a server that keeps an environment until it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import aiohttp

from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, shown
from icrl_megatron.tasks.servers import EnvironmentServer
from icrl_megatron.utils.connections import Connections


class JsonSocket:
    """Sends a JSON text and receives one. Every failure raises EnvironmentFailure."""

    def __init__(
        self, server: EnvironmentServer, socket: aiohttp.ClientWebSocketResponse, timeout_s: float, protocol: str
    ) -> None:
        """`protocol`: what the server should speak, for messages."""
        self.server, self.where, self.protocol = server, f"{server.url}/ws", protocol
        self._socket, self._timeout_s = socket, timeout_s

    @classmethod
    async def opened(
        cls, server: EnvironmentServer, connections: Connections, timeout_s: float, answer_bytes: int, protocol: str
    ) -> JsonSocket:
        """The server's /ws. `answer_bytes`: the longest message that is read."""
        url = f"ws{server.url.removeprefix('http')}/ws"
        try:
            async with asyncio.timeout(timeout_s):
                socket = await connections.here().session.ws_connect(url, max_msg_size=answer_bytes)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise EnvironmentFailure(
                f"{server.url}/ws cannot be opened ({error!r}); is it a server of {protocol}?"
            ) from error
        return cls(server, socket, timeout_s, protocol)

    async def ask(self, what: str, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message. `what` names the message in errors. Raises BadAnswer if the answer is not a JSON
        object."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._socket.send_str(json.dumps(message))
                answer = await self._socket.receive()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self.server.failed()
            late = isinstance(error, TimeoutError)
            fault = f"did not answer a {what} within {self._timeout_s:g} s" if late else f"broke off ({error!r})"
            raise EnvironmentFailure(f"{self.where} {fault}; is the server running?") from error
        if answer.type is not aiohttp.WSMsgType.TEXT:
            self.server.failed()
            why = " (more than rollout.max_observation_bytes?)" if self._socket.close_code == 1009 else ""
            raise EnvironmentFailure(f"{self.where} closed the connection during a {what}{why}")
        self.server.succeeded()
        try:
            found = json.loads(answer.data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.bad(answer.data)
        return found

    def bad(self, answer: object) -> BadAnswer:
        """The failure of a server whose answer is not one of its protocol."""
        return BadAnswer(f"{self.where} answered {shown(answer)}; is it a server of {self.protocol}?")

    async def close(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._socket.close()
