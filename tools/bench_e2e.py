"""Full training steps of a recipe: seconds by phase and tokens per second and GPU, compared with the planner.

    python tools/bench_e2e.py qwen3_8b_alfworld_4xh100 model.path=/models/Qwen3-8B --out benchmarks/e2e_8b.json
    python tools/bench_e2e.py rulebook_easy --steps 6          on a CPU

Runs `icrl train` (or, with --run, reads an existing run) and takes the medians over its steps, except the first two,
which warm up. The prediction is the planner's for the same settings on --gpu; there is none for a CPU.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import bench_schema
import typer

from icrl_megatron.plan import hardware, planner
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.writer import METRICS_FILE, TIME_PREFIX, read_rows
from icrl_megatron.utils.errors import ConfigError

WARM_UP = 2
TIMEOUT_S = 7200
PHASES = {
    "rollout": ("prefill", "decode", "environments"),
    "score": ("scoring",),
    "train": ("training", "tensor collectives", "bubbles", "data collectives", "optimizer"),
    "sync": ("sync", "offload"),
    "pack": ("other",),
}
"""Phase of the training loop -> phases of the planner."""


def measured(run: Path, gpus: int) -> dict[str, float]:
    """Medians over the steps of a run: seconds of each phase and of the step, trained tokens per second and GPU."""
    rows = [row for row in read_rows(run / METRICS_FILE) if f"{TIME_PREFIX}train_s" in row][WARM_UP:]
    if not rows:
        raise ValueError(f"{run}: fewer than {WARM_UP + 1} training steps; raise --steps")
    phases = {name: statistics.median(row.get(f"{TIME_PREFIX}{name}_s", 0.0) for row in rows) for name in PHASES}
    found = {f"{name}_s": seconds for name, seconds in phases.items()}
    found["step_s"] = sum(phases.values())
    tokens = statistics.median(row["tokens/trained"] for row in rows)
    return found | {"tokens_per_s_a_gpu": tokens / found["step_s"] / gpus}


def predicted(settings: Settings, gpu: hardware.Gpu) -> dict[str, float]:
    """The same quantities, predicted by the planner."""
    made = planner.plan(settings, gpu=gpu)
    found = {f"{name}_s": sum(made.times.phases[part] for part in parts) for name, parts in PHASES.items()}
    return found | {"step_s": made.times.total, "tokens_per_s_a_gpu": made.tokens_a_second_a_gpu}


def train(recipe: str, overrides: list[str], folder: Path, steps: int) -> None:
    """Runs `icrl train` for a few steps. If it fails, it prints the error, and this program exits with its code."""
    command = [sys.executable, "-c", "from icrl_megatron.cli import main; main()", "train", recipe, *overrides]
    short = ["eval.interval=0", "eval.control_problems=0", "eval.problems=1", "baseline=", f"steps={steps}"]
    done = subprocess.run([*command, *short, f"run_dir={folder}"], check=False, timeout=TIMEOUT_S)
    if done.returncode:
        print(f"error: icrl train {recipe} ended with {done.returncode}", file=sys.stderr)
        raise typer.Exit(done.returncode)


def main(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("benchmarks/e2e.json"),
    steps: Annotated[int, typer.Option(min=WARM_UP + 1, help="Training steps.")] = 8,
    run: Annotated[Path | None, typer.Option(help="Read this run instead of starting one.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU of the prediction.")] = "h100",
) -> None:
    """Measures a recipe's steps and writes them with the planner's prediction."""
    try:
        settings = settings_module.load(recipe, overrides or [])
        report: dict[str, Any] = bench_schema.about()
        if run is not None:
            medians = measured(run, planner.ranks(settings))
        else:
            with tempfile.TemporaryDirectory() as temporary:
                train(recipe, overrides or [], Path(temporary) / "run", steps)
                medians = measured(Path(temporary) / "run", planner.ranks(settings))
        report |= {"recipe": recipe, "gpus": planner.ranks(settings), "medians": {"icrl": medians}}
        if settings.launch.device == "cuda":
            report["predicted"] = {"gpu": gpu, **predicted(settings, hardware.get(gpu))}
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    bench_schema.write(out, "e2e", report)
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
