"""`rollout.templates=paper` in the prompts of each task set of the paper, and which turns a critic's prompt keeps."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen_tokenizers
from agentgym_server import TALKS, serving
from odd_environments import Works, play_one
from whole_runs import batch

from icrl_megatron.model.tiny import build_byte_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ServedSource, source_of
from icrl_megatron.settings.task_sections import ServerData
from icrl_megatron.tasks import agentgym_dialects as dialects
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.base import Opening, StepResult
from icrl_megatron.tasks.manuals import MANUALS
from icrl_megatron.tasks.mathematics import MANUAL
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Completion, DroppedEpisode, Episode, Task
from icrl_megatron.utils.errors import ConfigError

SETTINGS = RolloutSettings(templates="paper", context_tokens=16384)
TIPS = "Try it the other way round."
THOUGHT = "A thought that only the solver has."


def played(task_set: Any, replies: list[str], settings: RolloutSettings = SETTINGS) -> tuple[Prompter, Episode, Ask]:
    """(prompter, episode, what the critic was asked) of the first problem; each attempt has these replies."""
    prompter = Prompter(qwen_tokenizers.build("qwen3_instruct_2507"), settings)
    asked: list[Ask] = []

    class Script:
        turn = 0

        async def reply(self, ask: Ask) -> Completion:
            text = f"<critic>{TIPS}</critic>"
            if ask.role == "critique":
                asked.append(ask)
                self.turn = 0
            else:
                text = f"{THOUGHT} {replies[self.turn]}"
                self.turn += 1
            ids = prompter.encode_reply(text)
            return Completion(ids, (0.0,) * len(ids), "stop", 0)

    script = Script()
    setup = EpisodeSetup(task_set.environment, prompter, settings)
    task = task_set.problems("train")[0]
    episode = asyncio.run(play_episode(task, 0, setup, lambda task, index: Speakers(script, script), Seeds(0, 0)))
    assert isinstance(episode, Episode), episode
    (ask,) = asked
    assert prompter.decode(ask.prompt_ids).startswith("user\n") and ask.message in prompter.decode(ask.prompt_ids)
    return prompter, episode, ask


@contextlib.contextmanager
def of_paper(name: str, folder: Path) -> Iterator[tuple[Any, str, str, list[tuple[str, str]]]]:
    """(task set, manual, beginning of the problem, [(reply, its action)]) of a task that the replies fail at."""
    if name == "math":
        for split, prompt in (("train", "What is 2+3?"), ("heldout", "What is 3+3?")):
            (folder / f"{split}.jsonl").write_text(json.dumps({"prompt": prompt, "label": "5"}))
        source: Any = source_of("math")
        source.data.train, source.data.heldout = [str(folder / "train.jsonl")], [str(folder / "heldout.jsonl")]
        yield registry.of_source(source), MANUAL, "What is 2+3?", [("I am not sure.", ""), ("So \\boxed{6}.", "6")]
        return
    actions = {
        "alfworld": ["look"] * 3,
        "webshop": [TALKS["webshop"][1][0][0], TALKS["webshop"][1][1][0]],
        "searchqa": ["<search>France</search>", "<answer>Rome</answer>"],
    }[name]
    with serving(name) as (url, _):
        data = ServerData(train=["0:4"], heldout=["4:6"], servers=[url])
        replies = [(one if name == "searchqa" else f"<action> {one} </action>", one) for one in actions]
        yield AgentGym(ServedSource(name, data=data)), MANUALS[name], TALKS[name][0], replies


@pytest.mark.parametrize("name", ["alfworld", "webshop", "searchqa", "math"])
def test_prompts_of_the_papers_task_sets(name: str, tmp_path: Path) -> None:
    with of_paper(name, tmp_path) as (task_set, manual, problem, replies):
        prompter, episode, ask = played(task_set, [reply for reply, _ in replies])
    first, second = episode.attempts
    plain, revised = prompter.decode(first.prompt_ids), prompter.decode(second.prompt_ids)
    for text in (plain, revised):
        system, user = text.split("\nuser\n")
        assert system.startswith("system\n") and manual in system
        assert manual not in user and problem in user
    assert TIPS not in plain and np.array_equal(second.plain_prompt_ids, first.prompt_ids)
    assert revised.index(TIPS) < revised.index(problem)  # tips come before the first observation
    critic = ask.message
    assert manual in critic and problem in critic and first.summary in critic
    assert THOUGHT not in critic and "<action> " not in critic
    assert [turn.action for turn in first.turns] == [action or None for _, action in replies[: len(first.turns)]]
    lines = critic.splitlines()
    assert [line for line in lines if line.startswith("Action: ")] == [
        f"Action: {action or 'none that could be read'}" for _, action in replies[: len(first.turns)]
    ]
    assert [line for line in lines if line.startswith("Step ")] == [f"Step {i + 1}" for i in range(len(first.turns))]


def test_a_long_reply_of_mathematics_is_its_boxed_answer_for_the_critic(tmp_path: Path) -> None:
    """As text, the reply alone would fill the critic's context."""
    settings = replace(SETTINGS, context_tokens=2850, max_critique_tokens=100, max_turn_tokens=None)
    with of_paper("math", tmp_path) as (task_set, *_):
        _, episode, ask = played(task_set, ["step " * 2600 + "so \\boxed{\\frac{1}{2}}."], settings)
    assert len(episode.attempts[0].turns[0].completion.ids) + len(ask.prompt_ids) > settings.context_tokens
    assert "Action: \\frac{1}{2}\n" in ask.message and "step step" not in ask.message
    assert "left out" not in ask.message


