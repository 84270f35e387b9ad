"""The real SGLang on folders that are not plain: YaRN in every spelling, and more rows than the tokenizer has words."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    CONTEXT,
    UNTIED,
    engine_on,
    engine_settings,
    generate,
    load,
    reference_logprobs,
    serving,
    weights,
)
from model_folders import WORDS, copy, make_folder, save, tensors, with_fields

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.model.rotary import yarn_frequencies
from icrl_megatron.model.shape import ModelShape, check_folder

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOLERANCE = 1e-4
ROWS = 300
"""Rows without a token: most of what a random model samples."""
POSITIONS = 256
CARD = {"factor": 4.0, "original_max_position_embeddings": POSITIONS // 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folders") / "model", tied=False, rows=ROWS)


def test_yarn_and_rows_without_a_token_are_as_in_transformers(base: Path, tmp_path: Path) -> None:
    """Spelled as on Qwen3's model cards, beyond max_position_embeddings, in one numbered shard with names of the
    backbone alone."""
    plain, folder = (copy(base, tmp_path / n, {"rope_scaling": {**CARD, "type": "yarn"}}, old=True) for n in "ab")
    (folder / "model.safetensors").unlink()
    named = {name.removeprefix("model."): tensor for name, tensor in tensors(base).items()}
    save(named, folder / "model-00001-of-00001.safetensors")
    assert check_folder(folder).max_positions == CONTEXT > POSITIONS
    reference, words = load(plain), len(WORDS) + 7
    prompts = [[8 + (i + j) % 30 for j in range(length)] for i, length in enumerate((3, 60, 200, 400))]
    requests = [(prompt, Sampling(1.0, 64, seed, ())) for seed, prompt in enumerate(prompts)]
    with serving(folder, tmp_path, engine_settings()) as server:
        engine = engine_on(server, folder, engine_settings())
        engine.verify(iter(weights(reference)), UNTIED)  # as it read the folder by itself
        engine.update_weights(weights(reference), 1)
        replies = generate(engine, requests)
        for prompt, done in zip(prompts, replies, strict=True):
            want = reference_logprobs(reference, prompt, done.ids, 1.0)
            assert (want - torch.tensor(done.logprobs)).abs().max() < TOLERANCE
        sampled = [i for done in replies for i in done.ids]  # a reply may end early: SGLang ignores seeds
        assert len(sampled) > 20 and any(i >= words for i in sampled)


SECTIONS: dict[str, dict[str, Any]] = {
    "card": {"rope_scaling": {**CARD, "rope_type": "yarn"}},
    "old": {"rope_scaling": {**CARD, "type": "yarn"}},
    "new": {"rope_parameters": {**CARD, "rope_type": "yarn", "rope_theta": 5e5}},
    "no_original": {"rope_scaling": {"type": "yarn", "factor": 2.5}},
    "no_attention_factor": {
        "rope_scaling": {**CARD, "type": "yarn", "attention_factor": 1.0, "attn_factor": 1 / (0.1 * math.log(4) + 1)}
    },
    "every_field": {
        "rope_scaling": {
            **CARD, "rope_type": "yarn", "beta_fast": 8, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.4,
            "truncate": False,
        }
    },
    "plain": {"rope_theta": 1234.5},
    "no_theta": {},
}  # fmt: skip
ASK = """
import json, sys
from sglang.srt.utils.hf_transformers_utils import get_config
from sglang.srt.layers.rotary_embedding import get_rope
for folder in sys.argv[1:]:
    config = get_config(folder, trust_remote_code=False)
    told = config.rope_parameters  # as in sglang's Qwen3DecoderLayer
    assert "rope_theta" in told
    dim = config.head_dim
    rope = get_rope(dim, rotary_dim=dim, max_position=config.max_position_embeddings, base=told["rope_theta"],
                    rope_scaling=told)
    print(json.dumps(rope.cos_sin_cache[:256].float().tolist()))
"""


def test_rotary_embeddings_are_read_as_here(base: Path, tmp_path: Path) -> None:
    """Cosines and sines times the attention factor, of SGLang's own modules for the same folders."""
    folders = []
    for name, fields in SECTIONS.items():
        folders.append(copy(base, tmp_path / name, old=True))
        with_fields(folders[-1], {"rope_theta": 10000, **fields})
        drop = ["rope_theta"] if "rope_parameters" in fields or name == "no_theta" else []
        config = json.loads((folders[-1] / "config.json").read_text())
        (folders[-1] / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    command = [os.environ["ICRL_ENGINE_PYTHON"], "-c", ASK, *map(str, folders)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    for folder, theirs in zip(folders, tables, strict=True):
        shape = ModelShape.read(folder)
        frequencies, factor = 1.0 / shape.rope_base ** (torch.arange(0, 16, 2) / 16), 1.0
        if shape.yarn is not None:
            frequencies = yarn_frequencies(shape.yarn, shape.rope_base, 16)
            factor = shape.yarn.attention_factor
        angles = torch.outer(torch.arange(256, dtype=torch.float32), frequencies)
        mine = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
        torch.testing.assert_close(torch.tensor(theirs), mine, atol=2e-5, rtol=0, msg=folder.name)
