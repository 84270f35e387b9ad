"""Names of settings: their indices, and the valid name that an unknown one probably means."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

ENTRY = re.compile(r"tasks\.sources\.(\d+)(\..+)?")
"""An entry of `tasks.sources`: its index, and the option."""


def nearest(key: str, section: str, leaf: str, known: Mapping[str, Any]) -> str:
    """The nearest valid name: a similar one in the section, else one of which `leaf` has the initials, else the same
    last part elsewhere, else a similar name anywhere. Empty if there is none."""
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    initials = [name for name in siblings if initials_of(name) == leaf]
    if similar := difflib.get_close_matches(leaf, siblings, n=1) or initials:
        return ".".join([*key.split(".")[:-1], similar[0]])
    dotted = f"{section}.{leaf}" if section else leaf
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(dotted, same_leaf, n=1, cutoff=0.0)
    near = near or ([] if section in known and siblings else difflib.get_close_matches(dotted, known, n=1, cutoff=0.5))
    if near and (at := ENTRY.match(key)) and near[0].startswith("tasks.sources."):
        return f"tasks.sources.{at[1]}.{indexed(near[0], known).removeprefix('tasks.sources.0.')}"
    return indexed(near[0], known) if near else ""


def initials_of(name: str) -> str:
    """learning_rate -> lr."""
    return "".join(word[0] for word in name.split("_") if word)


def indexed(name: str, known: Mapping[str, Any]) -> str:
    """`name` with index 0 after every list of sections: tasks.sources.weight -> tasks.sources.0.weight."""
    parts = name.split(".")
    for i in reversed(range(1, len(parts))):
        if typing.get_origin(known[".".join(parts[:i])]) is list:
            parts.insert(i, "0")
    return ".".join(parts)
