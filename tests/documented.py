"""Examples in docs/EXTENDING.md, which tests run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "EXTENDING.md"


def code(heading: str) -> str:
    """The first Python block below a heading."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def defined(heading: str) -> dict[str, Any]:
    """The names that this block defines."""
    names: dict[str, Any] = {}
    exec(code(heading), names)
    return names
