"""The chunked head against eager torch and Liger's chunked GRPO loss: CPU seconds and additional peak memory on a CPU.

    python tools/bench_head.py --out benchmarks/head_cpu.json

Each measurement is one forward and backward pass in a separate process, after a pass over a few tokens: user and system
time of the process, and the peak resident set above that of inputs and weight. The peers take turns, so that load on
the machine affects all of them equally. All must compute the same loss.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import bench_schema
import torch
import typer
from bench_schema import Bar
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from icrl_kernels import (
    Chunking,
    Streams,
    Terms,
    VocabShard,
    logprob_head,
    policy_head,
    reference_head,
    token_objective,
)

ADVANTAGE = 0.7
PEERS = {
    "head": "this project's chunked head",
    "recomputing": "its head for other losses, which computes logits twice",
    "eager": "eager torch, all logits at once",
    "liger": "Liger chunked GRPO, one sequence of all tokens",
    "liger_rows": "Liger chunked GRPO, eight sequences",
}
BARS = {"eager": (1.0, 0.15), "liger": (0.6, 0.6)}
"""Peer -> maximum CPU seconds and maximum additional memory of ours, relative to the peer's."""


@dataclass(frozen=True)
class Shape:
    tokens: int = 1024
    hidden: int = 256
    vocabulary: int = 151936
    chunk: int = 128


@dataclass(frozen=True)
class Measurement:
    cpu_seconds: float
    wall_seconds: float
    extra_peak_mib: float
    loss: float
    hidden_grad_norm: float
    weight_grad_norm: float


Pass = Callable[[Tensor, Tensor, Streams], Tensor]


def _ours(shape: Shape) -> Pass:
    shard = VocabShard.whole(shape.vocabulary)
    return lambda hidden, weight, streams: (
        policy_head(hidden, weight, streams, Terms(), shard, Chunking(shape.chunk)).loss
    )


def _recomputing(shape: Shape) -> Pass:
    shard = VocabShard.whole(shape.vocabulary)

    def run(hidden_LH: Tensor, weight_VH: Tensor, streams: Streams) -> Tensor:
        scores = logprob_head(hidden_LH, weight_VH, streams.targets_L, 1.0, shard, Chunking(shape.chunk))
        return token_objective(*scores, streams, Terms()).loss_L.sum()

    return run


def _eager(shape: Shape) -> Pass:
    return lambda hidden, weight, streams: reference_head(hidden, weight, streams, Terms(), shape.vocabulary).loss


def _liger(sequences: int) -> Pass:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    bounds = Terms()
    loss_fn = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=bounds.clip_low, epsilon_high=bounds.clip_high
    )

    def run(hidden_LH: Tensor, weight_VH: Tensor, streams: Streams) -> Tensor:
        assert streams.old_logprobs_L is not None
        targets_BT = streams.targets_L.view(sequences, -1)
        loss, _ = loss_fn(
            hidden_LH.view(*targets_BT.shape, -1),
            weight_VH,
            targets_BT,
            torch.ones_like(targets_BT, dtype=torch.float32),
            torch.full((sequences,), ADVANTAGE),
            old_per_token_logps=streams.old_logprobs_L.view_as(targets_BT),
        )
        return loss

    return run


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Streams]:
    draw = torch.Generator().manual_seed(0)
    hidden_LH = torch.randn(shape.tokens, shape.hidden, generator=draw)
    weight_VH = torch.randn(shape.vocabulary, shape.hidden, generator=draw).mul_(0.05)
    targets_L = torch.randint(shape.vocabulary, (shape.tokens,), generator=draw)
    old_L = -12.0 + 0.5 * torch.randn(shape.tokens, generator=draw)
    ones_L = torch.ones(shape.tokens)
    return hidden_LH, weight_VH, Streams(targets_L, ones_L / shape.tokens, ADVANTAGE * ones_L, old_L)


