"""`icrl eval`: how good a model is alone, with critique over K rounds, and against another model on the same seeds."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from icrl_megatron import eval_problems, serve
from icrl_megatron import settings as settings_module
from icrl_megatron.config import ConfigError, Settings
from icrl_megatron.config_tasks import TaskSource
from icrl_megatron.eval_problems import TEST
from icrl_megatron.rollout.episode import Stage, play
from icrl_megatron.rollout.scores import Comparison, Score, Successes, compare, score, successes
from icrl_megatron.rollout.speakers import EngineSpeaker, Seeds, Speaker, engine_casting
from icrl_megatron.shape import check_folder
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.datasets import content_hash, subset_of
from icrl_megatron.telemetry.files import write_atomically
from icrl_megatron.telemetry.progress import Progress
from icrl_megatron.types import DroppedEpisode, Episode, Task

RESULT = "eval.json"
PICTURE = "eval.png"
SEEDS = Seeds(run=0, step=0, purpose="eval")
"""Frozen: two evaluations of the same problems differ by their models alone."""


@dataclass(frozen=True)
class Request:
    """One `icrl eval`, as it was asked for."""

    model: Path
    """A Hugging Face folder, a checkpoint, a folder of them, or a run folder."""
    tasks: tuple[str, ...] = ()
    """Names of task sets; empty: those of the run's settings."""
    on: tuple[str, ...] = (TEST,)
    """Subsets of the held-out problems by name (the files they came from); "test": all of them."""
    rounds: int = 1
    samples: int = 1
    problems: int | None = None
    """At most this many of each task set; None: all."""
    critic: str = ""
    """Empty: the model itself; else a Hugging Face folder or checkpoint, or the address of an endpoint."""
    revise_successes: bool = False
    against: Path | None = None
    """An earlier result to compare with."""
    out: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What is saved and shown."""

    model: str
    critic: str
    rounds: int
    samples: int
    scores: tuple[Score, ...]
    generated_tokens: int
    successes: Successes
    subsets: dict[str, str]
    """task id -> subset."""
    contents: dict[str, str]
    """task id -> hash of its problem: two results are compared only where these agree."""
    comparison: tuple[Comparison, ...] = ()
    against: str = ""
    lost: tuple[str, ...] = field(default=())
    """The first few reasons why episodes were dropped."""


def evaluate(request: Request) -> tuple[Result, Path]:
    """Plays the held-out problems and writes eval.json and eval.png; returns the result and its folder.

    Raises ConfigError on a model, task set, critic or earlier result that is not one, before anything is played.
    """
    _check(request)
    run = _run_settings(request.model)
    settings = _settings(request, run)
    out = request.out or (request.model if request.model.is_dir() else request.model.parent) / "eval"
    problems = eval_problems.problems(settings, run, request.on, request.problems)
    earlier = read_result(request.against) if request.against else None
    if earlier is not None:
        _check_pairs(request, problems, earlier)
    with serve.beside(settings, out / "logs") as settings, _model_folder(request.model) as folder:
        played, dropped = _play(request, settings, folder, problems)
    result = _result(request, played, dropped)
    if earlier is not None:
        found = compare(result.successes, earlier.successes, result.subsets)
        result = replace(result, comparison=found, against=earlier.model)
    from icrl_megatron.telemetry.eval_views import picture

    write_atomically(out / RESULT, [json.dumps(asdict(result), indent=1)])
    picture(result, out / PICTURE)
    return result, out


def read_result(path: Path) -> Result:
    """What `evaluate` wrote, given the file or its folder; scores are left out. Raises ConfigError on another file."""
    file = path / RESULT if path.is_dir() else path
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        kept: dict[str, Any] = {
            name: saved[name] for name in ("model", "critic", "rounds", "samples", "successes", "subsets", "contents")
        }
        return Result(scores=(), generated_tokens=int(saved["generated_tokens"]), **kept)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--against={path}: not the result of an `icrl eval` ({error}); give its {RESULT}") from error


def _check(request: Request) -> None:
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


def _check_pairs(request: Request, problems: Sequence[Task], earlier: Result) -> None:
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


def _run_settings(model: Path) -> Settings | None:
    """The settings of the run that a model lies in, if it lies in one. They name commands to start, so those that come
    with somebody else's model or checkpoint, in its own folder, are not read."""
    inside = any((model / name).exists() for name in ("config.json", "icrl.json"))
    for folder in (*(() if inside else (model,)), *model.resolve().parents[:3]):
        if (folder / settings_module.SAVED_NAME).exists():
            return settings_module.load_saved(folder / settings_module.SAVED_NAME)
    return None


def _settings(request: Request, run: Settings | None) -> Settings:
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
        yield model / "hf"
    else:
        from icrl_megatron.actor.convert import export_hf

        root = model / "checkpoints" if (model / "checkpoints").is_dir() else model
        with tempfile.TemporaryDirectory(prefix="icrl_eval_") as temporary:
            export_hf(root, Path(temporary) / "hf")
            yield Path(temporary) / "hf"


def _play(
    request: Request, settings: Settings, folder: Path, problems: Sequence[Task]
) -> tuple[list[Episode], list[DroppedEpisode]]:
    from icrl_megatron.actor import platform
    from icrl_megatron.actor.model import DTYPES
    from icrl_megatron.rollout.local import LocalEngine
    from icrl_megatron.rollout.prompts import Prompter
    from icrl_megatron.train import tokenizer

    platform.prepare(settings.launch.device)
    rollout = replace(settings.rollout, rounds=request.rounds)
    prompter = Prompter(tokenizer(folder), rollout)
    with ExitStack() as open_models:

        def speaker(path: Path) -> Speaker:
            engine = LocalEngine(path, settings.engine, DTYPES[settings.actor.precision], platform.device())
            return EngineSpeaker(engine, rollout.temperature, prompter.stop_ids)

        critic: Speaker | None = None
        if _is_address(request.critic):
            from icrl_megatron.connections import Connections
            from icrl_megatron.rollout.external import ExternalSpeaker, first_model

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
        catalogue = registry.Catalogue(settings.tasks.sources)
        stage = Stage(catalogue.environment, prompter, rollout, revise_successes=request.revise_successes)
        casting = engine_casting(speaker(folder), critic)
        with Progress().phase("evaluation", len(problems) * request.samples) as bar:
            jobs = play(problems, request.samples, stage, casting, SEEDS, on_end=lambda _: bar.advance(1))
            return asyncio.run(jobs)


def _result(request: Request, played: list[Episode], dropped: list[DroppedEpisode]) -> Result:
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
