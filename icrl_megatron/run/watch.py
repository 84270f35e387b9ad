"""Monitors training: whether engine and trainer compute the same model, and whether the policy collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.actor.actor import InvariantError
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.headers import EpisodeHeader
from icrl_megatron.rollout.played import Played
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.metrics import REPLY_ENTROPY, reply_entropy
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows
from icrl_megatron.types import StepStats
from icrl_megatron.utils.errors import HopelessError
from icrl_megatron.utils.step_names import step_name, steps_in

FLAT_GRADIENT = 1e-6
"""Gradient norms below this count as no gradient: healthy policies of the small runs have 1e-2 to 1."""
LOW_ENTROPY, LOW_SHARE = 1e-2, 0.1
"""Entropy of replies in nats per token, and its share of the first step's entropy, below which replies count as almost
certain."""
SOLVED = 0.95
"""Mean reward from which on a policy with certain replies and no gradient has solved its tasks, not collapsed."""
COLLAPSED_STEPS = 3
"""Consecutive steps after which a collapse is reported."""
REMIND_EVERY = 10


@dataclass(frozen=True)
class Limits:
    """Largest accepted |log pi_train - log pi_engine| of a step, and the number of consecutive steps above it that stop
    the run."""

    mean: float
    largest: float
    patience: int


MISMATCH = {"fp32": Limits(1e-5, 1e-3, 1), "bf16": Limits(2.5e-2, 2.0, 3)}
"""Defaults by precision, measured as in docs/ENGINES.md. A quantized engine or actor has no default."""


class CollapsedError(HopelessError):
    """The policy's replies are almost certain and it gets no gradient: more steps change nothing."""


def mismatch_limits(settings: Settings) -> Limits:
    """`engine.mismatch_limit`, with the precision's defaults for what it does not set."""
    given, default = settings.engine.mismatch_limit, MISMATCH[settings.actor.precision]
    if settings.engine.quantization or settings.actor.fp8 != "off":
        default = Limits(math.inf, math.inf, default.patience)
    return Limits(
        default.mean if given.mean is None else given.mean,
        default.largest if given.largest is None else given.largest,
        given.patience or default.patience,
    )


