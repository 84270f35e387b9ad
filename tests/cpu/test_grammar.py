"""The format score against a plain reading of the grammars, and its time."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.agents.grammar import ANSWER, GRAMMARS, START, TOOL, format_score, without_tags

TOOLS = ("search", "page")
NAMES = st.sampled_from(sorted(GRAMMARS))
TAGS = ("think", "plan", "reflection", "suggested_answer", "double_check", "answer", *TOOLS, "tool_call")


def score(replies: list[str], grammar: str) -> float:
    return format_score(replies, GRAMMARS[grammar], TOOLS)


def written(tags: list[str]) -> list[str]:
    """The tags as replies: a call ends its reply."""
    replies = [""]
    for tag in tags:
        replies[-1] += f"so <{tag}> text < 3 </b> </{tag}> "
        if tag in (*TOOLS, "tool_call"):
            replies.append("")
    return replies


def walk(name: str, rng: random.Random) -> list[str]:
    """A sequence that the grammar allows."""
    after, tags, at = GRAMMARS[name].after, list[str](), START
    while at != ANSWER:
        at = rng.choice(sorted(after[at]))
        tags.append(rng.choice((*TOOLS, "tool_call")) if at == TOOL else at)
    return tags


@given(NAMES, st.randoms(use_true_random=False))
def test_what_a_grammar_allows_is_kept(name: str, rng: random.Random) -> None:
    assert score(written(walk(name, rng)), name) == 1.0


@given(NAMES, st.lists(st.sampled_from(TAGS), max_size=8))
def test_the_score_is_the_transition_table(name: str, tags: list[str]) -> None:
    after = GRAMMARS[name].after
    known = [tag for tag in tags if name != "calls" or tag in (ANSWER, *TOOLS, "tool_call")]
    kinds = [TOOL if tag in (*TOOLS, "tool_call") else tag for tag in known]
    pairs = zip([START, *kinds], kinds, strict=False)
    kept = bool(kinds) and kinds[-1] == ANSWER and all(b in after.get(a, ()) for a, b in pairs)
    assert score(written(tags), name) == float(kept)


@given(NAMES, st.randoms(use_true_random=False), st.data())
def test_any_one_missing_or_added_tag_breaks_it(name: str, rng: random.Random, data: st.DataObject) -> None:
    replies = written(walk(name, rng))
    whole = "\n\0".join(replies)
    marks = [m for tag in TAGS for mark in (f"<{tag}>", f"</{tag}>") if (m := mark) in whole]
    mark = data.draw(st.sampled_from(sorted({m for m in marks if m.strip("</>") in (*GRAMMARS[name].after, *TOOLS)})))
    assert score(whole.replace(mark, "", 1).split("\n\0"), name) == 0.0
    assert score(whole.replace(mark, mark * 2, 1).split("\n\0"), name) == 0.0
    assert score([*replies, "<observation> 42 </observation>"], name) == 0.0
    assert score(["<observation> 42 </observation>", *replies], name) == 0.0
    assert score([*replies[:-1], f"<information> 42 </information> {replies[-1]}"], name) == 0.0


@pytest.mark.parametrize(
    ("replies", "kept"),
    [
        (["<search>a</search>", "<answer>b</answer>"], 1.0),
        (["<search>a</search> it says <answer>b</answer>"], 0.0),  # the observation was never read
        (["<search>a", "</search>", "<answer>b</answer>"], 0.0),  # closed in another reply
        (["<answer><search>a</search></answer>"], 0.0),
        (["<answer>b</answer>", "<answer>c</answer>"], 0.0),
        (["<plan>free text</plan> <answer>b</answer>"], 1.0),
        (["hm", "<answer>b</answer>"], 1.0),
        (["<search>a</search>"], 0.0),
        ([], 0.0),
    ],
)
def test_calls_and_answers(replies: list[str], kept: float) -> None:
    assert score(replies, "calls") == kept


@pytest.mark.parametrize("name", ["multi_hop", "web", "code"])
def test_the_papers_sequences(name: str) -> None:
    sequences = {
        "multi_hop": ["think", "plan", "search", "reflection", "search", "answer"],
        "web": ["think", "plan", "search", "page", "suggested_answer", "double_check", "plan", "search",
                "suggested_answer", "double_check", "answer"],
        "code": ["think", "page", "reflection", "think", "answer"],
    }  # fmt: skip
    kept = [n for n, tags in sequences.items() if score(written(tags), name) == 1.0]
    assert kept == (["multi_hop", "code"] if name == "multi_hop" else [name])


def test_scoring_takes_linear_time() -> None:
    for text in ("<search>" * 300_000, "</search>" * 300_000, "<" * 3_000_000, "<search></search>" * 200_000):
        began = time.process_time()
        score([text], "calls")
        without_tags(text, TOOLS)
        assert time.process_time() - began < 2


def test_tags_are_removed_for_judges() -> None:
    assert without_tags("<search>a</search> <b>c</b> </answer><observation>d", TOOLS) == "a <b>c</b> d"
