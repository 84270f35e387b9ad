"""Kinds of engines: their registry, and the documented example in a run, in an evaluation and in the planner."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import python
from rich.console import Console
from whole_runs import icrl, rows, train

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.engines.kind import EngineRequest
from icrl_megatron.engines.protocol import Engine, Served
from icrl_megatron.engines.registry import KINDS, engine_kind
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.plan import planner
from icrl_megatron.plan.hardware import GPUS
from icrl_megatron.plan.search import search
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.played import RolloutRequest
from icrl_megatron.rollout.prompts import Prompter, template_words, tokenizer
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.rollout.speakers import EngineSpeaker, Seeds, same_speakers
from icrl_megatron.run.checks import validate_grid, validate_settings
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import Settings, TinyModel
from icrl_megatron.tasks import registry
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.progress import Progress

NAME = "uniform_engine:KIND"
LOOSE = ("engine.mismatch_limit.mean=1e9", "engine.mismatch_limit.largest=1e9")
"""The replies of the documented engine are unlikely under the model."""


@pytest.fixture(autouse=True)
def _documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the documented example a module, here and in the programs that a test starts."""
    page = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text()
    section = page.partition("## Add an engine")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "uniform_engine.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    sys.modules.pop("uniform_engine", None)
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "model"
    words = template_words("compact")
    for name in ("household", "rulebook_easy"):
        words |= set(registry.get(name).vocabulary())  # type: ignore[attr-defined]
    build_tiny(folder, TinyModel(), sorted(words), 0)
    return folder


def test_the_registry_has_two_kinds_and_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom icrl_megatron.engines.registry import KINDS, engine_kind\n"
        "print([engine_kind(name).needs_folder != '' for name in KINDS], 'torch' in sys.modules)"
    )
    done = python("-c", code)
    assert done.stdout == "[False, True] False\n", done.stderr
    assert list(KINDS) == ["local", "sglang"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vllm", "engine.kind=vllm: choose one of local, sglang, or package.module:OBJECT"),
        ("nowhere:KIND", "No module named 'nowhere'; choose one of local, sglang, or add the folder"),
        ("uniform_engine:KINDS", "has no attribute 'KINDS'"),
        ("uniform_engine:Uniform", "this is not an EngineKind"),
    ],
)
def test_an_unknown_or_invalid_kind_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate_settings(load("rulebook_easy", [f"engine.kind={name}"]))


def test_the_documented_engine_plays_real_tasks(model: Path, tmp_path: Path) -> None:
    settings = load("household", [f"engine.kind={NAME}", "rollout.rounds=2"])
    grid = Grid(0, 1, 1, 0, 1, 0, 1, 0, None)
    request = EngineRequest(settings, model, grid, torch.float32, torch.device("cpu"), tmp_path / "logs")
    engines = engine_kind(NAME).build(request)
    assert not isinstance(engines.solver, Served), "it runs in the rank's process"
    solver: Engine | None = engines.solver
    assert solver is not None
    engines.trained.update_weights([], 7)
    prompter = Prompter(tokenizer(model), settings.rollout)
    setup = EpisodeSetup(registry.environment, prompter, settings.rollout)
    speakers_for = same_speakers(EngineSpeaker(solver, 1.0, prompter.stop_ids))
    progress = Progress(console=Console(file=io.StringIO()))
    source = EngineSource(setup, speakers_for, engines, lambda stale: None, lambda mine: [mine], progress)
    tasks = list(registry.get("household").problems("train"))[:4]
    played = source.play(RolloutRequest(tasks, 2, Seeds(0, 0), 2))
    assert [(e.task, e.index) for e in played.episodes] == [(task, i) for task in tasks for i in range(2)]
    assert source.play(RolloutRequest(tasks, 2, Seeds(0, 0), 2)).episodes == played.episodes
    replies = [turn.completion for e in played.episodes for attempt in e.attempts for turn in attempt.turns]
    assert {reply.weight_version for reply in replies} == {7}
    assert len({reply.ids.tobytes() for reply in replies}) > len(replies) // 2


def test_the_documented_engine_trains(model: Path, tmp_path: Path) -> None:
    words = (f"engine.kind={NAME}", f"model.path={model}", "warm_start.steps=0", "steps=2", *LOOSE)
    code, _, err = icrl(*train(tmp_path / "run", *words))
    assert code == 0, err
    done = [row for row in rows(tmp_path / "run") if "actor/entropy" in row]
    assert [row["weights/version"] for row in done] == [2, 3]
    assert all(row["actor/mismatch_abs"] > 0.01 for row in done), "its log-probs are not the model's"


def test_the_documented_engine_has_equal_evaluations_on_one_and_two_ranks(model: Path, tmp_path: Path) -> None:
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        words = ("--task", "household", "--problems", "6", "--samples", "2", "--rounds", "2", "--out", str(out))
        small = ("rollout.templates=compact", "rollout.max_critique_tokens=8", "rollout.max_turn_tokens=8")
        changes = (*small, "launch.device=cpu", f"launch.ranks={ranks}", f"engine.kind={NAME}")
        code, _, err = icrl("eval", str(model), *words, *changes)
        assert code == 0, err
        results.append(json.loads((out / "eval.json").read_text()) | {"seconds": 0})
    assert results[0] == results[1]
    assert results[0]["generated_tokens"] > 6 * 2 * 8
    assert results[0]["lost"] == [] and len(results[0]["successes"]) == 6


def test_the_documented_engine_refuses_settings_of_servers() -> None:
    settings: Settings = load("rulebook_easy", [f"engine.kind={NAME}", "engine.tensor_parallel=2", "launch.ranks=2"])
    with pytest.raises(ConfigError, match=r"engine\.kind=uniform_engine:KIND has only 1"):
        validate_grid(settings, 2, 2)


def test_the_planner_counts_the_documented_engine_like_the_local_one() -> None:
    known, ours = (load("qwen3_8b", [f"engine.kind={kind}"]) for kind in ("local", NAME))
    assert planner.plan(ours).memory == planner.plan(known).memory
    served = planner.plan(load("qwen3_8b", ["engine.kind=sglang"])).memory
    assert served.phases != planner.plan(ours).memory.phases
    assert {one.layout.engine_tensor for one in search(ours, 8, GPUS["h100"]).best} == {1}
