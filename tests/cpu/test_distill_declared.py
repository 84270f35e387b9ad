"""`icrl distill` in environments that declare tools and run the calls themselves: a shop with a talking customer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import byte_model
import pytest
import qwen_tokenizers
from agent_systems import play
from local_servers import Handler, threaded
from whole_runs import batch

from icrl_megatron.distill import command, readers
from icrl_megatron.distill.encode import encode
from icrl_megatron.distill.events import Run
from icrl_megatron.distill.filters import Rules, filtered
from icrl_megatron.distill.linear import linear
from icrl_megatron.distill.roles import AgentReply, Brief, Member
from icrl_megatron.distill.self_play import run_of
from icrl_megatron.distill.system import System
from icrl_megatron.distill.trajectory import Trajectory
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.settings.distill_schema import DistillFilters
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import OwnSource
from icrl_megatron.settings.task_sections import CallFormat
from icrl_megatron.tasks.base import Environment, ReadsCalls
from icrl_megatron.tasks.registry import Catalogue
from icrl_megatron.types import Completion, Episode, Task
from icrl_megatron.utils.errors import ConfigError

SHOP = """
from icrl_megatron.agents.tools import ToolSpec
from icrl_megatron.tasks.base import Opening, StepResult
from icrl_megatron.types import Task

TOOLS = [ToolSpec.of_text("order", "Orders one item.", "item"), ToolSpec.of_text("close", "Closes the shop.", "why")]


class Customer:
    max_turns = 8

    def __init__(self, item):
        self.item, self.tools = item, TOOLS

    async def reset(self):
        self.ordered, self.told, self.closed = 0, 0, False
        return Opening(f"I need two {self.item}.", "You work in a shop.")

    async def step(self, action):
        if isinstance(action, str):
            self.told += 1
            return StepResult("And how many did you order?" if self.told == 1 else "Thanks.", self.told == 2)
        answers = []
        for call in action:
            self.closed |= call.name == "close"
            self.ordered += call.name == "order"
            answers.append(f"{self.ordered} ordered")
        return StepResult(tuple(answers), self.closed)

    def outcome(self):
        return float(self.success())

    def success(self):
        return self.ordered == 2 and (self.told == 2 or self.closed)

    def summary(self):
        return f"{self.ordered} ordered"


class Shop:
    name = "shop"

    def problems(self, split):
        items = ("saws", "nails", "files", "bolts") if split == "train" else ("drills", "screws")
        return [Task(f"shop/{split}/{item}", "shop", split, item) for item in items]

    def environment(self, task):
        return Customer(task.problem)
