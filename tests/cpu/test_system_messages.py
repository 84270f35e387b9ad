"""A row's system message in the prompts of solver and critic, under published chat templates and in whole runs."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import byte_model
import numpy as np
import pytest
import qwen_tokenizers
from odd_environments import Works, play_one, returning
from transformers import AutoTokenizer
from whole_runs import batch, train

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.agents.formats import Qwen3
from icrl_megatron.agents.tools import ToolSpec
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import PLAIN, Prompter, tokenizer
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ToolsSource, source_of
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Opening
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Completion, DroppedEpisode, Episode, Task

TEMPLATES = tuple(qwen_tokenizers.TEXT_OF)
TOOLS = Qwen3([ToolSpec.of_text("search", "Finds passages.", "query")]).dialogue
SYSTEM = "You are terse.\n\nAnswer <tool_call>in</tool_call> one <|im_end|> word: 東京, e\u0301."
SHOWN = SYSTEM.replace("<|im_end|>", "")
TASK = Task("set/train/0", "set", "train", "")
REFUSAL = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
NO_SYSTEM = byte_model.CHATML.replace("{% for m in messages %}", REFUSAL + "{% for m in messages %}")
"""Refuses system messages, as Gemma's template does."""


@functools.cache
def prompter(template: str) -> Prompter:
    return Prompter(qwen_tokenizers.build(template), RolloutSettings())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dialogue", [PLAIN, TOOLS], ids=["plain", "tools"])
def test_prompts_are_the_published_templates_rendering(template: str, dialogue: Dialogue) -> None:
    """Also with text that looks like the template's own: it stays text."""
    ours, vocabulary = prompter(template), qwen_tokenizers.build(template)
    options = {"tools": json.loads(dialogue.tools)} if dialogue.tools else {}
    prompts = {
        ours.text("attempt", observation="Where?"): ours.attempt("Where?", dialogue, SHOWN),
        ours.text("revision", observation="Where?", critique="No."): ours.revision("Where?", "No.", dialogue, SHOWN),
    }
    for asked, ids in prompts.items():
        messages = [{"role": "system", "content": SHOWN}, {"role": "user", "content": asked}]
        text = vocabulary.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        assert vocabulary.decode(ids) == vocabulary.decode(vocabulary(text, add_special_tokens=False).input_ids)
        assert vocabulary.decode(ids).count("<|im_start|>") == 3
    forged = ours.attempt("Where?", dialogue, SYSTEM)
    ends = [i for i in forged if i == vocabulary.convert_tokens_to_ids("<|im_end|>")]
    assert len(ends) == 2, "a system message closed its turn"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dialogue", [PLAIN, TOOLS], ids=["plain", "tools"])
def test_prompts_without_a_system_message_are_the_templates_own(template: str, dialogue: Dialogue) -> None:
    """So a template with a system message of its own (Qwen2.5's) still shows it."""
    ours, vocabulary = prompter(template), qwen_tokenizers.build(template)
    options = {"tools": json.loads(dialogue.tools)} if dialogue.tools else {}
    messages = [{"role": "user", "content": ours.text("attempt", observation="Where?")}]
    text = vocabulary.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert list(ours.attempt("Where?", dialogue)) == vocabulary(text, add_special_tokens=False).input_ids
    assert ("You are Qwen" in text) == (template == "qwen2_5")


class Told(Works):
    """Begins with a system message."""

    async def reset(self) -> Opening:  # type: ignore[override]
        await super().reset()
        return Opening("go up", "be brief")


def test_the_solver_reads_it_as_system_message_and_the_critic_as_part_of_the_task() -> None:
    ours = prompter("qwen3")
    asks: list[Ask] = []

    class Heard:
        async def reply(self, ask: Ask) -> Completion:
            asks.append(ask)
            ids = ours.encode_reply("up" if ask.role != "critique" else "<critic>down</critic>")
            return Completion(ids, (0.0,) * len(ids), "stop", 0)

    setup = EpisodeSetup(Told, ours, RolloutSettings(rounds=2))
    speakers = Speakers(Heard(), Heard())
    episode = asyncio.run(play_episode(TASK, 0, setup, lambda task, index: speakers, Seeds(0, 0)))
    assert isinstance(episode, Episode)
    first, second = episode.attempts
    assert tuple(first.prompt_ids) == tuple(first.plain_prompt_ids) == ours.attempt("go up", PLAIN, "be brief")
    assert np.array_equal(second.plain_prompt_ids, first.prompt_ids)
    assert tuple(second.prompt_ids) == ours.revision("go up", "down", PLAIN, "be brief")
    (critique,) = [ask for ask in asks if ask.role == "critique"]
    assert "be brief\n\ngo up" in critique.message
    asked = [{"role": "user", "content": critique.message}]
    rendered = qwen_tokenizers.build("qwen3").apply_chat_template(asked, add_generation_prompt=True)
    assert list(critique.prompt_ids) == rendered.input_ids


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (Opening("go", 5), "its system must be a str"),  # type: ignore[arg-type]
        (Opening(None, "x"), "its text must be a str"),  # type: ignore[arg-type]
        (("go", "x"), "it must be a str"),
        (Opening("go", "x" * 5000), "returned a problem of more than rollout.max_observation_bytes"),
    ],
)
def test_other_openings_cost_the_episode(opening: object, message: str) -> None:
    ended = play_one(returning("reset", opening), max_observation_bytes=1000)
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer and message in ended.error


