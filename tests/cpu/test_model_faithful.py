"""Model folders in every accepted format: the actor and the local engine compute the log-probs of transformers, and
import followed by export returns every tensor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import YARN, copy, make_folder, save, shard, tensors, with_fields
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from whole_runs import batch
from whole_samples import Whole, packed

from icrl_megatron.distributed import platform
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.types import Completion
from icrl_megatron.utils.errors import ConfigError

if torch.cuda.is_available():
    pytest.skip("replacing CUDA functions would hide the GPU from other tests in this process", allow_module_level=True)
platform.prepare("cpu")

from icrl_megatron.actor.actor import Actor  # noqa: E402
from icrl_megatron.distributed import grid as grids  # noqa: E402

TOLERANCE = 1e-5
TOKENS, PADDING = 200, 27
"""The tokenizer has 37 words; with 27 padding rows, the vocabulary has 64."""


@pytest.fixture(
    scope="module", params=[("qwen3", True), ("qwen3", False), ("qwen2", False)], ids=["tied", "untied", "qwen2"]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, tied = request.param
    return make_folder(tmp_path_factory.mktemp("base") / "model", tied=tied, rows=PADDING, family=family)


def settings() -> Settings:
    found = Settings()
    found.actor.precision = "fp32"
    return found


def response(vocabulary: int) -> tuple[int, ...]:
    return tuple(torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist())


def actor_logprobs(folder: Path, grid: grids.Grid) -> Tensor:
    """[TOKENS] log-probs of a long sequence that is packed after a short one."""
    actor = Actor(settings(), folder, grid)
    ids = response(actor.shape.vocab)
    samples = [
        Whole(f"t#{i}", "t", "attempt", 0, (5, 6), (5, 6), part, (True,) * len(part), (0.0,) * len(part), False, 1, 1)
        for i, part in enumerate((ids[:9], ids))
    ]
    plan = packed(samples, actor.settings.algo, micro_batch_tokens=4096)
    (batch,) = plan.updates[0]
    logprobs = actor._score(actor.wrapped, plan)[0][0]
    return logprobs[torch.from_numpy(batch.sample_index_L) == plan.samples.index(samples[1].header)]


@torch.no_grad()
def transformers_logprobs(folder: Path, ids: tuple[int, ...], prompt: tuple[int, ...] = (5, 6)) -> Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def generated(folder: Path) -> Completion:
    engine = LocalEngine(folder, EngineSettings(), torch.float32, "cpu")
    return asyncio.run(engine.generate((5, 6), Sampling(1.0, TOKENS, 0, ())))


def convert_to(dtype: torch.dtype) -> Callable[[Path], object]:
    return lambda f: save({n: t.to(dtype) for n, t in tensors(f).items()}, f / "model.safetensors")


Change = Callable[[Path], object]
YARN_PARAMETERS: dict[str, Any] = {**YARN, "rope_theta": 10000.0}
FIELDS: dict[str, dict[str, Any]] = {
    "fractional_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.567}},
    "top_level_theta": {"rope_parameters": None, "rope_theta": 5e6},
    "no_theta": {"rope_parameters": None},
    "yarn": {"rope_parameters": YARN_PARAMETERS},
    "yarn_from_model_card": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": YARN},
    "yarn_with_type": {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 777.5},
    "yarn_without_attention_factor": {
        "rope_parameters": {**YARN_PARAMETERS, "attention_factor": 1.0, "attn_factor": 0.8782488562869419}
    },
    "yarn_every_field": {
        "rope_parameters": {
            **YARN_PARAMETERS,
            "beta_fast": 8,
            "beta_slow": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 0.4,
            "truncate": False,
        }
    },
}
FILES: dict[str, Change] = {
    "shards": shard,
    "fp16": convert_to(torch.float16),
    "bf16": convert_to(torch.bfloat16),
    "says_bf16": lambda f: with_fields(f, {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", [*FIELDS, *FILES])
def test_log_probs_equal_those_of_transformers(base: Path, grid: grids.Grid, tmp_path: Path, name: str) -> None:
    """For the actor and for the engine's samples. All rows are in the softmax; some sampled rows have no token."""
    folder = copy(base, tmp_path / "m", FIELDS.get(name))
    FILES.get(name, lambda _: None)(folder)
    ids = response(64)
    assert any(i >= 64 - PADDING for i in ids)
    want = transformers_logprobs(folder, ids)
    if name in FIELDS:
        assert (want - transformers_logprobs(base, ids)).abs().max() > 1e-2 or name == "no_theta"
    assert (actor_logprobs(folder, grid) - want).abs().max() <= TOLERANCE
    done = generated(folder)
    assert (torch.tensor(done.logprobs) - transformers_logprobs(folder, done.ids)).abs().max() <= TOLERANCE
    assert any(i >= 64 - PADDING for i in done.ids)


