"""Engines on ranks of their own (`launch.engine_ranks`): what is refused, how many ranks train, which GPUs serve, and
what the planner counts. tests/engine/test_sglang_ranks.py runs such a run."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import python
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.distributed import job_size
from icrl_megatron.engines.engine_ranks import EngineRanks
from icrl_megatron.engines.kind import server_share
from icrl_megatron.engines.on_server.icrl_deltas import LOADER
from icrl_megatron.engines.sglang_build import server_spec
from icrl_megatron.evaluation.result import EvalRequest
from icrl_megatron.evaluation.run import settings_of
from icrl_megatron.launch.agent import AgentShare, without_engine_ranks
from icrl_megatron.plan import hardware, planner
from icrl_megatron.plan.hardware import GIB
from icrl_megatron.plan.planner import Plan
from icrl_megatron.plan.search import overrides
from icrl_megatron.run.checks import validate
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

SGLANG = "engine.kind=sglang"
ONE = ("launch.ranks=3", "launch.engine_ranks=1", "actor.tensor_parallel=1", "actor.sequence_parallel=false", SGLANG)
EIGHT = ("launch.ranks=8", "launch.engine_ranks=4", SGLANG, "engine.tensor_parallel=2")


@pytest.fixture(autouse=True)
def _not_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders are relative paths, and the test process is no rank."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ICRL_WORLD_SIZE", "ICRL_RANKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def checked(*words: str) -> Settings:
    settings = load("quickstart", words)
    validate(settings, installed=False)
    return settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.engine_ranks=3"], "launch.engine_ranks=3 leaves none of a machine's 3 ranks for training; lower it"),
        (["launch.engine_ranks=4"], "launch.engine_ranks=4 leaves none of a machine's 3 ranks for training; lower it"),
        (["launch.engine_ranks=-1"], "launch.engine_ranks=-1: must be a finite number, at least 0"),
        (["engine.kind=local"], "engine.kind=local cannot run on ranks of its own; set engine.kind=sglang, or launch."),
        (["engine.urls=[http://a:1]"], "engine.urls=['http://a:1']: the run would start servers and not use them; set"),
        (["engine.servers=1"], "engine.servers=1: there is one server per engine.tensor_parallel engine ranks; leave"),
        (
            ["rollout.critic=frozen"],
            "rollout.critic=frozen, which needs a second server: not supported on engine ranks",
        ),
        (["engine.tensor_parallel=2"], "not a multiple of engine.tensor_parallel=2, the GPUs of one server; use"),
        (["launch.engine_ranks=2", "engine.tensor_parallel=3"], "launch.engine_ranks=2 is not a multiple of engine."),
        (
            ["launch.ranks=5", "launch.engine_ranks=2"],
            "launch.engine_ranks=2 of engine.tensor_parallel=1 are 2 servers on a machine, which its 3 training ranks "
            "cannot share evenly; raise engine.tensor_parallel, or change launch.engine_ranks",
        ),
        (
            ["launch.ranks=4", "actor.tensor_parallel=2"],
            "does not divide the 3 ranks (launch.ranks without launch.engine_ranks); change launch.engine_ranks so "
            "that a multiple of 2 ranks trains",
        ),
    ],
)
def test_wrong_settings_are_rejected(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        checked(*ONE, *words)


def test_valid_settings_are_accepted() -> None:
    """GPUs of their own are what an asynchronous run needs, and deltas may be sent to them."""
    stale = ("rollout.staleness=1", "algo.mismatch_correction.enabled=true", "launch.device=cuda")
    for words in (ONE, (*ONE, "engine.sync=delta", *stale), EIGHT, (*ONE, "launch.nodes=4", "launch.ranks=2")):
        checked(*words)
    with pytest.raises(ConfigError, match=r"with launch\.engine_ranks, name servers"):
        checked(*ONE, *stale, "launch.engine_ranks=0")


def test_a_wrong_number_ends_the_command_with_code_2(tmp_path: Path) -> None:
    words = ("train", "quickstart", *ONE, "launch.engine_ranks=3", f"run_dir={tmp_path / 'run'}")
    done = python("-m", "icrl_megatron.cli", *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: launch.engine_ranks=3 leaves none") and not (tmp_path / "run").exists()


def test_the_ranks_that_train_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*words: str) -> tuple[int, int]:
        settings = load("quickstart", words)
        return job_size.ranks(settings), job_size.ranks_on_node(settings)

    assert counted("launch.ranks=8", "launch.nodes=3") == (24, 8)
    assert counted(*EIGHT) == (4, 4)
    assert counted(*EIGHT, "launch.nodes=3") == (12, 4)
    monkeypatch.setenv("ICRL_WORLD_SIZE", "12")  # a launcher checks a job of two machines with six GPUs each
    monkeypatch.setenv("ICRL_RANKS_PER_NODE", "6")
    assert counted(*EIGHT) == (4, 2)
    assert counted("launch.ranks=8") == (12, 6)
    monkeypatch.setenv("RANK", "0")  # a rank of it
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert counted(*EIGHT) == (4, 2)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_engine_gpu_belongs_to_one_server(servers: int, tensor: int, group: int) -> None:
    ranks = EngineRanks(servers * group, servers * tensor, tensor)
    first = [ranks.first_gpu(local) for local in range(ranks.training)]
    assert first == sorted(first) and all(first.count(gpu) == group for gpu in first), "one server per group"
    used = [gpu + i for gpu in sorted(set(first)) for i in range(tensor)]
    assert used == list(range(ranks.training, ranks.training + ranks.serving)), "the last GPUs, each once"
    ranks.require_gpus(ranks.training + ranks.serving)
    with pytest.raises(ConfigError, match=rf"need {ranks.training + ranks.serving} GPUs on each machine, and 1 are"):
        ranks.require_gpus(1)


def test_a_server_is_led_on_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three machines of 4 training ranks and two servers each."""
    settings = load("quickstart", EIGHT)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shares = [server_share(settings, rank, 12) for rank in range(12)]
    assert {share.count for share in shares} == {6}
    assert [share.index for share in shares] == [0, None, 1, None, 2, None, 3, None, 4, None, 5, None]
    of = EngineRanks.of(settings, 4)
    assert [of.first_gpu(rank % 4) for rank in range(12)] == [4, 4, 6, 6] * 3


