"""The paper's ablations (69.8 with everything), and ours, on the 8B ALFWorld run."""

from __future__ import annotations

from icrl_megatron.settings.schema import Calibration, Settings
from icrl_recipes.qwen3 import icrl


def _everything(name: str) -> Settings:
    """What each of them takes one thing away from."""
    return icrl(name, "8B", "alfworld", gpus=4)


def ablation_no_role_groups() -> Settings:
    """Without role-wise groups, 68.4 in the paper: attempts and critiques of a task share a baseline. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 115 s a step.
    """
    settings = _everything("ablation_no_role_groups")
    settings.algo.group_by = "task"
    return settings


def ablation_no_calibration() -> Settings:
    """Without the calibration weight, 67.8 in the paper. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 115 s a step.
    """
    settings = _everything("ablation_no_calibration")
    settings.algo.calibration = Calibration(enabled=False)
    return settings


def ablation_frozen_critic() -> Settings:
    """With a critic that is never trained; the calibration weight stays. 4 H100.

    Planned: 58 GiB of a GPU in training, 20 GiB of cache in rollouts; 107 s a step.
    """
    settings = _everything("ablation_frozen_critic")
    settings.rollout.critic = "frozen"
    return settings


def ablation_not_internalised() -> Settings:
    """Revisions trained under the prompt with the critique that they were written with. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 115 s a step.
    """
    settings = _everything("ablation_not_internalised")
    settings.algo.internalise = False
    return settings


def ablation_recomputed_denominator() -> Settings:
    """The calibration weight's denominator scored by the trainer instead of taken from the engine. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 124 s a step.
    """
    settings = _everything("ablation_recomputed_denominator")
    settings.algo.calibration = Calibration(denominator="recomputed")
    return settings


def reference_preset() -> Settings:
    """Groups, filters and denominator as in the authors' published code instead of as in the paper. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 124 s a step.
    """
    from icrl_megatron.settings.presets import apply_preset

    settings = _everything("reference_preset")
    settings.algo = apply_preset(settings.algo, "reference")
    return settings
