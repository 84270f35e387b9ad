"""Import-only stand-in: SGLang imports torchvision for multimodal models; a text model never calls it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

__version__ = "0.28.0"


class _Named(type):
    """Its classes have any member in capitals, as enumerations do: InterpolationMode.BICUBIC."""

    def __getattr__(cls, name: str) -> str:
        if name.isupper():
            return f"{cls.__name__}.{name}"
        raise AttributeError(name)


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            made = _Named(name, (), {})
            setattr(self, name, made)
            return made

        def missing(*arguments: Any, **named: Any) -> NoReturn:
            raise NotImplementedError(f"{self.__name__}.{name} is a stub")

        return missing


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("torchvision."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.insert(0, _Finder())