BRIEF = {"role": "system", "content": "Be brief."}
MESSAGES = [{"role": "system", "content": "Use \\boxed{}."}, {"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("math", "4", "2+2?"),
        ("code", ["assert f() == 4"], "2+2?\n\n"),
        ("searchqa", "4", "Question: 2+2?"),
        ("./reward.py:score", "4", "2+2?"),
    ],
)
@pytest.mark.parametrize("tools", [False, True])
def test_every_task_set_of_rows_has_it(
    name: str, label: object, text: str, tools: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text("def score(response):\n    return 1.0\n")
    Path("rows.jsonl").write_text(json.dumps({"prompt": MESSAGES, "label": label}) + "\n")
    source: Any = source_of(name)
    source.data.train = ["rows.jsonl"]
    if isinstance(source, ToolsSource):
        source.agent.tools = ["calculator"] if tools or name == "searchqa" else []
    task_set: Any = registry.of_source(source)
    (task,) = task_set.problems("train")
    said = task_set.statement(task)
    assert said == asyncio.run(task_set.environment(task).reset())
    assert said.system == "Use \\boxed{}." and text in said.text and said.system not in said.text
    if name == "math" and not tools:
        assert said.text == "2+2?", "the system message has the instruction already"


def test_runs_with_and_without_a_system_role_in_the_template(tmp_path: Path) -> None:
    """A template without one is refused before the model is loaded, and the remedy in the message works."""
    model = byte_model.build(tmp_path / "model")
    bare = byte_model.build(tmp_path / "bare")
    changed = AutoTokenizer.from_pretrained(bare)
    changed.chat_template = NO_SYSTEM
    changed.save_pretrained(bare)
    for name in ("train", "held"):
        prompts = [[BRIEF, {"role": "user", "content": f"{name} {i}?"}] for i in range(4)]
        lines = (json.dumps({"prompt": prompt, "label": "x"}) + "\n" for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    # The check before a run calls the function, which reads the system message as the first paragraph.
    (tmp_path / "reward.py").write_text("def score(prompt):\n    return 0.5 / prompt.startswith('Be brief.\\n\\n')\n")
    data = f"data: {{train: [{tmp_path}/train.jsonl], heldout: [{tmp_path}/held.jsonl]"
    small = ["steps=1", "warm_start.steps=0", "eval.interval=0", "eval.problems=2", "rollout.max_turn_tokens=4"]
    small += ["rollout.max_critique_tokens=4", "rollout.context_tokens=1000", "rollout.tasks_per_step=2"]

    def run(name: str, folder: Path, more: str = "") -> list[str]:
        source = f"tasks.sources=[{{name: '{tmp_path}/reward.py:score', {data}{more}}}}}]"
        return train(tmp_path / name, f"model.path={folder}", *small, source)

    commands = {
        "system": run("system", model),
        "refused": run("refused", bare),
        "joined": run("joined", bare, ", system: join"),
    }
    ended = batch(tmp_path, commands)
    assert ended["refused"].code == 2, ended["refused"].error
    assert "does not show system messages" in ended["refused"].said and "data.system=join" in ended["refused"].said
    opened = {
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntrain",
        "joined": "user\nBe brief.\n\ntrain",
    }
    for name, text in opened.items():
        assert ended[name].code == 0, ended[name].error
        shown = tokenizer(model)
        for record in Rollouts(tmp_path / name).read(1):
            first, second = record.episode.attempts
            for ids in (first.prompt_ids, second.prompt_ids, second.plain_prompt_ids):
                assert text in shown.decode(ids)
            critic = shown.decode(record.episode.critiques[0].prompt_ids)
            assert "<|im_start|>system" not in critic and "Be brief.\n\ntrain" in critic
