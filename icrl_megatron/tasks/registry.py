"""Task sets by name. A new task set is one file and one line here: in `_TASK_SETS` if it has no options, in
`_WITH_OPTIONS` if it has some (settings/task_options.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.judge import Asker
from icrl_megatron.settings.limits import check_limits
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import OwnSource, ServedSource, VerifiersSource, source_class, source_of
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.tasks.base import AsksOwnModels, Cacheable, Environment, TaskSet, escaped, shown
from icrl_megatron.tasks.declared_tools import with_format
from icrl_megatron.tasks.household import Household
from icrl_megatron.tasks.rulebook import Rulebook
from icrl_megatron.tasks.user_tasks import of_own
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError, did_you_mean, own_entry
from icrl_megatron.utils.user_code import is_own

_TASK_SETS: dict[str, Callable[[], TaskSet]] = {
    "rulebook_hard": lambda: Rulebook("rulebook_hard"),
    "rulebook_easy": lambda: Rulebook("rulebook_easy"),
    "household": Household,
}

_ARCHIVE = ("archive", "archive_easy", "archive_answers")
"""They need no data, but the toolbox's libraries, which a launcher's environment (NeMo-Run's) lacks."""
_AGENTGYM = ("webshop", "sciworld", "babyai", "textcraft")

_WITH_OPTIONS: dict[str, str] = {
    "math": "icrl_megatron.tasks.mathematics:Mathematics",
    "reasoning_gym": "icrl_megatron.tasks.reasoning_gym:ReasoningGym",
    "code": "icrl_megatron.tasks.programs:Programs",
    "searchqa": "icrl_megatron.tasks.searchqa:SearchQA",
    **dict.fromkeys(_ARCHIVE, "icrl_megatron.tasks.archive:Archive"),
    "alfworld": "icrl_megatron.tasks.games:ALFWorld",
    **dict.fromkeys(_AGENTGYM, "icrl_megatron.tasks.agentgym:AgentGym"),
    "verifiers": "icrl_megatron.tasks.verifiers_env:VerifiersTasks",
    "openenv": "icrl_megatron.tasks.openenv_env:OpenEnvTasks",
}
"""name -> "module:class", created with its entry of `tasks.sources`. Imported when first needed: their libraries are
large."""


def names() -> tuple[str, ...]:
    """Names of the task sets that need no data."""
    return (*_TASK_SETS, *_ARCHIVE)


def get(name: str) -> TaskSet:
    """The task set of that name, with the defaults of its options. Raises ConfigError with the nearest name if there is
    none."""
    return of_source(source_of(name))


def of_source(source: TaskSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> TaskSet:
    """The task set that one entry of `tasks.sources` describes. `answer_bytes` is `rollout.max_observation_bytes`, for
    task sets that use servers. Raises ConfigError on an unknown name, and what the task set raises about its data."""
    known = (*_TASK_SETS, *_WITH_OPTIONS)
    if type(source) is not (needed := source_class(source.name)):
        raise ConfigError(
            f"task set {source.name!r}: its entry is a {type(source).__name__}; make it with "
            f"settings.task_options.{needed.__name__}"
        )
    check_limits(source, f"task set {source.name!r}: ")
    if isinstance(source, OwnSource):
        return of_own(source)
    if source.name in _TASK_SETS:
        return _TASK_SETS[source.name]()
    if source.name in _WITH_OPTIONS:
        module, _, made = _WITH_OPTIONS[source.name].partition(":")
        limits = (answer_bytes,) if isinstance(source, ServedSource | VerifiersSource) else ()
        task_set: TaskSet = getattr(importlib.import_module(module), made)(source, *limits)
        return task_set
    remedy = did_you_mean(source.name, known, f"the names are {', '.join(known)}", cutoff=0.4)
    raise ConfigError(f"unknown task set {source.name!r}: {remedy}")


def environment(task: Task) -> Environment:
    """The environment of an embedded task. Raises ConfigError if its source is unknown or its problem is invalid."""
    return get(task.source).environment(task)


def problems(task_set: TaskSet, split: Split) -> list[Task]:
    """All problems of a split, checked. Raises ConfigError if the task set cannot list them, or lists anything other
    than tasks."""
    where = f"task set {task_set.name!r}: problems({split!r})"
    try:
        found = list(task_set.problems(split))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where} raised {type(error).__name__}: {escaped(str(error))}; correct the task set"
        ) from error
    for number, task in enumerate(found):
        texts = (task.task_id, task.source, task.split, task.problem) if isinstance(task, Task) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"{where}: entry {number} is {shown(task)}; return icrl_megatron.types.Task objects whose fields are "
                "texts"
            )
    return found


class Catalogue:
    """The task sets of one run, each created once; data is read and servers are connected to when first needed."""

    def __init__(
        self,
        sources: Iterable[TaskSource],
        answer_bytes: int = RolloutSettings.max_observation_bytes,
        tool_cache: ToolCache | None = None,
    ) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`. `tool_cache` is for task sets with tools."""
        self._sources = {source.name: (index, source) for index, source in enumerate(sources)}
        self._answer_bytes = answer_bytes
        self._made: dict[str, TaskSet] = {}
        self._tool_cache = tool_cache
        self._own_models: Mapping[str, Asker] = {}

    def lend(self, models: Mapping[str, Asker]) -> None:
        """Gives the run's own engines to task sets that ask them, before episodes are played."""
        self._own_models = models
        for made in self._made.values():
            if isinstance(made, AsksOwnModels):
                made.own_models = models

    def get(self, name: str) -> TaskSet:
        """The task set of that name: a name of `tasks.sources`, or that of a user's own task set, which its tasks have.
        Raises ConfigError as `of_source` does."""
        if name not in self._made:
            own = [self.get(given) for given in self._sources if is_own(given)] if not is_own(name) else []
            made = next((one for one in own if one.name == name), None)
            if made is None:
                index, source = self._sources.get(name, (0, source_of(name)))
                with own_entry(index):
                    made = of_source(source, self._answer_bytes)
            if isinstance(made, Cacheable):
                made.tool_cache = self._tool_cache
            if isinstance(made, AsksOwnModels):
                made.own_models = self._own_models
            self._made[name] = made
        return self._made[name]

    def problems(self, name: str, split: Split) -> list[Task]:
        """The function `problems` for the task set of that name."""
        task_set = self.get(name)
        with own_entry(self._sources[name][0] if name in self._sources else 0):
            return problems(task_set, split)

    def environment(self, task: Task) -> Environment:
        """Raises what `declared_tools.with_format` raises."""
        made, source = self.get(task.source).environment(task), self.own_source(task.source)
        return made if source is None else with_format(made, source.agent.format)

    def own_source(self, name: str) -> OwnSource | None:
        """The entry of a user's own task set of this name; None for any other one."""
        made = self.get(name)
        for given, (_, source) in self._sources.items():
            if isinstance(source, OwnSource) and self.get(given) is made:
                return source
        return None
