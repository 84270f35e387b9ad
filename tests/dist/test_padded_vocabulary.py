"""Runs from a model with more vocabulary rows than its tokenizer has tokens, like the published Qwen3 models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import icrl, rows, train

from icrl_megatron.telemetry.dumps import Rollouts

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROWS = 63
"""More than the tokenizer's words. It is odd, so TP 2 adds another padding row."""


@pytest.fixture(scope="module")
def padded(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with additional rows near the mean of the others, so that they have real probability."""
    source, folder = finished_run / "warm_start" / "hf", tmp_path_factory.mktemp("padded") / "model"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(ROWS)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert len(tokenizer) < ROWS - 10
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_engine_trainer_and_export_use_all_rows(padded: Path, tmp_path: Path, tensor_parallel: int) -> None:
    """Log-probs of engine and trainer agree within fp32, sampled ids include padding rows, and the export has them."""
    run, grid = tmp_path / "run", [f"launch.ranks={tensor_parallel}", f"actor.tensor_parallel={tensor_parallel}"]
    code, _, err = icrl(*train(run, f"model.path={padded}", "warm_start.steps=0", "steps=2", *grid))
    assert code == 0, err
    steps = [row for row in rows(run) if "actor/mismatch_abs" in row]
    assert len(steps) == 2
    assert all(row["actor/mismatch_abs"] <= 1e-5 and row["actor/mismatch_max"] <= 1e-3 for row in steps)
    words = len(AutoTokenizer.from_pretrained(padded))
    ids = generated_ids(Rollouts(run))
    assert any(words <= i < ROWS for i in ids)
    trained, before = (load_file(folder / "model.safetensors") for folder in (run / "hf", padded))
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in before.items()}
    assert json.loads((run / "hf" / "config.json").read_text())["vocab_size"] == ROWS
    # Every row is in the softmax of every token, so every row of the tied embedding has been updated.
    changed = (trained["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(dim=1)
    assert bool(changed.all())


def generated_ids(rollouts: Rollouts) -> list[int]:
    episodes = [episode for step in rollouts.steps for episode in rollouts.episodes(step)]
    attempts = [attempt for episode in episodes for attempt in episode.attempts]
    return [i for attempt in attempts for turn in attempt.turns for i in turn.completion.ids]
