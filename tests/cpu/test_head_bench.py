"""The head's benchmark on a CPU: a peer with wrong results is reported and not timed, and the others are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import python
from head_cases import needs_triton, tiny_peers

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))  # as for a script: the tools import each other

if torch.cuda.is_available():
    pytest.skip("there is a GPU here: tools/gpu_check.sh runs the benchmark on it", allow_module_level=True)


peers = pytest.fixture(tiny_peers, name="peers")


def dry_run(out: Path, *options: str) -> dict[str, object]:
    done = python(TOOLS / "bench_head_cuda.py", "--device", "cpu", "--size", "tiny", "--out", out, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(json.loads(out.read_text()))


@needs_triton
def test_a_dry_run_times_every_operation(tmp_path: Path) -> None:
    rows = dry_run(tmp_path / "head.json")["rows"]
    assert [(r["operation"], r["tensor_parallel"]) for r in rows] == [  # type: ignore[attr-defined]
        (operation, degree) for degree in (1, 2) for operation in ("given", "train", "score")
    ]
    for row in rows:  # type: ignore[attr-defined]
        error = "logprob_error" if row["operation"] == "score" else "gradient_error"
        assert row["peers"]["kernels"]["ms"] > 0
        assert row["peers"]["eager"]["ms"] > 0 and row["peers"]["eager"][error] < 0.05
        assert all(("ms" in peer) != ("missing" in peer) for peer in row["peers"].values())


@needs_triton
def test_a_dry_run_of_tuning_times_known_settings(tmp_path: Path) -> None:
    import bench_head_cuda

    found = dry_run(tmp_path / "tuning.json", "--tune")
    tuned = {(r["block"], r["warps"], r["programs"]) for r in found["tuning"]}  # type: ignore[attr-defined]
    assert tuned and tuned <= set(bench_head_cuda.tune_settings())
    assert {"fp32 default", "bf16 default"} == {row["chunk"] for row in found["chunks"]}  # type: ignore[attr-defined]


def test_tuning_starts_with_the_setting_in_use() -> None:
    import bench_head_cuda

    from icrl_kernels.triton_chunks import TUNING

    settings = bench_head_cuda.tune_settings()
    assert settings[0] == (TUNING[9].block, TUNING[9].warps, TUNING[9].programs)
    assert len({(block, warps) for block, warps, _ in settings}) <= 8  # each is compiled twice


def test_tuning_that_runs_out_of_time_keeps_its_results(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_head_cuda

    monkeypatch.setattr(bench_head_cuda, "Inputs", lambda shape: None)
    timed = iter([{"statistics_ms": 3.0, "gradients_ms": 1.0}, None, {"statistics_ms": 1.0, "gradients_ms": 1.0}])

    def next_time(inputs: object, flush: object) -> dict[str, float]:
        found = next(timed)
        if found is None:
            raise RuntimeError("out of resources")
        return found

    clock = iter([0.0, 1.0, 2.0, 3.0, 1e9])
    monkeypatch.setattr(bench_head_cuda, "_tuned", next_time)
    monkeypatch.setattr(bench_head_cuda.time, "perf_counter", lambda: next(clock))
    kept: list[list[float]] = []
    bench_head_cuda.tune(peers.Shape("tiny", 12, 1), lambda rows: kept.append([r["statistics_ms"] for r in rows]))
    assert kept == [[3.0], [1.0, 3.0]]


def failing() -> float:
    raise ValueError("it left no gradient")


@pytest.mark.parametrize(
    ("wrong_by", "said"),
    [
        (lambda: 0.5, "wrong: its gradients differ from ours by 0.5"),
        (lambda: float("nan"), "wrong: its gradients differ from ours by nan"),
        (failing, "not compared with ours: ValueError: it left no gradient"),
    ],
)
def test_a_wrong_peer_is_reported_and_not_timed(peers: ModuleType, wrong_by: Callable[[], float], said: str) -> None:
    import bench_head_cuda

    runs = {"wrong": peers.compared(lambda: None, "gradient", wrong_by), "right": lambda: None}
    found = bench_head_cuda.measure(runs, 2)
    assert found["wrong"]["missing"] == said and "ms" not in found["wrong"]
    assert found["right"]["ms"] >= 0


@needs_triton
def test_a_loss_that_is_10_percent_too_large_is_10_percent_off(peers: ModuleType) -> None:
    from head_cuda_given import Given

    inputs = peers.Inputs(peers.Shape("tiny", 12, 1))
    given = Given(inputs)
    for factor, least, most in ((1.0, 0.0, 0.02), (1.1, 0.08, 0.12)):
        run = given.peer(lambda z, factor=factor: factor * peers.eager_loss(z, inputs))
        run.before()
        run()
        assert least <= run.wrong_by() <= most

        def train(factor: float = factor) -> None:
            (factor * peers.eager_loss(inputs.hidden_LH @ inputs.weight_VH.T, inputs)).backward()

        inputs.clear()
        train()
        assert least <= inputs.wrong_by(mean_entropy=False) <= most
    inputs.clear()
    with pytest.raises(ValueError, match="it left no gradient"):
        inputs.wrong_by(mean_entropy=False)


@needs_triton
def test_a_peer_that_scores_other_tokens_is_far_off(peers: ModuleType) -> None:
    inputs = peers.Inputs(peers.Shape("tiny", 12, 1))
    right = peers.score_peers(inputs)["eager"]
    moved = peers.scored(inputs, lambda: right().roll(1, 0), lambda found: found[:, 0])
    assert right.wrong_by() < 0.02 and moved.wrong_by() > 0.5


@needs_triton
def test_no_token_of_the_grpo_benchmark_is_clipped(peers: ModuleType) -> None:
    """Its old log-probs belong to the given logits, so all ratios are near 1."""
    from head_cuda_given import Given, grpo_streams

    inputs = peers.Inputs(peers.Shape("tiny", 200, 1))
    streams, given = grpo_streams(inputs), Given(inputs)
    given.restore()
    gradients_LV = given.gradients(streams)
    assert streams.targets_L.shape == (199,)
    assert bool((gradients_LV.float().abs().sum(-1) > 0).all())
    ratios_L = given.outputs.ratio_L[:199]
    assert bool(((ratios_L > 0.8) & (ratios_L < 1.28)).all())
