"""Episodes as plain HTML, for browsers without JavaScript: the page contains them in a <noscript> element."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from icrl_megatron.report.page_choice import spread
from icrl_megatron.utils.terminal import printable

EPISODES = 12
"""Maximum per run, spread over its episodes on the page."""
_PEEK_CHARS = 160
_TITLES = {"attempt": "Attempt", "critique": "Critique", "revision": "Revision"}


def static_episodes(data: Mapping[str, Any]) -> str:
    """`data` is what the page's script reads. Every text is escaped."""
    colors: Mapping[str, str] = data["agents"]
    found = [_legend(colors)]
    for run in data["runs"]:
        found.append(f"<h2>{_text(run['label'])}</h2>")
        found += [_success(row) for row in run["table"]]
        found += [_episode(one, colors) for one in spread(run["episodes"]["shown"], EPISODES)]
    return "\n".join(found)


def _success(row: Mapping[str, Any]) -> str:
    before, after = (f"{row[when]['mean']:.0%}" for when in ("before", "after"))
    return f"<p>Held-out success on {_text(row['task'])}: {before} before, {after} after.</p>"


def _legend(colors: Mapping[str, str]) -> str:
    names = "".join(f'<span class="agent"{_style(name, colors)}><b>{_text(name)}</b></span>' for name in colors)
    return f'<div class="agents">{names}</div>'


def _episode(episode: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    title = f"{episode['task']}, step {episode['step']}, try {episode['index']}"
    rounds = "".join(_round(one, colors) for one in episode["rounds"])
    return (
        f'<article><h3>{_text(title)}</h3><div class="text problem">{_text(episode["problem"])}</div>{rounds}</article>'
    )


def _round(one: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    ended = "" if one["role"] == "critique" else ", succeeded" if one["success"] else ", failed"
    said: list[str] = []
    for turn in one["turns"]:
        said += [_part(part, colors) for part in turn["parts"]]
        if turn["lost"]:
            said.append('<div class="note">no action could be read</div>')
        if turn["observation"]:
            said.append(_collapsed("obs", "", "observed", turn["observation"]))
    return f'<h4>{_TITLES[one["role"]]}{ended}</h4><div class="text">{"".join(said)}</div>'


def _part(part: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    text, name = "".join(token[0] for token in part["tokens"]), part["agent"]
    if part["kind"] == "call":
        return _collapsed("agent", _style(name, colors), name, text)
    if not name:
        return f"<div>{_text(text)}</div>"
    return f'<div class="agent"{_style(name, colors)}><b>{_text(name)}</b> {_text(text)}</div>'


def _collapsed(kind: str, style: str, name: str, text: str) -> str:
    peek = " ".join(text[: 4 * _PEEK_CHARS].split())[:_PEEK_CHARS]
    summary = f'<summary><b>{_text(name)}</b> <span class="peek">{_text(peek)}</span></summary>'
    return f'<details class="{kind}"{style}>{summary}{_text(text)}</details>'


def _style(name: str, colors: Mapping[str, str]) -> str:
    return f' style="--agent:{colors[name]}"'


def _text(text: str) -> str:
    return escape(printable(text))
