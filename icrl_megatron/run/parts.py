"""What the loop works with: `Parts` computes, `Recorder` remembers (metrics, dumps, checkpoints, evaluation)."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from icrl_megatron.actor import checkpoint
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.export import write_hf
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.data.curriculum import append_history, cut_history, read_history, success_shares
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Grid, any_rank, gather_objects, together
from icrl_megatron.distributed.process import StopRequest
from icrl_megatron.engines.sync import WeightSync
from icrl_megatron.rollout import tapes
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.source import EpisodeSource, Played, require_sound
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.rollout.tapes import Tapes
from icrl_megatron.run.files import EXPORT
from icrl_megatron.run.saving import Files, Saver
from icrl_megatron.run.watch import Watch
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.dumps import write_dump
from icrl_megatron.telemetry.metrics import EVALUATION_TIME, GENERATED, USED, heldout_metrics, rollout_metrics
from icrl_megatron.telemetry.writer import METRICS_FILE, TIME_PREFIX, MetricsWriter, Row, read_rows
from icrl_megatron.types import StepStats, Task
from icrl_megatron.utils.progress import Phase, Progress
from icrl_megatron.utils.results import MOVE_AWAY

TAPES = "tapes.jsonl"
"""In a checkpoint: episodes that were cut off (`rollout.partial`)."""
NEWEST_ROWS = "metrics.jsonl"
"""In a checkpoint: the rows of its step."""
PENDING = "row.json"
"""In a checkpoint: the metrics of its step that were not written yet, because the step's evaluation failed."""


@dataclass(frozen=True)
class Parts:
    """One rank's share of everything that computes."""

    settings: Settings
    grid: Grid
    actor: Actor
    sync: WeightSync
    source: EpisodeSource
    sampler: TaskSampler
    heldout: tuple[Task, ...]
    prompter: Prompter
    watch: Watch
    dropped_too_long: int = 0
    """Problems that were left out because they do not fit the context."""

    def seeds(self, step: int, resample: int = 0, purpose: str = "train") -> Seeds:
        return Seeds(self.settings.seed, step, purpose if resample == 0 else f"{purpose}/{resample}")

    def learning_rate(self, step: int) -> float:
        """Constant after a linear warm-up."""
        optim = self.settings.optim
        return optim.learning_rate * min(1.0, (step + 1) / (optim.warmup_steps + 1))


