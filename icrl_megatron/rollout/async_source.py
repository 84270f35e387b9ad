"""The source of an asynchronous run: groups are played ahead, in rollout processes, while earlier ones are trained on.

Groups are numbered in the run's order of tasks. At most (staleness + 1) steps' groups are begun and not trained on, and
no more than keep the actor from waiting (`lead.py`). Each step takes the oldest complete groups of all ranks; a group
that began more than `rollout.staleness` versions ago is dropped and counted, and another one begun in its place.
docs/ASYNC.md derives the objective.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from icrl_megatron.distributed.grid import gather_results
from icrl_megatron.engines.protocol import EngineError, EngineStats
from icrl_megatron.engines.rank import Share
from icrl_megatron.rollout.episode import Ended
from icrl_megatron.rollout.lead import Lead
from icrl_megatron.rollout.messages import (
    Abandoned,
    Begin,
    EngineLost,
    Forget,
    GroupEnded,
    JobResult,
    Probed,
    RunJob,
    Save,
    SavedGroups,
    StopRollouts,
)
from icrl_megatron.rollout.open_group import OpenGroup, begun_line, group_lines, read, share_of
from icrl_megatron.rollout.played import Gather, Job, Played, RolloutRequest, T, play_request, together
from icrl_megatron.rollout.probe import PROBE_REPLIES, PROBE_WAIT_S, Probe
from icrl_megatron.rollout.replay import tokens
from icrl_megatron.rollout.service_process import RolloutProcess
from icrl_megatron.rollout.source import MAX_DEATHS
from icrl_megatron.types import Episode, Task
from icrl_megatron.utils.progress import Progress

SHORTEST_S, LONGEST_S = 0.005, 0.2
"""Pause between two looks at what is complete: short at first, longer the longer the ranks wait."""
SAVE_TIMEOUT_S = 120.0
"""Longest wait for the replies of unfinished groups when a checkpoint is saved."""


@dataclass(frozen=True)
class Order:
    """The run's order of groups; the same on every rank."""

    task: Callable[[int], Task]
    """The task of a group by its number."""
    per_step: int
    """Groups of a step."""
    steps: int
    """Training steps of the run."""
    staleness: int
    turns: Callable[[int], int]
    """Largest number of turns in a step, counted from 0."""

    def limit(self, gone: int, step: int, lead: int) -> int:
        """How many groups may have been begun when `gone` ones are trained on or dropped, for a step counted from 0:
        its own and `lead` more, but no more than the run can train on."""
        return gone + min(self.per_step + lead, (self.steps - step) * self.per_step)


@dataclass
class _Account:
    """This rank's counts since the last step; tokens: generated + kept before = used + discarded + kept now."""

    generated: int = 0
    discarded: int = 0
    cut_off: int = 0
    too_old: int = 0
    deaths: int = 0
    stats: EngineStats = field(default_factory=EngineStats)


@dataclass(frozen=True)
class _Report:
    """What a rank reports to the others while they wait for a step's groups."""

    complete: tuple[tuple[int, str, int], ...]
    """(number, task id, version) of its complete groups."""
    gone: int
    """Groups that were dropped since the last report."""


