"""Episodes for the page: texts split into the model's tokens, each with its training weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrl_megatron.settings.loading import KEPT_MODEL
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.dumps import Credited, DumpRecord
from icrl_megatron.types import Attempt, Critique, Ids

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

    def pieces(self, ids: Ids) -> list[str] | None:
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

    def _text(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def episode(step: int, record: DumpRecord, speller: Speller, limit: int) -> dict[str, Any]:
    """One episode as JSON: what the page's episode browser shows and filters by."""
    played = record.episode
    rounds: list[dict[str, Any]] = []
    for attempt in played.attempts:
        role = "revision" if attempt.round else "attempt"
        rounds.append(_attempt(attempt, role, record.credit.get(f"{attempt.round}/{role}"), speller, limit))
        if attempt.round < len(played.critiques):
            critique = played.critiques[attempt.round]
            rounds.append(_critique(critique, record.credit.get(f"{critique.round}/critique"), speller, limit))
    return {
        "step": step,
        "task": played.task.task_id,
        "source": played.task.source,
        "index": played.index,
        "outcome": outcome(played.attempts),
        "problem": record.prompts.get("0/attempt", "").strip()[: 8 * limit],
        "rounds": rounds,
    }


def outcome(attempts: Sequence[Attempt]) -> str:
    """What critique changed: alone (solved without), rescued, hurt (a worse outcome) or failed."""
    if attempts[0].success:
        return "alone"
    if attempts[-1].success:
        return "rescued"
    return "hurt" if attempts[-1].outcome < attempts[0].outcome else "failed"


def _attempt(attempt: Attempt, role: str, credited: Credited | None, speller: Speller, limit: int) -> dict[str, Any]:
    turns, begun = [], 0
    weights = credited.weights if credited else ()
    for turn in attempt.turns:
        ids = turn.completion.ids
        of_turn = weights[begun : begun + len(ids)]
        tokens = _tokens(ids, turn.text, of_turn, turn.completion.logprobs, speller, limit)
        turns.append({"tokens": tokens, "observation": turn.observation[: 4 * limit], "lost": turn.action is None})
        begun += len(ids)
    found: dict[str, Any] = {"role": role, "round": attempt.round, "turns": turns, "success": attempt.success}
    found |= {"outcome": attempt.outcome, "stop": attempt.stop_reason, "summary": attempt.summary[: 4 * limit]}
    mean = sum(weights) / len(weights) if weights else None
    return found | {"generated": begun, "weight": mean} | _earned(credited)


def _critique(critique: Critique, credited: Credited | None, speller: Speller, limit: int) -> dict[str, Any]:
    completion = critique.completion
    tokens = _tokens(completion.ids, critique.text, (), completion.logprobs, speller, limit)
    turns = [{"tokens": tokens, "observation": "", "lost": False}]
    found: dict[str, Any] = {
        "role": "critique",
        "round": critique.round,
        "turns": turns,
        "generated": len(completion.ids),
    }
    return found | _earned(credited)


def _tokens(
    ids: Ids, text: str, weights: Sequence[float], logprobs: Sequence[float], speller: Speller, limit: int
) -> list[list[Any]]:
    """[text, weight or null, log-prob under the prompt it was sampled with] of each token."""
    pieces = speller.pieces(ids[:limit])
    if pieces is None:
        return [[text[: 4 * limit], sum(weights) / len(weights) if weights else None, None]]
    found = [[piece, weights[i] if i < len(weights) else None, round(logprobs[i], 3)] for i, piece in enumerate(pieces)]
    return [*found, [f" ... ({len(ids) - limit} tokens more)", None, None]] if len(ids) > limit else found


def _earned(credited: Credited | None) -> dict[str, Any]:
    return (
        {"reward": credited.reward, "advantage": credited.advantage}
        if credited
        else {"reward": None, "advantage": None}
    )
