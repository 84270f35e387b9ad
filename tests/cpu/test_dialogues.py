"""Tool calls as tokens: episodes equal the published templates' rendering; stop strings; tools that try to forge."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import byte_model
import numpy as np
import pytest
import qwen_tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.agents.formats import (
    FORMATS,
    MOST_CALLS,
    FinalAnswer,
    Malformed,
    Qwen3,
    SearchR1,
    Tags,
    ToolCalls,
    harmless,
    make_format,
)
from icrl_megatron.agents.search import Search
from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.stop_texts import StopTexts
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.settings.schema import EngineSettings, RolloutSettings
from icrl_megatron.types import Completion
from icrl_megatron.utils.errors import ConfigError

ADD = ToolSpec("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}})
SPECS = [Search.spec, ADD]
TEMPLATES = tuple(qwen_tokenizers.TEXT_OF)
MODES: tuple[tuple[str, str], ...] = (*((template, "auto") for template in TEMPLATES), ("qwen3", "off"))
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40) | st.sampled_from(
    ["A mug.", "1.\n\n2", "}", "a\r\n", "<", "東京。", "e\u0301!", "x </b>\n<b>", "\t-\t", "'s"]
)
CALLS = st.builds(
    ToolCall,
    st.sampled_from(["search", "add"]),
    st.dictionaries(st.sampled_from(["query", "a", "b"]), TEXTS | st.integers() | st.lists(TEXTS, max_size=2)),
)


@functools.cache
def prompter(template: str, thinking: str = "auto") -> Prompter:
    return Prompter(qwen_tokenizers.build(template), RolloutSettings(thinking=thinking))


def plain(text: str) -> bool:
    """Whether a template leaves a message with this text as it is, and tokenizers do too."""
    return bool(text.strip()) and "<|" not in text and harmless(text, Qwen3.tags)[1] == 0


@pytest.mark.parametrize(("template", "thinking"), MODES)
@given(
    problem=TEXTS.filter(plain),
    thoughts=st.lists(TEXTS.filter(plain), min_size=3, max_size=3),
    called=st.lists(st.lists(st.tuples(CALLS, TEXTS.filter(plain)), min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_ids_of_an_episode_are_those_of_the_published_template(
    template: str, thinking: str, problem: str, thoughts: list[str], called: list[list[tuple[ToolCall, str]]]
) -> None:
    """With thinking where the template keeps it, with several calls in a turn and consecutive tool messages."""
    form, ours = Qwen3(SPECS), prompter(template, thinking)
    thinks = thinking == "auto" and template == "qwen3"
    arguments = {"enable_thinking": False} if thinking == "off" else {}
    ids = list(ours.attempt(problem, form.dialogue))
    messages: list[dict[str, Any]] = [{"role": "user", "content": ours.text("attempt", observation=problem)}]
    for thought, turn in zip(thoughts, called, strict=False):
        calls = tuple(call for call, _ in turn)
        thinking = f"<think>\n{thought.strip()}\n</think>\n\n" if thinks else ""
        reply = ours.encode_reply(thinking + form.render(ToolCalls(calls)))
        ids += [*reply, *ours.observation_ids([text for _, text in turn], ours.ended(reply), form.dialogue)]
        functions = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls]
        messages.append({"role": "assistant", "content": "", "tool_calls": functions} | spoken(thinks, thought))
        messages += [{"role": "tool", "content": text.strip()} for _, text in turn]
    theirs = qwen_tokenizers.build(template).apply_chat_template(
        messages, tools=json.loads(form.dialogue.tools), add_generation_prompt=True, tokenize=False, **arguments
    )
    if arguments:  # the template drops the empty thinking block of earlier replies; we keep what the model read
        shown, empty = qwen_tokenizers.build(template).decode(ids), "<think>\n\n</think>\n\n"
        assert shown.count(empty) == len(called) + 1
        assert shown.replace(empty, "") == unicodedata.normalize("NFC", theirs.replace(empty, ""))
    else:
        assert ids == qwen_tokenizers.build(template)(theirs, add_special_tokens=False).input_ids


def spoken(thinks: bool, thought: str) -> dict[str, str]:
    return {"reasoning_content": thought.strip()} if thinks else {}


def test_a_user_message_makes_the_template_forget_thinking_and_we_keep_it() -> None:
    ours, said = prompter("qwen3"), "<think>\nhm\n</think>\n\nup"
    reply = ours.encode_reply(said)
    kept = [*ours.attempt("go"), *reply, *ours.observation_ids(["a wall"], ours.ended(reply))]
    messages = [
        {"role": "user", "content": ours.text("attempt", observation="go")},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "a wall"},
    ]
    render = qwen_tokenizers.build("qwen3").apply_chat_template
    forgotten = render(messages, add_generation_prompt=True).input_ids
    without = ours.decode(tuple(kept)).replace("<think>\nhm\n</think>\n\n", "")
    assert kept != forgotten and without == ours.decode(tuple(forgotten))


PIECES = ("<", ">", "/", "|", "answer", "tool_call", "think", "im_end", " ", "a", "observation>", "</information>")
FORGED = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@pytest.mark.parametrize("template", TEMPLATES)
@given(text=FORGED)
@settings(deadline=None)
def test_a_tool_cannot_forge_a_call_an_answer_or_the_end_of_a_turn(template: str, text: str) -> None:
    ours, vocabulary = prompter(template), qwen_tokenizers.build(template)
    for name in FORMATS:
        # Qwen's tokens for tool tags mean something in its own form only.
        tags = qwen_tokenizers.TEXT_OF[template] if name == "qwen3" else ()
        controls = set(vocabulary.convert_tokens_to_ids([*qwen_tokenizers.CONTROL, *tags]))
        form = make_format(name, [Search.spec])
        shown, changed = harmless(text, form.tags)
        assert harmless(shown, form.tags) == (shown, 0) and (changed > 0) == (shown != text)
        assert len(shown) == len(text) + changed and shown.replace(" ", "") == text.replace(" ", "")
        if not isinstance(form, Qwen3):
            assert form.parse(shown) is None
        else:
            assert not isinstance(form.parse(shown), ToolCalls)
        alone = ours.observation_ids([""], True, form.dialogue)
        seen = ours.observation_ids([shown], True, form.dialogue)
        assert sum(i in controls for i in seen) == sum(i in controls for i in alone)


PARTS = ("<tool_call>", "</tool_call>", '{"name": "add", "arguments": {"a": 1, "b": 2}}', "</think>", "<think>")
PARTS += ("<answer>", "</answer>", "<search>", "</search>", "Rome", " ", "\n", '{"name": 1}', "{", "\\u003c/answer>")
REPLIES = st.lists(st.sampled_from(PARTS), max_size=9).map("".join)


@pytest.mark.parametrize("form", [Qwen3(SPECS), Tags([Search.spec]), SearchR1([Search.spec])])
@given(reply=REPLIES)
def test_what_is_parsed_can_be_written_and_read_again(form: Tags, reply: str) -> None:
    found = form.parse(reply)
    if isinstance(found, ToolCalls | FinalAnswer):
        assert form.parse(form.render(found)) == found


@given(st.lists(CALLS, min_size=1, max_size=MOST_CALLS))
def test_every_call_can_be_written_and_read_again(calls: list[ToolCall]) -> None:
    form = Qwen3(SPECS)
    assert form.parse(f"<think>a</think> {form.render(ToolCalls(tuple(calls)))}") == ToolCalls(tuple(calls))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("<tool_call>{}", "not closed"),
        ("<think> <tool_call>{}</tool_call>", "thinking is not closed"),
        ("<tool_call>{]</tool_call>", "not JSON"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must have the form"),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "NaN is not JSON"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "nested too deeply"),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call>' * 9, "9 calls in one reply"),
    ],
)
def test_the_model_reads_what_is_wrong_with_its_call(reply: str, said: str) -> None:
    found = Qwen3(SPECS).parse(reply)
    assert isinstance(found, Malformed) and said in found.problem


def test_reading_a_call_takes_linear_time() -> None:
    for text in ("<tool_call>" * 200_000, "</tool_call><think></think>" * 100_000, "<tool_call></tool_call>" * 100_000):
        began = time.process_time()
        Qwen3(SPECS).parse(text)
        assert time.process_time() - began < 1


def test_templates_that_cannot_show_tools_are_refused() -> None:
    dialogue = Qwen3(SPECS).dialogue
    assert prompter("qwen3").extra_tokens(dialogue) > 100 and prompter("qwen3").extra_tokens(Dialogue()) == 0
    plain = copy.deepcopy(qwen_tokenizers.build("qwen3"))
    plain.chat_template = byte_model.CHATML
    with pytest.raises(ConfigError, match="does not show the tool 'search' to the model: use a model whose template"):
        Prompter(plain, RolloutSettings()).extra_tokens(dialogue)
    plain.chat_template = byte_model.CHATML.replace("{% for", "{{ tools }}{% for", 1).replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    with pytest.raises(ConfigError, match="has no tool messages: use a model whose template has, or a format that"):
        Prompter(plain, RolloutSettings()).extra_tokens(dialogue)
    with pytest.raises(ConfigError, match=r"agent\.format=xml: must be one of qwen3, tags, search_r1"):
        make_format("xml", SPECS)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model.build(tmp_path_factory.mktemp("model") / "bytes")


def sample(folder: Path, stops: list[tuple[str, ...]]) -> list[Completion]:
    """One reply of 48 tokens, or up to a stop string, for each seed; all in one batch."""
    engine = LocalEngine(folder, EngineSettings(), torch.float32, "cpu")

    async def together() -> list[Completion]:
        asked = (Sampling(1.0, 48, seed, (), stop) for seed, stop in enumerate(stops))
        return await asyncio.gather(*(engine.generate((5, 6, 7), sampling) for sampling in asked))

    return asyncio.run(together())


def test_a_reply_ends_with_the_token_that_completes_a_stop_string(bytes_folder: Path) -> None:
    decode = tokenizer(bytes_folder).decode
    free = sample(bytes_folder, [()] * 24)
    texts = [decode(list(reply.ids)) for reply in free]
    pairs = [(text[i : i + 2] for i in range(8, len(text) - 1)) for text in texts]
    stops = [(next(p for p in found if p.isascii()) if i % 4 else "\0never", "\0no") for i, found in enumerate(pairs)]
    for reply, stopped, stop in zip(free, sample(bytes_folder, stops), stops, strict=True):
        count = next((n for n in range(1, 49) if stop[0] in decode(list(reply.ids[:n]))), 48)
        assert np.array_equal(stopped.ids, reply.ids[:count])
        assert stopped.finish_reason == ("stop" if count < 48 else "length")
        torch.testing.assert_close(torch.tensor(stopped.logprobs), torch.tensor(reply.logprobs[:count]))
    word = next(i for i in range(len(tokenizer(bytes_folder))) if len(decode([i])) > 2 and decode([i]).isalpha())
    assert StopTexts(tokenizer(bytes_folder), (decode([word])[:2],), 400).completed([5, word])  # inside a token


@given(st.lists(st.sampled_from(["a", "</", "search", ">", "\n", "</search", "<", "é"]), max_size=8), st.data())
@settings(deadline=None)
def test_a_reply_that_goes_on_still_finds_its_stop_string(pieces: list[str], data: st.DataObject) -> None:
    """Wherever it was cut: the tokens of a stop string that had begun are generated again."""
    ours, stop = prompter("qwen3"), ("</search>", "</answer>")
    whole = (*ours.encode_reply("".join(pieces))[:-1], *ours.encode_reply("</search>", stop))
    kept = ours.before_stop(whole[: data.draw(st.integers(0, len(whole) - 1))], stop)
    assume("</search>" not in ours.decode(whole[:-1]))
    assert kept == whole[: len(kept)] and "</search>" in ours.decode(whole[len(kept) :])
    assert ours.before_stop(whole[:3], ()) == whole[:3]


def test_an_inline_observation_continues_the_reply() -> None:
    ours, form = prompter("qwen2_5"), Tags([Search.spec])
    reply = ours.encode_reply("I look. <search>Rome</search>", form.dialogue.stop)
    assert not ours.ended(reply) and ours.ended(ours.encode_reply("I look.", form.dialogue.stop))
    seen = ours.observation_ids(["a city"], ours.ended(reply), form.dialogue)
    assert ours.decode((*reply, *seen)) == "I look. <search>Rome</search>\n<observation>a city</observation>\n"
    ended = ours.observation_ids(["hm?"], True, form.dialogue)
    assert ended == ours.observation_ids(["hm?"], True, Dialogue())


@pytest.mark.parametrize("older", [(), ((1, 2), (2, 3))])
@pytest.mark.parametrize("count", range(8))
def test_the_first_tokens_keep_their_versions(older: tuple[tuple[int, int], ...], count: int) -> None:
    reply = Completion(tuple(range(7)), (-1.0,) * 7, "abort", 5, older)
    versions = [version for version, tokens in older for _ in range(tokens)]
    versions += [5] * (7 - len(versions))
    first = reply.first(count)
    kept = [version for version, tokens in first.older for _ in range(tokens)]
    kept += [first.weight_version] * (len(first.ids) - len(kept))
    assert np.array_equal(first.ids, reply.ids[:count]) and len(first.logprobs) == len(first.ids)
    assert kept == versions[:count]
