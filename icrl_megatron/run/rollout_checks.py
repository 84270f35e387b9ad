"""Checks of rollout settings before anything heavy is imported. Imports no torch."""

from __future__ import annotations

from icrl_megatron.settings.schema import RolloutSettings, Settings
from icrl_megatron.utils import addresses
from icrl_megatron.utils.errors import ConfigError


def check_rollout(settings: Settings) -> None:
    """Raises ConfigError if partial rollouts or an external critic lack required settings."""
    _check_partial(settings)
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
