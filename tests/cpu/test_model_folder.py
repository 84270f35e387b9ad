"""The model's folder: what is read of it, and what is said where it is damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from icrl_megatron import settings as S
from icrl_megatron.config import ConfigError, TinyModel
from icrl_megatron.shape import Qwen3Shape, check_folder
from icrl_megatron.validate import validate


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders are relative; and no test may take itself for a rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


QWEN3_4B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}


def write_safetensors(path: Path, values: int = 2) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4 * values)


def write_model(folder: Path, **changes: object) -> Path:
    """A folder with the configuration of Qwen3-4B and two tiny shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**QWEN3_4B, **changes}))
    (folder / "tokenizer.json").write_text("{}")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        write_safetensors(folder / name)
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_model_folder_is_read(tmp_path: Path) -> None:
    shape = check_folder(write_model(tmp_path / "m"))
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (36, 32, 8, 128, True)
    assert shape.padded_vocab(3) == 151938
    assert [shape.padded_vocab(tp) for tp in (1, 2, 4, 8)] == [151936] * 4


def test_single_file_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: the file is missing"):
        check_folder(folder)
    write_safetensors(folder / "model.safetensors")
    check_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not readable as a Qwen3 configuration"),
        (lambda f: (f / "config.json").write_text("[]"), "not readable as a Qwen3 configuration"),
        (lambda f: (f / "config.json").write_text('{"model_type": "qwen3"}'), "num_hidden_layers"),
        (lambda f: (f / "config.json").write_text('{"model_type": "qwen3_moe"}'), "'qwen3_moe'; only dense qwen3"),
        (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer is missing"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors: the file is"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'), "index.json"),
        (lambda f: truncate(f / "model-00001-of-00002.safetensors", 3), "damaged"),
        (lambda f: truncate(f / "model-00001-of-00002.safetensors", 40), "damaged (its header is cut off)"),
        (lambda f: truncate(f / "model-00001-of-00002.safetensors", -1), "bytes, its header says"),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"\1" + b"\0" * 7 + b"x"), "damaged"),
    ],
)
def test_damaged_model_folders(damage: object, message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        validate(S.load("qwen3_4b", [f"model.path={folder}"]))
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def truncate(path: Path, size: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:size])


def test_missing_model_folder_and_odd_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=nowhere: no such folder"):
        validate(S.load("qwen3_4b", ["model.path=nowhere"]))
    odd = write_model(tmp_path / "odd", num_attention_heads=0)
    with pytest.raises(ConfigError, match="not a positive integer"):
        validate(S.load("qwen3_4b", [f"model.path={odd}"]))
    scaled = write_model(tmp_path / "scaled", rope_scaling={"rope_type": "yarn"})
    with pytest.raises(ConfigError, match="'yarn' is not supported"):
        validate(S.load("qwen3_4b", [f"model.path={scaled}"]))


def test_shape_of_the_tiny_model() -> None:
    shape = Qwen3Shape.of_tiny(TinyModel(layers=3, heads=8), vocab=101)
    assert (shape.layers, shape.heads, shape.padded_vocab(2)) == (3, 8, 102)
