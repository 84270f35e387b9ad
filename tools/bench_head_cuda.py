"""The head on a GPU against eager torch, Liger, Megatron and verl: device time and memory. Needs torch and triton.

    python tools/bench_head_cuda.py --out benchmarks/head_cuda.json [--quick] [--tune] [--device cpu --size tiny]

Three operations, each for the head of Qwen3-4B and 8B, at TP 1 and at one rank's share of TP 2, 4 and 8:

    given    logits in bf16 -> statistics, loss, gradient of the logits
    train    hidden states and weight in bf16 -> loss, both gradients
    score    hidden states and weight in bf16 -> log-probs

A peer's gradients or log-probs are compared with ours before it is timed. Peers take turns in one process, each run
between two events on the device after a sweep over a buffer larger than the L2 cache. Reported are medians, with GB/s
(given) or TF/s (the others), the share of an H100's floor, and the memory that a pass allocates at its peak. A peer
that is not installed, runs out of memory or computes something else is named with its reason.
`bars` holds each bar with its value. The file is written after every row.
`python tools/bench_head.py --device cuda` is the same. `--device cpu --size tiny` is a dry run in Triton's interpreter;
its times mean nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import bench_schema
import head_cuda_peers
import head_cuda_targets
import torch
from head_cuda_given import given_peers
from head_cuda_peers import Inputs, Run, Shape, own_pass, score_peers, train_peers, tuning_passes
from head_cuda_targets import Row
from torch import Tensor

GB = 1e9
OPERATIONS = {"given": given_peers, "train": train_peers, "score": score_peers}


MOST_ERROR = 0.05
"""Largest error of a peer's output, relative to ours: bf16 rounding is below 0.02. A peer above it is not timed."""
FLUSHED_BYTES = 256 * 2**20
"""More than any L2 cache holds."""
TUNE_S = 30.0
"""After this many seconds `--tune` starts no other setting."""


def measure(peers: dict[str, Run | str], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and extra bytes by peer; what could not run says why."""
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, run in peers.items():
        reason = run if isinstance(run, str) else _warm(run)
        if isinstance(reason, str):
            found[name] = {"missing": reason}
            continue
        found[name] = {"extra_gb": reason / GB} | _compared(run)
        if "missing" not in found[name]:
            runs[name] = run  # type: ignore[assignment]
    flush = _flush()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, flush))
    for name, values in times.items():
        found[name] |= {"ms": statistics.median(values), "ms_min": min(values), "ms_max": max(values)}
    return found


def _compared(run: Any) -> dict[str, Any]:
    """The relative error of a peer's output, and the reason if it must not be timed."""
    if not hasattr(run, "wrong_by"):
        return {}
    try:
        off = run.wrong_by()
    except Exception as error:
        return {"missing": f"not compared with ours: {_reason(error)}"}
    right = off <= MOST_ERROR  # False for NaN
    reason = {} if right else {"missing": f"wrong: its {run.output}s differ from ours by {off:.2g}"}
    return {f"{run.output}_error": off} | reason


def _reason(error: Exception) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))


def _on_gpu() -> bool:
    return head_cuda_peers.DEVICE == "cuda"


def _flush() -> Tensor:
    return torch.empty(FLUSHED_BYTES if _on_gpu() else 1, dtype=torch.uint8, device=head_cuda_peers.DEVICE)


def _warm(run: Run) -> int | str:
    """Runs twice, for compilation and for its peak memory above what is allocated before."""
    try:
        for _ in range(2):
            getattr(run, "before", lambda: None)()
            if not _on_gpu():
                run()
                continue
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before if _on_gpu() else 0
    except Exception as error:
        torch.cuda.empty_cache()
        return _reason(error)


def _timed(run: Run, flush: Tensor) -> float:
    getattr(run, "before", lambda: None)()
    flush.zero_()
    return bench_schema.run_ms(run, head_cuda_peers.DEVICE)


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


