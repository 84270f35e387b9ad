"""Run folders of a started run, created without running it."""

from __future__ import annotations

import json
from pathlib import Path

from icrl_megatron.settings import loading as S
from icrl_megatron.settings.schema import Settings

RECIPE = "quickstart"


def begin(folder: Path, *overrides: str, step: int = 4) -> Settings:
    """A run of the quickstart with these overrides. Its checkpoint is empty: the checks of a resume read only names."""
    begun = again(folder, *overrides)
    S.save(begun, folder / S.SAVED_NAME)
    (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
    return begun


def again(folder: Path, *overrides: str) -> Settings:
    """Settings of the same run with other overrides."""
    return S.load(RECIPE, [f"run_dir={folder}", *overrides])


def write_rows(path: Path, first: int) -> str:
    """Writes four rows of arithmetic, which depend on `first`; returns the path."""
    rows = [json.dumps({"prompt": f"What is {i} + {i}?", "label": str(2 * i)}) for i in range(first, first + 4)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)
