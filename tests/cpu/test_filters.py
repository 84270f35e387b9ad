"""Filters of trajectories: what each keeps and why, and near-duplicates in linear time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.distill.filters import FILTERS, FilterReport, Rules, applied, filtered
from icrl_megatron.distill.similarity import Index, shingles, similarity
from icrl_megatron.distill.trajectory import Segment, Trajectory
from icrl_megatron.settings import distill_schema
from icrl_megatron.settings.distill_schema import DistillFilters
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Readable

SEARCH = ToolSpec.of_text("search", "Searches.", "query")


def say(agent: str, text: str) -> Segment:
    return Segment(agent, text)


def call(query: str, answer: str = "found") -> tuple[Segment, Segment]:
    made = Segment("search", "", "call", call=ToolCall("search", {"query": query}))
    return made, Segment("search", f"{answer} {query}", "observation", trained=False)


def answer(text: str = "42") -> Segment:
    return Segment("answer", text, "answer")


def trajectory(*segments: Segment, task: str = "archive/train/0", **fields: object) -> Trajectory:
    one = Trajectory(task, f"problem of {task}", segments, True, tools=(SEARCH,))
    return replace(one, **fields)  # type: ignore[arg-type]


GOOD = trajectory(say("plan", "do"), *call("a"), *call("b"), say("reflection", "fine"), answer())


def keep(name: str, *given: Trajectory, rules: Rules | None = None) -> tuple[list[int], FilterReport]:
    """(copies of each trajectory that a filter keeps, its report)."""
    kept, report = applied(name, FILTERS[name], given, rules or Rules())
    return [sum(one is other for other in kept) for one in given], report


def with_settings(**fields: object) -> Rules:
    return Rules(replace(DistillFilters(), **fields))  # type: ignore[arg-type]


def test_the_table_and_the_settings_name_the_same_filters() -> None:
    assert tuple(FILTERS) == distill_schema.FILTERS


def test_correctness() -> None:
    copies, report = keep("correctness", GOOD, replace(GOOD, correct=False), replace(GOOD, correct=None))
    assert copies == [1, 0, 0]
    assert (report.read, report.kept, report.dropped, report.added) == (3, 1, 2, 0)
    assert report.why == {"the answer was not judged": 1, "wrong answer": 1}
    assert report.examples[0] == "archive/train/0: wrong answer '42'"


def test_complexity_counts_what_agents_do_and_not_what_they_observe() -> None:
    four = trajectory(say("plan", "do"), *call("a"), *call("b"), answer())
    assert keep("complexity", GOOD, four)[0] == [1, 0]
    assert keep("complexity", GOOD, four, rules=with_settings(min_interactions=4))[0] == [1, 1]


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ([answer(), *call("a")], "not one answer"),
        ([answer(), answer()], "not one answer"),
        ([answer(), say("plan", "x")], "not one answer"),
        ([call("a")[0], answer()], "between a call"),
        ([call("a")[0], say("plan", "x"), call("a")[1], answer()], "between a call"),
        ([call("a")[1], answer()], "observation without its call"),
        ([*call("a"), call("a")[1], answer()], "observation without its call"),
        ([say("plan", " "), answer()], "is empty"),
        ([Segment("fly", "", "call", call=ToolCall("fly", {})), answer()], "unknown tool 'fly'"),
    ],
)
def test_broken_sequences(segments: Sequence[Segment], said: str) -> None:
    copies, report = keep("format", trajectory(*segments))
    assert copies == [0] and said in report.examples[0]


def test_format_follows_the_grammar_of_the_task_set() -> None:
    web = trajectory(
        say("think", "t"), say("plan", "p"), *call("a"),
        say("suggested_answer", "42"), say("double_check", "4"), answer(),
    )  # fmt: skip
    (first, seen), (second, also) = call("a"), call("b")
    several = trajectory(first, second, seen, also, answer())
    assert keep("format", web, GOOD, several)[0] == [1, 1, 1]
    rules = Rules(grammars={"archive": "web"})
    copies, report = keep("format", web, GOOD, rules=rules)
    assert copies == [1, 0] and report.why == {"against the grammar web": 1}
    inside = trajectory(say("think", "write <answer>7</answer>"), say("plan", "p"), *call("a"), *web.segments[4:])
    assert keep("format", inside, rules=rules)[0] == [0]


def test_a_sequence_may_end_with_a_call_only_if_that_was_right() -> None:
    ended = trajectory(say("plan", "x"), *call("a"))
    copies, report = keep("format", ended, replace(ended, correct=False))
    assert copies == [1, 0] and "not one answer" in report.examples[0]


def test_length_and_redundancy() -> None:
    assert keep("length", GOOD, trajectory(say("plan", "x" * 60000), answer()))[0] == [1, 0]
    again = trajectory(*call("a"), *call("b"), *call("a"), answer())
    copies, report = keep("redundancy", GOOD, again)
    assert copies == [1, 0] and '(1, such as search {"query": "a"})' in report.examples[0]
    assert keep("redundancy", again, rules=with_settings(max_repeats=1))[0] == [1]


def test_reflection_is_drawn_by_seed_and_not_for_mathematics() -> None:
    plain = [trajectory(*call(f"{i}"), answer(), task=f"archive/train/{i}") for i in range(400)]
    kept = [keep("reflection", *plain, rules=Rules(seed=seed))[0] for seed in (0, 0, 1)]
    assert 150 < sum(kept[0]) < 250
    assert kept[0] == kept[1] != kept[2]
    backwards = keep("reflection", *reversed(plain))[0]
    assert backwards == kept[0][::-1]
    exempt = [replace(one, task_id=one.task_id.replace("archive", "math")) for one in plain]
    assert sum(keep("reflection", *exempt)[0]) == 400
    none = with_settings(keep_without_reflection=0.0)
    assert keep("reflection", plain[0], GOOD, rules=none)[0] == [0, 1]


def test_corrected_errors_are_copied() -> None:
    def checked(score: str, last: str, correct: bool = True) -> Trajectory:
        return trajectory(
            *call("a"), say("suggested_answer", "41"), say("double_check", score), *call("b"), answer(last),
            correct=correct,
        )  # fmt: skip

    given = (checked("1 no", "42"), checked("2", "42", False), checked("1", "41"), checked("3 yes", "42"), GOOD)
    copies, report = keep("correction", *given, rules=with_settings(correction_copies=3))
    assert copies == [3, 1, 1, 1, 1]
    assert (report.kept, report.dropped, report.added) == (5, 0, 2)


def test_near_duplicates_are_dropped_whatever_their_task() -> None:
    words = [f"word{i}" for i in range(100)]
    long = trajectory(say("plan", " ".join(words)), *call("a"), answer())
    nearly = trajectory(say("plan", " ".join([*words[:99], "other"])), *call("a"), answer(), task="archive/train/1")
    other = trajectory(say("plan", " ".join(reversed(words))), *call("a"), answer())
    copies, report = keep("duplicates", long, nearly, other, long)
    assert report.why == {"near-duplicate": 2} and copies == [1, 0, 1, 1]  # `long` itself is there once
    assert "archive/train/1: near-duplicate (of archive/train/0)" in report.examples


def test_leakage_ignores_instructions_and_finds_paraphrases() -> None:
    instructions = "Answer the question with tools. Write search to use a tool and answer when you know the answer. "
    questions = [f"In which year was the {name} of {place} built?" for name in "ABCD" for place in ("Rome", "Oslo")]
    heldout = (instructions + "Who painted the ceiling of the great old hall in the northern castle of Trakai?",)
    leaked = instructions + "who  painted the ceiling of the great old hall in the northern castle of Trakai, then?"
    given = [replace(GOOD, problem=instructions + question) for question in questions]
    copies, report = keep("leakage", *given, replace(GOOD, problem=leaked), rules=Rules(heldout=heldout))
    assert copies == [1] * 8 + [0] and report.why == {"nearly a held-out problem": 1}
    same = replace(GOOD, problem="a  b")
    assert keep("leakage", same, rules=Rules(heldout=("A B",)))[0] == [0]


def test_no_problem_of_archive_leaks() -> None:
    pytest.importorskip("bm25s")
    archive = registry.get("archive")
    assert isinstance(archive, Readable)
    texts = {split: [str(archive.statement(t)) for t in archive.problems(split)] for split in ("train", "heldout")}
    given = [replace(GOOD, problem=text) for text in texts["train"][:500]]
    assert keep("leakage", *given, rules=Rules(heldout=tuple(texts["heldout"])))[1].dropped == 0
    given[7] = replace(GOOD, problem=texts["heldout"][100])
    assert keep("leakage", *given, rules=Rules(heldout=tuple(texts["heldout"])))[1].dropped == 1


def test_all_filters_in_order_and_any_left_out() -> None:
    wrong = replace(GOOD, correct=False)
    kept, reports = filtered([GOOD, wrong, GOOD], Rules())
    assert kept == (GOOD,)
    assert [report.name for report in reports] == list(FILTERS)
    assert all(later.read == before.kept + before.added for before, later in itertools.pairwise(reports))
    assert filtered([GOOD, wrong, GOOD], with_settings(leave_out=list(FILTERS))) == ((GOOD, wrong, GOOD), ())
    for name in FILTERS:
        reports = filtered([GOOD, wrong], with_settings(leave_out=[name]))[1]
        assert name not in [report.name for report in reports] and len(reports) == len(FILTERS) - 1


def test_what_cannot_be_written_is_dropped_and_counted() -> None:
    rules = with_settings(leave_out=list(FILTERS))
    kept, reports = filtered([GOOD, replace(GOOD, system="\ud800")], rules)
    assert len(kept) == 1 and reports[-1].why == {"cannot be written": 1} and "surrogate" in reports[-1].examples[0]


def test_nothing_in_nothing_out() -> None:
    kept, reports = filtered([], Rules(heldout=("x",)))
    assert kept == () and all(report.read == 0 for report in reports)


# --- similarity


@given(st.lists(st.text(max_size=20), max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_text_is_found_again_and_texts_without_words_never(texts: list[str]) -> None:
    index = Index(0.9)
    for text in texts:
        index.add(text, shingles(text))
    for text in texts:
        if shingles(text):
            found = index.find(shingles(text))
            assert found is not None and similarity(shingles(found), shingles(text)) >= 0.9
        else:
            assert index.find(shingles(text)) is None


def test_scripts_without_spaces_have_words() -> None:
    assert len(shingles("東京は日本の首都です")) == 8
    assert similarity(shingles("東京は日本の首都です"), shingles("東京は日本の首都でした")) > 0.4
    assert similarity(shingles("Who, is THERE?"), shingles("who , is  there ?")) == 1.0


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_pairs_above_the_threshold_are_found(threshold: float) -> None:
    rng = random.Random(3)
    missed = pairs = 0
    for _ in range(300):
        words = [f"w{rng.randrange(10**6)}" for _ in range(200)]
        other = [word if rng.random() < 0.98 else "x" for word in words]
        one, two = shingles(" ".join(words)), shingles(" ".join(other))
        index = Index(threshold)
        index.add("one", one)
        near = similarity(one, two) >= threshold
        pairs += near
        assert index.find(two) in (("one", None) if near else (None,))
        missed += near and index.find(two) is None
    assert pairs > 60 and missed <= 0.02 * pairs


def test_comparisons_grow_with_the_number_of_texts_and_not_with_its_square() -> None:
    """Also for texts that are all alike without being near-duplicates, among which one still finds its own."""
    rng = random.Random(5)
    index, shared, count = Index(0.9), [f"s{i}" for i in range(60)], 1200
    texts = [" ".join([*shared, *(f"w{rng.randrange(10**6)}" for _ in range(12))]) for _ in range(count)]
    for number, text in enumerate(texts):
        assert index.find(shingles(text)) is None
        index.add(str(number), shingles(text))
    assert 5 * count < index.compared <= 20 * count
    assert index.find(shingles(f"{texts[700]} more")) == "700"
