"""Runs the calls of an episode: checks arguments, limits time and concurrency, answers repeated calls from history."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from icrl_megatron.agents import schemas
from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.deadlines import Deadlines
from icrl_megatron.agents.tools import (
    Arguments,
    Outcome,
    Stateful,
    Tool,
    ToolCall,
    ToolFailure,
    ToolResult,
    ToolSpec,
    ToolUseError,
)
from icrl_megatron.utils.errors import ConfigError

_PLAIN = {"type", "properties", "required", "additionalProperties"}
_NEVER = (1, 0)
"""Lengths that no text has."""


@dataclass(frozen=True)
class ToolLimits:
    call_s: float = 60.0
    """Seconds after which a call counts as failed infrastructure."""
    tries: int = 2
    """Attempts at a call whose infrastructure failed."""
    tries_of: Mapping[str, int] = field(default_factory=dict)
    """Tool -> its own value."""
    pause_s: float = 0.25
    """Seconds before the second attempt; doubles with each further one."""
    repeats: int = 2
    """How often an episode gets the same answer again; after that, it is told to do something else."""
    concurrency: int = 64
    """Calls of one tool that run at a time, over all episodes of a process."""
    concurrency_of: Mapping[str, int] = field(default_factory=dict)
    """Tool -> its own value."""


@dataclass(frozen=True)
class _Texts:
    """Parameters that are texts with limits to their lengths. jsonschema takes ten times as long to accept arguments,
    so it is only asked about the others, and for what is wrong."""

    limits: Mapping[str, tuple[int, float]]
    """Parameter -> least and most characters."""
    required: frozenset[str]

    @staticmethod
    def of(schema: Mapping[str, Any]) -> _Texts | None:
        """None if the schema says more than that."""
        limits: dict[str, tuple[Any, Any]] = {}
        for name, part in schema.get("properties", {}).items():
            match part:
                case {"type": "string", **others} if others.keys() <= {"minLength", "maxLength"}:
                    limits[name] = others.get("minLength", 0), others.get("maxLength", math.inf)
        if (
            schema.get("type") != "object"
            or not schema.keys() <= _PLAIN
            or len(limits) < len(schema.get("properties", {}))
        ):
            return None
        return _Texts(limits, frozenset(schema.get("required", ())))

    def fit(self, arguments: Arguments) -> bool:
        """Whether the arguments are certainly valid. False: ask jsonschema."""
        for name, text in arguments.items():
            least, most = self.limits.get(name, _NEVER)
            if not isinstance(text, str) or not least <= len(text) <= most:
                return False
        return self.required <= arguments.keys()


class ArgumentChecks:
    """Checks calls of tools before they are made."""

    def __init__(self, specs: Sequence[ToolSpec]) -> None:
        """Raises ConfigError for two tools of one name and for an invalid schema."""
        names = Counter(spec.name for spec in specs)
        if len(names) < len(specs):
            raise ConfigError(f"tools: {[n for n, count in names.items() if count > 1]} are named twice; rename one")
        self._validators, self._texts = {}, {}
        for spec in specs:
            try:
                self._validators[spec.name] = schemas.validator(spec)
            except schemas.BadSchemaError as error:
                raise ConfigError(f"tool {spec.name!r}: the schema of its parameters {error}; correct it") from error
            self._texts[spec.name] = _Texts.of(spec.parameters)

    def mistake(self, call: ToolCall) -> str:
        """Why a call cannot be made, in words for the model; empty if it can."""
        if call.name not in self._validators:
            return f"There is no tool {call.name[:50]!r}. The tools are {', '.join(self._validators)}."
        texts = self._texts[call.name]
        if texts is not None and texts.fit(call.arguments):
            return ""
        wrong = schemas.mistake(self._validators[call.name], call.arguments)
        return f"{call.name}: {wrong}" if wrong else ""


class Toolbox:
    """The tools of a task set. One per process; `session` opens an episode's own view of it."""

    def __init__(self, tools: Sequence[Tool], limits: ToolLimits, cache: ToolCache | None = None) -> None:
        """`cache` keeps the answers of tools that have a version (`ToolSpec.version`).

        Raises ConfigError for two tools of one name and for an invalid schema."""
        self.limits, self.cache = limits, cache
        self.tools = {tool.spec.name: tool for tool in tools}
        self._checks = ArgumentChecks([tool.spec for tool in tools])
        # Asked once for each tool: isinstance with a protocol took a third of a call's time.
        self.stateful = {name: tool for name, tool in self.tools.items() if isinstance(tool, Stateful)}
        self._loops: dict[asyncio.AbstractEventLoop, tuple[dict[str, asyncio.Semaphore], Deadlines]] = {}

    def session(self, most_calls: int | None = None) -> ToolSession:
        return ToolSession(self, most_calls)

    def mistake(self, call: ToolCall) -> str:
        """Why a call cannot be made, in words for the model; empty if it can."""
        return self._checks.mistake(call)

    async def run(self, call: ToolCall, tool: Tool) -> tuple[str, bool]:
        """The answer to a call without mistakes, and whether it is the cache's. Else it is that of `tool`, which is the
        call's tool or an episode's own, and then stored.

        Raises ToolUseError, ToolFailure after the last try or the deadline, and what `ToolCache.get` raises.
        """
        version = self.tools[call.name].spec.version
        if self.cache is None or not version:
            return await self._tried(call, tool), False
        entry = (call.name, version, call.written_arguments())
        try:
            async with asyncio.timeout(self.limits.call_s):
                kept = await self.cache.get(entry)
        except TimeoutError as error:
            raise ToolFailure(f"tool cache {self.cache.path}: no answer within {self.limits.call_s:g} s") from error
        if kept is not None:
            return kept, True
        try:
            answer = await self._tried(call, tool)
        except ToolUseError as error:
            self.cache.put(entry, str(error), mistake=True)
            raise
        self.cache.put(entry, answer)
        return answer, False

    async def _tried(self, call: ToolCall, tool: Tool) -> str:
        """`run` without the cache. A plain loop, because tenacity took more time than the rest of the toolbox."""
        tried, (gates, deadlines) = 0, self._on_loop()
        tries = self.limits.tries_of.get(call.name, self.limits.tries)
        async with gates[call.name]:
            while True:
                try:
                    return await deadlines.run(tool.call(call.arguments))
                except TimeoutError as error:
                    failure = ToolFailure(f"tool {call.name!r} did not answer within {self.limits.call_s:g} s")
                    failure.__cause__ = error
                except ToolFailure as error:
                    failure = error
                tried += 1
                if tried >= tries:
                    raise failure
                await asyncio.sleep(self.limits.pause_s * 2 ** (tried - 1))

    def _on_loop(self) -> tuple[dict[str, asyncio.Semaphore], Deadlines]:
        """The gates of the tools and the deadlines of calls belong to an event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops = {other: kept for other, kept in self._loops.items() if not other.is_closed()}
            most = dict.fromkeys(self.tools, self.limits.concurrency) | dict(self.limits.concurrency_of)
            gates = {name: asyncio.Semaphore(count) for name, count in most.items()}
            self._loops[loop] = gates, Deadlines(self.limits.call_s)
        return self._loops[loop]


@dataclass(slots=True)
class ToolSession:
    """The calls of one attempt at a task, in order."""

    box: Toolbox
    most_calls: int | None = None
    """`rollout.max_calls`."""
    counts: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    """(tool, outcome) -> calls. A call of an unknown tool counts under the tool name ""."""
    cached: int = 0
    """Calls among them that the shared cache answered."""
    _begun: int = 0
    _answers: dict[str, ToolResult] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)
    _own: dict[str, Tool] = field(default_factory=dict)
    """The tools with a state of this episode."""

    async def call(self, call: ToolCall) -> ToolResult:
        """Runs a call. Raises ToolFailure: the episode must then be dropped and counted, not rewarded."""
        result = await self._result(call)
        self.counts[call.name if call.name in self.box.tools else "", result.outcome] += 1
        return result

    async def call_all(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Runs calls at the same time. After a ToolFailure, no other one is left running."""
        running = [asyncio.ensure_future(self.call(call)) for call in calls]
        try:
            return await asyncio.gather(*running)
        except BaseException:
            for call in running:
                call.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            raise

    async def _result(self, call: ToolCall) -> ToolResult:
        self._begun += 1
        if self.most_calls is not None and self._begun > self.most_calls:
            return ToolResult("No calls are left. Give the final answer.", "refused")
        mistake = self.box.mistake(call)
        if mistake:
            return ToolResult(mistake, "invalid")
        key = call.key()
        self._asked[key] += 1
        tool = self._tool(call.name)
        if key in self._answers and call.name not in self._own:  # a state gives the same call another answer
            if self._asked[key] > 1 + self.box.limits.repeats:
                return ToolResult("You have made this call already. Use its answer, or do something else.", "stopped")
            return ToolResult(self._answers[key].text, "repeat")
        try:
            text, cached = await self.box.run(call, tool)
            self.cached += cached
            result = ToolResult(text, "answer")
        except ToolUseError as error:
            result = ToolResult(str(error)[: schemas.SHOWN_CHARS], "invalid")
        self._answers[key] = result
        return result

    def _tool(self, name: str) -> Tool:
        shared = self.box.tools[name]
        if name in self.box.stateful and name not in self._own:
            opened = self.box.stateful[name].open()
            if opened is shared:
                return shared
            self._own[name] = opened
        return self._own.get(name, shared)

    def made(self, *outcomes: Outcome) -> int:
        """Calls with one of these outcomes."""
        return sum(count for (_, outcome), count in self.counts.items() if outcome in outcomes)

    def of_tool(self, name: str) -> int:
        """Calls of one tool, however they ended."""
        return sum(count for (tool, _), count in self.counts.items() if tool == name)
