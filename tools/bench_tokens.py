"""Observations as tokens, for tools/bench_agents.py: our encoding and the tokenizer's own, in turns in one process."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.agents.formats import FORMATS
from icrl_megatron.agents.search import Search
from icrl_megatron.rollout.chat_template import tool_parts
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.types import Ids

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import qwen_tokenizers  # noqa: E402

CHUNK, LONGEST_WORDS = 500, 60


def speeds(count: int) -> dict[str, float]:
    """The observations are texts of 5 to LONGEST_WORDS words of this project's documents, each once."""
    tokenizer = qwen_tokenizers.build("qwen3")
    prompter, rng = Prompter(tokenizer, RolloutSettings()), random.Random(0)
    words = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))).split()
    found: dict[str, float] = {}
    for name, make in FORMATS.items():
        dialogue = make([Search.spec]).dialogue
        encode = {"own": encoder(tokenizer, dialogue), "ours": partial(shown, prompter, dialogue)}
        spent, differ = dict.fromkeys(encode, 0.0), 0
        for number, first in enumerate(range(0, count, CHUNK)):
            numbers = range(first, min(first + CHUNK, count))
            texts = [f"{' '.join(rng.choices(words, k=rng.randint(5, LONGEST_WORDS)))} {n}" for n in numbers]
            seen = {}
            for which in sorted(encode, reverse=number % 2 == 0):  # the second one finds words in the tokenizer's cache
                begun = time.process_time()
                seen[which] = [encode[which](text) for text in texts]
                spent[which] += time.process_time() - begun
            differ += sum(a != b for a, b in zip(seen["own"], seen["ours"], strict=True))
        found |= {
            f"{name}_speed": spent["own"] / spent["ours"],
            f"{name}_differ": differ,
            f"{name}_cpu_s": spent["ours"],
        }
    return found


def shown(prompter: Prompter, dialogue: Dialogue, text: str) -> Ids:
    return prompter.observation_ids([text], False, dialogue)


def encoder(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> Callable[[str], Ids]:
    """How the tokenizer itself encodes an observation: for tool messages in the template's rendering, as one text; for
    inline observations apart from the texts around it, which are encoded once."""

    def encode(text: str) -> Ids:
        return tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    if dialogue.observation == "tool":
        parts = tool_parts(tokenizer, {}, dialogue.tools)
        return lambda text: encode(f"{parts.head}{text}{parts.tail}")
    before, after = encode(dialogue.before), encode(dialogue.after)
    return lambda text: (*before, *encode(text), *after)