def tune_settings() -> list[tuple[int, int, int]]:
    """Block, warps and programs a multiprocessor. A thread has 4 to 16 elements: fewer leave parts of its loads empty,
    and more take so many registers that fewer programs fit. The settings nearest to the default come first."""
    pairs = [(b, w) for b in (2048, 1024, 4096, 8192) for w in (8, 4, 16) if 4 <= b // (32 * w) <= 16]
    return [(block, warps, programs) for block, warps in pairs for programs in (4, 2, 8)]


def tune(shape: Shape, keep: Callable[[list[Row]], None]) -> None:
    """Times of the two kernels that pass over logits. Hands `keep` all rows so far, the fastest first."""
    from icrl_kernels import triton_chunks

    inputs, rows, began = Inputs(shape), [], time.perf_counter()
    flush, own = _flush(), triton_chunks._tuning
    try:
        for block, warps, programs in tune_settings()[: None if _on_gpu() else 4]:
            if time.perf_counter() - began > TUNE_S:
                print("no time is left for the other settings", flush=True)
                break
            setting = triton_chunks.Tuning(block, warps, programs)
            triton_chunks._tuning = lambda _, chosen=setting: chosen  # type: ignore[misc,assignment]
            try:
                rows.append(asdict(setting) | _tuned(inputs, flush))
            except Exception as error:
                print(f"{setting}: {_reason(error)}", flush=True)
                continue
            print(rows[-1], flush=True)
            keep(sorted(rows, key=lambda row: float(row["statistics_ms"] + row["gradients_ms"])))
    finally:
        triton_chunks._tuning = own


def tune_chunks(shape: Shape, rounds: int = 5) -> list[Row]:
    """Times of the whole training pass by the rows of a chunk, in turns; `default` marks what the plan chooses."""
    inputs = Inputs(shape)
    runs: dict[str, Run | str] = {}
    for logits, rows in (("fp32", (None, 2048, 2560, 2816, 3072, 3328)), ("bf16", (None, 3072, 4096, 5504, 6528))):
        for count in (count for count in rows if count is None or count < shape.tokens):
            runs[f"{logits} {count or 'default'}"] = own_pass(inputs, head_cuda_peers.Chunking(count, logits=logits))
    return [{"chunk": name} | values for name, values in measure(runs, rounds).items()]


def _tuned(inputs: Inputs, flush: Tensor) -> dict[str, float]:
    runs, _ = tuning_passes(inputs, min(2048, inputs.shape.tokens))
    found = {}
    for name, (run, moved) in runs.items():
        found[f"{name}_ms"] = statistics.median([_timed(run, flush) for _ in range(12 if _on_gpu() else 3)][2:])
        found[f"{name}_gb_per_s"] = moved / found[f"{name}_ms"] / 1e6
    return found


def about() -> dict[str, Any]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() if _on_gpu() else ""
    peers = ("liger-kernel", "megatron-core", "verl", "quack-kernels", "cut-cross-entropy", "nvidia-cutlass-dsl")
    names = ("torch", "triton", "transformer-engine", *peers)
    return {
        "command": " ".join(["python", "tools/bench_head_cuda.py", *map(bench_schema.anywhere, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": card or (torch.cuda.get_device_name() if _on_gpu() else "no GPU"),
        "cuda": torch.version.cuda,
        "versions": {name: installed(name) for name in names},
    }


def report(rows: list[Row]) -> Row:
    return {"bars": head_cuda_targets.bars(rows), "rows": rows, "medians": head_cuda_targets.medians(rows)}


def dry_run() -> None:
    """Our kernels in Triton's interpreter, on a small head. Must precede the first import of the kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    head_cuda_peers.DEVICE, head_cuda_peers.VOCABULARY = "cpu", 400
    head_cuda_peers.MODELS = {"tiny": 32}
    head_cuda_peers.Chunking = partial(head_cuda_peers.Chunking, backend="triton")  # type: ignore[misc,assignment]


def shapes_of(size: str) -> list[Shape]:
    lengths = {"full": (8192, 16384), "quick": (8192,), "tiny": (12,)}[size]
    degrees = {"full": (1, 2, 4, 8), "quick": (1, 8), "tiny": (1, 2)}[size]
    models = ("Qwen3-8B",) if size == "quick" else tuple(head_cuda_peers.MODELS)
    return [Shape(model, tokens, tp) for model in models for tokens in lengths for tp in degrees]


def main() -> int:
    parser = bench_schema.parser(__doc__, "benchmarks/head_cuda.json", sizes=("tiny", "full"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the 8B head at T 8192, TP 1 and 8, five rounds")
    parser.add_argument("--tune", action="store_true", help="launch parameters instead of peers")
    chosen = parser.parse_args()
    if (chosen.device == "cpu") != (chosen.size == "tiny"):
        parser.error("--device cpu and --size tiny go together")
    if chosen.device == "cpu":
        dry_run()
    elif not torch.cuda.is_available():
        print("error: no CUDA device here; tools/bench_head.py measures on a CPU", file=sys.stderr)
        return 2
    size = chosen.size if chosen.size == "tiny" else "quick" if chosen.quick else "full"
    rounds = {"tiny": 2, "quick": 5, "full": chosen.rounds}[size]
    described = about() | {"quick": chosen.quick}
    if chosen.tune:
        shape = Shape("tiny", 12, 1) if size == "tiny" else Shape("Qwen3-8B", 8192, 1)
        chunks = tune_chunks(shape, min(rounds, 5))
        print(json.dumps(chunks, indent=1), flush=True)
        found = described | {"chunks": chunks, "tuning": [], "medians": {}}
        bench_schema.write(chosen.out, "head_cuda", found)
        tune(shape, lambda rows: bench_schema.write(chosen.out, "head_cuda", found | {"tuning": rows}))
    else:
        keep = partial(bench_schema.write, chosen.out, "head_cuda")
        bench(shapes_of(size), rounds, lambda rows: keep(described | report(rows)))
        for bar in bench_schema.bars(bench_schema.read(chosen.out)):
            print(bar.line())
    print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
