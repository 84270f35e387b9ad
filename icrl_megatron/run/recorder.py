"""Records a step: its metrics, its rollouts for people to read, and the success shares for the curriculum."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.data.curriculum import append_history, success_shares
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import gather_objects
from icrl_megatron.rollout.played import Played
from icrl_megatron.run.state import RunState
from icrl_megatron.telemetry.dump_writer import StepDump, chosen
from icrl_megatron.telemetry.dumps import credit_of
from icrl_megatron.telemetry.metrics import GENERATED, HELDOUT_NLL, NLL, USED, rollout_metrics
from icrl_megatron.telemetry.trackers import TableRow, table_rows
from icrl_megatron.telemetry.writer import TIME_PREFIX, MetricsRow
from icrl_megatron.types import IdArray, StepStats
from icrl_megatron.utils.progress import Phase, Progress


class Recorder:
    """Times the phases of a step and computes its metrics. All ranks call each method."""

    def __init__(
        self, state: RunState, progress: Progress, bar: Phase, decode: Callable[[IdArray], str], dropped: int = 0
    ) -> None:
        """`decode` turns token ids into text; `dropped` counts problems that do not fit the context, or conversations
        that cannot be trained on."""
        self.state, self.progress, self.bar = state, progress, bar
        self._decode, self._dropped = decode, dropped
        self._times: dict[str, float] = defaultdict(float)
        self._resampled = 0
        self.table: list[TableRow] = []
        """A few episodes of the last step, for trackers."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times one phase of the step."""
        begun = time.perf_counter()
        yield
        platform.synchronize()
        self._times[name] += time.perf_counter() - begun

    def count(self, played: Played, resample: int) -> None:
        """Counts the generated tokens of a batch, the cost of a run, including discarded batches."""
        self.state.generated += played.generated_tokens()
        self._resampled = resample

    def row(self, played: Played, report: CreditReport, stats: StepStats | None) -> MetricsRow:
        """The metrics of the last step (`stats` is None without an update). Dumps its rollouts."""
        state, sync = self.state, self.state.parts.sync
        self.table = self._table(played)
        self._observe(played)
        row = rollout_metrics(played.headers, played.dropped, report)
        row |= _cost(played)
        row |= {"tokens/generated_total": state.generated, "steps/resampled": self._resampled}
        row |= {"data/dropped_too_long": float(self._dropped)}
        row |= {"weights/version": sync.version, "steps/without_signal": float(not report.has_signal)}
        row |= _engine_metrics(played) | _staleness(played)
        rollout = state.parts.settings.rollout
        if rollout.turn_stages:
            row["attempt/turn_limit"] = float(rollout.turns_at(state.step - 1))
        if stats is not None:
            row |= _actor_metrics(stats)
            row |= {f"memory/{point}_gib": gib for point, gib in sync.memory_gib.items()}
        if played.dropped:
            lost = played.dropped[0]
            self.progress.log(
                f"step {state.step}: {len(played.dropped)} episodes lost, {lost.task.task_id}: {lost.error}"
            )
        self._dump(played, report, stats)
        return row | {"episodes/not_dumped": float(state.not_dumped())}

    def _dump(self, played: Played, report: CreditReport, stats: StepStats | None) -> None:
        """Dumps this rank's part of the step's sample: the rank that played an episode has its tokens."""
        state, settings = self.state, self.state.parts.settings
        everyone = ((header.task.task_id, header.index) for header in played.headers)
        sample = chosen(everyone, settings.telemetry.episodes(), settings.seed, state.step)
        own = [e for e in played.episodes if (e.task.task_id, e.index) in sample]
        weights = stats.calibration_weights if stats is not None else {}
        state.dumps.submit(StepDump(state.step, credit_of(own, report.samples, weights), self._decode))

    def timings(self, row: MetricsRow, stats: StepStats | None) -> MetricsRow:
        """Seconds per phase and tokens per second of the step; resets the timers."""
        found = {f"{TIME_PREFIX}{name}_s": seconds for name, seconds in self._times.items()}
        step_s = sum(self._times.values()) - self._times.get("evaluation", 0.0)
        for what in (GENERATED, USED):
            found[f"{TIME_PREFIX}{what.removeprefix('tokens/')}_tokens_per_s"] = row.get(what, 0.0) / max(step_s, 1e-9)
        if stats is not None:
            found[f"{TIME_PREFIX}trained_tokens_per_s"] = stats.tokens / max(self._times["train"], 1e-9)
        self._times.clear()
        return found

    def advance(self, row: MetricsRow) -> None:
        """Moves the progress bar by one step."""
        free = row.get("success/critique_free", 0.0)
        with_critique = row.get("success/with_critique", free)
        self.bar.advance(1, f"step {self.state.step}  critique-free {free:.0%}  with critique {with_critique:.0%}")

    def _table(self, played: Played) -> list[TableRow]:
        """The rows of the first episodes, from the ranks that have them."""
        parts = self.state.parts
        limit = parts.settings.trackers.episodes
        if not parts.settings.trackers.names or not limit:
            return []
        rows = (len(header.attempts) + len(header.critiques) for header in played.headers)
        count = sum(before < limit for before in accumulate(rows, initial=0))
        shown = [(header.task.task_id, header.index) for header in played.headers[:count]]
        own = {(e.task.task_id, e.index): e for e in played.episodes[:count]}
        mine = {key: table_rows([own[key]], limit) for key in shown if key in own}
        everyones = {key: of for one in gather_objects(parts.grid, mine) for key, of in one.items()}
        return [row for key in shown for row in everyones[key]][:limit]

    def _observe(self, played: Played) -> None:
        state = self.state
        if (curriculum := state.parts.sampler.curriculum) is not None:
            shares = success_shares(played.headers)
            curriculum.observe(shares)
            asked = [header.task for header in played.headers]
            state.by_first_rank(lambda: append_history(state.run_dir, state.step, shares, asked))


