"""ALFWorld in local processes: the games of a folder, played by textworld.

    data.train   ["/data/json_2.1.1/train"]      every .tw-pddl (ALFWorld) and .z8 (TextWorld) game under it
    reply        any thought; its last <action>...</action> counts

Observations and rewards are those of AgentGym's server (`agentgym.py`): the reward is 1 for a game that was won.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ALFWorldSource, check_unused
from icrl_megatron.tasks import agentgym_dialects as dialects
from icrl_megatron.tasks.agentgym import AgentGym, AgentGymEnvironment
from icrl_megatron.tasks.agentgym_dialects import ServerReply
from icrl_megatron.tasks.base import EnvironmentFailure, TaskSet, own_problem
from icrl_megatron.tasks.datasets import entries_of, id_range
from icrl_megatron.tasks.episode_process import EpisodeProcesses, ProcessEpisode
from icrl_megatron.tasks.grader import Worker
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

PDDL, TEXTWORLD = ".tw-pddl", ".z8"
INSTALL = "pip install 'icrl-megatron[alfworld]'"


class GameSession:
    """One episode's game in a process; its next reset uses the same process."""

    def __init__(self, episode: ProcessEpisode) -> None:
        self.episode, self.where = episode, "a game"

    async def reset(self, task: str) -> ServerReply:
        self.where = task
        return dialects.reply_of("A", "alfworld", await self.episode.ask("reset", game=task), "reset")

    async def step(self, action: str) -> ServerReply:
        return dialects.reply_of("A", "alfworld", await self.episode.ask("step", action=action), "step")


class GameFolders:
    """A task set of the games of `data.train` and `data.heldout`, played in `data.grading_workers` processes."""

    def __init__(self, source: ALFWorldSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`."""
        self.name, self._data = source.name, source.data
        timeout_s, count = source.data.request_timeout_s, source.data.grading_workers

        def start() -> Worker:
            return Worker("icrl_megatron.tasks.game_worker", answer_bytes)

        self._processes = EpisodeProcesses(count, start, "a game", timeout_s, answer_bytes)
        self._found: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        """Raises ConfigError if the folder does not exist or has no game that can be solved."""
        if split not in self._found:
            folders = entries_of(self.name, self._data, split, "games", "name folders of games", "FOLDER")
            self._found[split] = [task for name in folders for task in self._games(split, Path(name))]
        return self._found[split]

    def environment(self, task: Task) -> AgentGymEnvironment:
        with own_problem(self, task):
            return AgentGymEnvironment(str(json.loads(task.problem)["game"]), self)

    def statement(self, task: Task) -> None:
        """Only the game knows the text, so a problem that is too long is found when it is played."""

    def check(self) -> None:
        """Plays the first step of the first game. Raises ConfigError if it cannot be played here."""
        game = str(json.loads(self.problems("train")[0].problem)["game"])
        needed = ("textworld", *(("alfworld", "fast_downward") if game.endswith(PDDL) else ()))
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"task set {self.name!r} needs {', '.join(missing)} to play {game}: {INSTALL}")

        async def first() -> None:
            session = await self.open_session()
            await session.reset(game)
            await session.step("look")
            self.release(session)

        try:
            asyncio.run(first())
        except EnvironmentFailure as error:
            raise ConfigError(f"{game}: {error}; is it a whole game of a version that is installed here?") from error

    async def open_session(self) -> GameSession:
        return GameSession(self._processes.begin())

    def release(self, session: GameSession) -> None:
        session.episode.release()

    def close(self) -> None:
        """Ends the processes; the task set must not be used afterwards."""
        self._processes.close()

    def _games(self, split: Split, folder: Path) -> Iterator[Task]:
        if not folder.is_dir():
            raise ConfigError(
                f"data.{split}: {folder} is not a folder of games; e.g. 'tasks.sources[...].data.{split}=[FOLDER]'"
            )
        found = 0
        for path in sorted(p for p in folder.rglob("*") if p.name.endswith((PDDL, TEXTWORLD))):
            content = path.read_bytes()
            if path.name.endswith(PDDL) and not _solvable(path, content):
                continue
            # The leak check compares prompts, so this hash makes two copies of a game the same problem.
            problem = {"game": str(path.resolve()), "prompt": hashlib.blake2b(content, digest_size=16).hexdigest()}
            yield Task(f"{self.name}/{split}/{folder.name}/{found}", self.name, split, json.dumps(problem))
            found += 1
        if not found:
            raise ConfigError(f"data.{split}: {folder} holds no {PDDL} or {TEXTWORLD} game that can be solved")


def ALFWorld(source: ALFWorldSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> TaskSet:
    """The task set of a source: ids are games of AgentGym's server, folders are played locally."""
    entries = (*source.data.train, *source.data.heldout)
    folders = [name for name in entries if id_range(name) is None and Path(name).is_dir()]
    if folders and (source.data.servers or source.served):
        raise ConfigError(
            f"task set {source.name!r}: {folders[0]} is a folder of games, which are played here, and data.servers or "
            "serve.command names servers, which have games of their own; leave one of them out"
        )
    if folders:
        return GameFolders(source, answer_bytes)
    check_unused(source, ["data.grading_workers"], "without folders of games in data.train and data.heldout")
    return AgentGym(source, answer_bytes)


def _solvable(path: Path, content: bytes) -> bool:
    """ALFWorld's generator records for each game whether its planner found a solution."""
    try:
        return bool(json.loads(content).get("solvable", True))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not a game of ALFWorld ({error}); copy it again or delete it") from error
