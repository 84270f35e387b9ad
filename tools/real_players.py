"""An engine that plays by script: `engine.kind=real_players:KIND` for `real_servers.py`.

A model with random weights writes no action that an environment understands. This engine reads the conversation as
text and answers as a model would, with a thought and an action. Some problems are solved at once. In others the first
attempt wanders: legal actions, actions that do not exist, and replies without any. Its critique is a fixed sentence;
a solver that reads it plays the solution, where one is known.

    REAL_SERVERS_PLANS   a JSON file: a text of the problem -> the actions that solve it
"""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from icrl_megatron.engines.kind import EngineKind, EngineRequest
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.types import Completion, Ids

if TYPE_CHECKING:
    import torch

PLANS_ENV = "REAL_SERVERS_PLANS"
ADVICE = "The way to the goal is known: take its steps in order."
HEADER = re.compile(r"<\|im_start\|>(system|user|assistant)\n")
CRAFT = re.compile(r"craft (\d+) (.+?) using (.+)")
KINDS = ("planks", "logs")
"""Ingredients of TextCraft that stand for several items."""
NO_ACTION, NO_SUCH_ACTION = 0.1, 0.2
"""Shares of the turns of a wandering attempt: replies without an action, and (the rest) actions that do not exist."""
SOLVED_AT_ONCE = 3
"""One of so many problems is."""


@dataclass(frozen=True)
class Conversation:
    """A prompt as text."""

    system: str
    problem: str
    """The first user message."""
    observations: tuple[str, ...]
    """What followed each reply."""
    replies: tuple[str, ...]

    @staticmethod
    def of(prompt: str) -> Conversation:
        """Reads Qwen's chat template."""
        parts = HEADER.split(prompt)
        said = [
            (role, text.split("<|im_end|>")[0].strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)
        ]
        users = [text for role, text in said if role == "user"]
        replies = [text for role, text in said if role == "assistant"][:-1]  # the last is the one to be written
        system = "\n".join(text for role, text in said if role == "system")
        return Conversation(system, users[0], tuple(users[1:]), tuple(replies))

    @property
    def task(self) -> str:
        """The problem without advice, so that both attempts at it have the same."""
        return self.problem.rpartition(ADVICE)[2].strip()


class Player:
    """Writes replies."""

    def __init__(self, plans: dict[str, list[str]]) -> None:
        self._plans = plans

    def reply(self, prompt: str, seed: int) -> str:
        talk, rng = Conversation.of(prompt), random.Random(seed)
        if "<critic>" in talk.problem:
            return f"<think>\nIt did not work.\n</think>\n<critic>{ADVICE}</critic>"
        at_once = zlib.crc32(talk.task.encode()) % SOLVED_AT_ONCE == 0
        plan = self._plan(talk.task) if at_once or ADVICE in talk.problem else []
        done = len(talk.observations)
        if done < len(plan):
            return _said(plan[done])
        return self._wandering(talk, rng)

    def _plan(self, task: str) -> list[str]:
        crafted = crafting(task)
        return crafted or max((plan for key, plan in self._plans.items() if key in task), key=len, default=[])

    def _wandering(self, talk: Conversation, rng: random.Random) -> str:
        drawn = rng.random()
        if drawn < NO_ACTION:
            return "<think>\nI wonder.\n</think>\nI cannot decide."
        if drawn < NO_SUCH_ACTION:
            return _said("dance with the moon")
        return _said(rng.choice(legal_actions(talk)))


def _said(action: str) -> str:
    tagged = action if action.startswith("<") else f"<action>{action}</action>"
    return f"<think>\nI try this: {action}\n</think>\n{tagged}"


