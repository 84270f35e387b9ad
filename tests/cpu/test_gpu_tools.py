"""The tools for GPUs as far as they go without one: their stages, and that benchmarked peers compute the same."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

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


def test_a_check_goes_on_where_it_ended_and_keeps_what_was_measured(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the real stages, one writes its numbers to a file of its own name."""
    count = "from pathlib import Path; p = Path({0!r}); p.write_text((p.read_text() if p.exists() else '') + '1')"

    def stage(name: str, end: str) -> object:
        code = count.format(str(tmp_path / f"{name}.json")) + end
        return check.Stage(name, lambda out, quick: check.python("-c", code))

    here = check.Machine("Some GPU", "1", "2", "3", "3.12", {"torch": "2"})
    stages = (stage("good", ""), stage("bad", "; raise SystemExit(3)"), stage("not_asked_for", ""))
    monkeypatch.setattr(check, "STAGES", stages)
    for _ in range(2):
        results = check.go_on(here, tmp_path, ["good", "bad"], False, False)
    assert {name: done["result"] for name, done in results.items()} == {
        "good": "passed",
        "bad": "failed with exit code 3",
    }
    assert (tmp_path / "good.json").read_text() == "1"
    assert (tmp_path / "bad.json").read_text() == "11"
    check.go_on(here, tmp_path, ["good"], False, True)
    assert (tmp_path / "good.json").read_text() == "11"


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


def test_the_head_is_measured_on_a_gpu_with_all_other_words() -> None:
    module = load("bench_head")
    there = [sys.executable, str(TOOLS / "bench_head_cuda.py"), "--quick", "--out", "head.json"]
    assert module.on_gpu(["--quick", "--device", "cuda", "--out", "head.json"]) == there
    assert module.on_gpu(["--device=cuda", "--quick", "--out", "head.json"]) == there
    assert module.on_gpu(["--rounds", "3"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench_head.py", "--device", "tpu"], "--device tpu: one of cpu, cuda"),
        (["bench_rollout.py", "--device", "tpu"], "--device tpu: one of cpu, cuda"),
        (["bench_rollout.py", "--model", "nowhere"], "--model nowhere: no Hugging Face folder"),
        (["bench_rollout.py", "--python", "/no/python"], "engine.python=/no/python: cannot be run"),
    ],
)
def test_benchmarks_refuse_in_one_line(words: list[str], said: str) -> None:
    command = [sys.executable, str(TOOLS / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr


def test_a_benchmark_without_its_peers_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("bench_schema").require("bench", "json", "no_such_peer")
    assert capsys.readouterr().err == "error: no_such_peer cannot be imported; pip install -e '.[bench]'\n"


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
