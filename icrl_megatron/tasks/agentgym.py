"""AgentGym's environments (ALFWorld, WebShop, SciWorld, BabyAI, TextCraft, SearchQA) behind their HTTP servers.

    problem  {"task": 2420}          (the environment's task id; `data.train: ["0:2420"]`, or the reference's JSONL)
    reply    any thought; its last <action>...</action> counts

An episode stays on one server from its first reset; each round resets the same environment there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ServedSource
from icrl_megatron.tasks import agentgym_dialects as dialects
from icrl_megatron.tasks import columns, published
from icrl_megatron.tasks.agentgym_dialects import Dialect, ProtocolError, ServerReply
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, StepResult, own_problem, sendable
from icrl_megatron.tasks.datasets import entries_of, id_range
from icrl_megatron.tasks.manuals import MANUALS
from icrl_megatron.tasks.servers import EnvironmentServer, Pool, Refused
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

MAX_TURNS = 30


class AgentGymSession:
    """One environment on one server: create, reset, step, close, in the server's dialect."""

    def __init__(self, name: str, pool: Pool, server: EnvironmentServer, dialect: Dialect) -> None:
        self.name, self.dialect, self.server = name, dialect, server
        self.where = server.url
        self._pool = pool
        self._env: int | str | None = None
        self._protocol = dialects.ENVIRONMENTS[name]
        self._id_key = "env_id" if dialect == "B" else self._protocol.id_key

    async def create(self) -> None:
        body = {} if self.dialect == "B" else self._protocol.create_body
        made = dialects.env_id(self.dialect, self.name, await self._call("/create", body))
        if made in self.server.environments:  # both episodes would act in one environment
            raise EnvironmentFailure(
                f"{self.server.url}/create answered the id {made!r} twice: another episode still plays there"
            )
        self.server.environments.add(made)
        self._env = made

    async def reset(self, task: int) -> ServerReply:
        task_key = "task_id" if self.dialect == "B" else self._protocol.task_key
        body = {self._id_key: self._env, task_key: task}
        if self.name == "alfworld":
            body["world_type"] = "Text"
        answer = await self._call("/reset", body)
        return dialects.reply_of(self.dialect, self.name, answer, "reset")

    async def step(self, action: str) -> ServerReply:
        # A step whose answer was lost may have been executed, so it is not sent again.
        answer = await self._call("/step", {self._id_key: self._env, "action": action}, again=False)
        return dialects.reply_of(self.dialect, self.name, answer, "step")

    async def close(self) -> None:
        """Best effort: upstream ALFWorld has no /close."""
        if self._env is None or (self.dialect == "A" and not self._protocol.closes):
            return
        with contextlib.suppress(EnvironmentFailure):
            await self._pool.call(self.server, "POST", "/close", {self._id_key: self._env}, again=False)
        self._env = None

    def forget(self) -> None:
        """Call when the episode is over: the server may then use the environment's id again."""
        if self._env is not None:
            self.server.environments.discard(self._env)

    async def _call(self, path: str, body: Any, again: bool = True) -> Any:
        answer = await self._pool.call(self.server, "POST", path, body, again)
        if found := dialects.failure(answer):
            raise EnvironmentFailure(f"{self.server.url}{path} answered an error: {found[0]}")
        return answer


async def probe(pool: Pool, server: EnvironmentServer) -> Dialect:
    """Dialect B has /health; A answers 404 there. Raises EnvironmentFailure if the server does not answer at all."""
    try:
        answer = await pool.call(server, "GET", "/health")
    except Refused as refusal:
        if refusal.status in (404, 405, 200):
            return "A"
        raise
    return "B" if isinstance(answer, dict) else "A"


class OpenEnvironment(Protocol):
    """An open environment: an `AgentGymSession`, or one in a local process."""

    where: str
    """Its name in error messages."""

    async def reset(self, task: Any) -> ServerReply: ...

    async def step(self, action: str) -> ServerReply: ...


class SessionProvider(Protocol):
    """Opens environments, and releases them when their episode is over."""

    name: str

    async def open_session(self) -> Any: ...

    def release(self, session: Any) -> None: ...


class AgentGymEnvironment:
    """One task of one environment. Raises EnvironmentFailure for every failure that is not caused by the model."""

    max_turns = MAX_TURNS

    def __init__(self, task: int | str, provider: SessionProvider) -> None:
        self._task, self._provider = task, provider
        self.manual = MANUALS[provider.name]
        self._session: OpenEnvironment | None = None
        self._reward = 0.0
        self._steps = 0

    async def reset(self) -> str:
        self._reward, self._steps = 0.0, 0
        if self._session is None:
            self._session = await self._provider.open_session()
        with _protocol_failures(self._session):
            first = await self._session.reset(self._task)
        instruction = dialects.ENVIRONMENTS[self._provider.name].instruction
        return f"{instruction}\n\n{self._shown(first, first=True)}"

    def parse(self, reply: str) -> str | None:
        return dialects.action_of(self._provider.name, reply)

    def hint(self) -> str:
        return "No action could be read. " + dialects.ENVIRONMENTS[self._provider.name].instruction

    async def step(self, action: str) -> StepResult:
        assert self._session is not None
        with _protocol_failures(self._session):
            reply = await self._session.step(sendable(action))
            self._reward, self._steps = reply.reward, self._steps + 1
            dialects.outcome_of(self._provider.name, self._reward)
        done = dialects.ends_episode(self._provider.name, action, reply)
        return StepResult(self._shown(reply, first=False), done)

    def outcome(self) -> float:
        return dialects.outcome_of(self._provider.name, self._reward)

    def success(self) -> bool:
        return self.outcome() >= dialects.ENVIRONMENTS[self._provider.name].success_at

    def summary(self) -> str:
        if self.success():
            return f"The task was solved in {self._steps} actions."
        partly = f" The score so far is {self.outcome():.2f} of 1." if self.outcome() > 0 else ""
        return f"The task was not solved in {self._steps} actions.{partly}"

    def __del__(self) -> None:
        # The Environment protocol has no close, so the environment is released when its episode is garbage-collected.
        if self._session is not None:
            self._provider.release(self._session)

    def _shown(self, reply: ServerReply, first: bool) -> str:
        name = self._provider.name
        return dialects.shown(name, reply) if dialects.lists_actions(name, reply, first) else reply.observation


