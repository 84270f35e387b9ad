"""`icrl ablate`: its plan, its arms as settings, and real runs of two arms that are interrupted and resumed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from whole_runs import SMALL, WARM_START, icrl

from icrl_megatron.launch import phases
from icrl_megatron.launch.ablate import ArmResult, Cell, parse, tables
from icrl_megatron.report.bands import band
from icrl_megatron.settings import loading as settings
from icrl_megatron.settings.arms import ARMS, at_equal_cost
from icrl_megatron.telemetry.writer import read_rows
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.intervals import Difference

OUT = Path("nowhere")


def test_every_arm_is_valid_for_every_recipe_and_listed_in_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "BASELINES.md").read_text()
    for name, arm in ARMS.items():
        assert f"| `{name}` |" in guide
        for recipe in ("rulebook_hard", "qwen3_8b"):
            loaded = settings.load(recipe, arm.changes)
            assert (loaded != settings.load(recipe)) == (name != "icrl")


def test_the_baseline_of_a_run_has_the_settings_of_the_arm_at_equal_cost(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "tokens/generated_total": 1234}\n')
    run = settings.load("rulebook_easy", ["baseline=grpo", f"run_dir={tmp_path}", "steps=7"])
    made = phases._baseline(run, tmp_path)
    arm = settings.apply_overrides(run, [*ARMS["grpo"].changes, *at_equal_cost(1234, 700)])
    differing = {name.partition(".")[0] for name in settings.changed(arm, made)}
    assert differing == {"name", "run_dir", "model", "eval"}
    assert (made.rollout.rounds, made.max_generated_tokens, made.steps) == (1, 1234, 700)


def test_cells_of_the_arm_that_sets_the_budget_come_first() -> None:
    plan = parse("rulebook_hard", "grpo,icrl", "3,1", OUT, [], "icrl")
    assert plan.cells() == [("icrl", 3), ("icrl", 1), ("grpo", 3), ("grpo", 1)]
    assert parse("rulebook_hard", "all", "0", OUT, [], "").arms == tuple(ARMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rulebook_hard", "icrll", "0", OUT, [], ""), r"no arm 'icrll'; choose from icrl, grpo"),
        (("rulebook_hard", "icrl", "a", OUT, [], ""), r"--seeds=a"),
        (("rulebook_hard", "grpo", "0", OUT, [], "icrl"), r"not among --arms"),
        (("rulebok_hard", "icrl", "0", OUT, [], ""), r"did you mean"),
        (("rulebook_hard", "icrl", "0", OUT, ["step=1"], ""), r"unknown setting"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, str, str, Path, list[str], str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.mark.slow
def test_two_arms_run_and_finished_cells_are_not_repeated(tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    command = ["ablate", "rulebook_easy", "steps=2", *SMALL, *WARM_START, "--out", str(out)]
    command += ["--arms", "icrl,grpo", "--seeds", "0", "--budget-of", "icrl"]
    code, _, err = icrl(*command, "--cell", "1")
    assert code == 2 and "run it first" in err
    assert not (out / "grpo_0" / "hf").exists()
    code, shown, err = icrl(*command, "--cell", "0")
    assert code == 0, err
    assert "icrl" in shown and not (out / "grpo_0").exists()
    before = (out / "icrl_0" / "metrics.jsonl").stat().st_mtime_ns
    code, shown, err = icrl(*command)
    assert code == 0, err
    assert (out / "icrl_0" / "metrics.jsonl").stat().st_mtime_ns == before
    icrl_row, grpo_row = json.loads((out / "ablation.json").read_text())["arms"]
    assert (icrl_row["arm"], grpo_row["arm"]) == ("icrl", "grpo")
    assert grpo_row["tokens"] >= icrl_row["tokens"] > 0 and grpo_row["critique_tokens"] is None
    assert re.search(r"\| grpo \| 1 \|", (out / "ablation.md").read_text())
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")

    rows = read_rows(out / "icrl_0" / "metrics.jsonl")
    evaluated = [r for r in rows if "heldout/critique_free" in r]
    assert icrl_row["curve"]["x"] == [r["tokens/generated_total"] for r in evaluated]
    assert icrl_row["curve"]["mean"] == pytest.approx([r["heldout/critique_free"] for r in evaluated], abs=1e-6)
    (cell,) = icrl_row["cells"]  # tokens of evaluations are counted separately
    assert cell["generated_tokens"] == sum(r.get("tokens/generated", 0) for r in rows)
    assert cell["evaluation_tokens"] == sum(r["tokens/evaluation"] for r in evaluated) > 0
    code, shown, err = icrl(*command, "--table")
    assert code == 0 and "grpo" in shown, err


def test_the_tables_fit_a_terminal_of_80_columns() -> None:
    tasks = ("rulebook_hard", "household", "searchqa")
    cell = Cell(0, 1.0, dict.fromkeys(tasks, 1.0), 123_456_789, 5, 1_000_000, 99.0)
    success = Difference(1.0, 1.0, 1.0)
    row = ArmResult("not_internalised", 5, success, cell.by_task, 123_456_789, 1e6, 99.0, band([]), (cell,))
    shown = tables([row, row])
    assert all(Console(width=400).measure(one).maximum <= 80 for one in shown)
    console = Console(width=80, file=io.StringIO())
    for one in shown:
        console.print(one)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(shown) == 2 and "…" not in text
    assert all(part in text for part in ("not_internalised", "100.0 [100.0, 100.0]", "123.46M", "1000000", *tasks))
