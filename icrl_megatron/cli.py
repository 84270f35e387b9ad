"""`icrl`: the command line. Each command imports its modules when it runs, so that --help does not import torch."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from icrl_megatron.evaluation import commands as evaluation_commands
from icrl_megatron.launch import commands
from icrl_megatron.launch.arguments import DryRun, Overrides, Overwrite, Recipe, SettingsCommand
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import commands as task_commands
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.terminal import guard

Body = TypeVar("Body", bound=Callable[..., Any])


class Guarded(typer.Typer):
    """Escapes control characters in the output of commands (`utils/terminal.py`), but not in typer's colored help."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Body], Body]:
        register = super().command(name, **{"cls": SettingsCommand, **options})

        def add(body: Body) -> Body:
            @functools.wraps(body)
            def guarded(*given: Any, **named: Any) -> Any:
                guard()
                return body(*given, **named)

            return register(cast(Body, guarded))

        return add


app = Guarded(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from icrl_megatron import __version__

        typer.echo(f"icrl-megatron {__version__}")
        raise typer.Exit


@app.callback()
def icrl(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Trains a model with ICRL on Megatron-Core."""


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train. The same command resumes a stopped run from its last checkpoint."""
    resolved = _resolve(recipe, overrides, dry_run)
    if not dry_run:
        from icrl_megatron.launch import phases as pipeline
        from icrl_megatron.plan import planner

        planner.check(resolved)
        commands.finish(pipeline.run(resolved))


@app.command()
def sft(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA|RECIPE", help="Conversations: a file, folder or pattern. Or a recipe's name."),
    ],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model on files of conversations (docs/AGENTS.md), or run only the supervised warm start of a recipe."""
    from icrl_megatron.run import conversation_checks, files
    from icrl_megatron.settings.loading import run_folder
    from icrl_recipes import registry

    recipe, given = conversation_checks.as_recipe(data, registry())
    resolved = _resolve(recipe, [*given, *(overrides or [])], dry_run)
    if resolved.start_from:
        raise ConfigError(
            f"start_from={resolved.start_from}: `icrl sft` warms up a model.path or model.init; leave start_from empty "
            "and give model.path=FOLDER, which `icrl export` makes from a checkpoint, or use `icrl train`"
        )
    if not resolved.warm_start.wanted:
        raise ConfigError("warm_start.steps=0: nothing to do; start a new run with e.g. warm_start.steps=300")
    if not dry_run:
        from icrl_megatron.launch import phases as pipeline

        export = run_folder(resolved) / files.WARM_START / files.EXPORT
        before = export.exists()
        code = pipeline.warm_start(resolved)
        if code == 0 and os.environ.get("RANK", "0") == "0":
            typer.echo(f"finished before, nothing was trained now: {export}" if before else f"written to {export}")
        commands.finish(code)


@app.command()
def distill(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="The JSONL or Parquet file of trajectories to write.")],
    overrides: Overrides = None,
    heldout: Annotated[bool, typer.Option(help="Play held-out problems; write FILE.eval.json instead.")] = False,
    sharegpt: Annotated[Path | None, typer.Option(help="Also write JSONL with calls as text (LLaMA-Factory).")] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Let a multi-agent system play the training problems, and write what filters keep as training data. The same
    command resumes a stopped one."""
    from icrl_megatron.distill import command
    from icrl_megatron.run import checks
    from icrl_megatron.settings import loading as settings

    if heldout and sharegpt is not None:
        raise ConfigError(f"--sharegpt={sharegpt} with --heldout, which writes no trajectories: leave one of them out")
    resolved = settings.load(recipe, overrides or [])
    if dry_run:
        typer.echo(settings.to_yaml(resolved), nl=False)
    checks.validate_tasks(resolved)
    if dry_run:
        command.prepare(resolved, out, overwrite, split="heldout" if heldout else "train", sharegpt=sharegpt)
        return
    from icrl_megatron.evaluation import system

    said = system.measure(resolved, out, overwrite) if heldout else command.run(resolved, out, overwrite, sharegpt)
    typer.echo(said)


def _resolve(recipe: str, overrides: list[str] | None, show: bool) -> Settings:
    from icrl_megatron.distributed.process import require_gpu
    from icrl_megatron.run import checks as validate
    from icrl_megatron.settings import loading as settings

    resolved = settings.load(recipe, overrides or [])
    if show:
        typer.echo(settings.to_yaml(resolved), nl=False)
    else:
        require_gpu(resolved.launch.device)
    validate.validate(resolved)
    if show and (resolved.model.path or resolved.start_from):  # a model from model.init has no tokenizer yet
        from icrl_megatron.run import conversations, problems

        for said in filter(None, (problems.dry_run(resolved), conversations.dry_run(resolved))):
            typer.echo(said, err=True)
    return resolved


for launcher in (commands.launch, commands.status, commands.logs, commands.cancel):
    app.command()(launcher)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="A Hugging Face folder (docs/MODELS.md).")],
    target: Annotated[
        Path, typer.Argument(metavar="CHECKPOINTS", help="A folder of checkpoints, in which step_000000 is written.")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Convert a Hugging Face folder to a checkpoint from which training can start."""
    from icrl_megatron.utils import results

    written = results.check_import(target, source, overwrite)
    from icrl_megatron.actor.convert import import_hf
    from icrl_megatron.model.shape import ModelShape
    from icrl_megatron.settings.values import pasted

    import_hf(source, target, overwrite)
    parameters = ModelShape.read(written / "model").parameters()
    typer.echo(f"written to {written}: a checkpoint, {parameters:,} parameters, {results.describe(written)}")
    typer.echo(f"train from it: icrl train RECIPE {pasted('start_from', str(target))}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of a run.")],
    target: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="The Hugging Face folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint to a Hugging Face folder (weights and tokenizer) that transformers and SGLang load."""
    from icrl_megatron.utils import results

    results.check(target, results.MODEL, [source], overwrite)
    from icrl_megatron.actor.convert import export_hf
    from icrl_megatron.model.shape import ModelShape

    export_hf(source, target, overwrite)
    parameters = ModelShape.read(target).parameters()
    typer.echo(f"written to {target}: a Hugging Face folder, {parameters:,} parameters, {results.describe(target)}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(help="Training step; the last one by default.")] = None,
    episode: Annotated[int | None, typer.Option(help="Which episode of the step.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Show whole tool calls and observations.")] = False,
) -> None:
    """Print an episode of a run: attempt, critique, revision, rewards. Each agent has its own color."""
    from icrl_megatron.report.show import show as show_episode

    show_episode(run, step, episode, full=full)


@app.command("eval")
def eval_(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run, a checkpoint or a Hugging Face folder.")],
    overrides: Overrides = None,
    task: Annotated[list[str] | None, typer.Option(help="Task set, repeatable; the run's own by default.")] = None,
    on: Annotated[list[str] | None, typer.Option(help="test: all held-out problems; or a subset, repeatable.")] = None,
    rounds: Annotated[
        int, typer.Option(help="Attempts per episode; above 1, the critic critiques each but the last.")
    ] = 1,
    samples: Annotated[int, typer.Option(help="Episodes per problem.")] = 1,
    problems: Annotated[int | None, typer.Option(help="Maximum number of problems per task set.")] = None,
    critic: Annotated[str, typer.Option(help="Another model's folder, or an endpoint's address.")] = "",
    revise_all: Annotated[bool, typer.Option(help="Critique and retry successes too.")] = False,
    against: Annotated[Path | None, typer.Option(help="eval.json of another model to compare with.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; MODEL/eval by default.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model on held-out problems: without critique, with it, and against another on the same seeds."""
    from icrl_megatron.evaluation.result import EvalRequest
    from icrl_megatron.evaluation.run import evaluate

    named, subsets, changed = tuple(task or ()), tuple(on or ("test",)), tuple(overrides or ())
    request = EvalRequest(
        model, named, subsets, rounds, samples, problems, critic, revise_all, against, out, changed, overwrite
    )
    raise typer.Exit(evaluate(request))


@app.command()
def select(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run, a checkpoint or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="The JSONL file of kept rows to write, for data.train.")],
    overrides: Overrides = None,
    task: Annotated[str, typer.Option(help="Task set; the run's own by default.")] = "",
    samples: Annotated[int, typer.Option(help="Attempts per question.")] = 8,
    at_least: Annotated[float, typer.Option(help="Lowest success of a kept question.")] = 0.0,
    at_most: Annotated[float, typer.Option(help="Highest success of a kept question.")] = 0.3,
    problems: Annotated[int | None, typer.Option(help="Only the first questions.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Keep the training questions on which a model's success lies between bounds. The same command resumes a stopped
    one."""
    from icrl_megatron.evaluation.select import SelectRequest
    from icrl_megatron.evaluation.select import select as select_questions

    changed = tuple(overrides or ())
    request = SelectRequest(model, out, task, samples, at_least, at_most, problems, changed, overwrite)
    raise typer.Exit(select_questions(request))


@app.command("report")
def report_page(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, shown together.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; RUN/report.html by default.")] = None,
    episodes: Annotated[int, typer.Option(help="Maximum number of episodes per run in the page.", min=0)] = 240,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page: curves, tables, time, and episodes with every token shaded by its calibration weight."""
    from icrl_megatron.report.page import PageSize, write_page

    page = write_page(runs, out or runs[0] / "report.html", PageSize(episodes=episodes), overwrite)
    typer.echo(f"written to {page}")


app.command()(commands.ablate)
app.command()(evaluation_commands.reproduce)


env_app = Guarded(help="Inspect environment servers.", no_args_is_help=True)
app.add_typer(env_app, name="env")


@env_app.callback()
def env() -> None:
    """Inspect environment servers."""


env_app.command("check")(task_commands.env_check)
app.command("serve-search")(task_commands.serve_search)
app.command()(task_commands.data)


@app.command()
def recipes() -> None:
    """List the recipes, those for GPUs with their planned memory and time."""
    from rich.table import Table

    from icrl_megatron.plan import planner
    from icrl_megatron.utils.console import PlainConsole
    from icrl_recipes import registry

    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, recipe in registry().items():
        settings, about = recipe(), " ".join((recipe.__doc__ or "").split())
        if settings.launch.device == "cuda":
            with suppress(ConfigError):  # a model that is not here, for example
                about += f" {planner.one_line(planner.plan(settings))}"
        table.add_row(name, about)
    PlainConsole().print(table)


@app.command("settings")
def settings_(
    prefix: Annotated[str, typer.Argument(help="A section or a setting, such as algo or rollout.rounds.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/SETTINGS.md.")] = False,
) -> None:
    """List settings with their type, default, allowed values and meaning."""
    from icrl_megatron.settings import describe

    if markdown:
        sys.stdout.write(describe.markdown())
        return
    found = describe.described(prefix)
    if not found:
        raise ConfigError(f"no setting is called {prefix} or begins with it; `icrl settings` lists all of them")
    typer.echo("\n".join(str(one) for one in found))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Total number of GPUs; the recipe's by default.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200 or a100.")] = "h100",
    search: Annotated[bool, typer.Option("--search", help="Find the best layout, and say why others fail.")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="Also print a table of 8 to 1024 GPUs.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write a PNG of that table, and print the table.")] = None,
    overwrite: Overwrite = False,
    asynchronous: Annotated[
        bool, typer.Option("--async", help="Also simulate idle GPUs of rollout.staleness 0 to 4 on 8 to 1024 GPUs.")
    ] = False,
) -> None:
    """Predict memory and time of a step from the settings alone, before any GPU is used."""
    from icrl_megatron.plan import command

    command.run(recipe, overrides or [], gpus, gpu, search, scaling, picture, overwrite, asynchronous)


@app.command()
def doctor() -> None:
    """Check what this machine supports and what is missing, and print the commands that fix it."""
    from icrl_megatron.launch.doctor import report

    raise typer.Exit(report())


def main() -> None:
    """Entry point: one message on stderr, and exit code 2 after a ConfigError or 1 after a HopelessError."""
    from icrl_megatron.utils.disk import unexplained_errors

    try:
        with unexplained_errors():
            app()
    except (ConfigError, HopelessError) as error:
        guard()
        with suppress(OSError):  # the error may be that stderr's own disk is full
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
