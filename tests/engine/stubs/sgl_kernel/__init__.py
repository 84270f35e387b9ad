"""Import-only stand-in: SGLang imports its kernels everywhere; its torch path on a CPU calls none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch  # noqa: F401 (SGLang expects the kernels to have loaded it)

__version__ = "0.0.0"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a stub")

    missing.__name__ = name
    return missing
