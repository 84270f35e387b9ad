"""One rank of a grid test: `torchrun grid_worker.py FOLDER` runs all layouts whose number of ranks is the job's.

Rank 0 writes the results to FOLDER, where the tests read them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from icrl_megatron.distributed import platform

platform.prepare("cpu")

from grid_cases import (  # noqa: E402
    CASES,
    GRIDS,
    LAYOUTS,
    LEARNING_RATE,
    SAVED,
    SAVERS,
    SHARD_BYTES,
    STEPS,
    Case,
    Layout,
    Trained,
    cases_of,
    model_folder,
)
from megatron.core import parallel_state  # noqa: E402
from torch import Tensor  # noqa: E402
from whole_samples import packed  # noqa: E402

from icrl_megatron.actor import checkpoint, export  # noqa: E402
from icrl_megatron.actor.actor import Actor, InvariantError, ScoredPlan  # noqa: E402
from icrl_megatron.actor.optimizer import Applied  # noqa: E402
from icrl_megatron.distributed import grid as grids  # noqa: E402
from icrl_megatron.distributed.platform import sequence_multiple, token_multiple  # noqa: E402
from icrl_megatron.model.flops import SampleFlops  # noqa: E402
from icrl_megatron.model.weights import Gatherer  # noqa: E402
from icrl_megatron.settings.schema import Settings  # noqa: E402
from icrl_megatron.types import StepPlan, StepStats  # noqa: E402

Weights = dict[str, Tensor]


class Trainer:
    """An actor on the current grid and the plans of a case."""

    def __init__(self, case: Case, layout: Layout, grid: grids.Grid, root: Path, precision: str = "fp32") -> None:
        self.settings: Settings = case.settings(layout)
        self.settings.actor.precision = precision
        self.grid, self.case, self.layout = grid, case, layout
        self.actor = Actor(self.settings, model_folder(root, case.model), grid)
        self.plan = self._pack("train")
        recompute = self.settings.algo.calibration.denominator == "recomputed"
        self.behaviour = self._pack("behaviour") if recompute else None

    def _pack(self, prompt: str) -> StepPlan:
        return packed(
            self.case.draw(self.layout),
            self.settings.algo,
            micro_batch_tokens=self.layout.budget,
            align=self.layout.multiple * token_multiple(self.settings.actor),
            each=sequence_multiple(self.settings.actor),
            replica=self.grid.data_rank,
            replicas=self.grid.data,
            prompt="train" if prompt == "train" else "behaviour",
            flops=SampleFlops.of(self.actor.shape, self.settings),
        )

    def score(self) -> ScoredPlan:
        return self.actor.score(self.plan, self.behaviour)

    def step(self) -> StepStats:
        return self.actor.train(self.plan, self.score(), LEARNING_RATE)

    def weights(self) -> Weights:
        return {n: t.clone() for n, t in Gatherer(self.actor.rows, self.grid).stream()}

    def gradients(self) -> Weights:
        """The reduced gradients with Hugging Face names. After the reduce-scatter, each rank with the same
        parameters holds a shard."""
        optimizer = self.actor.optimizer.distributed
        table = []
        for row in self.actor.rows:
            flat = torch.zeros(row.param.numel())
            if row.param in optimizer.model_param_group_index_map:
                span = optimizer._get_model_param_range_map(row.param)["param"]
                flat[span.start : span.end] = row.param.main_grad.flatten()[span.start : span.end]
            dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            table.append(replace(row, param=torch.nn.Parameter(flat.view(row.param.shape))))
        return {n: t.clone() for n, t in Gatherer(table, self.grid).stream()}

    def keep_gradients(self, into: list[Weights]) -> None:
        """From now on, appends the gradients of every update before the optimizer applies them."""
        apply = self.actor.optimizer.step

        def step(learning_rate: float, healthy: bool) -> Applied:
            into.append(self.gradients())
            return apply(learning_rate, healthy)

        self.actor.optimizer.step = step  # type: ignore[method-assign]

    def logprobs(self, scored: ScoredPlan) -> Weights:
        """sample_id -> [L] log-probs, gathered from the last pipeline stages of all replicas."""
        mine: dict[str, list[Tensor]] = {}
        for update, frozen in zip(self.plan.updates, scored, strict=True):
            for batch, of_batch in zip(update, frozen, strict=True):
                if of_batch.old_L is not None:
                    for index, value in zip(batch.sample_index_L, of_batch.old_L, strict=True):
                        mine.setdefault(self.plan.samples[index].sample_id, []).append(value)
        everyone = grids.gather_objects(self.grid, {name: torch.stack(values) for name, values in mine.items()})
        return {name: values for of_rank in everyone for name, values in of_rank.items()}


def train(case: Case, layout: Layout, grid: grids.Grid, root: Path) -> Trained:
    trainer, found = Trainer(case, layout, grid, root), Trained({}, [], [], [], [], {})
    trainer.keep_gradients(found.gradients)
    for number in range(STEPS):
        scored = trainer.score()
        if number == 0:
            found.logprobs = trainer.logprobs(scored)
        stats = trainer.actor.train(trainer.plan, scored, LEARNING_RATE)
        if number == 0:
            reports = grid.rank == grid.scoring_rank(grid.data_rank)
            for of_rank in grids.gather_objects(grid, stats.calibration_weights if reports else {}):
                found.token_weights |= of_rank
        assert stats.skipped_updates == 0
        found.losses.append(stats.loss)
        found.norms.append(stats.grad_norm)
        found.metrics.append(stats.metrics)
    found.weights = trainer.weights()
    return found


def round_trip(layout: Layout, grid: grids.Grid, root: Path, out: Path) -> None:
    """Imports and exports every model in both precisions: to one file, to shards, and from those shards again."""
    for case in (CASES["paper"], CASES["everything"], CASES["qwen2"]):
        for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            settings = case.settings(layout)
            settings.actor.precision, settings.algo.kl_coef = precision, 0.0
            source = model_folder(root, case.model, dtype)
            for shard_bytes, name in ((4 << 30, "whole"), (SHARD_BYTES, "shards"), (SHARD_BYTES, "again")):
                export.SHARD_BYTES = shard_bytes
                actor = Actor(settings, source, grid)
                source = out / f"{case.model}-{dtype}-{name}"
                export.write_hf(Gatherer(actor.rows, grid), model_folder(root, case.model), source, grid)


def save_checkpoints(name: str, layout: Layout, grid: grids.Grid, root: Path, kinds: Iterable[str] = SAVED) -> None:
    """Saves checkpoints after one step, together with the weights after that step and after the next one."""
    for kind in kinds:
        case, precision = SAVED[kind]
        trainer, folder = Trainer(case, layout, grid, root, precision), root / "saved" / f"{name}-{kind}"
        trainer.step()
        like = model_folder(root, case.model)
        progress = checkpoint.SavedProgress(1, 3, trainer.actor.optimizer.steps, 77)
        checkpoint.save(folder, trainer.actor.rows, trainer.actor.optimizer, grid, progress, like, keep=1)
        before = trainer.weights()
        trainer.step()
        if grid.rank == 0:
            torch.save((before, trainer.weights()), folder / "next.pt")
        else:
            trainer.weights()
        dist.barrier(group=grid.host_group)


def load_checkpoints(name: str, layout: Layout, grid: grids.Grid, root: Path, out: Path) -> None:
    """Loads every checkpoint saved so far (in bf16 only this layout's own) and trains one step."""
    folders = sorted(p for p in (root / "saved").glob("*") if not p.name.endswith("-bf16") or p.name == f"{name}-bf16")
    for folder in folders:
        case, precision = SAVED[folder.name.rpartition("-")[2]]
        trainer = Trainer(case, layout, grid, root, precision)
        optimizer = trainer.actor.optimizer
        progress = checkpoint.load(checkpoint.complete(folder)[-1], trainer.actor.rows, optimizer, grid)
        assert progress == checkpoint.SavedProgress(1, 3, 1, 77) and optimizer.steps == 1
        before = trainer.weights()
        trainer.step()
        after = trainer.weights()
        if grid.rank == 0:
            torch.save((before, after), out / f"{folder.name}.pt")


def refuse(layout: Layout, grid: grids.Grid, root: Path) -> dict[str, bool]:
    """Faults on the last rank, which must stop training or skip an update on all ranks."""
    found: dict[str, bool] = {}
    trainer = Trainer(CASES["paper"], layout, grid, root)
    scored = trainer.score()
    weight = trainer.actor.rows[-1].param.data
    if grid.rank == grid.world - 1:
        weight[0] += 1.0
    try:
        trainer.actor.train(trainer.plan, scored, LEARNING_RATE)
        found["invariant"] = False
    except InvariantError:
        found["invariant"] = True

    trainer = Trainer(CASES["paper"], layout, grid, root)
    trainer.step()
    weight = trainer.actor.rows[-1].param.data
    intact = weight.flatten()[0].item()
    before = {row.name: row.param.detach().clone() for row in trainer.actor.rows}
    if grid.rank == grid.world - 1:
        weight.flatten()[0] = float("nan")
    stats = trainer.step()
    weight.flatten()[0] = intact
    found["skipped"] = stats.skipped_updates == 1
    found["unchanged"] = all(torch.equal(before[row.name], row.param) for row in trainer.actor.rows)
    found["uncounted"] = trainer.actor.optimizer.steps == 1
    stats = trainer.step()
    found["goes on"] = stats.skipped_updates == 0 and trainer.actor.optimizer.steps == 2
    return found


def main(root: Path) -> None:
    torch.set_num_threads(1)
    grids.single_process()
    world = int(os.environ["WORLD_SIZE"])
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout.world == world}
    for name in sorted(layouts, key=lambda n: n not in SAVERS):
        layout, out = layouts[name], root / name
        out.mkdir(exist_ok=True)
        grid = grids.build(CASES["paper"].settings(layout))
        for case_name in cases_of(name):
            found = train(CASES[case_name], layout, grid, root)
            if grid.rank == 0:
                torch.save(found, out / f"{case_name}.pt")
        if name in GRIDS:
            round_trip(layout, grid, root, out)
            if name in SAVERS:
                save_checkpoints(name, layout, grid, root)
            load_checkpoints(name, layout, grid, root, out)
            refused = grids.gather_objects(grid, refuse(layout, grid, root))
            if grid.rank == 0:
                torch.save(refused, out / "refused.pt")
        parallel_state.destroy_model_parallel()
    grids.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
