"""Checks of rollout settings before anything heavy is imported. Imports no torch."""

from __future__ import annotations

from itertools import pairwise

from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.settings.schema import RolloutSettings, Settings
from icrl_megatron.utils import addresses
from icrl_megatron.utils.errors import ConfigError


def check_rollout(settings: Settings) -> None:
    """Raises ConfigError if partial or asynchronous rollouts or an external critic lack required settings, and if the
    stages of the turn limit are not in order or have no effect."""
    _check_partial(settings)
    _check_staleness(settings)
    _check_turn_stages(settings.rollout)
    _check_external(settings.rollout)


def _check_partial(settings: Settings) -> None:
    rollout = settings.rollout
    if not rollout.partial:
        return
    if rollout.oversample == 1.0:
        raise ConfigError(
            "rollout.partial=true has no effect because no episode is interrupted; set rollout.oversample above 1, "
            "e.g. 1.25"
        )
    if not settings.algo.mismatch_correction.enabled:
        raise ConfigError(
            "rollout.partial=true trains on tokens of older weights: set algo.mismatch_correction.enabled=true, which "
            "weights them by the log-probs they were sampled with"
        )


def _check_staleness(settings: Settings) -> None:
    rollout, engine = settings.rollout, settings.engine
    if not rollout.staleness:
        if rollout.interleave:
            raise ConfigError(
                "rollout.interleave=true has no effect with rollout.staleness=0: every episode ends before the actor "
                "trains; set it to false, or rollout.staleness=1"
            )
        if engine.keep_cache:
            raise ConfigError(
                "engine.keep_cache=true has no effect with rollout.staleness=0: the cache is flushed while the actor "
                "trains; set it to false"
            )
        return
    given = f"rollout.staleness={rollout.staleness}"
    if rollout.oversample > 1.0:
        raise ConfigError(
            f"{given} with rollout.oversample={rollout.oversample:g}: slow episodes already run beside the next steps; "
            "set rollout.oversample=1, or rollout.staleness=0"
        )
    if not settings.algo.mismatch_correction.enabled:
        raise ConfigError(
            f"{given} trains on tokens of older weights: set algo.mismatch_correction.enabled=true, which weights them "
            "by the log-probs they were sampled with"
        )
    if not settings.debug.generates():
        raise ConfigError(f"{given}: debug.mode={settings.debug.mode} plays nothing; use rollout.staleness=0")
    if not engine_kind(engine.kind).pausable:
        raise ConfigError(
            f"{given}: the weights of engine.kind={engine.kind} cannot change while its requests are unfinished; use "
            "engine.kind=sglang, or set rollout.staleness=0"
        )
    if rollout.interleave:
        _check_interleave(settings)
    check_own_gpus(settings, settings.launch.device)


def _check_interleave(settings: Settings) -> None:
    rollout, engine = settings.rollout, settings.engine
    apart = "engine.urls" if engine.urls else "launch.engine_ranks" if settings.launch.engine_ranks else ""
    if apart:
        raise ConfigError(
            f"rollout.interleave=true with {apart}: these engines do not use the actor's GPUs, and need not sleep "
            "while it trains; set it to false"
        )
    if engine.keep_cache:
        raise ConfigError(
            "engine.keep_cache=true with rollout.interleave=true: an engine that sleeps has no cache to keep; set "
            "engine.keep_cache=false"
        )
    if rollout.critic == "frozen":
        raise ConfigError(
            "rollout.interleave=true with rollout.critic=frozen: the requests of a frozen critic are not cut off, so "
            "its engine cannot sleep; set rollout.interleave=false"
        )


def check_own_gpus(settings: Settings, device: str) -> None:
    """Raises ConfigError if, on this device ("cpu", "cuda" or "auto"), the engine of an asynchronous run would need the
    actor's GPUs at the same time as the actor."""
    rollout, engine = settings.rollout, settings.engine
    if not rollout.staleness or device != "cuda":
        return
    if rollout.interleave and engine_kind(engine.kind).gpu_memory(engine) != "a fraction":
        raise ConfigError(
            f"rollout.interleave=true with engine.kind={engine.kind}: it runs in a process of its own, without a GPU; "
            "use engine.kind=sglang, or set rollout.staleness=0 and rollout.interleave=false"
        )
    if not (rollout.interleave or engine.urls or settings.launch.engine_ranks):
        raise ConfigError(
            f"rollout.staleness={rollout.staleness}: the engine would need the GPUs that the actor trains on; give "
            "SGLang some of the GPUs with launch.engine_ranks, name servers on others in engine.urls, let the two take "
            "turns with rollout.interleave=true, or set rollout.staleness=0"
        )


def _check_turn_stages(rollout: RolloutSettings) -> None:
    stages = rollout.turn_stages
    for i, (one, following) in enumerate(pairwise(stages)):
        for name in ("until_step", "turns"):
            low, high = getattr(one, name), getattr(following, name)
            if low >= high:
                raise ConfigError(
                    f"rollout.turn_stages.{i + 1}.{name}={high}: must be more than the {low} of the stage before; "
                    f"raise it, or leave the stage out"
                )
    if stages and stages[0].turns >= rollout.max_turns:
        raise ConfigError(
            f"rollout.turn_stages.0.turns={stages[0].turns} has no effect with rollout.max_turns={rollout.max_turns}: "
            "lower the first, or raise rollout.max_turns"
        )
    if stages and rollout.partial:
        raise ConfigError(
            "rollout.turn_stages with rollout.partial=true: an interrupted attempt could continue under another limit; "
            "set rollout.partial=false or rollout.turn_stages=[]"
        )


def _check_external(rollout: RolloutSettings) -> None:
    external = rollout.external
    if rollout.critic != "external":
        return
    if not external.url.startswith(("http://", "https://")) or not external.model:
        raise ConfigError(
            f"rollout.critic=external needs rollout.external.url and .model (url={external.url!r}, "
            f"model={external.model!r}), e.g. rollout.external.url=http://host:8000/v1"
        )
    addresses.check_base(external.url, "rollout.external.url")
