"""`icrl launch RECIPE --on local|slurm` through NeMo-Run, and factories for users of NeMo's recipes.

Both executors run slurm/step.sh with a recipe's name and overrides, so every launcher resolves the same settings.
Importing this module does not import nemo_run. Its functions do (5 to 13 s), and raise ConfigError with the command
that installs it if it is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icrl_megatron.distributed import job_size
from icrl_megatron.launch import container
from icrl_megatron.run import checks as validate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

HOME = Path(os.environ.get("ICRL_HOME", Path.cwd()))
"""The checkout that holds slurm/; runs write below it."""
SIGNAL = "USR1@120"
"""Sent to the step itself: NeMo-Run's batch script has no trap of its own."""
STOPPED_CODE = 75
"""What the step exits with when it was stopped, so that NeMo-Run's script requeues the job."""
TITLE = "icrl-{}"
LAUNCHED = "runs/launched"
"""Where scripts and logs go behind a tunnel. Not called nemo_run: NeMo-Run replaces that in every path."""
SUCCEEDED = "SUCCEEDED"
CHECK_TIMEOUT_S = 600.0
"""For the job's check, which reads all problems."""


@dataclass(frozen=True)
class Where:
    """Where a recipe is launched."""

    on: str = "local"
    """local | slurm."""
    account: str = ""
    partition: str = ""
    time: str = "24:00:00"
    container: str = ""
    """A squashfs file or a registry's image, for pyxis; empty: bare metal with this Python."""
    mounts: tuple[str, ...] = ()
    """More mounts, SRC:DST[:FLAGS]; behind a tunnel also those of model and run folder."""
    host: str = ""
    """Login node, for an SSH tunnel; empty: Slurm's clients are here."""
    port: int = 22
    """Of ssh on the login node."""
    user: str = ""
    identity: str = ""
    """Private key of the tunnel."""
    remote_home: str = ""
    """The checkout on the cluster, under an SSH tunnel."""
    retries: int = 100
    """Times that a job which ended non-zero is requeued. Those that were stopped on request count too, so it is large:
    crashes have a bound of their own (slurm/step.sh asks `icrl_megatron.launch.job decide`)."""
    python: str = ""
    """Python of the step; empty: the checkout's .venv where there is one, this one, or the container's python3."""
    ranks_per_node: int = 0
    """0: the recipe's launch.ranks."""
    env: dict[str, str] = field(default_factory=dict)
    """More environment variables of the step."""
    site: dict[str, str] = field(default_factory=dict)
    """More of sbatch's options, such as {"qos": "high"}."""
    prologue: str = ""
    """A script that the batch job sources first, such as one that loads modules."""


def resolve(recipe: str, overrides: Sequence[str], where: Where) -> Settings:
    """The settings, checked as far as this machine can know. Raises ConfigError."""
    if where.on not in ("local", "slurm"):
        raise ConfigError(f"--on {where.on}: choose local or slurm")
    if where.on == "local" and (given := [*where.site, *(["prologue"] if where.prologue else [])]):
        raise ConfigError(f"--{given[0]}: --on local submits no job; leave it out, or use --on slurm")
    if where.prologue and not where.host and not Path(where.prologue).is_file():
        raise ConfigError(f"--prologue {where.prologue}: no such file; give a script that the batch job can source")
    if where.host and not where.remote_home:
        raise ConfigError("--host needs --remote-home, the checkout on the cluster")
    if where.container and where.on == "local":
        raise ConfigError(f"--container {where.container}: --on local runs none; use --on slurm")
    container.image(where.container, HOME.resolve(), here=not where.host)
    resolved = settings_module.load(recipe, overrides)
    if where.on == "local" and resolved.launch.nodes > 1:
        raise ConfigError(f"launch.nodes={resolved.launch.nodes}: --on local has one machine; use --on slurm")
    if where.ranks_per_node < 0:
        raise ConfigError(f"--ranks-per-node {where.ranks_per_node}: must be at least 1, or 0 for the recipe's")
    if where.host:  # the model and the run folder are on the other side of the tunnel
        validate.validate_settings(resolved)
        training = job_size.training_of(resolved, _per_node(resolved, where))
        validate.validate_grid(resolved, training * resolved.launch.nodes, training)
        return resolved
    world = _per_node(resolved, where) * resolved.launch.nodes
    job = {job_size.JOB_RANKS: str(world), "ICRL_RANKS_PER_NODE": str(_per_node(resolved, where))}
    python = environment(where, resolved)["ICRL_PYTHON"]
    found = None if where.container else shutil.which(python)  # None: it is in the image, or only on the nodes
    if found and Path(found) != Path(sys.executable):
        _check_with(found, ["train", recipe, *overrides], job)
    else:  # the first step checks what its own Python has installed
        with _variables(job):
            validate.validate(resolved, installed=bool(found))
    return resolved


