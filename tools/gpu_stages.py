"""The stages of `tools/gpu_check.py`: what runs on a GPU, in which order, with which limits.

A first slot of 11 minutes takes the stages of slot 1, a second one those of slot 2. Within a slot, the stages that
only check values come first and run side by side; the stages that measure time then run alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Size = Literal["tiny", "quick", "full"]
"""tiny: a dry run on a CPU. quick: the smallest measurement. full: every shape."""
Command = Callable[[Path, Size], list[str]]
RUN_NEEDS = ("megatron.core", "transformers", "omegaconf", "typer", "rich", "jinja2", "tensorboard", "matplotlib")
KERNEL_TESTS = [f"tests/cpu/test_{name}.py" for name in ("head", "head_autograd", "triton_kernels")]
SANITIZER_UNABLE = r"(?im)^=+ .*(?:device (?:is )?not supported|unsupported device|debugger interface).*$"


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    command: Command
    limit_s: int
    """After this many seconds its whole process group is killed."""
    slot: int = 1
    timed: bool = True
    """It measures time or memory, so nothing runs beside it."""
    needs: tuple[str, ...] = ()
    """Modules that it imports."""
    tool: str = ""
    """A program on the PATH, or beside the CUDA compiler."""
    environment: tuple[tuple[str, str], ...] = ()
    says: str = ""
    """Text that its output contains if it passed."""
    unable: str = ""
    """Pattern of a line that says that it cannot run on this machine."""


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def device(size: Size) -> str:
    return "cpu" if size == "tiny" else "cuda"


def tool(script: str, *arguments: str, result: str = "") -> Command:
    """A script of this folder that takes --device and --size, and writes --out."""

    def command(out: Path, size: Size) -> list[str]:
        target = ["--out", str(out / result) if result else str(out)]
        return python(f"tools/{script}", *arguments, *target, "--device", device(size), "--size", size)

    return command


def tests(*arguments: str, processes: int = 1) -> Command:
    def command(out: Path, size: Size) -> list[str]:
        several = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
        return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *several, *arguments)

    return command


def small_case(out: Path, size: Size) -> list[str]:
    return python("tools/head_small_case.py", "--device", device(size))


def sanitized(kind: str, slot: int, *options: str) -> Stage:
    """The small case under compute-sanitizer, after `head_small` has compiled the kernels."""

    def command(out: Path, size: Size) -> list[str]:
        # Application only: not the compilers that Triton starts.
        common = ["--target-processes", "application-only", "--error-exitcode", "9"]
        return [program("compute-sanitizer") or "", "--tool", kind, *common, *options, *small_case(out, size)]

    # Torch's allocator hands out pieces of large blocks, and an access past a tensor would still be inside its block.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    # A sanitizer that does not fit the driver may exit with 0 without having started the program.
    says = "small cases of the head are done"
    return Stage(kind, command, 150, slot, False, (), "compute-sanitizer", environment, says, SANITIZER_UNABLE)


def bench(result: str, *arguments: str) -> Command:
    """The head's benchmark."""

    def command(out: Path, size: Size) -> list[str]:
        quick = ["--quick"] if size == "quick" else ["--device", "cpu", "--size", "tiny"] if size == "tiny" else []
        return python("tools/bench_head_cuda.py", "--out", str(out / result), *arguments, *quick)

    return command


FIRST = ("1.7b_bf16", "1.7b_fp8_current", "4b_bf16")
LARGE = ("4b_bf16_passes", "4b_fp8_current_passes", "4b_fp8_blockwise_passes")
MORE = ("1.7b_fp8_blockwise", "0.6b_bf16", "1.7b_bf16_recompute", "8b_bf16_passes")
"""Variants of tools/gpu_train.py, in groups that fit into a stage."""


def training(result: str, variants: tuple[str, ...]) -> Command:
    return tool("gpu_train.py", "--only", *variants, result=result)


def icrl_run(out: Path, size: Size) -> list[str]:
    """The whole trainer: warm start and five steps of ICRL with the engine in the trainer's process."""
    layers = "auto" if importlib.util.find_spec("transformer_engine") and size != "tiny" else "torch"
    steps = ["warm_start.steps=20", "steps=5", "eval.interval=0", "baseline=", "launch.ranks=1"]
    steps.append("algo.on_no_signal=train")  # a model this young may solve nothing
    where = [f"run_dir={out / 'run'}", f"launch.device={device(size)}", f"actor.layers={layers}"]
    return python("-m", "icrl_megatron.cli", "train", "rulebook_easy", *steps, *where)


def engine(model: str, servers: str) -> Command:
    """SGLang servers beside a model on the same GPU."""

    def command(out: Path, size: Size) -> list[str]:
        where = ["--out", str(out / f"engine_{model}_{servers.replace(',', '_')}"), "--device", device(size)]
        return python("tools/gpu_engine.py", "--model", model, "--servers", servers, *where)

    return command


def icrl_engine(out: Path, size: Size) -> list[str]:
    """A short ICRL run: the Transformer Engine actor and SGLang on the same GPU."""
    where = ["--device", device(size), "--limit-s", "220", "--steps", "4"]
    layers = "transformer_engine" if importlib.util.find_spec("transformer_engine") and size != "tiny" else "torch"
    return python("tools/gpu_runs.py", "engine_bf16", f"actor.layers={layers}", "--out", str(out), *where)


PYTEST = ("pytest", "hypothesis")
ENGINE_NEEDS = (*RUN_NEEDS, "sglang")
STAGES = (
    Stage("head_small", small_case, 90, timed=False),
    Stage("gpu_tests", tests("-m", "gpu", "tests/gpu"), 120, 1, False, PYTEST),
    Stage("kernels", tests(*KERNEL_TESTS, processes=5), 150, 1, False, PYTEST),
    Stage("actor_values", tool("gpu_actor.py", result="actor_values.json"), 120, 1, False, ("megatron.core",)),
    # Torch asks CUDA for attributes of host pointers and expects the error; the kernels do not.
    sanitized("memcheck", 1, "--report-api-errors", "no"),
    Stage("engine_kernels", lambda out, size: python("tools/gpu_server.py"), 150, 1, False, ENGINE_NEEDS),
    Stage("bench_quick", bench("head_quick.json", "--quick"), 100),
    Stage("train_first", training("train_first.json", FIRST), 230, 1, True, ("megatron.core",)),
    Stage("engine", engine("0.6b", "bf16"), 200, 1, True, ENGINE_NEEDS),
    Stage("head_products", tool("head_products.py", result="head_products.json"), 60),
    Stage("icrl_run", icrl_run, 150, 2, False, RUN_NEEDS),
    sanitized("racecheck", 2),
    Stage("engine_more", engine("0.6b", "fp8,eager"), 240, 2, True, ENGINE_NEEDS),
    Stage("engine_4b", engine("4b", "bf16"), 240, 2, True, ENGINE_NEEDS),
    Stage("icrl_engine", icrl_engine, 240, 2, True, ENGINE_NEEDS),
    Stage("tune", bench("head_tuning.json", "--tune"), 120, 2),
    Stage("train_4b", training("train_4b.json", LARGE), 230, 2, True, ("megatron.core",)),
    Stage("train_more", training("train_more.json", MORE), 230, 2, True, ("megatron.core",)),
    Stage("bench_head", bench("head_cuda.json"), 240, 2),
)
