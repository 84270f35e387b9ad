"""Short ICRL runs that show on one GPU what a CPU cannot: the actor in bf16 and FP8, and SGLang beside it.

    python tools/gpu_runs.py engine_bf16 --out benchmarks/CARD-DATE

Each is `icrl train` on the embedded task with a model of random weights, large enough to be measured. What comes out
is <out>/<run>.json: medians over the steps after the first of tokens a second, of seconds and memory by phase, and of
the engine's mismatch. `--device cpu` goes the same way with a small model, for tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import bench_schema
import gpu_server
import limited
import typer

MODELS = {
    "cuda": {"layers": 16, "hidden": 2048, "heads": 16, "kv_heads": 8, "head_dim": 128, "ffn": 6144},
    "cpu": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 192},
}
"""The first has 0.8 billion weights, in shapes that every FP8 recipe takes."""
PRECISION = {"cuda": "bf16", "cpu": "fp32"}
ACTOR = ("debug.mode=fake_data",)
ENGINE = ("engine.kind=sglang", "actor.offload=all", "rollout.tasks_per_step=8")
RUNS: dict[str, tuple[str, ...]] = {
    "actor_bf16": ACTOR,
    "actor_fp8_current": (*ACTOR, "actor.fp8=current"),
    "actor_fp8_blockwise": (*ACTOR, "actor.fp8=blockwise"),
    "engine_bf16": ENGINE,
    "engine_fp8": (*ENGINE, "engine.quantization=fp8"),
    "engine_frozen_critic": (*ENGINE, "rollout.critic=frozen"),
}
"""Changes to the recipe `rulebook_easy`."""
START_LIMIT_S = 150
"""Seconds for a server to start."""
KEPT = ("time/", "memory/", "engine/", "actor/mismatch", "actor/ratio_deviation", "actor/grad_norm", "tokens/")


def command(run: str, device: str, steps: int, folder: Path, more: tuple[str, ...]) -> list[str]:
    """What starts a run."""
    model = [f"model.init.{name}={value}" for name, value in MODELS[device].items()]
    changes = [
        f"run_dir={folder}",
        f"steps={steps}",
        f"launch.device={device}",
        f"actor.precision={PRECISION[device]}",
        # With random weights every reward may be the same: what is measured must happen all the same.
        "algo.on_no_signal=train",
        "warm_start.steps=0",
        "eval.interval=0",
        "eval.control_problems=0",
        "baseline=",
    ]
    if device == "cuda":
        changes += gpu_settings(run)
    return [sys.executable, "-m", "icrl_megatron.cli", "train", "rulebook_easy", *model, *changes, *RUNS[run], *more]


def gpu_settings(run: str) -> list[str]:
    """Changes for what this machine has: a server without FlashInfer, and layers without Transformer Engine."""
    found = []
    if run.startswith("engine"):
        found += [f"engine.server_args=[{','.join(gpu_server.ARGUMENTS)}]", f"engine.startup_timeout_s={START_LIMIT_S}"]
    if importlib.util.find_spec("transformer_engine") is None:
        found.append("actor.layers=torch")
    return found


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{time: {train_s: ...}, ...} over the steps after the first, which compiles and allocates."""
    steps = [row for row in rows if "time/train_s" in row][1:]
    found: dict[str, dict[str, float]] = {}
    for name in sorted({name for row in steps for name in row if name.startswith(KEPT)}):
        subject, quantity = name.split("/", 1)
        found.setdefault(subject, {})[quantity] = statistics.median(row[name] for row in steps if name in row)
    return found


def main(
    run: Annotated[str, typer.Argument(help=f"One of {', '.join(RUNS)}.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="More settings, KEY=VALUE.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the run.")] = Path("benchmarks"),
    steps: Annotated[int, typer.Option(min=2)] = 6,
    device: Annotated[str, typer.Option(help="cuda | cpu.")] = "cuda",
    limit_s: Annotated[float, typer.Option(help="The run is killed after this long.")] = 3600.0,
) -> None:
    if run not in RUNS or device not in MODELS:
        print(f"error: no run {run} on {device}; there are {', '.join(RUNS)} on {', '.join(MODELS)}", file=sys.stderr)
        raise typer.Exit(2)
    folder = (out / f"run_{run}").resolve()
    started = command(run, device, steps, folder, tuple(overrides or ()))
    code = limited.run(started, limit_s, env=gpu_server.environment(os.environ))
    if code is None:
        print(f"error: killed after {limit_s:g} s", file=sys.stderr)
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    packages = ("torch", "triton", "megatron-core", "transformer-engine", "sglang")
    report = bench_schema.about(packages) | {
        "card": bench_schema.card(device),
        "run": run,
        "exit_code": code,  # None: killed at the limit
        "model": MODELS[device],
        "medians": medians(rows),
    }
    bench_schema.write(out / f"{run}.json", "gpu_run", report)
    print(json.dumps(report["medians"], indent=1))
    raise typer.Exit(124 if code is None else code)


if __name__ == "__main__":
    typer.run(main)
