"""The commands of `icrl` that launch runs through NeMo-Run, and look after them."""

from __future__ import annotations

from typing import Annotated

import typer

from icrl_megatron.launch.arguments import DryRun, Overrides, Recipe


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    account: Annotated[str, typer.Option(help="Slurm account.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm partition.")] = "",
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
    )
    raise typer.Exit(nemo.launch(recipe, overrides or [], where, dry_run, detach))


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
