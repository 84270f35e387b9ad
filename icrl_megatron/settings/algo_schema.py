"""Settings of the algorithm: credit, calibration and loss (arXiv 2605.15224)."""

from __future__ import annotations

from dataclasses import dataclass, field

from icrl_megatron.settings.allowed import chosen, limited


@dataclass
class Calibration:
    enabled: bool = True
    """Weight the tokens of internalized revisions by w_t."""
    denominator: str = chosen("rollout", "rollout", "recomputed")
    """rollout: pi(y|q,c) from the engine's log-probs; recomputed: scored by the trainer (one more frozen pass)."""
    w_max: float = limited(2.0, 1e-06)
    """Largest w_t."""


@dataclass
class MismatchCorrection:
    enabled: bool = False
    """Weight tokens by pi_train / pi_engine."""
    cap: float = limited(2.0, 1e-06)
    """pi_train / pi_engine under the same prompt, truncated here, multiplies the token's loss."""


@dataclass
class GroupFilter:
    """Reference preset: drops critique and revision groups that look hopeless."""

    enabled: bool = False
    """Whether groups are dropped."""
    min_mean_reward: float = limited(0.3, -1, 1)
    """Groups with a lower mean reward are dropped."""


@dataclass
class Overlong:
    """DAPO's soft punishment of long replies (arXiv 2503.14476, Eq. 13), taken off the reward before advantages."""

    max_tokens: int | None = limited(None, 1)
    """Generated tokens of a sample at which the whole penalty applies; null: none."""
    buffer_tokens: int = limited(1, 1)
    """The penalty grows linearly over this many tokens before `max_tokens`."""
    factor: float = limited(1.0, 0)
    """The whole penalty."""


@dataclass
class AlgoSettings:
    preset: str = chosen("paper", "paper", "reference")
    """paper | reference: a bundle of the values below; explicit overrides win over it."""
    group_by: str = chosen("task_role", "task_role", "task_round_role", "task")
    """task_role (paper Eq. 5) | task_round_role (reference) | task (no role groups: an ablation)."""
    normalise_std: bool = True
    """Divide advantages by the group's standard deviation (paper Eq. 5)."""
    pseudo_positive: bool = False
    """Adds one pseudo sample of reward 1 to each group before mean and deviation are taken (reference)."""
    group_filter: GroupFilter = field(default_factory=GroupFilter)
    internalise: bool = True
    """Train revisions under the critique-free prompt. False: under the prompt they were written with (an ablation)."""
    calibration: Calibration = field(default_factory=Calibration)
    revisions_per_task: int | None = limited(None, 1)
    """At most this many revisions of a task are trained, the best of them (Critique-GRPO's code: 1); null: all."""
    shaping_gamma: float = limited(0.0, 0)
    """Above 0, internalised revisions count p / (p + shaping_gamma) a token, unclipped, instead of w_t times the
    clipped ratio (Critique-GRPO's policy shaping, which takes 0.1); calibration.enabled must then be false."""
    mismatch_correction: MismatchCorrection = field(default_factory=MismatchCorrection)
    loss: str = "icrl"
    """icrl | gspo | cispo, or package.module:function (algo/losses.py, docs/EXTENDING.md)."""
    clip_low: float = limited(0.2, 0, 1)
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = limited(0.28, 0)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]: of a token, and with loss=gspo of a sequence (the paper
    takes 3e-4 and 4e-4)."""
    dual_clip: float | None = limited(None, 1)
    """Largest ratio that counts where the advantage is negative (arXiv 1912.09729, which takes 3), with loss=icrl or
    gspo; null: no bound."""
    kl_coef: float = limited(0.0, 0)
    """Weight of the KL term to the starting weights."""
    kl_estimator: str = chosen("k3", "k1", "k2", "k3")
    """k1 | k2 | k3: how the KL term is estimated from the sampled tokens."""
    entropy_coef: float = limited(0.0, 0)
    """Weight of the entropy bonus."""
    loss_normalisation: str = chosen("sequence_mean", "sequence_mean", "token_mean", "constant")
    """sequence_mean | token_mean | constant (the sum over `constant_tokens` times the sequences: Dr. GRPO, with
    normalise_std=false)."""
    constant_tokens: int | None = limited(None, 1)
    """With loss_normalisation=constant: the same length for all sequences, such as the longest reply allowed."""
    overlong: Overlong = field(default_factory=Overlong)
    updates_per_step: int = limited(1, 1)
    """Optimizer updates made from one step's samples."""
    max_resamples: int = limited(4, 0)
    """Times a batch without any signal is drawn again."""
    dynamic_sampling: bool = False
    """Draw more tasks, up to max_resamples times, until rollout.tasks_per_step of them have a group whose rewards
    differ, and train on those alone (DAPO, arXiv 2503.14476)."""
    on_no_signal: str = chosen("error", "error", "skip", "train")
    """After that: error (ends the run and names the tasks) | skip (no update, and the step is counted: for baselines
    that may find nothing) | train (update anyway: the entropy and KL terms still act)."""

    def fused(self) -> bool:
        """Whether the fused head computes this objective. Every other one goes through the head that recomputes its
        logits in the backward pass (docs/KERNEL.md)."""
        return self.loss == "icrl" and self.kl_estimator == "k3" and self.dual_clip is None