def _resident_mib(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(peer: str, shape: Shape) -> Measurement:
    """Measures one pass of one peer in this process."""
    makers = {"head": _ours, "recomputing": _recomputing, "eager": _eager}
    run = makers[peer](shape) if peer in makers else _liger(8 if peer == "liger_rows" else 1)
    hidden_LH, weight_VH, streams = _inputs(shape)
    few = slice(0, 8)
    run(hidden_LH[few].clone().requires_grad_(), weight_VH.requires_grad_(), streams.slice(few)).backward()
    hidden_LH.requires_grad_()
    weight_VH.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current resident set
    before, resident = resource.getrusage(resource.RUSAGE_SELF), _resident_mib("VmRSS")
    began = time.perf_counter()
    loss = run(hidden_LH, weight_VH, streams)
    loss.backward()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    return Measurement(
        cpu_seconds=after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        wall_seconds=wall,
        extra_peak_mib=_resident_mib("VmHWM") - resident,
        loss=loss.item(),
        hidden_grad_norm=hidden_LH.grad.norm().item(),
        weight_grad_norm=weight_VH.grad.norm().item(),
    )


def _measure_apart(peer: str, shape: Shape, threads: int) -> Measurement:
    command = [sys.executable, __file__, "--peer", peer]
    for name, value in asdict(shape).items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{peer} failed:\n{done.stderr}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _check_agreement(runs: dict[str, list[Measurement]]) -> None:
    truth = runs["eager"][0]
    for peer, measurements in runs.items():
        for name in ("loss", "hidden_grad_norm", "weight_grad_norm"):
            got, want = getattr(measurements[0], name), getattr(truth, name)
            if abs(got - want) > 1e-4 * abs(want):
                raise RuntimeError(f"{peer} computes a different {name} than eager torch: {got} instead of {want}")


def _report(runs: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Medians, ours relative to each peer's, and the bars."""
    names = ("cpu_seconds", "wall_seconds", "extra_peak_mib")
    medians = {p: {n: statistics.median(getattr(m, n) for m in ms) for n in names} for p, ms in runs.items()}
    ours = medians["head"]
    judged = ("cpu_seconds", "extra_peak_mib")
    shares = {peer: {n: ours[n] / medians[peer][n] for n in judged} for peer in runs if peer != "head"}
    bars = [
        Bar(f"{what} as a share of {peer}'s", shares[peer][quantity], limit)
        for peer, limits in BARS.items()
        for what, quantity, limit in zip(("CPU seconds", "extra memory"), judged, limits, strict=True)
    ]
    return {"medians": medians, "head_as_share_of": shares, "bars": bars}


def _print(report: dict[str, Any]) -> None:
    table = Table("", "CPU s", "wall s", "extra MiB", "head: CPU", "head: memory", "bars", title="head, CPU, float32")
    for peer, text in PEERS.items():
        median, share = report["medians"][peer], report["head_as_share_of"].get(peer)
        limits = [bar for bar in report["bars"] if bar.name.endswith(f" {peer}'s")]
        cells = [f"{median['cpu_seconds']:.2f}", f"{median['wall_seconds']:.2f}", f"{median['extra_peak_mib']:.0f}"]
        cells += [f"{share['cpu_seconds']:.2f}", f"{share['extra_peak_mib']:.2f}"] if share else ["", ""]
        table.add_row(text, *cells, ", ".join(f"{bar.limit:g} {bar.verdict()}" for bar in limits))
    Console().print(table)


def main(
    out: Annotated[Path | None, typer.Option(help="The JSON file; on a CPU benchmarks/head_cpu.json.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each peer; medians are reported.")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    tokens: int = Shape.tokens,
    hidden: int = Shape.hidden,
    vocabulary: int = Shape.vocabulary,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens whose logits our head holds at once.")] = Shape.chunk,
    device: Annotated[str, typer.Option(help="cpu, or cuda, with the options of tools/bench_head_cuda.py.")] = "cpu",
    peer: Annotated[str | None, typer.Option(hidden=True, help="Measure this one here and print it.")] = None,
) -> None:
    """Measures all peers and writes the medians; exits with 1 if a bar is missed, and with 2 without Liger."""
    out = out or Path("benchmarks/head_cpu.json")
    shape = Shape(tokens, hidden, vocabulary, chunk)
    if peer is not None:
        print(json.dumps(asdict(measure(peer, shape))))
        return
    if device != "cpu":
        print(f"error: --device {device}: one of cpu, cuda", file=sys.stderr)
        raise typer.Exit(2)
    bench_schema.require("bench", "liger_kernel")
    runs: dict[str, list[Measurement]] = {name: [] for name in PEERS}
    turns = [name for _ in range(rounds) for name in PEERS]
    for name in track(turns, description="measuring", console=Console(stderr=True)):
        runs[name].append(_measure_apart(name, shape, threads))
    _check_agreement(runs)
    report = _report(runs)
    _print(report)
    about = bench_schema.about(("torch", "liger-kernel", "numpy"))
    about |= {"machine": f"{about['machine']}, {threads} threads used", "shape": asdict(shape)}
    everything = {name: [asdict(m) for m in ms] for name, ms in runs.items()}
    bench_schema.write(out, "head", about | report | {"runs": everything})
    print(f"written to {out}")
    if not all(bar.held for bar in report["bars"]):
        raise typer.Exit(1)


def run() -> None:
    typer.run(main)


if __name__ == "__main__":
    run()
