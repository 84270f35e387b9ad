"""What a rank computes for the whole step before it trains: CPU seconds, and how evenly the replicas are loaded.

    python tools/bench_balance.py [--tokens 2e8] [--mean 2000] [--replicas 256 --replicas 1024] [--updates 1]

    samples     headers to samples, groups, advantages (`algo.credit`)
    sizes       the columns that balance reads (`Sizes.of`)
    placement   update and replica of every sample (`place`)
    packing     micro-batches of one replica (`first_fit`); the median of 16 replicas
    imbalance   FLOPs of the heaviest replica over the mean, in the worst update; and what balancing by tokens gives
    batches     micro-batches of a replica: the fewest and the most of all replicas, and tokens / budget

Lengths are log-normal, with a standard deviation equal to the mean, and cut at --longest. Credit, and the reading of
sizes from samples, see headers only, so their episodes have replies of two tokens. Prints a table; exits with 1 if
the stages together take more than 2 s or the imbalance is above 1.02. CPU time depends less on other load on the
machine than time does; each is the median of --rounds.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import bench_schema
import numpy as np
import typer
from bench_schema import Bar
from rich.console import Console
from rich.table import Table

from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.headers import EpisodeHeader, headers_of
from icrl_megatron.data.balance import Placement, Sizes, imbalance, place
from icrl_megatron.data.packing import BY_TOKENS, first_fit
from icrl_megatron.model.flops import Passes, SampleFlops
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.settings.algo_schema import AlgoSettings
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Task, Turn, id_array, logprob_array

SECONDS_BAR = 2.0
"""Most CPU seconds of all stages at 1,024 replicas and 200M tokens."""
IMBALANCE_BAR = 1.02
EPISODES_A_TASK = 8
PACKED_REPLICAS = 16


@dataclass(frozen=True)
class Load:
    """How evenly a placement loads the replicas."""

    by_flops: float
    by_tokens: float
    batches: tuple[int, int]
    least_batches: float


def headers(samples: int) -> tuple[EpisodeHeader, ...]:
    """Half of the first attempts fail, and get a critique and a revision: two samples an episode."""
    draw, reply = random.Random(0), Completion(id_array((5, 6)), logprob_array((-0.5, -0.5)), "stop", 0)
    turn, found = Turn(reply, "", None, "", ()), list[Episode]()

    def attempt(number: int, outcome: float) -> Attempt:
        return Attempt(number, (1, 2), (1, 2), (turn,), outcome, outcome == 1.0, "", "done")

    for number in range(samples // 2):
        problem, index = divmod(number, EPISODES_A_TASK)
        task = Task(f"alfworld/train/{problem}", "alfworld", "train", str(problem))
        if draw.random() < 0.5:
            found.append(Episode(task, index, (attempt(0, 1.0),), ()))
        else:
            critique = Critique(0, (1, 2), reply, "")
            found.append(Episode(task, index, (attempt(0, 0.0), attempt(1, draw.choice((0.0, 1.0)))), (critique,)))
    return headers_of(found)


def sizes_of(sample_ids: tuple[str, ...], mean: float, longest: int) -> Sizes:
    """Lengths of the samples: a fifth is prompt, and half of the response carries loss."""
    draw, spread = np.random.default_rng(0), np.log(2.0)
    drawn_S = draw.lognormal(np.log(mean) - spread / 2, spread**0.5, len(sample_ids))
    tokens_S = np.clip(np.rint(drawn_S), 10, longest).astype(np.int64)
    return Sizes(sample_ids, tokens_S, tokens_S, np.maximum(1, tokens_S * 2 // 5))


def seconds(rounds: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """The median of the CPU seconds, and the last result."""
    spent, result = [], None
    for _ in range(rounds):
        begun = time.process_time()
        result = run()
        spent.append(time.process_time() - begun)
    return statistics.median(spent), result


def load(sizes: Sizes, placement: Placement, flops: SampleFlops, replicas: int, budget: int) -> Load:
    flops_S, by_tokens = sizes.flops_S(flops), place(sizes, placement.updates, BY_TOKENS, replicas)

    def worst(placed: Placement) -> float:
        updates = [placed.update_S == u for u in range(placed.updates)]
        return max(imbalance(flops_S[of], placed.replica_S[of], replicas) for of in updates)

    shares = [placement.members(u, r) for u in range(placement.updates) for r in range(replicas)]
    batches = [len(first_fit(sizes.train_S[share], budget)) for share in shares]
    mean = float(sizes.train_S.sum()) / budget / len(shares)
    return Load(worst(placement), worst(by_tokens), (min(batches), max(batches)), mean)


def main(
    tokens: Annotated[float, typer.Option(min=1e4, help="Of a step")] = 2e8,
    mean: Annotated[float, typer.Option(min=100, help="Tokens of a sample")] = 2000.0,
    longest: Annotated[int, typer.Option(min=100, help="Tokens of a sample, at most")] = 16_384,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of a micro-batch")] = 16_384,
    replicas: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 256, 1024")] = None,
    updates: Annotated[int, typer.Option(min=1)] = 1,
    model: str = "Qwen3-8B",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    gc.set_threshold(50_000, 20, 100)  # as in every rank (distributed/before_megatron.py)
    played = headers(round(tokens / mean))
    credit_s, report = seconds(rounds, lambda: credit(played, AlgoSettings(), True))
    sizes_s, read = seconds(rounds, lambda: Sizes.of(report.samples))
    sizes = sizes_of(read.sample_ids, mean, longest)
    flops = SampleFlops.of_passes(PUBLISHED[model], Passes(updates, int(updates > 1)), "full", 1)
    table = Table("replicas", "samples s", "sizes s", "placement s", "packing s", "total s", "imbalance", "by tokens")
    for name in ("batches", "at least"):
        table.add_column(name)
    bars, medians = list[Bar](), dict[str, dict[str, float]]()
    for count in replicas or [1, 256, 1024]:
        place_s, placement = seconds(rounds, lambda: place(sizes, updates, flops, count))  # noqa: B023
        packed = []
        for replica in range(min(count, PACKED_REPLICAS)):
            own = [sizes.train_S[placement.members(u, replica)] for u in range(placement.updates)]
            packed.append(seconds(1, lambda: [first_fit(of, budget) for of in own])[0])  # noqa: B023
        stages = (credit_s, sizes_s, place_s, statistics.median(packed))
        found = load(sizes, placement, flops, count, budget)
        batches = "{}..{}".format(*found.batches)
        table.add_row(
            str(count),
            *(f"{value:.3f}" for value in (*stages, sum(stages))),
            *(f"{value:.4f}" for value in (found.by_flops, found.by_tokens)),
            *(batches, f"{found.least_batches:.1f}"),
        )
        bars.append(Bar(f"{count} replicas: all stages, CPU s", sum(stages), SECONDS_BAR))
        bars.append(Bar(f"{count} replicas: imbalance", found.by_flops, IMBALANCE_BAR))
        names = ("samples_s", "sizes_s", "placement_s", "packing_s")
        medians[f"{count}_replicas"] = dict(zip(names, stages, strict=True)) | {"imbalance": found.by_flops}
    console, held = Console(width=160), all(bar.held for bar in bars)
    console.print(table)
    console.print(
        f"{len(sizes.sample_ids):,} samples of {len(played):,} episodes, {int(sizes.train_S.sum()):,} tokens, "
        f"{updates} updates; bars {'held' if held else 'MISSED'}: {SECONDS_BAR:g} s, imbalance {IMBALANCE_BAR:g}"
    )
    if out is not None:
        bench_schema.write(out, "balance", bench_schema.about() | {"medians": medians, "bars": bars})
    if not held:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
