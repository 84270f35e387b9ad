"""The cells of ICRL's tables without a cluster: a tiny model, data of the same shape as the published sets, servers
with AgentGym's protocol and an endpoint for the external critic. Recipes keep everything else, data settings included.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import whole_runs
from agentgym_server import serving
from local_servers import Handler, threaded
from whole_runs import Ended, batch, rows

from icrl_megatron.evaluation.cell_values import Results
from icrl_megatron.evaluation.reproduce import CellPhase, Reproduction, chosen, run_folder
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.tasks.published import MATH_TESTS, SEARCHQA_SUBSETS
from icrl_recipes.cells import SUBSETS, Cell, Critic

POSITIONS = 1024
STEPS = 3
SMALL = (
    f"steps={STEPS}",
    *("launch.device=cpu", "launch.ranks=1", "actor.precision=fp32", "actor.offload=none"),
    *("actor.tensor_parallel=1", "actor.sequence_parallel=false", "engine.tensor_parallel=1"),
    *("rollout.tasks_per_step=2", "rollout.episodes_per_task=4", f"rollout.context_tokens={POSITIONS}"),
    *("rollout.max_turns=3", "rollout.max_turn_tokens=12", "rollout.max_critique_tokens=12"),
    # A random model earns no rewards in the agentic tasks.
    *("algo.on_no_signal=train", "algo.max_resamples=0"),
    *("eval.problems=2", "eval.control_problems=0"),
)
"""Settings of every run that make it small."""
LOCAL = ("engine.kind=local",)
CHOICE = "ICRL_CELLS"
"""Environment variable: patterns of cells to start, separated by commas; * for all."""
WORDS = ("\\boxed{7}", "\\boxed{8}", "<answer>Rome</answer>", "Action:", "look", "search[red]", "click[back]", "wait")
"""Of the model. It never solves an evaluated problem, so that every evaluation with several rounds has critiques."""
AT_ONCE = 7
"""Runs that are trained and evaluated in one process."""
BATCH_S, LIMIT_S = 1800, 4 * 3600
"""Limits of such a process, and of all of them: the whole table on a busy machine."""


class Endpoint(Handler):
    """An OpenAI-compatible endpoint whose model always says the same."""

    def do_GET(self) -> None:
        self.send_json({"data": [{"id": "critic"}]})

    def do_POST(self) -> None:
        self.body()
        choice = {"message": {"role": "assistant", "content": "<critic>look</critic>"}, "finish_reason": "stop"}
        self.send_json({"choices": [choice], "usage": {"completion_tokens": 3}})


def write_data(folder: Path) -> None:
    """The files that `icrl data` writes to `folder`, with a few rows each. Half of the training problems of mathematics
    have the answer that the model often gives, the tests have none of them."""

    def write(name: str, rows: Sequence[object]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    folder.mkdir()
    write("webshop_train", [{"task_id": i} for i in range(200, 216)])
    write("webshop_test", [{"task_id": i} for i in range(2)])
    questions = [(name, SEARCHQA_SUBSETS[name].start) for name in SUBSETS]
    write("searchqa_test", [{"task_id": i, "metadata": {"subset": name}} for name, i in questions])
    write("openr1_math_4k", [{"prompt": f"What is {i} ?", "label": str(7 + i % 2)} for i in range(16)])
    for name in MATH_TESTS:
        write(name, [{"prompt": f"What is the {name} ?", "label": "11"}])


def write_model(folder: Path) -> Path:
    build_tiny(folder, TinyModel(max_positions=POSITIONS, hidden=32, ffn=64), WORDS, seed=1)
    return folder


def of_recipe(recipe: str, addresses: dict[str, str]) -> list[str]:
    """Overrides: the recipe's servers are those that run already, and its horizon has its stages in the few steps."""
    settings, found = load(recipe), []
    (source,) = settings.tasks.sources
    if source.name in addresses:
        found += ["tasks.sources.0.serve.command=", "tasks.sources.0.serve.count=1"]
        found.append(f"tasks.sources.0.data.servers=[{addresses[source.name]}]")
    if settings.rollout.turn_stages:
        found.append("rollout.turn_stages=[{until_step: 1, turns: 1}, {until_step: 2, turns: 2}]")
    return found


@dataclass(frozen=True)
class World:
    """What runs of cells need, under one folder: the working directory."""

    model: Path
    addresses: dict[str, str]
    """Task -> its server."""
    critic: str

    def asked(self, cells: Sequence[Cell], out: Path, *words: str) -> Reproduction:
        given = (*SMALL, f"model.path={self.model}", *words)
        return Reproduction(tuple(cells), (0,), out, given, self.critic)

    def words(self, phase: CellPhase) -> list[str]:
        few = [] if phase.evaluation is None else ["--problems=4"]
        return [*phase.words, *few, *of_recipe(phase.recipe, self.addresses)]


@contextmanager
def world(folder: Path) -> Iterator[World]:
    write_data(folder / "data")
    with ExitStack() as held:
        addresses = {name: held.enter_context(serving(name))[0] for name in ("alfworld", "webshop", "searchqa")}
        yield World(write_model(folder / "model"), addresses, held.enter_context(threaded(Endpoint)))


def asked_for(default: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of $ICRL_CELLS, or else of `default`."""
    return chosen(os.environ[CHOICE].split(",") if os.environ.get(CHOICE) else default)


def start(asked: Reproduction, here: World, folder: Path, two_models: Sequence[str] = ()) -> dict[str, Ended]:
    """Runs all phases, in processes of a few runs each. `two_models`: overrides of phases in which a second model
    plays, the critic before training."""
    runs, ended = asked.runs(), dict[str, Ended]()
    whole_runs.TIMEOUT_S = BATCH_S
    for first in range(0, len(runs), AT_ONCE):
        commands: dict[str, Sequence[str]] = {}
        for run in runs[first : first + AT_ONCE]:
            for phase in (asked.training(*run), *asked.evaluations(*run)):
                if phase.evaluation is None:
                    two = load(phase.recipe).rollout.critic == "frozen"
                else:
                    two = phase.evaluation.critic == Critic.START
                commands[phase.name] = [*here.words(phase), *(two_models if two else ())]
        ended |= batch(folder, commands)
    return ended


def check_started(asked: Reproduction, ended: dict[str, Ended]) -> None:
    """Every phase succeeded, every run made its steps, and every cell has a number."""
    failed = {name: how.error for name, how in ended.items() if how.code}
    assert not failed, json.dumps(failed, indent=1)
    for recipe, seed in asked.runs():
        trained = [row for row in rows(run_folder(asked.out, recipe, seed)) if "tokens/generated" in row]
        assert [row["step"] for row in trained] == list(range(1, STEPS + 1)), recipe
    results = Results(asked.out)
    without = [cell.name for cell in asked.cells if results.of(cell).value is None]
    assert not without, without
