"""Reads and writes the files of a Hugging Face folder other than weights: configuration, tokenizer, templates,
license."""

from __future__ import annotations

import re
from pathlib import Path

from icrl_megatron.utils.errors import ConfigError

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|distcp|pkl|pickle|gguf|ggml|h5|hdf5|msgpack|onnx|onnx_data|tflite|ot|npz|npy|zip|"
    r"tar|gz)$|\.index\.json$",
    re.IGNORECASE,
)
_CODE = re.compile(r"\.(py|pyc|so)$")
"""Never executed (trust_remote_code is off), so not copied."""
_TEMPLATES = "additional_chat_templates"
_LARGEST = 256 << 20
"""Maximum size in bytes. The largest tokenizers have about 40 MiB; larger files are weights under another name."""


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file of a Hugging Face folder that is neither weights nor code, about 10 to 40 MiB in
    total; additional chat templates (additional_chat_templates/*.jinja) by their relative path.

    Raises ConfigError if there is no config.json, or a file cannot be read.
    """
    found: dict[str, bytes] = {}
    try:
        for path in (*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")):
            if _is_side_file(path):
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); restore the model's folder"
        ) from error
    if "config.json" not in found:
        raise ConfigError(f"{folder}: has no config.json; name a complete Hugging Face folder")
    return dict(sorted(found.items()))


def write_side_files(files: dict[str, bytes], folder: Path) -> None:
    """Writes the result of `read_side_files` into a folder, which is created if needed. Raises OSError."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _is_side_file(path: Path) -> bool:
    if path.name.startswith(".") or _WEIGHTS.search(path.name) or _CODE.search(path.name) or path.is_dir():
        return False
    return path.stat().st_size <= _LARGEST
