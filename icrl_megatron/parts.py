"""What the loop works with: `Parts` computes, `Recorder` remembers (metrics, dumps, checkpoints, evaluation)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from icrl_megatron.actor import checkpoint, platform
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.export import write_hf
from icrl_megatron.actor.grid import Grid, any_rank
from icrl_megatron.actor.sync import WeightSync
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.config import Settings
from icrl_megatron.data.curriculum import append_history, cut_history, read_history, success_shares
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.launch import StopRequest
from icrl_megatron.rollout import tapes
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.source import EpisodeSource, Played
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.rollout.tapes import Tapes
from icrl_megatron.telemetry.dumps import write_dump
from icrl_megatron.telemetry.metrics import EVALUATION_TIME, GENERATED, USED, heldout_metrics, rollout_metrics
from icrl_megatron.telemetry.progress import Phase, Progress
from icrl_megatron.telemetry.writer import METRICS_FILE, TIME_PREFIX, MetricsWriter, read_rows
from icrl_megatron.types import StepStats, Task
from icrl_megatron.watch import Watch

CHECKPOINTS = "checkpoints"
EXPORT = "hf"
TAPES = "tapes.jsonl"
"""In a checkpoint: episodes that were cut off (`rollout.partial`)."""


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

    def __init__(self, parts: Parts, run_dir: Path, progress: Progress, stop: StopRequest) -> None:
        self.parts, self.run_dir, self.progress, self.stop = parts, run_dir, progress, stop
        self.step = self.generated = 0
        self.resampled = 0
        self.times: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()
        self.bar: Phase | None = None
        found = checkpoint.complete(run_dir / CHECKPOINTS)
        if found:
            actor = parts.actor
            resumed = checkpoint.load(found[-1], actor.rows, actor.optimizer, parts.grid)
            if parts.settings.rollout.partial:
                self._take_back(tapes.read(found[-1] / TAPES))
            self.step, self.generated = resumed.step, resumed.generated_tokens
            parts.sync.version = resumed.weight_version - 1
            progress.log(f"resuming from {found[-1]}")
        elif parts.settings.start_from:
            self._start_from(Path(parts.settings.start_from))
        parts.actor.offload.release()
        parts.sync.push()
        main = parts.grid.rank == 0
        self._resume_curriculum(main)
        self.writer = MetricsWriter(run_dir, self.step if found else None) if main else None

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
        settings = self.parts.settings
        self.step += 1
        if (curriculum := self.parts.sampler.curriculum) is not None:
            shares = success_shares(played.episodes)
            curriculum.observe(shares)
            if self.writer is not None:
                append_history(self.run_dir, self.step, shares, [e.task for e in played.episodes])
        row = rollout_metrics(played.episodes, played.dropped, report)
        row |= _cost(played)
        row |= {"tokens/generated_total": self.generated, "steps/resampled": self.resampled}
        row |= {"data/dropped_too_long": float(self.parts.dropped_too_long)}
        row |= {"weights/version": self.parts.sync.version, "steps/without_signal": float(not report.has_signal)}
        row |= _engine_metrics(played)
        if stats is not None:
            row |= _actor_metrics(stats)
            row |= {f"memory/{point}_gib": gib for point, gib in self.parts.sync.memory_gib.items()}
        if settings.eval.interval and self.step % settings.eval.interval == 0 and not self.finished():
            row |= self._heldout()
        row |= self._timings(row, stats)
        if played.dropped:
            lost = played.dropped[0]
            self.progress.log(
                f"step {self.step}: {len(played.dropped)} episodes lost, {lost.task.task_id}: {lost.error}"
            )
        if self.writer is not None:
            weights = stats.calibration_weights if stats is not None else {}
            decode = self.parts.prompter.decode
            write_dump(self.run_dir, self.step, played.episodes, report.samples, decode, weights)
            self.writer.write(self.step, row)
        self._advance(row)
        if self.step % settings.checkpoint.interval == 0 and not self.finished():
            self.checkpoint()

    def evaluate(self) -> None:
        """Critique-free success on held-out problems, outside a training step."""
        row = self._heldout()
        row["tokens/generated_total"] = self.generated
        row[EVALUATION_TIME] = self.times.pop("evaluation", 0.0)
        if self.writer is not None:
            self.writer.write(self.step, row)

    def checkpoint(self) -> None:
        actor, settings = self.parts.actor, self.parts.settings
        state = checkpoint.Progress(self.step, self.parts.sync.version, actor.optimizer.steps, self.generated)
        root = self.run_dir / CHECKPOINTS
        if not (root / f"step_{self.step:06d}").exists():
            like, keep = Path(settings.model.path), settings.checkpoint.keep
            kept = self.parts.source.tapes()
            beside = {TAPES: tapes.to_lines(kept)} if kept else {}
            checkpoint.save(root, actor.rows, actor.optimizer, self.parts.grid, state, like, keep, beside)

    def conclude(self) -> None:
        """The last evaluation, checkpoint and export; what a run that was killed in here has done is not done twice."""
        if not self._evaluated():
            self.evaluate()
        self.checkpoint()
        with self.progress.phase("export"):
            folder = Path(self.parts.settings.model.path)
            write_hf(self.parts.sync.gatherer, folder, self.run_dir / EXPORT, self.parts.grid)
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
