"""The shape a plan is made for: read from the model's folder, or, before it was downloaded, known by its name."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from icrl_megatron.model.rope import Yarn
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.run import start
from icrl_megatron.settings.loading import model_folder
from icrl_megatron.settings.rollout_schema import TEMPLATES
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Teachable
from icrl_megatron.utils.errors import ConfigError

_VOCABULARY, _POSITIONS = 151_936, 40_960


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> ModelShape:
    return ModelShape(layers, hidden, heads, 8, 128, ffn, _VOCABULARY, tied, 1e6, 1e-6, _POSITIONS)


def _2507(shape: ModelShape) -> ModelShape:
    """The model of this shape that was published in July 2025, for longer contexts."""
    return replace(shape, rope_base=5e6, max_positions=262_144)


def _extended(shape: ModelShape, factor: float = 4.0, original: int = 32_768) -> ModelShape:
    """The same model with the YaRN of its card in config.json (docs/MODELS.md)."""
    yarn = Yarn(factor, original, attention_factor=0.1 * math.log(factor) + 1.0)
    return replace(shape, yarn=yarn, max_positions=yarn.positions)


def _qwen2(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool) -> ModelShape:
    head = hidden // heads
    return ModelShape(layers, hidden, heads, kv_heads, head, ffn, vocab, tied, 1e6, 1e-6, 32_768, None, "qwen2")


PUBLISHED: dict[str, ModelShape] = {
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen3-4B-Instruct-2507": _2507(_qwen3(36, 2560, 32, 9728, tied=True)),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12288, tied=False),
    "Qwen3-8B-131k": _extended(_qwen3(36, 4096, 32, 12288, tied=False)),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17408, tied=False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25600, tied=False),
    "Qwen2.5-0.5B-Instruct": _qwen2(24, 896, 14, 2, 4864, 151_936, tied=True),
    "Qwen2.5-1.5B-Instruct": _qwen2(28, 1536, 12, 2, 8960, 151_936, tied=True),
    "Qwen2.5-3B-Instruct": _qwen2(36, 2048, 16, 2, 11_008, 151_936, tied=True),
    "Qwen2.5-7B-Instruct": _qwen2(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    "Qwen2.5-14B-Instruct": _qwen2(48, 5120, 40, 8, 13_824, 152_064, tied=False),
    "Qwen2.5-32B-Instruct": _qwen2(64, 5120, 40, 8, 27_648, 152_064, tied=False),
}
"""Published models by the name of their folder: their own config.json, or, for 131k, with the YaRN of their card."""

_TEMPLATES = Path(__file__).parents[1] / "rollout" / "templates"
_BYTES = 256
_SPECIAL_TOKENS = 16
"""Upper bound of what the embedded tokenizer adds to the words."""


def shape_of(settings: Settings) -> ModelShape:
    """The model's shape. Raises ConfigError where neither a folder nor the name of one says it."""
    model = settings.model
    if settings.start_from:
        return ModelShape.read(start.configuration(settings))
    if model.path:
        folder = model_folder(settings)
        if folder.is_dir():
            return ModelShape.read(folder)
        if folder.name in PUBLISHED:
            return PUBLISHED[folder.name]
        raise ConfigError(
            f"model.path={model.path}: no such folder, and its name is none of {', '.join(PUBLISHED)}, whose shape "
            "is known; give a Hugging Face folder"
        )
    if model.init is None:
        raise ConfigError("model.path is empty: name the model to plan for, e.g. model.path=models/Qwen3-8B")
    return ModelShape.of_tiny(model.init, _tiny_vocabulary(settings))


def _tiny_vocabulary(settings: Settings) -> int:
    if settings.model.init is not None and settings.model.init.tokenizer == "bytes":
        return _BYTES + _SPECIAL_TOKENS
    words = _template_words(settings.rollout.templates)
    for source in settings.tasks.sources:
        task_set = registry.of_source(source)
        if isinstance(task_set, Teachable):
            words |= set(task_set.vocabulary())
    return len(words) + _SPECIAL_TOKENS


def _template_words(name: str) -> set[str]:
    """As `rollout.prompts.template_words`, which would import the tokenizers' libraries."""
    folder = Path(name) if name not in TEMPLATES else _TEMPLATES / name
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja")))
    return set(re.sub(r"{[{%#].*?[}%#]}", " ", text, flags=re.DOTALL).split())
