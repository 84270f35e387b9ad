"""Plays groups for the whole run, in a process next to the trainer's (`rollout.staleness`).

The trainer says which groups to begin, and gets each group when all of its episodes have ended. New weights arrive in
between: requests are cut off at their next token, and continue under the new weights (`engines.continuing`). Every
token keeps the version that generated it. This is a separate process because environments can be interrupted only in
a main thread (`watchdog.py`), and because an engine in the trainer's process would wait for the trainer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from icrl_megatron.engines.continuing import ContinuingEngine
from icrl_megatron.engines.protocol import EngineError, EngineLostError, Sampling
from icrl_megatron.engines.rank import Engines
from icrl_megatron.rollout.episode import Ended, EpisodeSetup, play_twice
from icrl_megatron.rollout.messages import (
    Abandoned,
    Asleep,
    Begin,
    EngineLost,
    Forget,
    FromService,
    GroupEnded,
    Heartbeat,
    JobResult,
    Probed,
    Ready,
    RunJob,
    Save,
    SavedGroups,
    Sleep,
    StopRollouts,
    ToService,
    Update,
    Updated,
)
from icrl_megatron.rollout.open_group import OpenGroup
from icrl_megatron.rollout.played import Job
from icrl_megatron.rollout.probe import PROBE_ALONE_S, Probe
from icrl_megatron.rollout.replay import ReplayLog, Stop, copied, recorded, tokens
from icrl_megatron.rollout.source import MAX_DEATHS
from icrl_megatron.rollout.speakers import Meter, Seeds, Speakers, SpeakersFor
from icrl_megatron.types import Completion, Ids, Task, UnplayedEpisode

HEARTBEAT_S = 1.0
"""Interval of the messages that say that the process is alive."""


class StopFlag(Protocol):
    """Whether the run was asked to stop, for the watchdog."""

    asked: bool


@dataclass(frozen=True)
class GroupSetup:
    """What the groups of a run have in common."""

    setup: EpisodeSetup
    speakers_for: SpeakersFor
    seed: int
    episodes: int
    """Of each group."""
    staleness: int
    """A group that began more versions ago is abandoned."""


@dataclass
class _Held:
    """A group that the trainer has not trained on yet."""

    group: OpenGroup
    version: int | None
    """That of the weights when its first episode began; None: none has, because of `rollout.concurrency`."""
    playing: asyncio.Task[None] | None = None
    logs: dict[int, ReplayLog] = field(default_factory=dict)
    spent: Meter = field(default_factory=Meter)
    """Counts its tokens. Its logs do not: they lose replies when an environment answers differently."""


class RolloutService:
    """Serves the messages of one rank, in one event loop."""

    def __init__(
        self,
        engines: Engines,
        engine: ContinuingEngine,
        playing: GroupSetup,
        install: Callable[[Update], None],
        stop: StopFlag,
    ) -> None:
        """`engine` is the solver of `engines`, as the episodes of `playing` use it. `install` gives weights to the
        engine."""
        self._engines, self._engine, self._playing = engines, engine, playing
        self._install, self._stop = install, stop
        self._send: Callable[[FromService], None] = lambda message: None
        self._inbox: asyncio.Queue[ToService | BaseException | None] = asyncio.Queue()
        self._gate = asyncio.Semaphore(playing.setup.settings.concurrency)
        self._threads = ThreadPoolExecutor(1)
        self._held: dict[int, _Held] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._meter, self._counted = Meter(), 0
        self._version = self._deaths = 0
        """`_deaths`: engines that were lost since the last new version."""
        self._heartbeat = Heartbeat()
        self._recovery: asyncio.Task[None] | None = None
        self._weights = asyncio.Event()
        """Set while the engine has the current weights."""
        self._awake = asyncio.Event()
        """Cleared while the actor may use the engine's memory."""
        self._awake.set()
        self._probe: Probe | None = None
        """None until a group has ended."""
        self._changing = 0
        """Updates and restarts that have not ended. None of them may let requests through while another is running."""
        engine.hold()

    def receive(self, message: ToService | None) -> None:
        """Adds a message; None ends the service."""
        self._inbox.put_nowait(message)

    async def serve(self, send: Callable[[FromService], None]) -> None:
        """Returns after the message None. `send` answers the trainer without waiting. Raises what playing raises,
        except for errors that cost one episode."""
        self._send = send
        heartbeats = asyncio.ensure_future(self._send_heartbeats())
        self._send(Ready())
        try:
            while (message := await self._inbox.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                await self._handle(message)
        finally:
            tasks = [heartbeats, *self._jobs, *(held.playing for held in self._held.values() if held.playing)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, message: ToService) -> None:
        if isinstance(message, Begin):
            for group in message.groups:
                self._begin(group)
        elif isinstance(message, Forget):
            for number in message.numbers:
                if (held := self._held.pop(number, None)) and held.playing:
                    held.playing.cancel()
        elif isinstance(message, Update):
            await self._update(message)
        elif isinstance(message, Sleep):
            await self._sleep()
        elif isinstance(message, RunJob):
            self._job(self._run(message.job))
        elif isinstance(message, Save):
            # Copies: another thread pickles them while the episodes go on.
            found = [(of, copied({of.group.task: of.logs})[of.group.task]) for of in self._held.values()]
            self._send(SavedGroups(tuple(replace(of.group, version=of.version, logs=logs) for of, logs in found)))
        elif isinstance(message, StopRollouts):
            self._stop.asked = True

    def _begin(self, group: OpenGroup) -> None:
        logs = {index: ReplayLog([*log.replies]) for index, log in group.logs.items()}
        spent = Meter(tokens({group.task: logs}))
        held = self._held[group.number] = _Held(group, group.version, logs=logs, spent=spent)
        if not group.ended:
            held.playing = self._job(self._play(held))

    async def _play(self, held: _Held) -> None:
        group = held.group
        indices = range(self._playing.episodes)
        playing = [asyncio.ensure_future(self._episode(held, index)) for index in indices]
        try:
            results = await asyncio.gather(*playing)
        finally:
            for episode in playing:
                episode.cancel()
            await asyncio.gather(*playing, return_exceptions=True)
        known, self._probe = self._probe, Probe.of(results) or self._probe
        if known is None and self._probe is not None:
            self._job(self._ask(self._probe, self._engine.generate))  # later ones, when weights arrive
        self._send_counters()
        assert held.version is not None
        self._send(GroupEnded(group.number, group.task.task_id, held.version, tuple(results), held.spent.tokens))

    async def _episode(self, held: _Held, index: int) -> Ended:
        playing, group = self._playing, held.group
        setup = replace(playing.setup, settings=replace(playing.setup.settings, max_turns=group.turns))
        log = held.logs.setdefault(index, ReplayLog())
        metered = self._meter.on(held.spent.on(playing.speakers_for))

        def speakers_for(task: Task, index: int) -> Speakers:
            return recorded(metered(task, index), log, Stop(), setup.prompter.before_stop)

        while True:
            async with self._gate:
                held.version = self._version if held.version is None else held.version
                ended = await play_twice(group.task, index, setup, speakers_for, Seeds(playing.seed, group.number))
            if not isinstance(ended, UnplayedEpisode):
                return ended
            await self._recovered()

    async def _run(self, job: Job[Any]) -> None:
        while True:
            await self._weights.wait()
            try:
                value = await job(self._playing.setup, self._playing.speakers_for)
            except EngineLostError:
                await self._recovered()
                continue
            self._send(JobResult(value))
            return

    async def _update(self, message: Update) -> None:
        with self._change():
            await self._engine.pause()
            await self._in_thread(lambda: self._install(message))
            self._awake.set()
            if message.version != self._version:
                self._version, self._deaths = message.version, 0
            self._heartbeat = replace(self._heartbeat, needs_weights=False)
            self._weights.set()
            if self._probe is not None and self._changing == 1:
                asked = self._job(self._ask(self._probe, self._engine.before_others))
                await asyncio.wait({asked}, timeout=PROBE_ALONE_S)
        self._send_counters()  # first, so that the trainer does not send the weights again
        self._send(Updated(message.version))
        oldest = self._version - self._playing.staleness
        self._abandon([n for n, of in self._held.items() if of.version is not None and of.version < oldest])

    async def _sleep(self) -> None:
        """Environments go on; requests wait for the next update."""
        self._awake.clear()
        self._weights.clear()
        with self._change():
            await self._engine.pause()
            await self._in_thread(self._engine.sleep)
        self._send(Asleep())

    async def _ask(self, asked: Probe, generate: Callable[[Ids, Sampling], Awaitable[Completion]]) -> None:
        """Sends the answer to a probe. If the engine fails, the step has none: episodes report that."""
        requests = asked.requests(self._playing.setup, self._playing.seed, self._version)
        with suppress(EngineError):
            replies = await asyncio.gather(*(generate(asked.prompt_ids, sampling) for sampling in requests))
            if some := [reply for reply in replies if len(reply.ids)]:
                self._send(Probed(max(reply.weight_version for reply in some), asked.answered(some)))

    def _abandon(self, numbers: list[int]) -> None:
        """Ends groups that are too old. Those that have ended already are the trainer's to drop."""
        running = {n: of for n in numbers if (of := self._held[n]).playing is not None and not of.playing.done()}
        if not running:
            return
        for number, held in running.items():
            held.playing.cancel()  # type: ignore[union-attr]
            del self._held[number]
        self._send_counters()
        lost = sum(held.spent.tokens for held in running.values())
        self._send(Abandoned(tuple(running), lost, len(running) * self._playing.episodes))

    async def _recovered(self) -> None:
        """Returns once the lost engine was restarted and has the current weights. Raises EngineError."""
        if self._recovery is None:
            self._recovery = asyncio.ensure_future(self._recover())
        recovery = self._recovery
        await asyncio.shield(recovery)

    async def _recover(self) -> None:
        try:
            await self._awake.wait()  # a server that starts needs the memory that the actor uses
            why = self._engines.lost()
            if not why:  # another episode's request has failed later than the restart
                return
            self._deaths += 1
            self._heartbeat = replace(self._heartbeat, deaths=self._heartbeat.deaths + 1)
            self._send(EngineLost(why))
            if self._deaths >= MAX_DEATHS:
                raise EngineError(f"{self._deaths} engines were lost in one step. {why}")
            self._engine.hold()
            with self._change():
                if await self._in_thread(self._engines.revive):
                    self._weights.clear()
                    self._heartbeat = replace(self._heartbeat, needs_weights=True)
            await self._weights.wait()
        finally:
            self._recovery = None

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Lets requests continue at the end, unless the engine lacks the current weights or another change is still
        running."""
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1
        if not self._changing and self._weights.is_set():
            self._engine.resume()

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """One at a time: an update waits for a restart. Episodes that do not need the engine continue."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _job(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Runs something in the background; its failure ends the service."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._inbox.put_nowait(error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():  # the service has canceled it
                    raise
                # Otherwise the group would never end, and the trainer would wait for it.
                self._inbox.put_nowait(EngineError("The engine canceled a request: its messages are above."))

        task = asyncio.ensure_future(run())
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    async def _send_heartbeats(self) -> None:
        while True:
            self._send_counters()
            await asyncio.sleep(HEARTBEAT_S)

    def _send_counters(self) -> None:
        generated, self._counted = self._meter.tokens - self._counted, self._meter.tokens
        stats, counted = self._engines.take_stats(), self._heartbeat
        self._heartbeat = Heartbeat(needs_weights=counted.needs_weights)
        self._send(replace(counted, generated=generated, stats=counted.stats + stats))
