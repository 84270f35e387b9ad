"""Tools and their formats: the toolbox over real coroutines, schemas of arguments, round trips."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from icrl_megatron.agents.formats import FinalAnswer, Malformed, Qwen3, Tags, ToolCalls
from icrl_megatron.agents.search import NOTHING, Search
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits, ToolSession
from icrl_megatron.agents.tools import Tool, ToolCall, ToolFailure, ToolSpec, ToolUseError
from icrl_megatron.utils.errors import ConfigError

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


class Doubler:
    """Doubles n. Negative numbers are the model's mistake; the first `broken` calls fail."""

    spec = ToolSpec("double", "Doubles n.", NUMBER)

    def __init__(self, seconds: float = 0.0, broken: int = 0) -> None:
        self.seconds, self.broken, self.calls, self.running, self.most = seconds, broken, 0, 0, 0

    async def call(self, arguments: Any) -> str:
        self.calls, self.running = self.calls + 1, self.running + 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if self.calls <= self.broken:
            raise ToolFailure("the line is down")
        if arguments["n"] < 0:
            raise ToolUseError("n must not be negative")
        return str(2 * arguments["n"])


def limits(**changes: float) -> ToolLimits:
    return ToolLimits(**({"call_s": 5.0, "pause_s": 0.001} | changes))  # type: ignore[arg-type]


def session(tool: Doubler, **changes: float) -> ToolSession:
    return Toolbox([tool], limits(**changes)).session()


def ask(opened: ToolSession, *calls: ToolCall) -> list[tuple[str, str]]:
    async def run() -> list[tuple[str, str]]:
        return [(r.text, r.outcome) for r in [await opened.call(call) for call in calls]]

    return asyncio.run(run())


def double(n: object) -> ToolCall:
    return ToolCall("double", {"n": n})


def test_answers_repeats_and_stops() -> None:
    tool = Doubler()
    opened = session(tool, repeats=1)
    found = ask(opened, double(4), double(5), double(4), double(4))
    assert found[:3] == [("8", "answer"), ("10", "answer"), ("8", "repeat")]
    assert found[3][1] == "stopped" and "already" in found[3][0]
    assert tool.calls == 2 and opened.made("answer") == 2 and opened.made("repeat", "stopped") == 2
    assert ask(opened.box.session(), double(4)) == [("8", "answer")] and tool.calls == 3  # another episode


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall("halve", {"n": 1}), "There is no tool 'halve'. The tools are double."),
        (double("four"), "double: n: 'four' is not of type 'integer'"),
        (ToolCall("double", {}), "double: 'n' is a required property"),
        (ToolCall("double", {"n": 1, "m": 2}), "double: Additional properties are not allowed ('m' was unexpected)"),
        (double(-1), "n must not be negative"),
    ],
)
def test_the_model_observes_its_own_mistakes(call: ToolCall, said: str) -> None:
    opened = session(Doubler())
    assert ask(opened, call) == [(said, "invalid")]
    assert opened.made("invalid") == 1 and opened.made("answer") == 0


def test_the_order_of_arguments_makes_no_other_call() -> None:
    assert ToolCall("t", {"a": 1, "b": [2]}).key() == ToolCall("t", {"b": [2], "a": 1}).key()
    assert ToolCall("t", {"a": 1}).key() != ToolCall("t", {"a": "1"}).key() != ToolCall("u", {"a": "1"}).key()


def test_failed_infrastructure_is_tried_again_and_never_observed() -> None:
    tool = Doubler(broken=1)
    assert ask(session(tool, tries=2), double(3)) == [("6", "answer")] and tool.calls == 2
    opened = session(Doubler(broken=9), tries=2)
    with pytest.raises(ToolFailure, match="the line is down"):
        ask(opened, double(3))
    assert not opened.counts  # nothing was answered
    slow = session(Doubler(seconds=30), call_s=0.05, tries=1)
    began = time.monotonic()
    with pytest.raises(ToolFailure, match=r"tool 'double' did not answer within 0.05 s"):
        ask(slow, double(3))
    assert time.monotonic() - began < 5


async def test_an_attempt_has_so_many_calls() -> None:
    """Calls at the same time count too, and so do mistakes."""
    tool = Doubler(seconds=0.01)
    opened = Toolbox([tool], limits()).session(most_calls=3)
    first = await asyncio.gather(opened.call(double(1)), opened.call(double("four")))
    rest = await asyncio.gather(*(opened.call(double(n)) for n in (2, 3)))
    assert [result.outcome for result in (*first, *rest)] == ["answer", "invalid", "answer", "refused"]
    assert tool.calls == 2 and opened.counts.total() == 4
    assert (await Toolbox([tool], limits()).session(0).call(double(1))).outcome == "refused"