class Walk(Works):
    """Turns with long observations, never solved."""

    max_turns = 6
    manual = "You walk. Actions: go NUMBER"

    async def reset(self) -> str:
        return "Walk to the end."

    def parse(self, reply: str) -> str | None:
        return reply.split(". ")[-1]

    def hint(self) -> str:
        return ""

    async def step(self, action: str) -> StepResult:
        return StepResult((f"seen {action} " + "1" * 800)[:800] + "BEYOND", done=False)

    def outcome(self) -> float:
        return 0.0

    def summary(self) -> str:
        return "lost"


class Walks:
    environment = Walk

    def problems(self, split: str) -> list[Task]:
        return [Task("walk/train/0", "walk", "train", "")]


GO = [f"go {number}" for number in range(1, 7)]


def test_observations_are_cut_at_800_characters() -> None:
    _, episode, ask = played(Walks(), GO)
    assert "BEYOND" in episode.attempts[0].turns[0].observation and "BEYOND" not in ask.message
    observed = [line for line in ask.message.splitlines() if line.startswith("Observation: ")]
    assert [len(line) for line in observed] == [len("Observation: ") + 800] * 6


@pytest.mark.parametrize(("templates", "kept"), [("standard", "earliest"), ("paper", "latest"), ("compact", "latest")])
def test_a_critics_prompt_keeps_the_turns_that_its_templates_name(templates: str, kept: str) -> None:
    whole = played(Walks(), GO, replace(SETTINGS, templates=templates))[2]
    assert all(f"seen {action}" in whole.message for action in GO) and "left out" not in whole.message
    limit = len(whole.prompt_ids) + SETTINGS.max_critique_tokens - 1  # one token too few for all turns
    for context in (limit, limit - 1200):
        settings = replace(SETTINGS, templates=templates, context_tokens=context)
        ask = played(Walks(), GO, settings)[2]
        assert len(ask.prompt_ids) + settings.max_critique_tokens <= context
        read = [action for action in GO if f"seen {action}" in ask.message]
        left = len(GO) - len(read)
        assert left == 1 if context == limit else left > 1
        assert read == (GO[:-left] if kept == "earliest" else GO[left:])
        note = {
            "standard": f"(The last {left} turns are left out.)",
            "paper": f"(The first {left} steps are left out.)",
        }
        assert note.get(templates, "") in ask.message


def test_a_folder_may_have_a_system_message_and_a_rule(tmp_path: Path) -> None:
    for form, text in (("attempt", "{{ observation }}"), ("revision", "{{ critique }}"), ("system", "({{ manual }})")):
        (tmp_path / f"{form}.jinja").write_text(text)
    (tmp_path / "critique.jinja").write_text('{% set keeps = "earliest" %}{{ summary }}')
    templates = Prompter(build_byte_tokenizer(), RolloutSettings(templates=str(tmp_path))).templates
    assert templates.opening(Opening("go"), "a b") == Opening("go", "(a b)")
    assert templates.kept([1, 2, 3], 2) == [1]
    (tmp_path / "critique.jinja").write_text('{% set keeps = "middle" %}{{ summary }}')
    with pytest.raises(ConfigError, match=r"sets keeps to 'middle'; set it to earliest or latest"):
        Prompter(build_byte_tokenizer(), RolloutSettings(templates=str(tmp_path)))


def test_a_chat_template_without_system_messages_is_refused_with_a_remedy_that_works() -> None:
    tokenizer = build_byte_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + str(tokenizer.chat_template)
    with pytest.raises(ConfigError, match=r"templates=paper has a system message.*use rollout\.templates=standard"):
        Prompter(tokenizer, SETTINGS)
    Prompter(tokenizer, replace(SETTINGS, templates="standard"))


@pytest.mark.parametrize(
    ("manual", "message"), [(5, "it must be a str"), ("x" * 2000, "at most rollout.max_observation_bytes = 1024 bytes")]
)
def test_another_manual_costs_the_episode(manual: object, message: str) -> None:
    ended = play_one(type("Odd", (Works,), {"manual": manual}), max_observation_bytes=1024)
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer and message in ended.error


@pytest.mark.parametrize("name", sorted(MANUALS))
def test_a_manual_has_the_actions_of_the_recorded_episodes(name: str) -> None:
    actions = [dialects.FIRST_ACTIONS[name], *(action for action, *_ in TALKS[name][1])]
    listed = MANUALS[name].split("Actions:\n")[1]
    for action in actions:
        verb = action.split(">")[0].split("[")[0].split()[0]
        assert verb in listed, action


def test_two_steps_of_the_byte_model(tmp_path: Path) -> None:
    small = ["steps=2", "eval.interval=0", "eval.problems=2", "rollout.tasks_per_step=2", "rollout.episodes_per_task=2"]
    words = ["train", "any_text", f"run_dir={tmp_path / 'run'}", "rollout.templates=paper", *small]
    ended = batch(tmp_path, {"run": words})["run"]
    assert ended.code == 0, ended.error
    for step in (1, 2):
        episodes = [record.episode for record in Rollouts(tmp_path / "run").read(step)]
        assert len(episodes) == 4
        for episode in episodes:
            first, second = episode.attempts
            assert np.array_equal(first.prompt_ids, second.plain_prompt_ids)
            assert not np.array_equal(second.plain_prompt_ids, second.prompt_ids)
            common = next(
                i for i, (a, b) in enumerate(zip(first.prompt_ids, second.prompt_ids, strict=False)) if a != b
            )
            assert common > 200  # the system message
