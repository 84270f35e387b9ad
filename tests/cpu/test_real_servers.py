"""Real environment programs under a recipe's settings, two episodes each: those that are installed here.

`tools/real_servers.py` plays more, through `icrl train`. Checkouts and the interpreter with the servers' packages are
named by ICRL_AGENTGYM, ICRL_SEARCH_R1 and ICRL_SERVERS_PYTHON.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
import qwen_tokenizers

sys.path.append(str(Path(__file__).parents[2] / "tools"))  # as for a script: the tools import each other
import real_environments
import real_games
import real_players
import real_servers
from real_players import Player, ScriptedEngine

from icrl_megatron.launch import servers
from icrl_megatron.rollout.episode import EpisodeSetup, play
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import EngineSpeaker, Seeds, same_speakers
from icrl_megatron.settings import loading
from icrl_megatron.tasks import registry
from icrl_megatron.types import Episode

PROBLEMS = 2
TEXTCRAFT = """\
You craft items from recipes.

Crafting commands:
craft 4 stick using 2 planks
craft 4 oak planks using 1 oak logs
craft 1 wooden hoe using 2 planks, 2 stick
craft 1 polished planks rack using 4 planks

Goal: craft wooden hoe."""


def checkout(variable: str) -> Path | None:
    return Path(os.environ[variable]) if variable in os.environ else None


def played(prepared: real_environments.Prepared, name: str, folder: Path) -> tuple[list[Episode], list[str]]:
    """(episodes, why others were dropped) of the training problems."""
    settings = loading.load(prepared.recipe, [*real_servers.CPU, *prepared.changes])
    with servers.beside(settings, folder) as told:
        catalogue = registry.Catalogue(told.tasks.sources, told.rollout.max_observation_bytes)
        tokenizer = qwen_tokenizers.build("qwen3")
        prompter = Prompter(tokenizer, told.rollout)
        speaker = EngineSpeaker(ScriptedEngine(tokenizer, Player(prepared.plans)), 1.0, prompter.stop_ids)
        setup = EpisodeSetup(catalogue.environment, prompter, told.rollout)
        problems = catalogue.get(told.tasks.sources[0].name).problems("train")
        episodes, dropped = asyncio.run(play(problems, 1, setup, same_speakers(speaker), Seeds(0, 0)))
    return episodes, [episode.error for episode in dropped]


@pytest.mark.parametrize("name", sorted(set(real_environments.ENVIRONMENTS) - {"bm25"}))
def test_two_episodes(name: str, tmp_path: Path) -> None:
    python = os.environ.get("ICRL_SERVERS_PYTHON", sys.executable)
    checkouts = checkout("ICRL_AGENTGYM"), checkout("ICRL_SEARCH_R1")
    machine = real_environments.Machine(tmp_path, python, *checkouts, problems=PROBLEMS)
    try:
        prepared = real_environments.ENVIRONMENTS[name](machine)
    except real_environments.MissingError as error:
        pytest.skip(f"missing: {error}")
    episodes, dropped = played(prepared, name, tmp_path)
    assert (len(episodes), dropped) == (PROBLEMS, [])
    for episode in episodes:
        first, last = episode.attempts[0], episode.attempts[-1]
        assert first.turns[0].action is not None or first.turns[0].observation
        assert len(episode.critiques) == len(episode.attempts) - 1
        if len(episode.attempts) > 1:  # a solver with advice plays the solution; some of SciWorld's take over 30 turns
            assert last.success or (name == "sciworld" and last.outcome > first.outcome)


def test_textcrafts_recipes_are_followed_to_the_goal() -> None:
    wanted = ["get 1 oak logs", "craft 4 oak planks using 1 oak logs"]
    wanted += ["craft 4 stick using 2 oak planks", "get 1 oak logs", "craft 4 oak planks using 1 oak logs"]
    found = real_players.crafting(TEXTCRAFT)
    assert found[:3] == wanted[:3] and found[-1] == "craft 1 wooden hoe using 2 oak planks, 2 stick"
    assert real_players.crafting("Boil water.") == []


def test_games_have_different_tasks(tmp_path: Path) -> None:
    pytest.importorskip("alfworld", reason="the extra icrl-megatron[alfworld] is not installed")
    solutions = real_games.write(tmp_path, 20)
    assert len(solutions) == len(list(tmp_path.rglob("game.tw-pddl"))) == 20
