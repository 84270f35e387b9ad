"""Imports a user's function or class by name: `./reward.py:score` from a file, `mypkg.rewards:score` from a module.

Only names with a colon are imported, and only those that a setting or the command line gives.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from icrl_megatron.utils.errors import ConfigError

FORM = "FILE.py:NAME or package.module:NAME"


def is_own(name: str) -> bool:
    """Whether a name is that of a user's own code, and not of something in this package."""
    return ":" in name


def load(name: str, setting: str) -> Any:
    """The object of that name. A file is found from the working directory, and so is a module, in addition to Python's
    own path. `setting` says in messages where the name was given.

    Raises ConfigError, with the user's file and line, if there is no such file, module or object, or if importing it
    raises.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise ConfigError(f"{setting}={name}: write {FORM}, e.g. ./reward.py:score")
    module = _file(Path(where), f"{setting}={name}") if where.endswith(".py") else _module(where, f"{setting}={name}")
    if not hasattr(module, attribute):
        public = ", ".join(one for one in vars(module) if not one.startswith("_")) or "nothing"
        raise ConfigError(f"{setting}={name}: {module.__file__ or where} has no {attribute!r}; it has {public}")
    return getattr(module, attribute)


def raised_at(error: BaseException) -> str:
    """The error in one line, with the line of code that raised it: "ValueError: too long (reward.py, line 7)"."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    if isinstance(error, SyntaxError):
        return said
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame.filename)]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _ours(file: str) -> bool:
    return file.startswith("<") or Path(file).is_relative_to(Path(__file__).parents[1])


def _file(path: Path, given: str) -> ModuleType:
    file = path.expanduser().resolve()
    name = f"icrl_own_{'_'.join(file.with_suffix('').parts[1:])}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError(f"{given}: no file {file}; give its path from the folder in which the command runs")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    _add_to_path(file.parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{given}: importing {file} fails: {raised_at(error)}; correct the file") from error
    return module


def _module(name: str, given: str) -> ModuleType:
    _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{given}: no module {name} in {Path.cwd()} or on Python's path; run the command in the folder that "
                "contains it, install it, or give its file as FILE.py:NAME"
            ) from error
        raise ConfigError(f"{given}: importing {name} fails: {raised_at(error)}; install what is missing") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{given}: importing {name} fails: {raised_at(error)}; correct the module") from error


def _add_to_path(folder: Path) -> None:
    """Adds it at the end, so that a user's file never hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
