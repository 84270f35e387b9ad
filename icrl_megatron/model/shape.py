"""The dimensions of a dense decoder, and the validation of its Hugging Face folder. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from icrl_megatron.model.config import read_config, read_json
from icrl_megatron.model.families import FAMILIES
from icrl_megatron.model.family import Family
from icrl_megatron.model.rope import Yarn, read_rope
from icrl_megatron.model.weight_files import EMBEDDING, HEAD, Stored, check_weights
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """The fields of a Hugging Face config.json that the trainer needs."""

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
    """Longest sequence: max_position_embeddings, or YaRN's extended length."""
    yarn: Yarn | None = None
    model_type: str = "qwen3"
    """Name of the family (`families.FAMILIES`)."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @staticmethod
    def read(folder: Path) -> ModelShape:
        """Reads `folder/config.json`. Raises ConfigError if it is missing or damaged, or describes an unsupported
        model."""
        path = folder / "config.json"
        fields = read_config(path)
        rope = read_rope(fields, fields["max_position_embeddings"], path)
        return ModelShape(
            layers=fields["num_hidden_layers"],
            hidden=fields["hidden_size"],
            heads=fields["num_attention_heads"],
            kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
            ffn=fields["intermediate_size"],
            vocab=fields["vocab_size"],
            tied=fields["tie_word_embeddings"],
            rope_base=rope.theta,
            norm_eps=fields["rms_norm_eps"],
            max_positions=rope.yarn.positions if rope.yarn else fields["max_position_embeddings"],
            yarn=rope.yarn,
            model_type=fields["model_type"],
        )

    @staticmethod
    def of_tiny(init: TinyModel, vocab: int = 0) -> ModelShape:
        """The shape of the embedded model; `vocab` is 0 until its tokenizer is built."""
        return ModelShape(
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
            model_type=init.family,
        )

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding over all ranks: the vocabulary rounded up to a multiple of the TP size."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel

    def splits_over(self, workers: int) -> bool:
        """Whether SGLang can shard the model over this many GPUs: query heads and MLP evenly, and each GPU has whole
        key-value heads, or each key-value head is on equally many GPUs."""
        whole = self.kv_heads % workers == 0 or workers % self.kv_heads == 0
        return whole and self.heads % workers == 0 and self.ffn % workers == 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model: Hugging Face name to shape; a tied model has no head."""
        hidden, queries, keys = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.ffn, hidden),
            "mlp.up_proj": (self.ffn, hidden),
            "mlp.down_proj": (hidden, self.ffn),
        }
        sizes: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in layer.items()}
        if self.family.qk_norm:
            sizes |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        if self.family.qkv_bias:
            sizes |= {f"self_attn.{name}_proj.bias": layer[f"self_attn.{name}_proj"][:1] for name in "qkv"}
        found: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab, hidden)}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}": size for name, size in sizes.items()}
        found["model.norm.weight"] = (hidden,)
        return found if self.tied else {**found, HEAD: (self.vocab, hidden)}

    def parameters(self) -> int:
        """How many there are; a tied embedding counts once."""
        return sum(map(prod, self.tensors().values()))


def check_folder(folder: Path) -> ModelShape:
    """The shape of a Hugging Face folder that can be trained faithfully: every field of config.json is supported, the
    weights are exactly the model's tensors, and every token of the tokenizer has a row.

    Raises ConfigError naming the file, field or tensor, its value and the remedy. Reads JSON files and headers (and the
    head of a tied model if it is stored), so it is fast for models of any size.
    """
    if not folder.is_dir():
        raise ConfigError(f"model.path={folder}: no such folder; give a Hugging Face folder ({' or '.join(FAMILIES)})")
    shape = ModelShape.read(folder)
    locate_weights(folder, shape)
    _check_tokenizer(folder, shape.vocab)
    return shape


def locate_weights(folder: Path, shape: ModelShape) -> dict[str, Stored]:
    """Finds each tensor of the model. Raises ConfigError unless the folder has exactly these tensors."""
    return check_weights(folder, shape.tensors(), shape.tied)


def _check_tokenizer(folder: Path, rows: int) -> None:
    """Raises ConfigError if the tokenizer is missing or damaged, or has ids beyond the rows of the embedding."""
    files = [folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()][:1]
    if not files:
        raise ConfigError(f"{folder}: the tokenizer is missing (tokenizer.json); copy the model's folder again")
    files += [folder / name for name in ("added_tokens.json", "tokenizer_config.json") if (folder / name).is_file()]
    for path in files:
        raw = read_json(path)
        try:
            i, token = max(_tokens(path.name, raw), default=(-1, ""))
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ConfigError(f"{path}: damaged ({error!r}); copy the model's folder again") from error
        if i >= rows:
            raise ConfigError(
                f"{path}: token {token!r} has id {i}, but the model has {rows} rows (vocab_size); add rows with "
                "transformers (resize_token_embeddings), or remove the token from the tokenizer"
            )


def _tokens(file: str, raw: Any) -> list[tuple[int, str]]:
    """(id, token) for every token in a tokenizer file."""
    if file == "tokenizer_config.json":
        added = raw.get("added_tokens_decoder") or {}
        return [(int(i), str(token["content"])) for i, token in added.items()]
    if file != "tokenizer.json":
        return [(int(i), token) for token, i in raw.items()]
    words = (raw.get("model") or {}).get("vocab") or {}
    if isinstance(words, list):  # unigram: pairs of a token and its score
        found = [(i, str(pair[0])) for i, pair in enumerate(words)]
    else:
        found = [(int(i), token) for token, i in words.items()]
    return found + [(int(token["id"]), str(token["content"])) for token in raw.get("added_tokens") or []]
