"""Episodes for the page: texts split into agents and these into the model's tokens, each with its training weight."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from icrl_megatron.report.segments import TaggedText, split
from icrl_megatron.settings.loading import KEPT_MODEL
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.dumps import Credited, DumpRecord
from icrl_megatron.types import Attempt, Completion, Critique

WINDOW = 6
"""Tokens decoded before each token, so that spaces and characters that span several tokens are decoded correctly."""


@dataclass(frozen=True)
class Speller:
    """Token ids -> the text of each token. Without a tokenizer (its folder was moved) texts are not split."""

    tokenizer: Any

    @staticmethod
    def of_run(run: Path, settings: Settings) -> Speller:
        """With the tokenizer of the run's export, or else of the model that it started from."""
        folders = [run / "hf", run / KEPT_MODEL, run / "warm_start" / "hf"]
        folders += [Path(settings.model.path)] if settings.model.path else []
        folder = next((f for f in folders if (f / "tokenizer_config.json").exists()), None)
        if folder is None:
            return Speller(None)
        from transformers import AutoTokenizer

        return Speller(AutoTokenizer.from_pretrained(folder))

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """One text per token; joined, they are the whole text. Special tokens, such as the end of a turn, are empty."""
        if self.tokenizer is None:
            return None
        special = set(self.tokenizer.all_special_ids)
        found = []
        for i, token in enumerate(ids):
            if token in special:
                found.append("")
                continue
            before = self._text(ids[max(0, i - WINDOW) : i])
            found.append(self._text(ids[max(0, i - WINDOW) : i + 1])[len(before) :])
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def episode(step: int, record: DumpRecord, speller: Speller, limit: int, tools: Collection[str] = ()) -> dict[str, Any]:
    """One episode as JSON: what the page's episode browser shows and filters by."""
    played = record.episode
    rounds: list[dict[str, Any]] = []
    for attempt in played.attempts:
        role = "revision" if attempt.round else "attempt"
        credited = record.credit.get(f"{attempt.round}/{role}")
        rounds.append(_attempt(attempt, role, credited, speller, limit, tools))
        if attempt.round < len(played.critiques):
            critique = played.critiques[attempt.round]
            credited = record.credit.get(f"{critique.round}/critique")
            rounds.append(_critique(critique, credited, speller, limit, tools))
    return {
        "step": step,
        "task": played.task.task_id,
        "source": played.task.source,
        "index": played.index,
        "outcome": outcome(played.attempts),
        "problem": record.prompt.strip()[: 8 * limit],
        "rounds": rounds,
    }


def outcome(attempts: Sequence[Attempt]) -> str:
    """What critique changed: alone (solved without), rescued, hurt (a worse outcome) or failed."""
    if attempts[0].success:
        return "alone"
    if attempts[-1].success:
        return "rescued"
    return "hurt" if attempts[-1].outcome < attempts[0].outcome else "failed"


def agents(episodes: Iterable[dict[str, Any]]) -> set[str]:
    """Every agent of these episodes, which `episode` returned."""
    turns = (turn for e in episodes for of_round in e["rounds"] for turn in of_round["turns"])
    return {part["agent"] for turn in turns for part in turn["parts"]}


def _attempt(
    attempt: Attempt, role: str, credited: Credited | None, speller: Speller, limit: int, tools: Collection[str]
) -> dict[str, Any]:
    turns, begun = [], 0
    weights = credited.weights if credited else ()
    for turn in attempt.turns:
        ids = turn.completion.ids
        of_turn = weights[begun : begun + len(ids)]
        parts = _parts(turn.completion, turn.text, of_turn, speller, limit, tools)
        turns.append({"parts": parts, "observation": turn.observation[: 4 * limit], "lost": turn.action is None})
        begun += len(ids)
    found: dict[str, Any] = {"role": role, "round": attempt.round, "turns": turns, "success": attempt.success}
    found |= {"outcome": attempt.outcome, "stop": attempt.stop_reason, "summary": attempt.summary[: 4 * limit]}
    mean = sum(weights) / len(weights) if weights else None
    return found | {"generated": begun, "weight": mean} | _earned(credited)


def _critique(
    critique: Critique, credited: Credited | None, speller: Speller, limit: int, tools: Collection[str]
) -> dict[str, Any]:
    completion = critique.completion
    turns = [{"parts": _parts(completion, critique.text, (), speller, limit, tools), "observation": "", "lost": False}]
    found = {"role": "critique", "round": critique.round, "turns": turns, "generated": len(completion.ids)}
    return found | _earned(credited)


def _parts(
    completion: Completion, text: str, weights: Sequence[float], speller: Speller, limit: int, tools: Collection[str]
) -> list[dict[str, Any]]:
    """The agents of a reply as JSON, each with its tokens: [text, weight or null, log-prob under the prompt that it was
    sampled with]. A token at a boundary, such as "><", belongs to the agent of its first character, spaces aside."""
    ids, logprobs = completion.ids.tolist(), completion.logprobs.tolist()
    pieces = speller.pieces(ids[:limit])
    if pieces is None:
        mean = sum(weights) / len(weights) if weights else None
        return _grouped([[s.text, mean, None] for s in split(text[: 4 * limit], tools)], tools)
    tokens = [
        [piece, weights[i] if i < len(weights) else None, round(logprobs[i], 3)] for i, piece in enumerate(pieces)
    ]
    rest = {"agent": "", "kind": "text", "tokens": [[f" ... ({len(ids) - limit} tokens more)", None, None]]}
    return [*_grouped(tokens, tools), *([rest] if len(ids) > limit else [])]


def _grouped(tokens: list[list[Any]], tools: Collection[str]) -> list[dict[str, Any]]:
    segments = split("".join(token[0] for token in tokens), tools) or (TaggedText("", "", "text"),)
    starts = list(accumulate((len(s.text) for s in segments[:-1]), initial=0))
    parts: list[dict[str, Any]] = []
    at, last = 0, -1
    for token in tokens:
        letters = token[0].lstrip()
        if letters or not parts:  # spaces between two agents stay with the first
            which = bisect_right(starts, at + len(token[0]) - len(letters)) - 1
            if which != last:
                parts.append({"agent": segments[which].agent, "kind": segments[which].kind, "tokens": []})
                last = which
        parts[-1]["tokens"].append(token)
        at += len(token[0])
    return parts


def _earned(credited: Credited | None) -> dict[str, Any]:
    return {name: getattr(credited, name) if credited else None for name in ("reward", "advantage")}
