"""Every remedy in an error message works: the same run resumes with that change.

The messages are collected from the package's source, so new messages are tested too.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from begun_run import again, begin
from whole_runs import Batch, batch, from_model, rows, train

import icrl_megatron
import icrl_recipes
from icrl_megatron.run.checks import validate
from icrl_megatron.run.resume import adopt, check_resume, rule_of
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.describe import described
from icrl_megatron.settings.limits import Choice, Range
from icrl_megatron.settings.loading import field_types
from icrl_megatron.settings.task_options import OWN, SOURCES, options, source_of
from icrl_megatron.utils.errors import ConfigError

VERBS = "set|raise|lower|use|add|drop|take|leave|give|choose|shorten|change|try|allow"
REMEDY = re.compile(rf"(?<!task )\b({VERBS})\b(.*?)(?=;|: |\. |$|\b(?:{VERBS})\b)", re.DOTALL | re.IGNORECASE)
NAME = re.compile(r"(?<![\w./])[a-z_]++(?:\.[a-z0-9_]++)++(?!\.?\{)")
PRONOUN = re.compile(r" (it|these|at|one of|another|a|\d+)\b")
"""After a verb, these words refer to the first setting in the message."""
NEW_RUN = "a new run"
"""A remedy with these words is not about the run that resumes."""

DYNAMIC = {
    "rollout.{setting}": ("rollout.max_turn_tokens", "rollout.max_critique_tokens"),
    "{settings}": ("engine.kv_tokens", "engine.memory_fraction"),
    "tasks.sources.data.{split}": ("tasks.sources.data.train", "tasks.sources.data.heldout"),
    "tasks.sources.data.{setting}": ("tasks.sources.data.prompt_column", "tasks.sources.data.label_column"),
    "{name}": ("tasks.sources.serve.port",),
    "{source}": ("launch.ranks",),
}
"""Expression in a message -> the setting names that it can produce at run time."""

FIXED = ("algo.group_by", "algo.loss_normalisation", "model.path")
"""Settings that cannot change on resume, and whose invalid values have messages. A resumed run has the value that it
began with, so it never shows them (`test_messages_about_fixed_settings_appear_only_in_new_runs`)."""


@dataclass(frozen=True)
class Remedy:
    where: str
    text: str
    names: tuple[str, ...]


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(file and line, text) of every string in the package except docstrings; values appear as {expression}."""
    for path in sorted(folder.rglob("*.py")):
        seen: set[int] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                seen.add(id(node.value))
            if id(node) not in seen and isinstance(node, ast.JoinedStr | ast.Constant):
                seen.update(map(id, ast.walk(node)))
                yield f"{path.name}:{node.lineno}", re.sub(r"\[\.\.\.\]|\.\d+(?=\.)", "", text(node))


def text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def remedies(message: str, known: set[str]) -> Iterator[tuple[str, ...]]:
    """The settings of each remedy in a message."""
    subject = next((name for name in NAME.findall(message) if name in known), None)
    for found in REMEDY.finditer(message):
        clause = found[2]
        if NEW_RUN in clause:
            continue
        names = [name for name in NAME.findall(clause) if name in known]
        for dynamic in re.findall(r"(?:[a-z_]+\.)*\{\w+\}", clause.split(",")[0].split("=")[0]):
            names += DYNAMIC.get(dynamic, ())
        if not names and subject and PRONOUN.match(clause):
            names = [subject]
        yield tuple(names)


def collected() -> list[Remedy]:
    known = set(S.field_types())
    return [
        Remedy(where, message, names)
        for package in (icrl_megatron, icrl_recipes)
        for where, message in texts(Path(package.__path__[0]))
        for names in remedies(message, known)
        if names
    ]


REMEDIES = collected()
NAMED = sorted({name for remedy in REMEDIES for name in remedy.names} - set(FIXED))


def test_remedies_are_found() -> None:
    assert len(REMEDIES) >= 70 and len(NAMED) >= 40
    where = {name: remedy.where for remedy in REMEDIES for name in remedy.names}
    assert where.keys() >= {"algo.on_no_signal", "rollout.episodes_per_task", "engine.request_timeout_s"}
    assert "rollout.context_tokens" in where
    message = "x.y=1: bad; raise a.b, or set c.d=2 in a new run. Lower it"
    assert list(remedies(message, {"x.y", "a.b", "c.d"})) == [("a.b",), ("x.y",)]


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: f"{remedy.where}-{','.join(remedy.names)}")
def test_settings_in_remedies_may_change_on_resume(remedy: Remedy) -> None:
    for name in remedy.names:
        if name not in FIXED:
            assert not rule_of(name).reason, f"{remedy.where}: {remedy.text!r} names {name}, which cannot change"


