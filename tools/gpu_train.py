"""A training step of Qwen3 shapes on one GPU: tokens/s, MFU, memory, the head's share, against `icrl plan`.

    python tools/gpu_train.py --out benchmarks/train_step.json [--only 1.7b_bf16 ...] [--device cpu --size tiny]

Random weights; one micro-batch of 8 sequences of 1024 tokens, 896 of each carry loss; the trainer's own actor. Each
variant runs in a process of its own with its own limit, the most important ones first, and the file is written after
each. Times are medians of three after two warm-ups, by device events: `score` (a pass without gradients), `pass`
(forward and backward, head included) and `optimizer` (norm, clipping, Adam, new bf16 weights). Where Adam's state does
not fit beside the rest, the variant says `optimizer: false` and only its passes are measured.

MFU counts 6 FLOPs a parameter of the layers and token, 6 of the head a loss token, and causal attention, over the time
of pass and optimizer and 989 TF/s; recomputation is not counted.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_schema
import gpu_model
import limited
import numpy as np
import torch

PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 (data sheet)."""
SEQUENCES, PROMPT, RESPONSE = 8, 128, 896
LIMIT_S = 75
ROUNDS = 3


@dataclass(frozen=True)
class Variant:
    shape: str
    fp8: str = "off"
    recompute: str = "none"
    optimizer: bool = True
    precision: str = "bf16"
    layers: str = "transformer_engine"


VARIANTS = {
    "1.7b_bf16": Variant("1.7b"),
    "1.7b_fp8_current": Variant("1.7b", "current"),
    "4b_bf16": Variant("4b", recompute="full"),
    "4b_bf16_passes": Variant("4b", optimizer=False),
    "4b_fp8_current_passes": Variant("4b", "current", optimizer=False),
    "4b_fp8_blockwise_passes": Variant("4b", "blockwise", optimizer=False),
    "1.7b_fp8_blockwise": Variant("1.7b", "blockwise"),
    "0.6b_bf16": Variant("0.6b"),
    "1.7b_bf16_recompute": Variant("1.7b", recompute="full"),
    "8b_bf16_passes": Variant("8b", recompute="full", optimizer=False),
}
"""In the order in which they run."""
TINY = {"tiny_fp32": Variant("tiny", precision="fp32", layers="torch")}


def measure(name: str, variant: Variant, device: str, out: Path) -> None:
    """One variant, in this process; what is known so far is written after each part."""
    found: dict[str, Any] = {"variant": asdict(variant)}

    def keep(**more: Any) -> None:
        found.update(more)
        out.write_text(json.dumps(found))
        print(json.dumps(more), flush=True)

    try:
        began = time.monotonic()
        actor, plan = build(variant, device)
        keep(start_s=time.monotonic() - began, built=memory(device))
        keep(planned=planned(actor, variant))
        measure_passes(actor, plan, device, keep)
        if variant.optimizer:
            measure_step(actor, plan, device, keep)
        keep(**rates(actor, found))
        if variant.shape != "4b":  # the first release pins host memory, at 2.3 GB/s
            measure_offload(actor, device, keep)
    except Exception as error:
        keep(failed=f"{type(error).__name__}: {error}"[:400], where=traceback.format_exc()[-1500:], at=memory(device))
        raise


def build(variant: Variant, device: str) -> tuple[Any, Any]:
    """The actor, and one update of packed sequences."""
    from icrl_megatron.distributed import platform

    platform.prepare(device)
    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.distributed import grid as grids

    tokens = SEQUENCES * (PROMPT + RESPONSE)
    settings = gpu_model.settings(variant.precision, variant.layers, variant.fp8, variant.recompute, tokens)
    settings.actor.offload = "all"
    folder = gpu_model.write_config(Path(tempfile.mkdtemp()) / "model", variant.shape)
    grids.single_process()
    actor = Actor(settings, folder, grids.build(settings), weights=False)
    plan = gpu_model.plan(settings, actor.shape.vocab, [(PROMPT, RESPONSE)] * SEQUENCES)
    return actor, plan


def memory(device: str) -> dict[str, float]:
    """GB that torch's allocator holds now and held at its peak, and that the driver sees in use."""
    if device == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gb": torch.cuda.memory_allocated() / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "device_gb": (total - free) / 1e9,
    }


def timed(run: Callable[[], Any], device: str, rounds: int = ROUNDS, warm: int = 2) -> dict[str, float]:
    """Median, smallest and largest milliseconds."""
    found = []
    for number in range(warm + rounds):
        took = bench_schema.run_ms(run, device)
        if number >= warm:
            found.append(took)
    return {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found)}