def legal_actions(talk: Conversation) -> Sequence[str]:
    """Actions that the environment of a conversation knows, by what the prompt shows of it."""
    texts = (talk.problem, *talk.observations)
    listed = [text.split("AVAILABLE ACTIONS: ")[1].split(",") for text in texts if "AVAILABLE ACTIONS: " in text]
    if listed:  # ALFWorld
        return [action for action in listed[-1] if action != "help"]
    if "Crafting commands:" in talk.task:
        commands = [f"craft {n} {item} using {of}" for n, item, of in CRAFT.findall(talk.task)]
        return [*commands, *(f"get 1 {item}" for item in ingredients(talk.task)), "inventory"]
    if "<search>" in f"{talk.system}{talk.problem}":
        words = re.findall(r"[A-Za-z]{4,}", " ".join(texts))
        searches = [f"<search>{' '.join(words[i : i + 3])}</search>" for i in range(0, len(words), 3)]
        return [*searches, *["<answer>nothing</answer>"] * (len(searches) // 4 + 1)]
    seen = re.findall(r"(?:door to the|substance called|called the) ([a-z ]+)", "\n".join(texts))
    things = sorted({thing.strip() for thing in seen}) or ["picture"]
    acts = ("look around", "inventory", "task", "wait1", *(f"look at {thing}" for thing in things))
    return [*acts, *(f"open door to {thing}" for thing in things), *(f"go to {thing}" for thing in things)]


def ingredients(task: str) -> list[str]:
    """All ingredients of TextCraft's recipes in a task."""
    parts = [part.strip() for _, _, used in CRAFT.findall(task) for part in used.split(",")]
    return sorted({part.partition(" ")[2] for part in parts})


def crafting(task: str) -> list[str]:
    """The actions that craft the goal of a task of TextCraft, by its recipes; empty for other tasks."""
    goal = re.search(r"Goal: craft (.+?)\.", task)
    recipes = {item: (int(n), used) for n, item, used in CRAFT.findall(task)}
    if goal is None or goal[1] not in recipes:
        return []
    actions: list[str] = []
    stock: dict[str, int] = {}

    def need(item: str, count: int, above: tuple[str, ...]) -> str:
        made = next((r for r in recipes if r.endswith(f" {item}")), item) if item in KINDS else item
        if made not in recipes or made in above:
            if stock.get(item, 0) < count:
                actions.append(f"get {count} {item}")
                stock[item] = stock.get(item, 0) + count
            return item
        while stock.get(made, 0) < count:
            yields, used = recipes[made]
            parts = [part.strip().split(" ", 1) for part in used.split(",")]
            named = [(int(n), need(of, int(n), (*above, made))) for n, of in parts]
            for n, of in named:
                stock[of] -= n
            actions.append(f"craft {yields} {made} using {', '.join(f'{n} {of}' for n, of in named)}")
            stock[made] = stock.get(made, 0) + yields
        return made

    need(goal[1], 1, ())
    return actions


class ScriptedEngine:
    """Takes weights and ignores them. Its log-probs are 0: it is no policy, and nothing is trained on its replies."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, player: Player) -> None:
        self._tokenizer, self._player, self.version = tokenizer, player, 0

    async def generate(self, prompt_ids: Ids, sampling: Sampling) -> Completion:
        text = self._player.reply(self._tokenizer.decode(prompt_ids), sampling.seed)
        ids = (*self._tokenizer(text, add_special_tokens=False)["input_ids"], sampling.stop_ids[0])
        kept = tuple(ids[: sampling.max_new_tokens])
        return Completion(kept, (0.0,) * len(kept), "stop" if len(kept) == len(ids) else "length", self.version)

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        for _ in tensors:
            pass
        self.version = version

    async def interrupt(self) -> None:
        """Nothing to do: replies are immediate."""

    def sleep(self) -> None:
        """Nothing to do: it holds no memory. The same applies to the next three methods."""

    def wake_weights(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Scripted(EngineKind):
    def build(self, request: EngineRequest) -> Engines:
        plans = json.loads(Path(os.environ[PLANS_ENV]).read_text(encoding="utf-8"))
        engine = ScriptedEngine(AutoTokenizer.from_pretrained(request.folder), Player(plans))
        critic = None if request.critic is None else engine
        return Engines(engine, engine, critic, Share(request.grid.rank, request.grid.world))


KIND = Scripted()
