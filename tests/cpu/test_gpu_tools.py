"""The tools for GPUs as far as they go without one: their stages, and that benchmarked peers compute the same."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from head_cases import assert_near, needs_triton

from icrl_kernels import Chunking

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))  # as for a script: the tools import each other


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load("gpu_check")


def test_a_stage_says_what_is_missing(check: ModuleType) -> None:
    assert check.missing(check.Stage("a", list, ("json", "no_such_module.at_all"))) == (
        "not installed: no_such_module.at_all"
    )
    assert check.missing(check.Stage("b", list, tool="no-such-program")) == "no no-such-program on the PATH"
    assert check.missing(check.Stage("c", list, ("json",))) == ""
    assert check.run(check.Stage("d", list, ("no_such_module",)), Path(), False)["result"] == "cannot run here"


def test_stages_pass_fail_and_run_out_of_time(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(code: str) -> object:
        return check.Stage("s", lambda out, quick: check.python("-c", code))

    passed = check.run(stage("import icrl_kernels; print('fine')"), tmp_path, False)
    assert passed["result"] == "passed" and passed["tail"] == "fine\n"
    assert check.run(stage("raise SystemExit(3)"), tmp_path, False)["result"] == "failed with exit code 3"
    monkeypatch.setattr(check, "STAGE_LIMIT_S", 1)
    assert "took over 1 s" in check.run(stage("import time; time.sleep(60)"), tmp_path, False)["result"]
    here = check.Machine("Some GPU", "1", "2", "3", "3.12", {"torch": "2"})
    assert "| s | passed" in check.summary(here, [passed])


def test_short_runs_are_stages_and_say_what_they_measured(check: ModuleType, tmp_path: Path) -> None:
    runs = load("gpu_runs")
    assert tuple(runs.RUNS) == check.ACTOR_RUNS + check.ENGINE_RUNS
    (stage,) = (s for s in check.STAGES if s.name == "actor_bf16")
    done = subprocess.run(
        [*stage.command(tmp_path, True), "--device", "cpu", "rollout.tasks_per_step=1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    medians = load("bench_schema").read(tmp_path / "actor_bf16.json")["medians"]
    assert medians["time"]["train_s"] > 0 and medians["actor"]["ratio_deviation_max"] <= 1e-5
    assert {"rollout_gib", "asleep_gib", "weights_gib", "awake_gib"} <= medians["memory"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_tools_say_so() -> None:
    for name in ("gpu_check.py", "bench_head_cuda.py"):
        done = subprocess.run([sys.executable, str(TOOLS / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done


def test_the_benchmark_of_a_gpu_writes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As slurm/bench_8b.sbatch asks; the benchmark itself needs a GPU, so its command line is looked at."""
    module = load("bench_head")
    started: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(SystemExit, match="0"):
        module.main(out=tmp_path / "head.json", device="cuda")
    assert started[0][1:] == [str(TOOLS / "bench_head_cuda.py"), "--out", str(tmp_path / "head.json")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's peers, on a small model and the CPU, with Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("tools/gpu_check.sh runs the benchmark itself")
    module = load("head_cuda_peers")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "VOCABULARY", 400)
    monkeypatch.setattr(module, "MODELS", {"tiny": 32})
    monkeypatch.setattr(module, "Chunking", partial(Chunking, backend="triton"))
    return module


@needs_triton
def test_benchmarked_peers_compute_the_same(bench: ModuleType) -> None:
    inputs = bench.Inputs(bench.Shape("tiny", 12, 2))
    peers = bench.train_peers(inputs)
    peers["eager"]()
    exact = inputs.hidden_LH.grad.float()
    for name, tolerance in (("kernels", 0.02), ("kernels, bf16 logits", 0.05)):
        peers[name]()
        assert_near(inputs.hidden_LH.grad, exact, tolerance)
    scores = {name: run() for name, run in bench.score_peers(inputs).items()}
    assert_near(scores["kernels"][0], scores["eager"][:, 0], 0.01)  # eager logits are bf16
    assert_near(scores["kernels, bf16 logits"][0], scores["eager"][:, 0], 0.01)


@needs_triton
def test_benchmarked_gradients_of_given_logits_are_the_same(bench: ModuleType) -> None:
    peers = bench.given_peers(bench.Inputs(bench.Shape("tiny", 12, 1)))
    peers["kernels"].before()
    assert_near(peers["kernels"](), peers["eager"](), 0.01)
