"""Plays TextWorld's games in a separate process: `python -m icrl_megatron.tasks.game_worker`.

Reads one JSON job per line and answers with one line: {"do": "reset", "env": 3, "game": "/path/game.tw-pddl"}, {"do":
"step", "env": 3, "action": "look"}; each with "left": [1, 2], the games that are over. An open game belongs to one
episode.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class Games:
    """The open games, by the number that their episode gave them."""

    def __init__(self) -> None:
        self._open: dict[int, Any] = {}
        self._paths: dict[int, str] = {}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        for left in job["left"]:
            self._close(left)
        number = job["env"]
        if job["do"] == "step":
            if number not in self._open:
                return {"error": "this process was restarted and lost its games"}
            state, _, done = self._open[number].step(job["action"])
            return _answer(state, _feedback(state), bool(done))
        if self._paths.get(number) != job["game"]:
            self._close(number)
            self._open[number], self._paths[number] = started(job["game"]), job["game"]
        state = self._open[number].reset()
        return _answer(state, _opening(job["game"], _feedback(state)), False)

    def _close(self, number: int) -> None:
        self._paths.pop(number, None)
        if (game := self._open.pop(number, None)) is not None:
            game.close()


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
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps what the libraries print out of the answers
    import textworld  # noqa: F401  (before the time limit of the first answer starts)

    games = Games()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = games.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
