"""Checks that an SGLang server has the weights of a Hugging Face folder: `python tools/verify_sync.py URL FOLDER`.

Compares a checksum of every parameter. Exits with 0 if all agree, 1 with the name of the first that differs, 2 if the
server or the folder cannot be read. A server with quantized weights always differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.sglang_build import folder_tensors
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.model.shape import ModelShape, check_folder
from icrl_megatron.utils.errors import ConfigError

TIMEOUT_S = 600.0


def verify(url: str, folder: Path, key: str = "") -> int:
    """Returns the number of compared parameters. Raises EngineError if one differs, ConfigError if reading fails."""
    shape: ModelShape = check_folder(folder)
    server = Server(None, url.rstrip("/"), key)
    try:
        info = server.info()
    except EngineError as error:
        raise ConfigError(str(error)) from error
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(info.get("dtype")))
    if dtype is None:
        raise ConfigError(f"{url} was started with --dtype {info.get('dtype')}: start it with bfloat16 or float32")
    expected = Checksums(int(info.get("tp_size") or 1), shape)
    for name, tensor in folder_tensors(folder, dtype, torch.device(str(info.get("device") or "cpu"))):
        expected.add(name, tensor)
    expected.compare(server.post("/weights_checker", {"action": "checksum"}, TIMEOUT_S))
    return len(expected.expected[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="http://host:port of the server")
    parser.add_argument("folder", type=Path, help="Hugging Face folder, e.g. a run's hf")
    parser.add_argument("--api-key-env", default="", help="environment variable with the server's API key")
    arguments = parser.parse_args()
    try:
        count = verify(arguments.url, arguments.folder, os.environ.get(arguments.api_key_env, ""))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"differs: {error}")
        return 1
    print(f"{count} parameters agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
