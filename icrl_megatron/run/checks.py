"""Checks of a run's settings, files and model before anything heavy is imported. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from icrl_megatron.agents import cache as tool_cache
from icrl_megatron.distributed.job_size import JOB_RANKS, ranks, ranks_on_node
from icrl_megatron.engines import engine_ranks
from icrl_megatron.engines.engine_ranks import EngineRanks
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.model.shape import ModelShape, check_folder
from icrl_megatron.run import conversation_checks as conversations
from icrl_megatron.run import files as run_files
from icrl_megatron.run import start
from icrl_megatron.run.algo_checks import check_algo
from icrl_megatron.run.heldout import check_earlier_rows, check_rows, say_columns
from icrl_megatron.run.resume import check_resume, earlier
from icrl_megatron.run.rollout_checks import check_rollout
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.limits import check_limits
from icrl_megatron.settings.rollout_schema import TEMPLATES
from icrl_megatron.settings.schema import ActorSettings, Settings
from icrl_megatron.settings.task_options import OwnSource, ServedSource, check_unused
from icrl_megatron.settings.task_sections import PORT
from icrl_megatron.settings.values import pasted
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Checked, TaskSet
from icrl_megatron.tasks.datasets import check_no_leak
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError, own_entry


def validate(settings: Settings, installed: bool = True) -> None:
    """Raises ConfigError naming the first wrong setting, file or combination, its value and the remedy.

    Accesses the file system: reads the headers of the model folder, and checks that the run folder can be written.
    `installed`: whether the run will use this Python. Otherwise packages that the run needs are not looked for.
    """
    folder = settings_module.run_folder(settings)
    before = _check_resume(settings, folder)
    start.check(settings)
    validate_settings(settings)
    validate_grid(settings, ranks(settings), ranks_on_node(settings))
    _check_tasks(settings, before)
    done = (folder / run_files.WARM_START / run_files.EXPORT).exists()
    if settings.warm_start.wanted and not done:  # otherwise they are not read
        try:
            conversations.check_files(settings.warm_start)
        except ConfigError as error:
            raise ConfigError(f"warm_start.data: {error}") from error
    if installed:
        check_installed(settings)
    validate_shape(settings, _check_model(settings))
    _check_debug(settings)
    _check_writable(folder)
    run_files.check(settings, folder)


def check_installed(settings: Settings) -> None:
    """Raises ConfigError on a package that the settings need and this Python lacks."""
    engine_kind(settings.engine.kind).check_installed(settings.engine)
    for name in settings.trackers.names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"trackers.names has {name}, which is not installed: pip install 'icrl-megatron[{name}]', or take "
                f"{name} out of trackers.names"
            )


def validate_tasks(settings: Settings) -> None:
    """The part of `validate` for commands that play tasks without a model or a run folder. Raises ConfigError."""
    check_values(settings)
    _check_sources(settings)
    _check_tasks(settings, [])


def _check_resume(settings: Settings, folder: Path) -> list[Settings]:
    """Runs first, so that a combination of settings is checked only if all of them may change. Returns the settings
    that the run has had so far."""
    path = folder / settings_module.SAVED_NAME
    if not path.exists():
        return start.lineage(settings) if settings.start_from else []
    saved = settings_module.load_saved(path)
    check_resume(saved, settings, folder)
    return [*earlier(folder), *start.lineage(settings), saved]


def validate_settings(settings: Settings) -> None:
    """Checks that depend only on the settings, not on files or GPUs. Raises ConfigError."""
    check_values(settings)
    _check_sources(settings)
    _check_servers(settings)
    conversations.check_settings(settings)
    check_algo(settings.algo, settings)
    check_rollout(settings)
    kind = engine_kind(settings.engine.kind)
    engine_ranks.check(settings, kind.own_ranks)
    kind.check(settings)


def validate_shape(settings: Settings, shape: ModelShape) -> None:
    """Checks that a model of this shape can be sharded and used with the settings. Raises ConfigError."""
    _check_split(settings.actor, shape)
    engine_kind(settings.engine.kind).check_shape(settings.engine, shape)
    _check_context(settings, shape)


def check_values(settings: Settings) -> None:
    """Raises ConfigError if a setting has a value outside of its choices or range."""
    engine_kind(settings.engine.kind)
    check_limits(settings)
    if settings.name in ("", ".", "..") or "/" in settings.name or not settings.name.isprintable():
        raise ConfigError(
            f"name={settings.name!r}: must be a plain name, it becomes a folder; run_dir sets a path; e.g. name=run"
        )
    _check_expanded("run_dir", settings.run_dir)
    _check_expanded("tasks.tool_cache.path", settings.tasks.tool_cache.path)


def _check_expanded(name: str, path: str) -> None:
    """Raises ConfigError for a path that would be written, and that a shell was meant to expand."""
    if path.startswith("$") or path.split("/")[0] == "~":
        meant = os.path.expandvars(path.replace("~", "$HOME", 1) if path[0] == "~" else path)
        remedy = f"write {pasted(name, meant)}" if meant[:1] != "$" else f"that variable is not set; leave {name} out"
        raise ConfigError(
            f"{name}={path}: the shell did not replace {path[0]}, so a folder would get that name; {remedy}"
        )


def _check_sources(settings: Settings) -> None:
    sources = settings.tasks.sources
    if not sources:
        raise ConfigError("tasks.sources is empty: name at least one task set, e.g. tasks.sources=[{name: household}]")
    for i, source in enumerate(sources):
        if isinstance(source, OwnSource) and source.judge.engine == "frozen" and settings.rollout.critic != "frozen":
            raise ConfigError(
                f"tasks.sources.{i}.judge.engine=frozen: there is no frozen engine with rollout.critic="
                f"{settings.rollout.critic}; set tasks.sources.{i}.judge.engine=solver, or use a new run with "
                "rollout.critic=frozen"
            )
        if source.name in [other.name for other in sources[:i]]:
            raise ConfigError(f"tasks.sources.{i}.name={source.name}: named twice; name it once and add the weights up")
    from icrl_megatron.run.time_checks import check_times  # lazy: imports aiohttp

    check_times(settings)


def _check_tasks(settings: Settings, before: Sequence[Settings]) -> None:
    problems: dict[Split, list[Task]] = {"train": [], "heldout": []}
    names: list[str] = []
    for i, source in enumerate(settings.tasks.sources):
        with own_entry(i):
            task_set = registry.of_source(source)
            _check_own_name(f"tasks.sources.{i}.name={source.name}", task_set, names)
            for split in SPLITS:
                found = registry.problems(task_set, split)
                problems[split] += found
                if not found:
                    raise ConfigError(f"tasks.sources.{i}.name={source.name}: this task set has no {split} problems")
            say_columns(i, source)
            check_rows(source, source)
            check_earlier_rows(source, before, problems["heldout"])
            served = isinstance(source, ServedSource) and source.served  # checked once the servers run
            if isinstance(task_set, Checked) and not served:
                task_set.check()
    tool_cache.check(settings.tasks.tool_cache)
    check_no_leak(problems["train"], problems["heldout"])
    templates = settings.rollout.templates
    if templates not in TEMPLATES:
        missing = [n for n in ("attempt", "revision", "critique") if not (Path(templates) / f"{n}.jinja").is_file()]
        if missing:
            raise ConfigError(
                f"rollout.templates={templates}: not {', '.join(TEMPLATES)} or a folder with "
                f"{', '.join(f'{n}.jinja' for n in missing)}"
            )


def _check_own_name(given: str, task_set: TaskSet, earlier: list[str]) -> None:
    """Problems, metrics and files have the name of their task set, so two must not have the same."""
    if task_set.name in earlier:
        raise ConfigError(f"{given}: it is called {task_set.name!r}, as another task set of this run is; rename it")
    earlier.append(task_set.name)


def validate_grid(settings: Settings, world: int, on_node: int) -> None:
    """Checks that the settings fit `world` ranks that train, `on_node` of them per node. Raises ConfigError."""
    actor = settings.actor
    cell = actor.tensor_parallel * actor.context_parallel * actor.pipeline_parallel
    source = "launch.ranks"
    if "RANK" in os.environ or JOB_RANKS in os.environ:
        source = "WORLD_SIZE" if "RANK" in os.environ else "nodes x ICRL_RANKS_PER_NODE"
    remedy = f"use {source}={cell} or a multiple of it"
    if settings.launch.engine_ranks:
        source += " without launch.engine_ranks"
        remedy = f"change launch.engine_ranks so that a multiple of {cell} ranks trains"
    if world % cell:
        raise ConfigError(
            f"actor.tensor_parallel={actor.tensor_parallel} x actor.pipeline_parallel={actor.pipeline_parallel} "
            + f"x actor.context_parallel={actor.context_parallel} " * (actor.context_parallel > 1)
            + f"= {cell} does not divide the {world} ranks ({source}); {remedy}"
        )
    if actor.sequence_parallel and actor.tensor_parallel == 1:
        raise ConfigError("actor.sequence_parallel=true needs actor.tensor_parallel > 1; set it to false")
    replicas, tasks = world // cell, settings.rollout.tasks_per_step * settings.rollout.episodes_per_task
    if replicas > tasks:
        raise ConfigError(f"{replicas} replicas share {tasks} episodes a step: raise rollout.tasks_per_step")
    engine_ranks.check_machine(EngineRanks.of(settings, on_node))
    engine_kind(settings.engine.kind).check_ranks(settings, world, on_node)
    if actor.fp8 != "off" and (settings.launch.device == "cpu" or actor.precision != "bf16"):
        raise ConfigError(
            f"actor.fp8={actor.fp8} needs a GPU with FP8 and actor.precision=bf16 "
            f"(launch.device={settings.launch.device}, actor.precision={actor.precision}); use actor.fp8=off"
        )
    if actor.head_logits == "bf16" and (actor.head_backend == "torch" or actor.precision != "bf16"):
        raise ConfigError(
            "actor.head_logits=bf16 needs the triton head and actor.precision=bf16 "
            f"(actor.head_backend={actor.head_backend}, actor.precision={actor.precision}); use actor.head_logits=fp32"
        )


def _check_model(settings: Settings) -> ModelShape:
    model = settings.model
    if settings.start_from:
        return ModelShape.read(start.configuration(settings))
    if model.path:
        folder = settings_module.model_folder(settings)
        return check_folder(folder) if folder == Path(model.path) else ModelShape.read(folder)
    if model.init is None:
        raise ConfigError("model.path is empty: give a Hugging Face folder, model.path=...")
    return ModelShape.of_tiny(model.init)


def _check_split(actor: ActorSettings, shape: ModelShape) -> None:
    """Checks all sharded sizes but the vocabulary, which is padded to a multiple of the TP size."""
    tensor, pipeline = actor.tensor_parallel, actor.pipeline_parallel
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"the model's {shape.kv_heads} key-value heads do not divide its {shape.heads} heads")
    if shape.head_dim % 2:
        raise ConfigError(f"the model's head_dim {shape.head_dim} is odd: rotary embeddings need an even one")
    parts = {"attention heads": shape.heads, "key-value heads": shape.kv_heads, "MLP width": shape.ffn}
    for what, count in parts.items():
        if count % tensor:
            fits = [n for n in range(1, count + 1) if all(c % n == 0 for c in parts.values())]
            raise ConfigError(
                f"actor.tensor_parallel={tensor} does not divide the model's {what} ({count}); {_list(fits)} would do"
            )
    if shape.layers % pipeline:
        fits = [n for n in range(1, shape.layers + 1) if shape.layers % n == 0]
        raise ConfigError(
            f"actor.pipeline_parallel={pipeline} does not divide the model's {shape.layers} layers; {_list(fits)} fit"
        )


def _check_context(settings: Settings, shape: ModelShape) -> None:
    rollout = settings.rollout
    if rollout.context_tokens > shape.max_positions:
        raise ConfigError(
            f"rollout.context_tokens={rollout.context_tokens}: the model has {shape.max_positions} positions; use at "
            "most that many, or extend the model with YaRN (docs/MODELS.md)"
        )
    longest = settings.warm_start.max_tokens
    if settings.warm_start.wanted and longest is not None and longest > shape.max_positions:
        raise ConfigError(
            f"warm_start.max_tokens={longest}: the model has {shape.max_positions} positions; use at most that many"
        )
    for name in ("max_turn_tokens", "max_critique_tokens"):
        limit = getattr(rollout, name)
        if limit is not None and limit >= rollout.context_tokens:
            raise ConfigError(
                f"rollout.{name}={limit} leaves no room for a prompt within "
                f"rollout.context_tokens={rollout.context_tokens}; lower it"
            )


def _check_debug(settings: Settings) -> None:
    settings.telemetry.episodes()  # raises ConfigError if it is invalid
    debug = settings.debug
    if debug.mode == "from_dump":
        if not debug.dump:
            raise ConfigError("debug.mode=from_dump needs debug.dump=RUN, the folder of a run whose rollouts are read")
        if not Rollouts(debug.dump).steps:
            raise ConfigError(f"debug.dump={debug.dump}: no rollouts/rank_*.jsonl there; give the folder of a run")
    elif debug.dump:
        raise ConfigError(f"debug.dump={debug.dump} needs debug.mode=from_dump; leave debug.dump empty")


def _check_writable(folder: Path) -> None:
    """Tries to write: permission bits do not apply to root, nor on a full or read-only file system."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"run folder {folder} cannot be written ({error.strerror}: {existing}); choose another with run_dir=..."
        ) from error


def _list(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers[:6]))


def _check_servers(settings: Settings) -> None:
    """Raises ConfigError if the command of an environment server cannot work (`tasks.sources[...].serve`), or if there
    is none and other settings of servers are given."""
    for i, source in enumerate(settings.tasks.sources):
        if not isinstance(source, ServedSource):
            continue
        if not source.serve.command:
            check_unused(source, ["serve"], "without serve.command")
            continue
        serve, name = source.serve, f"tasks.sources.{i}.serve"
        if serve.port + serve.count > 65536:
            raise ConfigError(f"{name}.port={serve.port}: leave room for {serve.count} ports, up to 65535")
        if not serve.health.startswith("/"):
            raise ConfigError(f"{name}.health={serve.health}: must be a path, e.g. / or /health")
        if PORT not in serve.command and (serve.port == 0 or serve.count > 1):
            raise ConfigError(
                f"{name}.command={serve.command}: write {PORT} where the port belongs, or set {name}.port and count=1"
            )
