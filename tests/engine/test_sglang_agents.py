"""A system of agents on the real SGLang, end to end: a tiny model learns what the scripted agents reply to the prompts
of endpoint agents, plays all of them on the server that `icrl distill` starts, and another model is trained on that.

No model of this size follows instructions, so this one has learned the replies to a few problems by heart.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from agent_systems import archive, play
from whole_runs import icrl, rows

from icrl_megatron.distill import endpoint_agents, scripted
from icrl_megatron.distill.endpoint_agents import EndpointAgent
from icrl_megatron.distill.events import Run
from icrl_megatron.distill.roles import Agent, AgentReply, Brief
from icrl_megatron.distill.system import System
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.prompts import template_words
from icrl_megatron.settings.distill_schema import DistillEndpoint, DistillSettings, SystemAgent
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.utils.endpoint import ChatMessage

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]

RECIPE, PROBLEMS = "archive_easy", 8
SEARCHER = SystemAgent("searcher", tools=["search", "page"], about="finds homes and sizes")


@dataclass(frozen=True)
class Lesson:
    """An agent that replies as a scripted one, and writes down what an endpoint agent would have read."""

    scripted: Agent
    pupil: EndpointAgent
    written: list[list[ChatMessage]]

    async def reply(self, brief: Brief) -> AgentReply:
        reply = await self.scripted.reply(brief)
        self.written.append([*self.pupil.messages(brief), ChatMessage("assistant", reply.text)])
        return reply


def lessons(limit: int) -> tuple[list[list[ChatMessage]], list[Run]]:
    """Every conversation of every agent in one attempt at each of the first problems, and the attempts."""
    endpoint, written = DistillEndpoint(url="http://nowhere", model="none"), list[list[ChatMessage]]()
    pupils = endpoint_agents.team(DistillSettings(endpoint=endpoint, agents=[SEARCHER]))
    scripts, task_set = scripted.team(RECIPE), archive(RECIPE)
    team = {
        name: replace(pupil, agent=Lesson(scripts[name].agent, pupil.agent, written))
        for name, pupil in pupils.items()
        if isinstance(pupil.agent, EndpointAgent)
    }
    runs = play(System(team, task_set.environment), list(task_set.problems("train"))[:limit])
    assert all(isinstance(run, Run) for run in runs)
    return written, [run for run in runs if isinstance(run, Run)]


def model_of(folder: Path, conversations: Sequence[Sequence[ChatMessage]]) -> Path:
    """An untrained model that knows all words of the conversations, and those of Archive."""
    texts = (re.sub(r"(</?\w+>)", r" \1 ", one.content) for messages in conversations for one in messages)
    words = {word for text in texts for word in text.split()} | template_words("compact")
    build_tiny(folder, TinyModel(), sorted(words | set(archive(RECIPE).vocabulary())), seed=0)
    return folder


def done(*arguments: str) -> None:
    code, _, err = icrl(*arguments)
    assert code == 0, err


def test_agents_on_sglang_play_and_are_distilled_and_trained(tmp_path: Path) -> None:
    taught, played = lessons(PROBLEMS)
    right = sum(run.correct for run in played)
    model = model_of(tmp_path / "model", taught)
    pairs, traces = tmp_path / "pairs.jsonl", tmp_path / "traces.jsonl"
    pairs.write_text("".join(json.dumps({"messages": [vars(one) for one in messages]}) + "\n" for messages in taught))
    learned = ("warm_start.steps=140", "warm_start.episodes_per_step=24", f"warm_start.data=[{{path: {pairs}}}]")
    done("sft", RECIPE, f"run_dir={tmp_path / 'team'}", f"model.path={model}", *learned)

    team = tmp_path / "team" / "warm_start" / "hf"
    given = {"name": SEARCHER.name, "tools": SEARCHER.tools, "about": SEARCHER.about}
    done(
        *("distill", RECIPE, "--out", str(traces), f"tasks.limit={PROBLEMS}", "distill.attempts=1"),
        *("distill.system=endpoint", f"distill.agents={json.dumps([given])}", f"model.path={team}"),
        *("distill.endpoint.temperature=0", "distill.endpoint.max_tokens=40"),
        *("distill.filters.leave_out=[complexity, reflection]", "engine.kind=sglang"),
        f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}",
    )
    report = json.loads(traces.with_suffix(".report.json").read_text())
    assert (report["finished"], report["failed"], report["replies_without_token_counts"]) == (PROBLEMS, {}, 0)
    assert set(report["tokens"]) == {"planner", "searcher", "reflector", "answerer", "verifier"}
    assert all(of["read"] > of["written"] > 0 for of in report["tokens"].values())
    assert 0 < report["right"] <= PROBLEMS, f"the scripted agents had {right} right"
    written = [json.loads(line)["messages"] for line in traces.read_text().splitlines()]
    assert all(any(message.get("tool_calls") for message in messages) for messages in written)

    one_step = ("steps=1", "rollout.tasks_per_step=2", "rollout.episodes_per_task=2", "algo.on_no_signal=train")
    one_step = (*one_step, "eval.problems=4", "eval.control_problems=0")
    files = f"warm_start.data=[{{path: {traces}, tool_format: tags}}]"
    warm = (files, "warm_start.steps=30", "warm_start.episodes_per_step=8")
    done("train", RECIPE, f"run_dir={tmp_path / 'student'}", f"model.path={model}", *warm, *one_step)
    student = tmp_path / "student"
    losses = [row["sft/nll"] for row in rows(student / "warm_start")]
    assert losses[-1] < 0.5 * losses[0]
    (row,) = [row for row in rows(student) if "episodes/played" in row]
    assert row["episodes/played"] == 4 and (student / "hf" / "config.json").exists()