class Watch:
    """Checks every step. Its inputs are the same on every rank, so all ranks warn and stop at the same step."""

    def __init__(self, settings: Settings, run_dir: Path, log: Callable[[str], None]) -> None:
        self._settings, self._run_dir, self._log = settings, run_dir, log
        self._limits = mismatch_limits(settings)
        self._apart = self._flat = 0
        """Consecutive steps so far."""
        self._first: float | None = None
        """Entropy at the run's first step."""
        self._alive = 0
        """The newest step whose replies were not almost certain."""
        for row in read_rows(run_dir / METRICS_FILE):
            if REPLY_ENTROPY in row:
                self._low(int(row["step"]), row[REPLY_ENTROPY])

    def engine(self, step: int, stats: StepStats) -> None:
        """Checks the step's difference of engine and trainer log-probs under the same prompt.

        Raises InvariantError if it was too large for `engine.mismatch_limit.patience` consecutive steps; warns at each
        one before. With rollout.partial, old tokens come from older weights, and no check is possible.
        """
        if self._settings.debug.mode != "train" or self._settings.rollout.partial:
            return
        if "mismatch_abs" not in stats.metrics:  # older weights generated every token: such a step says nothing
            return
        mean, most = (stats.metrics.get(f"mismatch_{what}", 0.0) for what in ("abs", "max"))
        limits = self._limits
        if mean <= limits.mean and most <= limits.largest:
            self._apart = 0
            return
        self._apart += 1
        said = (
            f"engine and trainer differ by {mean:.2e} in a log-prob on average and by {most:.2e} at most "
            f"({self._settings.actor.precision} allows {limits.mean:.2g} and {limits.largest:.2g}) at step {step}"
        )
        if self._apart < limits.patience:
            self._log(f"{said}; the run stops after {limits.patience} such steps in a row")
            return
        raise InvariantError(
            f"{said}, {self._apart} in a row. Probable causes: weights were not synced completely or not "
            "at all, the engine samples at another temperature than rollout.temperature, or one of them computes "
            "another model. For an engine that is known to differ by more, raise engine.mismatch_limit.mean and "
            "engine.mismatch_limit.largest"
        )

    def policy(self, step: int, episodes: Sequence[EpisodeHeader], stats: StepStats | None) -> None:
        """Checks whether the policy has collapsed: its replies are almost certain, do not solve the tasks, and there is
        no gradient (`stats` is None for a step without an update).

        Warns after COLLAPSED_STEPS consecutive such steps, or raises CollapsedError with optim.on_collapse=stop.
        """
        if self._settings.debug.mode != "train":
            return
        if not self._certain(step, episodes) or (stats is not None and not stats.grad_norm < FLAT_GRADIENT):
            self._flat = 0
            return
        self._flat += 1
        late = self._flat - COLLAPSED_STEPS
        if late >= 0 and self._settings.optim.on_collapse == "stop":
            raise CollapsedError(f"step {step}: {self.described(episodes)}")
        if late >= 0 and late % REMIND_EVERY == 0:
            self._log(f"step {step}: {self.described(episodes)}")

    def hint(self, step: int, episodes: Sequence[EpisodeHeader]) -> str:
        """Addition to the message of a step without a learning signal; empty unless the replies are almost certain."""
        return f"; {self.described(episodes)}" if self._certain(step, episodes) else ""

    def described(self, episodes: Sequence[EpisodeHeader]) -> str:
        entropy, first = reply_entropy(episodes), self._first
        return (
            f"the policy has collapsed: its replies have an entropy of {entropy:.1e} a token ({first:.1e} at first) "
            f"and there is no gradient, so it no longer learns. optim.learning_rate="
            f"{self._settings.optim.learning_rate:g} is the probable cause: {self._remedy()}"
        )

    def _certain(self, step: int, episodes: Sequence[EpisodeHeader]) -> bool:
        entropy = reply_entropy(episodes)
        rewards = [attempt.outcome for episode in episodes for attempt in episode.attempts[:1]]
        return entropy is not None and self._low(step, entropy) and sum(rewards) / len(rewards) < SOLVED

    def _low(self, step: int, entropy: float) -> bool:
        self._first = entropy if self._first is None else self._first
        low = entropy < max(LOW_ENTROPY, LOW_SHARE * self._first)
        self._alive = min(self._alive, step - 1) if low else step
        return low

    def _remedy(self) -> str:
        """How to resume from before the collapse: the weights that a step saves are those that the next step plays."""
        root = self._run_dir / "checkpoints"
        steps = steps_in(root)
        good = [step for step in steps if step < self._alive]
        if not good:
            return "no checkpoint is from before the collapse; lower optim.learning_rate in a new run"
        newest = root / step_name(good[-1])
        if good == steps:
            return f"lower optim.learning_rate and run the same command again, which resumes from {newest.name}"
        return (
            f"{newest} is the newest checkpoint from before the collapse; delete those after it, lower "
            f"optim.learning_rate and run the same command again, or begin a new run with start_from={newest}"
        )


class NoWatch:
    """For demonstrations, which come from no engine; becoming certain of them is the goal of training."""

    def engine(self, step: int, stats: StepStats) -> None:
        """Does nothing."""

    def policy(self, step: int, episodes: Sequence[EpisodeHeader], stats: StepStats | None) -> None:
        """Does nothing."""

    def hint(self, step: int, episodes: Sequence[EpisodeHeader]) -> str:
        return ""


class NoSignalError(HopelessError):
    """No group of a batch, nor of its replacements, had a reward that differed: there is nothing to learn from."""


def nothing_to_learn(settings: Settings, step: int, played: Played, report: CreditReport) -> str:
    """Why the run cannot train on this batch; empty if it can."""
    if not played.headers:
        lost = played.dropped[0]
        return f"step {step}: all {len(played.dropped)} episodes were lost; {lost.task.task_id}: {lost.error}"
    if report.has_signal or (settings.algo.on_no_signal != "error" and report.samples):
        return ""
    tasks = dict.fromkeys(episode.task.task_id for episode in played.headers)
    return (
        f"step {step}: no reward differed inside any group in {settings.algo.max_resamples + 1} batches, the last of "
        f"{', '.join(tasks)}; make them easier or harder, raise rollout.episodes_per_task, or set "
        "algo.on_no_signal=skip"
    )
