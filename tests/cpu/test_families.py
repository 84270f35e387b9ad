"""Every model family from its folder to log-probs, and a whole run on the second one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from actors import make_actor, plan
from model_folders import make_folder
from transformers import AutoModelForCausalLM
from whole_runs import SMALL, icrl, rows

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.model.families import FAMILIES
from icrl_megatron.model.shape import ModelShape, check_folder
from icrl_megatron.plan.layout import counts
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.settings.limits import CHOICES
from icrl_megatron.utils.errors import ConfigError


def changed(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_settings_know_the_families() -> None:
    assert CHOICES["model.init.family"] == tuple(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, tied=tied, family=family)
    shape = check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.family.model_type == family and type(model).__name__ == shape.family.architecture
    assert shape.tensors() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert counts(shape).total == sum(p.numel() for p in model.parameters())


def test_a_head_is_a_share_of_the_width_where_qwen2_does_not_say(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, family="qwen2")
    fields = json.loads((folder / "config.json").read_text())
    del fields["head_dim"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert ModelShape.read(folder).head_dim == 8
    with pytest.raises(ConfigError, match="hidden_size=33 is no multiple of num_attention_heads=4"):
        ModelShape.read(changed(folder, hidden_size=33))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_bias": False}, "attention_bias=false: Qwen2 has biases on q, k and v"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"architectures": ["Qwen2Model"]}, "use one for Qwen2ForCausalLM"),
    ],
)
def test_another_model_is_refused(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelShape.read(changed(make_folder(tmp_path, family="qwen2"), **fields))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen2.5-3B-Instruct", 3.086),
        ("Qwen2.5-7B-Instruct", 7.616),
        ("Qwen2.5-32B-Instruct", 32.76),
    ],
)
def test_published_sizes(name: str, billions: float) -> None:
    """The sizes on the model cards: 0.49, 3.09, 7.61 and 32.5 billion (rounded there)."""
    assert counts(PUBLISHED[name]).total / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.dist
def test_a_run_trains_qwen2(tmp_path: Path) -> None:
    """Warm start, rollouts on the local engine, updates at tensor parallel 2, and an export that transformers loads."""
    run = tmp_path / "run"
    small = [word for word in SMALL if not word.startswith("model.")]
    words = ["train", "rulebook_easy", f"run_dir={run}", "steps=2", "launch.ranks=2", "actor.tensor_parallel=2"]
    code, _, err = icrl(*words, *small, "model.init.family=qwen2", "warm_start.steps=6", "algo.on_no_signal=train")
    assert code == 0, err
    steps = [row for row in rows(run) if "actor/mismatch_abs" in row]
    assert len(steps) == 2 and all(row["actor/mismatch_abs"] < 1e-5 for row in steps)
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.model_type == "qwen2"
    assert any(bool(p.any()) for n, p in model.named_parameters() if n.endswith("q_proj.bias"))
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_the_documented_family_computes_what_transformers_computes(
    tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text()
    section = page.partition("## A model family")[2].partition("\n## ")[0]
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], names)
    monkeypatch.setitem(FAMILIES, "llama", names["FAMILY"])
    folder = make_folder(tmp_path, tied=False, family="llama")
    actor = make_actor(folder, grid)
    of_step = plan(actor)
    model, worst = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0
    for batch, frozen in zip(of_step.updates[0], actor.score(of_step)[0], strict=True):
        assert frozen.old_L is not None
        for index in set(batch.sample_index_L.tolist()):
            sample = of_step.samples[index]
            ids = torch.tensor([sample.train_prompt_ids + sample.response_ids])
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            mine = frozen.old_L[torch.from_numpy(batch.sample_index_L) == index]
            worst = max(worst, float((scores[-len(mine) :] - mine).abs().max()))
    assert 0 < worst < 1e-5


def test_a_shape_keeps_its_family() -> None:
    shape = PUBLISHED["Qwen3-8B"]
    assert dataclasses.replace(shape, model_type="qwen2") != shape and not shape.family.qkv_bias
