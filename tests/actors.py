"""A tiny actor on one rank, its training steps and its checkpoints."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from whole_samples import Whole, packed

from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import StepPlan, StepStats

platform.prepare("cpu")

from icrl_megatron.actor import checkpoint  # noqa: E402
from icrl_megatron.actor.actor import Actor  # noqa: E402
from icrl_megatron.model.weights import Gatherer  # noqa: E402

LEARNING_RATE = 1e-2


def make_actor(folder: Path, grid: Grid, precision: str = "fp32", **algo: float) -> Actor:
    settings = Settings()
    settings.actor.precision = precision
    settings.optim.eps = 1e-3
    settings.algo = replace(settings.algo, **algo)
    return Actor(settings, folder, grid)


def plan(actor: Actor, seed: int = 0) -> StepPlan:
    r = random.Random(seed)
    samples = []
    for i in range(6):
        prompt, response = (tuple(r.randrange(20) for _ in range(r.randrange(2, 9))) for _ in range(2))
        logprobs = tuple(-r.uniform(2.0, 5.0) for _ in response)
        mask = (True,) * len(response)
        samples.append(
            Whole(f"t#{i}", "t", "attempt", 0, prompt, prompt, response, mask, logprobs, False, 1.0, r.uniform(-1, 1))
        )
    return packed(samples, actor.settings.algo, micro_batch_tokens=40)


def step(actor: Actor, seed: int = 0) -> StepStats:
    of_step = plan(actor, seed)
    return actor.train(of_step, actor.score(of_step), LEARNING_RATE)


def weights(actor: Actor) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in Gatherer(actor.rows, actor.grid).stream()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


def save(actor: Actor, folder: Path, root: Path, number: int, keep: int | None = 2, run: str = "") -> Path:
    progress = checkpoint.SavedProgress(number, number + 1, actor.optimizer.steps, 10 * number)
    return checkpoint.save(root, actor.rows, actor.optimizer, actor.grid, progress, folder, keep, run=run)


def load(actor: Actor, folder: Path) -> checkpoint.SavedProgress:
    return checkpoint.load(folder, actor.rows, actor.optimizer, actor.grid)
