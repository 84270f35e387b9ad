"""The head on a GPU against eager torch, Liger, Megatron and verl: device time and memory. Needs torch and triton.

    python tools/bench_head_cuda.py --out benchmarks/head_cuda.json [--quick] [--tune]

Three operations, each for the head of Qwen3-4B and 8B, at TP 1 and at one rank's share of TP 2, 4 and 8:

    given    logits in bf16 -> statistics, loss, gradient of the logits
    train    hidden states and weight in bf16 -> loss, both gradients
    score    hidden states and weight in bf16 -> log-probs

A peer's gradients are compared with ours before it is timed. Peers take turns in one process, each run between two
events on the device after a sweep over a buffer larger than the L2 cache. Reported are medians, with GB/s (given) or
TF/s (the others), the share of an H100's floor, and the memory that a pass allocates at its peak. A peer that is not
installed, runs out of memory or computes something else is named with its reason.
`bars` holds each bar with its value. The file is written after every row.
`python tools/bench_head.py --device cuda` is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_schema
import head_cuda_targets
import torch
from head_cuda_peers import (
    DEVICE,
    MODELS,
    Chunking,
    Inputs,
    Run,
    Shape,
    given_peers,
    own_pass,
    score_peers,
    train_peers,
    tuning_passes,
)
from head_cuda_targets import Row
from torch import Tensor

GB = 1e9
OPERATIONS = {"given": given_peers, "train": train_peers, "score": score_peers}


MOST_ERROR = 0.05
"""Of a peer's gradients, relative to ours: bf16 rounding is below 0.01. What computes something else is not timed."""


def measure(peers: dict[str, Run | str], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and extra bytes by peer; what could not run says why."""
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, run in peers.items():
        reason = run if isinstance(run, str) else _warm(run)
        if isinstance(reason, str):
            found[name] = {"missing": reason}
            continue
        found[name] = {"extra_gb": reason / GB}
        if hasattr(run, "wrong_by"):
            found[name]["gradient_error"] = off = run.wrong_by()
            if not off <= MOST_ERROR:
                found[name]["missing"] = f"wrong: its gradients differ from ours by {off:.2g}"
                continue
        runs[name] = run  # type: ignore[assignment]
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, flush))
    for name, values in times.items():
        found[name] |= {"ms": statistics.median(values), "ms_min": min(values), "ms_max": max(values)}
    return found


def _warm(run: Run) -> int | str:
    """Runs twice, for compilation and for its peak memory above what is allocated before."""
    try:
        for _ in range(2):
            getattr(run, "before", lambda: None)()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    except Exception as error:
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _timed(run: Run, flush: Tensor) -> float:
    getattr(run, "before", lambda: None)()
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def bench(shapes: list[Shape], rounds: int, keep: Callable[[list[Row]], None]) -> None:
    """Hands `keep` all rows so far after each one: some errors of CUDA leave the process unable to go on."""
    rows: list[Row] = []
    for shape in shapes:
        size = (shape.tokens, shape.columns, shape.hidden)
        for operation, peers_of in OPERATIONS.items():
            inputs = Inputs(shape)
            found = measure(peers_of(inputs), rounds)
            peers = {name: head_cuda_targets.with_rates(values, operation, *size) for name, values in found.items()}
            floor = head_cuda_targets.floor_ms(operation, *size)
            rows.append({"operation": operation, **asdict(shape), "floor_ms_h100": floor, "peers": peers})
            keep(rows)
            print(head_cuda_targets.line(rows[-1]), flush=True)
            del inputs
            torch.cuda.empty_cache()


def tune(tokens: int) -> list[dict[str, Any]]:
    """Times of the two kernels that pass over logits, by block, warps and programs a multiprocessor."""
    from icrl_kernels import triton_chunks

    inputs, rows = Inputs(Shape("Qwen3-8B", tokens, 1)), []
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    own = triton_chunks._tuning
    try:
        for block in (1024, 2048, 4096, 8192):
            for warps in (4, 8, 16):
                for programs in (1, 2, 4, 8):
                    setting = triton_chunks.Tuning(block, warps, programs)
                    triton_chunks._tuning = lambda _, chosen=setting: chosen  # type: ignore[misc,assignment]
                    rows.append(asdict(setting) | _tuned(inputs, flush))
                    print(rows[-1], flush=True)
    finally:
        triton_chunks._tuning = own
    return sorted(rows, key=lambda row: row["statistics_ms"] + row["gradients_ms"])


def tune_chunks(tokens: int, rounds: int = 5) -> list[dict[str, Any]]:
    """Times of the whole training pass by the rows of a chunk, in turns; `default` marks what the plan chooses."""
    inputs = Inputs(Shape("Qwen3-8B", tokens, 1))
    runs: dict[tuple[str, int | None], Run] = {}
    for logits, rows in (("fp32", (None, 2048, 2560, 2816, 3072, 3328)), ("bf16", (None, 3072, 4096, 5504, 6528))):
        for count in rows:
            runs[logits, count] = own_pass(inputs, Chunking(count, logits=logits))
    found = measure({f"{logits} {count or 'default'}": run for (logits, count), run in runs.items()}, rounds)
    return [{"chunk": name} | values for name, values in found.items()]


def _tuned(inputs: Inputs, flush: Tensor) -> dict[str, float]:
    runs, _ = tuning_passes(inputs, 2048)
    found = {}
    for name, (run, moved) in runs.items():
        found[f"{name}_ms"] = statistics.median([_timed(run, flush) for _ in range(12)][2:])
        found[f"{name}_gb_per_s"] = moved / found[f"{name}_ms"] / 1e6
    return found


def about() -> dict[str, Any]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    names = ("torch", "triton", "liger-kernel", "megatron-core", "verl", "transformer-engine")
    return {
        "command": " ".join(["python", "tools/bench_head_cuda.py", *map(bench_schema.anywhere, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": card or torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "versions": {name: installed(name) for name in names},
    }


def report(rows: list[Row]) -> Row:
    return {"bars": head_cuda_targets.bars(rows), "rows": rows, "medians": head_cuda_targets.medians(rows)}


def write(out: Path, result: Row) -> None:
    out.write_text(json.dumps(bench_schema.stamped("head_cuda", result), indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/head_cuda.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the 8B head at T 8192, TP 1 and 8, five rounds")
    parser.add_argument("--tune", action="store_true", help="launch parameters instead of peers")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; tools/bench_head.py measures on a CPU", file=sys.stderr)
        return 2
    degrees = (1, 8) if chosen.quick else (1, 2, 4, 8)
    lengths, models = ((8192,), ("Qwen3-8B",)) if chosen.quick else ((8192, 16384), tuple(MODELS))
    shapes = [Shape(model, tokens, tp) for model in models for tokens in lengths for tp in degrees]
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    described = about() | {"quick": chosen.quick}
    if chosen.tune:
        rows = tune_chunks(8192)
        print(json.dumps(rows, indent=1), flush=True)
        write(chosen.out, described | {"tuning": tune(8192), "chunks": rows, "medians": {}})
    else:
        bench(shapes, 5 if chosen.quick else chosen.rounds, lambda rows: write(chosen.out, described | report(rows)))
        for bar in bench_schema.bars(bench_schema.read(chosen.out)):
            print(bar.line())
    print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
