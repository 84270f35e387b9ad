"""Files of conversations in every format that `icrl sft` reads, written from the published descriptions of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]


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
    return [
        {"task": f"where is p{n}?"},
        {"plan": "search, then answer"},
        {
            "step_number": 1,
            "model_output": f"Thought: I look.\nCode:\n```py\nsearch('p{n}')\n```",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "search", "arguments": {"query": f"p{n}"}}}
            ],
            "observations": f"in t{n}",
            "token_usage": {"input_tokens": 100, "output_tokens": 7},
        },
        {
            "step_number": 2,
            "model_output": "",
            "tool_calls": [{"name": "final_answer", "arguments": {"answer": f"t{n}"}}],
        },
    ]


ROWS = {"openai": openai, "sharegpt": sharegpt, "alpaca": alpaca, "afm": afm}


def rows_of(format: str, count: int) -> list[dict[str, Any]]:
    if format == "oagents":
        return [step for n in range(count) for step in oagents(n)]
    return [ROWS[format](n) for n in range(count)]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
