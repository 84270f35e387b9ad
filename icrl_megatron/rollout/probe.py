"""Probes of an asynchronous run: short replies under exactly the newest weights. They measure engine mismatch in steps
whose loss tokens all come from older weights (docs/ASYNC.md)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.rollout.episode import Ended, EpisodeSetup
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.types import Attempt, Completion, Episode, Ids, Task, Turn, id_array

PROBE_TOKENS = 32
"""Largest number of tokens of a probe: enough for a mean, and on a GPU a fraction of a second."""
PROBE_ALONE_S = 2.0
"""Longest time that other requests wait for a probe when weights have arrived. Among them it would take much longer:
they all read their prompts again."""
PROBE_WAIT_S = 10.0
"""Longest time that a step waits for the probe of each engine."""


@dataclass(frozen=True)
class Probe:
    """A prompt that the engine has answered before.

    Example: Probe(task, (5, 6, 7))
    """

    task: Task
    prompt_ids: Ids

    @staticmethod
    def of(results: Iterable[Ended]) -> Probe | None:
        """The first prompt of a group's episodes; None if none of them was played."""
        for one in results:
            if isinstance(one, Episode) and one.attempts and one.attempts[0].turns:
                return Probe(one.task, tuple(one.attempts[0].prompt_ids.tolist()))
        return None

    def sampling(self, setup: EpisodeSetup, run_seed: int, version: int) -> Sampling:
        """The run's sampling, of at most PROBE_TOKENS tokens."""
        rollout = setup.settings
        tokens = min(PROBE_TOKENS, rollout.context_tokens - len(self.prompt_ids))
        seed = Seeds(run_seed, version, "probe").of(self.task.task_id, 0, 0, "attempt", 0)
        return Sampling(rollout.temperature, tokens, seed, setup.prompter.stop_ids)

    def answered(self, reply: Completion) -> Episode:
        """The reply as an episode, so that it reaches the actor as those do. Its outcome means nothing."""
        prompt_ids = id_array(self.prompt_ids)
        turn = Turn(reply, "", None, "", id_array(()))
        return Episode(self.task, 0, (Attempt(0, prompt_ids, prompt_ids, (turn,), 0.0, False, "", "done"),), ())
