"""`icrl plan --async`: idle GPUs and speed of the synchronous and the asynchronous mode on 8 to 1024 GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from rich.console import Console
from rich.table import Table

from icrl_megatron.model.flops import Passes
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan import timing, workload
from icrl_megatron.plan.async_simulation import (
    EnginePool,
    Group,
    LeadRule,
    SimulatedOutcome,
    SimulatedTurn,
    Trainer,
    simulate,
)
from icrl_megatron.plan.engine_speed import decode_speed, prefill_token_s
from icrl_megatron.plan.hardware import GPUS_A_NODE, Gpu
from icrl_megatron.plan.layout import Layout, kv_bytes_a_token
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.planner import Plan, grown, of_layout, ranks
from icrl_megatron.plan.scaling import GPU_COUNTS, GROUPS
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

STALENESS = (0, 1, 2, 4)
PIECES = 2
"""Requests that an episode's tokens and waits are cut into, equally: the planner's workload does not keep its turns."""
SPLIT_ON = 64
"""GPUs on which the split between engines and trainer is chosen."""
ASSUMED = (
    "simulated, not measured. Workload, decoding, training and weight sync are the planner's (docs/PLANNER.md); the "
    "batch grows with the GPUs. Staleness 0: all GPUs play, then all train. Above 0: actor and engines take turns on "
    "all GPUs (rollout.interleave), or have GPUs of their own (launch.engine_ranks), split as is fastest on "
    f"{SPLIT_ON} GPUs at staleness {STALENESS[-1]}, in whole nodes above {GPUS_A_NODE} GPUs; engines pause for the "
    "whole weight sync and prefill their caches again. Idle: neither training nor an engine with a request, so an "
    "engine that decodes one last request is busy. Weight sync and offloading are idle. Not checked: memory of the "
    "split."
)


@dataclass(frozen=True)
class Prediction:
    """A mode on a number of GPUs. `engine_gpus` are all GPUs if they also train: in the synchronous mode, and with
    `rollout.interleave`."""

    gpus: int
    staleness: int
    engine_gpus: int
    step_s: float
    waited_s: float
    """Seconds of a step in which the trainer waits for groups."""
    idle: float
    """Share of all GPU seconds, in [0, 1]."""
    dropped: float
    """Share of the groups that were begun."""


def engines_of(shape: ModelShape, layout: Layout, gpu: Gpu, cache_tokens: float, episodes: int) -> EnginePool:
    """`episodes`: how many of an engine are played at a time."""
    return EnginePool(
        layout.engines,
        decode_speed(shape, layout, gpu),
        prefill_token_s(shape, layout, gpu),
        layout.serving.most_running,
        episodes,
        cache_tokens,
    )


def groups_of(settings: Settings) -> Callable[[int], Group]:
    """Groups by number; each step's are a workload of the planner with its own seed."""
    tasks = settings.rollout.tasks_per_step

    @lru_cache(maxsize=8)
    def step(number: int) -> tuple[workload.Floats, ...]:
        work = workload.simulate(settings, seed=number)
        columns = (work.generated_E, work.context_E, work.read_E, work.waiting_E + work.calling_E)
        return tuple(column.reshape(-1, work.episodes_a_task) for column in columns)

    def group(number: int) -> Group:
        rows = zip(*(column[number % tasks].tolist() for column in step(number // tasks)), strict=True)
        return tuple(
            (SimulatedTurn(max(1.0, tokens / PIECES), context, read / PIECES, wait / PIECES),) * PIECES
            for tokens, context, read, wait in rows
        )

    return group


def steps_of(staleness: int) -> tuple[int, int]:
    """Steps that are simulated, and those at both ends that do not count: the queue fills, and runs empty."""
    skip = staleness + 1
    return 2 * skip + 3, skip


def _kv_tokens(plan: Plan) -> float:
    return plan.memory.engine.cache / kv_bytes_a_token(plan.shape, plan.layout.engine_tensor, plan.layout.item)


def _run(
    settings: Settings, plan: Plan, staleness: int, engine_gpus: int, times: timing.Times, engines: EnginePool
) -> Prediction:
    gpus = plan.layout.gpus
    colocated = engine_gpus == gpus
    training = sum(s for name, s in times.phases.items() if name not in (*GROUPS["rollout"], "sync", "offload"))
    between = times.phases["sync"] + times.phases["offload"]
    steps, skip = steps_of(staleness)
    trainer = Trainer(settings.rollout.tasks_per_step, training, sync_s=between, on_engine_gpus=colocated)
    out: SimulatedOutcome = simulate(engines, trainer, LeadRule(steps, staleness), groups_of(settings))
    trained_on = gpus if colocated else gpus - engine_gpus
    idle = out.idle(skip, engines.count, engine_gpus // engines.count, trained_on, colocated)
    return Prediction(gpus, staleness, engine_gpus, out.step_s(skip), out.waited_s(skip), idle, out.dropped / out.begun)


def _colocated(settings: Settings, plan: Plan, staleness: tuple[int, ...]) -> list[Prediction]:
    engines = engines_of(plan.shape, plan.layout, plan.gpu, _kv_tokens(plan), settings.rollout.concurrency)
    return [_run(settings, plan, k, plan.layout.gpus, plan.times, engines) for k in staleness]


def _apart(settings: Settings, plan: Plan, staleness: tuple[int, ...], engine_gpus: int) -> list[Prediction]:
    """`plan` is that of all GPUs."""
    shape, gpu, passes = plan.shape, plan.gpu, Passes.of(settings.algo)
    actor = plan.layout.but(gpus=plan.layout.gpus - engine_gpus)
    times = timing.estimate(shape, actor, plan.work, passes, gpu, plan.memory.engine.cache)
    layout = plan.layout.but(gpus=engine_gpus)
    engines = engines_of(shape, layout, gpu, _kv_tokens(plan), settings.rollout.concurrency)
    return [_run(settings, plan, k, engine_gpus, times, engines) for k in staleness]


def splits(gpus: int, layout: Layout) -> list[int]:
    """GPUs that the engines may get, in whole nodes, engines and replicas."""
    unit = GPUS_A_NODE if gpus > GPUS_A_NODE else max(layout.cell, layout.engine_tensor)
    return [e for e in range(unit, gpus, unit) if e % layout.engine_tensor == 0 and (gpus - e) % layout.cell == 0]


def _at(settings: Settings, gpus: int, gpu: Gpu) -> tuple[Settings, Plan]:
    shape, layout = shape_of(settings), Layout.of(settings, gpus)
    bigger = grown(settings, gpus / ranks(settings))
    refusal = layout.refusal(shape, bigger.rollout.tasks_per_step * bigger.rollout.episodes_per_task)
    if refusal or not splits(gpus, layout):
        raise ConfigError(
            f"--async: {gpus} GPUs: {refusal or 'no split between engines and actor'}; change actor.tensor_parallel, "
            "actor.pipeline_parallel or engine.tensor_parallel"
        )
    return bigger, of_layout(bigger, shape, layout, gpu)


def predict(
    settings: Settings, gpu: Gpu, counts_of_gpus: tuple[int, ...] = GPU_COUNTS, split_on: int = SPLIT_ON
) -> list[Prediction]:
    """All modes on each number of GPUs, with the split that is fastest on `split_on`.

    Raises ConfigError for settings that are not simulated, and for numbers of GPUs that the grid cannot use.
    """
    if settings.launch.engine_ranks:
        raise ConfigError(
            f"--async: launch.engine_ranks={settings.launch.engine_ranks}: the simulation chooses the GPUs of engines "
            "itself; set launch.engine_ranks=0"
        )
    if settings.engine.urls or settings.engine.servers or settings.rollout.critic == "frozen":
        raise ConfigError(
            "--async: engine.urls, engine.servers and rollout.critic=frozen are not simulated; leave them out"
        )
    bigger, plan = _at(settings, split_on, gpu)
    tried = [_apart(bigger, plan, STALENESS[-1:], e)[0] for e in splits(split_on, plan.layout)]
    share = min(tried, key=lambda one: one.step_s).engine_gpus / split_on
    found: list[Prediction] = []
    for gpus in counts_of_gpus:
        bigger, plan = _at(settings, gpus, gpu)
        engine_gpus = min(splits(gpus, plan.layout), key=lambda e: abs(e / gpus - share))
        found += _colocated(bigger, plan, STALENESS) + _apart(bigger, plan, STALENESS[1:], engine_gpus)
    return found


def show(found: list[Prediction], console: Console) -> None:
    console.print(ASSUMED, soft_wrap=True)
    table = Table(
        *("GPUs", "staleness", "engines : actor", "step", "of it waited", "idle", "dropped", "speedup"),
        box=None,
        pad_edge=False,
    )
    for one in found:
        base = next(other for other in found if other.gpus == one.gpus and other.staleness == 0)
        split = f"{one.engine_gpus} : {one.gpus - one.engine_gpus}" if one.engine_gpus < one.gpus else "all"
        numbers = f"{one.step_s:.0f} s", f"{max(0.0, one.waited_s):.0f} s", f"{one.idle:.0%}", f"{one.dropped:.1%}"
        table.add_row(str(one.gpus), str(one.staleness), split, *numbers, f"{base.step_s / one.step_s:.2f}")
    console.print(table)
