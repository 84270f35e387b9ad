"""Options and the final report of the chaos tests."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
FAULTS_ENV = "ICRL_CHAOS_FAULTS"
"""Number of faults; 60 by default."""
RECORDS_ENV = "ICRL_CHAOS_RECORDS"
"""Folder for the records of all campaigns, shared by the processes of xdist."""


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(RECORDS_ENV, tempfile.mkdtemp(prefix="icrl_chaos_"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints one line per kind of fault: how many the run survived, and their effects."""
    records = [r for path in sorted(Path(os.environ[RECORDS_ENV]).glob("*.json")) for r in json.loads(path.read_text())]
    if not records:
        return
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        kinds[record["fault"]].append(record)
    terminalreporter.section("chaos")
    counted = ("survived", "lost", "doubled", "replayed")
    terminalreporter.write_line(f"{'fault':28} {'played':>9}" + "".join(f"{what:>9}" for what in counted))
    for name, of in [*sorted(kinds.items()), ("all", records)]:
        totals = "".join(f"{sum(int(r[what]) for r in of):9}" for what in counted)
        terminalreporter.write_line(f"{name:28} {len(of):9}{totals}")