def test_calls_of_a_tool_are_bounded_over_all_episodes() -> None:
    tool = Doubler(seconds=0.02)
    box = Toolbox([tool], limits(concurrency=3))

    async def run() -> None:
        await asyncio.gather(*(box.session().call(double(n)) for n in range(12)))

    asyncio.run(run())
    asyncio.run(run())  # another event loop
    assert tool.most == 3 and tool.calls == 24


async def test_calls_of_one_reply_end_together() -> None:
    """After a failure no other call is left running, and the same holds if the episode is cancelled."""
    tool = Doubler(seconds=30)

    class Broken(Doubler):
        spec = ToolSpec("broken", "Fails at once.", NUMBER)

    opened = Toolbox([tool, Broken(broken=9)], limits(call_s=60.0, tries=1)).session()
    with pytest.raises(ToolFailure, match="the line is down"):
        await opened.call_all((double(1), ToolCall("broken", {"n": 1}), double(2)))
    assert tool.running == 0
    waiting = asyncio.ensure_future(opened.call_all((double(3), double(4))))
    await asyncio.sleep(0.01)
    assert tool.running == 2
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert tool.running == 0 and tool.calls == 4


def test_each_call_has_its_own_deadline() -> None:
    """One timer serves all calls of an event loop. Calls that begin later end later, also after a pause."""
    tool = Doubler(seconds=0.3)
    box = Toolbox([tool], limits(call_s=0.6, tries=1))

    async def late(after: float, seconds: float) -> tuple[float, str]:
        await asyncio.sleep(after)
        tool.seconds, began = seconds, time.monotonic()
        try:
            answer = (await box.session().call(double(1))).text
        except ToolFailure:
            answer = "late"
        return time.monotonic() - began, answer

    async def run() -> list[tuple[float, str]]:
        first = await asyncio.gather(late(0.0, 30), late(0.2, 0.3), late(0.4, 30))
        return [*first, await late(0.7, 30), await late(0.0, 0.3)]

    for _ in range(2):  # the second time on another event loop
        found = asyncio.run(run())
        assert [text for _, text in found] == ["late", "2", "late", "late", "2"]
        assert all(took < 5 and (text == "2" or took >= 0.59) for took, text in found)


TEXT_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "minLength": 2, "maxLength": 3}, "b": {"type": "string"}},
    "required": ["a"],
}
VALUES = st.text(max_size=5) | st.integers() | st.none() | st.lists(st.text(max_size=1), max_size=3)


@given(
    st.sampled_from([TEXT_SCHEMA, {**TEXT_SCHEMA, "additionalProperties": False}, NUMBER, {"type": "object"}]),
    st.dictionaries(st.sampled_from("abcn"), VALUES, max_size=3),
)
def test_arguments_are_accepted_exactly_if_they_satisfy_the_schema(schema: Any, arguments: dict[str, Any]) -> None:
    tool = Doubler()
    tool.spec = ToolSpec("double", "", schema)
    accepted = not Toolbox([tool], limits()).mistake(ToolCall("double", arguments))
    assert accepted is Draft202012Validator(schema).is_valid(arguments)


def test_a_toolbox_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['double'\] are named twice"):
        Toolbox([Doubler(), Doubler()], limits())
    with pytest.raises(ConfigError, match=r"'double' takes \['n'\], but a tag holds one text; set agent.format=qwen3"):
        Tags([Doubler.spec])


def doubler(schema: Any, by_server: bool = True) -> Tool:
    tool = Doubler()
    tool.spec = ToolSpec("double", "", schema, by_server=by_server)
    return tool


@pytest.mark.parametrize("by_server", [False, True])
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "no such type"}, "is not a JSON schema"),
        ({"$ref": "#"}, "refers to itself without end"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"anyOf": [{"$ref": "#/$defs/b"}]}}}, "itself"),
        ({"properties": {"a": {"$ref": "#/nope"}}}, "refers to '#/nope', which it does not have"),
        ({"properties": {"a": {"$ref": "#/title"}}, "title": "b"}, "which is no schema"),
        ({"items": {"$ref": "http://127.0.0.1:1/a.json"}}, "which is not a part of it"),
        ({"items": {"$id": "http://h/a", "$ref": "#/b"}}, "has an `$id` inside"),
        ({"description": "\ud800"}, "half a surrogate pair"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(3000), {}), "nested too deeply"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(schema: Any, said: str, by_server: bool) -> None:
    with pytest.raises(ConfigError, match=f"'double': the schema of its parameters .*{re.escape(said)}.*; correct it"):
        Toolbox([doubler(schema, by_server)], limits())


