"""The shape a plan is made for: read from the model's folder, or, before it was downloaded, known by its name."""

from __future__ import annotations

import re
from pathlib import Path

from icrl_megatron.model.shape import Qwen3Shape
from icrl_megatron.run import start
from icrl_megatron.settings.loading import model_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Teachable
from icrl_megatron.utils.errors import ConfigError

_VOCABULARY, _POSITIONS = 151_936, 40_960


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> Qwen3Shape:
    return Qwen3Shape(layers, hidden, heads, 8, 128, ffn, _VOCABULARY, tied, 1e6, 1e-6, _POSITIONS)


PUBLISHED: dict[str, Qwen3Shape] = {
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12288, tied=False),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17408, tied=False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25600, tied=False),
}
"""The dense Qwen3 family by the name of its folder (the models' own config.json)."""

_TEMPLATES = Path(__file__).parents[1] / "rollout" / "templates"
_SPECIAL_TOKENS = 16
"""Upper bound of what the embedded tokenizer adds to the words."""


def shape_of(settings: Settings) -> Qwen3Shape:
    """The model's shape. Raises ConfigError where neither a folder nor the name of one says it."""
    model = settings.model
    if settings.start_from:
        return Qwen3Shape.read(start.configuration(settings))
    if model.path:
        folder = model_folder(settings)
        if folder.is_dir():
            return Qwen3Shape.read(folder)
        if folder.name in PUBLISHED:
            return PUBLISHED[folder.name]
        raise ConfigError(
            f"model.path={model.path}: no such folder, and its name is none of {', '.join(PUBLISHED)}, whose shape "
            "is known; give a Hugging Face folder with a dense Qwen3"
        )
    if model.init is None:
        raise ConfigError("model.path is empty: name the model to plan for, e.g. model.path=models/Qwen3-8B")
    return Qwen3Shape.of_tiny(model.init, _tiny_vocabulary(settings))


def _tiny_vocabulary(settings: Settings) -> int:
    words = _template_words(settings.rollout.templates)
    for source in settings.tasks.sources:
        task_set = registry.get(source.name)
        if isinstance(task_set, Teachable):
            words |= set(task_set.vocabulary())
    return len(words) + _SPECIAL_TOKENS


def _template_words(name: str) -> set[str]:
    """As `rollout.prompts.template_words`, which would import the tokenizers' libraries."""
    folder = Path(name) if name not in ("standard", "compact") else _TEMPLATES / name
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja")))
    return set(re.sub(r"{[{%#].*?[}%#]}", " ", text, flags=re.DOTALL).split())
