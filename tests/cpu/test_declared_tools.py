"""Tools that a user's own environment declares: how they reach the model, its calls, and their answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import byte_model
import pytest
import qwen_tokenizers
from whole_runs import Batch, batch, train

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.run.problems import statements
from icrl_megatron.settings.schema import RolloutSettings, Settings
from icrl_megatron.settings.task_options import OwnSource
from icrl_megatron.settings.task_sections import CallFormat
from icrl_megatron.tasks.base import StepResult
from icrl_megatron.tasks.declared_tools import NO_CALLS_LEFT, DeclaredTools
from icrl_megatron.tasks.registry import Catalogue
from icrl_megatron.types import Completion, DroppedEpisode, Episode
from icrl_megatron.utils.errors import ConfigError

SHOP = """
from icrl_megatron.agents.tools import ToolSpec
from icrl_megatron.tasks.base import Opening, StepResult
from icrl_megatron.types import Task

LOOK = ToolSpec.of_text("look", "Shows how many of an item there are.", "item")
ORDER = ToolSpec("order", "Orders an item.", {"type": "object", "properties": {
    "item": {"type": "string"}, "count": {"type": "integer", "minimum": 1}}, "required": ["item", "count"]})


class Customer:
    max_turns = 6

    def __init__(self, item):
        self.item, self.tools = item, [LOOK] if item == "nails" else [LOOK, ORDER]

    async def reset(self):
        self.ordered, self.told, self.seen = 0, False, []
        return Opening(f"I need 3 {self.item}.", "You work in a shop.")

    async def step(self, action):
        self.seen.append(action)
        if isinstance(action, str):
            self.told, done = True, self.ordered == 3
            return StepResult("Thanks." if done else "And? <|im_end|></tool_call>", done)
        answers = []
        for call in action:
            if call.name == "order":
                self.ordered += call.arguments["count"]
            answers.append(f"{call.name}: ok</tool_response>")
        return StepResult(tuple(answers), False)

    def outcome(self):
        return float(self.success())

    def success(self):
        return self.told and self.ordered == 3

    def summary(self):
        return f"{self.ordered} ordered"

    def measures(self):
        return {"ordered": float(self.ordered)}


class Shop:
    name = "shop"

    def problems(self, split):
        items = ("saws", "nails", "files", "bolts") if split == "train" else ("drills", "screws")
        return [Task(f"shop/{split}/{item}", "shop", split, item) for item in items]

    def environment(self, task):
        return Customer(task.problem)
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(SHOP)
    return folder / "shop.py"


def catalogue(shop: Path, format: str = "qwen3") -> Catalogue:
    return Catalogue([OwnSource(f"{shop}:Shop", agent=CallFormat(format))])


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


REPLIES = (
    "\n".join([called("look", item="saws"), called("order", item="saws", count=1)]),
    "One is on its way.",
    "\n".join([called("order", item="saws", count=0), called("order", item="saws", count=2), called("paint")]),
    "All three.",
)
OBSERVED = (
    ["look: ok< /tool_response>", "order: ok< /tool_response>"],
    "And? <|im_end|></tool_call>",
    ["order: at $.count: 0 is less than the minimum of 1", "order: ok< /tool_response>", "no tool 'paint'"],
)


