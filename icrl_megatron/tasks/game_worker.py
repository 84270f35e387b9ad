"""Plays TextWorld's games in a separate process: `python -m icrl_megatron.tasks.game_worker`.

Reads one JSON job per line and answers with one line: {"do": "reset", "env": 3, "game": "/path/game.tw-pddl"}, {"do":
"step", "env": 3, "action": "look"}; each with "left": [1, 2], the games that are over. An open game belongs to one
episode.
"""

from __future__ import annotations

import asyncio
from typing import Any

from icrl_megatron.tasks.line_worker import Json, OpenEpisodes, own_streams, serve


class Games:
    """The open games, each with its path."""

    def __init__(self) -> None:
        self._open = OpenEpisodes(_close)

    async def answer(self, job: Json) -> Json:
        await self._open.end(*job["left"])
        number = job["env"]
        if job["do"] == "step":
            state, _, done = self._open[number][1].step(job["action"])
            return _answer(state, _feedback(state), bool(done))
        if (self._open.get(number) or ("",))[0] != job["game"]:
            await self._open.end(number)  # before the next one starts
            await self._open.begin(number, (job["game"], started(job["game"])))
        state = self._open[number][1].reset()
        return _answer(state, _opening(job["game"], _feedback(state)), False)


async def _close(opened: tuple[str, Any]) -> None:
    opened[1].close()


def started(path: str) -> Any:
    """Starts a game; in ALFWorld's, things have the names that its agents see (`mug 1`) instead of internal ones."""
    import textworld

    wrappers = []
    if path.endswith(".tw-pddl"):
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

        wrappers = [AlfredDemangler()]
    wanted = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
    return textworld.start(path, wanted, wrappers)


def _feedback(state: Any) -> str:
    return str(state["feedback"]).strip()


def _opening(path: str, feedback: str) -> str:
    """ALFWorld's first observation without TextWorld's banner, in single lines: what AgentGym's server answers."""
    return "\n".join(feedback.split("\n\n")[1:]) if path.endswith(".tw-pddl") else feedback


def _answer(state: Any, observation: str, done: bool) -> dict[str, Any]:
    return {
        "observation": observation,
        "reward": 1.0 if state["won"] else 0.0,
        "done": done,
        "available_actions": list(state["admissible_commands"] or ()),
    }


def main() -> None:
    streams = own_streams()
    import textworld  # noqa: F401  (before the time limit of the first answer starts)

    asyncio.run(serve(Games().answer, streams))


if __name__ == "__main__":
    main()
