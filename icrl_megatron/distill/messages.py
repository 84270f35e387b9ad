"""OpenAI messages with tool calls: `messages`, and optionally `tools`. `writers.py` writes this format.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "tool_calls": [...]}, ...], "tools": [...]}

A reply with `weight` 0 is not trained on. The column `trajectory`, which only this project writes, holds what messages
cannot: who wrote which part of a reply, which parts are trained, and what is known about the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.distill.rows import BadRowError, Fields, parsed, text_of
from icrl_megatron.distill.trajectory import THINK, USER, Segment, Tokens, Trajectory
from icrl_megatron.distill.written import plain_segments, taken

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EXTRA = "trajectory"
Message = dict[str, Any]


def fits(columns: Sequence[str]) -> bool:
    return "messages" in columns


def read(rows: Sequence[Fields], task_id: str) -> Trajectory:
    """Raises BadRowError."""
    (fields,) = rows
    found = of_messages(fields["messages"], fields.get("tools"), task_id)
    return found if fields.get(EXTRA) is None else _restored(found, fields["messages"], fields[EXTRA])


def of_messages(messages: Any, tools: Any, task_id: str) -> Trajectory:
    """The trajectory of a list of messages. Raises BadRowError."""
    if not isinstance(messages, list) or not messages:
        raise BadRowError(f"`messages` is {str(messages)[:80]!r}, not a list of messages")
    heads, rest = dict[str, str](), [_with_role(message) for message in messages]
    for role in ("system", "user"):
        if rest and rest[0]["role"] == role:
            heads[role] = text_of(rest.pop(0).get("content"), f"the content of the {role} message")
    if "user" not in heads and rest and rest[0]["role"] == "system":
        raise BadRowError("several messages of system or developer at the beginning; join them, or delete all but one")
    return Trajectory(
        task_id, heads.get("user", ""), tuple(_segments(rest)), system=heads.get("system", ""), tools=tools_of(tools)
    )


def tools_of(value: Any) -> tuple[ToolSpec, ...]:
    """Tools in OpenAI's form, with or without "function" around each, as a list or as JSON. Raises BadRowError."""
    found = parsed(value, "`tools`") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list):
        raise BadRowError(f"`tools` is {str(value)[:80]!r}, not a list of tools")
    specs = []
    for tool in found:
        inner = parsed(tool, "a tool in `tools`") if isinstance(tool, str) else tool
        inner = inner.get("function", inner) if isinstance(inner, dict) else inner
        match inner:
            case {"name": str(name)}:
                about = text_of(inner.get("description"), f"the description of the tool {name!r}")
                schema = inner.get("parameters") or {"type": "object", "properties": {}}
                schema = parsed(schema, f"the parameters of the tool {name!r}") if isinstance(schema, str) else schema
                if not isinstance(schema, dict):
                    raise BadRowError(f"the parameters of the tool {name!r} are no JSON schema; write an object")
                specs.append(ToolSpec(name, about, schema))
            case _:
                raise BadRowError(f"a tool without a name ({str(tool)[:80]!r}); give it one")
    if len({spec.name for spec in specs}) < len(specs):
        raise BadRowError("two tools of one name; rename one")
    return tuple(specs)