def measure_passes(actor: Any, plan: Any, device: str, keep: Callable[..., None]) -> None:
    """Scoring, then forward and backward with the time inside the head."""
    from icrl_megatron.actor import passes

    scored = actor.score(plan)
    keep(score=timed(lambda: actor.score(plan), device, warm=1), scored=memory(device))
    heads: list[tuple[Any, Any]] = []
    whole = passes.policy_head

    def watched(*arguments: Any) -> Any:
        if device == "cpu":
            return whole(*arguments)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = whole(*arguments)
        end.record()
        heads.append((begin, end))
        return out

    passes.policy_head = watched

    def run() -> None:
        actor.wrapped.zero_grad_buffer()
        passes.train_pass(actor.wrapped, actor.head, list(zip(plan.updates[0], scored[0], strict=True)), lambda *_: {})

    try:
        # "pass" is a keyword, so it cannot be passed as one.
        keep(**{"pass": timed(run, device), "trained": memory(device)})
        keep(head_forward_ms=statistics.median(b.elapsed_time(e) for b, e in heads[2:]) if heads else None)
        if device == "cuda":
            keep(kernels=profile(run), host=host_profile(lambda: actor.score(plan)))
    finally:
        passes.policy_head = whole


def profile(run: Callable[[], None]) -> list[tuple[str, float, int]]:
    """The 14 kernels that take longest in one pass: name, ms, calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with profiling(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    rows = [(e.key[:70], e.device_time_total / 1e3, e.count) for e in seen.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:14]


def host_profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Where the host's time goes in one run: the 25 functions with the most of their own, and waits for the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    watched = cProfile.Profile()
    watched.enable()
    run()
    watched.disable()
    stats: Any = pstats.Stats(watched)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:25]
    own = [(f"{Path(where[0]).name}:{where[1]} {where[2]}", values[0], values[2]) for where, values in rows]
    with profiling(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    waits = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::item")
    calls = {e.key: (e.count, e.cpu_time_total / 1e3) for e in seen.key_averages() if e.key in waits}
    return {"own_seconds": own, "waits_count_ms": calls}


def measure_step(actor: Any, plan: Any, device: str, keep: Callable[..., None]) -> None:
    """The whole update as the trainer does it, and the optimizer alone."""
    scored = actor.score(plan)
    first = actor.train(plan, scored, 1e-6)
    deviation = {k: v for k, v in first.metrics.items() if k.startswith("ratio_deviation")}
    keep(first_step=deviation | {"grad_norm": first.grad_norm})
    keep(step=timed(lambda: actor.train(plan, scored, 1e-6), device, warm=1), stepped=memory(device))
    keep(optimizer=timed(lambda: actor.optimizer.step(1e-6, True), device, warm=1))


def measure_offload(actor: Any, device: str, keep: Callable[..., None]) -> None:
    """Release and restore of what the engine gets meanwhile (actor.offload=all): seconds and GB."""
    for turn in ("first", "second"):  # the first one pins host memory
        found: dict[str, Any] = {}
        for name, move in (("release", actor.offload.release), ("restore", actor.offload.restore)):
            began = time.perf_counter()
            move()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name] = {"seconds": time.perf_counter() - began} | memory(device)
        keep(**{f"offload_{turn}": found})


def planned(actor: Any, variant: Variant) -> dict[str, Any]:
    """What `icrl plan` predicts for this layout and these sequences."""
    from icrl_megatron.model.flops import Passes
    from icrl_megatron.plan import memory as planning
    from icrl_megatron.plan import timing
    from icrl_megatron.plan.hardware import GPUS
    from icrl_megatron.plan.layout import Layout
    from icrl_megatron.plan.workload import Workload

    layout, shape, tokens = Layout.of(actor.settings, 1), actor.shape, SEQUENCES * (PROMPT + RESPONSE)
    state = planning.state(shape, layout)
    head = planning.head(shape, layout, actor.settings, SEQUENCES * RESPONSE)
    work = planning.activations(shape, layout, tokens, 1)
    none = np.zeros(SEQUENCES)
    sizes = np.full(SEQUENCES, float(PROMPT + RESPONSE)), np.full(SEQUENCES, float(RESPONSE))
    load = Workload(1, none + 1, none, none + 1, none, none, none, *sizes)
    passes = Passes(1, 1)
    times = timing.estimate(shape, layout, load, passes, GPUS["h100"], 1e9).phases
    held = state.total if variant.optimizer else state.total - state.optimizer * 2 / 3  # Adam's moments do not exist
    return {
        "state_gb": held / 1e9,
        "peak_gb": (held + head + work) / 1e9,
        "head_gb": head / 1e9,
        "activations_gb": work / 1e9,
        "score_ms": times["scoring"] * 1e3,
        "pass_ms": times["training"] * 1e3,
        "optimizer_ms": times["optimizer"] * 1e3,
        "model_flops": 3.0 * sum(timing.forward_flops(shape, load)),
    }


def rates(actor: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, MFU, and measured over planned."""
    tokens, plan = SEQUENCES * (PROMPT + RESPONSE), found["planned"]
    passed = found["pass"]["ms"]
    whole = found["step"]["ms"] if "step" in found else passed
    result = {
        "tokens_per_s": tokens / whole * 1e3,
        "mfu": plan["model_flops"] / (whole * 1e-3) / PEAK_FLOPS,
        "pass_mfu": plan["model_flops"] / (passed * 1e-3) / PEAK_FLOPS,
        "pass_over_planned": passed / plan["pass_ms"],
        "score_over_planned": found["score"]["ms"] / plan["score_ms"],
    }
    if found.get("trained"):
        # Before the first step Adam's moments do not exist.
        peak = (found.get("stepped") or found["trained"])["peak_gb"]
        result["peak_over_planned"] = peak / plan["peak_gb"]
    return result


