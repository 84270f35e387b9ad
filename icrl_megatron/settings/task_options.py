"""The options of each task set: the class of its entries in `tasks.sources`, named in `SOURCES`.

An entry has the options of its task set and no others; `task_sections.py` has the sections that they share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from icrl_megatron.settings.limits import Range
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.settings.task_sections import (
    Answers,
    CallFormat,
    FamilyData,
    GameData,
    OpenEnvData,
    OwnReward,
    RewardJudge,
    RewardRange,
    Rows,
    SearchAgent,
    SearchData,
    ServerData,
    StepReward,
    TaskServers,
    ToolAgent,
    ToolData,
    TrainAndHeldout,
    VerifiersData,
)
from icrl_megatron.utils.errors import ConfigError, did_you_mean
from icrl_megatron.utils.user_code import is_own


@dataclass
class DataSource(TaskSource):
    """Of a task set that needs data."""

    data: TrainAndHeldout = field(default_factory=TrainAndHeldout)


@dataclass
class ServedSource(DataSource):
    """Of a task set behind servers."""

    data: ServerData = field(default_factory=ServerData)
    serve: TaskServers = field(default_factory=TaskServers)

    @property
    def served(self) -> bool:
        """Whether servers are started for it."""
        return bool(self.serve.command) and not self.data.servers


@dataclass
class ArchiveSource(TaskSource):
    agent: Answers = field(default_factory=Answers)

    @property
    def call_format(self) -> str:
        return "tags"


@dataclass
class ToolsSource(ServedSource):
    """Of a task set of rows that can be solved with tools."""

    data: ToolData = field(default_factory=ToolData)
    agent: ToolAgent = field(default_factory=ToolAgent)

    @property
    def call_format(self) -> str:
        return self.agent.format


@dataclass
class MathSource(ToolsSource):
    answer_turns: Annotated[int, Range(1)] = 30
    """Without tools: an attempt continues until a reply has a boxed answer, at most this many turns and
    rollout.max_turns. 1: only the first reply counts."""


@dataclass
class ReasoningGymSource(DataSource):
    data: FamilyData = field(default_factory=FamilyData)


@dataclass
class SearchQASource(ToolsSource):
    data: SearchData = field(default_factory=SearchData)
    agent: SearchAgent = field(default_factory=SearchAgent)


@dataclass
class ALFWorldSource(ServedSource):
    data: GameData = field(default_factory=GameData)


@dataclass
class VerifiersSource(DataSource):
    data: VerifiersData = field(default_factory=VerifiersData)
    reward: RewardRange = field(default_factory=RewardRange)


@dataclass
class OpenEnvSource(ServedSource):
    data: OpenEnvData = field(default_factory=OpenEnvData)
    reward: StepReward = field(default_factory=StepReward)


@dataclass
class OwnSource(DataSource):
    """Of a user's own reward function or task set."""

    data: Rows = field(default_factory=Rows)
    reward: OwnReward = field(default_factory=OwnReward)
    judge: RewardJudge = field(default_factory=RewardJudge)
    agent: CallFormat = field(default_factory=CallFormat)
    options: dict[str, Any] = field(default_factory=dict)
    """Options of an own task set, {name: value}. It reads them from its entry, the argument of its class."""

    @property
    def call_format(self) -> str:
        return self.agent.format


OWN = "FILE.py:NAME"
"""Stands for every name with a colon in `SOURCES`: a user's own code."""

SOURCES: dict[str, type[TaskSource]] = {
    "math": MathSource,
    "searchqa": SearchQASource,
    "code": ToolsSource,
    "reasoning_gym": ReasoningGymSource,
    "alfworld": ALFWorldSource,
    **dict.fromkeys(("webshop", "sciworld", "babyai", "textcraft"), ServedSource),
    **dict.fromkeys(("archive", "archive_easy", "archive_answers"), ArchiveSource),
    "verifiers": VerifiersSource,
    "openenv": OpenEnvSource,
    OWN: OwnSource,
}
"""Task set -> the class of its entries in `tasks.sources`. A task set without options is not listed."""


def source_class(name: str) -> type[TaskSource]:
    return SOURCES.get(OWN if is_own(name) else name, TaskSource)


def source_of(name: str) -> TaskSource:
    """An entry of this task set with the defaults of its options."""
    return source_class(name)(name)


def no_option(setting: str, source: TaskSource) -> ConfigError:
    """`setting` is an option of other task sets, but not of this one."""
    common = dict(options(TaskSource()))
    own = [name for name, _ in options(source) if name not in common]
    if own:
        return ConfigError(f"{setting}: task set {source.name!r} has no such option; it has {', '.join(own)}")
    having = [name for name in SOURCES if name != OWN]
    remedy = did_you_mean(source.name, having, f"leave it out; {', '.join(SOURCES)} have options")
    return ConfigError(f"{setting}: task set {source.name!r} has no options: {remedy}")


def options(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name -> value of every setting below a section."""
    for one in dataclasses.fields(section):
        value = getattr(section, one.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value


def check_unused(source: TaskSource, unused: Sequence[str], why: str) -> None:
    """Raises ConfigError if a setting that has no effect, because of another one, is not its default. `unused`: dotted
    names below `source`, also of sections. `why` names the other setting."""
    default = dict(options(type(source)()))
    for name, value in options(source):
        if value != default[name] and any(f"{name}.".startswith(f"{section}.") for section in unused):
            raise ConfigError(f"task set {source.name!r}: {name}={value} has no effect {why}; leave it out")
