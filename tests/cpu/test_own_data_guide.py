"""docs/QUICK_OWN_DATA.md, followed word for word."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

from commands import run

PAGE = (Path(__file__).parents[2] / "docs" / "QUICK_OWN_DATA.md").read_text()


def test_the_page_leads_to_a_learning_curve(tmp_path: Path) -> None:
    files = re.findall(r"^`(\w+\.py)` .*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["make_rows.py", "reward.py"]
    for name, code in files:
        (tmp_path / name).write_text(code)
    (commands,) = re.findall(r"\n\n```\n(.*?)```", PAGE, re.DOTALL)
    programs = {"python": [sys.executable], "icrl": [sys.executable, "-m", "icrl_megatron.cli"]}
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        done = run(*programs[program], *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    first = tmp_path / "runs" / "first"
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["heldout/reward"] for row in rows if "heldout/reward" in row]
    assert rewards[0] < 0.2 and rewards[-1] > 0.5, rewards
    assert (first / "learning_curve.png").exists() and (first / "report.html").exists()
