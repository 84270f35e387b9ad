"""Registry of engine kinds (`engine.kind`). A kind is a module `<name>_kind` with a `KIND`. No torch."""

from __future__ import annotations

import importlib

from icrl_megatron.engines.kind import EngineKind
from icrl_megatron.settings.rollout_schema import ENGINE_KINDS
from icrl_megatron.utils.errors import ConfigError

KINDS = {name: f"icrl_megatron.engines.{name}_kind:KIND" for name in ENGINE_KINDS}


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
