"""What `tools/gpu_check.sh` runs: stages with a time limit; nothing but torch and triton is needed.

How each stage went goes into stages.json, what it measured into JSON of its own, what it printed into its log. Started
again, it goes on with the stages that have not passed, or only with --quick.

A stage whose packages are missing is named with its reason, and so is one that fails; the others go on. The exit code
is 0 if all stages that could run passed, 1 if one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGE_LIMIT_S = 590
STAGES_FILE = "stages.json"
TAIL_CHARACTERS = 4000
RUN_NEEDS = ("megatron.core", "transformers", "omegaconf", "typer", "rich", "jinja2", "tensorboard", "matplotlib")


Result = dict[str, object]
"""How a stage went, as it is written."""


@dataclass(frozen=True)
class Stage:
    """One command. `needs` are modules, `tool` a program on the PATH or beside the CUDA compiler."""

    name: str
    command: Callable[[Path, bool], list[str]]
    needs: tuple[str, ...] = ()
    tool: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    says: str = ""
    """What its output must hold to have passed."""
    unable: str = ""
    """Pattern of a line with which it says that it cannot run on this machine."""


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


SANITIZER_UNABLE = r"(?im)^=+ .*(?:device (?:is )?not supported|unsupported device|debugger interface).*$"


def sanitized(kind: str, *options: str) -> Stage:
    """A small case of the head under compute-sanitizer."""

    def command(out: Path, quick: bool) -> list[str]:
        tool = [program("compute-sanitizer") or "", "--tool", kind, "--error-exitcode", "9", *options]
        return [*tool, *python("tools/head_small_case.py")]

    # Torch's allocator would hand out pieces of large blocks, and an access past a tensor would still be inside of one.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    # A sanitizer that does not fit the driver may end well without having started the program.
    says = "small cases of the head are done"
    return Stage(kind, command, (), "compute-sanitizer", environment, says, SANITIZER_UNABLE)


def bench(name: str, *more: str) -> Callable[[Path, bool], list[str]]:
    return lambda out, quick: python(
        "tools/bench_head_cuda.py", "--out", str(out / name), *more, *(["--quick"] if quick else [])
    )


def tests(*paths: str) -> Callable[[Path, bool], list[str]]:
    return lambda out, quick: python("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths)


def training(out: Path, quick: bool) -> list[str]:
    layers = "auto" if importlib.util.find_spec("transformer_engine") else "torch"
    steps = ["steps=20", "eval.interval=10", "baseline=", "launch.device=cuda", "launch.ranks=1"]
    where = f"run_dir={out / 'run'}"
    return python("-m", "icrl_megatron.cli", "train", "rulebook_easy", *steps, where, f"actor.layers={layers}")


def rollouts(out: Path, quick: bool) -> list[str]:
    rounds = "1" if quick else "2"
    return python(
        "tools/bench_rollout.py", "--device", "cuda", "--rounds", rounds, "--out", str(out / "rollout_cuda.json")
    )


def short(run: str) -> Callable[[Path, bool], list[str]]:
    return lambda out, quick: python("tools/gpu_runs.py", run, "--out", str(out), *(["--steps", "3"] if quick else []))


ACTOR_RUNS = ("actor_bf16", "actor_fp8_current", "actor_fp8_blockwise")
ENGINE_RUNS = ("engine_bf16", "engine_fp8", "engine_frozen_critic")
"""Of tools/gpu_runs.py, which needs more than this program does."""
KERNEL_TESTS = [f"tests/cpu/test_{name}.py" for name in ("head", "head_autograd", "triton_kernels")]
STAGES = (
    Stage("kernels", tests(*KERNEL_TESTS), ("pytest", "hypothesis")),
    Stage("gpu_tests", tests("-m", "gpu", "tests/gpu"), ("pytest", "hypothesis")),
    # Torch asks CUDA what it knows to fail, as for the attributes of a host pointer: no error of the kernels.
    sanitized("memcheck", "--report-api-errors", "no"),
    sanitized("racecheck"),
    Stage("tune", bench("head_tuning.json", "--tune")),
    Stage("bench_head", bench("head_cuda.json")),
    Stage("icrl_run", training, RUN_NEEDS),
    *(Stage(run, short(run), (*RUN_NEEDS, "transformer_engine")) for run in ACTOR_RUNS),
    *(Stage(run, short(run), (*RUN_NEEDS, "sglang")) for run in ENGINE_RUNS),
    Stage("bench_rollout", rollouts, (*RUN_NEEDS, "sglang")),
)


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def missing(stage: Stage) -> str:
    """Why the stage cannot run here; empty if it can."""
    absent = [name for name in stage.needs if not _importable(name)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return f"no {stage.tool} on the PATH" if stage.tool and program(stage.tool) is None else ""


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def run(stage: Stage, out: Path, quick: bool) -> Result:
    """Runs it with its time limit; what it wrote is in <out>/<stage>.log."""
    reason = missing(stage)
    if reason:
        return {"stage": stage.name, "result": "cannot run here", "reason": reason}
    command, began, log = stage.command(out, quick), time.monotonic(), out / f"{stage.name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment(stage), stdout=file, stderr=subprocess.STDOUT, timeout=STAGE_LIMIT_S
            ).returncode
            result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"failed: took over {STAGE_LIMIT_S} s"
    said = log.read_text(errors="replace")
    return {
        "stage": stage.name,
        **judged(stage, result, said),
        "quick": quick and command != stage.command(out, False),
        "seconds": round(time.monotonic() - began, 1),
        "command": " ".join(command).replace(f"{ROOT}/", ""),
        "tail": said[-TAIL_CHARACTERS:],
    }


def environment(stage: Stage) -> dict[str, str]:
    """This process's, where the checkout is found and kernels run on the card."""
    paths = [str(ROOT / part) for part in ("", "kernels", "recipes")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))}
    found.pop("TRITON_INTERPRET", None)
    return found | dict(stage.environment)


