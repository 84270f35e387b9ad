"""Files of conversations in every format that `icrl sft` reads, written from the published descriptions of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icrl_megatron.distill import readers
from icrl_megatron.distill.trajectory import Trajectory

QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
TOOLS = [{"type": "function", "function": {"name": "search", "description": "Searches.", "parameters": QUERY}}]


def openai(n: int) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "search", "arguments": json.dumps({"query": f"p{n}"})}}
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"where is p{n}?"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": f"in t{n}"},
            {"role": "assistant", "content": f"t{n}"},
        ],
        "tools": TOOLS,
    }


def sharegpt(n: int) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": f"where is p{n}?"},
            {"from": "function_call", "value": json.dumps({"name": "search", "arguments": {"query": f"p{n}"}})},
            {"from": "observation", "value": f"in t{n}"},
            {"from": "gpt", "value": f"t{n}"},
            {"from": "human", "value": "sure?"},
            {"from": "gpt", "value": "yes"},
        ],
        "tools": json.dumps([tool["function"] for tool in TOOLS]),
        "system": "Be brief.",
    }


def alpaca(n: int) -> dict[str, Any]:
    return {"instruction": "Double it.", "input": str(n), "output": str(2 * n), "history": [["hi", "hello"]]}


def afm(n: int) -> dict[str, Any]:
    return {
        "prompt": f"Use the tags. where is p{n}?",
        "response": f"<think>first</think><plan>look</plan>\n<web_search>p{n}</web_search><observation>in t{n}"
        f"</observation>\n<reflection>fine</reflection><answer>t{n}</answer>",
    }


def oagents(n: int) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": {"query": f"p{n}"}}}
    answer = {"name": "final_answer", "arguments": {"answer": f"t{n}"}}
    return [
        {"task": f"where is p{n}?"},
        {"plan": "search, then answer"},
        {
            "step_number": 1,
            "model_output": f"Thought: I look.\nCode:\n```py\nsearch('p{n}')\n```",
            "tool_calls": [call],
            "observations": f"in t{n}",
            "token_usage": {"input_tokens": 100, "output_tokens": 7},
        },
        {"step_number": 2, "model_output": "", "tool_calls": [answer]},
    ]


def action(number: int, **logged: Any) -> dict[str, Any]:
    """One step of a smolagents agent as `agent.memory.get_full_steps()` has it, with every field."""
    empty: dict[str, Any] = dict.fromkeys(
        ("model_input_messages", "error", "model_output_message", "model_output", "code_action", "observations",
         "observations_images", "action_output")
    )  # fmt: skip
    used = {"input_tokens": 100, "output_tokens": 7, "total_tokens": 107}
    timing = {"start_time": 1.0, "end_time": 2.0, "duration": 1.0}
    made = {"step_number": number, "timing": timing, "token_usage": used, "tool_calls": [], "is_final_answer": False}
    return {**empty, **made, **logged}


def smolagents(n: int) -> list[dict[str, Any]]:
    """The log of a CodeAgent (odd n) or of a ToolCallingAgent."""

    def call(name: str, arguments: Any, id: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def program(number: int, thought: str, code: str) -> dict[str, Any]:
        said = f"Thought: {thought}\n<code>\n{code}\n</code>"
        calls = [call("python_interpreter", code, f"c{number}")]
        return {"model_output": said, "code_action": code, "tool_calls": calls}

    head = [{"task": f"where is p{n}?", "task_images": None}]
    message = {"role": "assistant", "content": "look"}
    planned = {"model_input_messages": [message], "model_output_message": message, "plan": "look", "timing": {}}
    if n % 2:
        error = {"type": "AgentExecutionError", "message": "no such name"}
        seen = f"Execution logs:\nin t{n}\nLast output from code snippet:\nNone"
        return [
            *head,
            {**planned, "token_usage": None},
            action(1, error={"type": "AgentParsingError", "message": "no code"}, model_output="hm"),
            action(2, **program(2, "I look.", f"find('p{n}')"), error=error, observations="Execution logs:\n"),
            action(3, **program(3, "Again.", f"print(search('p{n}'))"), observations=seen),
            action(4, **program(4, "Done.", f"final_answer('t{n}')"), observations="", action_output=f"t{n}",
                   is_final_answer=True),
        ]  # fmt: skip
    both = [call("search", {"query": f"p{n}"}, "c1"), call("search", {"query": f"home of p{n}"}, "c2")]
    final = [call("final_answer", {"answer": f"t{n}"}, "c3")]
    return [
        *head,
        action(1, model_output="", tool_calls=both, observations=f"in t{n}\nat t{n}"),
        action(2, model_output="", tool_calls=final, observations=f"t{n}", action_output=f"t{n}", is_final_answer=True),
    ]


LOGS = {"oagents": oagents, "smolagents": smolagents}
"""Formats with several rows per run; both are read as `oagents`."""
ROWS = {"openai": openai, "sharegpt": sharegpt, "alpaca": alpaca, "afm": afm}


def rows_of(format: str, count: int) -> list[dict[str, Any]]:
    if format in LOGS:
        return [step for n in range(count) for step in LOGS[format](n)]
    return [ROWS[format](n) for n in range(count)]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_format(format: str, tmp_path: Path, count: int = 2) -> list[Trajectory]:
    """The trajectories of a file in this format, which has no broken rows."""
    read = list(readers.read(str(write_jsonl(tmp_path / f"{format}.jsonl", rows_of(format, count)))))
    assert [one.problem for one in read] == [""] * count
    return [one.trajectory for one in read if one.trajectory is not None]
