"""docs/FACTS.md: every fact about ICRL is what the recipes resolve to, or what the code computes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icrl_megatron.algo.credit import advantages
from icrl_megatron.algo.samples import critique_reward
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.prompts import Prompter, parse_critique
from icrl_megatron.settings import loading
from icrl_megatron.settings.algo_schema import AlgoSettings
from icrl_megatron.settings.arms import ARMS
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks.agentgym_dialects import outcome_of
from icrl_megatron.tasks.base import Opening
from icrl_megatron.tasks.published import SETS
from icrl_megatron.types import Attempt
from icrl_recipes import registry
from icrl_recipes.cells import CELLS

PAGE = (Path(__file__).parents[2] / "docs" / "FACTS.md").read_text()
METHODS = {"qwen3": "ICRL", "grpo": "GRPO", "critique_grpo": "Critique-GRPO"}
MODELS = {"4b": "4B", "4b_instruct_2507": "4B-Instruct-2507", "8b": "8B"}
_RECIPE = re.compile(r"(qwen3|grpo|critique_grpo)_(4b|4b_instruct_2507|8b)_(alfworld|webshop|searchqa|math)_\dxh100")


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the tables below a heading of any level, with the names of their columns. Code marks are removed."""
    level, section = next(
        (len(marks), text)
        for marks, name, text in re.findall(r"^(#+) (.+)\n((?:(?!^#)[\s\S])*)", PAGE, re.MULTILINE)
        if name == heading
    )
    assert level > 1
    rows: list[dict[str, str]] = []
    names: list[str] = []
    for line in section.splitlines():
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            names = []
        elif not names:
            names = cells
        elif set(line) - set("|- "):
            rows.append(dict(zip(names, cells, strict=True)))
    return rows


def runs() -> dict[str, frozenset[str]]:
    """Recipe of the paper -> its labels in the column `runs`."""
    found = {"reference_preset": frozenset({"reference_preset"})}
    for name in registry():
        if (parts := _RECIPE.fullmatch(name)) is not None:
            found[name] = frozenset({"all", METHODS[parts[1]], MODELS[parts[2]], parts[3]})
    return found


RUNS = runs()
SETTINGS: dict[str, Settings] = {name: loading.load(name) for name in RUNS}
HEADINGS = ("Model and data", "Schedule", "Evaluation during training", "Caps", "Groups, weights and loss", "Layout")
FACTS = [row for heading in HEADINGS for row in table(heading)]


def chosen(labels: str) -> list[str]:
    """The recipes to which all of these labels apply; at least one."""
    names = [name for name, own in RUNS.items() if set(labels.split()) <= own]
    assert names, labels
    return names


def value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def resolved(settings: Settings, path: str) -> Any:
    found: Any = asdict(settings)
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def test_the_page_is_about_every_run_of_the_paper() -> None:
    assert len(RUNS) == 1 + 3 * (7 + 3)
    assert len(FACTS) > 50
    settings = {row["setting"].partition(".")[0] for row in FACTS}
    assert settings == {"model", "tasks", "steps", "rollout", "optim", "algo", "launch", "actor", "engine", "eval"}
    assert all(row["source"] for row in FACTS)


@pytest.mark.parametrize("row", FACTS, ids=lambda row: f"{row['setting']}-{row['runs']}")
def test_each_recipe_resolves_to_the_fact(row: Mapping[str, str]) -> None:
    for name in chosen(row["runs"]):
        assert resolved(SETTINGS[name], row["setting"]) == value(row["value"]), name


def test_the_4b_recipes_differ_only_in_the_model() -> None:
    for name in chosen("4B-Instruct-2507"):
        named = name.replace("_instruct_2507", "")
        twin = replace(SETTINGS[name], name=named, model=replace(SETTINGS[name].model, path="models/Qwen3-4B"))
        assert twin == SETTINGS[named]


def test_sets_have_the_stated_rows() -> None:
    rows = table("Rows of data")
    assert len(rows) == 7
    for row in rows:
        assert SETS[row["set"]].rows == int(row["rows"])


