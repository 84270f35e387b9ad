"""Actors of Qwen3 shapes with random weights, and packed plans for them: what the GPU tools measure.

The weights are Megatron's own initialization, made on the device: no file is written or read.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("LOCAL_RANK", "0")  # of a rank, the platform asks for the GPU's FP8 before Megatron is imported
for _part in (".", "kernels", "recipes"):  # without an installation too
    sys.path.insert(0, str(Path(__file__).parents[1] / _part))

from icrl_megatron.distributed import before_megatron  # noqa: E402, F401, I001  # first of all
from icrl_megatron.data.packing import lay_out, pack  # noqa: E402
from icrl_megatron.distributed import platform  # noqa: E402
from icrl_megatron.settings.schema import Settings  # noqa: E402
from icrl_megatron.types import Sample, SampleTokens, StepPlan, id_array, logprob_array  # noqa: E402

VOCABULARY = 151936


@dataclass(frozen=True)
class Shape:
    """A Qwen3's dimensions, as its config.json has them."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    tied: bool
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = VOCABULARY

    def config(self) -> dict[str, object]:
        """Fields of config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "attention_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
            "eos_token_id": 1,
            "bos_token_id": 0,
        }


SHAPES = {
    "0.6b": Shape(28, 1024, 16, 3072, True),
    "1.7b": Shape(28, 2048, 16, 6144, True),
    "4b": Shape(36, 2560, 32, 9728, True),
    "8b": Shape(36, 4096, 32, 12288, False),
    "small": Shape(4, 512, 8, 1536, True, kv_heads=4, head_dim=128, vocab=4096),
    "tiny": Shape(2, 64, 4, 192, True, kv_heads=2, head_dim=16, vocab=256),
}
"""The first four are the published dense models (their config.json); the others are for checks."""


def write_config(folder: Path, name: str) -> Path:
    """A folder that holds only the configuration of a shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name].config()))
    return folder


def settings(precision: str, layers: str, fp8: str = "off", recompute: str = "none", tokens: int = 8192) -> Settings:
    """Default ICRL settings for one GPU."""
    found = Settings()
    found.actor.precision, found.actor.layers, found.actor.fp8 = precision, layers, fp8
    found.actor.recompute, found.actor.micro_batch_tokens = recompute, tokens
    found.launch.ranks = 1
    return found


def plan(of: Settings, vocab: int, lengths: list[tuple[int, int]], seed: int = 0) -> StepPlan:
    """One update of packed sequences: (prompt tokens, response tokens) each, with random ids and advantages."""
    draw = random.Random(seed)
    samples, tokens = [], {}
    for number, (prompt, response) in enumerate(lengths):
        ids, reply = (tuple(draw.randrange(2, vocab) for _ in range(n)) for n in (prompt, response))
        logprobs = tuple(-draw.uniform(2.0, 5.0) for _ in reply)
        advantage = draw.uniform(-1.0, 1.0)
        lengths = prompt, prompt, response, response
        samples.append(Sample(f"t#{number}", "t", "attempt", 0, *lengths, True, False, 1.0, advantage))
        prompt_ids, mask = id_array(ids), np.ones(response, dtype=np.bool_)
        streams = id_array(reply), mask, logprob_array(logprobs), np.zeros(response, dtype=np.bool_)
        tokens[f"t#{number}"] = SampleTokens(prompt_ids, prompt_ids, *streams)
    layout = lay_out(samples, of.algo, micro_batch_tokens=of.actor.micro_batch_tokens)
    return pack(layout, tokens, align=platform.token_multiple(of.actor))
