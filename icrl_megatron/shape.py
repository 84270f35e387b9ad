"""What a Hugging Face folder says of its model, read without torch, and whether the folder is whole."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrl_megatron.config import ConfigError, TinyModel

_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format allows no longer header."""


@dataclass(frozen=True)
class Qwen3Shape:
    """The numbers of a Hugging Face Qwen3 config.json that the trainer needs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    rope_base: float
    norm_eps: float
    max_positions: int

    @staticmethod
    def read(folder: Path) -> Qwen3Shape:
        """From `folder/config.json`. Raises ConfigError where it is missing, damaged or of another architecture."""
        path = folder / "config.json"
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("model_type") != "qwen3":
                raise ConfigError(f"{path}: model_type is {raw.get('model_type')!r}; only dense qwen3 can be trained")
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            if rope.get("rope_type", "default") != "default":
                raise ConfigError(f"{path}: rope_type {rope['rope_type']!r} is not supported; use the default RoPE")
            shape = Qwen3Shape(
                layers=raw["num_hidden_layers"],
                hidden=raw["hidden_size"],
                heads=raw["num_attention_heads"],
                kv_heads=raw["num_key_value_heads"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                ffn=raw["intermediate_size"],
                vocab=raw["vocab_size"],
                tied=raw.get("tie_word_embeddings", False),
                rope_base=raw.get("rope_theta") or rope.get("rope_theta", 1e6),
                norm_eps=raw["rms_norm_eps"],
                max_positions=raw["max_position_embeddings"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: not readable as a Qwen3 configuration ({error!r}); check model.path") from error
        numbers = (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, shape.vocab)
        if not all(isinstance(n, int) and n > 0 for n in (*numbers, shape.max_positions)):
            raise ConfigError(f"{path}: a size is not a positive integer ({shape}); check model.path")
        return shape

    @staticmethod
    def of_tiny(init: TinyModel, vocab: int = 0) -> Qwen3Shape:
        """Of the embedded model; its vocabulary is known only once its tokenizer is made, 0 until then."""
        return Qwen3Shape(
            layers=init.layers,
            hidden=init.hidden,
            heads=init.heads,
            kv_heads=init.kv_heads,
            head_dim=init.head_dim,
            ffn=init.ffn,
            vocab=vocab,
            tied=init.tie_embeddings,
            rope_base=1e4,
            norm_eps=1e-6,
            max_positions=init.max_positions,
        )

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding over all ranks: the vocabulary rounded up to a multiple of the TP size."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel


def check_folder(folder: Path) -> Qwen3Shape:
    """The shape of a whole Hugging Face folder: configuration, tokenizer and every weight shard are there and readable.

    Raises ConfigError naming the file that is missing or damaged. Reads headers only, so it is quick at any size.
    """
    if not folder.is_dir():
        raise ConfigError(f"model.path={folder}: no such folder; give a Hugging Face folder with a dense Qwen3")
    shape = Qwen3Shape.read(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ConfigError(f"{folder}: the tokenizer is missing (tokenizer.json); copy the model's folder again")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        check_safetensors(folder / "model.safetensors")
        return shape
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: cannot be read ({error!r}); copy the model's folder again") from error
    for shard in shards:
        check_safetensors(folder / shard)
    return shape


def check_safetensors(path: Path) -> None:
    """Raises ConfigError unless the file's header is whole and its size is what the header says."""
    remedy = "copy the model's folder again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ConfigError(f"{path}: damaged (its header is cut off); {remedy}")
            header = json.loads(file.read(header_bytes))
        end = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the file is missing; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: damaged ({error!r}); {remedy}") from error
    if size != 8 + header_bytes + end:
        raise ConfigError(f"{path}: damaged ({size} bytes, its header says {8 + header_bytes + end}); {remedy}")
