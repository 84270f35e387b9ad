"""The commands of `icrl` that launch runs through NeMo-Run, and look after them."""

from __future__ import annotations

from typing import Annotated

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
