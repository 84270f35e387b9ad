"""ALFWorld without servers: games that textworld generates here, each played in its own process; invalid folders."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attempts import observed
from commands import python

from icrl_megatron.settings.task_options import ALFWorldSource
from icrl_megatron.settings.task_sections import GameData
from icrl_megatron.tasks import agentgym, games, registry
from icrl_megatron.tasks.agentgym import AgentGymEnvironment
from icrl_megatron.tasks.base import Checked, EnvironmentFailure
from icrl_megatron.tasks.datasets import check_no_leak, subset_of
from icrl_megatron.tasks.games import GameFolders
from icrl_megatron.utils.errors import ConfigError

HAS_TEXTWORLD = importlib.util.find_spec("textworld") is not None
HAS_PLANNER = HAS_TEXTWORLD and all(importlib.util.find_spec(name) for name in ("alfworld", "fast_downward"))
textworld_only = pytest.mark.skipif(not HAS_TEXTWORLD, reason="the extra icrl-megatron[alfworld] is not installed")

MAKE = """
import sys, textworld
options = textworld.GameOptions()
options.path, options.seeds = sys.argv[1], int(sys.argv[2])
options.nb_rooms, options.nb_objects, options.quest_length = 1, 3, 1
_, game = textworld.make(options)
print("\\n".join(game.walkthrough))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with two splits of one game each, and the actions that win each game."""
    folder = tmp_path_factory.mktemp("games")
    won = {}
    for split, seed in (("train", 1), ("heldout", 2)):
        (folder / split).mkdir()
        path = folder / split / "game.z8"
        done = python("-c", MAKE, path, str(seed), timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        won[split] = done.stdout.strip().splitlines()
    return folder, won


def of_folders(folder: Path, **data: object) -> GameFolders:
    given = GameData(train=[str(folder / "train")], heldout=[str(folder / "heldout")], **data)  # type: ignore[arg-type]
    task_set = registry.of_source(ALFWorldSource("alfworld", data=given))
    assert isinstance(task_set, GameFolders) and isinstance(task_set, Checked)
    return task_set


@contextmanager
def opened(folder: Path, **data: object) -> Iterator[GameFolders]:
    """The task set of a folder, whose processes are ended afterwards."""
    task_set = of_folders(folder, **data)
    try:
        yield task_set
    finally:
        task_set.close()


async def play(environment: AgentGymEnvironment, actions: list[str]) -> list[str]:
    return await observed(environment, *(f"I think. <action> {action} </action>" for action in actions))


@textworld_only
async def test_a_game_can_be_lost_and_then_won(made: tuple[Path, dict[str, list[str]]]) -> None:
    folder, won = made
    with opened(folder) as task_set:
        await asyncio.to_thread(task_set.check)  # it runs an event loop of its own
        (task,) = task_set.problems("train")
        assert task.task_id == "alfworld/train/train/0" and subset_of(task) == "alfworld/train"
        check_no_leak(task_set.problems("train"), task_set.problems("heldout"))
        environment = task_set.environment(task)
        seen = await play(environment, ["look", "dance with the moon"])
        assert "AVAILABLE ACTIONS: " in seen[0] and won["train"][0] in seen[0]
        assert not environment.success() and environment.outcome() == 0.0
        # The next round is the same game from its beginning.
        again = await play(environment, won["train"])
        assert again[0] == seen[0]
        assert environment.success() and environment.outcome() == 1.0 and "solved" in environment.summary()


@textworld_only
async def test_episodes_share_processes_without_blocking_each_other(made: tuple[Path, dict[str, list[str]]]) -> None:
    folder, won = made
    late = 0.0

    async def heartbeat() -> None:
        nonlocal late
        while True:
            begun = time.monotonic()
            await asyncio.sleep(0.01)
            late = max(late, time.monotonic() - begun)

    with opened(folder, grading_workers=2) as task_set:
        tasks = [*task_set.problems("train"), *task_set.problems("heldout")]
        environments = [task_set.environment(tasks[i % 2]) for i in range(6)]
        beating = asyncio.create_task(heartbeat())
        actions = [won["train"], won["heldout"]] * 3
        await asyncio.gather(*(play(e, a) for e, a in zip(environments, actions, strict=True)))
        beating.cancel()
        assert all(e.success() for e in environments)
        assert [t.episodes for t in task_set._processes.each] == [3, 3]
        environments.clear()
        gc.collect()
        assert [t.episodes for t in task_set._processes.each] == [0, 0]
        # Starting a game takes seconds; the event loop is never blocked that long.
        assert late < 2.0


@textworld_only
async def test_a_process_that_dies_fails_only_its_current_episodes(made: tuple[Path, dict[str, list[str]]]) -> None:
    folder, won = made
    with opened(folder, grading_workers=1) as task_set:
        task = task_set.problems("train")[0]
        first, second = task_set.environment(task), task_set.environment(task)
        await first.reset()
        await second.reset()
        worker = task_set._processes.first._worker
        assert worker is not None
        worker._process.kill()
        with pytest.raises(EnvironmentFailure, match="killed its process"):
            await first.step("look")
        with pytest.raises(EnvironmentFailure, match="was restarted"):
            await second.step("look")
        await play(second, won["train"])
        assert second.success()


@textworld_only
async def test_a_step_that_hangs_is_ended(made: tuple[Path, dict[str, list[str]]]) -> None:
    with opened(made[0], grading_workers=1) as task_set:
        environment = task_set.environment(task_set.problems("train")[0])
        await environment.reset()
        process = task_set._processes.first
        assert process._worker is not None
        os.kill(process._worker._process.pid, signal.SIGSTOP)
        process._timeout_s = 0.5
        with pytest.raises(EnvironmentFailure, match=r"took over 0\.5 s"):
            await environment.step("look")


def folder_with(tmp_path: Path, name: str, content: str) -> Path:
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        (tmp_path / split / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("notes.txt", "hello", "holds no .tw-pddl or .z8 game"),
        ("game.tw-pddl", '{"solvable": false}', "that can be solved"),
        ("game.tw-pddl", "{", "not a game of ALFWorld"),
        ("game.tw-pddl", "[]", "not a game of ALFWorld"),
    ],
)
def test_folders_without_a_playable_game_are_refused(tmp_path: Path, name: str, content: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        of_folders(folder_with(tmp_path, name, content)).problems("train")


def test_a_game_in_both_splits_is_refused(tmp_path: Path) -> None:
    task_set = of_folders(folder_with(tmp_path, "game.tw-pddl", '{"solvable": true}'))
    with pytest.raises(ConfigError, match="1 held-out problems are training problems too"):
        check_no_leak(task_set.problems("train"), task_set.problems("heldout"))


def test_games_without_textworld_are_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_set = of_folders(folder_with(tmp_path, "game.z8", "no game"))
    monkeypatch.setattr(games.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs textworld to play .*game\.z8: pip install"):
        task_set.check()


@textworld_only
def test_a_damaged_game_is_refused_before_the_run(tmp_path: Path) -> None:
    with (
        opened(folder_with(tmp_path, "game.z8", "no game")) as task_set,
        pytest.raises(ConfigError, match=r"game\.z8: a reset of a game "),
    ):
        task_set.check()


def test_folders_and_servers_cannot_be_combined(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "game.z8", "")
    with pytest.raises(ConfigError, match="leave one of them out"):
        of_folders(folder, servers=["http://host:1"])
    served = registry.of_source(ALFWorldSource("alfworld", data=GameData(train=["0:2"], heldout=["2:3"])))
    assert isinstance(served, agentgym.AgentGym)
    mixed = ALFWorldSource("alfworld", data=GameData(train=["0:2"], heldout=[str(folder / "heldout")]))
    with pytest.raises(ConfigError, match="0:2 is not a folder"):
        registry.of_source(mixed).problems("train")


# A kitchen in ALFWorld's own domain and grammar, which come with its package.
KITCHEN = """
(define (problem kitchen) (:domain alfred)
(:objects agent1 - agent
 loc1 loc2 loc3 - location
 desk_bar_1 shelf_bar_2 - receptacle
 mug_bar_3 - object
 DeskType ShelfType - rtype
 MugType - otype)
(:init (atLocation agent1 loc3)
 (receptacleAtLocation desk_bar_1 loc1) (receptacleAtLocation shelf_bar_2 loc2)
 (receptacleType desk_bar_1 DeskType) (receptacleType shelf_bar_2 ShelfType)
 (canContain DeskType MugType) (canContain ShelfType MugType)
 (objectType mug_bar_3 MugType) (objectAtLocation mug_bar_3 loc1) (pickupable mug_bar_3)
 (= (total-cost) 0)
 (inReceptacle mug_bar_3 desk_bar_1))
(:goal (and (exists (?r - receptacle) (and (receptacleType ?r ShelfType)
 (exists (?o - object) (and (objectType ?o MugType) (inReceptacle ?o ?r)))))))
(:metric minimize (total-cost)))
"""


@pytest.mark.skipif(not HAS_PLANNER, reason="the extra icrl-megatron[alfworld] is not installed")
def test_a_game_in_alfworlds_domain_can_be_won(tmp_path: Path) -> None:
    package = Path(next(iter(importlib.util.find_spec("alfworld").submodule_search_locations))) / "data"  # type: ignore
    game = {
        "pddl_domain": (package / "alfred.pddl").read_text(),
        "grammar": (package / "alfred.twl2").read_text().replace("UNKNOWN GOAL", "put a mug in shelf"),
        "pddl_problem": KITCHEN,
        "solvable": True,
    }
    folder = folder_with(tmp_path, "game.tw-pddl", json.dumps(game))
    actions = ["fly", "go to desk 1", "take mug 1 from desk 1", "go to shelf 1", "move mug 1 to shelf 1"]
    with opened(folder, grading_workers=1) as task_set:
        task_set.check()
        environment = task_set.environment(task_set.problems("train")[0])
        seen = asyncio.run(play(environment, actions))
        assert "go to desk 1" in seen[0].split("AVAILABLE ACTIONS: ")[1]
        # As AgentGym's server: without TextWorld's banner, in single lines.
        assert "Welcome" not in seen[0] and ".\nYour task is to: put a mug in shelf.\nAVAILABLE" in seen[0], seen[0]
        assert seen[1].startswith("Nothing happens.\nAVAILABLE ACTIONS: ")
        assert "You pick up the mug 1" in seen[3] and environment.success(), seen
