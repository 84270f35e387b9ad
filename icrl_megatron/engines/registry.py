"""Registry of engine kinds (`engine.kind`). A kind is a module with a `KIND` and a line here. Imports no torch."""

from __future__ import annotations

import importlib

from icrl_megatron.engines.kind import EngineKind
from icrl_megatron.utils.errors import ConfigError

KINDS = {
    "local": "icrl_megatron.engines.local_kind:KIND",
    "sglang": "icrl_megatron.engines.sglang_kind:KIND",
}


def engine_kind(name: str) -> EngineKind:
    """Returns a kind by its name or by "package.module:OBJECT". Raises ConfigError if it does not exist."""
    module, _, attribute = KINDS.get(name, name).partition(":")
    if not attribute:
        raise ConfigError(f"engine.kind={name}: choose one of {', '.join(KINDS)}, or package.module:OBJECT")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"engine.kind={name}: {error}; choose one of {', '.join(KINDS)}, or add the folder of the module to "
            "PYTHONPATH"
        ) from error
    if not isinstance(found, EngineKind):
        raise ConfigError(f"engine.kind={name}: this is not an EngineKind (icrl_megatron/engines/kind.py)")
    return found