def attempt(outcome: float) -> Attempt:
    return Attempt(0, (1,), (1,), (), outcome, outcome == 1.0, "it ended", "done")


def test_rewards_are_the_stated_ones() -> None:
    rows = table("Rewards")
    critiques, attempts = [r for r in rows if "critique" in r], [r for r in rows if "score" in r]
    assert len(critiques) == len(attempts) == 5
    for row in critiques:
        this, following = attempt(float(row["this attempt"])), attempt(float(row["next attempt"]))
        assert critique_reward(this, following) == pytest.approx(float(row["critique"]))
    for row in attempts:
        assert outcome_of(row["environment"], float(row["score"])) == pytest.approx(float(row["reward"]))


def test_advantages_are_divided_by_the_deviation_and_its_floor() -> None:
    assert "(r - mean) / (deviation + 1e-6)" in PAGE
    deviation = 0.5**0.5  # of 0 and 1, with n - 1
    # in the second group, the floor matters: the deviation of the rewards is as small as it
    apart, near = advantages(np.array([[0.0, 1.0], [0.0, 2e-6]]), AlgoSettings())
    assert apart == pytest.approx([-0.5 / (deviation + 1e-6), 0.5 / (deviation + 1e-6)], rel=1e-12)
    assert near[1] == pytest.approx(1e-6 / (2e-6 * deviation + 1e-6), rel=1e-9)


@pytest.mark.parametrize("row", table("Prompts"), ids=lambda row: row["prompt"])
def test_prompts_contain_what_is_stated(row: Mapping[str, str]) -> None:
    names = ("manual", "task", "reply", "action", "observation", "outcome", "critique")
    marks = {name: f"MARK{name.upper()}" for name in names}
    settings = {SETTINGS[name].rollout.templates for name in RUNS}
    assert len(settings) == 1
    prompter = Prompter(build_tokenizer(list(marks.values())), SETTINGS[chosen("ICRL")[0]].rollout)
    long = marks["observation"].ljust(800, ".") + "BEYOND"
    turn = prompter.turn_text(1, marks["reply"], long, marks["action"])
    opening = prompter.templates.opening(Opening(marks["task"]), marks["manual"])
    texts = {
        "attempt": f"{opening.system} {prompter.text('attempt', observation=opening.text)}",
        "revision": (
            f"{opening.system} {prompter.text('revision', observation=opening.text, critique=marks['critique'])}"
        ),
        "critique": prompter.critique_text(opening.joined(), [turn], marks["outcome"]),
    }
    text = texts[row["prompt"]]
    places = [text.index(marks[name]) for name in row["contains"].split(", ")]
    assert places == sorted(places)
    for name in row["does not contain"].split(", "):
        assert marks[name] not in text
    assert "BEYOND" not in text
    stated = row["contains"].split(", ") + row["does not contain"].split(", ")
    assert sorted(stated) == sorted(names)


def test_a_critique_is_the_text_between_tags_or_the_whole_reply() -> None:
    assert parse_critique("Well. <critic>Open the door.</critic> Done.") == "Open the door."
    assert parse_critique("Open the door.") == "Open the door."


def test_published_results_stand_in_the_description_of_their_runs() -> None:
    rows = table("Published results")
    assert len(rows) == 13
    for row in rows:
        arm = row["in"].removeprefix("arm ")
        described = [ARMS[arm].about] if arm in ARMS else [str(registry()[n].__doc__) for n in chosen(row["in"])]
        assert all(row["value"] in text for text in described), row["result"]


def test_published_results_are_those_of_the_cells() -> None:
    """Both ways: a cell has no figure that the page does not have."""
    rows = [*table("Published results"), *table("Further published results")]
    stated = {row["cell"]: float(row["value"]) for row in rows}
    assert len(stated) == len(rows) == 17
    assert {name: cell.published for name, cell in CELLS.items() if cell.published is not None} == stated


def test_what_is_not_compared_says_why() -> None:
    rows = table("Not compared")
    assert rows and all(row["why it is not compared"] and row["source"] for row in rows)
