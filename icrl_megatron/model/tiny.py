"""The embedded model: random weights and a tokenizer of words or bytes, written as a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from icrl_megatron.model.families import FAMILIES
from icrl_megatron.settings.schema import TinyModel

PAD, END, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<|unk|>"
HEADERS = ("<|user|>", "<|assistant|>")
CRITIC_TAGS = ("<critic>", "</critic>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|> ' if message['role'] == 'assistant' else '<|user|> ' }}"
    "{{ message['content'] | trim }} <|im_end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
"""One header token per message; every role except assistant is written as the user."""

BYTE_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("|> '", "|>'").replace("|> {%", "|>{%").replace(" <|im_end|>", "<|im_end|>")
"""The same without spaces, each of which would be a token."""

_INITIALIZER_RANGE = 0.05
"""Qwen3's 0.02 is meant for widths in the thousands; with a width of 64, learning is several times slower."""

_QK_NORM_GAIN = 2.0
"""A head of 16 with unit gains cannot attend sharply: normalized q.k / sqrt(16) is at most 4. Gains of 2 make it 16."""


def build_tokenizer(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word: texts are words separated by single spaces, and decoding restores them.

    Words not in `vocabulary` become <|unk|>. Raises ValueError for a word that is empty or contains a space.
    """
    special = (PAD, END, UNKNOWN, *HEADERS)
    words = sorted(set(vocabulary) - set(special) - set(CRITIC_TAGS))
    for word in words:
        if word.split() != [word]:
            raise ValueError(f"{word!r} cannot be one token: a word is not empty and has no space in it")
    ids = {word: i for i, word in enumerate((*special, *CRITIC_TAGS, *words))}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Tags are text, not special tokens: decoding without special tokens must keep them. They are a token each even
    # where no space separates them from other words, as in trajectories that are read from files.
    tags = (*CRITIC_TAGS, *(word for word in words if re.fullmatch(r"</?\w+>", word)))
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return _finished(core, CHAT_TEMPLATE, unk_token=UNKNOWN)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8, which knows any text, and the tokens of `build_tokenizer`."""
    names = (PAD, END, *HEADERS, *CRITIC_TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in CRITIC_TAGS])
    return _finished(core, BYTE_CHAT_TEMPLATE)


def _finished(core: Tokenizer, chat_template: str, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(HEADERS),
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **tokens,
    )


def build_tiny(folder: Path, init: TinyModel, vocabulary: Iterable[str], seed: int) -> None:
    """Writes model and tokenizer to `folder` (created if missing), fp32, reproducible from `seed`. `vocabulary`: the
    words of `init.tokenizer=words`.

    The folder loads with AutoTokenizer and AutoModelForCausalLM; model and tokenizer have the same vocabulary.
    """
    tokenizer = build_byte_tokenizer() if init.tokenizer == "bytes" else build_tokenizer(vocabulary)
    family = FAMILIES[init.family]
    config = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))(
        vocab_size=len(tokenizer),
        hidden_size=init.hidden,
        intermediate_size=init.ffn,
        num_hidden_layers=init.layers,
        num_attention_heads=init.heads,
        num_key_value_heads=init.kv_heads,
        head_dim=init.head_dim,
        max_position_embeddings=init.max_positions,
        tie_word_embeddings=init.tie_embeddings,
        initializer_range=_INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.architecture)(config)
    for layer in model.model.layers if family.qk_norm else ():
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, _QK_NORM_GAIN)
        torch.nn.init.constant_(layer.self_attn.k_norm.weight, _QK_NORM_GAIN)
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # it would break into the run's progress bars
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
