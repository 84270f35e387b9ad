"""Environments of OpenEnv behind their own servers, over the WebSocket of each episode.

    problem  {"seed": 7} or any arguments of reset   (`data.train: ["0:900"]`, or JSONL files of such rows)
    reply    the action: text if the server's action has one text field, else a JSON object; with MCP tools, their calls

The schema of actions is the server's. `data.servers` names servers, or `serve.command` starts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import OpenEnvSource
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, StepResult, own_problem, sendable
from icrl_megatron.tasks.datasets import entries_of
from icrl_megatron.tasks.json_socket import JsonSocket
from icrl_megatron.tasks.openenv_actions import action_form, observation_text, reset_arguments
from icrl_megatron.tasks.openenv_session import OpenEnvSession
from icrl_megatron.tasks.package_environment import PackageEnvironment, check_range, check_resets
from icrl_megatron.tasks.reply_forms import ActionForm
from icrl_megatron.tasks.servers import BACKOFF_S, TRIES, Pool
from icrl_megatron.types import Split, Task
from icrl_megatron.utils import connections
from icrl_megatron.utils.retries import PassingError, tries


class OpenEnvEnvironment(PackageEnvironment):
    """One problem. Raises EnvironmentFailure for every failure that is not caused by the model."""

    def __init__(self, arguments: dict[str, Any], tasks: OpenEnvTasks, source: OpenEnvSource) -> None:
        super().__init__(source.reward, source.data.max_turns)
        self._arguments, self._tasks, self._source = arguments, tasks, source
        self._session: OpenEnvSession | None = None
        self._form, self._rewards = ActionForm(), list[float]()

    async def reset(self) -> str:
        """The same problem in each round, which the critique of the earlier round is about."""
        self.forget()
        self._rewards = []
        if self._session is None:
            self._session, answer, self._form = await self._tasks.open_session(self._arguments)
        else:
            answer = await self._session.done("reset", self._arguments)
        text = observation_text(answer, self._source.data.fields)
        if self._session.first and text != self._session.first:
            raise BadAnswer(
                f"{self._session.socket.server.url}: two resets with {json.dumps(self._arguments)} gave different "
                "problems: use arguments that decide it, or set tasks.sources[...].data.fields to fields that are the "
                "same"
            )
        self._session.first = text
        return f"{text}\n\n{self._form.instructions()}".strip()

    def problem_of(self, reply: str) -> str:
        return self._form.problem(reply)

    def hint(self) -> str:
        return f"{self._problem} {self._form.instructions()}".strip()

    async def step(self, action: str) -> StepResult:
        assert self._session is not None
        made = self._form.action(sendable(action))
        if made is None:  # a reply without a call of a tool ends the attempt
            self.reward(self._total(), {})
            return StepResult("", done=True)
        answer = await self._session.call("step", made)
        if answer.get("error") == "VALIDATION_ERROR":  # the action is the model's
            return StepResult(f"The action is not valid: {answer['message']}", done=False)
        if "error" in answer:
            raise self._session.failure("step", answer)
        done = answer.get("done")
        if not isinstance(done, bool) or not isinstance(answer.get("reward"), bool | int | float | None):
            raise self._session.socket.bad(answer)
        text = observation_text(answer, self._source.data.fields)
        self._rewards.append(float(answer["reward"] or 0.0))
        self.reward(self._total(), {})
        return StepResult(text, done)

    def _total(self) -> float:
        return sum(self._rewards) if self._source.reward.of == "sum" else (self._rewards or [0.0])[-1]

    async def close(self) -> None:
        """Closes the connection; the episode is over."""
        if self._session is not None:
            await self._session.socket.close()

    def __del__(self) -> None:
        # The Environment protocol has no close, so the session is closed when its episode is garbage-collected.
        if (session := getattr(self, "_session", None)) is not None:
            self._tasks.release(session)


class OpenEnvTasks:
    """Problems of the servers of `data.servers`."""

    def __init__(self, source: OpenEnvSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`. Raises ConfigError if the range of rewards is empty."""
        check_range(source.name, source.reward)
        self.name, self._source, self._answer_bytes = source.name, source, answer_bytes
        self._forms: dict[str, ActionForm] = {}
        self._connections = connections.Connections(1)

    def problems(self, split: Split) -> Sequence[Task]:
        """Raises ConfigError if the settings name no problems, or a file without any."""
        remedy = "give a range of seeds or a JSONL file of arguments of reset"
        return [
            Task(
                f"{self.name}/{split}/{Path(text).stem}/{i}",
                self.name,
                split,
                json.dumps({"prompt": row, "reset": row}),
            )
            for text in entries_of(self.name, self._source.data, split, "problems", remedy, "0:900")
            for i, row in enumerate(reset_arguments(text))
        ]

    def environment(self, task: Task) -> OpenEnvEnvironment:
        with own_problem(self, task):
            arguments = {**self._source.data.reset, **json.loads(task.problem)["reset"]}
        return OpenEnvEnvironment(arguments, self, self._source)

    def statement(self, task: Task) -> None:
        """Only the server knows the text, so a problem that is too long is found when it is played."""

    def check(self) -> None:
        """Resets the first problem twice. Raises ConfigError if the servers cannot play it."""

        environment = self.environment(self.problems("train")[0])
        check_resets(f"tasks.sources: {self.name!r}", environment, times=2, close=environment.close)

    @cached_property
    def pool(self) -> Pool:
        """Raises ConfigError without the address of a server."""
        return Pool(self._source.data.servers, self._source.data.request_timeout_s, self._answer_bytes)

    async def open_session(self, arguments: dict[str, Any]) -> tuple[OpenEnvSession, dict[str, Any], ActionForm]:
        """(a session of the least-loaded server with a free one, what its reset answered, the form of its actions)."""
        try:
            async for attempt in tries(TRIES, BACKOFF_S):
                with attempt:
                    return await self._open(arguments)
        except PassingError as error:
            raise EnvironmentFailure(
                f"{error}. If all sessions of the servers are in use, raise the server's max_concurrent_envs or "
                "serve.count, or lower rollout.concurrency"
            ) from error
        raise AssertionError("tries() returns or raises")

    async def _open(self, arguments: dict[str, Any]) -> tuple[OpenEnvSession, dict[str, Any], ActionForm]:
        timeout_s = self._source.data.request_timeout_s
        with self.pool.opening() as server:
            socket = await JsonSocket.opened(server, self._connections, timeout_s, self._answer_bytes, "OpenEnv")
            try:
                session = OpenEnvSession(socket)
                answer = await session.done("reset", arguments)
                if server.url not in self._forms:
                    schema = await self.pool.call(server, "GET", "/schema")
                    self._forms[server.url] = await action_form(schema, session.done)
            except BaseException:
                await socket.close()
                raise
            return session, answer, self._forms[server.url]

    def release(self, session: OpenEnvSession) -> None:
        session.socket.server.episodes -= 1
        self.pool.close_soon(session.socket.close)
