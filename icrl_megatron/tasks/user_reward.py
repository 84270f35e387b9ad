"""A user's own reward functions and judges as a task set: rows of files, one reply each, and its reward.

problem  {"prompt": ..., "label": ..., "given_prompt": ..., "columns": {...}, "where": ...}
reply    any text; the function reads all of it
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.judge import Asker, judge_client
from icrl_megatron.settings.task_options import OwnSource, check_unused
from icrl_megatron.tasks.base import BadAnswer, Environment, EnvironmentFailure, Opening, StepResult, own_problem
from icrl_megatron.tasks.columns import Columns, at_path
from icrl_megatron.tasks.datasets import DataRow, read_tasks
from icrl_megatron.tasks.grader import START_TIMEOUT_S, Worker, WorkerPool
from icrl_megatron.tasks.package_environment import check_range
from icrl_megatron.tasks.reward_call import Reward, measure_of
from icrl_megatron.tasks.reward_judge import RewardPrompt, ScoreJudge, check_judge, is_judge
from icrl_megatron.tasks.reward_worker import IMPORT
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError

_SAMPLE = "This is a test reply, which the check before a run makes. The answer is 1."
_SAME = 1e-9
"""A weighted mean of ones may miss 1 by rounding."""


class RewardPool(WorkerPool):
    """Calls reward functions for many coroutines at once."""

    def __init__(self, source: OwnSource, rewards: Sequence[tuple[str, float]], several: bool) -> None:
        """`rewards`: (name, weight). `several`: whether there are other rewards, so that each is a measure."""
        reward = source.reward
        super().__init__(reward.workers, "reward")
        self._argument = json.dumps({"rewards": rewards, "low": reward.low, "high": reward.high, "several": several})
        self._names, self._timeout_s = ", ".join(name for name, _ in rewards), reward.timeout_s

    async def reward(self, problem: Mapping[str, Any], response: str) -> Reward:
        """Raises as `reward_now`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, problem, response)

    def reward_now(self, problem: Mapping[str, Any], response: str) -> Reward:
        """The reward of a reply. Raises EnvironmentFailure if a function raises or takes too long, or its process dies;
        BadAnswer if a function returns something that is not a reward."""
        return self._threads.submit(self._run, problem, response).result()

    def _run(self, problem: Mapping[str, Any], response: str) -> Reward:
        job = {name: value for name, value in problem.items() if name not in ("where", "system")}
        job |= {"prompt": _opening(problem).joined(), "response": response}
        worker = self._worker()
        verdict = self._asked(worker, job, self._timeout_s, "reward.timeout_s")
        self._idle.put(worker)
        if "wrong" in verdict:
            raise BadAnswer(verdict["wrong"])
        return Reward(verdict["reward"], verdict["measures"])

    def _started(self) -> Worker:
        worker = Worker("icrl_megatron.tasks.reward_worker", arguments=(self._argument,))
        self._asked(worker, IMPORT, START_TIMEOUT_S, "the time to import them")
        return worker

    def _asked(self, worker: Worker, job: dict[str, Any], wait_s: float, limit: str) -> dict[str, Any]:
        try:
            verdict = worker.ask(job, wait_s)
        except TimeoutError as error:
            raise EnvironmentFailure(f"{self._names} took longer than {wait_s:g} s ({limit}) and was ended") from error
        except (EOFError, ValueError) as error:
            raise EnvironmentFailure(f"the process of {self._names} died; run the function on this row") from error
        if "raised" in verdict:
            worker.close() if job == IMPORT else self._idle.put(worker)
            raise EnvironmentFailure(verdict["raised"])
        return verdict


class Rewards:
    """All rewards of an entry: functions in processes, and judges."""

    def __init__(self, source: OwnSource, who: Callable[[], Asker], cache: ToolCache | None = None) -> None:
        """`who` answers the prompts of judges, and `cache` keeps its replies. Raises ConfigError for a judge's prompt
        that cannot be used."""
        named = _named(source)
        functions = [one for one in named if not is_judge(one[0])]
        self._weight_of_functions = math.fsum(weight for _, weight in functions)
        self._several, self._weight = len(named) > 1, math.fsum(weight for _, weight in named)
        self.pool = RewardPool(source, functions, self._several) if functions else None
        self.judges = [
            (ScoreJudge(RewardPrompt.read(name, _setting(number)), source.judge, who, cache), weight)
            for number, (name, weight) in enumerate(named)
            if is_judge(name)
        ]

    async def reward(self, problem: Mapping[str, Any], response: str) -> Reward:
        """Asks all of them at the same time. Raises as `RewardPool.reward_now` and `ScoreJudge.score`."""
        prompt = _opening(problem).joined()
        messages = [judge.prompt.message(problem, prompt, response) for judge, _ in self.judges]
        asked = zip(self.judges, messages, strict=True)
        jobs = [asyncio.ensure_future(judge.score(message)) for (judge, _), message in asked]
        try:
            of_functions = Reward(0.0, {}) if self.pool is None else await self.pool.reward(problem, response)
            scores = await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        if not self.judges:
            return of_functions
        parts, measures = [self._weight_of_functions * of_functions.value], dict(of_functions.measures)
        for (judge, weight), judged in zip(self.judges, scores, strict=True):
            parts.append(weight * judge.unit(judged.score))
            if self._several:
                measures[measure_of(judge.prompt.given)] = judged.score
        measures["judge_cached"] = float(sum(judged.cached for judged in scores))
        return Reward(min(1.0, max(0.0, math.fsum(parts) / self._weight)), measures)

    def check(self, problem: Mapping[str, Any], response: str) -> None:
        """Calls the functions and renders the judges' prompts; no judge is asked. Raises as `reward`."""
        for judge, _ in self.judges:
            judge.prompt.message(problem, _opening(problem).joined(), response)
        if self.pool is not None:
            self.pool.reward_now(problem, response)

    def close(self) -> None:
        """Ends the processes; the rewards must not be used afterwards."""
        if self.pool is not None:
            self.pool.close()


