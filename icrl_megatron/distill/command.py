"""`icrl distill`: the system plays the training problems, and what the filters keep of its runs is written."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.distill import endpoint_agents, own_server, scripted, self_play, writers
from icrl_megatron.distill.environments import check_one_attempt, check_tools, with_tools
from icrl_megatron.distill.events import Failed, Run
from icrl_megatron.distill.filters import FilterReport, Rules, filtered
from icrl_megatron.distill.linear import linear
from icrl_megatron.distill.records import Records, identity
from icrl_megatron.distill.system import System, play_all
from icrl_megatron.distill.trajectory import Tokens
from icrl_megatron.settings.distill_schema import DistillSettings, SystemAgent
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import ServedSource, options
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Opening, Readable
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError, HopelessError, own_entry
from icrl_megatron.utils.files import locked, write_atomically
from icrl_megatron.utils.progress import Phase, Progress
from icrl_megatron.utils.result_files import begins_with, check_file

FAILURES_IN_A_ROW = 3
"""Times `distill.concurrency`: after so many, the command stops, because the endpoint is probably gone."""
_SHOWN_FAILURES = 5
_FIRST_KEY = "problems"
Play = Callable[[Sequence[tuple[Task, int]], Callable[[Run | Failed], None]], None]
"""Plays (task, attempt) pairs and passes each result on as it comes."""


@dataclass
class Distillation:
    """What one call of the command uses."""

    settings: Settings
    out: Path
    catalogue: registry.Catalogue
    problems: Sequence[Task]
    systems: Mapping[str, System]
    """Teams by task set; none if the model itself plays."""
    own_server: bool = False
    """Whether the teams' agents ask a server that the command starts."""
    failures: list[Failed] = field(default_factory=list)
    outdated: int = 0
    """Attempts in the file of runs whose problem has changed since."""
    heldout: tuple[str, ...] = ()
    """Held-out problems, which no trajectory may repeat."""
    sharegpt: Path | None = None
    """Where the trajectories are also written for other trainers."""
    measures: bool = False
    """Whether the system itself is measured: an attempt that an agent's form failed is then a wrong answer, and not
    tried again. Otherwise it is no data."""

    @property
    def report(self) -> Path:
        return self.out.with_suffix(".report.json")

    @property
    def runs(self) -> Path:
        return self.out.with_suffix(".runs.jsonl")

    @property
    def logs(self) -> Path:
        """Folder of the logs of servers that the command starts."""
        return self.out.with_suffix(".logs")

    def jobs(self) -> Iterator[tuple[Task, int]]:
        """Every problem once, then every problem again."""
        return ((task, attempt) for attempt in range(self.settings.distill.attempts) for task in self.problems)


def prepare(
    settings: Settings,
    out: Path,
    overwrite: bool = False,
    cache: ToolCache | None = None,
    split: Split = "train",
    sharegpt: Path | None = None,
) -> Distillation:
    """Checks all settings and input before anything starts. Raises ConfigError. Of held-out problems, the
    first `eval.problems` of each source are played."""
    if out.suffix not in writers.SUFFIXES:
        known = " or ".join(writers.SUFFIXES)
        raise ConfigError(
            f"--out={out}: trajectories are written as JSONL or Parquet; give a name that ends in {known}"
        )
    if sharegpt is not None and (sharegpt.suffix != ".jsonl" or sharegpt.resolve() == out.resolve()):
        raise ConfigError(f"--sharegpt={sharegpt}: give another name than --out, which ends in .jsonl")
    distill = settings.distill
    if distill.system != "endpoint" and distill.agents:
        raise ConfigError(f"distill.agents has no effect with distill.system={distill.system}: leave it empty")
    if distill.system == "model":
        self_play.check(settings)
    own = own_server.wanted(settings)
    settings = own_server.planned(settings) if own else settings
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes, cache)
    shared = endpoint_agents.team(settings.distill) if distill.system == "endpoint" else None
    problems, systems = list[Task](), dict[str, System]()
    for i, source in enumerate(settings.tasks.sources):
        if isinstance(source, ServedSource) and source.served:
            raise ConfigError(
                f"task set {source.name!r}: `icrl distill` starts no servers (serve.command): start them and give "
                f"their addresses, e.g. 'tasks.sources.{i}.data.servers=[http://host:36001]'"
            )
        tasks = catalogue.problems(source.name, split)
        tasks = tasks[: settings.tasks.limit if split == "train" else settings.eval.problems]
        problems += tasks
        if distill.system == "model":
            for task in tasks[:1]:
                with own_entry(i):
                    found = with_tools(catalogue.environment(task), task)
                    check_one_attempt(found, task, settings.rollout.rounds)
            continue
        team = scripted.team(source.name) if shared is None else shared
        name = catalogue.get(source.name).name  # that of a user's own class is another one
        systems[name] = System(team, catalogue.environment, settings.distill, settings.rollout, settings.seed)
        with own_entry(i):
            check_tools(team, catalogue.environment, tasks)
    made = Distillation(
        settings, out, catalogue, problems, systems, own, sharegpt=sharegpt, measures=split == "heldout"
    )
    if split == "train" and "leakage" not in distill.filters.leave_out:
        made.heldout = _heldout(made)
    check_file(out, "a file of trajectories", writers.written_here, overwrite)
    if sharegpt is not None:
        check_file(sharegpt, "a file of conversations", begins_with(b'{"conversations"'), overwrite)
    check_file(made.report, "a report", begins_with(f'"{_FIRST_KEY}"'.encode()), overwrite)
    return made


