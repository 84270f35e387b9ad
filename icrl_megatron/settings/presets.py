"""The two published presets of the algorithm's settings."""

from __future__ import annotations

from dataclasses import replace

from icrl_megatron.settings.algo_schema import AlgoSettings, GroupFilter, MismatchCorrection
from icrl_megatron.utils.errors import ConfigError


def apply_preset(settings: AlgoSettings, name: str) -> AlgoSettings:
    """A copy of `settings` with one preset's grouping and weights; all else stays. Raises ConfigError on the name.

    paper: groups by task and role (Eq. 5), no pseudo sample, no filter, mismatch measured only.
    reference: groups by task, round and role with a pseudo sample of reward 1, hopeless critique and revision groups
    dropped, and one truncated weight on all samples: calibration against the engine's log-probs for revisions, the
    engine mismatch with the same cap for all others.
    """
    rollout = replace(settings.calibration, enabled=True, denominator="rollout", w_max=2.0)
    if name == "paper":
        return replace(
            settings,
            preset=name,
            group_by="task_role",
            normalise_std=True,
            pseudo_positive=False,
            group_filter=replace(settings.group_filter, enabled=False),
            internalise=True,
            calibration=rollout,
            mismatch_correction=replace(settings.mismatch_correction, enabled=False),
        )
    if name == "reference":
        return replace(
            settings,
            preset=name,
            group_by="task_round_role",
            normalise_std=True,
            pseudo_positive=True,
            group_filter=GroupFilter(enabled=True, min_mean_reward=0.3),
            internalise=True,
            calibration=rollout,
            mismatch_correction=MismatchCorrection(enabled=True, cap=rollout.w_max),
        )
    raise ConfigError(f"algo.preset is {name!r}: choose paper or reference.")
