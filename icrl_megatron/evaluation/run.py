"""`icrl eval`: how good a model is alone, with critique over K rounds, and against another model on the same seeds."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from icrl_megatron.evaluation.result import RESULT, EvalRequest, Result, read_result
from icrl_megatron.evaluation.scores import compare, score, successes
from icrl_megatron.launch import servers as serve
from icrl_megatron.model.shape import ModelShape, check_folder
from icrl_megatron.rollout.episode import Stage, play
from icrl_megatron.rollout.speakers import EngineSpeaker, Seeds, Speaker, engine_casting
from icrl_megatron.run import heldout as eval_problems
from icrl_megatron.run.resume import earlier
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.datasets import content_hash, subset_of
from icrl_megatron.types import DroppedEpisode, Episode, Task
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors, require_space
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.progress import Progress

PICTURE = "eval.png"
ROOM_BYTES = 1 << 20
"""Free space that an evaluation requires before it starts, so that its result can be written."""
SEEDS = Seeds(run=0, step=0, purpose="eval")
"""Frozen: two evaluations of the same problems differ by their models alone."""


def evaluate(request: EvalRequest) -> tuple[Result, Path]:
    """Plays the held-out problems and writes a folder with eval.json and eval.png; returns the result and its folder.

    Raises ConfigError on a model, task set, critic or earlier result that is not one, and on a folder that must not be
    replaced, before anything is played.
    """
    _check(request)
    out = request.out or default_folder(request.model)
    results.check(out, results.EVALUATION, _read_by(request), request.overwrite)
    require_space(out, ROOM_BYTES, "the evaluation")
    run, before = _run_settings(request.model)
    settings = _settings(request, run)
    problems = eval_problems.problems(settings, run, request.on, request.problems, before)
    earlier = read_result(request.against) if request.against else None
    if earlier is not None:
        _check_pairs(request, problems, earlier)
    with _logs(settings) as logs:
        with serve.beside(settings, logs) as settings, _model_folder(request.model) as folder:
            fitting = _fitting(request, settings, folder, problems)
            played, dropped = _play(request, settings, folder, fitting)
        result = replace(_result(request, played, dropped), too_long=len(problems) - len(fitting))
        result = _compared(result, earlier)
        _write(result, out, logs, request)
    return result, out


def _read_by(request: EvalRequest) -> list[Path]:
    """What the evaluation reads, and so must not replace."""
    critic = [Path(request.critic)] if request.critic and not _is_address(request.critic) else []
    return [request.model, *critic, *([request.against] if request.against else [])]


def default_folder(model: Path) -> Path:
    """MODEL/eval; beside it as eval_NAME where MODEL is itself replaced or deleted as a whole, as checkpoints are."""
    folder = model if model.is_dir() else model.parent
    return folder.parent / f"eval_{folder.name}" if results.is_result(folder) else folder / "eval"


@contextmanager
def _logs(settings: Settings) -> Iterator[Path]:
    """A folder for the logs of environment servers, which is kept where the evaluation fails."""
    if not serve.wanted(settings):
        yield Path()
        return
    folder = Path(tempfile.mkdtemp(prefix="icrl_eval_logs_"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _compared(result: Result, earlier: Result | None) -> Result:
    if earlier is None:
        return result
    found = compare(result.successes, earlier.successes, result.subsets)
    return replace(result, comparison=found, against=earlier.model)


def _write(result: Result, out: Path, logs: Path, request: EvalRequest) -> None:
    from icrl_megatron.evaluation.views import picture  # matplotlib: only where it is drawn

    with results.writing(out, results.EVALUATION, _read_by(request), request.overwrite) as folder:
        write_atomically(folder / RESULT, [json.dumps(asdict(result), indent=1)], "the evaluation")
        picture(result, folder / PICTURE)
        if logs.name:
            with disk_errors(out, "the logs of environment servers"):
                shutil.copytree(logs, folder / "logs")


def _check(request: EvalRequest) -> None:
    for name, value in (("rounds", request.rounds), ("samples", request.samples), ("problems", request.problems)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    if request.critic and request.rounds == 1:
        raise ConfigError(f"--critic={request.critic} needs --rounds of at least 2: in one round nobody is criticised")
    if not request.model.exists():
        raise ConfigError(f"{request.model}: no such folder; give a checkpoint, a run or a Hugging Face folder")
    if request.critic and not _is_address(request.critic) and not Path(request.critic).is_dir():
        raise ConfigError(
            f"--critic={request.critic}: neither a folder nor an address; give a checkpoint, a run or a Hugging Face "
            "folder, or an OpenAI-compatible endpoint, e.g. http://host:30000/v1"
        )


def _is_address(critic: str) -> bool:
    return critic.startswith(("http://", "https://"))


def _check_pairs(request: EvalRequest, problems: Sequence[Task], earlier: Result) -> None:
    """Raises ConfigError where the two evaluations have no problem in common, or another one under the same name."""
    common = [task for task in problems if task.task_id in earlier.successes]
    if not common:
        raise ConfigError(
            f"--against={request.against}: no problem of this evaluation is in it; evaluate both models with the same "
            "--task, --on and --problems"
        )
    for task in common:
        if earlier.contents.get(task.task_id) != content_hash(task.problem):
            raise ConfigError(
                f"--against={request.against}: {task.task_id} was another problem then, so its rows have changed; "
                "evaluate that model again"
            )


def _run_settings(model: Path) -> tuple[Settings | None, list[Settings]]:
    """The settings of the run that a model lies in, if it lies in one, and those that the run had earlier. They name
    commands to start, so settings files that come with a downloaded model or checkpoint are not read."""
    inside = any((model / name).exists() for name in ("config.json", "icrl.json"))
    for folder in (*(() if inside else (model,)), *model.resolve().parents[:3]):
        if (folder / settings_module.SAVED_NAME).exists():
            return settings_module.load_saved(folder / settings_module.SAVED_NAME), earlier(folder)
    return None, []


def _settings(request: EvalRequest, run: Settings | None) -> Settings:
    settings = run or Settings()
    known = {source.name: source for source in settings.tasks.sources}
    if request.tasks:
        sources = [known.get(name, TaskSource(name)) for name in request.tasks]
        settings = replace(settings, tasks=replace(settings.tasks, sources=sources))
    elif run is None:
        raise ConfigError(f"{request.model} lies in no run folder, so its tasks are not known: name some with --task")
    pairs = [settings_module.split_override(text) for text in request.overrides]
    return settings_module.apply_overrides(settings, pairs)


@contextmanager
def _model_folder(model: Path) -> Iterator[Path]:
    """A Hugging Face folder with the model's weights: itself, a run's export, or a checkpoint turned into one."""
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


def _fitting(request: EvalRequest, settings: Settings, folder: Path, problems: Sequence[Task]) -> list[Task]:
    """The problems that fit the context of the model in `folder`. Raises TooLongError where others are not dropped, and
    where none fits."""
    from icrl_megatron.rollout.prompts import Prompter, tokenizer
    from icrl_megatron.rollout.room import TooLongError
    from icrl_megatron.run.problems import ProblemShare, examine, left_out, refusal

    rollout = replace(settings.rollout, rounds=request.rounds, critic="self")
    settings = replace(settings, rollout=rollout, eval=replace(settings.eval, control_problems=0))
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes)
    lost = examine(problems, settings, catalogue, Prompter(tokenizer(folder), rollout), ProblemShare())
    if not lost:
        return list(problems)
    if settings.tasks.too_long == "error" or len(lost) == len(problems):
        raise TooLongError(refusal(lost, len(problems), settings, ModelShape.read(folder).max_positions))
    Progress().log(left_out(lost, len(problems), settings))
    ids = {one.task.task_id for one in lost}
    return [task for task in problems if task.task_id not in ids]


def _play(
    request: EvalRequest, settings: Settings, folder: Path, problems: Sequence[Task]
) -> tuple[list[Episode], list[DroppedEpisode]]:
    from icrl_megatron.distributed import platform
    from icrl_megatron.engines.local import LocalEngine
    from icrl_megatron.model.gpt import DTYPES
    from icrl_megatron.rollout.prompts import Prompter, tokenizer

    platform.prepare(settings.launch.device)
    rollout = replace(settings.rollout, rounds=request.rounds)
    prompter = Prompter(tokenizer(folder), rollout)
    with ExitStack() as open_models:

        def speaker(path: Path) -> Speaker:
            engine = LocalEngine(path, settings.engine, DTYPES[settings.actor.precision], platform.device())
            return EngineSpeaker(engine, rollout.temperature, prompter.stop_ids)

        critic: Speaker | None = None
        if _is_address(request.critic):
            from icrl_megatron.rollout.external import ExternalSpeaker, first_model
            from icrl_megatron.utils.connections import Connections

            external = replace(rollout.external, url=request.critic.rstrip("/"))
            external = replace(external, model=first_model(external))
            critic = ExternalSpeaker(external, rollout.temperature, prompter, Connections(external.concurrency))
        elif request.critic:
            other = open_models.enter_context(_model_folder(Path(request.critic)))
            if tokenizer(other).get_vocab() != tokenizer(folder).get_vocab():
                raise ConfigError(
                    f"--critic={request.critic} has another tokenizer than {request.model}: serve it behind an "
                    "OpenAI-compatible endpoint and give its address"
                )
            critic = speaker(other)
        catalogue = registry.Catalogue(settings.tasks.sources, rollout.max_observation_bytes)
        drop = settings.tasks.too_long == "drop"
        stage = Stage(catalogue.environment, prompter, rollout, request.revise_successes, drop)
        casting = engine_casting(speaker(folder), critic)
        with Progress().phase("evaluation", len(problems) * request.samples) as bar:
            jobs = play(problems, request.samples, stage, casting, SEEDS, on_end=lambda _: bar.advance(1))
            return asyncio.run(jobs)


def _result(request: EvalRequest, played: list[Episode], dropped: list[DroppedEpisode]) -> Result:
    return Result(
        model=str(request.model),
        critic=request.critic or "itself",
        rounds=request.rounds,
        samples=request.samples,
        scores=score(played, dropped, request.rounds),
        generated_tokens=sum(e.generated_tokens() for e in played),
        successes=successes(played, request.samples),
        subsets={e.task.task_id: subset_of(e.task) for e in played},
        contents={e.task.task_id: content_hash(e.task.problem) for e in played},
        lost=tuple(dict.fromkeys(d.error for d in dropped))[:3],
    )