def test_a_server_on_its_own_gpus_starts_there_and_never_sleeps(tmp_path: Path) -> None:
    spec = server_spec(load("quickstart", EIGHT), tmp_path, torch.device("cuda", 6), tmp_path / "log", two=False)
    own = replace(spec, on_engine_ranks=True, loader=LOADER)
    words = own.command(port=1)
    assert words[words.index("--base-gpu-id") + 1] == "6" and words[words.index("--tp-size") + 1] == "2"
    assert words[words.index("--custom-weight-loader") + 1] == LOADER
    assert "--enable-memory-saver" in spec.command(1) and "--enable-memory-saver" not in words
    path = own.environment(1, "key", tmp_path)["PYTHONPATH"].split(os.pathsep)[0]
    module = LOADER.partition(".")[0]
    done = python("-c", f"import {module}; print({module}.__file__)", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0 and done.stdout.strip() == f"{path}/{module}.py"


def test_the_agent_of_a_job_starts_only_the_ranks_that_train(tmp_path: Path) -> None:
    def share(*words: str, module: str = "icrl_megatron.launch.rank") -> AgentShare:
        return AgentShare.parse(["--nproc-per-node=8", "-m", module, "train", "quickstart", *words])

    assert without_engine_ranks(share()).ranks == 8
    assert without_engine_ranks(share(*EIGHT)).ranks == 4
    assert without_engine_ranks(share(*EIGHT, module="icrl_megatron.train")).ranks == 8, "`icrl train` counts itself"
    words = ("--nproc-per-node=1", "-m", "icrl_megatron.launch.rank", "train", "quickstart", *ONE)
    done = python("-m", "icrl_megatron.launch.agent", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: launch.engine_ranks=1 leaves none of a machine's 1 ranks"), done.stderr


def test_all_gpus_play_in_an_evaluation() -> None:
    run = load("quickstart", [*ONE, "engine.sync=delta"])
    settings = settings_of(EvalRequest(Path("model")), run)
    assert (settings.launch.ranks, settings.launch.engine_ranks, settings.engine.sync) == (3, 0, "full")
    odd = load("quickstart", [*ONE, "launch.ranks=5", "launch.engine_ranks=2", "engine.tensor_parallel=2"])
    assert settings_of(EvalRequest(Path("model")), odd).launch.ranks == 4, "two engines of two GPUs"


H100 = hardware.GPUS["h100"]
RECIPE = "qwen3_8b_alfworld_4xh100"
SIX = ("launch.ranks=8", "launch.engine_ranks=2", "actor.offload=none")


def planned(*words: str) -> Plan:
    return planner.plan(load(RECIPE, words))


def test_engine_ranks_hold_the_engine_and_the_others_the_trainer() -> None:
    made = planned(*SIX)
    layout = made.layout
    assert (layout.gpus, layout.engine_gpus, layout.all_gpus) == (6, 2, 8)
    assert (layout.data, layout.engines) == (3, 1)
    remote = planned("launch.ranks=6", "engine.urls=[http://a:1]", "actor.offload=none")
    trained = {name: size for name, size in made.memory.phases.items() if name != "rollout on engine ranks"}
    assert trained == pytest.approx(remote.memory.phases), "as if the engines were elsewhere"
    share = load(RECIPE).engine.memory_fraction * H100.memory_bytes
    assert made.memory.engine.total == pytest.approx(share)
    assert made.memory.phases["rollout on engine ranks"] == pytest.approx(share + 1.05 * 2.5 * GIB + 3 * GIB)
    assert made.times.phases == pytest.approx(remote.times.phases)
    assert made.tokens_a_second_a_gpu == pytest.approx(remote.tokens_a_second_a_gpu * 6 / 8)
    assert not planned("launch.ranks=8", "actor.offload=none").fits and made.fits


def test_an_engine_too_large_for_its_ranks_does_not_fit() -> None:
    words = (*SIX, "engine.memory_fraction=0.1")
    with pytest.raises(ConfigError, match=r"engine\.memory_fraction=0\.1 of a GPU does not hold the engine's weights"):
        planner.require_fit(planned(*words), load(RECIPE, words))


def test_plans_of_several_machines_count_the_engines_of_each() -> None:
    layout = planned("launch.ranks=4", "launch.nodes=2", "launch.engine_ranks=2").layout
    assert (layout.gpus, layout.engine_gpus, layout.node, layout.engines) == (4, 4, 2, 2)
    for words, said in (
        (["launch.ranks=9", "launch.engine_ranks=3"], "engine TP 2 does not divide the 3 engine ranks of a node"),
        (["launch.ranks=10", "launch.engine_ranks=6"], "4 training ranks of a node do not share its 3 engines evenly"),
    ):
        with pytest.raises(ConfigError, match=said):
            planned(*words)
    for gpus in (1, 7, 10):
        with pytest.raises(ConfigError, match=f"{gpus} GPUs are not whole machines; plan for a multiple of 8"):
            planner.plan(load(RECIPE, SIX), gpus)


def test_the_settings_of_a_plan_are_those_that_run() -> None:
    words = overrides(planned(*SIX).layout)
    assert {"launch.ranks=8", "launch.nodes=1", "launch.engine_ranks=2"} <= set(words)


def test_a_run_is_checked_on_the_gpus_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda: H100)
    planner.check(load(RECIPE, [*SIX, "launch.nodes=2"]))
    with pytest.raises(ConfigError, match="does not fit"):
        planner.check(load(RECIPE, ["launch.ranks=8", "actor.offload=none", "launch.nodes=2"]))
