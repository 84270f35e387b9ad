"""Finds the weight files of a Hugging Face folder and checks that they hold exactly the tensors of the model.

Reads only safetensors headers, plus the head of a tied model if a file has one. If a folder has two sets of weights,
transformers uses model.safetensors and SGLang uses the index, so such a folder is refused. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrl_megatron.model.config import read_json, require_not_lfs
from icrl_megatron.utils.errors import ConfigError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Supported dtypes of stored weights, with bytes per value. Other dtypes mean quantized weights."""
_MAX_HEADER_BYTES = 100_000_000
"""Maximum header size of the safetensors format."""
_COMPARED_BYTES = 8 << 20
_BACKBONE = ("embed_tokens.", "layers.", "norm.")
"""Prefixes of tensor names in folders with only the backbone, such as those of embedding models."""
_AGAIN = "copy the model's folder again"
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_FOREIGN = ("tf_model.h5", "flax_model.msgpack", "*.gguf", "*.onnx")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: Path
    name: str
    """Name in the file."""
    dtype: str
    """safetensors' name, e.g. BF16."""
    shape: tuple[int, ...]
    begin: int
    """Offset of its values in the file, in bytes."""
    bytes: int


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]], tied: bool) -> dict[str, Stored]:
    """Finds each of the `expected` tensors (name to shape). A tied model may also store a head equal to its embedding.

    Raises ConfigError naming the first file or tensor that is missing, unexpected, misshapen, quantized or damaged.
    """
    found = stored_tensors(folder)
    for name, tensor in found.items():
        if name not in expected and not (tied and name == HEAD):
            raise ConfigError(
                f"{tensor.file}: tensor {tensor.name} {_shape(tensor.shape)} is not part of the model that "
                "config.json describes; use a folder whose config.json and weights belong together"
            )
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, so it is quantized; use the bf16 folder"
            )
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(
                f"{folder}: tensor {name} is missing; the folder is damaged, or config.json is of another model"
            )
        if found[name].shape != shape:
            raise ConfigError(
                f"{found[name].file}: {found[name].name} has shape {_shape(found[name].shape)}, config.json implies "
                f"{_shape(shape)}; use a folder whose config.json and weights belong together"
            )
    if tied and HEAD in found:
        _check_tied_head(found[EMBEDDING], found.pop(HEAD))
    return found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, keyed by its name in transformers' causal language model. Raises ConfigError."""
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for tensor in _header(path):
            name = f"model.{tensor.name}" if tensor.name.startswith(_BACKBONE) else tensor.name
            if name in found:
                raise ConfigError(f"{folder}: tensor {name} is in {found[name].file.name} and in {path.name}; {_AGAIN}")
            found[name] = tensor
    if (folder / INDEX).exists():
        _check_index(folder, found)
    return found


def shard_name(number: int, count: int) -> str:
    """The name of one of `count` files, from 1, as transformers numbers them."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises ConfigError if this is ambiguous."""
    _refuse_others(folder)
    files, single, index = sorted(folder.glob("*.safetensors")), folder / SINGLE, folder / INDEX
    if index.exists():
        named = set(_weight_map(index).values())
        if single in files and SINGLE not in named:
            newest = max((single, index), key=lambda p: p.stat().st_mtime)
            raise ConfigError(
                f"{folder}: has both {SINGLE} and {INDEX}, and transformers and SGLang do not read the same one; if "
                f"{SINGLE} is the model, delete {INDEX} and the files it names ({', '.join(sorted(named)[:2])}, ...), "
                f"otherwise delete {SINGLE} ({newest.name} is newer)"
            )
        wanted = {folder / name for name in named}
    elif single in files or not files:
        wanted = {single}
    elif files == [folder / shard_name(1, 1)]:
        wanted = set(files)
    else:
        raise ConfigError(
            f"{folder}: has {files[0].name} but neither {SINGLE} nor {INDEX}, so shards may be missing; {_AGAIN}"
        )
    for extra in files:
        if extra not in wanted:
            raise ConfigError(
                f"{extra}: this file is not part of the model in {INDEX if index.exists() else SINGLE}; delete it, or "
                "copy the model's folder again"
            )
    return sorted(wanted)


