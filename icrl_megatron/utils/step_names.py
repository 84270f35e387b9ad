"""The names of what belongs to a step: step_000040 and, with a suffix, step_000040.jsonl.

Compare steps, not names: as text, step_1000000 comes before step_999999.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step_(\d{6,})")


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """The step in exactly such a name; None for any other name (step_40, step_0000040, step_000040.part)."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def steps_in(folder: Path, suffix: str = "") -> list[int]:
    """The steps of step_NNNNNN<suffix> in a folder, ascending; none if there is no such folder."""
    names = (path.name for path in folder.glob(f"step_*{suffix}"))
    return sorted(step for name in names if (step := step_of(name.removesuffix(suffix))) is not None)