class AsyncSource:
    """All ranks make the same calls. A rank that leads no engine has no process."""

    def __init__(
        self,
        process: RolloutProcess | None,
        share: Share,
        order: Order,
        episodes: int,
        version: Callable[[], int],
        resend: Callable[[bool], None],
        gather: Gather,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> None:
        """`episodes`: of each group. `version` returns that of the weights that were pushed last; `resend` pushes them
        again to the ranks that pass True; `stopping`: whether this rank was asked to stop."""
        self._process, self._share, self._order, self._episodes = process, share, order, episodes
        self._version, self._resend, self._gather = version, resend, gather
        self._progress, self._stopping = progress, stopping
        self._lead = Lead(order.per_step, order.staleness)
        self._begun: int | None = None
        """Number of the next group; None until the first step, if no checkpoint has it."""
        self._gone = 0
        """Groups that all ranks trained on or dropped."""
        self._open: dict[int, OpenGroup] = {}
        """This rank's groups that are played."""
        self._complete: dict[int, GroupEnded] = {}
        self._taken: dict[int, OpenGroup] = {}
        """Groups of the current step, until it is complete."""
        self._groups: dict[int, OpenGroup] = {}
        """This rank's groups that are not trained on or dropped, as they were begun."""
        self._restored: tuple[OpenGroup, ...] = ()
        """Those of a checkpoint, until they begin."""
        self._probed: Probed | None = None
        self._has_prompt = False
        """Whether the process has a prompt for probes: that of a group that has ended."""
        self._account, self._kept = _Account(), 0
        self._lost_at: list[int] = []
        """The versions at which processes were lost."""
        self._stop_sent = False
        self._abandoned = 0
        """Groups that the process abandoned since the last report."""

    def play(self, request: RolloutRequest) -> Played:
        """A step's groups are the oldest complete ones: of the request, only their number and the step are used. An
        evaluation's are those of the request. Raises what playing raises, and EngineError once MAX_DEATHS processes
        were lost."""
        if request.needed is None:
            return self._evaluate(request)
        if self._begun is None:
            self._begun = self._gone = request.seeds.step * self._order.per_step
        self._begin_restored()
        ahead = self._begun > self._gone
        with self._progress.phase("rollout", request.needed) as bar:
            wait = SHORTEST_S
            while True:
                self._begin(self._order.limit(self._gone, request.seeds.step, self._lead.groups))
                reports: list[_Report] = self._meet(self._report)
                self._gone += sum(report.gone for report in reports)
                complete = sorted(group for report in reports for group in report.complete)
                if ahead:
                    self._lead.adapt(len(complete))
                    ahead = False
                bar.advance(min(len(complete), request.needed) - bar.done)
                if len(complete) >= request.needed:
                    return self._take(complete[: request.needed])
                time.sleep(wait)
                wait = min(1.5 * wait, LONGEST_S)

    def run(self, job: Job[T] | None) -> T | None:
        """The job runs beside the groups."""
        found: list[T] = []

        def ended() -> bool:
            found.extend(message.value for message in self._receive() if isinstance(message, JobResult))
            return job is None or bool(found)

        assert job is None or self._process is not None
        if self._process is not None and job is not None:
            self._process.send(RunJob(job))
        while not all(self._meet(ended, None if found else job)):
            time.sleep(LONGEST_S / 4)
        return found[0] if found else None

    def probes(self) -> Played:
        version = self._version()
        first = (self._share.index or 0) * PROBE_REPLIES
        mine = [replace(one, index=first + one.index) for one in self._answer(version)]
        return replace(together(self._gather, (), mine, None)[0], version=version)

    def unfinished(self) -> Callable[[], list[str]]:
        taken = tuple(self._taken)
        self._taken = {}
        for number in taken:
            del self._groups[number]
        if self._process is not None and taken:
            self._process.send(Forget(taken))
        return self._lines

    def saved(self, step: int) -> None:
        """Does nothing: the rollout process has forgotten the groups of complete steps."""

    def restore(self, path: Path, known: Collection[Task]) -> int:
        saved = read(path)
        if saved is None:
            return 0
        kept = [group for group in saved.groups if group.task in known]
        self._begun, self._gone = saved.begun, saved.begun - len(kept)
        self._restored = tuple(share_of(kept, self._share.index, self._share.count))
        self._groups = {group.number: group for group in self._restored}
        self._kept = sum(tokens({group.task: group.logs}) for group in self._restored)
        return len(saved.groups) - len(kept)

    def _begin_restored(self) -> None:
        """Begins the groups of a checkpoint: not before the engine has the weights of that step."""
        groups, self._restored = self._restored, ()
        self._open.update({group.number: group for group in groups})
        if self._process is not None and groups:
            self._process.send(Begin(groups))

    def _begin(self, limit: int) -> None:
        """Begins this rank's part of the groups below `limit`."""
        assert self._begun is not None
        order, share = self._order, self._share
        # Every rank draws all of them: with a curriculum, a later draw would give other tasks.
        tasks = [(n, order.task(n)) for n in range(self._begun, limit)]
        self._begun = max(self._begun, limit)
        mine = [(n, task) for n, task in tasks if n % share.count == share.index]
        if not mine or self._process is None:
            return
        groups = [OpenGroup(n, task, order.turns(n // order.per_step)) for n, task in mine]
        for group in groups:
            self._open[group.number] = self._groups[group.number] = group
        self._process.send(Begin(tuple(groups)))

    def _report(self) -> _Report:
        """Drops groups that are too old, and reports those that are complete."""
        for message in self._receive():
            raise RuntimeError(f"unexpected {type(message).__name__}")
        oldest = self._version() - self._order.staleness
        old = [number for number, group in self._complete.items() if group.version < oldest]
        for number in old:
            group = self._complete.pop(number)
            self._account.discarded += group.tokens
            del self._groups[number]
        if old and self._process is not None:
            self._process.send(Forget(tuple(old)))
        dropped, self._account.too_old = len(old), self._account.too_old + len(old)
        dropped, self._abandoned = dropped + self._abandoned, 0
        return _Report(tuple((g.number, g.task_id, g.version) for g in self._complete.values()), dropped)

    def _receive(self) -> list[Any]:
        """Takes the process's messages into account; returns the others."""
        if self._process is None:
            return []
        others = list[Any]()
        account = self._account
        for message in self._process.take():
            if isinstance(message, GroupEnded):
                self._complete[message.number] = message
                self._open.pop(message.number, None)
                self._has_prompt = self._has_prompt or Probe.of(message.results) is not None
            elif isinstance(message, Abandoned):
                for number in message.numbers:
                    self._open.pop(number, None)
                    self._groups.pop(number, None)
                self._abandoned += len(message.numbers)
                account.too_old += len(message.numbers)
                account.cut_off += message.episodes
                account.discarded += message.tokens
            elif isinstance(message, Probed):
                self._probed = message
            elif isinstance(message, EngineLost):
                self._progress.log(f"engine lost, restarting it: {message.why.splitlines()[0]}")
            elif not isinstance(message, SavedGroups):  # one that came too late for its checkpoint
                others.append(message)
        beat = self._process.take_counters()
        account.generated += beat.generated
        account.stats += beat.stats
        account.deaths += beat.deaths
        return others

    def _answer(self, version: int) -> tuple[Episode, ...]:
        """The replies of this rank's engine under the weights of `version`, if they come in time."""
        begun = time.monotonic()
        while self._process is not None and self._has_prompt:
            limit_s = 0.0 if self._process.asleep else PROBE_WAIT_S
            if self._probed is not None and self._probed.version == version:
                return self._probed.episodes
            answer = self._process.wait_for(Probed, begun + limit_s - time.monotonic())
            if not isinstance(answer, Probed):
                self._progress.log(
                    "engine mismatch is not measured in this step: the engine is lost, or did not answer within "
                    f"{limit_s:g} s"
                )
                break
            self._probed = answer
        return ()

    def _take(self, chosen: Sequence[tuple[int, str, int]]) -> Played:
        """The groups of a step, given as (number, task id, version). A second group of the same task gets other
        episode indices: both share one baseline."""
        assert self._begun is not None
        before = Counter[str]()
        offsets: dict[int, int] = {}
        for number, task_id, _ in chosen:
            offsets[number] = before[task_id] * self._episodes
            before[task_id] += 1
        ended, used = list[Ended](), 0
        for number in [n for n, *_ in chosen if n in self._complete]:
            group = self._complete.pop(number)
            self._taken[number] = self._groups[number]
            mine = [replace(one, index=one.index + offsets[number]) for one in group.results]
            spent = sum(one.generated_tokens() for one in mine if isinstance(one, Episode))
            self._account.discarded += group.tokens - spent
            ended, used = ended + mine, used + spent
        self._gone += len(chosen)
        account, self._account = self._account, _Account()
        self._kept += account.generated - used - account.discarded
        counts = account.generated, account.discarded, account.cut_off, account.too_old, account.deaths, self._kept
        tasks = [self._order.task(number) for number, *_ in chosen]
        played, everyone = together(self._gather, tasks, ended, (counts, account.stats))
        generated, discarded, cut_off, too_old, deaths, kept = map(sum, zip(*(of for of, _ in everyone), strict=True))
        version = self._version()
        return replace(
            played,
            engine=sum((stats for _, stats in everyone), EngineStats()),
            deaths=deaths,
            cut_off=cut_off,
            discarded_tokens=discarded,
            kept_tokens=kept,
            generated=generated,
            version=version,
            behind=tuple(version - begun for *_, begun in chosen),
            too_old=too_old,
        )

    def _evaluate(self, request: RolloutRequest) -> Played:
        share = self._share
        mine = [] if share.index is None else request.tasks[share.index :: share.count]
        with self._progress.phase("rollout", len(request.tasks) * request.episodes):
            ended = self.run(partial(play_request, mine, request) if mine else None)
        return together(self._gather, request.tasks, ended or [], None)[0]

    def _meet(self, mine: Callable[[], Any], job: Job[Any] | None = None) -> list[Any]:
        """What `mine` returns on all ranks. Restarts lost processes, and sends them the weights. All ranks call it
        together."""
        if self._stopping() and not self._stop_sent and self._process is not None:
            self._process.send(StopRollouts())
            self._stop_sent = True
        (needs, _), everyone = gather_results(self._gather, lambda: (self._keep_alive(job), mine()))
        if any(needed for needed, _ in everyone):
            self._resend(needs)
        return [found for _, found in everyone]

    def _keep_alive(self, job: Job[Any] | None) -> bool:
        """Restarts a lost process. Returns whether its engine needs the current weights."""
        process = self._process
        if process is None:
            return False
        if why := process.lost():
            self._restart(why, job)
            return True
        return process.needs_weights()

    def _restart(self, why: str, job: Job[Any] | None) -> None:
        assert self._process is not None
        self._receive()
        version = self._version()
        self._lost_at.append(version)
        if self._lost_at.count(version) >= MAX_DEATHS:
            raise EngineError(f"{self._lost_at.count(version)} rollout processes were lost in one step. {why}")
        self._progress.log(f"rollout process lost, restarting it: {why}")
        self._account.deaths += 1
        held = sum(group.tokens for group in self._complete.values())
        held += sum(tokens({group.task: group.logs}) for group in self._open.values())
        self._account.discarded += max(0, self._kept + self._account.generated - self._account.discarded - held)
        self._process.restart()
        self._process.wait_ready()
        self._stop_sent = self._has_prompt = False
        # The new process has no weights yet, and would say that they begin with version 0.
        begun = ((n, group, version if group.version is None else group.version) for n, group in self._groups.items())
        again = [replace(group, version=of, ended=number not in self._open) for number, group, of in begun]
        self._process.send(Begin(tuple(again)))
        if job is not None:
            self._process.send(RunJob(job))

    def _lines(self) -> list[str]:
        """The lines of this rank's groups, with the replies of their episodes if the process can send them."""
        found = list(self._groups.values())
        if self._process is not None and found:
            self._process.send(Save())
            answer = self._process.wait_for(SavedGroups, SAVE_TIMEOUT_S)
            if isinstance(answer, SavedGroups):
                known = {group.number: group for group in answer.groups}
                found = [known.get(group.number, group) for group in found]
            else:
                self._progress.log(
                    f"the checkpoint has {len(found)} unfinished groups without their replies: the rollout process is "
                    f"lost, or did not send them within {SAVE_TIMEOUT_S:g} s"
                )
        begun = [] if self._begun is None or self._share.index != 0 else [begun_line(self._begun)]
        return begun + group_lines(found)
