"""A run's evaluations: critique-free success on held-out problems, and whether critiques help."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from icrl_megatron.rollout.played import RolloutRequest, require_playable
from icrl_megatron.run.control import ControlState, control
from icrl_megatron.run.files import CONTROL
from icrl_megatron.run.parts import Parts
from icrl_megatron.run.problems import Problems
from icrl_megatron.run.state import RunState
from icrl_megatron.telemetry.metrics import EVALUATION_TIME, heldout_metrics
from icrl_megatron.telemetry.writer import MetricsRow
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.progress import Progress


class Evaluator:
    """The loop's interface to evaluation. This one is for runs without held-out problems."""

    def due(self) -> bool:
        """Whether to evaluate after the current step, before its metrics are written."""
        return False

    def heldout(self) -> MetricsRow:
        """Success on held-out problems with the current weights: critique-free, and by round if `eval.rounds` > 1."""
        return {}

    def alone(self) -> None:
        """Evaluates outside a step, before the first or after the last one, and writes a separate row, unless an
        earlier process of the run has done so."""

    def control(self, when: str) -> None:
        """Writes control_<when>.json: whether second attempts succeed because of the critique."""


class HeldoutEvaluator(Evaluator):
    """Plays held-out problems on the run's own engines. All ranks call each method."""

    def __init__(self, parts: Parts, state: RunState, problems: Problems, progress: Progress) -> None:
        self._parts, self._state, self._heldout, self._progress = parts, state, problems.heldout, progress
        self._evaluated = problems.evaluated(parts.settings.eval.problems)

    def due(self) -> bool:
        interval = self._parts.settings.eval.interval
        return bool(interval) and self._state.step % interval == 0 and not self._state.finished()

    def heldout(self) -> MetricsRow:
        settings = self._parts.settings
        if not self._evaluated or not settings.debug.generates():
            return {}
        # The same seeds at every step and in every run: two evaluations differ only by their weights.
        seeds = replace(self._parts.seeds(0, purpose="heldout"), run=0)
        request = RolloutRequest(self._evaluated, settings.eval.samples, seeds, settings.eval.rounds)
        played = self._parts.source.play(request)
        if self._state.step == 0:
            require_playable(played)
        return heldout_metrics(played.headers, settings.eval.rounds)

    def alone(self) -> None:
        if self._state.evaluated():
            return
        begun = time.perf_counter()
        row = self.heldout()
        row["tokens/generated_total"] = self._state.generated
        row[EVALUATION_TIME] = time.perf_counter() - begun
        self._state.write(row)

    def control(self, when: str) -> None:
        parts, path = self._parts, self._state.run_dir / CONTROL.format(when)
        if parts.settings.eval.control_problems == 0 or not parts.settings.debug.generates():
            return
        seeds, limit = parts.seeds(0, purpose=f"control/{when}"), parts.settings.eval.control_problems
        mine = parts.grid.rank == 0 and not path.exists()
        results: dict[str, Any] = {}
        with self._progress.phase("control"):
            for name, problems in self._heldout.items():
                job = partial(control, problems[: 2 * limit], limit, seeds, ControlState())
                result = parts.source.run(job if mine else None)
                results |= {} if result is None else {name: asdict(result)}
        if mine:
            write_atomically(path, [json.dumps(results, indent=2)], "the control")
