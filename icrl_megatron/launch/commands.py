"""The commands of `icrl` that launch runs: those through NeMo-Run, and the arms of an ablation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from icrl_megatron.launch.arguments import DryRun, Overrides, Recipe
from icrl_megatron.utils.errors import ConfigError


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    account: Annotated[str, typer.Option(help="Slurm account; the user's default one by default.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm partition; the cluster's default one by default.")] = "",
    qos: Annotated[str, typer.Option(help="Slurm quality of service.")] = "",
    gres: Annotated[str, typer.Option(help="Slurm resources of a node, such as gpu:h100:8, in place of GPUs.")] = "",
    constraint: Annotated[str, typer.Option(help="Slurm node features.")] = "",
    reservation: Annotated[str, typer.Option(help="Slurm reservation.")] = "",
    cpus_per_task: Annotated[int, typer.Option(help="CPUs of a node's step; Slurm's default by default.")] = 0,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the step's environment.")] = None,
    prologue: Annotated[str, typer.Option(help="A script that the batch job sources first (modules).")] = "",
    time: Annotated[str, typer.Option(help="Time limit.")] = "24:00:00",
    container: Annotated[str, typer.Option(help="Image for pyxis/enroot.")] = "",
    mount: Annotated[list[str] | None, typer.Option(help="More container mounts.")] = None,
    host: Annotated[str, typer.Option(help="Login node, for an SSH tunnel.")] = "",
    port: Annotated[int, typer.Option(help="SSH port of the login node.")] = 22,
    user: Annotated[str, typer.Option(help="User of the tunnel.")] = "",
    identity: Annotated[str, typer.Option(help="Private key of the tunnel.")] = "",
    remote_home: Annotated[str, typer.Option(help="The checkout on the cluster.")] = "",
    python: Annotated[str, typer.Option(help="Python of the step; this one by default.")] = "",
    ranks_per_node: Annotated[int, typer.Option(help="Ranks per node; the recipe's launch.ranks by default.")] = 0,
    dry_run: DryRun = False,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and return.")] = False,
) -> None:
    """Launch a recipe through NeMo-Run, on this machine or on Slurm. Exits with 0 only if every task succeeded."""
    from icrl_megatron.launch import nemo

    cpus = str(cpus_per_task) if cpus_per_task else ""
    site = {"qos": qos, "gres": gres, "constraint": constraint, "reservation": reservation, "cpus-per-task": cpus}
    where = nemo.Where(
        on=on,
        account=account,
        partition=partition,
        time=time,
        container=container,
        mounts=tuple(mount or ()),
        host=host,
        port=port,
        user=user,
        identity=identity,
        remote_home=remote_home,
        python=python,
        ranks_per_node=ranks_per_node,
        env=_variables(env or []),
        site={name: value for name, value in site.items() if value},
        prologue=prologue,
    )
    raise typer.Exit(nemo.launch(recipe, overrides or [], where, dry_run, detach))


def _variables(given: list[str]) -> dict[str, str]:
    """Raises ConfigError on anything but NAME=VALUE."""
    pairs = [text.partition("=") for text in given]
    for text, (name, equals, _) in zip(given, pairs, strict=True):
        if not (equals and name.isidentifier()):
            raise ConfigError(f"--env {text}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


Experiment = Annotated[str, typer.Argument(help="The id that `icrl launch` printed.", show_default=False)]


def status(experiment: Experiment) -> None:
    """Print the status of a launched experiment."""
    from icrl_megatron.launch import nemo

    raise typer.Exit(nemo.status(experiment))


def logs(experiment: Experiment) -> None:
    """Print a launched experiment's logs."""
    from icrl_megatron.launch import nemo

    raise typer.Exit(nemo.logs(experiment))


def cancel(experiment: Experiment) -> None:
    """Cancel a launched experiment."""
    from icrl_megatron.launch import nemo

    raise typer.Exit(nemo.cancel(experiment))


def ablate(
    recipe: Recipe,
    overrides: Overrides = None,
    arms: Annotated[str, typer.Option(help="Comma-separated names (docs/BASELINES.md), or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="Folder for the runs; runs/ablate_RECIPE by default.")] = None,
    budget_of: Annotated[str, typer.Option(help="Arm whose generated tokens are the budget of all others.")] = "",
    cell: Annotated[int | None, typer.Option(help="Run only this cell, counted from 0.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing; print the table of finished cells.")] = False,
    on: Annotated[str, typer.Option(help="local: sequentially; slurm: as an array job.")] = "local",
    account: Annotated[str, typer.Option(help="Slurm account.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm partition.")] = "",
    time: Annotated[str, typer.Option(help="Time limit per job on Slurm; a cell is requeued and resumes.")] = "",
    at_once: Annotated[int, typer.Option(help="Cells that run on Slurm at one time; 0: all that fit.", min=0)] = 0,
) -> None:
    """Compare ICRL with its baselines and ablations over seeds. The same command resumes where it stopped."""
    from icrl_megatron.launch import ablate as ablation

    if on not in ("local", "slurm"):
        raise ConfigError(f"--on={on}: choose local or slurm")
    where = out or Path("runs") / f"ablate_{re.sub(r'[^A-Za-z0-9_-]+', '_', recipe).strip('_')}"
    plan = ablation.parse(recipe, arms, seeds, where, overrides or [], budget_of)
    if on == "slurm" and not table:
        from icrl_megatron.launch import ablate_array as ablate_slurm
        from icrl_megatron.launch.slurm_queue import Queue

        if queued := ablate_slurm.submit(plan, Queue(account, partition, time, at_once)):
            for name, job in queued:
                typer.echo(f"{name:8} job {job}")
            typer.echo(f"logs in {where / 'jobs'}; the same command with --table shows the finished cells")
            return
    code = 0 if table or on == "slurm" else ablation.run(plan, cell)
    ablation.conclude(plan)
    if code:
        finish(code)


def finish(code: int) -> NoReturn:
    """Ends the command with the code of its ranks, and says so if they were asked to stop."""
    from icrl_megatron.distributed.process import STOPPED

    if code == STOPPED:
        typer.echo("stopped on request, and saved; the same command resumes from here", err=True)
    raise typer.Exit(code)
