"""A plan: memory and time of a step, whether it fits, and the cheapest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from icrl_megatron import validate
from icrl_megatron.config import ConfigError, Settings
from icrl_megatron.plan import hardware, memory, timing
from icrl_megatron.plan.calibration import CONSTANTS, Constants
from icrl_megatron.plan.hardware import GIB, GPUS_A_NODE, Gpu
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.workload import Workload, simulate
from icrl_megatron.shape import Qwen3Shape

MOST_GPUS = 8
"""The cheapest change looks at up to this many times the GPUs."""


@dataclass(frozen=True)
class Plan:
    """What a step is expected to take. Predicted, never measured."""

    shape: Qwen3Shape
    gpu: Gpu
    layout: Layout
    work: Workload
    memory: memory.Memory
    times: timing.Times

    @property
    def fits(self) -> bool:
        return self.memory.missing == 0.0

    @property
    def tokens_a_second_a_gpu(self) -> float:
        """Trained tokens, prompts included, over the whole step."""
        return self.work.trained_tokens / self.times.total / self.layout.gpus

    @property
    def training_mfu(self) -> float:
        """Model FLOPs of the update over what the GPUs could have done during it."""
        phases = self.times.phases
        busy = sum(phases[p] for p in ("training", "tensor collectives", "bubbles", "data collectives", "optimizer"))
        return self.times.model_flops / busy / (self.layout.gpus * self.gpu.bf16_flops)


def ranks(settings: Settings) -> int:
    """GPUs that the settings ask for."""
    return settings.launch.ranks * settings.launch.nodes


def plan(settings: Settings, gpus: int | None = None, gpu: Gpu | None = None, constants: Constants = CONSTANTS) -> Plan:
    """The plan of the settings on `gpus` GPUs (as many as they ask for, by default), fitting or not.

    Raises ConfigError for a model of unknown shape and for a grid that cannot be run.
    """
    shape = shape_of(settings)
    count = gpus if gpus is not None else ranks(settings)
    if count > GPUS_A_NODE and count % GPUS_A_NODE:
        raise ConfigError(f"{count} GPUs are not whole nodes of {GPUS_A_NODE}: use a multiple of {GPUS_A_NODE}")
    layout = Layout.of(settings, count).checked(shape, _episodes(settings))
    return of_layout(settings, shape, layout, gpu or hardware.GPUS["h100"], constants)


def of_layout(
    settings: Settings, shape: Qwen3Shape, layout: Layout, gpu: Gpu, constants: Constants = CONSTANTS
) -> Plan:
    """The plan of a layout that `Layout.refusal` has nothing against."""
    if layout.fp8 != "off" and gpu.fp8_flops == 0.0:
        raise ConfigError(f"actor.fp8={layout.fp8}: {gpu.name} has no FP8; use actor.fp8=off or another --gpu")
    work = simulate(settings)
    passes = timing.Passes.of(settings)
    in_flight = round(work.trained_tokens / passes.updates / layout.data / layout.micro_batch_tokens + 0.5)
    held = memory.estimate(shape, layout, settings, gpu, in_flight, constants)
    moved = held.state.moved(layout.offload)
    times = timing.estimate(shape, layout, work, passes, gpu, held.kv_cache, constants, moved)
    return Plan(shape, gpu, layout, work, held, times)


def require_fit(found: Plan, settings: Settings) -> None:
    """Raises ConfigError naming the GPU memory missing, where, and the cheapest change that makes the plan fit."""
    if found.fits:
        return
    phase, peak = found.memory.peak
    raise ConfigError(
        f"this does not fit {found.layout.gpus} x {found.gpu.name}: {phase} needs {peak / GIB:.1f} GiB of a GPU's "
        f"{found.memory.available / GIB:.1f}, {found.memory.missing / GIB:.1f} GiB are missing; "
        f"{cheapest_change(found, settings)}"
    )


def check(settings: Settings) -> None:
    """What `icrl train` does before anything is started: on a machine with GPUs that the planner knows, raises
    ConfigError if the run would not fit them. Does nothing elsewhere."""
    if settings.launch.device == "cpu":
        return
    gpu = hardware.detect()
    if gpu is None:
        return
    shape = shape_of(settings)
    layout = Layout.of(settings, validate.ranks(settings)).checked(shape, _episodes(settings))
    require_fit(of_layout(settings, shape, layout, gpu), settings)


def cheapest_change(found: Plan, settings: Settings) -> str:
    """The change, of one or two settings or of the number of GPUs, that fits with the fewest GPUs and then the shortest
    step, as words that can be typed."""
    best: tuple[int, int, float, str] | None = None
    for words, layout in _changes(found.layout):
        inside_a_rank = settings.engine.kind == "local" and layout.engine_tensor > 1
        if inside_a_rank or layout.refusal(found.shape, _episodes(settings)) is not None:
            continue
        tried = of_layout(settings, found.shape, layout, found.gpu)
        if tried.fits:
            key = (layout.gpus, words.count("="), tried.times.total, words)
            best = key if best is None or key < best else best
    if best is None:
        return f"nothing helps on up to {MOST_GPUS} times the GPUs; take a smaller model or rollout.context_tokens"
    return f"the cheapest change that fits: {best[3]} (a step is then planned to take {best[2]:.0f} s)"


def _changes(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Single changes, then pairs of them, then more GPUs with each."""
    yield from _upto_two(layout)
    factor = 2
    while factor <= MOST_GPUS:
        more = layout.but(gpus=layout.gpus * factor)
        words = f"{more.gpus} GPUs"
        yield words, more
        yield from ((f"{words} with {what}", changed) for what, changed in _upto_two(more))
        factor *= 2