def named_call(call: Any) -> tuple[str, Any]:
    """(tool, arguments as they are written) of a call, with or without "function" around it. Raises BadRowError."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRowError(f"a call without the name of a tool ({str(call)[:80]!r}); give it one")
    return inner["name"], inner.get("arguments")


def arguments_of(name: str, value: Any) -> dict[str, Any]:
    """Arguments of a call, as an object or as JSON. Raises BadRowError."""
    what = f"the arguments of a call of {name!r}"
    found = parsed(value, what) if isinstance(value, str) else value
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadRowError(f"{what} are {str(value)[:80]!r}; write a JSON object")
    return found


def _with_role(message: Any) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError(f"a message with the role {role!r}; the roles are {', '.join(ROLES)}")
    same = {"developer": "system", "function": "tool"}
    return {**message, "role": same.get(role, role)}


def _segments(messages: Sequence[Message]) -> Iterator[Segment]:
    before = USER
    calls: list[tuple[str, str]] = []
    for role, block in groupby(messages, key=lambda message: str(message["role"])):
        same = list(block)
        if role == "tool":
            yield from _answers(same, calls)
        elif role == "assistant" and any(message.get("tool_calls") for message in same[:-1]):
            raise BadRowError("a call without an answer; add the answer, or delete the call")
        elif role == "system" or (role == "assistant" and len(same) > 1):
            raise BadRowError(f"a message of {role} after one of {before}; join them, or delete one")
        elif role == "user":
            texts = [text_of(message.get("content"), "a message of the user") for message in same]
            yield from (Segment(USER, text, "observation", trained=False) for text in texts)
        else:
            written, calls = _reply(same[0])
            yield from written
        before = role


def _reply(message: Message) -> tuple[list[Segment], list[tuple[str, str]]]:
    """(segments of a message of the assistant, (id, tool) of its calls)."""
    weight = message.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise BadRowError(f"a message with the weight {weight!r}; write 0 or 1, without quotes")
    trained = weight is None or bool(weight)
    found = plain_segments(text_of(message.get("content"), "a message of the assistant"), trained)
    if thought := text_of(message.get("reasoning_content"), "`reasoning_content`").strip():
        found.insert(0, Segment(THINK, thought, "text", trained))
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # the older form of one call
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list):
        raise BadRowError(f"`tool_calls` is {str(calls)[:80]!r}, not a list of calls")
    ids = []
    for call in calls:
        name, given = named_call(call)
        arguments = arguments_of(name, given)
        found.append(Segment(name, "", "call", trained, ToolCall(name, arguments)))
        ids.append((str(call.get("id") or ""), name))
    return found, ids


def _answers(messages: Sequence[Message], calls: Sequence[tuple[str, str]]) -> Iterator[Segment]:
    """Answers in the order of their calls: by their ids, or by place if calls lack ids or share them, or no answer has
    one."""
    named = [str(message.get("tool_call_id") or "") for message in messages]
    ids = [key for key, _ in calls]
    if ids and all(ids) and len(set(ids)) == len(ids) and any(named):
        if wrong := [key for key in named if key and key not in ids]:
            raise BadRowError(f"an answer without a call: no call before it has the id {wrong[0]!r}; correct the id")
        if sorted(named) != sorted(ids):
            raise BadRowError(f"calls with the ids {ids} and answers to {named}; give each call one answer with its id")
        messages = [messages[named.index(key)] for key in ids]
    for number, message in enumerate(messages):
        name = calls[number][1] if number < len(calls) else str(message.get("name") or "tool")
        yield Segment(name, text_of(message.get("content"), "a message of a tool"), "observation", trained=False)


def _restored(found: Trajectory, messages: Sequence[Message], extra: Any) -> Trajectory:
    """The trajectory that `writers.py` wrote. Raises BadRowError if the columns do not fit each other."""
    known = parsed(extra) if isinstance(extra, str) else extra
    contents = [str(m.get("content") or "") for m in messages if m.get("role") == "assistant"]
    try:
        segments = list(_respelled(found.segments, known["segments"], contents))
        versions = known["versions"]
        return replace(
            found,
            task_id=str(known["task_id"]),
            segments=tuple(segments),
            correct=None if known["correct"] is None else bool(known["correct"]),
            spent=Tokens(*map(int, known["spent"])),
            tools=tuple(replace(spec, version=versions.get(spec.name, "")) for spec in found.tools),
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
        raise BadRowError(f"the column `{EXTRA}` does not fit the messages; delete that column") from error


def _respelled(found: Sequence[Segment], known: Sequence[Any], contents: Sequence[str]) -> Iterator[Segment]:
    """The segments as `known` lists them: [agent, kind, trained, characters] each."""
    others = iter([segment for segment in found if segment.kind in ("call", "observation")])
    texts, rest, begun = iter(contents), "", ""
    reads = True  # the next text or call begins a message
    for agent, kind, trained, chars in known:
        if kind == "observation":
            yield replace(next(others), agent=str(agent))
            reads = True
            continue
        if reads:
            if rest:
                raise ValueError("text that no segment has")
            rest, begun, reads = next(texts), "", False
        if kind == "call":
            yield replace(next(others), agent=str(agent), trained=bool(trained))
            continue
        if kind not in ("text", "answer"):
            raise ValueError("a kind of segment that does not exist")
        segment = Segment(str(agent), "", kind, bool(trained))
        before = rest
        text, rest = taken(rest, begun, segment, chars)
        begun += before[: len(before) - len(rest)]
        yield replace(segment, text=text)
    if rest or next(others, None) is not None or next(texts, None) is not None:
        raise ValueError("something that no segment has")
