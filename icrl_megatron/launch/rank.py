"""Rank program of slurm/step.sh: `python -m icrl_megatron.launch.rank train|sft RECIPE [KEY=VALUE]...`."""

from __future__ import annotations

import sys

from icrl_megatron.distributed.process import run_rank
from icrl_megatron.utils.errors import ConfigError

COMMANDS = ("train", "sft")


def main(arguments: list[str]) -> int:
    """One rank of `icrl train` or `icrl sft` that an agent started. Returns 0 or STOPPED.

    Raises ConfigError as these commands do; every rank checks the same settings, so all of them end.
    """
    from icrl_megatron.launch import phases as pipeline
    from icrl_megatron.plan import planner
    from icrl_megatron.run import checks as validate
    from icrl_megatron.settings import loading as settings

    if len(arguments) < 2 or arguments[0] not in COMMANDS:
        raise ConfigError(f"expected {' or '.join(COMMANDS)}, a recipe and overrides; got {' '.join(arguments)!r}")
    resolved = settings.load(arguments[1], arguments[2:])
    validate.validate(resolved)
    planner.check(resolved)
    return pipeline.run(resolved) if arguments[0] == "train" else pipeline.warm_start(resolved)


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