LIST = {"type": "array", "anyOf": [{"items": {"$ref": "#/$defs/list"}}, {"items": {"$ref": "#/$defs/list"}}]}
NESTED = functools.reduce(lambda inner, _: [inner], range(40), 1)
SLOW = {"type": "string", "pattern": "^(a+)+$"}
OTHER = "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize(
    ("schema", "value", "said"),
    [
        ({"properties": {"a": SLOW}}, "a" * 40 + "b", ""),
        ({"properties": {"a": {"$schema": OTHER, **SLOW}}}, "a" * 40 + "b", ""),
        ({"properties": {"pattern": {}}, "patternProperties": {"": SLOW}, "additionalProperties": False}, "a" * 40, ""),
        ({"properties": {"a": {"not": SLOW}}}, 1, ""),
        ({"properties": {"a": SLOW}}, 1, "a: 1 is not of type 'string'"),
        ({"properties": {"a": {"oneOf": [SLOW, {"type": "null"}]}}}, 1, "a: 1 is not"),
        ({"properties": {"a": {"$ref": "#/$defs/list"}}, "$defs": {"list": LIST}}, NESTED, "too large"),
        ({"properties": {"a": {"multipleOf": 0.01}}}, 10**400, "cannot be checked"),
        ({"properties": {"a": {"multipleOf": 3}}}, math.inf, "not a multiple of 3"),
        ({"properties": {"a": {"items": {"$ref": "#"}}}}, [{"a": []}], ""),
    ],
)  # fmt: skip
def test_the_schema_of_a_server_cannot_stop_a_rollout(schema: Any, value: Any, said: str) -> None:
    began = time.monotonic()
    found = Toolbox([doubler({"type": "object", **schema})], limits()).mistake(ToolCall("double", {"a": value}))
    assert (said in found if said else not found) and time.monotonic() - began < 5


async def places(query: str, count: int) -> list[str]:
    return [f"{query} " * 50, "Rome"][:count] if query == "Paris" else []


@pytest.mark.parametrize(("query", "found"), [("Paris", "(1) Paris Pari\n\n(2) Rome"), (" ", NOTHING), ("x", NOTHING)])
def test_passages_are_numbered_and_cut(query: str, found: str) -> None:
    tool = Search(places, passages=2, passage_chars=10)
    assert asyncio.run(tool.call({"query": query})) == found


@pytest.mark.parametrize(
    ("reply", "parsed"),
    [
        ("So <search> a </search>", ToolCalls((ToolCall("search", {"query": "a"}),))),
        ("<search>a</search><answer>b</answer>", FinalAnswer("b")),
        ("<answer>b</answer> or <search>a</search>", ToolCalls((ToolCall("search", {"query": "a"}),))),
        ("I do not know", None),
        ("<answer>b", Malformed("The tag <answer> is not closed: end it with </answer>.")),
        ("</search><search>", Malformed("The tag <search> is not closed: end it with </search>.")),
    ],
)
def test_the_last_tag_counts(reply: str, parsed: object) -> None:
    form = Tags([Search.spec])
    assert form.parse(reply) == parsed
    if isinstance(parsed, ToolCalls | FinalAnswer):
        assert form.parse(form.render(parsed)) == parsed


@pytest.mark.parametrize(
    ("value", "said"),
    [("1e999", "1e999 is too large a number"), ("NaN", "NaN is not JSON"), ('"\\ud800"', "half a surrogate pair")],
)
def test_arguments_that_no_tool_takes_are_malformed(value: str, said: str) -> None:
    call = f'{{"name": "search", "arguments": {{"query": {value}}}}}'
    found = Qwen3([Search.spec]).parse(f"<tool_call>{call}</tool_call>")
    assert isinstance(found, Malformed) and said in found.problem


def test_reading_a_reply_takes_linear_time() -> None:
    reader = Tags([Search.spec])
    for text in ("<search>" * 300_000, "</search>" * 300_000, "<answer><search>" * 200_000):
        began = time.process_time()
        reader.parse(text)
        assert time.process_time() - began < 1


def example(heading: str) -> dict[str, Any]:
    """What the Python block below a heading of docs/EXTENDING.md defines."""
    page = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text()
    code = page.split(f"## {heading}\n")[1].split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def test_the_documented_tool_works() -> None:
    opened = Toolbox([example("A tool")["Reverse"]()], limits()).session()
    calls = [ToolCall("reverse", {"text": text}) for text in ("Rome", "", 7)]  # type: ignore[dict-item]
    found = ask(opened, *calls)
    assert found[:2] == [("emoR", "answer"), ("text must not be empty", "invalid")]
    assert found[2] == ("reverse: text: 7 is not of type 'string'", "invalid")


def test_the_documented_format_works() -> None:
    form = example("A tool format")["Lines"]([example("A tool")["Reverse"].spec])
    for action in (ToolCalls((ToolCall("reverse", {"text": "Rome and Paris"}),)), FinalAnswer("42")):
        assert form.parse("I think.\n" + form.render(action)) == action
    assert form.parse("hm") is None and form.parse("") is None and isinstance(form.parse("CALL "), Malformed)
    assert "reverse" in form.instructions()