def run(settings: Settings, out: Path, overwrite: bool = False, sharegpt: Path | None = None) -> str:
    """Plays what has not been played, filters and writes: to `out`, and to `sharegpt` for other trainers. Returns a
    summary in words.

    Raises ConfigError, and HopelessError if too many attempts fail in a row or nothing is left."""
    return played(settings, out, _write, overwrite, sharegpt=sharegpt)


def played(
    settings: Settings,
    out: Path,
    conclude: Callable[[Distillation, Sequence[Run]], str],
    overwrite: bool = False,
    split: Split = "train",
    sharegpt: Path | None = None,
) -> str:
    """Plays what has not been played, and returns what `conclude` makes of all finished attempts. Raises as `run`."""
    cache = ToolCache.of(settings.tasks.tool_cache)
    with closing(cache) if cache else nullcontext():
        job = prepare(settings, out, overwrite, cache, split, sharegpt)
        with locked(out.parent, f".{out.name}.lock", f"--out={out}"):
            plays_model = job.own_server or settings.distill.system == "model"
            records = Records(job.runs, identity(job.settings, plays_model), job.problems)
            with closing(records):
                job.outdated = records.outdated
                try:
                    _play(job, records)
                except HopelessError:
                    if not job.out.exists():  # otherwise the report is that of its trajectories
                        _report(job, _finished(job, records), [], 0)
                    raise
            return conclude(job, _finished(job, records))


def _finished(job: Distillation, records: Records) -> list[Run]:
    return [records.runs[task.task_id, a] for task, a in job.jobs() if (task.task_id, a) in records.runs]


def _play(job: Distillation, records: Records) -> None:
    jobs, progress = list(job.jobs()), Progress()
    left = [(task, attempt) for task, attempt in jobs if (task.task_id, attempt) not in records.runs]
    if not left:
        return
    with _players(job, progress) as play, progress.phase("attempts", len(jobs)) as bar:
        bar.advance(len(jobs) - len(left))
        play(left, _recorder(job, records, bar))


@contextmanager
def _players(job: Distillation, progress: Progress) -> Iterator[Play]:
    """What plays attempts. Its engine or server, if the command starts one, ends with the block."""
    if job.settings.distill.system == "model":
        with self_play.playing(job.settings, job.catalogue.environment, job.logs, progress) as model:
            yield model.play
    elif job.own_server:
        with own_server.serving(job.settings, job.logs / "sglang_0.log", progress) as settings:
            team = endpoint_agents.team(settings.distill)
            yield _teams(job, {source: replace(system, team=team) for source, system in job.systems.items()})
    else:
        yield _teams(job, job.systems)


def _teams(job: Distillation, systems: Mapping[str, System]) -> Play:
    def play(left: Sequence[tuple[Task, int]], done: Callable[[Run | Failed], None]) -> None:
        for source, system in systems.items():
            mine = ((task, attempt) for task, attempt in left if task.source == source)
            asyncio.run(play_all(system, mine, job.settings.distill.concurrency, done))

    return play


def _recorder(job: Distillation, records: Records, bar: Phase) -> Callable[[Run | Failed], None]:
    """Keeps each result. Raises HopelessError after too many failures in a row."""
    in_a_row = 0

    def done(result: Run | Failed) -> None:
        nonlocal in_a_row
        if job.measures and isinstance(result, Failed) and result.unanswered is not None:
            records.add(result.unanswered)
        elif isinstance(result, Run):
            records.add(result)
            in_a_row = 0
        else:
            job.failures.append(result)
            in_a_row += result.kind != "too_long"  # these fail again at each call
            if in_a_row >= FAILURES_IN_A_ROW * job.settings.distill.concurrency:
                raise HopelessError(
                    f"{in_a_row} attempts in a row failed, the last one: {result.message}; correct that, and the "
                    f"same command continues ({len(records.runs)} attempts are in {job.runs})"
                )
        bar.advance(1, f"{len(job.failures)} failed" if job.failures else None)

    return done


