"""Prints the modules of the GPU layer spec with and without norms of query and key heads, as two lines of JSON:
`python tests/te_spec.py`, in a separate process.

Without Transformer Engine its names are replaced by stubs, so that Megatron's classes around them can be defined and
its function can build the spec; the stubs compute nothing. If Transformer Engine is installed, it is used.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from typing import Any

import torch

from icrl_megatron.distributed import platform

PACKAGE, VERSION = "transformer_engine", "2.8.0"


class Name(type):
    """A stub class for any attribute, at any depth."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})


class Names(types.ModuleType):
    __getattr__ = Name.__getattr__


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        mine = name.split(".")[0] == PACKAGE
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = Names(spec.name)
        module.__version__ = VERSION  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: stub modules are empty."""


def submodules(spec: Any) -> dict[str, Any]:
    """A module's parts by name. Megatron-Core 0.19 describes the MLP by a partial function, 0.16 by a ModuleSpec."""
    return vars(spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules)


if __name__ == "__main__":
    if importlib.util.find_spec(PACKAGE) is None:
        sys.meta_path.insert(0, Finder())
    # Pretends that there is a GPU; none is used.
    platform.device = lambda: torch.device("cuda", 0)
    platform.hide_gpu_libraries = lambda: None
    from icrl_megatron.model import gpt  # imported late because it imports Megatron

    for qk_norm in (True, False):
        config: Any = types.SimpleNamespace(qk_layernorm=qk_norm, bf16=True)
        layer: Any = gpt.block_spec(config, "auto").submodules
        parts = {**submodules(layer.self_attention), **submodules(layer.mlp)}
        print(json.dumps({name: getattr(part, "__name__", str(part)) for name, part in parts.items()}))
