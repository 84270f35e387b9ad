"""The protocol of the AgentGym servers: bodies and answers of both dialects, and what counts as success.

Dialect A is AgentGym's own, with different fields for every environment. Dialect B is a later fork with the same fields
for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from icrl_megatron.agents.formats import last_tagged

Json = Any
Dialect = Literal["A", "B"]
NAMES = ("alfworld", "webshop", "sciworld", "babyai", "textcraft", "searchqa")


class ProtocolError(ValueError):
    """A server's answer does not match the dialect: it is another kind of server, or another version."""


@dataclass(frozen=True)
class ServerReply:
    """A server's answer, in one form for all environments."""

    observation: str
    reward: float
    done: bool
    actions: tuple[str, ...] = ()
    """The available actions, if the environment lists them."""


@dataclass(frozen=True)
class EnvironmentProtocol:
    """The protocol of one environment in dialect A, and its scoring in both dialects."""

    name: str
    create_body: Json
    """Body of POST /create; None: no body."""
    id_key: str
    """Name of the environment's id in later bodies."""
    task_key: str
    """Name of the task's id in a body of POST /reset."""
    observation_key: str = "observation"
    reward_key: str = "reward"
    """The field of an answer to /step that holds the outcome so far."""
    closes: bool = True
    """Upstream ALFWorld answers 404 to /close."""
    scale: float = 1.0
    """Divisor of rewards."""
    least: float = 0.0
    """The lowest reward it can return; rewards below 0 count as 0."""
    success_at: float = 1.0
    """An outcome of at least this is a success."""
    instruction: str = ""


FORMAT = "Think first, then give one action a turn, in exactly this form: <action>your action</action>"
ENVIRONMENTS: Mapping[str, EnvironmentProtocol] = {
    e.name: e
    for e in (
        EnvironmentProtocol(
            "alfworld", None, "id", "game", closes=False, instruction=f"You act in a household. {FORMAT}"
        ),
        EnvironmentProtocol(
            "webshop",
            None,
            "env_idx",
            "session_id",
            observation_key="state",
            instruction=f"You shop on a web site with search[words] and click[element]. {FORMAT}",
        ),
        # Its `reward` is what the last action added to the score.
        EnvironmentProtocol(
            "sciworld",
            None,
            "id",
            "data_idx",
            reward_key="score",
            scale=100.0,
            least=-100.0,
            instruction=f"You work in a laboratory. {FORMAT}",
        ),
        # The reward of a solved level is 1 minus a share of the steps it took, never 1 itself.
        EnvironmentProtocol(
            "babyai", None, "id", "data_idx", success_at=1e-6, instruction=f"You move on a grid. {FORMAT}"
        ),
        EnvironmentProtocol("textcraft", {}, "id", "data_idx", instruction=f"You craft items from recipes. {FORMAT}"),
        EnvironmentProtocol(
            "searchqa",
            {"id": 0},
            "env_idx",
            "id",
            instruction="Search with <search>words</search>; when you know, reply <answer>the answer</answer>.",
        ),
    )
}

FIRST_ACTIONS: Mapping[str, str] = {
    "alfworld": "look",
    "webshop": "search[shoes]",
    "sciworld": "look around",
    "babyai": "turn left",
    "textcraft": "inventory",
    "searchqa": "<search>capital of France</search>",
}
"""An action that is valid in every task of an environment, to test whether a server works."""


def action_of(name: str, reply: str) -> str | None:
    """The last action in a reply, in the server's format; None if there is none."""
    if name != "searchqa":
        last = last_tagged(reply, "action")
        return (last[1].strip() or None) if last else None
    tagged = [(found, tag) for tag in ("search", "answer") if (found := last_tagged(reply, tag))]
    if not tagged:
        return None
    (_, text), tag = max(tagged)
    return f"<{tag}>{text.strip()}</{tag}>"


def env_id(dialect: Dialect, name: str, answer: Json) -> Json:
    """The id in an answer to /create: a bare integer, or under a key. Raises ProtocolError if there is none."""
    key = "env_id" if dialect == "B" else ENVIRONMENTS[name].id_key
    found = answer.get(key, answer.get("id")) if isinstance(answer, dict) else answer
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ProtocolError(f"POST /create answered {_cut(answer)}, which has no environment id")
    return found


def failure(answer: Json) -> tuple[str, bool] | None:
    """(message, whether a retry may help) if an answer is an error, even under HTTP 200; else None."""
    if not isinstance(answer, dict) or "error" not in answer or answer["error"] in (None, False, ""):
        return None
    error = answer["error"]
    if isinstance(error, dict):
        return f"{error.get('code', '')} {error.get('message', '')}".strip(), bool(error.get("retryable", False))
    return str(error), False


