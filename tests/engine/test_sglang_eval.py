"""`icrl eval` on the real SGLang: greedy decoding says what the local engine says, on whatever servers and ranks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import changed, engine_on, engine_settings, load, tiny
from whole_runs import icrl

from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import without_model
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.evaluation import play
from icrl_megatron.evaluation.job import EvalJob
from icrl_megatron.evaluation.result import EvalRequest
from icrl_megatron.rollout.played import Played, RolloutRequest
from icrl_megatron.settings import loading
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.tasks import registry
from icrl_megatron.types import Completion
from icrl_megatron.utils.progress import Progress

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WORDS = ("rollout.temperature=0", "rollout.context_tokens=500", "rollout.templates=compact")
SMALL = ("actor.precision=fp32", "launch.device=cpu", "rollout.max_turn_tokens=24", "rollout.max_critique_tokens=24")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, as a critic."""
    return tiny(tmp_path_factory.mktemp("critic") / "model", "qwen3", seed=7)


def replies(played: Played) -> list[tuple[str, int, list[Completion]]]:
    return [
        (
            episode.task.task_id,
            episode.index,
            [turn.completion for attempt in episode.attempts for turn in attempt.turns]
            + [critique.completion for critique in episode.critiques],
        )
        for episode in played.episodes
    ]


def test_greedy_replies_are_the_local_engines(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server that holds other weights before: an evaluation sends those of the folder that it evaluates."""
    engine = engine_on(server, model, engine_settings())
    engine.update_weights(changed(load(model), 3), version=9)
    engine.close = lambda: None  # type: ignore[method-assign]
    monkeypatch.setenv("SERVER_KEY", server.key)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    platform.prepare("cpu")
    torch.set_num_threads(1)
    remote = engine_settings(urls=[server.url], api_key_env="SERVER_KEY")
    settings = loading.load("rulebook_easy", [*WORDS, *SMALL, "rollout.rounds=3"])
    tasks = tuple(registry.get("rulebook_easy").problems("heldout"))[:20]
    found = []
    for kind in (EngineSettings(), remote):
        job = EvalJob(
            EvalRequest(model), replace(settings, engine=kind), tasks, model, None, tmp_path / "out", tmp_path
        )
        with play._playing(job, without_model(settings), Progress(enabled=False)) as playing:
            found.append(playing.source.play(RolloutRequest(playing.tasks, 1, play.SEEDS, settings.rollout.rounds)))
    local, sglang = map(replies, found)
    assert [(t, i, [c.ids.tolist() for c in of]) for t, i, of in sglang] == [
        (t, i, [c.ids.tolist() for c in of]) for t, i, of in local
    ]
    assert len(local) == 20 and len({c.ids.tobytes() for _, _, of in local for c in of}) > 10, "replies that differ"
    for (_, _, theirs), (_, _, ours) in zip(sglang, local, strict=True):
        for one, two in zip(theirs, ours, strict=True):
            assert one.logprobs.tolist() == pytest.approx(two.logprobs.tolist(), abs=1e-4)
    assert {c.weight_version for _, _, of in sglang for c in of} == {1}


def evaluated(model: Path, out: Path, *words: str) -> dict[str, object]:
    common = ("--task", "rulebook_easy", "--problems", "10", "--rounds", "2", "--out", str(out))
    code, _, err = icrl("eval", str(model), *common, *WORDS, *SMALL, *words)
    assert code == 0, err
    found: dict[str, object] = json.loads((out / "eval.json").read_text())
    del found["seconds"]  # of this call
    return found


def test_two_ranks_with_a_server_each_and_one_rank_give_the_same_result(model: Path, tmp_path: Path) -> None:
    python = f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}"
    local = evaluated(model, tmp_path / "local")
    served = evaluated(model, tmp_path / "served", "launch.ranks=2", "engine.kind=sglang", python)
    assert served == local
    logs = tmp_path / "served" / "logs"
    assert all("Prefill batch" in (logs / f"sglang_{number}.log").read_text() for number in (0, 1)), "both played"


def test_another_critic_has_a_server_of_its_own(model: Path, other: Path, tmp_path: Path) -> None:
    python = f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}"
    critic = ("--critic", str(other))
    local = evaluated(model, tmp_path / "local", *critic)
    served = evaluated(model, tmp_path / "served", *critic, "engine.kind=sglang", python)
    assert served == local
    assert served["generated_tokens"] != evaluated(model, tmp_path / "itself")["generated_tokens"]
    logs = tmp_path / "served" / "logs"
    assert "Prefill batch" in (logs / "sglang_critic_0.log").read_text()


def test_a_server_that_cannot_start_is_one_message(model: Path, tmp_path: Path) -> None:
    words = ("--task", "rulebook_easy", "--problems", "4", "--out", str(tmp_path / "out"), "launch.ranks=2")
    python = f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}"
    wrong = ("engine.kind=sglang", python, "engine.server_args=[--no-such-argument]")
    code, _, err = icrl("eval", str(model), *words, *SMALL, *wrong)
    assert code == 1, err
    assert err.count("error: The SGLang server ended with code") == 1 and "--no-such-argument" in err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_questions_between_the_bounds_are_selected_and_trained_on(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of a random model's replies are right, whatever the question."""
    monkeypatch.setenv("SERVER_KEY", server.key)
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"red blue {i}", "label": str(i)}) + "\n" for i in range(24)]
    Path("train.jsonl").write_text("".join(rows[:20]))
    Path("heldout.jsonl").write_text("".join(rows[20:]))
    Path("reward.py").write_text("def score(response, **row):\n    return float(len(response) % 3 == 0)\n")
    files = [f"tasks.sources.0.data.{split}=[{split}.jsonl]" for split in ("train", "heldout")]
    remote = ("engine.kind=sglang", f"engine.urls=[{server.url}]", "engine.api_key_env=SERVER_KEY")
    own = (*SMALL, *files, *remote, "rollout.context_tokens=500", "rollout.templates=compact")
    bounds = ("--samples", "4", "--at-least", "0.25", "--at-most", "0.5", "--out", "kept.jsonl")
    code, out, err = icrl("select", str(model), "--task", "./reward.py:score", *bounds, *own)
    assert code == 0, err
    found = [json.loads(line) for line in Path("kept.measured.jsonl").read_text().splitlines()][1:]
    wanted = [i for i, one in enumerate(found) if 1 <= sum(one["successes"]) <= 2]
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < 20 and len(kept) == len(wanted), out
    assert len({row["prompt"] for row in kept}) == len(kept) and all(json.dumps(row) + "\n" in rows for row in kept)
    small = ("rollout.tasks_per_step=2", "rollout.episodes_per_task=2", "eval.control_problems=0", "warm_start.steps=0")
    run = ("run_dir=run", "steps=1", f"model.path={model}", "model.init=null", "tasks.sources.0.name=./reward.py:score")
    code, _, err = icrl("train", "any_text", *run, *own, *small, "tasks.sources.0.data.train=[kept.jsonl]")
    assert code == 0, err
