"""The parts of the GPU tools that work without a GPU: stages, targets, and the computations of benchmarked peers."""

from __future__ import annotations

import importlib.util
import os
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import python
from head_cases import assert_near, needs_triton, tiny_peers

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))  # as for a script: the tools import each other


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return import_module("gpu_check")


def stage(check: ModuleType, code: str, name: str = "s", **more: object) -> object:
    """A stage that runs a line of Python."""
    return check.Stage(name, lambda out, size: [sys.executable, "-c", code], **({"limit_s": 60} | more))


def test_a_stage_names_missing_packages_and_programs(check: ModuleType) -> None:
    def missing(**more: object) -> str:
        return str(check.missing(stage(check, "", **more)))

    assert missing(needs=("json", "no_such_module.at_all")) == "not installed: no_such_module.at_all"
    assert missing(tool="no-such-program") == "no no-such-program on the PATH"
    assert missing(needs=("json",)) == ""
    assert check.run(stage(check, "", needs=("no_such_module",)), Path(), "full")["result"] == "cannot run here"


def test_sanitizers_run_without_a_cache_and_report_unsupported_devices(check: ModuleType, tmp_path: Path) -> None:
    memcheck, racecheck = (s for s in check.STAGES if s.tool == "compute-sanitizer")
    for sanitizer in (memcheck, racecheck):
        assert check.environment(sanitizer, "full")["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert "--target-processes application-only" in " ".join(sanitizer.command(tmp_path, "full"))
    command = " ".join(memcheck.command(tmp_path, "full"))
    assert "--tool memcheck" in command and "--report-api-errors no" in command

    def run(text: str, code: int) -> dict[str, str]:
        program = [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]
        return dict(check.run(replace(memcheck, command=lambda out, size: program, tool=""), tmp_path, "full"))

    done = "small cases of the head are done"
    for line in ("Error: Device not supported. Please refer to ...", "Error: the debugger interface is not supported"):
        refused = run(f"========= COMPUTE-SANITIZER\n========= {line}", 1)
        assert (refused["result"], refused["reason"]) == ("cannot run here", line)
    assert run(f"{done}\n========= Invalid __global__ read of size 4 bytes", 9)["result"] == "failed with exit code 9"
    assert run("========= ERROR SUMMARY: 0 errors", 0)["result"].startswith("failed: its output lacks")
    assert run(f"{done}\n========= ERROR SUMMARY: 0 errors", 0)["result"] == "passed"
    assert done in (TOOLS / "head_small_case.py").read_text()


def test_full_stages_run_the_kernels_on_the_gpu(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {check.environment(s, "full")["TRITON_INTERPRET"] for s in check.STAGES} == {"0"}
    assert {check.environment(s, "tiny")["TRITON_INTERPRET"] for s in check.STAGES} == {"1"}


def test_every_stage_has_one_of_two_slots_and_takes_at_most_240_s(check: ModuleType) -> None:
    assert {s.slot for s in check.STAGES} == {1, 2}
    assert all(0 < s.limit_s <= 240 for s in check.STAGES)


@pytest.mark.parametrize(("devices", "there"), [(["nvidia5", "nvidiactl"], True), (["nvidiactl", "nvidia-uvm"], False)])
def test_a_gpu_with_any_number_is_found(devices: list[str], there: bool, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("house_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    for device in devices:
        (tmp_path / device).touch()
    assert conftest.has_gpu(tmp_path) == there


HERE = ("Some GPU", "1", "2", "3", "3.12", {"torch": "2"})


def test_a_stage_runs_again_only_if_larger(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sized(name: str) -> object:
        code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '.')"
        return check.Stage(name, lambda out, size: [sys.executable, "-c", code, str(out / f"{name}.txt"), size], 60)

    monkeypatch.setattr(check, "STAGES", (sized("bench"),))
    for size in ("tiny", "quick", "quick", "tiny", "full", "full", "quick"):
        check.go_on(check.Machine(*HERE), check.Wanted(tmp_path, size))
    assert (tmp_path / "bench.txt").read_text() == "tiny.quick.full."


def test_stages_pass_or_fail(check: ModuleType, tmp_path: Path) -> None:
    passed = check.run(stage(check, "import icrl_kernels; print('fine')"), tmp_path, "full")
    assert passed["result"] == "passed" and passed["tail"] == "fine\n"
    assert check.run(stage(check, "raise SystemExit(3)"), tmp_path, "full")["result"] == "failed with exit code 3"
    assert "| s | passed" in check.summary(check.Machine(*HERE), [passed])


def test_a_stage_over_its_limit_is_killed_with_its_children(check: ModuleType, tmp_path: Path) -> None:
    """The child ignores SIGTERM and would still use the GPU."""
    sleeps = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    start = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {sleeps!r}])"
    code = f"{start}; print(p.pid, flush=True); p.wait()"
    began = time.monotonic()
    done = check.run(stage(check, code, limit_s=2), tmp_path, "full")
    assert "took over 2 s" in done["result"] and time.monotonic() - began < 20
    child = Path(f"/proc/{int(str(done['tail']))}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_second_check_repeats_failed_stages_only(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the real stages, each writes its results to a file with its own name."""

    def counting(name: str, end: str = "") -> object:
        return stage(check, f"open({str(tmp_path / name)!r} + '.json', 'a').write('1')" + end, name)

    stages = (counting("good"), counting("bad", "; raise SystemExit(3)"), counting("not_asked_for"))
    monkeypatch.setattr(check, "STAGES", stages)
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    asked = check.Wanted(tmp_path, "full", names=("good", "bad"), archive=tmp_path / "there.tgz")
    for _ in range(2):
        results = check.go_on(check.Machine(*HERE), asked)
    ended = {name: done["result"] for name, done in results.items()}
    assert ended == {"good": "passed", "bad": "failed with exit code 3"}
    assert ((tmp_path / "good.json").read_text(), (tmp_path / "bad.json").read_text()) == ("1", "11")
    with tarfile.open(tmp_path / "there.tgz") as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {"good.json", "bad.json", "bad.log", "stages.json", "summary.md"} <= names
    assert "weights.safetensors" not in names and "there.part" not in names
    check.go_on(check.Machine(*HERE), replace(asked, again=True))
    assert (tmp_path / "good.json").read_text() == "11"


def test_untimed_stages_run_in_parallel(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages wait for each other's file. The first stage and every timed stage run alone."""

    def meets(own: str, other: str) -> str:
        return (
            f"import pathlib, time; pathlib.Path({str(tmp_path / own)!r}).touch()\n"
            f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)"
        )

    both = [stage(check, meets(a, b), a, timed=False, limit_s=30) for a, b in (("a", "b"), ("b", "a"))]
    last = stage(check, "", "last")
    monkeypatch.setattr(check, "STAGES", (stage(check, "", "first", timed=False), *both, last))
    results = check.go_on(check.Machine(*HERE), check.Wanted(tmp_path, "full"))
    assert [done["result"] for done in results.values()] == ["passed"] * 4
    assert list(results) == ["first", "a", "b", "last"]


def test_a_short_run_reports_times_and_memory(check: ModuleType, tmp_path: Path) -> None:
    options = ["--steps", "3", "--device", "cpu", "--out", str(tmp_path), "rollout.tasks_per_step=1"]
    done = python(TOOLS / "gpu_runs.py", "actor_bf16", *options)
    assert done.returncode == 0, done.stderr
    medians = import_module("bench_schema").read(tmp_path / "actor_bf16.json")["medians"]
    assert medians["time"]["train_s"] > 0 and medians["actor"]["ratio_deviation_max"] <= 1e-5
    assert {"rollout_gib", "asleep_gib", "weights_gib", "awake_gib"} <= medians["memory"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_tools_refuse_to_run_without_a_gpu() -> None:
    for name in ("gpu_check.py", "bench_head_cuda.py"):
        done = python(TOOLS / name)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_benchmark_of_the_head_needs_only_a_checkout_with_torch_and_triton(tmp_path: Path) -> None:
    """It imports none of the package's dependencies, and the package itself only from the checkout."""
    for name in ("typer", "rich", "icrl_kernels", "icrl_megatron", "liger_kernel"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    words = (TOOLS / "bench_head.py", "--device", "cuda", "--quick")
    done = python(*words, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no CUDA device here"), done.stderr


def measured(ms: float, extra_gb: float = 1.0) -> dict[str, float]:
    return {"ms": ms, "extra_gb": extra_gb}


def test_measurements_are_compared_with_the_targets() -> None:
    module = import_module("head_cuda_targets")
    size = {"model": "Qwen3-8B", "tensor_parallel": 1}
    given = {"kernels": measured(3.0), "liger vocab-parallel CE": measured(6.0), "megatron fused CE": {"missing": "no"}}
    train = {"kernels": measured(40.0, 2.4), "kernels, bf16 logits": measured(50.0, 1.2), "eager": measured(99.0, 23.9)}
    cases = (("given", 8192, given), ("train", 16384, train))
    rows = [{"operation": operation, "tokens": tokens, **size, "peers": peers} for operation, tokens, peers in cases]
    for row in rows:
        shape = (row["operation"], row["tokens"], 151936, 4096)
        row["peers"] = {name: module.with_rates(values, *shape) for name, values in row["peers"].items()}
    found = {bar.name: (bar.value, bar.asked(), bar.held) for bar in module.bars(rows)}
    given_name, train_name = "kernels: given Qwen3-8B T 8192 TP 1 ms", "kernels: train Qwen3-8B T 16384 TP 1 extra_gb"
    assert found[given_name] == (3.0, "at most 3.1", True)
    assert found[f"{given_name}, times less than liger vocab-parallel CE"] == (2.0, "at least 2.5", False)
    assert found[f"{given_name}, times less than megatron fused CE"] == (None, "at least 5", None)
    assert found["kernels: train Qwen3-8B T 8192 TP 1 ms"] == (None, "at most 52", None)
    assert found[train_name] == (2.4, "at most 2.5", True)
    assert found[f"{train_name}, times less than eager"] == (pytest.approx(23.9 / 2.4), "at least 10", False)
    assert found[f"{train_name.replace('kernels', 'kernels, bf16 logits')}, times less than eager"][2] is True
    medians = module.medians(rows)["kernels"]
    assert medians["given Qwen3-8B T 8192 TP 1 gb_per_s"] == pytest.approx(3 * 2 * 8192 * 151936 / 3.0e6)
    assert medians["train Qwen3-8B T 16384 TP 1 extra_gb"] == 2.4
    assert "tflops_per_s" not in rows[0]["peers"]["kernels"] and "gb_per_s" not in rows[1]["peers"]["kernels"]
    assert "2489 GB/s, 83% of the floor, 1.00 GB extra" in module.line(rows[0])
    assert "1529 TF/s, 194% of the floor, 2.40 GB extra" in module.line(rows[1])
    assert import_module("bench_schema").unit_of("train extra_gb") == "GB"


def test_rows_are_written_as_soon_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, schema = import_module("bench_head_cuda"), import_module("bench_schema")
    monkeypatch.setattr(module, "OPERATIONS", {"given": lambda inputs: {}, "score": lambda inputs: {}})
    monkeypatch.setattr(module, "Inputs", lambda shape: shape)
    monkeypatch.setattr(module, "about", lambda: dict.fromkeys(("command", "date", "machine", "versions"), ""))
    monkeypatch.setattr(module.torch.cuda, "empty_cache", lambda: None)
    results = iter([{"kernels": measured(3.0)}])

    def measure(peers: object, rounds: int) -> object:
        found = next(results, None)
        if found is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return found

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(RuntimeError, match="illegal"):
        shapes = [module.Shape("Qwen3-8B", 8192, 1)]
        write = partial(schema.write, tmp_path / "a.json", "head_cuda")
        module.bench(shapes, 1, lambda rows: write(module.about() | module.report(rows)))
    kept = schema.read(tmp_path / "a.json")
    assert [row["peers"]["kernels"]["ms"] for row in kept["rows"]] == [3.0]
    assert schema.bars(kept)[0].held is True and kept["measurements"]


def test_on_a_gpu_the_benchmark_of_the_head_passes_its_other_arguments_on() -> None:
    module = import_module("bench_head")
    there = [sys.executable, str(TOOLS / "bench_head_cuda.py"), "--quick", "--out", "head.json"]
    assert module.on_gpu(["--quick", "--device", "cuda", "--out", "head.json"]) == there
    assert module.on_gpu(["--device=cuda", "--quick", "--out", "head.json"]) == there
    assert module.on_gpu(["--rounds", "3"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench_head.py", "--device", "tpu"], "--device tpu: one of cpu, cuda"),
        (["bench_rollout.py", "--device", "tpu"], "--device tpu: one of cpu, cuda"),
        (["bench_rollout.py", "--model", "nowhere"], "--model nowhere: not a Hugging Face folder"),
        (["bench_rollout.py", "--python", "/no/python"], "engine.python=/no/python: cannot be run"),
        (["time_sync.py", "--python", "/no/python"], "engine.python=/no/python: cannot be run"),
    ],
)
def test_benchmarks_refuse_invalid_arguments_in_one_line(words: list[str], said: str) -> None:
    done = python(TOOLS / words[0], *words[1:])
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr


def test_a_benchmark_without_its_peers_prints_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        import_module("bench_schema").require("bench", "json", "no_such_peer")
    assert capsys.readouterr().err == "error: no_such_peer cannot be imported; pip install -e '.[bench]'\n"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("tools/gpu_check.sh runs the benchmark itself")
    return tiny_peers(monkeypatch)


@needs_triton
def test_benchmarked_peers_compute_the_same(bench: ModuleType) -> None:
    inputs = bench.Inputs(bench.Shape("tiny", 12, 2))
    peers = bench.train_peers(inputs)
    peers["eager"]()
    exact = inputs.hidden_LH.grad.float()
    scores = {name: run() for name, run in bench.score_peers(inputs).items() if callable(run)}
    for name, tolerance in (("kernels", 0.02), ("kernels, bf16 logits", 0.05)):
        peers[name].before()
        assert inputs.hidden_LH.grad is None and inputs.weight_VH.grad is None
        peers[name]()
        assert_near(inputs.hidden_LH.grad, exact, tolerance)
        assert_near(scores[name][0], scores["eager"][:, 0], 0.01)  # eager logits are bf16


@needs_triton
def test_no_token_of_the_benchmark_is_clipped(bench: ModuleType) -> None:
    """The kernels do not read the row of a clipped token, and no peer can skip one."""
    inputs = bench.Inputs(bench.Shape("tiny", 200, 1))
    given = (inputs.hidden_LH, inputs.weight_VH, inputs.streams, inputs.terms, inputs.shard)
    output = bench.policy_head(*given, bench.Chunking())
    assert not bool((output.clipped_low_L | output.clipped_high_L).any())
    passes, slopes_L = bench.tuning_passes(inputs, 64)
    assert slopes_L.shape == (64,) and bool((slopes_L != 0).all())
    moved = {name: bytes_moved for name, (_, bytes_moved) in passes.items()}
    assert moved == {"statistics": 4 * 64 * 400, "gradients": 6 * 64 * 400}
    assert passes["statistics"][0]().shape[1:] == (4, 64) and passes["gradients"][0]().shape == (64, 400)


def test_gradients_that_are_not_finite_or_too_far_off_are_wrong() -> None:
    rows = {"fp32": 0.0, "te_bf16": float("nan"), "te_fp8_current": 0.1, "torch_bf16": 0.06}
    found = {name: {"gradient_relative": value} for name, value in rows.items()} | {"te_fp8_blockwise": {"failed": 1}}
    assert import_module("gpu_actor").wrong(found) == ["te_bf16", "torch_bf16", "te_fp8_blockwise"]


@pytest.mark.parametrize("written", [None, '{"start_s": 1'])
def test_a_variant_without_a_complete_result_has_failed(tmp_path: Path, written: str | None) -> None:
    part, log = tmp_path / "part", tmp_path / "log"
    log.write_text("out of memory")
    if written:
        part.write_text(written)
    assert import_module("gpu_train").read(part, log) == {"failed": "out of memory"}


def test_the_bundle_lists_missing_dependencies(tmp_path: Path) -> None:
    one = ["two>=1", "three; python_version < '3.12'", "four; extra == 'x'"]
    for name, needs in {"one": one, "two": ["Five"]}.items():
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1", *(f"Requires-Dist: {need}" for need in needs)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
    bundle = import_module("gpu_bundle")
    assert bundle.unmet(tmp_path, ["one"]) == {"two": ["one"], "five": ["two"]}
    assert bundle.unmet(tmp_path, ["one", "two", "FIVE"]) == {}
    assert {"torch", "sglang", "nvidia-cutlass-dsl-libs-core"} <= set(bundle.provided())