def _check_with(python: str, words: list[str], job: dict[str, str]) -> None:
    """Runs the job's own check with the step's Python. Raises ConfigError with its message."""
    home = HOME.resolve()
    path = os.pathsep.join(str(folder) for folder in (home, home / "kernels", home / "recipes"))
    command = [python, "-m", "icrl_megatron.launch.job", "check", *words]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **job, "PYTHONPATH": path},
            cwd=home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{' '.join(command)} took more than {CHECK_TIMEOUT_S:g} s; run it to see where") from error
    said = done.stderr.strip()
    if done.returncode:
        raise ConfigError(re.split(r"^error: ", said, maxsplit=1, flags=re.M)[-1] or f"{command} ended silently")
    if said:
        print(said, file=sys.stderr)


@contextmanager
def _variables(job: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for a while."""
    before = {name: os.environ.get(name) for name in job}
    os.environ.update(job)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _per_node(settings: Settings, where: Where) -> int:
    return where.ranks_per_node or settings.launch.ranks


def script(recipe: str, overrides: Sequence[str], where: Where, settings: Settings) -> Any:
    """run.Script of the step: the same words that sbatch hands to it."""
    run = _nemo_run()
    return run.Script(
        path=str(_home(where) / "slurm" / "step.sh"),
        entrypoint="bash",
        args=[shlex.quote(word) if where.on == "slurm" else word for word in ("train", recipe, *overrides)],
        env=environment(where, settings),
    )


def environment(where: Where, settings: Settings) -> dict[str, str]:
    """Environment variables of the step."""
    python = where.python or ("python3" if where.container or where.host else _training_python())
    named = {
        "ICRL_HOME": str(_home(where)),
        "ICRL_PYTHON": python,
        "ICRL_RANKS_PER_NODE": str(_per_node(settings, where)),
        "ICRL_EXIT_STOPPED": str(STOPPED_CODE),
        "ICRL_LOGS": str(_home(where) / "runs" / "jobs"),
    }
    return named | where.env


def _training_python() -> str:
    """The checkout's own: the launcher may run in a venv that holds no torch."""
    own = HOME.resolve() / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def executor(where: Where, settings: Settings) -> Any:
    """run.LocalExecutor or run.SlurmExecutor."""
    run = _nemo_run()
    if where.on == "local":
        return run.LocalExecutor(ntasks_per_node=1)
    if where.host:
        tunnel = run.SSHTunnel(
            host=where.host,
            port=where.port,
            user=where.user,
            job_dir=f"{where.remote_home}/{LAUNCHED}",
            identity=where.identity or None,
        )
    else:
        tunnel = run.LocalTunnel(job_dir="")  # below NEMORUN_HOME, where NeMo-Run writes its script
    account: dict[str, Any] = {"account": where.account}
    if not where.account:  # the user's default; NeMo-Run makes the job's name of it
        account = {"account": None, "job_name_prefix": "icrl."}
    return run.SlurmExecutor(
        **account,
        partition=where.partition or None,
        time=where.time,
        nodes=settings.launch.nodes,
        ntasks_per_node=1,  # the agent starts the ranks
        gpus_per_node=None if "gres" in where.site else _per_node(settings, where),
        exclusive=True,
        mem="0",
        signal=SIGNAL,
        retries=where.retries,
        additional_parameters={"requeue": True, **where.site},
        **_contained(where, settings),
        tunnel=tunnel,
        packager=run.Packager(),  # the code is in the checkout already
        env_vars=environment(where, settings),
        launcher=None,
    )


def _contained(where: Where, settings: Settings) -> dict[str, Any]:
    """The executor's options for a prologue and a container."""
    prologue = f"source {shlex.quote(where.prologue)}" if where.prologue else ""
    if not where.container:
        return {"setup_lines": prologue} if prologue else {}
    home = _home(where)
    found = [f"{home}:{home}", *where.mounts] if where.host else container.mounts(home, where.mounts, settings)
    return {
        "container_image": container.image(where.container, home, here=not where.host),
        "container_mounts": found,
        "container_env": list(environment(where, settings)),  # else an image's own value wins
        "srun_args": container.SRUN_ARGS,
        "setup_lines": f"{prologue}\n{container.SETUP}" if prologue else container.SETUP,
    }


def launch(recipe: str, overrides: Sequence[str], where: Where, dry_run: bool = False, detach: bool = False) -> int:
    """Launches a recipe through NeMo-Run: 0 when every task succeeded (or was submitted, detached), 1 otherwise.

    Raises ConfigError for what can be known before anything is queued: settings, grid, account, partition, size.
    """
    settings = resolve(recipe, overrides, where)
    if where.on == "slurm" and not where.host and not dry_run:
        require_accepted(where, settings)
        if where.container:
            container.require_pyxis()
    run = _nemo_run()
    with run.Experiment(TITLE.format(recipe), skip_status_at_exit=True) as experiment:
        experiment.add(script(recipe, overrides, where, settings), executor=executor(where, settings), name="train")
        if dry_run:
            experiment.dryrun(log=False)
            for job in experiment.jobs:  # its own print wraps lines at the terminal's width
                print(job._dryrun_info)
            return 0
        experiment.run(detach=detach, tail_logs=not detach)
        print(f"experiment {experiment._id}: icrl status|logs|cancel {experiment._id}", file=sys.stderr)
    # Leaving the block is what waits.
    return 0 if detach else _code(experiment)


def status(experiment_id: str) -> int:
    """Prints a line a task. 0 unless one of them failed or was cancelled."""
    tasks = _experiment(experiment_id).status(return_dict=True)
    for name, task in tasks.items():
        print(f"{name}  {_state(task)}  job {task['job_id']}  {task['local_dir']}")
    return int(any(_state(task) in ("FAILED", "CANCELLED") for task in tasks.values()))


def logs(experiment_id: str) -> int:
    """Prints the tasks' logs."""
    experiment = _experiment(experiment_id)
    for job in experiment.jobs:
        experiment.logs(job.id)
    return 0


def cancel(experiment_id: str) -> int:
    """Cancels what still runs."""
    experiment = _experiment(experiment_id)
    for job in experiment.jobs:
        experiment.cancel(job.id)
    return 0


def train(recipe: str, overrides: list[str]) -> None:
    """What the factories' run.Partial wraps: `icrl train` in this process."""
    from icrl_megatron.launch import phases as pipeline

    settings = settings_module.load(recipe, overrides)
    validate.validate(settings)
    code = pipeline.run(settings)
    if code:
        raise SystemExit(code)


def partial(recipe: str, overrides: Sequence[str] = ()) -> Any:
    """run.Partial of `train` on a recipe, as users of NeMo's recipes expect it. Raises ConfigError on a wrong name or
    override at once, not on the cluster."""
    settings_module.load(recipe, list(overrides))
    return _nemo_run().Partial(train, recipe=recipe, overrides=list(overrides))


def register_factories() -> list[str]:
    """Registers a factory for `train` under each recipe's name (`--factory NAME` of a run.cli entry point)."""
    from icrl_recipes import registry

    run = _nemo_run()
    for name in registry():

        def factory(name: str = name) -> Any:
            return partial(name)

        factory.__name__ = name
        factory.__annotations__["return"] = run.Partial[train]
        run.cli.factory(target=train, name=name)(factory)
    return list(registry())


def require_accepted(where: Where, settings: Settings) -> None:
    """Asks Slurm whether it would take such a job (`sbatch --test-only`). Raises ConfigError with its answer."""
    if shutil.which("sbatch") is None:
        raise ConfigError("--on slurm: no sbatch here; run it on a login node, or give --host for an SSH tunnel")
    asked = f"{settings.launch.nodes} nodes of {_per_node(settings, where)} GPUs"
    command = ["sbatch", "--test-only", f"--nodes={settings.launch.nodes}", f"--time={where.time}", "--exclusive"]
    site = {"account": where.account, "partition": where.partition, **where.site}
    if "gres" not in site:
        site["gpus-per-node"] = str(_per_node(settings, where))
    named = [f"--{name}={value}" for name, value in site.items() if value]
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write("#!/bin/bash\ntrue\n")
        file.flush()
        done = subprocess.run([*command, *named, file.name], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise ConfigError(
            f"Slurm would not take {asked} with {' '.join(named)}: {said}; "
            "`sinfo -o '%P %D %G'` lists partitions, `sacctmgr show assoc user=$USER` accounts"
        )


def _code(experiment: Any) -> int:
    """NeMo-Run itself exits with 0 after a failed job."""
    states = [_state(task) for task in experiment.status(return_dict=True).values()]
    return 0 if states and all(state == SUCCEEDED for state in states) else 1


def _state(task: dict[str, Any]) -> str:
    return str(getattr(task["status"], "name", task["status"]))


def _experiment(experiment_id: str) -> Any:
    try:
        return _nemo_run().Experiment.from_id(experiment_id)
    except AssertionError as error:
        raise ConfigError(f"no experiment {experiment_id!r} was launched from here (NEMORUN_HOME)") from error


def _home(where: Where) -> Path:
    return Path(where.remote_home) if where.host else HOME.resolve()


def _nemo_run() -> Any:
    if importlib.util.find_spec("nemo_run") is None:
        raise ConfigError("NeMo-Run is not installed here: `make install-nemo`, then .venv-nemo/bin/icrl launch ...")
    import nemo_run

    return nemo_run