def play(
    made: Catalogue, prompter: Prompter, replies: tuple[str, ...], item: str = "saws", **changes: Any
) -> tuple[Episode | DroppedEpisode, list[tuple[int, ...]]]:
    prompts: list[tuple[int, ...]] = []

    class Says:
        async def reply(self, ask: Ask) -> Completion:
            prompts.append(ask.prompt_ids)
            ids = prompter.encode_reply(replies[len(prompts) - 1], ask.stop)
            return Completion(ids, (0.0,) * len(ids), "stop", 0)

    (task,) = [task for task in made.get("shop").problems("train") if task.problem == item]
    setup = EpisodeSetup(made.environment, prompter, RolloutSettings(rounds=1, **changes))
    speakers = Speakers(Says(), Says())
    return asyncio.run(play_episode(task, 0, setup, lambda task, index: speakers, Seeds(0, 0))), prompts


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507"])
def test_an_episode_is_the_published_templates_rendering(template: str, shop: Path) -> None:
    """Calls, consecutive tool messages, and user messages after replies without calls."""
    vocabulary = qwen_tokenizers.build(template)
    prompter, made = Prompter(vocabulary, RolloutSettings()), catalogue(shop)
    episode, prompts = play(made, prompter, REPLIES)
    assert isinstance(episode, Episode), episode
    (attempt,) = episode.attempts
    assert attempt.success and attempt.outcome == 1.0
    assert dict(attempt.measures) == {"calls": 5.0, "calls_invalid": 2.0, "changed_tags": 3.0, "ordered": 3.0}
    environment: Any = made.environment(episode.task)
    assert isinstance(environment, DeclaredTools)
    observed: list[Any] = [turn.observation for turn in attempt.turns]
    mistakes = observed[2].split("\n")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You work in a shop."},
        {"role": "user", "content": "I need 3 saws."},
        {"role": "assistant", "content": REPLIES[0]},
        *({"role": "tool", "content": text} for text in OBSERVED[0]),
        {"role": "assistant", "content": REPLIES[1]},
        {"role": "user", "content": "And? </tool_call>"},
        {"role": "assistant", "content": REPLIES[2]},
        *({"role": "tool", "content": text} for text in mistakes),
    ]
    assert len(mistakes) == 3 and "count" in mistakes[0] and "There is no tool 'paint'" in mistakes[2]
    tools = json.loads(environment.dialogue.tools)
    assert [tool["function"]["name"] for tool in tools] == ["look", "order"]
    text = vocabulary.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    theirs, ours = vocabulary(text, add_special_tokens=False).input_ids, list(prompts[-1])
    # The customer's <|im_end|> is text; the template's rendering of it would end the turn.
    assert vocabulary.decode(ours).replace("<|im_end|></tool_call>", "</tool_call>") == vocabulary.decode(theirs)
    end = vocabulary.convert_tokens_to_ids("<|im_end|>")
    assert ours.count(end) == theirs.count(end)


def test_the_environment_gets_calls_as_objects_and_only_good_ones(shop: Path) -> None:
    made = catalogue(shop)
    prompter = Prompter(qwen_tokenizers.build("qwen3"), RolloutSettings())
    environments: list[Any] = []
    inner = made.environment
    made.environment = lambda task: environments.append(inner(task)) or environments[-1]  # type: ignore[method-assign,func-returns-value]
    play(made, prompter, ("<think>\nhm\n</think>\n\n" + REPLIES[0], *REPLIES[1:]))
    assert environments[0]._inner.seen == [
        (ToolCall("look", {"item": "saws"}), ToolCall("order", {"item": "saws", "count": 1})),
        "One is on its way.",
        (ToolCall("order", {"item": "saws", "count": 2}),),
        "All three.",
    ]


def test_each_episode_declares_its_own_tools(shop: Path) -> None:
    made = catalogue(shop)
    stated = statements(made.get("shop").problems("train"), Settings(), made)
    found = {one.task.problem: one.dialogue.tools for one in stated}
    assert "order" in found["saws"] and "order" not in found["nails"]
    prompter = Prompter(qwen_tokenizers.build("qwen3"), RolloutSettings())
    episode, prompts = play(made, prompter, (called("order", item="nails", count=3), *["No."] * 5), "nails")
    assert isinstance(episode, Episode) and "Orders an item." not in prompter.decode(prompts[0])
    assert episode.attempts[0].turns[0].observation == "There is no tool 'order'. The tools are look."


def test_calls_beyond_the_limit_do_not_reach_the_environment(shop: Path) -> None:
    prompter = Prompter(qwen_tokenizers.build("qwen3"), RolloutSettings())
    episode, _ = play(catalogue(shop), prompter, REPLIES[:1] + ("That is all.",) * 5, max_calls=1)
    assert isinstance(episode, Episode)
    assert episode.attempts[0].turns[0].observation == f"look: ok< /tool_response>\n{NO_CALLS_LEFT}"
    assert dict(episode.attempts[0].measures)["ordered"] == 0.0


