"""Runs the stages of tools/gpu_stages.py on a machine with one NVIDIA GPU, each with a time limit.

    bash tools/gpu_check.sh [--slot 1|2] [--size quick|full] [--out benchmarks/<gpu>-<date>] [stage ...]

<out>/stages.json says how each stage went; each stage writes its own JSON and <out>/<stage>.log. After each stage,
everything small is packed into one archive, so that a machine that disappears takes nothing with it. Started again, it
runs only the stages that have not passed. `--size tiny` is a dry run on a CPU.

A stage whose packages are missing says so. A stage that fails does not stop the others. The exit code is 0 if all
stages that could run passed, 1 if one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import limited
from gpu_stages import STAGES, Size, Stage, program

ROOT = Path(__file__).parents[1]
STAGES_FILE, ARCHIVE = "stages.json", "results.tgz"
TAIL_CHARACTERS = 4000
KILL_AFTER_S = 5.0
SIDE_BY_SIDE = 8
"""Stages that run at one time, of those that measure no time."""
LARGEST_PACKED = 4 * 2**20
NOT_PACKED = (".safetensors", ".pt", ".distcp", ".tgz", ".part")
PACKAGES = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "liger-kernel", "sglang")

Result = dict[str, object]
"""How a stage went, as it is written to stages.json."""


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


def run(stage: Stage, out: Path, size: Size) -> Result:
    """Runs it with its time limit; its output is in <out>/<stage>.log."""
    reason = missing(stage)
    if reason:
        return {"stage": stage.name, "result": "cannot run here", "reason": reason}
    command, began, log = stage.command(out, size), time.monotonic(), out / f"{stage.name}.log"
    with log.open("w") as file:
        env = environment(stage, size)
        code = limited.run(command, stage.limit_s, env=env, cwd=ROOT, output=file.fileno(), grace_s=KILL_AFTER_S)
    result = {0: "passed", None: f"failed: took over {stage.limit_s} s"}.get(code, f"failed with exit code {code}")
    said = log.read_text(errors="replace")
    return {
        "stage": stage.name,
        **judged(stage, result, said),
        "size": size,
        "seconds": round(time.monotonic() - began, 1),
        "command": " ".join(command).replace(f"{ROOT}/", ""),
        "tail": said[-TAIL_CHARACTERS:].replace(f"{ROOT}/", ""),
    }


def environment(stage: Stage, size: Size) -> dict[str, str]:
    """This process's environment, with the checkout on the path. Kernels are interpreted only in a dry run."""
    paths = [str(ROOT / part) for part in ("", "kernels", "recipes", "tools")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")]))}
    found["TRITON_INTERPRET"] = "1" if size == "tiny" else "0"
    return found | {"PYTHONUNBUFFERED": "1"} | dict(stage.environment)


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
    """Where the results were measured."""

    card: str
    driver: str
    memory: str
    cuda: str
    python: str
    versions: dict[str, str]


def machine(size: Size) -> Machine | None:
    """None where torch sees no GPU, unless the run is a dry run."""
    import torch

    cuda = torch.version.cuda or "none"
    if size == "tiny":
        return Machine("dry run", "none", "none", cuda, platform.python_version(), _versions())
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    line = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    card, driver, memory = (line[0].split(", ") if line else [torch.cuda.get_device_name(), "?", "?"])[:3]
    return Machine(card, driver, memory, cuda, platform.python_version(), _versions())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Wanted:
    """What to run, and where results go."""

    out: Path
    size: Size
    slot: int | None = None
    names: tuple[str, ...] = ()
    again: bool = False
    """Also stages that passed before."""
    archive: Path | None = None
    budget_s: float = float("inf")
    """No stage starts after this many seconds."""

    def has(self, stage: Stage) -> bool:
        return (not self.names or stage.name in self.names) and self.slot in (None, stage.slot)


def go_on(here: Machine, wanted: Wanted) -> dict[str, Result]:
    """How every stage went, now or before. Results are written after each stage."""
    kept = wanted.out / STAGES_FILE
    results: dict[str, Result] = json.loads(kept.read_text()) if kept.exists() else {}
    due = [s for s in STAGES if wanted.has(s) and (wanted.again or not _passed(results.get(s.name, {}), wanted.size))]
    for stage, done in _played(due, wanted):
        results[stage.name] = done | {"machine": asdict(here)}
        kept.write_text(json.dumps(results, indent=1) + "\n")
        (wanted.out / "summary.md").write_text(summary(here, list(results.values())))
        pack(wanted.out, wanted.archive or wanted.out / ARCHIVE)
        print(f"{stage.name:16} {done['result']} {done.get('reason', '')} {done.get('seconds', '')} s", flush=True)
        if str(done["result"]).startswith("failed"):
            print("\n".join(f"    {line[:200]}" for line in str(done["tail"]).splitlines()[-8:]), flush=True)
    return results


def _played(due: list[Stage], wanted: Wanted) -> Iterator[tuple[Stage, Result]]:
    """Runs stages in order; neighbors that measure no time run side by side, after the first one of all."""
    began = time.monotonic()
    groups = [due[:1]]
    for timed, neighbors in groupby(due[1:], key=lambda stage: stage.timed):
        group = list(neighbors)
        groups += [[stage] for stage in group] if timed else [group]
    for stages in groups:
        if time.monotonic() - began > wanted.budget_s:
            print(f"not started within {wanted.budget_s:.0f} s: {', '.join(s.name for s in stages)}", flush=True)
            continue
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            yield from zip(stages, pool.map(lambda s: run(s, wanted.out, wanted.size), stages), strict=True)


def _passed(done: Result, size: Size) -> bool:
    """A quick measurement does not stand for a full one, nor a dry run for any."""
    order = ("tiny", "quick", "full")
    return done.get("result") == "passed" and order.index(str(done["size"])) >= order.index(size)


def pack(out: Path, archive: Path) -> None:
    """Writes logs, JSON and metrics of all stages so far into one archive."""
    partial = archive.with_suffix(".part")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(out.rglob("*")):
            small = path.is_file() and path.stat().st_size <= LARGEST_PACKED
            if small and path.suffix not in NOT_PACKED:
                tar.add(path, path.relative_to(out.parent))
    partial.replace(archive)


def main() -> int:
    chosen = arguments()
    if importlib.util.find_spec("torch") is None:
        print(
            f"error: {sys.executable} has no torch; name one that has: PYTHON=... tools/gpu_check.sh", file=sys.stderr
        )
        return 2
    here = machine(chosen.size)
    if here is None:
        print("error: torch sees no GPU here; --size tiny is a dry run without one", file=sys.stderr)
        return 2
    label = re.sub(r"[^a-z0-9]+", "-", here.card.lower().replace("nvidia", "")).strip("-")
    out = (chosen.out or ROOT / "benchmarks" / f"{label}-{time.strftime('%Y-%m-%d')}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{here.card}, driver {here.driver}, {here.memory}, CUDA {here.cuda}; {here.versions}", flush=True)
    wanted = Wanted(out, chosen.size, chosen.slot, tuple(chosen.stages), chosen.again, chosen.archive, chosen.budget)
    results = go_on(here, wanted)
    print(f"results in {out}")
    return int(any(str(done["result"]).startswith("failed") for done in results.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(s.name for s in STAGES)}; all by default")
    parser.add_argument("--slot", type=int, choices=sorted({s.slot for s in STAGES}), help="only this slot's stages")
    parser.add_argument("--size", choices=("tiny", "quick", "full"), default="full", help="tiny: a dry run on a CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--archive", type=Path, help=f"where the archive goes; <out>/{ARCHIVE} by default")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no stage after so many seconds")
    parser.add_argument("--again", action="store_true", help="also stages that passed already")
    chosen = parser.parse_args()
    unknown = set(chosen.stages) - {s.name for s in STAGES}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    return chosen


def summary(here: Machine, results: list[Result]) -> str:
    rows = [f"| {r['stage']} | {r['result']} {r.get('reason', '')} | {r.get('seconds', '')} |" for r in results]
    head = f"{here.card}, driver {here.driver}, CUDA {here.cuda}, {here.versions}"
    return "\n".join([head, "", "| stage | result | seconds |", "| --- | --- | --- |", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
