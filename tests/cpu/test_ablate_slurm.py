"""The jobs that `icrl ablate --on slurm` submits, and the command of each array task; tests/cluster runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from icrl_megatron.launch import job
from icrl_megatron.launch.ablate import AblationPlan, parse
from icrl_megatron.launch.ablate_array import check, jobs, load_plan, save_plan, submit, words
from icrl_megatron.launch.slurm_queue import Queue
from icrl_megatron.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
QUEUE = Queue("A", "P", "04:00:00", at_once=2)


def plan(folder: Path, budget_of: str = "", *overrides: str) -> AblationPlan:
    return parse("rulebook_easy", "grpo,icrl", "0,1", folder, overrides, budget_of)


def finish(folder: Path, *cells: str) -> None:
    """Writes the files of finished cells that generated 1234 tokens."""
    for cell in cells:
        (folder / cell).mkdir(parents=True)
        (folder / cell / "report.json").write_text("{}")
        (folder / cell / "metrics.jsonl").write_text('{"step": 5, "tokens/generated_total": 1234}\n')


def finish_warm_start(folder: Path) -> None:
    (folder / "start" / "warm_start" / "hf").mkdir(parents=True)


def arrays(asked: AblationPlan) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """Job -> (the array's tasks, the jobs it waits for)."""
    found = {}
    for one in jobs(asked, Path("/plan.json"), QUEUE):
        array = next((w.removeprefix("--array=") for w in one.command if w.startswith("--array=")), None)
        found[one.name] = (array, one.after)
    return found


def test_an_array_of_unfinished_cells_runs_after_the_warm_start_and_before_the_table(tmp_path: Path) -> None:
    assert arrays(plan(tmp_path)) == {
        "start": (None, ()),
        "cells": ("0,1,2,3%2", ("start",)),
        "table": (None, ("start", "cells")),
    }
    finish_warm_start(tmp_path)
    finish(tmp_path, "grpo_1")
    assert arrays(plan(tmp_path)) == {"cells": ("0,2,3%2", ()), "table": (None, ("cells",))}
    finish(tmp_path, "grpo_0", "icrl_0", "icrl_1")
    assert arrays(plan(tmp_path)) == {}


def test_cells_of_the_arm_that_sets_the_budget_run_first(tmp_path: Path) -> None:
    finish_warm_start(tmp_path)
    assert arrays(plan(tmp_path, "icrl")) == {
        "budget": ("0,1%2", ()),
        "cells": ("2,3%2", ("budget",)),
        "table": (None, ("budget", "cells")),
    }


def test_a_job_requests_the_nodes_and_gpus_of_the_recipe(tmp_path: Path) -> None:
    finish_warm_start(tmp_path)
    asked = plan(tmp_path, "", "launch.nodes=2", "launch.ranks=8")
    cells, table = jobs(asked, Path("/plan.json"), QUEUE)
    assert {"--account=A", "--partition=P", "--time=04:00:00", "--nodes=2", "--gpus-per-node=8"} < set(cells.command)
    assert cells.command[-2:] == ("slurm/ablate.sbatch", "/plan.json")
    assert table.any_end and not cells.any_end
    assert {"--nodes=1", "--time=00:15:00"} < set(table.command) and table.command[-1] == "table"
    names = {w for one in (cells, table) for w in one.command if w.startswith("--job-name=")}
    assert len(names) == 1  # so that all jobs can be found in the queue


def test_an_array_task_runs_the_command_of_its_cell(tmp_path: Path) -> None:
    asked = plan(tmp_path, "icrl", "steps=2")
    assert words(asked, "start") == ["sft", "rulebook_easy", "steps=2", f"run_dir={tmp_path}/start"]
    finish_warm_start(tmp_path)
    assert words(asked, "start") == []
    first = words(asked, "1")
    assert first[:3] == ["train", "rulebook_easy", "steps=2"]
    model = f"model.path={tmp_path}/start/warm_start/hf"
    assert {f"run_dir={tmp_path}/icrl_1", "seed=1", "warm_start.steps=0", model} < set(first)
    with pytest.raises(ConfigError, match="sets the budget and is not finished"):
        words(asked, "3")
    finish(tmp_path, "icrl_1")
    assert words(asked, "1") == []
    assert {"max_generated_tokens=1234", "rollout.rounds=1"} < set(words(asked, "3"))


def test_a_saved_plan_is_loaded_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish_warm_start(tmp_path)
    asked = plan(tmp_path, "", "steps=2")
    file = save_plan(asked)
    assert load_plan(file) == asked
    assert save_plan(plan(tmp_path, "", "steps=3")) != file  # submitted jobs still read the earlier plan
    job.main(["cell", str(file), "2"])
    assert capsys.readouterr().out.splitlines() == words(asked, "2")
    finish(tmp_path, "icrl_0")
    job.main(["cell", str(file), "2"])
    assert capsys.readouterr().out.strip() == ""
    file.write_text(json.dumps({"recipe": "x"}))
    with pytest.raises(ConfigError, match=r"not a plan of `icrl ablate --on slurm`"):
        load_plan(file)


@pytest.mark.parametrize(
    ("override", "message"), [("actor.tensor_parallel=3", "does not divide"), ("model.path=/nowhere", "no such folder")]
)
def test_settings_that_fail_are_not_submitted(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    check(plan(tmp_path))
    with pytest.raises(ConfigError, match=message):
        check(plan(tmp_path, "", override))
    assert list(tmp_path.iterdir()) == []


def test_submitting_needs_slurm_and_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here"):
        submit(plan(tmp_path), QUEUE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no slurm/ablate\.sbatch here"):
        check(plan(tmp_path))
