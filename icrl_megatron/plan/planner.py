"""A plan: memory and time of a step, whether it fits, and the cheapest change that makes it fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from icrl_megatron.distributed import job_size
from icrl_megatron.model.flops import Passes
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan import hardware, memory, timing
from icrl_megatron.plan.changes import KINDS, MOST_GPUS, changes
from icrl_megatron.plan.hardware import GIB, Gpu
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.supervised import supervised
from icrl_megatron.plan.workload import Workload, simulate
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """What a step is expected to take. Predicted, never measured."""

    shape: ModelShape
    gpu: Gpu
    layout: Layout
    work: Workload
    memory: memory.Memory
    times: timing.Times

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def tokens_a_second_a_gpu(self) -> float:
        """Trained tokens, prompts included, over the whole step."""
        return self.work.trained_tokens / self.times.total / self.layout.all_gpus

    @property
    def training_mfu(self) -> float:
        """Model FLOPs of the update over what the GPUs could have done during it."""
        return self.times.model_flops / self.times.update / (self.layout.gpus * self.gpu.bf16_flops)


def ranks(settings: Settings) -> int:
    """GPUs that the settings ask for, those of engine ranks included."""
    return settings.launch.ranks * settings.launch.nodes


def plan(settings: Settings, gpus: int | None = None, gpu: Gpu | None = None) -> Plan:
    """The plan of the settings on `gpus` GPUs (as many as they ask for, by default), fitting or not.

    Raises ConfigError for a model of unknown shape and for a grid that cannot be run.
    """
    shape = shape_of(settings)
    count = gpus if gpus is not None else ranks(settings)
    layout = Layout.of(settings, count).checked(shape, episodes(settings))
    return of_layout(settings, shape, layout, gpu or hardware.GPUS["h100"])


def of_layout(settings: Settings, shape: ModelShape, layout: Layout, gpu: Gpu) -> Plan:
    """The plan of a layout that `Layout.refusal` has nothing against."""
    return timed(settings, shape, layout, gpu, memory_of(settings, shape, layout, gpu))


def memory_of(settings: Settings, shape: ModelShape, layout: Layout, gpu: Gpu) -> memory.Memory:
    """The memory alone, which most of the layouts that are tried fall by, and which costs no time to work out."""
    if layout.fp8 != "off" and gpu.fp8_flops == 0.0:
        raise ConfigError(f"actor.fp8={layout.fp8}: {gpu.name} has no FP8; use actor.fp8=off or another --gpu")
    tokens = simulate(settings).trained_tokens
    updates = Passes.of(settings.algo).updates
    in_flight = round(tokens / updates / layout.data / layout.micro_batch_tokens + 0.5)
    return memory.estimate(shape, layout, settings, gpu, in_flight)


def timed(settings: Settings, shape: ModelShape, layout: Layout, gpu: Gpu, held: memory.Memory) -> Plan:
    """The plan of a layout whose memory is known."""
    work, passes, moved = simulate(settings), Passes.of(settings.algo), held.state.moved(layout.offload)
    times = timing.estimate(shape, layout, work, passes, gpu, held.engine.cache, moved_bytes=moved)
    return Plan(shape, gpu, layout, work, held, times)


def require_fit(found: Plan, settings: Settings) -> None:
    """Raises ConfigError naming the GPU memory missing, where, and the cheapest change that makes the plan fit. Also
    raises if supervised training before RL does not fit."""
    if found.fits:
        stage = supervised(settings, found.shape, found.layout, found.gpu)
        if stage is not None:
            stage.require_fit()
        return
    if found.memory.engine.refusal:
        raise ConfigError(found.memory.engine.refusal)
    phase, peak = found.memory.peak
    raise ConfigError(
        f"this does not fit {found.layout.all_gpus} x {found.gpu.name}: {phase} needs {peak / GIB:.1f} GiB of a GPU's "
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
    training, on_node = job_size.ranks(settings), job_size.ranks_on_node(settings)
    serving = settings.launch.engine_ranks
    total = training + serving * (training // on_node)
    layout = Layout.of(settings, total, on_node + serving).checked(shape, episodes(settings))
    require_fit(of_layout(settings, shape, layout, gpu), settings)


def cheapest_change(found: Plan, settings: Settings) -> str:
    """The change, of one or two settings or of the number of GPUs, that fits with the fewest GPUs, then the fewest
    settings, then the shortest step, as words that can be typed."""
    best: tuple[int, int, float, str] | None = None
    for words, layout in changes(found.layout):
        cost = (layout.all_gpus, words.count("="))
        if (best is not None and cost > best[:2]) or layout.refusal(found.shape, episodes(settings)) is not None:
            continue
        held = memory_of(settings, found.shape, layout, found.gpu)
        if held.fits:
            seconds = timed(settings, found.shape, layout, found.gpu, held).times.total
            best = min(filter(None, (best, (*cost, seconds, words))))
    if best is None:
        return (
            f"no one or two changes of {KINDS} help on up to {MOST_GPUS} times the GPUs (more at once were not "
            "tried); take a smaller model or rollout.context_tokens"
        )
    return f"the cheapest change that fits: {best[3]} (a step is then planned to take {best[2]:.0f} s)"


def one_line(found: Plan) -> str:
    """What `icrl recipes` prints about a plan."""
    held = found.memory
    return (
        f"Planned: {held.phases['train'] / GIB:.0f} GiB of a GPU in training, {held.engine.cache / GIB:.0f} GiB of "
        f"cache in rollouts; {found.times.total:.0f} s a step."
    )


def episodes(settings: Settings) -> int:
    """Number of episodes that a step trains on."""
    return settings.rollout.tasks_per_step * settings.rollout.episodes_per_task


def grown(settings: Settings, factor: float) -> Settings:
    """The same run with `factor` times the tasks a step."""
    tasks = max(1, round(settings.rollout.tasks_per_step * factor))
    return replace(settings, rollout=replace(settings.rollout, tasks_per_step=tasks))