"""
KEEP_ALL = "distill.filters.leave_out=[complexity, reflection, duplicates]"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shop") / "shop.py"
    file.write_text(SHOP)
    return file


def catalogue(shop: Path, format: str = "qwen3") -> Catalogue:
    return Catalogue([OwnSource(f"{shop}:Shop", agent=CallFormat(format))])


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def said(agent: str, question: str, calls: int, asked_again: bool, last: str = "done") -> str:
    """What the team says: two agents order at the same time, and the customer asks once more."""
    item = question.rpartition("I need two ")[2].split(".")[0]
    if agent == "planner":
        return "<plan>clerk: tell</plan>" if asked_again else "<plan>clerk: order\nbuyer: order</plan>"
    if agent in ("clerk", "buyer"):
        if calls or asked_again:
            return last
        return call("order", item=item)
    if agent == "answerer":
        return "<answer>Two.</answer>" if asked_again else "<answer>They are on their way.</answer>"
    return "enough" if agent == "reflector" else "<double_check>4 sure</double_check>"


class Scripted:
    def __init__(self, agent: str, last: str = "done") -> None:
        self.agent, self.last, self.briefs = agent, last, list[Brief]()

    async def reply(self, brief: Brief) -> AgentReply:
        self.briefs.append(brief)
        await asyncio.sleep(0)
        asked_again = any(note.tag == "user" for note in brief.notes)
        return AgentReply(said(self.agent, brief.question, len(brief.own), asked_again, self.last), 1, 1)


def team(**last: str) -> dict[str, Member]:
    names = ("planner", "clerk", "buyer", "reflector", "answerer", "verifier")
    return {name: Member(Scripted(name, last.get(name, "done"))) for name in names}


def one_run(shop: Path, agents: dict[str, Member]) -> Run:
    made = catalogue(shop)
    (run,) = play(System(agents, made.environment), list(made.get("shop").problems("train")[:1]))
    assert isinstance(run, Run), run
    return run


def told(found: Trajectory) -> list[str]:
    return [f"{s.kind} {s.agent} {s.call.key() if s.call else s.text}" for s in found.segments]


def kept(found: Trajectory) -> list[str]:
    """Filters that drop it."""
    rules = Rules(DistillFilters(leave_out=["complexity", "reflection"]))
    return [report.name for report in filtered([found], rules)[1] if report.dropped]


def test_a_team_plays_the_calls_and_goes_on_when_the_customer_asks(shop: Path) -> None:
    agents = team()
    run = one_run(shop, agents)
    assert run.correct and run.stateful == ("order", "close") and run.system == "You work in a shop."
    found = linear(run)
    assert told(found) == [
        "text plan clerk: order\nbuyer: order",
        'call order order {"item": "saws"}',
        "observation order 1 ordered",
        "text think done",
        'call order order {"item": "saws"}',
        "observation order 2 ordered",
        "text suggested_answer They are on their way.",
        "text double_check 4 sure",
        "answer answer They are on their way.",
        "observation user And how many did you order?",
        "text plan clerk: tell",
        "text suggested_answer Two.",
        "text double_check 4 sure",
        "answer answer Two.",
    ]
    assert [spec.name for spec in found.tools] == ["order", "close"] and found.problem == "I need two saws."
    assert kept(found) == [], "the last answer alone ends the sequence"
    answerer: Any = agents["answerer"].agent
    assert [note.tag for note in answerer.briefs[1].notes if note.agent in ("answerer", "user")] == ["answer", "user"]


def test_an_environment_that_ends_with_a_call_has_no_answer(shop: Path) -> None:
    run = one_run(shop, team(buyer=call("close", why="night")))
    found = linear(run)
    assert run.correct and told(found)[-2:] == ['call close close {"why": "night"}', "observation close 2 ordered"]
    assert not any(segment.kind == "answer" for segment in found.segments) and kept(found) == []


def solved(shop: Path, prompter: Prompter, format: str, replies: tuple[str, ...]) -> tuple[Episode, ReadsCalls]:
    made, left, opened = catalogue(shop, format), iter(replies), list[Environment]()

    class Says:
        async def reply(self, ask: Ask) -> Completion:
            ids = prompter.encode_reply(next(left), ask.stop)
            return Completion(ids, (0.0,) * len(ids), "stop", 0)

    def environment(task: Task) -> Environment:
        opened.append(made.environment(task))
        return opened[-1]

    setup = EpisodeSetup(environment, prompter, RolloutSettings(rounds=1))
    task = made.get("shop").problems("train")[0]
    episode = asyncio.run(play_episode(task, 0, setup, lambda task, index: Speakers(Says(), Says()), Seeds(0, 0)))
    assert isinstance(episode, Episode) and isinstance(opened[0], ReadsCalls)
    return episode, opened[0]


@pytest.mark.parametrize("format", ["qwen3", "tags"])
def test_the_tokens_of_an_episode_are_those_of_its_trajectory(format: str, shop: Path) -> None:
    """With calls, their answers and the customer's messages."""
    prompter = Prompter(qwen_tokenizers.build("qwen3_instruct_2507"), RolloutSettings())
    order = call("order", item="saws") if format == "qwen3" else "<order>saws</order>"
    answers = ("<answer>On their way.</answer>", "<answer>Two.</answer>")
    episode, environment = solved(shop, prompter, format, (order, order, *answers))
    run = run_of(episode, environment)
    assert run.correct and told(linear(run)).count('call order order {"item": "saws"}') == 2
    (attempt,) = episode.attempts
    ids = [*attempt.prompt_ids]
    for turn in attempt.turns:
        ids += [*turn.completion.ids, *turn.observation_ids]
    encoded = encode(linear(run), format, prompter)
    assert encoded.ids_T.tolist() == ids[: len(encoded.ids_T)] and len(ids) - len(encoded.ids_T) <= 1
    assert int(encoded.trained_T.sum()) >= sum(len(turn.completion.ids) for turn in attempt.turns) - 1


