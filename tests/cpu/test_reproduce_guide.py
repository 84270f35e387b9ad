"""docs/REPRODUCE.md: every command on the page can be given, and its data step does what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from icrl_megatron.cli import app
from icrl_megatron.distill import readers
from icrl_megatron.plan import planner
from icrl_megatron.run import checks
from icrl_megatron.settings.arms import ARMS
from icrl_megatron.settings.loading import apply_overrides, load
from icrl_megatron.settings.schema import Settings
from icrl_recipes import registry

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "REPRODUCE.md").read_text()
COMMANDS = re.findall(r"^icrl .+$", PAGE, re.MULTILINE)
TOOLS = {"web": ["search", "page"], "code": ["python"], "hop": ["search"]}


def parsed(command: str) -> dict[str, object]:
    """The arguments as the command line reads them."""
    _, name, *words = shlex.split(command)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return dict(commands[name].make_context(name, words).params)


def trained() -> dict[str, Settings]:
    """Run folder -> the settings of the command that makes it."""
    made = {}
    for command in COMMANDS:
        if command.startswith("icrl train "):
            given = parsed(command)
            settings = load(given["recipe"], given["overrides"])  # type: ignore[arg-type]
            made[settings.run_dir] = settings
    return made


def test_every_training_command_is_valid_and_fits() -> None:
    runs = trained()
    assert set(runs) == {f"runs/{name}" for name in ("web32", "web7", "code32", "code7", "hop7", "hop3")}
    for folder, settings in runs.items():
        assert settings.warm_start.wanted and settings.warm_start.data[0].format == "afm"
        checks.validate_settings(settings)
        published = re.sub("-Coder", "", settings.model.path)  # the same shape
        known = apply_overrides(settings, [f"model.path={published}"])
        planner.require_fit(planner.plan(known), known)
        assert f"`{Path(folder).name}`" in PAGE  # a cell of the table is measured with it


def test_every_evaluation_is_of_a_run_of_the_page() -> None:
    runs, evaluations = trained(), [parsed(command) for command in COMMANDS if command.startswith("icrl eval ")]
    assert len(evaluations) == 4
    for given in evaluations:
        settings = apply_overrides(runs[str(given["model"])], given["overrides"])  # type: ignore[arg-type]
        checks.check_values(settings)
        for file in settings.tasks.sources[0].data.heldout:  # type: ignore[attr-defined]
            assert f"`{file.removesuffix('.jsonl')}" in PAGE or f"`{file}`" in PAGE


def test_ablations_and_further_baselines_are_recipes_of_their_arms() -> None:
    section = PAGE.partition("### Ablations and further baselines\n")[2].partition("\n### ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    of_arms = {"ablation", "gspo", "scaling", "reference"}
    assert named == {name for name in registry() if name.partition("_")[0] in of_arms}
    for name in named:
        arm = next((arm for arm in ("no_role_groups", "no_calibration", "gspo", "scaling_inter") if arm in name), "")
        if arm:
            (task,) = [source.name for source in load(name).tasks.sources]
            gpus = load(name).launch.ranks
            like = apply_overrides(load(f"qwen3_8b_{task}_{gpus}xh100"), [*ARMS[arm].changes, f"name={name}"])
            assert load(name) == like
    for arm in ("no_role_groups", "no_calibration"):
        ablated = {load(name).tasks.sources[0].name for name in named if arm in name}
        assert ablated == {"alfworld", "webshop", "searchqa", "math"}


def test_the_evaluations_of_the_paper_can_be_given() -> None:
    section = (DOCS / "EVALUATION.md").read_text().partition("## The evaluations of ICRL's paper")[2]
    commands = re.findall(r"^\|.*`(icrl eval runs/R.*)` \|$", section.partition("\n## ")[0], re.MULTILINE)
    given = [parsed(command) for command in commands]
    assert [one["samples"] for one in given] == [1, 32, 1, 1, 1]
    assert [one["rounds"] for one in given] == [1, 1, 3, 2, 2]
    assert [bool(one["critic"]) for one in given] == [False, False, False, True, True]


@pytest.mark.parametrize("name", TOOLS)
def test_published_trajectories_call_our_tools_after_the_renaming(tmp_path: Path, name: str) -> None:
    (renaming,) = re.findall(r"^(sed .+) web\.json code\.json hop\.json$", PAGE, re.MULTILINE)
    tags = {"web": ["web_search", "crawl_page"], "code": ["code"], "hop": ["wiki_search"]}[name]
    calls = "".join(f"<{tag}>x</{tag}><observation>y</observation>" for tag in tags)
    output = f"<think>a</think>{calls}<answer>z</answer>"
    row = {"instruction": f"Use {', '.join(tags)}.", "input": "", "output": output}
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps([row]))
    subprocess.run([*shlex.split(renaming), str(file)], check=True, timeout=60)
    (read,) = readers.read(str(file), "afm")
    assert read.trajectory is not None, read.problem
    assert [tool.name for tool in read.trajectory.tools] == TOOLS[name]
