"""A discrete-event simulation of rollouts and training, synchronous and asynchronous.

Engines decode the requests of episodes; an iteration's time depends on how many run. Between two requests an episode
waits for its environment. A trainer takes groups (all episodes of a task) by the rule of `rollout/async_source.py`: at
most (staleness + 1) steps' groups are begun, each step trains on the oldest complete ones, and groups that began too
many versions ago are dropped. Staleness 0 is the synchronous loop. All events are in one heap, and requests that decode
together share one clock of iterations, so the cost is O(events x log events).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from icrl_megatron.plan.engine_speed import DecodeSpeed
from icrl_megatron.rollout.lead import Lead


@dataclass(frozen=True)
class EnginePool:
    """Equal engines. An episode stays on its engine."""

    count: int
    decode: DecodeSpeed
    prefill_token_s: float = 0.0
    most_running: int = 1_000_000
    """Requests that an engine decodes at once; the others wait in order."""
    most_episodes: int = 1_000_000
    """Episodes that an engine plays at a time, including those that wait for their environment."""
    cache_tokens: float = math.inf
    shared_queue: bool = False
    """Whether any engine with a free place takes the next episode. False: engines get whole groups in turn."""


@dataclass(frozen=True, slots=True)
class SimulatedTurn:
    """A request, and the seconds that the environment takes after it."""

    tokens: float
    """Generated: at least 1."""
    context: float = 0.0
    """Tokens in the cache while it runs."""
    read: float = 0.0
    """Tokens prefilled before it."""
    wait_s: float = 0.0


SimulatedEpisode = tuple[SimulatedTurn, ...]
Group = tuple[SimulatedEpisode, ...]


@dataclass(frozen=True)
class Trainer:
    """A step's training, in `parts` equal updates, each as soon as its groups are complete. All engines pause while
    the weights are sent."""

    groups: int
    """Groups of a step; a multiple of `parts`."""
    fixed_s: float = 0.0
    """Seconds of a step that do not depend on its episodes."""
    token_s: float = 0.0
    """Seconds for each generated token of the step's groups."""
    sync_s: float = 0.0
    parts: int = 1
    on_engine_gpus: bool = False
    """Whether the engines also pause while it trains (`rollout.interleave`)."""


@dataclass(frozen=True)
class LeadRule:
    steps: int
    staleness: float = 0.0
    """How many steps' groups may be ahead. A fraction is allowed where nothing is dropped."""
    drop: bool = True
    """Whether groups that began more than `staleness` versions ago are dropped."""
    adaptive: bool = True
    """Whether no more groups are ahead than the trainer needs (`rollout/lead.py`)."""


@dataclass(frozen=True)
class Step:
    """State at the end of a step, after its weights were sent. Seconds are sums since the beginning."""

    end_s: float
    engines_s: float
    """Sum over engines of the seconds in which at least one request was decoded or prefilled."""
    trained_s: float
    waited_s: float
    """Seconds that the trainer waited for groups."""
    dropped: int
    stale: float
    """Mean versions between the beginning of the step's groups and the step."""


@dataclass(frozen=True)
class SimulatedOutcome:
    steps: tuple[Step, ...]
    begun: int
    trained: int
    dropped: int
    open: int
    """Groups that were begun, and neither trained on nor dropped when the last step ended."""
    events: int

    def step_s(self, skip: int) -> float:
        """Mean seconds of a step, without the first and the last `skip` steps."""
        first, last = self._window(skip)
        return (last.end_s - first.end_s) / (len(self.steps) - 2 * skip)

    def waited_s(self, skip: int) -> float:
        first, last = self._window(skip)
        return (last.waited_s - first.waited_s) / (len(self.steps) - 2 * skip)

    def idle(self, skip: int, engines: int, engine_gpus: int, trainer_gpus: int, colocated: bool) -> float:
        """Share of the GPU seconds in which a GPU neither trained nor belonged to an engine with a running request.
        `engine_gpus`: of each engine. Colocated: the trainer's GPUs are those of the engines."""
        first, last = self._window(skip)
        busy = (last.engines_s - first.engines_s) * engine_gpus + (last.trained_s - first.trained_s) * trainer_gpus
        gpus = trainer_gpus if colocated else engines * engine_gpus + trainer_gpus
        return 1.0 - busy / ((last.end_s - first.end_s) * gpus)

    def _window(self, skip: int) -> tuple[Step, Step]:
        if not 1 <= skip < len(self.steps) / 2:
            raise ValueError(f"skip={skip}: must be at least 1 and less than half of {len(self.steps)} steps")
        return self.steps[skip - 1], self.steps[-1 - skip]


@dataclass(eq=False, slots=True)
class _Open:
    """A group that is neither trained on nor dropped."""

    number: int
    left: int
    """Episodes that have not ended."""
    tokens: float
    version: int | None = None
    """That of the weights when its first episode got a place on an engine."""
    members: list[_Playing] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Playing:
    """An episode. Its engine is -1 until it has a place."""

    turns: SimulatedEpisode
    group: _Open
    engine: int = -1
    turn: int = 0
    running: bool = False
    dead: bool = False