def judged(stage: Stage, result: str, said: str) -> Result:
    """The result, given what the stage printed."""
    unable = re.search(stage.unable, said) if stage.unable else None
    if unable and stage.says not in said:
        return {"result": "cannot run here", "reason": unable[0].strip("= ")}
    if result == "passed" and stage.says not in said:
        return {"result": f"failed: its output lacks '{stage.says}'"}
    return {"result": result}


@dataclass(frozen=True)
class Machine:
    """What the results were measured on."""

    card: str
    driver: str
    memory: str
    cuda: str
    python: str
    versions: dict[str, str]


def machine() -> Machine | None:
    """None where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    line = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    card, driver, memory = (line[0].split(", ") if line else [torch.cuda.get_device_name(), "?", "?"])[:3]
    names = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "liger-kernel", "sglang")
    return Machine(card, driver, memory, torch.version.cuda or "?", platform.python_version(), _versions(names))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def go_on(here: Machine, out: Path, wanted: list[str], quick: bool, again: bool) -> dict[str, Result]:
    """How every stage went, now or before; the file is written after each, so that nothing is lost."""
    kept = out / STAGES_FILE
    results: dict[str, Result] = json.loads(kept.read_text()) if kept.exists() else {}
    for stage in STAGES:
        done = results.get(stage.name, {})
        # What was measured quickly is not what was asked for without --quick.
        passed = done.get("result") == "passed" and (quick or not done.get("quick"))
        if (not wanted or stage.name in wanted) and (again or not passed):
            done = results[stage.name] = run(stage, out, quick) | {"machine": asdict(here)}
            kept.write_text(json.dumps(results, indent=1) + "\n")
        if done:
            print(f"{stage.name:12} {done['result']} {done.get('reason', '')}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(s.name for s in STAGES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="the smallest benchmark")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="also stages that passed already")
    chosen = parser.parse_args()
    unknown = set(chosen.stages) - {s.name for s in STAGES}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("torch") is None:
        print(
            f"error: {sys.executable} has no torch; name one that has: PYTHON=... tools/gpu_check.sh", file=sys.stderr
        )
        return 2
    here = machine()
    if here is None:
        print("error: torch sees no GPU here; this is for machines with one", file=sys.stderr)
        return 2
    label = re.sub(r"[^a-z0-9]+", "-", here.card.lower().replace("nvidia", "")).strip("-")
    out = (chosen.out or ROOT / "benchmarks" / f"{label}-{time.strftime('%Y-%m-%d')}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{here.card}, driver {here.driver}, {here.memory}, CUDA {here.cuda}; {here.versions}", flush=True)
    results = go_on(here, out, chosen.stages, chosen.quick, chosen.again)
    (out / "summary.md").write_text(summary(here, list(results.values())))
    print(f"results in {out}")
    return int(any(str(done["result"]).startswith("failed") for done in results.values()))


def summary(here: Machine, results: list[Result]) -> str:
    rows = [f"| {r['stage']} | {r['result']} {r.get('reason', '')} | {r.get('seconds', '')} |" for r in results]
    head = f"{here.card}, driver {here.driver}, CUDA {here.cuda}, {here.versions}"
    return "\n".join([head, "", "| stage | result | seconds |", "| --- | --- | --- |", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
