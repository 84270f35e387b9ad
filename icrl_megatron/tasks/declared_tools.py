"""Environments that declare tools and run the calls themselves: the model's calls are parsed by the format of the task
set (`agent.format`) and delivered as `ToolCall` objects (`tasks.base.CallsTools`).

The format is the one that the toolbox of other task sets uses (`agents/formats.py`), so the tools are shown, called and
answered in the same way.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from icrl_megatron.agents.formats import FinalAnswer, Malformed, ToolCalls, ToolFormat, harmless, make_format
from icrl_megatron.agents.toolbox import ArgumentChecks
from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.tasks.base import BadAnswer, CallsTools, Environment, Opening, StepResult, shown
from icrl_megatron.utils.errors import ConfigError

REMEMBERED = 256
"""Sets of tools whose schemas are kept checked; episodes of a task usually declare the same ones."""
NO_CALLS_LEFT = "No calls are left. Give the final answer."
_METHODS = ("reset", "step", "outcome", "success", "summary")


def declares(environment: object) -> bool:
    """Whether an environment leaves parsing to the format of its task set."""
    return hasattr(environment, "tools") and not hasattr(environment, "parse")


class DeclaredTools:
    """Such an environment as an `Environment`: its actions are calls or answers, written again by the format."""

    shares_answers = False

    def __init__(self, inner: CallsTools, format: str) -> None:
        """Raises ConfigError for tools that are not `ToolSpec`s, have an invalid schema or the same name, or cannot be
        written in the format; BadAnswer if a method is missing."""
        missing = [name for name in _METHODS if not callable(getattr(inner, name, None))]
        if missing:
            raise BadAnswer(f"an environment with tools needs {', '.join(_METHODS)}; {missing[0]} is missing")
        self._inner = inner
        self.form, self._checks, self.specs = _prepared(format, _written(inner.tools))
        self.stateful = tuple(spec.name for spec in self.specs)  # it does not say which calls change it
        self.opening = Opening("")
        self.dialogue, self.max_turns = self.form.dialogue, inner.max_turns
        self.manual = getattr(inner, "manual", "")
        self._most_calls: int | None = None
        self._calls, self._invalid, self._changed_tags, self._malformed = 0, 0, 0, ""

    def limit_calls(self, most: int) -> None:
        self._most_calls = most

    async def reset(self) -> str | Opening:
        self._calls, self._invalid, self._changed_tags, self._malformed = 0, 0, 0, ""
        given = await self._inner.reset()
        if not isinstance(given, str | Opening):
            return given  # refused by the caller
        self.opening = Opening.of(given)
        if self.dialogue.observation != "inline":
            return given
        # No chat template describes the tools.
        self.opening = Opening(f"{self.opening.text}\n\n{self.form.instructions()}", self.opening.system)
        return Opening.plain(self.opening.text, self.opening.system)

    def parse(self, reply: str) -> str | None:
        found = self.form.parse(reply)
        self._malformed = found.problem if isinstance(found, Malformed) else ""
        return self.form.render(found) if isinstance(found, ToolCalls | FinalAnswer) else None

    def hint(self) -> str:
        return self._malformed or f"No action could be read. {self.form.instructions()}"

    async def step(self, action: str) -> StepResult:
        """Calls with mistakes in them are answered here; the environment gets the others together. Raises BadAnswer if
        it does not return one observation for each."""
        asked = self.form.parse(action)
        if isinstance(asked, FinalAnswer):
            result = await self._inner.step(asked.text)
            return StepResult(result.observation, result.done, user=True) if isinstance(result, StepResult) else result
        if not isinstance(asked, ToolCalls):
            return StepResult(self.hint(), done=False)
        answers = [self._refused(call) for call in asked.calls]
        calls = tuple(call for call, answer in zip(asked.calls, answers, strict=True) if not answer)
        done = False
        if calls:
            result = await self._inner.step(calls)
            if not isinstance(result, StepResult):
                return result  # refused by the caller
            texts, done = result.texts(), result.done
            if len(texts) != len(calls):
                raise BadAnswer(
                    f"step() returned {len(texts)} observations for {len(calls)} calls ({shown(result.observation)}); "
                    "return StepResult with a tuple of one str for each call, in order"
                )
            found = iter(texts)
            answers = [answer or self._harmless(next(found)) for answer in answers]
        return StepResult(tuple(answers) if len(answers) > 1 else answers[0], done)

    def mistake(self, call: ToolCall) -> str:
        return self._checks.mistake(call)

    def _refused(self, call: ToolCall) -> str:
        """Why a call is not made, in words for the model; empty if it is made."""
        self._calls += 1
        if self._most_calls is not None and self._calls > self._most_calls:
            return NO_CALLS_LEFT
        mistake = self._checks.mistake(call)
        self._invalid += bool(mistake)
        return mistake

    def _harmless(self, text: Any) -> Any:
        if not isinstance(text, str):
            return text  # refused by the caller
        text, changed = harmless(text, self.form.tags)
        self._changed_tags += changed
        return text

    def outcome(self) -> float:
        return self._inner.outcome()

    def success(self) -> bool:
        return self._inner.success()

    def summary(self) -> str:
        return self._inner.summary()

    def measures(self) -> dict[str, float]:
        """The environment's own, and its calls: all, those with mistakes, and tags of the format in their answers."""
        own: dict[str, float] = getattr(self._inner, "measures", dict)()
        counted = {"calls": self._calls, "calls_invalid": self._invalid, "changed_tags": self._changed_tags}
        return {**{name: float(number) for name, number in counted.items()}, **own}


def with_format(environment: Environment | CallsTools, format: str) -> Environment:
    """The environment as the rollout plays it. Raises as `DeclaredTools`."""
    return DeclaredTools(environment, format) if declares(environment) else environment  # type: ignore[arg-type,return-value]


def _written(tools: Any) -> str:
    """JSON of the tools, by which they are remembered. Raises ConfigError."""
    if not isinstance(tools, list | tuple) or not all(isinstance(spec, ToolSpec) for spec in tools):
        raise ConfigError(
            f"an environment's tools are {shown(tools)}; declare a list of icrl_megatron.agents.tools.ToolSpec"
        )
    try:
        return json.dumps([(spec.name, spec.description, dict(spec.parameters)) for spec in tools], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"an environment's tools cannot be written as JSON ({error}); correct their schemas"
        ) from error


@functools.lru_cache(maxsize=REMEMBERED)
def _prepared(format: str, written: str) -> tuple[ToolFormat, ArgumentChecks, tuple[ToolSpec, ...]]:
    specs = tuple(ToolSpec(*fields) for fields in json.loads(written))
    return make_format(format, specs), ArgumentChecks(specs), specs