def other_value(name: str, value: Any) -> str:
    """A valid value other than `value`, as text."""
    plain = re.sub(r"\.\d+(?=\.)", ".0", name)
    limit = next((one.limit for one in described(plain) if one.name == plain), None)
    if isinstance(limit, Choice) and not isinstance(value, list):
        return next(choice for choice in limit.names if choice != value)
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int | float) or isinstance(limit, Range):
        low, high = (limit.low, limit.high) if isinstance(limit, Range) else (0, 100)
        options = [(value or 1) + 1, (value or 1) / 2, low]
        whole = not isinstance(value, float)
        found = next(o for o in options if low <= o <= high and o != value and (not whole or o == int(o)))
        return str(int(found) if whole else found)
    if not isinstance(value, list):
        return "other"
    (element,) = typing.get_args(field_types()[re.sub(r"\.\d+", "", plain)])
    if element is str:
        return "[other]"
    texts = [one.name for one in dataclasses.fields(element) if one.type == "str"]
    given = {texts[0]: "other"} if texts else {one.name: 1 for one in dataclasses.fields(element)}
    return f"[{{{', '.join(f'{name}: {value}' for name, value in given.items())}}}]"


@pytest.mark.parametrize("name", NAMED)
def test_run_resumes_with_a_changed_setting(tmp_path: Path, name: str) -> None:
    option = name.removeprefix("tasks.sources.")
    having = next((one for one in ("searchqa", OWN, *SOURCES) if option in dict(options(source_of(one)))), "searchqa")
    task_set = [f"tasks.sources.0.name={having}"] if name.startswith("tasks.sources.") else []
    begun = begin(tmp_path, *task_set)
    if name == "tasks.sources":
        override = "tasks.sources=[{name: household}]"
    else:
        indexed = name.replace("tasks.sources.", "tasks.sources.0.")
        value: Any = begun
        for part in indexed.split("."):
            value = value[int(part)] if part.isdecimal() else getattr(value, part)
        override = f"{indexed}={other_value(indexed, value)}"
    changed = again(tmp_path, *task_set, override)
    check_resume(begun, changed, tmp_path)
    lines = adopt(changed, tmp_path)
    assert lines and all(line.startswith("resume: ") for line in lines)
    assert (tmp_path / "settings_changes.jsonl").read_text().count("\n") == len(lines)


@pytest.mark.parametrize("name", FIXED)
def test_messages_about_fixed_settings_appear_only_in_new_runs(tmp_path: Path, name: str) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match=rf"holds a run with other settings: {name} \(was"):
        validate(again(tmp_path, f"{name}=/nowhere"))


# --- runs that fail and then follow the advice


ADVICE = {
    "no_signal": ["algo.on_no_signal=skip"],
    "more_episodes": ["tasks.sources=[{name: rulebook_easy}]", "rollout.episodes_per_task=6", "tasks.limit=30"],
    "partial": ["rollout.partial=true", "rollout.oversample=1.5", "algo.mismatch_correction.enabled=true"],
    "many": [
        "tasks.sources=[{name: rulebook_easy, weight: 2}, {name: raises_often}]",
        "rollout.context_tokens=300",
        "rollout.max_turn_tokens=20",
        "algo.max_resamples=1",
        "eval.interval=1",
        "checkpoint.interval=3",
        "engine.max_batch=5",
        "engine.request_timeout_s=100",
        "actor.micro_batch_tokens=4000",
        "optim.learning_rate=1e-5",
        "tasks.curriculum=true",
        "launch.timeout_s=600",
    ],
}
"""Run -> the settings with which it resumes."""
FLAT = ["tasks.sources=[{name: flat}]", "algo.on_no_signal=error"]
FAILING = {"no_signal": FLAT, "more_episodes": FLAT}
"""Run -> the settings with which it fails first."""


@pytest.fixture(scope="module")
def ran(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """A run of two steps, and copies of it that fail with one change and resume with another."""
    folder = tmp_path_factory.mktemp("advice")
    start = [*from_model(finished_run), "eval.interval=0"]
    assert batch(folder, {"first": train(folder / "first", *start, "steps=2")})["first"].code == 0
    commands = {}
    for name, advice in ADVICE.items():
        shutil.copytree(folder / "first", folder / name)
        if name in FAILING:
            commands[f"{name}/fails"] = train(folder / name, *start, "steps=4", *FAILING[name])
        commands[name] = train(folder / name, *start, "steps=4", *advice)
    return Batch(folder, batch(folder, commands))


@pytest.mark.parametrize("name", ADVICE)
def test_run_resumes_as_advised(ran: Batch, name: str) -> None:
    if name in FAILING:
        assert ran.ended[f"{name}/fails"].code != 0
    error = ran.succeeded(name).error
    assert [row["step"] for row in ran.trained(name)] == [1, 2, 3, 4]
    assert rows(ran.folder / name)[:3] == rows(ran.folder / "first")[:3]  # step 0's evaluation and two steps
    changes = (ran.folder / name / "settings_changes.jsonl").read_text()
    for setting in (override.partition("=")[0] for override in ADVICE[name]):
        if not setting.startswith("tasks.sources"):
            assert f"resume: {setting} changes from" in error and f'"name": "{setting}"' in changes


def test_batch_without_signal_names_remedies(ran: Batch) -> None:
    error = ran.ended["no_signal/fails"].error
    assert "raise rollout.episodes_per_task, or set algo.on_no_signal=skip" in error