class Recorder:
    """Knows where the run is, and what must survive it. Files are written by rank 0 alone."""

    def __init__(self, parts: Parts, saver: Saver, progress: Progress, stop: StopRequest) -> None:
        self.parts, self.saver, self.run_dir, self.progress, self.stop = parts, saver, saver.run_dir, progress, stop
        self.step = self.generated = 0
        self.resampled = 0
        self.times: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()
        self.bar: Phase | None = None
        self.pending: Row | None = None
        newest: list[Row] = []
        resumed = saver.restore()
        if resumed is not None:
            if parts.settings.rollout.partial:
                self._take_back(tapes.read(saver.folder / TAPES))
            self.step, self.generated = resumed.step, resumed.generated_tokens
            parts.sync.version = resumed.weight_version - 1
            self.pending, newest = _read_pending(saver.folder / PENDING), read_rows(saver.folder / NEWEST_ROWS)
        elif parts.settings.start_from:
            self._start_from(Path(parts.settings.start_from))
        parts.actor.offload.release()
        parts.sync.push()
        main = parts.grid.rank == 0
        self._resume_curriculum(main)
        written = None if resumed is None else self.step - (self.pending is not None)
        self.writer = together(parts.grid, lambda: MetricsWriter(self.run_dir, written, newest) if main else None)
        self._completed(self.pending)

    def _start_from(self, folder: Path) -> None:
        """The weights of another run's checkpoint in fp32, which `model.path` may hold rounded, and its moments."""
        actor, moments = self.parts.actor, self.parts.settings.start_with_moments
        checkpoint.load(folder, actor.rows, actor.optimizer, self.parts.grid)
        if not moments:
            actor.optimizer.forget()
        self.progress.log(f"starting from {folder} {'with' if moments else 'without'} its optimizer moments")

    def _take_back(self, kept: Tapes) -> None:
        """Episodes go on where their problems are still trained on: the data may have changed."""
        known = {task: group for task, group in kept.items() if task in self.parts.sampler.known}
        if len(known) < len(kept):
            self.progress.log(f"{len(kept) - len(known)} unfinished groups are left out: their problems are gone")
        self.parts.source.take_back(known)

    def _resume_curriculum(self, main: bool) -> None:
        """What the steps before the checkpoint saw; the file is this run's own, so every rank may read it."""
        curriculum = self.parts.sampler.curriculum
        if curriculum is None:
            return
        for shares in read_history(self.run_dir, self.step, self.parts.sampler.known):
            curriculum.observe(shares)
        any_rank(self.parts.grid, False)  # nobody reads any more
        if main:
            cut_history(self.run_dir, self.step)

    def begin(self) -> None:
        """What is due before the next step: the first evaluation, or the end of a step whose evaluation failed."""
        if self.pending is not None:
            self._end_step(self.pending, None)
        elif self.step == 0 and not self._evaluated():
            self.evaluate()

    def finished(self) -> bool:
        limit = self.parts.settings.max_generated_tokens
        return self.step >= self.parts.settings.steps or (limit is not None and self.generated >= limit)

    def stop_requested(self) -> bool:
        """The same answer on every rank, so that all stop at the same step."""
        return any_rank(self.parts.grid, bool(self.stop))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times one phase of the step."""
        begun = time.perf_counter()
        yield
        platform.synchronize()
        self.times[name] += time.perf_counter() - begun

    def count(self, played: Played, resample: int) -> None:
        """Generated tokens are the cost of a run; those of discarded batches count too."""
        self.generated += played.generated_tokens()
        self.resampled = resample

    def record(self, played: Played, report: CreditReport, stats: StepStats | None) -> None:
        """Ends the step: its metrics, its rollouts, evaluation and checkpoint where due."""
        self.step += 1
        if (curriculum := self.parts.sampler.curriculum) is not None:
            shares = success_shares(played.episodes)
            curriculum.observe(shares)
            asked = [e.task for e in played.episodes]
            self._by_first_rank(lambda: append_history(self.run_dir, self.step, shares, asked))
        row = rollout_metrics(played.episodes, played.dropped, report)
        row |= _cost(played)
        row |= {"tokens/generated_total": self.generated, "steps/resampled": self.resampled}
        row |= {"data/dropped_too_long": float(self.parts.dropped_too_long)}
        row |= {"weights/version": self.parts.sync.version, "steps/without_signal": float(not report.has_signal)}
        row |= _engine_metrics(played)
        if stats is not None:
            row |= _actor_metrics(stats)
            row |= {f"memory/{point}_gib": gib for point, gib in self.parts.sync.memory_gib.items()}
        if played.dropped:
            lost = played.dropped[0]
            self.progress.log(
                f"step {self.step}: {len(played.dropped)} episodes lost, {lost.task.task_id}: {lost.error}"
            )
        weights = stats.calibration_weights if stats is not None else {}
        decode = self.parts.prompter.decode
        self._by_first_rank(
            lambda: write_dump(self.run_dir, self.step, played.episodes, report.samples, decode, weights)
        )
        self._end_step(row, stats)

    def _end_step(self, row: Row, stats: StepStats | None) -> None:
        """Evaluation, metrics and checkpoint where due; the step is done before, and can be saved if these fail."""
        settings = self.parts.settings
        self._completed(row)
        if settings.eval.interval and self.step % settings.eval.interval == 0 and not self.finished():
            row = row | self._heldout()
        row = row | self._timings(row, stats)
        self._write(row)
        self._completed(None)
        self._advance(row)
        if self.step % settings.checkpoint.interval == 0 and not self.finished():
            self.checkpoint()

    def evaluate(self) -> None:
        """Critique-free success on held-out problems, outside a training step."""
        row = self._heldout()
        row["tokens/generated_total"] = self.generated
        row[EVALUATION_TIME] = self.times.pop("evaluation", 0.0)
        self._write(row)

    def checkpoint(self) -> None:
        """Saves the last completed step, once."""
        self.saver.save()

    def _completed(self, pending: Row | None) -> None:
        """From here on an error saves this step."""
        optimizer, kept = self.parts.actor.optimizer, self.parts.source.tapes()

        def beside() -> Files:
            everyones = {task: of for mine in gather_objects(self.parts.grid, kept) for task, of in mine.items()}
            found = {TAPES: tapes.to_lines(everyones)} if everyones else {}
            rows = together(self.parts.grid, lambda: self.writer.saved() if self.writer is not None else [])
            found |= {NEWEST_ROWS: rows or []}
            return found | ({PENDING: [json.dumps(pending)]} if pending is not None else {})

        self.pending = pending
        progress = checkpoint.Progress(self.step, self.parts.sync.version, optimizer.steps, self.generated)
        self.saver.completed(progress, beside)

    def _by_first_rank(self, write: Callable[[], object]) -> None:
        """Files are written by rank 0; where that fails, all ranks end."""
        together(self.parts.grid, lambda: write() if self.writer is not None else None)

    def _write(self, row: Row) -> None:
        writer = self.writer
        self._by_first_rank(lambda: writer.write(self.step, row) if writer is not None else None)

    def conclude(self) -> None:
        """The last evaluation, checkpoint and export; what a run that was killed in here has done is not done twice."""
        if not self._evaluated():
            self.evaluate()
        self.checkpoint()
        with self.progress.phase("export"):
            write_hf(
                self.parts.sync.gatherer, self.saver.model, self.run_dir / EXPORT, self.parts.grid, remedy=MOVE_AWAY
            )
        if self.writer is not None:
            self.writer.close()

    def _evaluated(self) -> bool:
        """Whether the metrics end with an evaluation at this step; the same answer on every rank."""
        rows = read_rows(self.run_dir / METRICS_FILE) if self.writer is not None else []
        ends = bool(rows) and rows[-1]["step"] == self.step and GENERATED not in rows[-1]
        return any_rank(self.parts.grid, ends)

    def _heldout(self) -> dict[str, float]:
        settings = self.parts.settings
        if not self.parts.heldout or settings.debug.mode in ("from_dump", "fake_data"):
            return {}
        begun = time.perf_counter()
        # The same seeds at every step and in every run: two evaluations differ by their weights alone.
        seeds = replace(self.parts.seeds(0, purpose="heldout"), run=0)
        played = self.parts.source.play(self.parts.heldout, settings.eval.samples, seeds, rounds=1)
        if self.step == 0:
            require_sound(played)
        self.times["evaluation"] += time.perf_counter() - begun
        return heldout_metrics(played.episodes)

    def _timings(self, row: dict[str, float], stats: StepStats | None) -> dict[str, float]:
        found = {f"{TIME_PREFIX}{name}_s": seconds for name, seconds in self.times.items()}
        step_s = sum(self.times.values()) - self.times.get("evaluation", 0.0)
        for what in (GENERATED, USED):
            found[f"{TIME_PREFIX}{what.removeprefix('tokens/')}_tokens_per_s"] = row.get(what, 0.0) / max(step_s, 1e-9)
        if stats is not None:
            found[f"{TIME_PREFIX}trained_tokens_per_s"] = stats.tokens / max(self.times["train"], 1e-9)
        self.times.clear()
        return found

    def _advance(self, row: dict[str, float]) -> None:
        free = row.get("success/critique_free", 0.0)
        line = f"step {self.step}  critique-free {free:.0%}  with critique {row.get('success/with_critique', free):.0%}"
        if self.bar is not None:
            self.bar.advance(1, note=line)


def _read_pending(path: Path) -> Row | None:
    """The row that a checkpoint was saved with, if its evaluation had failed; its files were verified before."""
    row: Row | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return row


def _cost(played: Played) -> dict[str, float]:
    """What the step's batch cost: generated + kept before = used + discarded + kept now."""
    return {
        GENERATED: float(played.generated_tokens()),
        "tokens/discarded": float(played.discarded_tokens),
        "tokens/kept": float(played.kept_tokens),
    }


def _engine_metrics(played: Played) -> dict[str, float]:
    """What the engines counted, where they count: the local engine does not."""
    engine = played.engine
    if engine.requests == 0:
        return {}
    return {
        "engine/requests": float(engine.requests),
        "engine/retries": float(engine.retries),
        "engine/aborted": float(engine.aborted),
        "engine/deaths": float(played.deaths),
        "episodes/cut_off": float(played.cut_off),
        "engine/cache_hit_rate": engine.cached_tokens / max(1, engine.prompt_tokens),
    }


def _actor_metrics(stats: StepStats) -> dict[str, float]:
    row = {f"actor/{name}": value for name, value in stats.metrics.items()}
    return row | {
        "actor/loss": stats.loss,
        "actor/grad_norm": stats.grad_norm,
        "actor/learning_rate": stats.learning_rate,
        "actor/skipped_updates": float(stats.skipped_updates),
        "tokens/trained": float(stats.tokens),
        "tokens/loss": float(stats.loss_tokens),
    }
