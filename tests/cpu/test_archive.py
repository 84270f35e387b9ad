"""Archive: its facts, its tools, its teacher, and what counts as an answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.agents.formats import ToolCalls
from icrl_megatron.tasks import archive, registry
from icrl_megatron.tasks.archive import Archive, ArchiveEnvironment, ArchiveTeacher, joined, spelled, world
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError

NAMES = ("archive", "archive_easy")


def replies(environment: ArchiveEnvironment, teacher: ArchiveTeacher, critique: str | None) -> list[str]:
    """What the teacher says until the episode ends."""
    said: list[str] = []

    async def run() -> None:
        observation = await environment.reset()
        for _ in range(environment.max_turns):
            said.append(teacher.act(observation, critique))
            action = environment.parse(said[-1])
            assert action is not None
            result = await environment.step(action)
            (observation,) = result.texts()
            if result.done:
                return

    asyncio.run(run())
    return said


def play(task_set: Archive, task: Task, critique: str | None = None, seed: int = 0) -> tuple[float, str]:
    environment = task_set.environment(task)
    replies(environment, task_set.teacher(task, random.Random(seed)), critique)
    return environment.outcome(), environment.summary()


@pytest.mark.parametrize("name", NAMES)
def test_no_heldout_person_is_in_training(name: str) -> None:
    task_set = registry.get(name)
    people = {
        split: {person for task in task_set.problems(split) for person in archive.asked(task.problem)}
        for split in ("train", "heldout")
    }
    assert people["train"] and people["heldout"] and not people["train"] & people["heldout"]
    problems = [task.problem for split in ("train", "heldout") for task in task_set.problems(split)]
    assert len(set(problems)) == len(problems)


@given(st.integers(0, 999), st.integers(0, 99), st.integers(0, 999))
def test_spelling_is_reversible(person: int, town: int, number: int) -> None:
    text = f"p{person:03d} lives in t{town:03d} size {number} + {number}"
    assert joined(spelled(text)) == text


def test_the_tools_say_the_facts() -> None:
    facts, box = world(), archive.toolbox().session()
    person = 483
    town = facts.home[person]

    def ask(tag: str, text: str) -> str:
        asked = archive.form().parse(f"<{tag}> {text} </{tag}>")
        assert isinstance(asked, ToolCalls)
        return asyncio.run(box.call(*asked.calls)).text

    assert joined(ask("search", "p 4 8 3")).endswith(f"p483 lives in t{town:03d}")
    assert joined(ask("search", spelled(f"t{town:03d}"))).endswith(f"old note size {facts.noted[town]}")
    assert joined(ask("page", spelled(f"t{town:03d}"))) == f"t{town:03d} size {facts.size[town]}"
    assert joined(ask("calculator", "1 8 + 2 4")) == "42"
    assert ask("page", "p 4 8 3") == "no page" and ask("calculator", "home") == "no number"
    outdated = sum(n != s for n, s in zip(facts.noted, facts.size, strict=True)) / archive.TOWNS
    assert outdated == pytest.approx(archive.OUTDATED, abs=0.12)


@pytest.mark.parametrize("name", NAMES)
def test_advice_makes_the_teacher_right(name: str) -> None:
    task_set = registry.get(name)
    assert isinstance(task_set, Archive)
    tasks = task_set.problems("heldout")[:120]
    plain = [play(task_set, task, seed=i) for i, task in enumerate(tasks)]
    assert 0.25 < sum(outcome for outcome, _ in plain) / len(plain) < 0.75
    found = Counter(summary for _, summary in plain)
    assert found[archive.RIGHT] and found[archive.OUTDATED_SIZE]
    assert all(play(task_set, task, "compute page", i) == (1.0, archive.RIGHT) for i, task in enumerate(tasks))


def test_every_word_is_in_the_vocabulary() -> None:
    for name in NAMES:
        task_set = registry.get(name)
        assert isinstance(task_set, Archive)
        known = set(task_set.vocabulary()) | {"<critic>", "</critic>"}
        for i, task in enumerate(task_set.problems("train")[:60]):
            environment, teacher = task_set.environment(task), task_set.teacher(task, random.Random(i))
            said = " ".join([task.problem, *replies(environment, teacher, None), environment.summary()])
            advice = " ".join(teacher.criticise(s) for s in (archive.OUTDATED_SIZE, archive.WRONG_SUM, archive.SILENT))
            assert set(said.split()) | set(advice.split()) <= known
        for text in ("p 4 8 3", "t 0 2 7"):
            assert set(asyncio.run(archive.find(text, 1))[0].split()) <= known


@pytest.mark.parametrize(
    ("answer", "right"),
    [("4 2", True), (" 4  2 ", True), ("42", True), ("4 2 0", False), ("", False), ("- 4 2", False)],
)
def test_only_the_number_counts(answer: str, right: bool) -> None:
    assert archive.same_number(answer, 42) is right


@pytest.mark.parametrize("problem", ["size home p 4 8 ?", "size home p 4 8 3", "sum size home p 4 8 3 ?", ""])
def test_what_is_no_problem_is_refused(problem: str) -> None:
    with pytest.raises(ConfigError, match="is not one of Archive"):
        registry.environment(Task("archive/train/0", "archive", "train", problem))
