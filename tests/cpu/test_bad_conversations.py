"""Rows that cannot be trained on, in every format: a run ends before it loads a model, and names file, line, remedy."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import qwen_tokenizers
from trajectory_files import afm, alpaca, oagents, openai, sharegpt, smolagents, write_jsonl

from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.run import conversations
from icrl_megatron.run.conversation_checks import DATA_RECIPE
from icrl_megatron.run.problems import ProblemShare
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.rollout_schema import RolloutSettings
from icrl_megatron.utils.errors import ConfigError

Rows = list[dict[str, Any]]
GOOD: dict[str, Callable[[int], Rows]] = {
    "openai": lambda n: [openai(n)],
    "sharegpt": lambda n: [sharegpt(n)],
    "alpaca": lambda n: [alpaca(n)],
    "afm": lambda n: [afm(n)],
    "oagents": oagents,
    "smolagents": smolagents,
}


def called(message: dict[str, Any]) -> Any:
    return message["tool_calls"][0]["function"]


def arguments(text: str) -> Callable[[Rows], object]:
    return lambda rows: called(rows[0]["messages"][2]).update(arguments=text)


def turn(number: int, value: str) -> Callable[[Rows], object]:
    return lambda rows: rows[0]["conversations"][number].update(value=value)


def response(text: str) -> Callable[[Rows], object]:
    return lambda rows: rows[0].update(response=text)


DEEP = functools.reduce(lambda inner, _: {"a": inner}, range(400), {})
LONG = "word " * 2000
ANSWERED = "a call without an answer; add the answer, or delete the call"
TOO_LONG = "longer than rollout.context_tokens=400, the longest is FILE, line LINE with"
BAD: list[tuple[str, str, Callable[[Rows], object], str]] = [
    ("openai", "role", lambda r: r[0]["messages"][1].pop("role"), "a message with the role None; the roles are system"),
    ("openai", "call", lambda r: r[0]["messages"].pop(3), ANSWERED),
    ("openai", "last", lambda r: r[0].update(messages=r[0]["messages"][:3]), "of 'search' without an answer; add"),
    ("openai", "answer", lambda r: r[0]["messages"][2].pop("tool_calls"), "an answer of 'tool' without a call; delete"),
    ("openai", "id", lambda r: r[0]["messages"][3].update(tool_call_id="b"), "the id 'b'; correct the id"),
    ("openai", "tool", lambda r: r[0].pop("tools"), "the unknown tool 'search' (its tools: none); add it to `tools`"),
    ("openai", "json", arguments("{"), "'search': broken JSON"),
    ("openai", "list", arguments("[1]"), "'search' are '[1]'; write"),
    ("openai", "nan", arguments('{"query": NaN}'), "NaN is not JSON"),
    ("openai", "mask", lambda r: [m.update(weight=0) for m in r[0]["messages"]], "no token would be trained on; keep"),
    ("openai", "long", lambda r: r[0]["messages"][4].update(content=LONG), TOO_LONG),
    ("openai", "parts", lambda r: r[0]["messages"][1].update(content=[{"type": "image"}]), "not text"),
    ("openai", "user", lambda r: r[0]["messages"].pop(1), "there is no message of the user; add the problem"),
    ("openai", "surrogate", lambda r: r[0]["messages"][1].update(content="\ud800"), "half a surrogate pair"),
    ("openai", "escaped", arguments('{"query": "\\ud800"}'), "half a surrogate pair, which"),
    ("openai", "described", lambda r: r[0]["tools"][0]["function"].update(description="\ud800"), "half a"),
    ("openai", "large", arguments('{"query": 1e999}'), "too large a number"),
    ("openai", "twice", arguments('{"a": 1, "a": 2}'), "'a' twice; delete"),
    ("openai", "weight", lambda r: r[0]["messages"][-1].update(weight="0"), "the weight '0'; write 0 or 1"),
    ("openai", "heads", lambda r: r[0]["messages"].insert(1, {"role": "developer"}), "several messages of system"),
    ("openai", "deep", arguments("[" * 200_000), "JSON that is nested too deeply"),
    ("openai", "deeper", lambda r: r[0]["tools"][0]["function"].update(parameters=DEEP), "nested too deeply"),
    ("sharegpt", "list", lambda r: r[0]["conversations"][0].update({"from": ["x"]}), "a turn from ['x']"),
    ("alpaca", "list", lambda r: r[0].update(history=5), "`history` is '5', not a list"),
    ("oagents", "list", lambda r: r[2].update(tool_calls=5), "`tool_calls` is '5', not a list"),
    ("sharegpt", "role", lambda r: r[0]["conversations"][1].pop("from"), "a turn from None; the roles are system"),
    ("sharegpt", "call", lambda r: r[0]["conversations"].pop(2), ANSWERED),
    ("sharegpt", "answer", lambda r: r[0]["conversations"].pop(1), "an answer of 'tool' without a call; delete"),
    ("sharegpt", "tool", lambda r: r[0].pop("tools"), "the unknown tool 'search' (its tools: none); add it to `tools`"),
    ("sharegpt", "tools", lambda r: r[0].update(tools="[{"), "`tools`: broken JSON"),
    ("sharegpt", "json", turn(1, '{"name": "search", "arguments": {"query":'), "function_call: broken JSON"),
    ("sharegpt", "name", turn(1, '{"arguments": {}}'), "a call without the name of a tool"),
    ("sharegpt", "mask", lambda r: r[0].update(conversations=r[0]["conversations"][:1]), "no token would be"),
    ("sharegpt", "long", turn(5, LONG), TOO_LONG),
    ("alpaca", "role", lambda r: r[0].update(history=[["hi"]]), "`history` is not a list of [message, reply]; correct"),
    ("alpaca", "call", lambda r: r[0].update(output="<observation>4</observation>"), "set format=afm for this entry"),
    ("alpaca", "user", lambda r: r[0].update(instruction="", input="", history=[]), "there is no message of the user"),
    ("alpaca", "mask", lambda r: r[0].update(output="", history=[]), "no token would be trained on; keep at least one"),
    ("alpaca", "long", lambda r: r[0].update(output=LONG), TOO_LONG),
    ("afm", "role", lambda r: r[0].update(prompt=""), "there is no message of the user; add the problem"),
    ("afm", "call", response("<web_search>a</web_search><answer>b</answer>"), "'web_search' without an answer; add"),
    ("afm", "answer", response("<think>a</think><observation>b</observation>"), "after <think>, which is no call"),
    ("afm", "open", response("<web_search>a</web_search><observation>b"), "is not closed; add </observation>"),
    ("afm", "mask", response(""), "no token would be trained on; keep at least one reply"),
    ("afm", "long", response(f"<answer>{LONG}</answer>"), TOO_LONG),
    ("oagents", "role", lambda r: r[0].update(task=""), "there is no message of the user; add the problem"),
    ("oagents", "call", lambda r: r[2].pop("observations"), "a call of 'search' without an answer; add the answer"),
    ("oagents", "answer", lambda r: r[2].pop("tool_calls"), "observations of a step without a call"),
    ("oagents", "tool", lambda r: r[0].update(tools=[{"name": "page"}]), "the unknown tool 'search' (its tools: page)"),
    ("oagents", "json", lambda r: called(r[2]).update(arguments='{"query":'), "'search': broken JSON"),
    ("oagents", "name", lambda r: called(r[2]).pop("name"), "a call without the name of a tool"),
    ("oagents", "mask", lambda r: r.__delitem__(slice(1, None)), "no token would be trained on; keep"),
    ("oagents", "long", lambda r: r[3].update(model_output=LONG), TOO_LONG),
    ("smolagents", "call", lambda r: r[3].update(observations=None, error=None), "without an answer; add the answer"),
    ("smolagents", "answer", lambda r: r[4].update(tool_calls=[]), "observations of a step without a call"),
    ("smolagents", "long", lambda r: r[4].update(observations=LONG), TOO_LONG),
]  # fmt: skip


@functools.cache
def prompter() -> Prompter:
    return Prompter(qwen_tokenizers.build("qwen3"), RolloutSettings())


@pytest.mark.parametrize(("format", "what", "spoil", "said"), BAD, ids=[f"{f}-{w}" for f, w, _, _ in BAD])
def test_bad_rows_have_a_remedy(
    format: str, what: str, spoil: Callable[[Rows], object], said: str, tmp_path: Path
) -> None:
    good, bad = GOOD[format](2), copy.deepcopy(GOOD[format](1))
    spoil(bad)
    path = write_jsonl(tmp_path / "rows.jsonl", [*good, *bad])
    call = "tags" if format == "afm" else "qwen3"
    entry = [f"warm_start.data.0.path={path}", f"warm_start.data.0.tool_format={call}"]
    settings = load(DATA_RECIPE, [*entry, "rollout.context_tokens=400"])
    with pytest.raises(ConfigError) as refused:
        conversations.load(settings, prompter(), 4096, ProblemShare(), print)
    message, line = str(refused.value), str(len(good) + 1)
    assert f"{path}, line {line}" in message and "1 of 2" in message
    assert said.replace("FILE", str(path)).replace("LINE", line) in message
    assert ("warm_start.too_long=drop or cut" if what == "long" else "or set warm_start.bad_rows=drop") in message
    lenient = load(
        DATA_RECIPE, [*entry, "rollout.context_tokens=400", "warm_start.bad_rows=drop", "warm_start.too_long=drop"]
    )
    assert conversations.load(lenient, prompter(), 4096, ProblemShare(), print).dropped == 1


def test_a_damaged_list_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, said in (
        (json.dumps([openai(1)])[:-9], "broken JSON"),
        (json.dumps(openai(1)), "not a list of JSON objects"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{path}: {said}"):
            conversations.load(
                load(DATA_RECIPE, [f"warm_start.data.0.path={path}"]), prompter(), 4096, ProblemShare(), print
            )
