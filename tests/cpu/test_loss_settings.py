"""Settings of losses that have no effect, and a user's own loss, are checked before a model is loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from icrl_megatron.run.checks import validate_settings
from icrl_megatron.settings.loading import load
from icrl_megatron.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algo.loss=ppo"], "algo.loss=ppo: choose one of icrl, gspo, cispo"),
        (["algo.loss=nowhere:loss"], "algo.loss=nowhere:loss: No module named 'nowhere'"),
        (["algo.loss=math:pie"], "module 'math' has no attribute 'pie'"),
        (["algo.loss=math:pi"], "algo.loss=math:pi: not a function"),
        (["algo.dual_clip=0.5"], "algo.dual_clip=0.5: must be a finite number, at least 1"),
        (["algo.dual_clip=3", "algo.loss=cispo"], "algo.dual_clip=3 has no effect with algo.loss=cispo"),
        (["algo.dual_clip=3"], "algo.dual_clip=3 has no effect with algo.updates_per_step=1"),
        (["algo.kl_estimator=k1"], "algo.kl_estimator=k1 has no effect without a KL term"),
        (["algo.loss_normalisation=constant"], "and algo.constant_tokens together"),
        (["algo.constant_tokens=64"], "and algo.constant_tokens together"),
        (["algo.overlong.max_tokens=8", "algo.overlong.buffer_tokens=9"], "is more than algo.overlong.max_tokens=8"),
        (["algo.overlong.buffer_tokens=9"], "algo.overlong.buffer_tokens=9 has no effect without"),
        (["algo.overlong.factor=0.5"], "algo.overlong.factor=0.5 has no effect without"),
        (["algo.overlong.max_tokens=8", "algo.overlong.factor=0"], "has no effect with algo.overlong.factor=0"),
        (["algo.overlong.max_tokens=100000"], "the penalty begins above 99999 tokens"),
        (["algo.overlong.max_tokens=600", "rollout.max_turn_tokens=null"], "no reply has more than 512"),
        (
            ["algo.shaping_gamma=0.1", "algo.calibration.enabled=false", "algo.loss=gspo"],
            "algo.shaping_gamma=0.1 is part of ICRL's own objective",
        ),
    ],
)
def test_settings_that_are_invalid_or_have_no_effect_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate_settings(load("rulebook_easy", overrides))


OWN = """
import torch
from icrl_megatron.algo.losses import LossInputs, PolicyTerm

def term(loss_L, inputs, **metrics):
    return PolicyTerm(loss_L, torch.zeros_like(inputs.mask_L), torch.zeros_like(inputs.mask_L), metrics)

def right(inputs, algo):
    return term(-inputs.advantages_L * inputs.logprobs_L - 0.1 * inputs.entropy_L, inputs, entropy=inputs.entropy_L)

def scalar(inputs, algo):
    return term((-inputs.advantages_L * inputs.logprobs_L).mean(), inputs)

def of_the_batch(inputs, algo):
    return term(-(inputs.advantages_L - inputs.advantages_L.mean()) * inputs.logprobs_L, inputs)

def detached(inputs, algo):
    return term(inputs.old_L * inputs.advantages_L, inputs)

def bare(inputs, algo):
    return -inputs.advantages_L * inputs.logprobs_L

def broken(inputs, algo):
    return inputs.rewards_L

def counted(inputs, algo):
    return PolicyTerm(inputs.logprobs_L, inputs.advantages_L, inputs.mask_L)

def averaged(inputs, algo):
    return term(inputs.logprobs_L, inputs, entropy=inputs.entropy_L.mean())
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("right", ""),
        ("scalar", "loss_L must be a tensor with one value per token, got []"),
        ("of_the_batch", "the loss of a sequence changes with the other sequences of its micro-batch"),
        ("detached", "loss_L has no gradient"),
        ("bare", "returns Tensor; it must return a PolicyTerm"),
        ("broken", "fails on an example of two sequences: AttributeError("),
        ("counted", "clipped_low_L must be bool, got torch.float32"),
        ("averaged", "metrics['entropy'] must be a tensor with one value per token, got []"),
    ],
)
def test_a_users_loss_is_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, said: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    settings = load("rulebook_easy", [f"algo.loss=own:{function}"])
    if not said:
        validate_settings(settings)
        return
    with pytest.raises(ConfigError, match=re.escape(f"algo.loss=own:{function}") + ".*" + re.escape(said)):
        validate_settings(settings)


def test_a_module_with_a_syntax_error_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("def loss(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=re.escape("algo.loss=torn:loss: invalid syntax")):
        validate_settings(load("rulebook_easy", ["algo.loss=torn:loss"]))
