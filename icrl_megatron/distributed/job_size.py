"""How many ranks train: those of the job without the ones that serve engines (`launch.engine_ranks`). No torch."""

from __future__ import annotations

import os

from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

JOB_RANKS = "ICRL_WORLD_SIZE"
"""Environment variable with the number of ranks of the job that a launcher checks, engine ranks included; its ranks per
node are in ICRL_RANKS_PER_NODE."""


def training_of(settings: Settings, machine: int) -> int:
    """Of `machine` ranks of one machine, those that train. Raises ConfigError if engines would leave none."""
    serving = settings.launch.engine_ranks
    if serving and serving >= machine:
        raise ConfigError(
            f"launch.engine_ranks={serving} leaves none of a machine's {machine} ranks for training; lower it, or "
            "raise launch.ranks"
        )
    return machine - serving


def ranks(settings: Settings) -> int:
    """Number of ranks that train: WORLD_SIZE inside a rank; otherwise the job's where a launcher checks one, or
    `launch.ranks` x `launch.nodes`, both without engine ranks. A WORLD_SIZE without RANK, which an earlier program may
    have left, has no effect. Raises ConfigError as `training_of`."""
    if "RANK" in os.environ and (world := _number("WORLD_SIZE")):
        return world
    total, machine = _total(settings), _machine(settings)
    return total - total // machine * (machine - training_of(settings, machine))


def ranks_on_node(settings: Settings) -> int:
    """Ranks of a node that train: LOCAL_WORLD_SIZE inside a rank, the job's where a launcher checks one, otherwise an
    equal share. Raises ConfigError as `training_of`."""
    if "RANK" in os.environ:
        return _number("LOCAL_WORLD_SIZE") or max(1, ranks(settings) // settings.launch.nodes)
    return training_of(settings, _machine(settings))


def _total(settings: Settings) -> int:
    job = 0 if "RANK" in os.environ else _number(JOB_RANKS)
    return job or settings.launch.ranks * settings.launch.nodes


def _machine(settings: Settings) -> int:
    """Ranks of a node, engine ranks included."""
    told = _number("ICRL_RANKS_PER_NODE") if "RANK" not in os.environ and JOB_RANKS in os.environ else 0
    return told or max(1, _total(settings) // settings.launch.nodes)


def _number(variable: str) -> int:
    """The value of an environment variable; 0 if it is not a positive number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
