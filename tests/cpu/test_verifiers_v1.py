"""Environments of verifiers 0.4: TextArena of the real package, and ones with tools, with two agents, and that fail."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import observed
from package_environments import PYTHON_V1, criticised, needs_packages, write_words

from icrl_megatron.settings.task_options import VerifiersSource
from icrl_megatron.settings.task_sections import VerifiersData
from icrl_megatron.tasks import episode_process, line_worker, registry
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.verifiers_env import VerifiersTasks
from icrl_megatron.utils.errors import ConfigError

# verifiers starts a process for the tools of a module.
PRICES = """
import verifiers.v1 as vf


class Prices(vf.Toolset[vf.SharedToolsetConfig]):
    @vf.tool
    async def price(self, fruit: str) -> str:
        \"\"\"The price of a fruit.\"\"\"
        return "3 dollars" if fruit == "pear" else "not sold"


if __name__ == "__main__":
    Prices.run()
"""

SHOP = """
import verifiers.v1 as vf
from prices_v1 import Prices


class Buy(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.5)
    async def right(self, trace):
        said = trace.branches[-1].messages[-1].content
        if said == "raise":
            raise OSError("the judge is down")
        return 2.0 * ("3 dollars" in said)

    @vf.metric
    async def length(self, trace):
        return float(len(trace.branches[-1].messages[-1].content))


class Shop(vf.Taskset[Buy, vf.TasksetConfig]):
    def load(self):
        for fruit in ("pear", "pear", "fig", "plum"):
            yield Buy(vf.TaskData(prompt=f"What does a {fruit} cost?", system_prompt="You buy."), self.config.task)

    @classmethod
    def toolsets(cls, config):
        return [Prices(vf.SharedToolsetConfig())]


__all__ = ["Shop"]
"""

TWO = """
import verifiers.v1 as vf
from shop_v1 import Shop


class Config(vf.EnvConfig):
    buyer: vf.AgentConfig = vf.AgentConfig()
    seller: vf.AgentConfig = vf.AgentConfig()


class Two(vf.Env[Config]):
    async def run(self, task, agents):
        await agents.buyer.run(task)


__all__ = ["Shop", "Two"]
"""

AGENT = """
import verifiers.v1 as vf
from shop_v1 import Shop


class Own(vf.Harness[vf.HarnessConfig]):
    async def launch(self, *_):
        raise NotImplementedError


__all__ = ["Shop", "Own"]
"""

REFUSED = """
import asyncio, importlib.util, sys

sys.path.append("")
spec = importlib.util.spec_from_file_location("line_worker", sys.argv[1])
line_worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(line_worker)
worker = line_worker.module_alone("icrl_megatron.tasks.verifiers_worker")
other = {"agent": {"harness": {"id": "bash"}}}
for name, args in (("two_v1", {}), ("agent_v1", {}), ("shop_v1", other), ("shop_v1:Shop", {})):
    try:
        asyncio.run(worker.VerifiersEpisodes().load(name, args))
    except Exception as error:
        print(f"{name}: {error}")
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: environments of our own, and the words of a published one."""
    path = tmp_path_factory.mktemp("environments")
    for name, text in {"prices_v1": PRICES, "shop_v1": SHOP, "two_v1": TWO, "agent_v1": AGENT}.items():
        (path / f"{name}.py").write_text(text)
    write_words(path / "nltk", "apple", "house", "plant", "stone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("NLTK_DATA", str(path / "nltk"))
        patch.setattr(episode_process, "START_TIMEOUT_S", 500.0)  # two large imports, on a machine that may be busy
        yield path


def tasks(environment: str, args: dict[str, Any] | None = None, **data: Any) -> VerifiersTasks:
    given = {"python": str(PYTHON_V1), "grading_workers": 1, "request_timeout_s": 240.0, "args": args or {}} | data
    made = registry.of_source(VerifiersSource("verifiers", data=VerifiersData(environment=environment, **given)))
    assert isinstance(made, VerifiersTasks)
    return made


@pytest.fixture(scope="module")
def shop() -> Iterator[VerifiersTasks]:
    made = tasks("shop-v1", train=["0:3"], heldout=["3:4"])
    yield made
    made.close()


def play(task_set: VerifiersTasks, *replies: str, row: int = 0) -> tuple[list[str], Any]:
    environment = task_set.environment(task_set.problems("train")[row])
    return asyncio.run(observed(environment, *replies)), environment


@needs_packages
def test_wordle_over_several_turns(tmp_path: Path) -> None:
    """TextArena's tasks have no end, and its environment steps the game between the turns of the agent."""
    args = {"taskset": {"game": "Wordle-v0"}}
    wordle = tasks("textarena", args, train=["2:6"], heldout=["0:2"], max_turns=3)
    try:
        assert [len(wordle.problems("train")), len(wordle.problems("heldout"))] == [4, 2]
        guesses = [f"[{word}]" for word in ("apple", "house", "plant", "stone")]
        (won,) = [guess for guess in guesses if play(wordle, guess)[1].success()]
        wrong = [guess for guess in guesses if guess != won]
        seen, environment = play(wordle, *wrong)
        assert "Wordle" in seen[0] and "You have 5 guesses left" in seen[1] and "Wordle" not in seen[1]
        # data.max_turns ends and scores the attempt, before the game does.
        assert len(seen) == 4 and "You have 3 guesses left" in seen[3] and environment.outcome() == 0.0
        episode = criticised(wordle, tmp_path, wrong, "Guess another word.", [wrong[0], won])
        assert [attempt.outcome for attempt in episode.attempts] == [0.0, 1.0]
        assert [len(attempt.turns) for attempt in episode.attempts] == [3, 2]
        wordle._source.data.train = []
        wordle._rows._problems.clear()
        with pytest.raises(ConfigError, match=r"'textarena' has rows without end; give a range, e\.g\. data\.train="):
            wordle.problems("train")
    finally:
        wordle.close()