def _named(source: OwnSource) -> list[tuple[str, float]]:
    """(name, weight) of every reward."""
    return [(source.name, 1.0), *((more.name, more.weight) for more in source.reward.more)]


def _setting(number: int) -> str:
    """The setting that names a reward."""
    return f"tasks.sources[...].reward.more.{number - 1}.name" if number else "tasks.sources[...].name"


class RewardEnvironment:
    """One question, one reply, its reward."""

    max_turns = 1

    def __init__(self, problem: Mapping[str, Any], rewards: Rewards, success: float) -> None:
        self._problem, self._rewards, self._least = problem, rewards, success
        self._reward: Reward | None = None

    async def reset(self) -> str | Opening:
        self._reward = None
        return _statement(self._problem)

    def parse(self, reply: str) -> str | None:
        return reply or None

    def hint(self) -> str:
        return "The reply is empty."

    async def step(self, action: str) -> StepResult:
        self._reward = await self._rewards.reward(self._problem, action)
        return StepResult("", done=True)

    def outcome(self) -> float:
        return 0.0 if self._reward is None else self._reward.value

    def success(self) -> bool:
        return self._reward is not None and self._reward.value >= self._least - _SAME

    def summary(self) -> str:
        if self._reward is None:
            return "The reply is empty."
        measures = "".join(f", {name} {value:.4g}" for name, value in self._reward.measures.items())
        return f"The reward of the reply is {self._reward.value:.4g}, and the best is 1{measures}."

    def measures(self) -> dict[str, float]:
        return {} if self._reward is None else self._reward.measures


class RewardTasks:
    """The task set of the files in `tasks.sources[...].data`, with a user's reward functions and judges."""

    def __init__(self, source: OwnSource) -> None:
        """Raises ConfigError if settings contradict each other, and for a judge's prompt that cannot be used."""
        check_unused(source, ["options", "agent"], "with a reward, which gets the columns of the row")
        judges = [is_judge(name) for name, _ in _named(source)]
        if any(judges):
            check_judge(source)
        else:
            check_unused(source, ["judge"], "without a judge, FILE.jinja:NAME, among the rewards")
        if all(judges):
            unused = [f"reward.{name}" for name in ("low", "high", "workers", "timeout_s")]
            check_unused(source, unused, "with judges only, whose scale is judge.low to judge.high")
        check_range(source.name, source.reward, "the function's")
        self._source, self.name = source, source.name.rpartition(":")[2]
        self._problems: dict[Split, list[Task]] = {}
        self.tool_cache: ToolCache | None = None
        self.own_models: Mapping[str, Asker] = {}
        Rewards(source, self._judge)  # reads the prompts

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._problems:
            self._problems[split] = read_tasks(self.name, split, self._source.data, _problem)
        return self._problems[split]

    def environment(self, task: Task) -> Environment:
        with own_problem(self, task):
            return RewardEnvironment(json.loads(task.problem), self.rewards, self._source.reward.success)

    def statement(self, task: Task) -> str | Opening:
        with own_problem(self, task):
            return _statement(json.loads(task.problem))

    def check(self) -> None:
        """Calls the functions on a reply to the first row of each split, and renders the prompts of judges with it.
        Raises ConfigError if one fails."""
        try:
            for problem in [json.loads(self.problems(split)[0].problem) for split in SPLITS]:
                try:
                    self.rewards.check(problem, _SAMPLE)
                except EnvironmentFailure as error:
                    raise ConfigError(
                        f"tasks.sources[...].name={self._source.name}: the reward of {_SAMPLE!r} for "
                        f"{problem['where']} cannot be computed: {error}; correct the function or the prompt "
                        "(docs/TASKS.md, Your own reward)"
                    ) from error
        finally:
            self.rewards.close()
            del self.rewards

    @cached_property
    def rewards(self) -> Rewards:
        return Rewards(self._source, self._judge, self.tool_cache)

    @cached_property
    def _endpoint(self) -> Asker:
        return judge_client(self._source.judge.endpoint)

    def _judge(self) -> Asker:
        """Raises ConfigError if the run has no such engine."""
        name = self._source.judge.engine
        if name == "endpoint":
            return self._endpoint
        if name not in self.own_models:
            raise ConfigError(
                f"task set {self._source.name!r}: judge.engine={name}, and there is no such engine here; set "
                "judge.engine=endpoint with the address of a judge, or use a new run with rollout.critic=frozen"
            )
        return self.own_models[name]


def _problem(row: DataRow) -> str:
    used = row.columns or Columns("", "label")
    return row.problem(
        label=row.label,
        given_prompt=_messages(at_path(row.fields, used.prompt)) or row.content(),
        label_column=used.label.rpartition(".")[2] or "label",
        columns=_columns(row.fields, (used.prompt, used.label)),
    )


def _opening(problem: Mapping[str, Any]) -> Opening:
    return Opening(str(problem["prompt"]), problem.get("system", ""))


def _statement(problem: Mapping[str, Any]) -> str | Opening:
    opening = _opening(problem)
    return Opening.plain(opening.text, opening.system)


def _messages(value: Any) -> list[Any] | None:
    """A prompt of messages; None for any other."""
    return value if isinstance(value, list) and all(isinstance(message, dict) for message in value) else None


def _columns(fields: Mapping[str, Any], without: tuple[str, str]) -> dict[str, Any]:
    """The columns that JSON can have; images and dates are left out."""
    found = {}
    for name, value in fields.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            continue
        if name not in without:
            found[name] = value
    return found