def reply_of(dialect: Dialect, name: str, answer: Json, kind: str) -> ServerReply:
    """Parses an answer to /reset or /step (`kind`). Raises ProtocolError if it does not fit."""
    environment = ENVIRONMENTS[name]
    if dialect == "A" and kind == "reset" and name == "searchqa" and isinstance(answer, str):
        return ServerReply(answer, 0.0, False)
    if dialect == "A" and kind == "reset" and name == "webshop" and isinstance(answer, list) and answer:
        if not isinstance(answer[0], str):
            raise ProtocolError(
                f"POST /reset answered a list that does not begin with text: {_cut(answer)}; is it webshop?"
            )
        return ServerReply(answer[0], 0.0, False)
    if not isinstance(answer, dict):
        raise ProtocolError(f"POST /{kind} answered {_cut(answer)}; is this a server of {name}?")
    key = environment.observation_key if dialect == "A" and kind == "step" else "observation"
    observation = answer.get(key)
    if not isinstance(observation, str):
        raise ProtocolError(f"POST /{kind} answered no text under {key!r} but {_cut(answer)}; is this {name}?")
    if kind == "reset" and name == "sciworld" and dialect == "A":
        if not isinstance(answer.get("task_description"), str):
            raise ProtocolError(f"POST /reset answered no task_description but {_cut(answer)}; is this sciworld?")
        observation = f"{answer['task_description']}\n\n{observation}"
    return ServerReply(observation, _reward(answer, environment, kind), _done(answer, kind), _actions(answer))


def _actions(answer: dict[str, Json]) -> tuple[str, ...]:
    """The available actions; empty if the environment does not list them as strings."""
    info = answer.get("info")
    for found in (answer.get("available_actions"), info.get("available_actions") if isinstance(info, dict) else None):
        if found and isinstance(found, list):
            return tuple(action for action in found if isinstance(action, str))
    return ()


def _done(answer: dict[str, Json], kind: str) -> bool:
    done = answer.get("done", False)
    if done not in (True, False, None):  # the string "false" would count as true
        raise ProtocolError(f"POST /{kind} answered {_cut(done)} as done, which must be true or false")
    return bool(done)


def _reward(answer: dict[str, Json], environment: EnvironmentProtocol, kind: str) -> float:
    info, key = answer.get("info"), environment.reward_key
    places = (answer, info) if isinstance(info, dict) else (answer,)
    reward = next((place[key] for place in places if key in place), answer.get("reward"))
    try:
        if isinstance(reward, int | float) and not isinstance(reward, bool) and math.isfinite(reward):
            return float(reward)
    except OverflowError:  # an integer too large for a float
        pass
    if kind == "reset":
        return 0.0
    raise ProtocolError(f"POST /step answered the reward {_cut(reward)}, which is not a finite number")


def shown(name: str, reply: ServerReply) -> str:
    """The solver's observation, for ALFWorld with the available actions."""
    if name == "alfworld" and reply.actions:
        return f"{reply.observation}\nAVAILABLE ACTIONS: {','.join(reply.actions)}"
    return reply.observation


def lists_actions(name: str, reply: ServerReply, first: bool) -> bool:
    return name == "alfworld" and (first or "Nothing happens" in reply.observation)


def outcome_of(name: str, reward: float) -> float:
    """The reward of an attempt in [0, 1]: scaled, with negative scores as 0. Raises ProtocolError if the environment
    cannot return this reward."""
    most, least = ENVIRONMENTS[name].scale, ENVIRONMENTS[name].least
    if not least - 1e-6 <= reward <= most * (1.0 + 1e-6):
        raise ProtocolError(f"a reward of {reward:g} is not between {least:g} and {most:g}, the range of {name}")
    return min(1.0, max(0.0, reward / most))


def ends_episode(name: str, action: str, reply: ServerReply) -> bool:
    """SearchQA's server leaves `done` false after a wrong answer, but any answer ends the episode."""
    return reply.done or (name == "searchqa" and action.startswith("<answer>"))


def _cut(answer: Json) -> str:
    try:
        text = repr(answer)
    except (ValueError, RecursionError):  # an integer with thousands of digits, or deeply nested lists
        return f"a {type(answer).__name__} that cannot be shown"
    return text if len(text) <= 120 else f"{text[:120]}..."
