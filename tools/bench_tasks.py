"""Episodes and steps a second of the task sets, with an engine that answers at once: `python tools/bench_tasks.py`.

    embedded    environment steps a second on one core, 200 episodes at once through the real episode loop
    client      the AgentGym client against a bare HTTP call to the same local server (CPU seconds of this process)
    grading     answers a second in two grading processes, every label graded 8 times, as in a group

Prints a table and writes JSON. Figures depend on what else the machine does; run it alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import httpx2
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from agentgym_server import serving

from icrl_megatron.config import RolloutSettings, TaskData, TaskSource
from icrl_megatron.rollout.episode import Stage, play
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Ask, Seeds, engine_casting
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.base import Teachable
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tiny import build_tokenizer
from icrl_megatron.types import Completion

ANSWERS = (r"\frac{%d}{7}", r"%d\sqrt{2}", "%d", r"%d + 2i", r"(%d, 3)", r"x = %d", r"\{%d, 5\}", r"%d\%%")
STEPS = 400


class Instant:
    """Answers everything with the same reply, at once."""

    def __init__(self, prompter: Prompter, text: str) -> None:
        ids = prompter.encode_reply(text)
        self._completion = Completion(ids, (0.0,) * len(ids), "stop", 0)

    async def reply(self, ask: Ask) -> Completion:
        return self._completion


def embedded(name: str, reply: str) -> dict[str, float]:
    """The whole episode loop (prompts, parsing, tokens), and the environment's steps alone."""
    task_set = registry.get(name)
    assert isinstance(task_set, Teachable)
    settings = RolloutSettings(templates="compact", context_tokens=512, max_turn_tokens=24, rounds=1, concurrency=200)
    prompter = Prompter(build_tokenizer([*task_set.vocabulary(), *template_words("compact")]), settings)
    stage = Stage(registry.environment, prompter, settings)
    tasks = list(task_set.problems("train"))[:100]
    begun = time.perf_counter()
    played, _ = asyncio.run(play(tasks, 10, stage, engine_casting(Instant(prompter, reply)), Seeds(0, 0)))
    whole = time.perf_counter() - begun

    async def alone() -> int:
        taken = 0
        for task in tasks * 20:
            environment = task_set.environment(task)
            await environment.reset()
            for _ in range(environment.max_turns):
                action = environment.parse(reply)
                taken += 1
                if action is not None and (await environment.step(action)).done:
                    break
        return taken

    begun = time.perf_counter()
    taken = asyncio.run(alone())
    return {
        "episodes_per_s": len(played) / whole,
        "environment_steps_per_s": taken / (time.perf_counter() - begun),
    }


def client() -> dict[str, float]:
    """CPU seconds of a step through the client over those of the same POST with a bare client, interleaved."""

    async def measure(url: str) -> tuple[float, float]:
        task_set = AgentGym(TaskSource("babyai", data=TaskData(train=["0:4"], heldout=["4:5"], servers=[url])))
        environment = task_set.environment(task_set.problems("train")[0])
        await environment.reset()
        async with httpx2.AsyncClient(trust_env=False) as bare:
            env = (await bare.post(f"{url}/create")).json()["id"]
            body = {"id": env, "data_idx": 0}
            await bare.post(f"{url}/reset", json=body)

            async def direct() -> None:
                (await bare.post(f"{url}/step", json={"id": env, "action": "turn left"})).json()

            async def ours() -> None:
                await environment.step("turn left")

            spent = [0.0, 0.0]
            for _ in range(10):
                for i, call in enumerate((direct, ours)):
                    spent[i] += await _cpu(call, STEPS // 10)
            return spent[0], spent[1]

    with serving("babyai") as (url, _):
        bare, through = asyncio.run(measure(url))
    return {"bare_ms": 1000 * bare / STEPS, "client_ms": 1000 * through / STEPS, "overhead": through / bare - 1.0}


async def _cpu(call: Callable[[], Awaitable[None]], times: int) -> float:
    begun = time.thread_time()  # the server's threads are not counted
    for _ in range(times):
        await call()
    return time.thread_time() - begun


def grading(count: int) -> dict[str, float]:
    """Answers that are right half of the time, in the forms that answers have."""
    grader = Grader(workers=2, timeout_s=5.0)

    async def grade(pairs: list[tuple[str, str]]) -> list[bool]:
        return await asyncio.gather(*(grader.correct(a, b) for a, b in pairs))

    labels = [ANSWERS[i % len(ANSWERS)] % (i + 2) for i in range(count // 8)]
    pairs = [
        (label if k % 2 else ANSWERS[(i + 3) % len(ANSWERS)] % (i + 3), label)
        for i, label in enumerate(labels)
        for k in range(8)
    ]
    try:
        asyncio.run(grade(pairs[:4]))  # starts the processes
        begun = time.perf_counter()
        verdicts = asyncio.run(grade(pairs))
        return {"answers_per_s": len(pairs) / (time.perf_counter() - begun), "right": sum(verdicts) / len(verdicts)}
    finally:
        grader.close()


def main(out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None, answers: int = 800) -> None:
    replies = {"rulebook_hard": "oak elm oak fir", "rulebook_easy": "oak elm oak", "household": "go kitchen"}
    found = {name: embedded(name, reply) for name, reply in replies.items()}
    found["agentgym client"] = client()
    found["grading"] = grading(answers)
    shown = Table("what", "figure", "value")
    for what, figures in found.items():
        for name, value in figures.items():
            shown.add_row(what, name, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
    Console().print(shown)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