class Model(Handler):
    def do_POST(self) -> None:
        system, brief = (message["content"] for message in json.loads(self.body())["messages"][:2])
        names = {"You plan": "planner", "You do one": "clerk", "You judge": "reflector", "You answer": "answerer"}
        agent = next((name for begin, name in names.items() if system.startswith(begin)), "verifier")
        question = brief.removeprefix("Question:\n").partition("\n\nWrite ")[0]
        text = said(agent, question, brief.count("observation]"), "[user, user]" in brief)
        self.send_json({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 3}})


@pytest.mark.slow
def test_from_your_own_environment_to_a_trained_model(shop: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "traces.jsonl", byte_model.build(tmp_path / "model", positions=2048)
    source = f"tasks.sources=[{{name: '{shop}:Shop', agent: {{format: tags}}}}]"
    agents = "distill.agents=[{name: clerk, tools: [order]}, {name: buyer}]"
    with threaded(Model) as url:
        endpoint = ("distill.system=endpoint", f"distill.endpoint={{url: '{url}/v1', model: m}}", KEEP_ALL)
        words = ("any_text", "--out", str(out), source, agents, *endpoint)
        steps = ("warm_start.steps=2", "warm_start.epochs=null", "warm_start.episodes_per_step=2")
        small = (*steps, "actor.precision=fp32")
        lengths = ("rollout.context_tokens=2048", "rollout.max_turn_tokens=100", "rollout.max_critique_tokens=100")
        sft = ("sft", str(out), f"model.path={model}", f"run_dir={tmp_path / 'run'}", *small)
        ended = batch(
            tmp_path,
            {
                "played": ["distill", *words, "distill.attempts=2"],
                "trained": [*sft, "warm_start.data.0.tool_format=tags", *lengths],
                "unknown": ["distill", *words, "distill.agents=[{name: clerk, tools: [sell]}]"],
                "scripted": ["distill", *words, "distill.agents=[]", "distill.system=scripted"],
            },
        )
    assert ended["played"].code == 0, ended["played"].error
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert (report["finished"], report["right"], report["written"], report["failed"]) == (8, 8, 8, {})
    found = [one.trajectory for one in readers.read(str(out))]
    assert all(one is not None and {spec.name for spec in one.tools} == {"order", "close"} for one in found)
    assert ended["trained"].code == 0, ended["trained"].error
    assert (tmp_path / "run" / "warm_start" / "hf" / "model.safetensors").exists()
    assert ended["unknown"].code == 2 and "the tool 'sell', and task set 'shop' has" in ended["unknown"].said
    assert ended["scripted"].code == 2 and "has no scripted team" in ended["scripted"].said


def test_two_attempts_in_an_environment_that_begins_anew_are_refused(shop: Path, tmp_path: Path) -> None:
    model = byte_model.build(tmp_path / "model")
    words = [f"tasks.sources=[{{name: '{shop}:Shop', agent: {{format: tags}}}}]", "distill.system=model"]
    words += [f"model.path={model}", "rollout.rounds=2"]
    with pytest.raises(ConfigError, match=r"rollout\.rounds=2.*use rollout\.rounds=1 in a new run"):
        command.prepare(load("any_text", words), tmp_path / "a.jsonl")
    command.prepare(load("any_text", [*words, "rollout.rounds=1"]), tmp_path / "a.jsonl")
