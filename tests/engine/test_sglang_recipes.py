"""The recipes of Chain-of-Agents on the real SGLang: one step of each, with a tiny model and the recipes' tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sandboxes import REASON
from whole_runs import batch, rows

from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.launch import servers
from icrl_megatron.settings import loading as settings_module

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]

TOOLS = {"web": "search", "code": "python", "multihop": "search"}
"""Task of a recipe -> a tool that its random model calls."""
TINY = (
    *("launch.device=cpu", "launch.ranks=1", "actor.precision=fp32", "actor.offload=none"),
    *("actor.tensor_parallel=1", "actor.sequence_parallel=false", "engine.tensor_parallel=1"),
    "warm_start.epochs=null",
    *("steps=1", "rollout.tasks_per_step=4", "rollout.episodes_per_task=4", "optim.warmup_steps=0"),
    *("rollout.context_tokens=512", "rollout.max_turn_tokens=64", "rollout.max_critique_tokens=64"),
    # Answers are never right, so rewards differ by the penalty on length alone.
    *("algo.overlong.max_tokens=500", "algo.overlong.buffer_tokens=500"),
    *("eval.problems=2", "eval.control_problems=0", "engine.api_key_env=SERVER_KEY"),
)


def data(folder: Path) -> list[str]:
    for split in ("train", "heldout"):
        lines = [json.dumps({"prompt": f"{split} question {i}", "label": "7"}) for i in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "corpus.jsonl").write_text(json.dumps({"contents": "red blue green 1 2 3"}))
    return [f"tasks.sources.0.data.{split}=[{folder / split}.jsonl]" for split in ("train", "heldout")]


def test_one_step_of_each_recipe(server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", server.key)
    monkeypatch.chdir(tmp_path)  # the recipes search corpus.jsonl there
    given = [*TINY, *data(tmp_path), f"model.path={model}", f"engine.urls=[{server.url}]"]
    names = {task: f"coa_qwen3_8b_{task}_8xh100" for task in TOOLS if task != "code" or not REASON}
    served = settings_module.load(names["multihop"], [*given, "tasks.sources.0.serve.count=1"])
    with servers.beside(served, tmp_path / "logs") as told:
        (source,) = told.tasks.sources
        retrievers = f"tasks.sources.0.data.servers=[{','.join(source.data.servers)}]"
        of_task = {"web": [retrievers, "tasks.sources.0.agent.judge=exact"], "code": [], "multihop": [retrievers]}
        commands = {t: ["train", n, f"run_dir={tmp_path / t}", *given, *of_task[t]] for t, n in names.items()}
        ended = batch(tmp_path, commands)
    for task, how in ended.items():
        assert how.code == 0, how.error
        (row,) = [row for row in rows(tmp_path / task) if "engine/requests" in row]
        assert (row["episodes/played"], row["episodes/dropped"]) == (16, 0)
        assert row["actor/mismatch_max"] < 1e-4
        assert row[f"task/calls_{TOOLS[task]}"] > 0
