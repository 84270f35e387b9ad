"""`icrl eval`: a model without critique, with critique over K rounds, and against another model on the same seeds."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from icrl_megatron.agents import cache as tool_cache
from icrl_megatron.distributed.process import KILLED, STOPPED, is_rank, require_gpu
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.evaluation.job import EvalJob
from icrl_megatron.evaluation.result import EvalRequest, Result, read_result
from icrl_megatron.launch import servers as serve
from icrl_megatron.launch.torchrun import launch
from icrl_megatron.model.shape import check_folder
from icrl_megatron.run import checks as validate
from icrl_megatron.run import heldout as eval_problems
from icrl_megatron.run.resume import earlier
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import source_of
from icrl_megatron.tasks.datasets import content_hash
from icrl_megatron.types import Task
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import require_space
from icrl_megatron.utils.errors import ConfigError

ROOM_BYTES = 1 << 20
"""Free disk space that an evaluation requires before it starts, so that its result can be written."""


def evaluate(request: EvalRequest) -> int:
    """Plays the held-out problems, writes a folder with eval.json, eval.png and the episodes, and prints the result.
    Returns 0, or the exit code of failed ranks, whose message has been printed.

    Before playing, raises ConfigError on a wrong model, task set, setting, critic or earlier result, and if the output
    folder must not be replaced.
    """
    check(request)
    out = request.out or default_folder(request.model)
    results.check(out, results.EVALUATION, request.reads(), request.overwrite)
    require_space(out, ROOM_BYTES, "the evaluation")
    run, before = run_settings(request.model)
    settings = settings_of(request, run)
    tool_cache.check(settings.tasks.tool_cache)
    problems = eval_problems.problems(settings, run, request.on, request.problems, before)
    if request.against:
        _check_pairs(request, problems, read_result(request.against)[0])
    check_engine(request, settings)
    return play(request, settings, out, lambda folder: problems)


def play(
    request: EvalRequest,
    settings: Settings,
    out: Path,
    problems: Callable[[Path], Sequence[Task]],
    records: Path | None = None,
) -> int:
    """Starts what the job needs and plays it. `problems` gets the model's Hugging Face folder and returns what to play;
    without problems nothing is started. `records`: `EvalJob.records`. Returns the exit code."""
    logs, code = Path(tempfile.mkdtemp(prefix="icrl_eval_logs_")), 1
    try:
        with ExitStack() as held:
            folder = held.enter_context(_model_folder(request.model))
            if not (tasks := tuple(problems(folder))):
                code = 0
                return code
            settings = held.enter_context(serve.beside(settings, logs))
            other = request.critic_folder()
            critic = held.enter_context(_model_folder(other)) if other is not None else None
            unusable = eval_problems.unusable(settings, "heldout") if records is None else {}
            code = _played(EvalJob(request, settings, tasks, folder, critic, out, logs, unusable, records))
    finally:
        _conclude(logs, failed=code not in (0, KILLED))
    return code


def _conclude(logs: Path, failed: bool) -> None:
    """Deletes the folder, unless the evaluation has failed and its servers or ranks wrote something there."""
    if failed and any(file.is_file() and file.stat().st_size for file in logs.rglob("*")):
        print(f"the logs of the failed evaluation are in {logs}", file=sys.stderr)
    else:
        shutil.rmtree(logs, ignore_errors=True)


def _played(job: EvalJob) -> int:
    """Plays the job in this process if there is one rank, or starts the ranks."""
    if job.settings.launch.ranks == 1:
        from icrl_megatron.evaluation.play import run

        run(job)
        return 0
    with tempfile.TemporaryDirectory(prefix="icrl_eval_") as folder:
        path = job.save(Path(folder))
        stopping = "stopping: nothing is written" if job.records is None else "stopping: finished questions are kept"
        code = launch(path, job.settings.launch.ranks, job.logs, "icrl_megatron.evaluation.play", 30.0, stopping)
    return KILLED if code == STOPPED else code


def default_folder(model: Path) -> Path:
    """MODEL/eval; or eval_NAME beside MODEL if MODEL is itself replaced or deleted as a whole, as checkpoints are."""
    folder = model if model.is_dir() else model.parent
    return folder.parent / f"eval_{folder.name}" if results.is_result(folder) else folder / "eval"


def check(request: EvalRequest) -> None:
    """Raises ConfigError if the request is wrong by itself."""
    for name, value in (("rounds", request.rounds), ("samples", request.samples), ("problems", request.problems)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    if request.critic and request.rounds == 1:
        raise ConfigError(f"--critic={request.critic} needs --rounds of at least 2: one round has no critique")
    if not request.model.exists():
        raise ConfigError(f"{request.model}: no such folder; give a checkpoint, a run or a Hugging Face folder")
    folder = request.critic_folder()
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"--critic={request.critic}: neither a folder nor an address; give a checkpoint, a run or a Hugging Face "
            "folder, or an OpenAI-compatible endpoint, e.g. http://host:30000/v1"
        )


def check_engine(request: EvalRequest, settings: Settings) -> None:
    """Raises ConfigError if the engine cannot run this evaluation with these settings."""
    ranks, rollout = settings.launch.ranks, settings.rollout
    greedy = rollout.temperature == 0
    validate.check_values(replace(settings, rollout=replace(rollout, temperature=1.0)) if greedy else settings)
    if greedy and request.samples > 1:
        raise ConfigError(
            f"--samples={request.samples} with rollout.temperature=0: greedy decoding gives the same reply every time; "
            "use --samples 1, or a temperature above 0"
        )
    if request.critic_folder() is not None and settings.engine.urls:
        raise ConfigError(
            f"--critic={request.critic} needs a second server, and engine.urls starts none; leave engine.urls empty, "
            "or give the address of an OpenAI-compatible endpoint that serves the critic"
        )
    kind = engine_kind(settings.engine.kind)
    kind.check(settings)
    kind.check_ranks(settings, ranks, ranks)
    kind.check_installed(settings.engine)


def _check_pairs(request: EvalRequest, problems: Sequence[Task], earlier: Result) -> None:
    """Raises ConfigError if the two evaluations have no common problem, or different problems of the same name."""
    common = [task for task in problems if task.task_id in earlier.successes]
    if not common:
        raise ConfigError(
            f"--against={request.against}: it has no problem of this evaluation; evaluate both models with the same "
            "--task, --on and --problems"
        )
    for task in common:
        if earlier.contents.get(task.task_id) != content_hash(task.problem):
            raise ConfigError(
                f"--against={request.against}: {task.task_id} was a different problem in that evaluation, because the "
                "task set's rows have changed since; evaluate that model again"
            )


def run_settings(model: Path) -> tuple[Settings | None, list[Settings]]:
    """The settings of the run whose folder contains the model, if any, and the run's earlier settings. Settings contain
    commands to execute, so a settings file inside a downloaded model or checkpoint is not read."""
    inside = any((model / name).exists() for name in ("config.json", "icrl.json"))
    for folder in (*(() if inside else (model,)), *model.resolve().parents[:3]):
        if (folder / settings_module.SAVED_NAME).exists():
            return settings_module.load_saved(folder / settings_module.SAVED_NAME), earlier(folder)
    return None, []


def settings_of(request: EvalRequest, run: Settings | None) -> Settings:
    """The settings of the evaluation. `run`: those of the run that the model comes from. Raises ConfigError."""
    settings = run or Settings()
    known = {source.name: source for source in settings.tasks.sources}
    if request.tasks:
        sources = [known.get(name, source_of(name)) for name in request.tasks]
        settings = replace(settings, tasks=replace(settings.tasks, sources=sources))
    elif run is None:
        raise ConfigError(f"{request.model} is not in a run folder, so its tasks are unknown: name some with --task")
    return _for_evaluation(settings_module.apply_overrides(settings, request.overrides), request.rounds)


def _for_evaluation(settings: Settings, rounds: int) -> Settings:
    """The settings with training-only parts reset. The ranks run on this machine, and all of them play; a process that
    is the only rank of its job plays alone. Raises ConfigError if this process is one of several ranks, and if the
    settings need a GPU that this machine lacks."""
    if is_rank() and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError("this command starts its ranks itself: run it once, with launch.ranks=N")
    require_gpu(settings.launch.device)
    ranks = settings.launch.ranks
    if settings.launch.engine_ranks:  # all of them together need not divide into engines
        ranks -= ranks % settings.engine.tensor_parallel
    ranks = 1 if is_rank() else ranks
    # Engines start with the weights that they keep; servers on the ranks' own GPUs take no deltas.
    sync = "full" if settings.launch.engine_ranks else settings.engine.sync
    return replace(
        settings,
        engine=replace(settings.engine, sync=sync),
        rollout=replace(settings.rollout, rounds=rounds, critic="self", oversample=1.0, partial=False),
        actor=replace(settings.actor, tensor_parallel=1, pipeline_parallel=1, sequence_parallel=False),
        launch=replace(settings.launch, ranks=ranks, nodes=1, engine_ranks=0),
    )


@contextmanager
def _model_folder(model: Path) -> Iterator[Path]:
    """A Hugging Face folder with the model's weights: the folder itself, a run's export, or a converted checkpoint."""
    if (model / "config.json").exists():
        check_folder(model)
        yield model
    elif (model / "hf" / "config.json").exists():
        check_folder(model / "hf")
        yield model / "hf"
    else:
        from icrl_megatron.actor.convert import export_hf

        root = model / "checkpoints" if (model / "checkpoints").is_dir() else model
        with tempfile.TemporaryDirectory(prefix="icrl_eval_") as temporary:
            export_hf(root, Path(temporary) / "hf")
            yield Path(temporary) / "hf"
