"""The actor's numbers on a GPU: Transformer Engine in bf16 and FP8 against float32, on the same weights and tokens.

    python tools/gpu_actor.py --out benchmarks/actor_values.json [--device cpu]

A small Qwen3 (4 layers, hidden 512, vocabulary 4096) with random weights scores and trains five packed sequences. Each
variant runs in a process of its own, and all run at one time. Reported against the float32 variant: the mean and the
largest difference of log-probs, the relative error of each kind of gradient, and of the log-probs after two updates;
and the variant's own |ratio - 1| on the first step, where the ratio must be 1.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_schema
import gpu_model
import torch
from torch import Tensor

VARIANTS = {
    "fp32": ("fp32", "torch", "off"),
    "torch_bf16": ("bf16", "torch", "off"),
    "te_bf16": ("bf16", "transformer_engine", "off"),
    "te_fp8_current": ("bf16", "transformer_engine", "current"),
    "te_fp8_blockwise": ("bf16", "transformer_engine", "blockwise"),
}
"""Name to (actor.precision, actor.layers, actor.fp8). The first is what the others are compared with."""
ON_A_CPU = ("fp32", "torch_bf16")
LENGTHS = [(40, 200), (17, 90), (128, 300), (5, 3), (60, 250)]
LIMIT_S = 100
LEARNING_RATE = 1e-4
GRADIENT_BARS = {"torch_bf16": 0.05, "te_bf16": 0.05, "te_fp8_current": 0.3, "te_fp8_blockwise": 0.3}
"""Largest relative error of all gradients together that counts as correct."""


def worker(name: str, folder: Path, device: str, out: Path) -> None:
    """One variant: log-probs, gradients, and two steps; saved for the comparison."""
    from icrl_megatron.distributed import platform

    platform.prepare(device)
    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.actor.passes import train_pass
    from icrl_megatron.distributed import grid as grids
    from icrl_megatron.model.weights import Gatherer

    precision, layers, fp8 = VARIANTS[name]
    settings = gpu_model.settings(precision, layers, fp8, tokens=600)
    grids.single_process()
    actor = Actor(settings, folder, grid := grids.build(settings))
    plan = gpu_model.plan(settings, actor.shape.vocab, LENGTHS)
    scored = actor.score(plan)
    found: dict[str, Any] = {"logprobs": of_samples(plan, scored), "tokens": plan.global_loss_tokens}
    actor.wrapped.zero_grad_buffer()
    batches = list(zip(plan.updates[0], scored[0], strict=True))
    train_pass(actor.wrapped, actor.head, batches, lambda *_: {})
    grads = [replace(row, param=torch.nn.Parameter(row.param.main_grad.clone())) for row in actor.rows]
    found["gradients"] = {n: t.float().cpu() for n, t in Gatherer(grads, grid).stream()}
    stats = [actor.train(plan, actor.score(plan), LEARNING_RATE) for _ in range(2)]
    found["ratio_deviation"] = stats[0].metrics.get("ratio_deviation_max", stats[0].metrics.get("ratio_deviation"))
    found["grad_norms"] = [s.grad_norm for s in stats]
    found["metrics"] = {name: value for name, value in stats[0].metrics.items() if isinstance(value, float)}
    actor.optimizer.steps = 0  # so that the next call scores again
    found["logprobs_after"] = of_samples(plan, actor.score(plan))
    torch.save(found, out)


def of_samples(plan: Any, scored: Any) -> Tensor:
    """[L] log-probs of the plan's first update, ordered by sample."""
    parts = []
    for batch, frozen in zip(plan.updates[0], scored[0], strict=True):
        names = [plan.samples[i].sample_id for i in batch.sample_index_L]
        parts += list(zip(names, range(len(names)), frozen.old_L.double().cpu().tolist(), strict=True))
    return torch.tensor([value for _, _, value in sorted(parts, key=lambda part: (part[0], part[1]))])


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def compared(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """Differences of one variant from the float32 one."""
    off = (found["logprobs"] - truth["logprobs"]).abs()
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, want in truth["gradients"].items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(kind, []).append((found["gradients"][name], want))
    joined = {k: [torch.cat([p[i].flatten() for p in pairs]) for i in range(2)] for k, pairs in kinds.items()}
    whole = [torch.cat([pair[i] for pair in joined.values()]) for i in range(2)]
    return {
        "logprob_mean_abs": float(off.mean()),
        "logprob_max_abs": float(off.max()),
        "gradient_relative": relative(*whole),
        "gradient_relative_by_kind": {kind: relative(*pair) for kind, pair in joined.items()},
        "after_two_updates_mean_abs": float((found["logprobs_after"] - truth["logprobs_after"]).abs().mean()),
        "ratio_deviation_first_step": found["ratio_deviation"],
        "grad_norms": found["grad_norms"],
        "metrics": found["metrics"],
    }


def wrong(rows: dict[str, Any]) -> list[str]:
    """Variants that failed or are out of bounds. NaN counts as out of bounds; it compares false with everything."""
    within = {n: row.get("gradient_relative", math.inf) <= GRADIENT_BARS.get(n, 1e-6) for n, row in rows.items()}
    return [name for name, good in within.items() if not good]


def model_folder(folder: Path, shape: str) -> Path:
    """Random weights in transformers' own format, with norms that are not 1."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    fields = gpu_model.SHAPES[shape].config() | {"initializer_range": 0.05}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**fields), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)  # the same values in every precision
    return folder


def main() -> int:
    parser = bench_schema.parser(__doc__, "benchmarks/actor_values.json")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "FOLDER"))
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker[0], Path(chosen.worker[1]), chosen.device, chosen.out)
        return 0
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    work = chosen.out.with_suffix("")
    folder = model_folder(work / "model", "tiny" if chosen.size == "tiny" else "small")
    names = ON_A_CPU if chosen.device == "cpu" else tuple(VARIANTS)
    began, saved = time.monotonic(), {name: work / f"{name}.pt" for name in names}
    running = {}
    for name in names:
        command = [sys.executable, __file__, "--worker", name, str(folder), "--device", chosen.device]
        log = (work / f"{name}.log").open("w")
        running[name] = subprocess.Popen([*command, "--out", str(saved[name])], stdout=log, stderr=subprocess.STDOUT)
    rows: dict[str, Any] = {}
    truth: dict[str, Any] | None = None
    for name, process in running.items():
        try:
            code = process.wait(max(1.0, LIMIT_S - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = -9
        if code != 0:
            rows[name] = {"failed": code, "tail": (work / f"{name}.log").read_text(errors="replace")[-1500:]}
        else:
            found = torch.load(saved[name])
            truth = found if name == "fp32" else truth
            rows[name] = compared(found, truth) if truth else {"failed": code, "tail": "no float32 values to compare"}
        print(name, rows[name].get("tail") or json.dumps(rows[name], indent=1), flush=True)
    medians = {n: {k: v for k, v in row.items() if isinstance(v, float)} for n, row in rows.items()}
    report = bench_schema.about(("torch", "megatron-core", "transformer-engine")) | {"medians": medians, "rows": rows}
    bench_schema.write(chosen.out, "actor_values", report)
    bad = wrong(rows)
    print("wrong or failed:", ", ".join(bad) or "none")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
