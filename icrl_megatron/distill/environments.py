"""What a system plays in: environments whose actions are calls of tools and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from icrl_megatron.distill.roles import Member
from icrl_megatron.tasks.base import Environment, ReadsCalls
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError

_LOOKED_AT = 100
"""Problems whose tools are looked at for a tool that the first one lacks."""


def with_tools(environment: Environment, task: Task) -> ReadsCalls:
    """Raises ConfigError if the environment has no tools."""
    if not isinstance(environment, ReadsCalls):
        raise ConfigError(
            f"task set {task.source!r} has no tools that agents could call: take it out of tasks.sources, give math "
            "tools ('tasks.sources[...].agent.tools=[python]'), or declare tools in your environment (docs/TASKS.md)"
        )
    return environment


def check_tools(team: Mapping[str, Member], opened: Callable[[Task], Environment], tasks: Sequence[Task]) -> None:
    """Raises ConfigError if the first task has no tools, and for an agent's tool that none of the first tasks has."""
    named = {tool: name for name, member in team.items() for tool in member.tools}
    known = dict[str, None]()
    for task in islice(tasks, _LOOKED_AT):
        known |= dict.fromkeys(spec.name for spec in with_tools(opened(task), task).specs)
        if known.keys() >= named.keys():
            return
    unknown = [tool for tool in named if tool not in known]
    if tasks and unknown:
        raise ConfigError(
            f"distill.agents: agent {named[unknown[0]]!r} has the tool {unknown[0]!r}, and task set "
            f"{tasks[0].source!r} has {', '.join(known)}: correct its tools"
        )


def check_one_attempt(environment: ReadsCalls, task: Task, rounds: int) -> None:
    """Raises ConfigError if several attempts of a model cannot become one sequence. An environment that runs the calls
    itself may start over with each attempt, but a model that learns the sequence continues in the same one."""
    if rounds > 1 and not environment.shares_answers:
        raise ConfigError(
            f"rollout.rounds={rounds} with distill.system=model: the environments of task set {task.source!r} run "
            "their calls themselves and start over with each attempt, so two attempts are not one sequence; use "
            "rollout.rounds=1 in a new run"
        )