class AgentGym:
    """A task set behind the servers of `data.servers`. Its name says which environment they run."""

    def __init__(self, source: ServedSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`."""
        self.name, self._data, self._answer_bytes = source.name, source.data, answer_bytes
        self._pool: Pool | None = None
        self._dialects: dict[str, Dialect] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        """Raises ConfigError if the settings name no task ids, or a file without any."""
        remedy = "give a range of ids or a JSONL file with task_id"
        return [
            Task(f"{self.name}/{split}{subset}/{i}", self.name, split, json.dumps({"task": i, "prompt": i}))
            for name in entries_of(self.name, self._data, split, "ids", remedy, "0:2420")
            for subset, i in _ids(name)
        ]

    def environment(self, task: Task) -> AgentGymEnvironment:
        with own_problem(self, task):
            return AgentGymEnvironment(int(json.loads(task.problem)["task"]), self)

    def statement(self, task: Task) -> None:
        """Only the server knows the text, so a problem that is too long is found when it is played."""

    def check(self) -> None:
        """Plays the first step of an episode on every server. Raises ConfigError naming the one that fails."""
        first = json.loads(self.problems("train")[0].problem)["task"]
        for server in self.pool().servers:
            try:
                asyncio.run(examine(self.name, server.url, first, self._data.request_timeout_s))
            except EnvironmentFailure as error:
                raise ConfigError(
                    f"tasks.sources: {self.name!r}: {error}. `icrl env check {server.url} --kind {self.name}` "
                    "shows more"
                ) from error

    def pool(self) -> Pool:
        if self._pool is None:
            self._pool = Pool(self._data.servers, self._data.request_timeout_s, self._answer_bytes)
        return self._pool

    async def open_session(self) -> AgentGymSession:
        """A new environment on the least-loaded server that can create one."""
        failure: EnvironmentFailure | None = None
        for _ in range(min(3, len(self.pool().servers) + 1)):
            try:
                with self.pool().opening() as server:
                    if server.url not in self._dialects:
                        self._dialects[server.url] = await probe(self.pool(), server)
                    session = AgentGymSession(self.name, self.pool(), server, self._dialects[server.url])
                    with _protocol_failures(session):
                        await session.create()
                    return session
            except EnvironmentFailure as error:
                failure = error
        assert failure is not None
        raise failure

    def release(self, session: AgentGymSession) -> None:
        session.server.episodes -= 1
        session.forget()
        self.pool().close_soon(session.close)


@contextlib.contextmanager
def _protocol_failures(session: OpenEnvironment) -> Iterator[None]:
    """Converts a ProtocolError to a BadAnswer."""
    try:
        yield
    except ProtocolError as error:
        raise BadAnswer(f"{session.where}: {error}") from error


def _ids(entry: str) -> list[tuple[str, int]]:
    """("/<subset>" or "", task id) of every task of one entry of the settings. A subset is named by the file, and by a
    row's metadata.subset."""
    if (found := id_range(entry)) is not None:
        return [("", i) for i in found]
    path, tasks = Path(entry), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{entry}: neither a range of task ids like 0:2420 nor a file ({error.strerror}){published.hint(entry)}"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            task = int(str(row["task_id"]).rsplit("_", 1)[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not an object with an integer task_id; fix the row") from error
        subset = f"/{path.stem}"
        if columns.at_path(row, "metadata.subset") is not columns.MISSING:
            subset += f"_{columns.subset(row, 'metadata.subset', f'{path}, line {number}')}"
        tasks.append((subset, task))
    ids = [i for _, i in tasks]
    if len(set(ids)) < len(ids):
        twice = next(i for i, count in Counter(ids).items() if count > 1)
        raise ConfigError(f"{path}, line {len(ids) - ids[::-1].index(twice)}: duplicate task_id {twice}; delete one")
    if not ids:
        raise ConfigError(f"{path}: no rows; give at least one task_id")
    return tasks


async def examine(name: str, url: str, task: int, timeout_s: float) -> tuple[Dialect, str, ServerReply]:
    """Runs create, reset, one step and close on one server: (dialect, first observation, answer to the step)."""
    pool = Pool([url], timeout_s)
    session = AgentGymSession(name, pool, pool.servers[0], await probe(pool, pool.servers[0]))
    with _protocol_failures(session):
        await session.create()
        try:
            first = await session.reset(task)
            action = first.actions[0] if first.actions else dialects.FIRST_ACTIONS[name]
            reply = await session.step(action)
            dialects.outcome_of(name, reply.reward)
        finally:
            await session.close()
    return session.dialect, first.observation, reply