def main() -> int:
    parser = bench_schema.parser(__doc__, "benchmarks/train_step.json")
    parser.add_argument("--only", nargs="*", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--worker")
    chosen = parser.parse_args()
    variants = TINY if chosen.size == "tiny" else VARIANTS
    if chosen.worker:
        measure(chosen.worker, variants[chosen.worker], chosen.device, chosen.out)
        return 0
    names = list(TINY) if chosen.size == "tiny" else chosen.only or list(VARIANTS)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for name in names:
        part, log = (chosen.out.with_name(f"train_{name}.{end}") for end in ("part", "log"))
        command = [sys.executable, __file__, "--worker", name, "--device", chosen.device, "--size", chosen.size]
        part.unlink(missing_ok=True)  # of an earlier run
        with log.open("w") as file:
            code = limited.run([*command, "--out", str(part)], LIMIT_S, output=file.fileno())
        rows[name] = read(part, log) | ({"failed": f"over {LIMIT_S} s"} if code is None else {})
        write(chosen.out, rows)
        print(line(name, rows[name]), flush=True)
    return int(any("failed" in row for row in rows.values()))


def read(part: Path, log: Path) -> dict[str, Any]:
    """What a variant wrote; the end of its log if it wrote nothing, or was killed while it wrote."""
    try:
        found: dict[str, Any] = json.loads(part.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {"failed": log.read_text(errors="replace")[-1500:]}
    return found


def line(name: str, row: dict[str, Any]) -> str:
    if "tokens_per_s" not in row:
        return f"{name}: {str(row.get('failed', 'no result'))[-600:]}"
    peak = (row.get("stepped") or row.get("trained") or {}).get("peak_gb", 0.0)
    parts = [f"{row['tokens_per_s']:.0f} tokens/s, MFU {row['mfu']:.1%} (passes {row['pass_mfu']:.1%})"]
    parts += [f"score {row['score']['ms']:.1f} ms, pass {row['pass']['ms']:.1f} ms, head {row['head_forward_ms']}"]
    parts += [f"step {row.get('step', {}).get('ms')}, optimizer {row.get('optimizer', {}).get('ms')}"]
    parts += [f"peak {peak:.1f} GB (planned {row['planned']['peak_gb']:.1f}), {row.get('first_step')}"]
    return f"{name}: " + "; ".join(parts) + f"; start {row['start_s']:.0f} s; {row.get('failed', '')}"


def write(out: Path, rows: dict[str, Any]) -> None:
    kept = ("tokens_per_s", "mfu", "pass_mfu", "peak_over_planned", "pass_over_planned", "head_forward_ms")
    medians = {name: {key: row[key] for key in kept if row.get(key) is not None} for name, row in rows.items()}
    about = bench_schema.about(("torch", "megatron-core", "transformer-engine"))
    bench_schema.write(out, "train_step", about | {"card": bench_schema.card("cuda"), "medians": medians, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
