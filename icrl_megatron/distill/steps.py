"""Runs of smolagents and OAgents: the steps of an agent (`agent.memory.get_full_steps()`), as JSON.

Either one row per run, with its steps in `intermediate_steps` (OAgents) or `steps` (smolagents' RunResult), or one row
per step, where `task` begins a run:

    {"task": "..."}
    {"plan": "..."}
    {"model_output": "...", "tool_calls": [{"name": "search", "arguments": {...}}], "observations": "..."}
    {"model_output": "...", "tool_calls": [{"name": "final_answer", "arguments": {"answer": "..."}}]}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.distill.messages import arguments_of, named_call, tools_of
from icrl_megatron.distill.rows import BadRowError, Fields, list_of, parsed, text_of
from icrl_megatron.distill.trajectory import THINK, Segment, Tokens, Trajectory

FINAL, PROGRAM = "final_answer", "python_interpreter"
"""Tools of smolagents: what ends a run, and what runs a CodeAgent's programs."""
STEPS = ("intermediate_steps", "steps")
"""Columns with all steps of a run."""
_END_OF_PLAN = "<end_plan>"
"""smolagents' stop text."""
_CODE = re.compile(r"(?:^|\n)\s*(?:Code:|Action:|```|<code>)")
"""Where the part of a reply begins that the call repeats."""


def fits(columns: Sequence[str]) -> bool:
    return not {*STEPS, "task", "system_prompt"}.isdisjoint(columns)


def begins(fields: Fields, before: Fields | None) -> bool:
    """Whether a row begins a run; `before` is the row above it."""
    above = before or {}
    whole = not {*STEPS}.isdisjoint(above)
    return (
        whole or not {*STEPS, "system_prompt"}.isdisjoint(fields) or ("task" in fields and "system_prompt" not in above)
    )


def read(rows: Sequence[Fields], task_id: str) -> Trajectory:
    """Raises BadRowError."""
    first = rows[0]
    steps: Any = list(rows)
    if column := next((name for name in STEPS if name in first), ""):
        steps = first[column]
        steps = parsed(steps, f"`{column}`") if isinstance(steps, str) else steps
    if not isinstance(steps, list):
        raise BadRowError(f"`{column}` is {str(steps)[:80]!r}, not a list of steps; log agent.memory.get_full_steps()")
    steps = [step for step in steps if isinstance(step, dict)]  # some logs hold a text for each step too
    if any("role" in step for step in steps):
        raise BadRowError(f"`{column}` holds messages, not steps; log agent.memory.get_full_steps()")
    heads = {**first, **{k: s[k] for s in reversed(steps) for k in ("task", "system_prompt") if s.get(k)}}
    problem = next((heads[name] for name in ("question", "task", "augmented_question") if heads.get(name)), "")
    segments = tuple(_segments(steps, first.get("prediction", first.get("output"))))
    correct = next((heads[name] for name in ("correct", "is_correct") if isinstance(heads.get(name), bool)), None)
    given = tools_of(first["tools"]) if first.get("tools") else ()
    return Trajectory(
        str(first.get("task_id") or task_id),
        text_of(problem, "`task`"),
        segments,
        correct=correct,
        spent=_spent(steps),
        system=text_of(heads.get("system_prompt"), "`system_prompt`"),
        tools=given or _tools(segments),
    )


def _segments(steps: Sequence[Fields], prediction: Any) -> Iterator[Segment]:
    for step in steps:
        if step.get("plan"):
            yield Segment("plan", _plan(step))
            continue
        calls = [_call(call) for call in list_of(step.get("tool_calls"), "`tool_calls`")]
        final = next((call for call in calls if call.name == FINAL), None)
        forced = bool(step.get("error")) and not calls  # no reply that could be read, or no step was left
        if forced and step.get("action_output") is None:
            continue
        if thought := _thought(step):
            yield Segment(THINK, thought)
        if final is not None or forced or step.get("is_final_answer"):
            answer = step.get("action_output") if final is None else _one(final)
            if final is None:  # a program that ends with the answer
                yield from _called(calls, step)
            answer = prediction if answer is None else answer
            yield Segment("answer", text_of(answer, "the answer") if forced else str(answer), "answer")
            return
        yield from _called(calls, step)
        if not calls and step.get("observations"):
            raise BadRowError("observations of a step without a call; add its `tool_calls`, or delete the observations")
        if not calls and "output" in step:
            yield Segment("answer", str(step["output"]), "answer")
            return
    if prediction is not None:
        yield Segment("answer", str(prediction), "answer")


def _called(calls: Sequence[ToolCall], step: Fields) -> Iterator[Segment]:
    if not calls:
        return
    yield from (Segment(call.name, "", "call", call=call) for call in calls)
    seen, error = step.get("observations"), step.get("error")
    if seen is None and not error:
        return  # `check` says which call has no answer
    if isinstance(seen, list) and all(isinstance(one, str) for one in seen):
        texts = list(seen)
    else:  # smolagents joins the answers of a step to one text: the last call gets it, the others are answered with ""
        texts = [*[""] * (len(calls) - 1), text_of(seen, "an observation")]
    if len(texts) != len(calls):
        raise BadRowError(f"{len(calls)} calls in a step with {len(texts)} observations; log one for each call")
    if error:
        said = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        texts = [*texts[:-1], "\n".join(filter(None, (texts[-1], said)))]
    for call, text in zip(calls, texts, strict=True):
        yield Segment(call.name, text, "observation", trained=False)


def _call(value: Any) -> ToolCall:
    name, written = named_call(value)
    given = written
    if isinstance(given, str) and name != PROGRAM and given.lstrip().startswith("{"):
        given = arguments_of(name, given)
    elif isinstance(given, str):
        with suppress(BadRowError):  # a program or a text
            given = parsed(given)
    if not isinstance(given, dict):
        given = {} if written is None else {"code" if name == PROGRAM else "text": written}
    return ToolCall(name, given)


def _one(call: ToolCall) -> Any:
    return next(iter(call.arguments.values()), "")


def _plan(step: Fields) -> str:
    """What the model wrote, if the step has it: `plan` of smolagents puts a sentence and a fence around it."""
    said = step.get("model_output_message")
    content = said.get("content") if isinstance(said, dict) else None
    whole = text_of(content or step["plan"], "`plan`")
    return whole.strip().removesuffix(_END_OF_PLAN).strip()


def _thought(step: Fields) -> str:
    """The reply before the program or call that it ends with."""
    reply = step.get("model_output")
    said = text_of(reply, "`model_output`")
    cut = _CODE.search(said)
    said = said[: cut.start()] if cut else said
    return said.strip().removeprefix("Thought:").strip()


def _tools(segments: Sequence[Segment]) -> tuple[ToolSpec, ...]:
    """What the calls show of the tools: their names and arguments."""
    seen: dict[str, dict[str, Any]] = {}
    for call in (segment.call for segment in segments if segment.call is not None):
        kinds = {name: {"type": _kind(value)} for name, value in call.arguments.items()}
        seen.setdefault(call.name, {}).update(kinds)
    return tuple(ToolSpec(name, "", {"type": "object", "properties": of}) for name, of in seen.items())


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", type(None): "null"}
    return names.get(type(value), "object")


def _spent(steps: Sequence[Fields]) -> Tokens:
    used = [step["token_usage"] for step in steps if isinstance(step.get("token_usage"), dict)]

    def total(name: str) -> int:
        return sum(one[name] for one in used if isinstance(one.get(name), int))

    return Tokens(total("input_tokens"), total("output_tokens"))