class SupervisedRecorder(Recorder):
    """The metrics of supervised training: all tokens come from demonstrations, so rewards and costs mean nothing."""

    def row(self, played: Played, report: CreditReport, stats: StepStats | None) -> MetricsRow:
        assert stats is not None  # demonstrations always have a signal
        nll = stats.metrics.get("nll", math.nan)  # missing after a skipped update
        return {
            NLL: nll,
            "data/dropped": float(self._dropped),
            "actor/grad_norm": stats.grad_norm,
            "actor/learning_rate": stats.learning_rate,
            "actor/skipped_updates": float(stats.skipped_updates),
            "tokens/loss": float(stats.loss_tokens),
        }

    def advance(self, row: MetricsRow) -> None:
        heldout = f"  held-out nll {row[HELDOUT_NLL]:.3f}" if HELDOUT_NLL in row else ""
        self.bar.advance(1, f"nll {row[NLL]:.3f}{heldout}")


def _cost(played: Played) -> MetricsRow:
    """Token counts of the step's batch: generated + kept before = used + discarded + kept now."""
    return {
        GENERATED: float(played.generated_tokens()),
        "tokens/discarded": float(played.discarded_tokens),
        "tokens/kept": float(played.kept_tokens),
    }


def _staleness(played: Played) -> MetricsRow:
    """How old the groups of an asynchronous step are; empty for a synchronous one."""
    if not played.behind:
        return {}
    return {
        "staleness/mean": sum(played.behind) / len(played.behind),
        "staleness/max": float(max(played.behind)),
        "staleness/dropped_groups": float(played.too_old),
        "staleness/lost_engines": float(played.deaths),
    }


def _engine_metrics(played: Played) -> MetricsRow:
    """The engines' counters; empty for the local engine, which has none."""
    engine = played.engine
    deltas = {"engine/sync_mib": engine.sync_bytes / 2**20, "engine/full_pushes": float(engine.full_pushes)}
    deltas = deltas if engine.sync_bytes or engine.full_pushes else {}
    if engine.requests == 0:  # an asynchronous step may have none, and weights were sent all the same
        return deltas
    return {
        "engine/requests": float(engine.requests),
        "engine/retries": float(engine.retries),
        "engine/aborted": float(engine.aborted),
        "engine/deaths": float(played.deaths),
        "episodes/cut_off": float(played.cut_off),
        "engine/cache_hit_rate": engine.cached_tokens / max(1, engine.prompt_tokens),
        **deltas,
    }


def _actor_metrics(stats: StepStats) -> MetricsRow:
    row = {f"actor/{name}": value for name, value in stats.metrics.items()}
    return row | {
        "actor/loss": stats.loss,
        "actor/grad_norm": stats.grad_norm,
        "actor/learning_rate": stats.learning_rate,
        "actor/skipped_updates": float(stats.skipped_updates),
        "tokens/trained": float(stats.tokens),
        "tokens/loss": float(stats.loss_tokens),
    }
