"""What the tests of verifiers and OpenEnv share: the interpreters that have them, and the data of environments."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import byte_model
import pytest

from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import TaskSet
from icrl_megatron.types import Completion, Episode

_MADE = Path(__file__).parents[1] / ".venv-environments"
PYTHON, PYTHON_V1 = _MADE / "bin/python", _MADE / "v1/bin/python"  # with verifiers 0.3, and with 0.4
needs_packages = pytest.mark.skipif(
    not (_MADE / ".installed").exists(), reason="verifiers and OpenEnv are not installed: make install-environments"
)

# A scenario of korrel, which exports it to verifiers and to OpenEnv. Its buyer says nothing after the answer.
SCENARIO = """
from korrel.persona import Persona
from korrel.rubric import Rubric
from korrel.scenario import Scenario
from korrel.tools import MockTool


class Silent(Persona):
    def next_message(self, messages):
        return None


def price(arguments, state):
    return "3 dollars" if arguments["fruit"] == "pear" else "not sold"


def right(completion, info, **kwargs):
    return float(any(m.role == "assistant" and info["answer"] in (m.content or "") for m in completion))


scenario = Scenario(
    id="fruit",
    system="You sell fruit.",
    persona=Silent(goal="buy a pear"),
    opening_message="What does a pear cost?",
    tools=[MockTool(name="price", schema={"type": "object"}, respond=price)],
    info={"answer": "3 dollars"},
    rubric=Rubric([right]),
)
"""


def write_words(folder: Path, *words: str) -> None:
    """The files of NLTK that TextArena's games of words read, with these words, all of them nouns."""
    lists, tagger = folder / "corpora/words", folder / "taggers/averaged_perceptron_tagger_eng"
    lists.mkdir(parents=True)
    tagger.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (lists / name).write_text("\n".join(words))
    content = {"weights": {}, "tagdict": dict.fromkeys([*words, "test"], "NN"), "classes": ["NN"]}
    for name, value in content.items():
        (tagger / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(value))


@dataclass
class Says:
    """Replies with the given texts in order, and records what it was asked."""

    prompter: Prompter
    texts: list[str]
    asked: list[str]

    async def reply(self, ask: Ask) -> Completion:
        self.asked.append(self.prompter.decode(ask.prompt_ids))
        ids = self.prompter.encode_reply(self.texts[len(self.asked) - 1])
        return Completion(ids, (-1.0,) * len(ids), "stop", 0)


def criticised(task_set: TaskSet, folder: Path, first: list[str], critique: str, second: list[str]) -> Episode:
    """An episode of two rounds over the first training problem: the replies of both attempts, and the critique."""
    settings = RolloutSettings(rounds=2, context_tokens=8192, max_turn_tokens=256, max_critique_tokens=256)
    prompter = Prompter(tokenizer(byte_model.build(folder)), settings)
    solver, critic = Says(prompter, [*first, *second], []), Says(prompter, [critique], [])
    setup = EpisodeSetup(task_set.environment, prompter, settings)
    episode = asyncio.run(
        play_episode(task_set.problems("train")[0], 0, setup, lambda task, i: Speakers(solver, critic), Seeds(0, 0))
    )
    assert isinstance(episode, Episode), episode
    assert critique in solver.asked[len(first)] and first[-1] in critic.asked[0]
    return episode
