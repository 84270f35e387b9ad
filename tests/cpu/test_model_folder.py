"""The files of a model folder: which contain the weights, and the errors for damaged, extra or missing files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_folders import copy, make_folder, read_index, save, shard, tensors, with_fields, write_index, write_sparse

from icrl_megatron.engines.sglang_build import tensor_shapes
from icrl_megatron.model.shape import ModelShape, check_folder, locate_weights
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.run.checks import validate
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.utils.errors import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3945441440\n"
Damage = Callable[[Path], object]


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base") / "tied")


@pytest.fixture(scope="module")
def sharded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(base, tmp_path_factory.mktemp("sharded") / "model")
    shard(folder)
    return folder


def test_folder_is_checked_without_importing_torch(base: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from icrl_megatron.model.shape import check_folder
shape = check_folder(Path({str(base)!r}))
assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (2, 4, 2, 16, True)
assert not {{"torch", "transformers", "safetensors", "numpy"}} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("tied", [True, False])
def test_expected_tensors_are_those_that_transformers_saves(tmp_path: Path, tied: bool) -> None:
    folder = make_folder(tmp_path / "m", tied)
    stored = {name: tuple(tensor.shape) for name, tensor in tensors(folder).items()}
    assert check_folder(folder).tensors() == stored == tensor_shapes(folder)


def test_check_of_a_large_model_reads_only_headers(base: Path, tmp_path: Path) -> None:
    shape = PUBLISHED["Qwen3-8B"]
    folder = copy(base, tmp_path / "m")
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.ffn, "vocab_size": shape.vocab, "head_dim": 128}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": 8, "num_hidden_layers": shape.layers}
    with_fields(folder, {**sizes, **heads, "tie_word_embeddings": False, "layer_types": None})
    write_sparse(folder / WEIGHTS, shape)
    assert (folder / WEIGHTS).stat().st_size > 16e9
    before = time.monotonic()
    assert check_folder(folder).vocab == 151936
    assert time.monotonic() - before < 2.0
    write_sparse(folder / WEIGHTS, replace(shape, layers=35))
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.35\.input_layernorm\.weight is missing"):
        check_folder(folder)


ACCEPTED: dict[str, Damage] = {
    "shards": shard,
    "one_shard": lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00001.safetensors"),
    "index_of_one_file": lambda f: write_index(f, dict.fromkeys(tensors(f), WEIGHTS)),
    "backbone_names": lambda f: save({n.removeprefix("model."): t for n, t in tensors(f).items()}, f / WEIGHTS),
    "same_head": lambda f: save({**tensors(f), "lm_head.weight": embedding(f).clone()}, f / WEIGHTS),
    "other_files": lambda f: [
        (f / name).write_bytes(b"\x80") for name in ("training_args.bin", "optimizer.pt", "README.md", "model.gguf")
    ],
    "old_tokenizer": lambda f: [
        (f / "tokenizer.json").unlink(),
        (f / "tokenizer_config.json").unlink(),
        (f / "vocab.json").write_text('{"a": 0, "b": 36}'),
    ],
}


def embedding(folder: Path) -> torch.Tensor:
    return tensors(folder)["model.embed_tokens.weight"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_formats_locate_every_tensor(base: Path, tmp_path: Path, name: str) -> None:
    folder = copy(base, tmp_path / "m")
    ACCEPTED[name](folder)
    found = locate_weights(folder, check_folder(folder))
    assert found.keys() == tensors(base).keys()


def leave_out(folder: Path, name: str) -> None:
    save({n: t for n, t in tensors(folder).items() if n != name}, folder / WEIGHTS)


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save({**tensors(folder), name: tensor}, folder / WEIGHTS)


def stale_index(folder: Path) -> None:
    whole = tensors(folder)
    shard(folder)
    save(whole, folder / WEIGHTS)


REJECTED: dict[str, tuple[Damage, str]] = {
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: the file is missing"),
    "no_tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer is missing (tokenizer.json)"),
    "missing": (lambda f: leave_out(f, "model.norm.weight"), "tensor model.norm.weight is missing"),
    "bias": (
        lambda f: add(f, "model.layers.1.self_attn.q_proj.bias", torch.ones(64)),
        "tensor model.layers.1.self_attn.q_proj.bias (64) is not part of the model",
    ),
    "reward_head": (lambda f: add(f, "score.weight", torch.ones(1, 32)), "tensor score.weight (1, 32) is not part"),
    "wrapped_names": (
        lambda f: save({f"module.{n}": t for n, t in tensors(f).items()}, f / WEIGHTS),
        "tensor module.model.",
    ),
    "more_layers": (
        lambda f: with_fields(f, {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        "tensor model.layers.1.input_layernorm.weight (32) is not part",
    ),
    "other_width": (
        lambda f: with_fields(f, {"intermediate_size": 40}),
        "model.layers.0.mlp.gate_proj.weight has shape (64, 32), config.json implies (40, 32)",
    ),
    "head_dim_absent": (
        lambda f: with_config(f, lambda c: c.pop("head_dim")),
        "q_proj.weight has shape (64, 32), config.json implies (512, 32)",
    ),
    "quantized": (
        lambda f: add(f, "model.layers.0.mlp.up_proj.weight", torch.ones(64, 32).to(torch.float8_e4m3fn)),
        "tensor model.layers.0.mlp.up_proj.weight is F8_E4M3, so it is quantized",
    ),
    "scales": (
        lambda f: add(f, "model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        "tensor model.layers.0.mlp.up_proj.weight_scale_inv (1, 1) is not part",
    ),
    "int8": (lambda f: add(f, "model.norm.weight", torch.ones(32, dtype=torch.int8)), "model.norm.weight is I8"),
    "other_head": (
        lambda f: add(f, "lm_head.weight", embedding(f) * 2),
        "tie_word_embeddings=true in config.json, but lm_head.weight differs from model.embed_tokens.weight",
    ),
    "head_of_another_dtype": (
        lambda f: add(f, "lm_head.weight", embedding(f).bfloat16()),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "untied_without_head": (
        lambda f: with_fields(f, {"tie_word_embeddings": False}),
        "tensor lm_head.weight is missing",
    ),
    "both_spellings_of_a_name": (
        lambda f: add(f, "norm.weight", torch.ones(32)),
        "tensor model.norm.weight is in model.safetensors and in model.safetensors",
    ),
    "stale_index": (stale_index, f"if {WEIGHTS} is the model, delete {INDEX} and the files it names"),
    "stray_shard": (
        lambda f: save({"x": torch.ones(1)}, f / "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors: this file is not part of the model",
    ),
    "shards_without_index": (lambda f: [shard(f), (f / INDEX).unlink()], "so shards may be missing"),
    "pickled_only": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin: only safetensors are read; load the folder with",
    ),
    "pickled_too": (lambda f: (f / "pytorch_model.bin").touch(), "has weights in pytorch_model.bin and in safetensors"),
    "gguf_only": (lambda f: (f / WEIGHTS).rename(f / "qwen3-q4.gguf"), "qwen3-q4.gguf: only safetensors are read"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json: adapters"),
    "weights_are_a_pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), f"{WEIGHTS}: a Git LFS pointer"),
    "tokenizer_is_a_pointer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "run `git lfs pull` in"),
    "tokenizer_is_not_json": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: cannot be read as"),
    "tokenizer_is_damaged": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": [1]}}'),
        "tokenizer.json: damaged",
    ),
    "fewer_rows_than_tokens": (
        lambda f: [with_fields(f, {"vocab_size": 36}), add(f, "model.embed_tokens.weight", embedding(f)[:36].clone())],
        "has id 36, but the model has 36 rows (vocab_size)",
    ),
    "token_without_a_row": (
        lambda f: with_config(
            f, lambda c: c.update(added_tokens_decoder={"90": {"content": "<tool>"}}), "tokenizer_config.json"
        ),
        "tokenizer_config.json: token '<tool>' has id 90",
    ),
}


def with_config(folder: Path, change: Callable[[dict[str, object]], object], name: str = "config.json") -> None:
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))


REJECTED_SHARDS: dict[str, tuple[Damage, str]] = {
    "shard_missing": (lambda f: (f / SECOND).unlink(), f"{SECOND}: the file is missing"),
    "index_empty": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: damaged (weight_map is missing"),
    "index_of_lists": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), f"{INDEX}: damaged"),
    "index_cut": (lambda f: (f / INDEX).write_text('{"weight_map'), f"{INDEX}: cannot be read as JSON"),
    "index_leaves_the_folder": (
        lambda f: write_index(f, {**read_index(f), "model.norm.weight": "../other.safetensors"}),
        "places model.norm.weight in '../other.safetensors'",
    ),
    "index_names_a_missing_file": (
        lambda f: write_index(f, {**read_index(f), "more": "model-00004-of-00004.safetensors"}),
        "model-00004-of-00004.safetensors: the file is missing",
    ),
    "index_omits_a_tensor": (
        lambda f: write_index(f, {n: file for n, file in read_index(f).items() if n != "model.norm.weight"}),
        f"tensor model.norm.weight is not in {INDEX}",
    ),
    "index_names_too_many": (
        lambda f: write_index(f, {**read_index(f), "model.nonsense": FIRST}),
        f"places model.nonsense in {FIRST}, which does not have it",
    ),
    "index_mixes_up_files": (
        lambda f: write_index(f, {n: FIRST if file == SECOND else file for n, file in read_index(f).items()}),
        f"{SECOND}: this file is not part of the model",
    ),
    "tensor_in_two_shards": (lambda f: shutil.copy(f / FIRST, f / SECOND), f"is in {FIRST} and in {SECOND}"),
    "cut_at_3": (lambda f: truncate(f / FIRST, 3), f"{FIRST}: damaged"),
    "cut_in_the_header": (lambda f: truncate(f / FIRST, 40), f"{FIRST}: damaged (its header is cut off)"),
    "cut_at_the_end": (lambda f: truncate(f / FIRST, -1), "bytes, its header says"),
    "noise": (lambda f: (f / FIRST).write_bytes(b"\1" + b"\0" * 7 + b"x"), f"{FIRST}: damaged"),
    "overlapping": (lambda f: rewrite_header(f / FIRST), f"{FIRST}: damaged (the offsets of"),
}


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite_header(path: Path) -> None:
    """Shifts the start of the first tensor's data, so that its offsets no longer match its shape."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first = next(entry for name, entry in header.items() if name != "__metadata__")
    first["data_offsets"][0] += 4
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def message_of(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(S.load("qwen3_4b", [f"model.path={folder}", "engine.kind=local"]))
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", REJECTED)
def test_ambiguous_and_damaged_folders_are_rejected(base: Path, tmp_path: Path, name: str) -> None:
    damage, message = REJECTED[name]
    damage(copy(base, tmp_path / "m"))
    assert message in message_of(tmp_path / "m")


@pytest.mark.parametrize("name", REJECTED_SHARDS)
def test_ambiguous_and_damaged_shards_are_rejected(sharded: Path, tmp_path: Path, name: str) -> None:
    damage, message = REJECTED_SHARDS[name]
    shutil.copytree(sharded, tmp_path / "m")
    damage(tmp_path / "m")
    assert message in message_of(tmp_path / "m")


def test_missing_model_folder_is_rejected_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.path=nowhere: no such folder"):
        validate(S.load("qwen3_4b", ["model.path=nowhere"]))


def test_tiny_model_shape_and_padded_vocabulary() -> None:
    shape = ModelShape.of_tiny(TinyModel(layers=3, heads=8), vocab=101)
    assert (shape.layers, shape.heads, shape.padded_vocab(2)) == (3, 8, 102)
    assert [PUBLISHED["Qwen3-4B"].padded_vocab(tp) for tp in (1, 2, 3, 8)] == [151936, 151936, 151938, 151936]
