"""Probes of an asynchronous run: short replies under exactly the newest weights. They measure engine mismatch in steps
whose loss tokens all come from older weights (docs/ASYNC.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.rollout.episode import Ended, EpisodeSetup
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.types import Attempt, Completion, Episode, Ids, Task, Turn, id_array

PROBE_TOKENS, PROBE_REPLIES = 64, 8
"""Largest number of tokens of all replies together, and of replies. Several short ones take the engine fewer passes
than a long one."""
_PROMPT_TOKENS = 2048
"""With longer prompts there are fewer replies: the actor reads the prompt before each of them."""
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
        """The first prompt of a group's episodes; None if none of them has a reply."""
        for one in results:
            if isinstance(one, Episode) and one.attempts and one.attempts[0].turns:
                return Probe(one.task, tuple(one.attempts[0].prompt_ids.tolist()))
        return None

    def requests(self, setup: EpisodeSetup, run_seed: int, version: int) -> list[Sampling]:
        """The run's sampling for each reply."""
        rollout, seeds = setup.settings, Seeds(run_seed, version, "probe")
        replies = max(2, min(PROBE_REPLIES, _PROMPT_TOKENS // len(self.prompt_ids)))
        tokens = min(PROBE_TOKENS // replies, rollout.context_tokens - len(self.prompt_ids))
        of_each = (seeds.of(self.task.task_id, i, 0, "attempt", 0) for i in range(replies))
        return [Sampling(rollout.temperature, tokens, seed, setup.prompter.stop_ids) for seed in of_each]

    def answered(self, replies: Sequence[Completion]) -> tuple[Episode, ...]:
        """The replies as episodes, so that they reach the actor as those do. Their outcomes mean nothing."""
        prompt_ids = id_array(self.prompt_ids)
        turns = [Turn(reply, "", None, "", id_array(())) for reply in replies]
        attempts = [Attempt(0, prompt_ids, prompt_ids, (turn,), 0.0, False, "", "done") for turn in turns]
        return tuple(Episode(self.task, index, (attempt,), ()) for index, attempt in enumerate(attempts))
