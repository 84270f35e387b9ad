"""The commands of `icrl` that evaluate tables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from icrl_megatron.launch.commands import finish
from icrl_megatron.utils.errors import ConfigError


def cell_names(incomplete: str) -> list[str]:
    """The cells whose names begin with `incomplete`, for a shell."""
    from icrl_recipes.cells import CELLS

    return [name for name in CELLS if name.startswith(incomplete)]


def reproduce(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CELL]... [KEY=VALUE]...",
            help="Cells by name or pattern ('agentic-icrl-8b-*'), and settings of their runs.",
            autocompletion=cell_names,
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Run nothing; list these cells, or all.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="With --list: print JSON.")] = False,
    on: Annotated[str, typer.Option(help="local: one after another; slurm: as jobs.")] = "local",
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder for the runs and their evaluations.")] = Path("runs/cells"),
    critic: Annotated[str, typer.Option(help="Address of the external critic, for the critic swap.")] = "",
    account: Annotated[str, typer.Option(help="Slurm account.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm partition.")] = "",
    time: Annotated[str, typer.Option(help="Time limit per job on Slurm; training is requeued and resumes.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the commands, and stop.")] = False,
) -> None:
    """Measure cells of the tables of ICRL's paper: train, evaluate, and fill in the list. The same command resumes."""
    from icrl_megatron.evaluation import cell_views, reproduce_slurm
    from icrl_megatron.evaluation import reproduce as reproduction

    if on not in ("local", "slurm"):
        raise ConfigError(f"--on={on}: choose local or slurm")
    if json_ and not list_:
        raise ConfigError("--json prints the list: give --list too")
    given = list(words or [])
    named = any("=" not in word for word in given)
    if not named and not list_:
        raise ConfigError("no cell is named: give some, e.g. agentic-icrl-8b-alfworld, or --list to list all")
    asked = reproduction.parse([*given, *([] if named else ["*"])], seeds, out, critic)
    if list_:
        if json_:
            typer.echo(cell_views.as_json(asked.cells, asked.seeds, asked.out))
        else:
            cell_views.show(asked.cells, asked.seeds, asked.out)
        return
    if dry_run:
        reproduction.check(asked)
        for phase in asked.phases():
            typer.echo(f"{'finished: ' if phase.done else ''}icrl {shlex.join(phase.words)}")
        return
    if on == "slurm":
        from icrl_megatron.launch.slurm_queue import Queue

        for name, job in reproduce_slurm.submit(asked, Queue(account, partition, time)):
            typer.echo(f"job {job}: {name}")
        typer.echo(f"logs in {asked.out / 'jobs'}; the same command with --list shows what is finished")
        return
    reproduction.check(asked)
    code = reproduction.run(asked)
    cell_views.show(asked.cells, asked.seeds, asked.out)
    if code:
        finish(code)
