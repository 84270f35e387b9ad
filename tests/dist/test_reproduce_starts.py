"""`icrl reproduce` on a small cell; and cells of the whole table, which are trained for three steps and evaluated on
the local engine. tests/engine/test_sglang_cells.py does the latter on SGLang.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from paper_cells import CHOICE, LIMIT_S, LOCAL, asked_for, check_started, start, world
from whole_runs import icrl

from icrl_megatron.evaluation.reproduce import chosen

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CELL = "math-grpo-8b-aime24"


def test_a_cell_is_trained_once_evaluated_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with world(tmp_path) as here:
        asked = here.asked(chosen([CELL]), tmp_path / "out", *LOCAL)
    command = ["reproduce", CELL, *asked.overrides, "--out", "out"]
    train, evaluation = asked.phases()
    shutil.copytree("data", evaluation.folder)  # not an evaluation, so it is not replaced
    code, shown, err = icrl(*command)
    assert code == 2 and str(evaluation.folder) in err
    assert train.done and not evaluation.done and re.search(rf"{CELL} .* begun", shown)
    trained = (train.folder / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(evaluation.folder)
    code, shown, err = icrl(*command)
    assert code == 0, err
    assert (train.folder / "metrics.jsonl").stat().st_mtime_ns == trained
    assert re.search(rf"{CELL} +1 +50 +\d+\.\d \*", shown) and "steps=3" in shown


@pytest.mark.skipif(not os.environ.get(CHOICE), reason=f"{CHOICE} names no cells; * for all takes long")
@pytest.mark.timeout(LIMIT_S)
def test_cells_are_trained_evaluated_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with world(tmp_path) as here:
        asked = here.asked(asked_for(()), tmp_path / "out", *LOCAL)
        check_started(asked, start(asked, here, tmp_path))