@pytest.mark.parametrize("name", ["one_shard", "backbone_names", "old_spelling", "same_head"])
def test_equivalent_folders_give_the_same_log_probs(base: Path, grid: grids.Grid, tmp_path: Path, name: str) -> None:
    folder, stored = copy(base, tmp_path / "m", old=name == "old_spelling"), tensors(base)
    if name == "one_shard":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    elif name == "backbone_names":
        save({n.removeprefix("model."): t for n, t in stored.items()}, folder / "model.safetensors")
    elif name == "same_head":
        head = stored.get("lm_head.weight", stored["model.embed_tokens.weight"]).clone()
        save({**stored, "lm_head.weight": head}, folder / "model.safetensors")
    # Tensors are at other offsets in the files, so products may be rounded differently.
    torch.testing.assert_close(actor_logprobs(folder, grid), actor_logprobs(base, grid), atol=TOLERANCE, rtol=0)
    done, want = generated(folder), generated(base)
    assert np.array_equal(done.ids, want.ids) and done.logprobs == pytest.approx(want.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_not_loaded(base: Path, grid: grids.Grid, tmp_path: Path, value: float) -> None:
    folder, values = copy(base, tmp_path / "m"), tensors(base)
    values["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save(values, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"mlp\.down_proj\.weight has 1 values .* the first is {value}"):
        Actor(settings(), folder, grid)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has values that are not finite"):
        LocalEngine(folder, EngineSettings(), torch.float32, "cpu")


ROUND_TRIPS = ("plain", "qwen2", "yarn", "says_bf16", "shards", "backbone_names", "bf16")


@pytest.fixture(scope="module")
def round_trips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contains NAME/m, and NAME/hf, the result of `icrl import` and `icrl export`."""
    root = tmp_path_factory.mktemp("round_trips")
    base, second = (make_folder(root / family / "base", rows=PADDING, family=family) for family in ("qwen3", "qwen2"))
    commands = {}
    for name in ROUND_TRIPS:
        folder = copy(second if name == "qwen2" else base, root / name / "m", old=name == "yarn")
        if name == "yarn":
            with_fields(folder, {"rope_scaling": {**YARN, "type": "yarn"}})
        elif name == "backbone_names":
            save({n.removeprefix("model."): t for n, t in tensors(base).items()}, folder / "model.safetensors")
        FILES.get(name, lambda _: None)(folder)
        commands[f"{name}/import"] = ["import", str(folder), str(root / name / "checkpoints")]
        commands[f"{name}/export"] = ["export", str(root / name / "checkpoints"), str(root / name / "hf")]
    ended = batch(root, commands)
    assert not [(name, end.error) for name, end in ended.items() if end.code != 0]
    return root


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_import_and_export_preserve_every_tensor(round_trips: Path, name: str) -> None:
    """Bit for bit, including padding rows; the exported configuration gives the same log-probs."""
    folder, result = round_trips / name / "m", round_trips / name / "hf"
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    source = round_trips / ("qwen2" if name == "qwen2" else "qwen3") / "base"
    back, want = tensors(result), {n: t.to(dtype) for n, t in tensors(source).items()}
    assert back.keys() == want.keys()
    assert all(torch.equal(back[n], want[n]) and back[n].dtype == dtype for n in want)
    config = json.loads((result / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {str(dtype).removeprefix("torch.")}
    ids = response(64)
    assert torch.equal(transformers_logprobs(result, ids), transformers_logprobs(folder, ids))
