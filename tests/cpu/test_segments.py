"""Replies split by agent, and the agents' colors: contrast, color blindness and terminals."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.color import Color, ColorSystem

from icrl_megatron import report
from icrl_megatron.report.segments import PALETTE, ROLES, TaggedText, colors, split, tools_of
from icrl_megatron.types import Attempt, Completion, Episode, Task, Turn

TOOLS = ("page", "code")
NAMES = (*ROLES, "answer", "tool_call", "search", *TOOLS, "b")
PIECES = [
    *(f"<{name}>" for name in NAMES),
    *(f"</{name}>" for name in NAMES),
    "<",
    ">",
    "</",
    " ",
    "\n",
    "x",
    "漢",
    "\x1b",
]
PIECES += ['{"name": "page", "arguments": {}}', '{"name": 3}', "[" * 2000]


def parts(reply: str) -> list[tuple[str, str, str]]:
    return [(s.agent, s.kind, s.text) for s in split(reply, TOOLS)]


def test_reply_of_several_agents() -> None:
    assert parts("<plan> home </plan> <search> p 4 </search>") == [
        ("plan", "text", "<plan> home </plan>"),
        ("", "text", " "),
        ("search", "call", "<search> p 4 </search>"),
    ]
    assert split("north") == (TaggedText("", "north", "text"),)
    assert split("") == ()


@pytest.mark.parametrize(
    ("reply", "agents"),
    [
        ("<page> x </page>", ["page call"]),
        ("<b> x </b>", [" text"]),  # a tag that belongs to no agent
        ("<think> a <search> q </search> b </think>", ["think text", "search call", "think text"]),
        ("<plan> a <think> b </plan> c", ["plan text", "think text", " text"]),  # an outer tag closes an inner one
        ("<plan> a <answer> 4", ["plan text", "answer answer"]),  # unclosed
        ("<search> a <answer> 4 </answer>", ["search call", "answer answer"]),  # an unclosed call ends at a tag
        ("<search> a <search> b </search>", ["search call", "search call"]),
        ('<code> print("<answer>") </code>', ["code call"]),  # a closed call holds text
        ("<code> </think> <plan> </code> a", ["code call", " text"]),
        ("a </plan> b", [" text"]),  # nothing to close
        ("a </think> b", ["think text", " text"]),  # opened by the chat template
        (
            '<think>\na\n</think><tool_call>\n{"name": "page", "arguments": {}}\n</tool_call>',
            ["think text", "page call"],
        ),
        ("<tool_call> {broken </tool_call>", ["tool_call call"]),
        ('<tool_call>{"name": ["x"]}</tool_call>', ["tool_call call"]),
        (f'<tool_call>{{"name": "{"x" * 65}"}}</tool_call>', ["tool_call call"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ["tool_call call"]),
        ("<tool_call>" + "9" * 10_000 + "</tool_call>", ["tool_call call"]),
    ],
)
def test_unclosed_nested_and_broken_tags(reply: str, agents: list[str]) -> None:
    found = split(reply, TOOLS)
    assert [f"{s.agent} {s.kind}" for s in found] == agents
    assert "".join(s.text for s in found) == reply


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=40).map("".join))
def test_segments_join_to_the_reply(reply: str) -> None:
    found = split(reply, TOOLS)
    assert "".join(s.text for s in found) == reply
    assert all(s.text for s in found)
    assert all(s.agent or s.kind == "text" for s in found)


@pytest.mark.parametrize(
    "piece", ["<think>", "<search>", "<think></plan>", "<think><plan></think>", "<search></page>", "<", "</", "<answer"]
)
def test_split_takes_linear_time(piece: str) -> None:
    reply = piece * (500_000 // len(piece)) + "</search>"
    begun = time.process_time()
    found = split(reply, TOOLS)
    assert time.process_time() - begun < 10  # takes under a second; a quadratic algorithm takes minutes
    assert sum(len(s.text) for s in found) == len(reply)


def test_tools_are_the_tags_of_parsed_actions() -> None:
    actions = ["<page>t 1</page>", "<answer>4</answer>", None, "go <north>", "<b>", "<tool_call>{}</tool_call>"]
    turns = tuple(Turn(Completion((), (), "stop", 0), "", action, "", ()) for action in actions)
    attempt = Attempt(0, (), (), turns, 0.0, False, "", "done")
    assert tools_of([Episode(Task("t/0", "t", "train", "?"), 0, (attempt,), ())]) == {"page"}


def test_each_agent_has_its_own_color_in_any_order() -> None:
    known = colors(["plan", "search", "page", "answer", "calculator", "check"])
    assert len(set(known.values())) == 6
    more = colors(["zoom", "answer", "search", "", "plan", "lookup", "page", "check", "calculator"])
    assert known.items() <= more.items() and "" not in more
    assert colors(reversed([*more])) == more
    assert len(set(more.values())) == 8
    both = colors(["web_search", "wiki_search"])
    assert len(set(both.values())) == 2
    assert set(colors(map(str, range(40))).values()) == set(PALETTE)


def linear(color: str) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def luminance(color: str) -> float:
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]


@pytest.mark.parametrize("sight", [np.eye(3).tolist(), PROTANOPIA, DEUTERANOPIA], ids=["normal", "protan", "deutan"])
def test_colors_differ_for_the_color_blind(sight: list[list[float]]) -> None:
    seen = [lab(np.array(sight) @ linear(color)) for color in PALETTE]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 20


def test_colors_are_readable_in_both_themes_and_in_terminals() -> None:
    css = (Path(next(iter(report.__path__))) / "web" / "page.css").read_text()
    card = re.search(r"--card: light-dark\((#\w{6}), (#\w{6})\)", css)
    assert card is not None
    for color, ground in itertools.product(PALETTE, (*card.groups(), "#ffffff", "#000000")):
        light, dark = sorted((luminance(color), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, (color, ground)
    eight_bit = {Color.parse(color).downgrade(ColorSystem.EIGHT_BIT).number for color in PALETTE}
    assert len(eight_bit) == len(PALETTE)
