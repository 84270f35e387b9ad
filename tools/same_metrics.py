"""Checks that a code change does not change results: compares runs at an earlier revision and in this working tree.

    python tools/same_metrics.py REVISION [--runs quickstart,grid,sglang] [--keep FOLDER]

Each run's metrics.jsonl must be identical, except time/ and memory/: the quickstart's first 40 steps (with its warm
start, at tensor parallel 2), ten steps at tensor parallel 2 x pipeline parallel 2, and four steps on an SGLang server
that serves one request at a time (it ignores a request's seed, so its samples depend only on the order of requests).
Metrics that the earlier revision does not have are listed and do not count as differences. Both revisions use this
interpreter's libraries. The SGLang run needs ICRL_ENGINE_PYTHON, as `make test-engine` sets it. Exits with 1 on a
difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNLIKE = ("time/", "memory/")
"""Metrics that depend on the machine and its load."""
TIMEOUT_S = 3600.0
ENGINE = os.environ.get("ICRL_ENGINE_PYTHON", "")
SMALL = ("eval.interval=5", "eval.problems=16", "eval.control_problems=4", "checkpoint.interval=5")


@dataclass(frozen=True)
class Run:
    """One `icrl train`, and the files below its run folder to compare."""

    words: tuple[str, ...]
    compared: tuple[str, ...]


RUNS = {
    "quickstart": Run(("quickstart", "steps=40", "baseline="), ("metrics.jsonl", "warm_start/metrics.jsonl")),
    "grid": Run(
        ("rulebook_easy", "steps=10", "launch.ranks=4", "actor.tensor_parallel=2", "actor.pipeline_parallel=2", *SMALL),
        ("metrics.jsonl", "warm_start/metrics.jsonl"),
    ),
    "sglang": Run(
        (
            *(
                "rulebook_easy",
                "steps=4",
                "engine.kind=sglang",
                f"engine.python={os.environ.get('ICRL_ENGINE_PYTHON')}",
            ),
            *("rollout.concurrency=1", "rollout.tasks_per_step=4", "rollout.episodes_per_task=4"),
            *("engine.server_args=[--random-seed,'1',--max-running-requests,'1']", "algo.max_resamples=0"),
            *("algo.on_no_signal=train", *SMALL),
        ),
        ("metrics.jsonl",),
    ),
}


def train(tree: Path, folder: Path, words: tuple[str, ...]) -> None:
    """Runs `icrl train` with the code of one tree. Raises CalledProcessError if it fails."""
    path = os.pathsep.join(str(tree / part) for part in ("", "kernels", "recipes"))
    command = [sys.executable, "-c", "from icrl_megatron.cli import main; main()", "train", *words, f"run_dir={folder}"]
    subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=TIMEOUT_S)


def compared(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl without the metrics that differ between two runs of the same code."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(UNLIKE)} for row in rows]


def differences(before: Path, after: Path) -> tuple[list[str], list[str]]:
    """The differing metrics, as "step N: NAME BEFORE AFTER", and the names that no row before has. Values are compared
    as Python prints them, so that NaN equals NaN."""
    rows, found = list(zip_longest(compared(before), compared(after), fillvalue=dict[str, float]())), list[str]()
    known = {name for old, _ in rows for name in old}
    for old, new in rows:
        names = [name for name in {**old, **new} if name in known and repr(old.get(name)) != repr(new.get(name))]
        found += [f"step {(old or new)['step']:g}: {name} {old.get(name)} {new.get(name)}" for name in names]
    return found, sorted({name for _, new in rows for name in new} - known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--runs", default="quickstart,grid,sglang")
    parser.add_argument("--keep", type=Path, help="keep the runs in this new folder")
    options = parser.parse_args()
    names = options.runs.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"--runs: {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    if "sglang" in names and not ENGINE:
        parser.error("the run on SGLang needs ICRL_ENGINE_PYTHON; set it, or leave sglang out of --runs")
    with tempfile.TemporaryDirectory(prefix="icrl_same_") as temporary:
        folder, tree = options.keep or Path(temporary) / "runs", Path(temporary) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", tree, options.revision], cwd=ROOT, check=True)
        try:
            same = [compare(name, tree, folder.resolve()) for name in names]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    return 0 if all(same) else 1


def compare(name: str, tree: Path, folder: Path) -> bool:
    """Whether one run has the same metrics in both trees; prints the result."""
    run, before, after = RUNS[name], folder / f"{name}_before", folder / f"{name}_after"
    train(tree, before, run.words)
    train(ROOT, after, run.words)
    same = True
    for file in run.compared:
        (found, added), rows = differences(before / file, after / file), len(compared(after / file))
        print(f"{name}: {file}: {rows} rows, {'identical' if not found else f'{len(found)} differences'}")
        if added:
            print(f"  only the later revision has {', '.join(added)}")
        for line in found[:10]:
            print(f"  {line}")
        same = same and not found and rows > 0
    return same


if __name__ == "__main__":
    sys.exit(main())
