"""Small model folders: a complete one, modified copies, and folders of any size that take no disk space."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.model.weight_files import INDEX, shard_name
from icrl_megatron.plan.models import shape_of
from icrl_megatron.settings.schema import Settings

WORDS = [f"w{i}" for i in range(30)]
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
Tensors = dict[str, torch.Tensor]


def make_folder(folder: Path, tied: bool = True, rows: int = 0, family: str = "qwen3") -> Path:
    """A model with weights so large that every part affects the log-probs; its vocabulary has `rows` more rows than the
    tokenizer."""
    tokenizer = build_tokenizer(WORDS)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=tied, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published(folder: Path) -> None:
    """Writes config.json in the format of the published folders (transformers 4.51)."""

    def spell(config: dict[str, Any]) -> None:
        theta = config.pop("rope_parameters")["rope_theta"]
        del config["dtype"], config["layer_types"], config["pad_token_id"]
        config |= {"attention_bias": False} if config["model_type"] == "qwen3" else {}
        config |= {"bos_token_id": 0, "max_window_layers": 2, "rope_scaling": None, "rope_theta": int(theta)}
        config |= {"torch_dtype": "float32", "transformers_version": "4.51.0"}

    edit_config(folder, spell)


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def with_fields(folder: Path, fields: Mapping[str, Any]) -> None:
    edit_config(folder, lambda config: config.update(fields))


def copy(base: Path, out: Path, fields: Mapping[str, Any] | None = None, old: bool = False) -> Path:
    """A copy with these fields in its config.json, in the published format if `old`."""
    shutil.copytree(base, out)
    if old:
        published(out)
    with_fields(out, fields or {})
    return out


def tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def save(values: Tensors, path: Path) -> None:
    save_file(values, path, metadata={"format": "pt"})


def shard(folder: Path, files: int = 3) -> None:
    """Replaces the one weights file with several and an index."""
    values, where = tensors(folder), {}
    (folder / "model.safetensors").unlink()
    for i in range(files):
        name = shard_name(i + 1, files)
        part = {n: values[n] for n in sorted(values)[i::files]}
        save(part, folder / name)
        where.update(dict.fromkeys(part, name))
    write_index(folder, where)


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def read_index(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def write_sparse(path: Path, shape: ModelShape, dtype: str = "BF16") -> None:
    """Writes a sparse file with every tensor of a model of any size, all zeros, which takes no disk space."""
    header, end = {}, 0
    for name, size in shape.tensors().items():
        start, end = end, end + 2 * prod(size)
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def with_model(settings: Settings, folder: Path) -> Settings:
    """The settings with a model folder that passes all checks: configuration, tokenizer, and weights that are zero."""
    shape = shape_of(settings)
    config = {
        "model_type": shape.model_type, "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn, "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied,
        "rope_theta": shape.rope_base, "rms_norm_eps": shape.norm_eps, "max_position_embeddings": shape.max_positions,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write_sparse(folder / "model.safetensors", shape)
    return replace(settings, model=replace(settings.model, path=str(folder)))
