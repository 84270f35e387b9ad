"""Sources that need no engine: a dump of an earlier run, and generated fake data."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from icrl_megatron.engines.protocol import NeverSleeps
from icrl_megatron.engines.rank import ONE_RANK, Share
from icrl_megatron.rollout.played import Played, RolloutRequest, WithoutEngine, shared
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Ids, Task, Turn, id_array, logprob_array


@dataclass(frozen=True)
class DumpSource(WithoutEngine):
    """The episodes that another run dumped, step by step and then from the start again: trains without an engine."""

    rollouts: Rollouts
    share: Share = ONE_RANK

    def play(self, request: RolloutRequest) -> Played:
        steps = self.rollouts.steps
        return shared(self.rollouts.episodes(steps[request.seeds.step % len(steps)]), self.share)


@dataclass(frozen=True)
class FakeSource(WithoutEngine):
    """Random tokens with random rewards, with lengths that the settings allow: for testing shapes and speed, not
    learning."""

    vocabulary: int
    prompt_tokens: int
    turn_tokens: int
    critique_tokens: int
    share: Share = ONE_RANK

    def play(self, request: RolloutRequest) -> Played:
        tasks = request.tasks[: request.needed]
        return shared((self._episode(t, i, request) for t in tasks for i in range(request.episodes)), self.share)

    def _episode(self, task: Task, index: int, request: RolloutRequest) -> Episode:
        rng, rounds = random.Random(request.seeds.of(task.task_id, index, 0, "fake", 0)), request.rounds
        plain = self._ids(rng, self.prompt_tokens)
        attempts: list[Attempt] = []
        critiques: list[Critique] = []
        for round in range(rounds):
            advice = tuple(critiques[-1].completion.ids.tolist()) if critiques else ()
            turn = Turn(self._completion(rng, self.turn_tokens), "", None, "", id_array(()))
            success = rng.random() < 0.5
            attempts.append(
                Attempt(round, id_array(plain + advice), id_array(plain), (turn,), float(success), success, "", "done")
            )
            if success or round + 1 == rounds:
                break
            critiques.append(Critique(round, id_array((*plain, 1)), self._completion(rng, self.critique_tokens), ""))
        return Episode(task, index, tuple(attempts), tuple(critiques))

    def _completion(self, rng: random.Random, longest: int) -> Completion:
        ids = self._ids(rng, rng.randint(1, longest))
        return Completion(id_array(ids), logprob_array([-3.0 * rng.random() for _ in ids]), "stop", 0)

    def _ids(self, rng: random.Random, count: int) -> Ids:
        return tuple(rng.randrange(self.vocabulary) for _ in range(count))


class NoEngine(NeverSleeps):
    """The engine of sources that generate nothing. It accepts weights, so that weight sync still runs."""

    def update_weights(self, tensors: Any, version: int) -> None:
        for _ in tensors:
            pass