def _write(job: Distillation, runs: Sequence[Run]) -> str:
    grammars = {
        job.catalogue.get(source.name).name: dict(options(source)).get("agent.grammar", "calls")
        for source in job.settings.tasks.sources
    }
    rules = Rules(job.settings.distill.filters, job.settings.seed, job.heldout, grammars)
    kept, reports = filtered([linear(run) for run in runs], rules)
    counted = _report(job, runs, reports, len(kept))
    if not kept:
        raise HopelessError(
            f"no trajectory is left of {len(runs)} attempts ({len(job.failures)} failed): {job.report} says why"
        )
    writers.write(job.out, kept)
    if job.sharegpt is not None:
        writers.write_sharegpt(job.sharegpt, kept)
    return _summary(job, counted, reports, len(kept))


def _report(job: Distillation, runs: Sequence[Run], reports: Sequence[FilterReport], written: int) -> dict[str, Any]:
    """Writes the report. Returns its counts without the filters'."""
    counted = _counts(job, runs)
    whole = json.dumps({**counted, "filters": [asdict(one) for one in reports], "written": written}, indent=1)
    write_atomically(job.report, [whole], "the report")
    return counted


def _heldout(job: Distillation) -> tuple[str, ...]:
    found = []
    for source in job.settings.tasks.sources:
        task_set = job.catalogue.get(source.name)
        for task in job.catalogue.problems(source.name, "heldout"):
            said = task_set.statement(task) if isinstance(task_set, Readable) else None
            found.append(task.problem if said is None else Opening.of(said).text)
    return tuple(found)


def _counts(job: Distillation, runs: Sequence[Run]) -> dict[str, Any]:
    spent: dict[str, Tokens] = {}
    for one in runs:
        for agent, tokens in one.spent.items():
            before = spent.get(agent, Tokens())
            spent[agent] = Tokens(before.read + tokens.read, before.written + tokens.written)
    return {
        _FIRST_KEY: len(job.problems),
        "attempts": len(job.problems) * job.settings.distill.attempts,
        "finished": len(runs),
        "right": sum(one.correct for one in runs),
        "problems_solved": len({one.task_id for one in runs if one.correct}),
        "of_changed_problems": job.outdated,
        "failed": dict(sorted(Counter(one.kind for one in job.failures).items())),
        "failures": [f"{one.task_id}: {one.kind}: {one.message}"[:300] for one in job.failures[:_SHOWN_FAILURES]],
        "tokens": {agent: {"read": t.read, "written": t.written} for agent, t in sorted(spent.items())},
        "cost": _cost(job.settings.distill, spent),
        "replies_without_token_counts": sum(one.uncounted for one in runs),
        "unreadable_replies": sum(one.unreadable for one in runs),
    }


def _cost(distill: DistillSettings, spent: Mapping[str, Tokens]) -> dict[str, float]:
    """Agent -> price of its tokens; empty if the settings have no price, or no endpoint answers."""
    endpoint, own = distill.endpoint, {agent.name: agent for agent in distill.agents}
    found = {}
    for name, tokens in sorted(spent.items()):
        agent = own.get(name, SystemAgent())
        read = endpoint.read_price if agent.read_price is None else agent.read_price
        written = endpoint.written_price if agent.written_price is None else agent.written_price
        found[name] = (tokens.read * read + tokens.written * written) / 1e6
    return found if distill.system == "endpoint" and any(found.values()) else {}


def _summary(job: Distillation, counted: Mapping[str, Any], reports: Sequence[FilterReport], written: int) -> str:
    lines = [
        f"{counted['finished']} of {counted['attempts']} attempts finished, {counted['right']} with a right answer"
    ]
    if job.failures:
        first = job.failures[0]
        lines.append(
            f"{len(job.failures)} attempts failed, the first one ({first.task_id}): {first.message}; the same command "
            "tries them again"
        )
    if counted["cost"]:
        lines.append(f"cost of the finished attempts: {sum(counted['cost'].values()):.4g}")
    if job.outdated:
        lines.append(f"{job.outdated} attempts in {job.runs} are not used, because their problems have changed since")
    for one in reports:
        why = "; ".join(f"{count} {reason}" for reason, count in one.why.items())
        lines.append(f"{one.name:12} {one.read:7} -> {one.kept + one.added:7}  {why}".rstrip())
    return "\n".join([*lines, f"written to {job.out}: {written} trajectories; counts in {job.report}"])