@needs_packages
def test_tasks_with_tools(shop: VerifiersTasks) -> None:
    call = '<tool_call>{"name": "%s", "arguments": {"fruit": "pear"}}</tool_call>'
    environment = shop.environment(shop.problems("train")[0])
    first = asyncio.run(environment.reset())
    assert first.startswith("You buy.\n\nWhat does a pear cost?\n\nTools:\n") and "The price of a fruit." in first
    name = first.partition('"name": "')[2].partition('"')[0]
    seen, environment = play(shop, f"I ask. {call % name}", call % "nothing", "It costs 3 dollars.")
    assert seen[1:] == ["3 dollars", "error: unknown tool 'nothing'", ""] and environment.success()


@needs_packages
def test_rows_rewards_and_metrics(shop: VerifiersTasks) -> None:
    # A row that repeats an earlier one is left out.
    assert [len(shop.problems("train")), len(shop.problems("heldout"))] == [2, 1]
    shop.check()
    seen, environment = play(shop, "", "3 dollars", row=1)
    assert seen[0].startswith("You buy.\n\nWhat does a fig cost?") and seen[1:] == ["The reply is empty.", ""]
    assert (environment.outcome(), environment.measures()) == (1.0, {"length": 9.0, "right": 2.0})
    assert play(shop, "4 dollars")[1].outcome() == 0.0


@needs_packages
async def test_concurrent_attempts_are_scored_independently(shop: VerifiersTasks) -> None:
    every = [shop.environment(shop.problems("train")[i % 2]) for i in range(8)]
    await asyncio.gather(*(observed(made, f"{i % 4} dollars") for i, made in enumerate(every)))
    assert [made.outcome() for made in every] == [0.0, 0.0, 0.0, 1.0] * 2


@needs_packages
def test_a_failing_reward_never_becomes_a_reward(shop: VerifiersTasks) -> None:
    with pytest.raises(EnvironmentFailure, match="with TaskError: task Buy scoring: OSError: the judge is down"):
        play(shop, "raise")
    assert play(shop, "3 dollars")[1].success()


@needs_packages
def test_environments_that_cannot_be_played_are_refused(folder: Path) -> None:
    command = [PYTHON_V1, "-P", "-c", REFUSED, line_worker.__file__]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    for said in (
        "two_v1: it has the agents buyer, seller; only environments with one agent can be played",
        "agent_v1: it has its own agent (a harness), so the model cannot play it",
        "shop_v1: args.agent.harness has no effect: the model that is trained is the agent; leave it out",
        "shop_v1:Shop: verifiers.v1 has no functions that make environments; give the id of a taskset",
    ):
        assert said in done.stdout, done.stdout
