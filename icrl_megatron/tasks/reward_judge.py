"""Judges as rewards: a model reads a prompt of the user's with the reply in it, and its own reply ends with a score.

A judge is named like a reward function, FILE.jinja:NAME. FILE is the prompt, a Jinja template, and metrics call it
NAME. `tasks.sources[...].judge` says who answers: an OpenAI-compatible endpoint, or an engine of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment

from icrl_megatron.agents.cache import Entry, ToolCache
from icrl_megatron.agents.judge import Asker, NoVerdict, ask_until_read, check_endpoint, score_of
from icrl_megatron.agents.tools import ToolFailure
from icrl_megatron.settings.task_options import OwnSource, check_unused
from icrl_megatron.settings.task_sections import RewardJudge
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, sendable
from icrl_megatron.utils.errors import ConfigError

SUFFIX = ".jinja"
FORM = "FILE.jinja:NAME"


def is_judge(name: str) -> bool:
    """Whether a reward is a judge, and not a function."""
    return name.endswith(SUFFIX) or name.rpartition(":")[0].endswith(SUFFIX)


@dataclass(frozen=True)
class Judged:
    score: float
    """On the judge's own scale."""
    cached: bool
    """Whether `tasks.tool_cache` had the judge's reply."""


@dataclass(frozen=True)
class RewardPrompt:
    """The prompt of a judge."""

    given: str
    """FILE.jinja:NAME."""
    template: jinja2.Template

    @staticmethod
    def read(given: str, setting: str) -> RewardPrompt:
        """Raises ConfigError if the file is missing, is no template, or does not show the reply."""
        file, _, name = given.rpartition(":")
        where = f"{setting}={given}"
        if not file or not name.isidentifier():
            raise ConfigError(f"{where}: write {FORM}, e.g. ./helpful.jinja:helpful")
        environment = SandboxedEnvironment(autoescape=False, undefined=jinja2.StrictUndefined)
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
            used = meta.find_undeclared_variables(environment.parse(text))
            template = environment.from_string(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{where}: {file} cannot be read ({error}); give its path from the folder in which the command runs"
            ) from error
        except jinja2.TemplateError as error:
            raise ConfigError(f"{where}: {file} is not a Jinja template ({error}); correct the file") from error
        if "response" not in used:
            raise ConfigError(f"{where}: {file} does not show the reply; write {{{{ response }}}} into it")
        return RewardPrompt(given, template)

    def message(self, problem: Mapping[str, Any], prompt: str, response: str) -> str:
        """What the judge reads. Raises EnvironmentFailure if the template fails, as for a column that a row lacks."""
        columns = problem["columns"]
        try:
            return sendable(
                self.template.render(
                    {**columns, "row": columns, "prompt": prompt, "response": response, "label": problem["label"]}
                )
            )
        except Exception as error:  # of the template's own expressions
            raise EnvironmentFailure(f"the prompt {self.given} fails: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class ScoreJudge:
    """A judge that answers any number of coroutines at once."""

    prompt: RewardPrompt
    settings: RewardJudge
    who: Callable[[], Asker]
    """Engines start after task sets are made."""
    cache: ToolCache | None = None

    async def score(self, message: str) -> Judged:
        """Raises EnvironmentFailure if the judge does not answer, and BadAnswer if no reply has a score: neither
        becomes a score of 0."""
        low, high, asker = self.settings.low, self.settings.high, self.who()
        entry: Entry = ("judge", self._version(asker), json.dumps(message))
        cache = self.cache if asker.constant else None
        try:
            kept = None if cache is None else await cache.get(entry)
            known = None if kept is None else score_of(kept, low, high)
            if known is not None:
                return Judged(known, cached=True)
            said, found = await ask_until_read(
                asker,
                message,
                lambda text: score_of(text, low, high),
                f"without a score from {low:g} to {high:g}",
                self.settings.tries,
                self.settings.max_tokens,
                self.settings.temperature,
            )
        except NoVerdict as error:
            raise BadAnswer(str(error)) from error
        except ToolFailure as error:
            raise EnvironmentFailure(str(error)) from error
        if cache is not None:
            cache.put(entry, said)
        return Judged(found, cached=False)

    def unit(self, score: float) -> float:
        """A score on the scale from 0 to 1."""
        return (score - self.settings.low) / (self.settings.high - self.settings.low)

    def _version(self, asker: Asker) -> str:
        """Names what a reply depends on beside the message."""
        asked = [asker.url, self.settings.endpoint.model, self.settings.max_tokens, self.settings.temperature]
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()


def check_judge(source: OwnSource) -> None:
    """Raises ConfigError if the settings of the judges contradict each other, or do not say who answers."""
    judge = source.judge
    if judge.low >= judge.high:
        raise ConfigError(
            f"tasks.sources[...].judge.low={judge.low:g} is not below judge.high={judge.high:g}; give the range of the "
            "scores that the prompt asks for, e.g. judge.low=1 judge.high=5"
        )
    if judge.engine != "endpoint":
        check_unused(source, ["judge.endpoint"], f"with judge.engine={judge.engine}")
        return
    instead = ", or 'tasks.sources[...].judge.engine=solver'"
    check_endpoint(judge.endpoint, "judge.endpoint", f"task set {source.name!r}: its judge", instead)