def _upto_two(layout: Layout) -> Iterator[tuple[str, Layout]]:
    for name, once in _single(layout):
        yield name, once
        setting = name.partition("=")[0]
        yield from ((f"{name} {more}", twice) for more, twice in _single(once) if not more.startswith(setting))


def _single(layout: Layout) -> Iterator[tuple[str, Layout]]:
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(layout.recompute) + 1 :]:
        yield f"actor.recompute={mode}", layout.but(recompute=mode)
    kinds = ("none", "optimizer", "all")
    for kind in kinds[kinds.index(layout.offload) + 1 :]:
        yield f"actor.offload={kind}", layout.but(offload=kind)
    for part in (2, 4):
        tokens = layout.micro_batch_tokens // part
        if tokens >= 1024:
            yield f"actor.micro_batch_tokens={tokens}", layout.but(micro_batch_tokens=tokens)
    for size in (2, 4, 8):
        if size > layout.engine_tensor:
            yield f"engine.tensor_parallel={size}", layout.but(engine_tensor=size)
        if size > layout.tensor:
            words = f"actor.tensor_parallel={size}"
            words += "" if layout.sequence_parallel else " actor.sequence_parallel=true"
            yield words, layout.but(tensor=size, sequence_parallel=True)
        if size > layout.pipeline:
            yield f"actor.pipeline_parallel={size}", layout.but(pipeline=size)


def one_line(found: Plan) -> str:
    """What a recipe's docstring says of its plan."""
    held = found.memory
    return (
        f"Planned: {held.phases['train'] / GIB:.0f} GiB of a GPU in training, {held.kv_cache / GIB:.0f} GiB of "
        f"cache in rollouts; {found.times.total:.0f} s a step."
    )


def _episodes(settings: Settings) -> int:
    return settings.rollout.tasks_per_step * settings.rollout.episodes_per_task


def grown(settings: Settings, factor: float) -> Settings:
    """The same run with `factor` times the tasks a step."""
    tasks = max(1, round(settings.rollout.tasks_per_step * factor))
    return replace(settings, rollout=replace(settings.rollout, tasks_per_step=tasks))
