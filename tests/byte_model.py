"""A random Qwen3 with a byte-level tokenizer, for task sets whose vocabulary is not known in advance."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(text: str, size: int, template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, like Qwen's: `size` tokens, with the merges of one text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)


def use_template(folder: Path, name: str) -> None:
    """Gives a model's tokenizer one of the published templates in the package trl, which have tools."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Path(str(distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja")))
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)


def build(folder: Path, positions: int = 1024, layers: int = 1, kv_heads: int = 1) -> Path:
    """Writes the model, fp32, to `folder`: one token per byte, except for a few merges."""
    tokenizer = byte_level("what is plus word", 266, CHATML)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