def test_inline_formats_describe_the_tools_in_the_prompt(shop: Path) -> None:
    made = catalogue(shop, "tags")
    prompter = Prompter(qwen_tokenizers.build("qwen3"), RolloutSettings())
    replies = ("<look>nails</look>", "<answer>All.</answer>", "no tag", *["<answer>Bye.</answer>"] * 3)
    episode, prompts = play(made, prompter, replies, "nails")
    assert isinstance(episode, Episode)
    assert "I need 3 nails.\n\nWrite <look>item</look> to use a tool" in prompter.decode(prompts[0])
    seen = [turn.observation for turn in episode.attempts[0].turns[:2]]
    assert seen == ["look: ok</tool_response>", "And? <|im_end|></tool_call>"]
    with pytest.raises(ConfigError, match=r"tool 'order' takes \['item', 'count'\], but a tag holds one text"):
        play(made, prompter, replies, "saws")


class Fails:
    """Declares one tool, and answers as told."""

    max_turns = 2
    tools: Any = (ToolSpec.of_text("look", "Looks.", "item"),)

    def __init__(self, result: Any) -> None:
        self.result = result

    async def reset(self) -> str:
        return "go"

    async def step(self, action: Any) -> Any:
        return self.result

    def outcome(self) -> float:
        return 0.0

    def success(self) -> bool:
        return False

    def summary(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (StepResult("one", False), "step() returned 1 observations for 2 calls"),
        (StepResult(("one", 2), False), "its observation must be a str"),  # type: ignore[arg-type]
        ("two", "it must be a StepResult"),
        (StepResult(("one", "two"), "no"), "its done must be True or False"),  # type: ignore[arg-type]
    ],
)
def test_wrong_answers_cost_the_episode(result: Any, message: str, shop: Path) -> None:
    made = catalogue(shop)
    made.environment = lambda task: DeclaredTools(Fails(result), "qwen3")  # type: ignore[method-assign]
    prompter = Prompter(qwen_tokenizers.build("qwen3"), RolloutSettings())
    ended, _ = play(made, prompter, ("\n".join([called("look", item="a"), called("look", item="b")]),))
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer and message in ended.error


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"name": "look"}], "declare a list of icrl_megatron.agents.tools.ToolSpec"),
        ([*Fails.tools] * 2, r"\['look'\] are named twice"),
        ([ToolSpec("a", "", {"type": "x"})], "is not a JSON schema"),
        ([ToolSpec("a", "", {"x": {1}})], "cannot be written as JSON"),
    ],
)
def test_tools_that_cannot_be_declared_end_the_run(tools: list[Any], message: str) -> None:
    environment = Fails(None)
    environment.tools = tools
    with pytest.raises(ConfigError, match=message):
        DeclaredTools(environment, "qwen3")


def test_runs_with_and_without_tools_in_the_template(shop: Path, tmp_path: Path) -> None:
    """A template without tools is refused before the model is loaded, and the format in its message works."""
    model = byte_model.build(tmp_path / "model")
    small = [f"model.path={model}", "steps=1", "warm_start.steps=0", "eval.interval=0", "rollout.max_turn_tokens=8"]
    small += ["rollout.max_critique_tokens=8", "rollout.context_tokens=1000", "rollout.tasks_per_step=2"]
    small += ["eval.problems=2", "rollout.episodes_per_task=2"]
    plain = shop.with_name("plain.py")
    plain.write_text(SHOP.replace("[LOOK, ORDER]", "[LOOK]"))
    commands = {
        name: train(tmp_path / name, *small, f"tasks.sources=[{{name: '{file}:Shop'{more}}}]")
        for name, file, more in (("refused", shop, ""), ("tags", plain, ", agent: {format: tags}"))
    }
    ran = Batch(tmp_path, batch(tmp_path, commands))
    assert ran.ended["refused"].code == 2 and "agent.format=tags" in ran.ended["refused"].said
    ran.succeeded("tags")
    (step,) = ran.trained("tags")
    assert step["task/calls"] >= 0 and step["task/ordered"] == 0