def _refuse_others(folder: Path) -> None:
    """Raises ConfigError if the folder has adapters, or weights in an unsupported format."""
    for name in _ADAPTERS:
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name}: adapters are not applied; merge it into the model (peft's merge_and_unload, then "
                "save_pretrained into another folder), or delete it"
            )
    pickled = [path for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    if list(folder.glob("*.safetensors")):
        if pickled:
            raise ConfigError(
                f"{folder}: has weights in {pickled[0].name} and in safetensors, and only safetensors are read; delete "
                f"{pickled[0].name} if the safetensors are the model, otherwise convert it and delete them"
            )
        return
    for path in (*pickled, *(path for pattern in _FOREIGN for path in sorted(folder.glob(pattern)))):
        raise ConfigError(
            f"{path}: only safetensors are read; load the folder with transformers, and save model and tokenizer to "
            "another folder with save_pretrained"
        )


def _weight_map(index: Path) -> dict[str, str]:
    raw = read_json(index)
    where = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(where, dict) or not where:
        raise ConfigError(f"{index}: damaged (weight_map is missing or empty); {_AGAIN}")
    for tensor, file in where.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ConfigError(
                f"{index}: places {tensor} in {file!r}, which is not a safetensors file of this folder; {_AGAIN}"
            )
    return where


def _check_index(folder: Path, found: dict[str, Stored]) -> None:
    """Raises ConfigError unless index and files have the same tensors."""
    index = folder / INDEX
    told = _weight_map(index)
    held = {tensor.name: tensor.file.name for tensor in found.values()}
    for name, file in told.items():
        if held.get(name) != file:
            raise ConfigError(f"{index}: places {name} in {file}, which does not have it; {_AGAIN}")
    for name, file in held.items():
        if name not in told:
            raise ConfigError(f"{folder / file}: tensor {name} is not in {INDEX}; {_AGAIN}")


def _header(path: Path) -> Iterator[Stored]:
    """Yields the file's tensors. Raises ConfigError if it is missing, damaged or a Git LFS pointer."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(64)
            require_not_lfs(path, begin)
            (header_bytes,) = struct.unpack("<Q", begin[:8])
            if header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ConfigError(f"{path}: damaged (its header is cut off); {_AGAIN}")
            file.seek(8)
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        data = 8 + header_bytes
        found = [_stored(path, name, entry, data) for name, entry in header.items()]
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the file is missing; {_AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: damaged ({error!r}); {_AGAIN}") from error
    end = data
    for tensor in sorted(found, key=lambda t: t.begin):
        values = math.prod(tensor.shape) * DTYPES.get(tensor.dtype, 0)
        if tensor.begin != end or (values and values != tensor.bytes):
            raise ConfigError(f"{path}: damaged (the offsets of {tensor.name} do not fit its shape); {_AGAIN}")
        end += tensor.bytes
    if size != end:
        raise ConfigError(f"{path}: damaged ({size} bytes, its header says {end}); {_AGAIN}")
    yield from found


def _stored(path: Path, name: str, entry: dict[str, Any], data: int) -> Stored:
    start, end = entry["data_offsets"]
    return Stored(path, name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), data + start, end - start)


def _check_tied_head(embedding: Stored, head: Stored) -> None:
    """Raises ConfigError if they differ: transformers then does not tie them, whatever config.json says."""
    if head.dtype != embedding.dtype or head.shape != embedding.shape or not _equal_bytes(embedding, head):
        raise ConfigError(
            f"{head.file}: tie_word_embeddings=true in config.json, but {head.name} differs from {embedding.name}; set "
            "it to false if the head was trained separately, otherwise delete the tensor"
        )


def _equal_bytes(a: Stored, b: Stored) -> bool:
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.begin)
        other.seek(b.begin)
        left = a.bytes
        while left > 0:
            count = min(left, _COMPARED_BYTES)
            if one.read(count) != other.read(count):
                return False
            left -= count
    return True


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