class _Engine:
    """`clock` counts iterations; it stands still until `since` where that is in the future (prefill, pauses)."""

    def __init__(self, decode: DecodeSpeed) -> None:
        self.decode, self.clock, self.since, self.busy = decode, 0.0, 0.0, 0.0
        self.running, self.cached, self.episodes, self.generation = 0, 0.0, 0, 0
        self.ends: list[tuple[float, int, _Playing]] = []
        self.requests: deque[_Playing] = deque()

    def advance(self, now: float) -> None:
        if now > self.since:
            if self.running:
                self.clock += (now - self.since) / self.decode.step(self.running, self.cached)
                self.busy += now - self.since
            self.since = now

    def stall(self, now: float, seconds: float, working: bool) -> None:
        self.advance(now)
        self.since = max(self.since, now) + seconds
        self.busy += seconds if working else 0.0

    def next_end(self) -> float:
        while self.ends and self.ends[0][2].dead:
            heappop(self.ends)
        if not self.ends:
            return math.inf
        left = max(0.0, self.ends[0][0] - self.clock)
        return self.since + left * self.decode.step(self.running, self.cached)


class _Simulation:
    def __init__(self, engines: EnginePool, trainer: Trainer, rule: LeadRule, group: Callable[[int], Group]) -> None:
        self._setup, self._trainer, self._rule, self._group = engines, trainer, rule, group
        self._engines = [_Engine(engines.decode) for _ in range(engines.count)]
        self._queues = [deque[_Playing]() for _ in range(1 if engines.shared_queue else engines.count)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._pushed = self._begun = self._trained = self._dropped = self._version = 0
        self._open: dict[int, _Open] = {}
        self._complete: list[int] = []
        """Numbers of complete groups that wait, a heap."""
        self._part = 0
        """Updates of the current step that have ended."""
        self._idle_since: float | None = None
        self._behind = 0
        self._spent = self._waited = 0.0
        self._steps: list[Step] = []
        self._lead = Lead(trainer.groups, rule.staleness)

    def run(self) -> SimulatedOutcome:
        self._begin_step(0.0)
        while len(self._steps) < self._rule.steps:
            if not self._events:
                raise RuntimeError(f"no event is left in step {self._version}")
            now, _, act = heappop(self._events)
            act(now)
        open_ = len(self._open)
        return SimulatedOutcome(tuple(self._steps), self._begun, self._trained, self._dropped, open_, self._pushed)

    def _push(self, at: float, act: Callable[[float], None]) -> None:
        self._pushed += 1
        heappush(self._events, (at, self._pushed, act))

    def _begin_step(self, now: float) -> None:
        rule = self._rule
        if rule.drop:
            self._drop(now)
        self._part, self._behind, self._idle_since = 0, 0, now
        if self._begun:
            self._lead.adapt(len(self._complete))
        per_step, left = self._trainer.groups, rule.steps - self._version
        lead = self._lead.groups if rule.adaptive else math.floor(rule.staleness * per_step + 1e-9)
        limit = self._trained + self._dropped + min(per_step + lead, left * per_step)
        touched = set[int]()
        for number in range(self._begun, limit):
            episodes = self._group(number)
            tokens = sum(turn.tokens for episode in episodes for turn in episode)
            group = self._open[number] = _Open(number, len(episodes), tokens)
            group.members = [_Playing(episode, group) for episode in episodes]
            queue = number % len(self._queues)
            self._queues[queue].extend(group.members)
            touched.add(queue)
        self._begun = max(self._begun, limit)
        for index in range(len(self._engines)) if self._setup.shared_queue else sorted(touched):
            self._admit(index, now)
        self._take(now)

    def _drop(self, now: float) -> None:
        oldest = self._version - self._rule.staleness
        old = [n for n, group in self._open.items() if group.version is not None and group.version < oldest]
        for group in map(self._open.pop, old):
            for playing in group.members:
                playing.dead = True
                if playing.engine >= 0 and playing.turn < len(playing.turns):
                    engine = self._engines[playing.engine]
                    engine.advance(now)
                    engine.episodes -= 1
                    if playing.running:
                        engine.running -= 1
                        engine.cached -= playing.turns[playing.turn].context
            self._dropped += 1
        self._complete = [n for n in self._complete if n in self._open]
        heapify(self._complete)
        for index in range(len(self._engines)):
            self._admit(index, now)

    def _admit(self, index: int, now: float) -> None:
        """Gives free places of an engine to waiting episodes, and then to waiting requests."""
        engine, setup = self._engines[index], self._setup
        engine.advance(now)
        queue = self._queues[0 if setup.shared_queue else index]
        share = setup.most_episodes
        if setup.shared_queue:  # engines that begin together get equal shares
            share = min(share, math.ceil((sum(e.episodes for e in self._engines) + len(queue)) / setup.count))
        while queue and (queue[0].dead or engine.episodes < share):
            playing = queue.popleft()
            if not playing.dead:
                playing.engine, group = index, playing.group
                group.version = self._version if group.version is None else group.version
                engine.episodes += 1
                engine.requests.append(playing)
        while engine.requests:
            playing = engine.requests[0]
            if not playing.dead:
                turn = playing.turns[playing.turn]
                crowded = engine.running and engine.cached + turn.context > setup.cache_tokens
                if crowded or engine.running >= setup.most_running:
                    break
                playing.running = True
                engine.stall(now, turn.read * setup.prefill_token_s, working=True)
                heappush(engine.ends, (engine.clock + turn.tokens, self._pushed, playing))
                self._pushed += 1
                engine.running += 1
                engine.cached += turn.context
            engine.requests.popleft()
        self._schedule(index)

    def _schedule(self, index: int) -> None:
        engine = self._engines[index]
        engine.generation += 1
        generation, at = engine.generation, engine.next_end()
        if at < math.inf:
            self._push(at, lambda now: self._ended(index, generation, now))

    def _ended(self, index: int, generation: int, now: float) -> None:
        """The next request of an engine has ended, unless the engine's state changed since this was planned."""
        engine = self._engines[index]
        if generation != engine.generation:
            return
        engine.advance(now)
        end, _, playing = heappop(engine.ends)
        engine.clock = max(engine.clock, end)
        turn = playing.turns[playing.turn]
        playing.running = False
        engine.running -= 1
        engine.cached -= turn.context
        if turn.wait_s > 0:
            self._push(now + turn.wait_s, lambda at: self._answered(playing, at))
            self._admit(index, now)
        else:
            self._answered(playing, now)

    def _answered(self, playing: _Playing, now: float) -> None:
        if playing.dead:
            return
        engine = self._engines[playing.engine]
        playing.turn += 1
        if playing.turn < len(playing.turns):
            engine.requests.append(playing)
            self._admit(playing.engine, now)
            return
        engine.episodes -= 1
        self._admit(playing.engine, now)
        playing.group.left -= 1
        if not playing.group.left:
            heappush(self._complete, playing.group.number)
            self._take(now)

    def _take(self, now: float) -> None:
        """Starts an update if the trainer waits and enough groups are complete."""
        trainer = self._trainer
        needed = trainer.groups // trainer.parts
        if self._idle_since is None or len(self._complete) < needed:
            return
        self._waited, self._idle_since = self._waited + now - self._idle_since, None
        groups = [self._open.pop(heappop(self._complete)) for _ in range(needed)]
        self._behind += sum(self._version - (group.version or 0) for group in groups)
        seconds = trainer.fixed_s / trainer.parts + trainer.token_s * sum(group.tokens for group in groups)
        self._spent += seconds
        self._trained += needed
        if trainer.on_engine_gpus:
            for index, engine in enumerate(self._engines):
                engine.stall(now, seconds, working=False)
                self._schedule(index)
        self._push(now + seconds, self._updated)

    def _updated(self, now: float) -> None:
        self._part += 1
        if self._part < self._trainer.parts:
            self._idle_since = now
            self._take(now)
            return
        sync = self._trainer.sync_s
        for index, engine in enumerate(self._engines):
            engine.stall(now, sync, working=False)
            engine.stall(now, engine.cached * self._setup.prefill_token_s, working=True)  # the cache was flushed
            self._schedule(index)
        self._push(now + sync, self._synced)

    def _synced(self, now: float) -> None:
        for engine in self._engines:
            engine.advance(now)
        busy = sum(engine.busy for engine in self._engines)
        stale = self._behind / self._trainer.groups
        self._steps.append(Step(now, busy, self._spent, self._waited, self._dropped, stale))
        self._version += 1
        if self._version < self._rule.steps:
            self._begin_step(now)


def simulate(engines: EnginePool, trainer: Trainer, rule: LeadRule, group: Callable[[int], Group]) -> SimulatedOutcome:
    """Plays a run. `group` returns the group of a number and must return the same for the same number.

    Raises ValueError for settings that could not end.
    """
    if rule.steps < 1 or engines.count < 1 or rule.staleness < 0:
        raise ValueError(f"steps={rule.steps}, engines={engines.count}, staleness={rule.staleness}: too small")
    if trainer.parts < 1 or trainer.groups < 1 or trainer.groups % trainer.parts:
        raise ValueError(f"groups={trainer.groups}: must be a positive multiple of parts={trainer.parts}")
    if min(engines.most_running, engines.most_episodes) < 1 or engines.decode.step(1, 0.0) <= 0:
        raise ValueError("an engine needs room for one request and a positive time for an iteration")
    return _Simulation(engines, trainer, rule, group).run()
