"""What the head refuses: a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from icrl_kernels import Chunking, MainGrad, Streams, Terms, VocabShard, policy_head


def good_inputs() -> tuple[Tensor, Tensor, Streams]:
    """Four tokens over a vocabulary of ten."""
    ones_L = torch.ones(4)
    streams = Streams(torch.tensor([1, 3, 5, 9]), ones_L, ones_L, -ones_L, -ones_L, torch.ones(4, dtype=torch.bool))
    return torch.ones(4, 16, dtype=torch.float64), torch.ones(10, 16, dtype=torch.float64), streams


def test_good_inputs_pass() -> None:
    assert policy_head(*good_inputs(), Terms(), VocabShard.whole(10)).loss.isfinite()


BAD = {
    "hidden_LH": lambda h, w, s: (h[0], w, s),
    "weight_VH": lambda h, w, s: (h, w[:, :3], s),
    "weight_VH: expected the dtype": lambda h, w, s: (h, w.float(), s),
    "targets_L: expected torch.int64": lambda h, w, s: (h, w, replace(s, targets_L=s.targets_L.int())),
    "targets_L: expected shape": lambda h, w, s: (h, w, replace(s, targets_L=s.targets_L[:3])),
    "targets_L: expected ids in 0 to 9, got ids from 3 to 10": lambda h, w, s: (
        h,
        w,
        replace(s, targets_L=torch.tensor([3, 10, 5, 6])),
    ),
    "targets_L: expected ids": lambda h, w, s: (h, w, replace(s, targets_L=s.targets_L - 20)),
    "advantages_L: expected numbers, got NaN at 1 of 4": lambda h, w, s: (
        h,
        w,
        replace(s, advantages_L=torch.tensor([0.0, float("nan"), 1.0, 1.0])),
    ),
    "advantages_L: expected finite": lambda h, w, s: (h, w, replace(s, advantages_L=s.advantages_L / 0)),
    "coefficients_L: expected numbers >= 0": lambda h, w, s: (h, w, replace(s, coefficients_L=s.coefficients_L - 2)),
    "old_logprobs_L": lambda h, w, s: (h, w, replace(s, old_logprobs_L=torch.zeros(5))),
    "old_logprobs_L: expected a floating": lambda h, w, s: (h, w, replace(s, old_logprobs_L=s.targets_L)),
    "calibrated_L: expected torch.bool": lambda h, w, s: (h, w, replace(s, calibrated_L=torch.ones(4))),
    "hidden_LH: expected a contiguous tensor": lambda h, w, s: (h.T.contiguous().T, w, s),
    "weight_VH: expected a contiguous tensor": lambda h, w, s: (h, w.T.contiguous().T, s),
    "got behaviour_logprobs_L alone": lambda h, w, s: (h, w, replace(s, calibrated_L=None)),
    "got calibrated_L alone": lambda h, w, s: (h, w, replace(s, behaviour_logprobs_L=None)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    hidden_LH, weight_VH, streams = BAD[message](*good_inputs())
    with pytest.raises(ValueError, match=message):
        policy_head(hidden_LH, weight_VH, streams, Terms(), VocabShard.whole(10))


@pytest.mark.parametrize(
    ("terms", "shard", "chunk", "message"),
    [
        (Terms(kl_coef=0.1), VocabShard.whole(10), 4, "reference_logprobs_L: .*kl_coef is 0.1, got None"),
        (Terms(temperature=0.0), VocabShard.whole(10), 4, "temperature"),
        (Terms(temperature=float("nan")), VocabShard.whole(10), 4, "temperature"),
        (Terms(w_max=-1.0), VocabShard.whole(10), 4, "w_max"),
        (Terms(clip_low=-0.1), VocabShard.whole(10), 4, "clip_low"),
        (Terms(entropy_coef=float("nan")), VocabShard.whole(10), 4, "entropy_coef"),
        (Terms(), VocabShard.whole(11), 4, "shard.valid: expected 0 to 10"),
        (Terms(), VocabShard(4, 10, 12), 4, "shard: expected columns within 0 to 12, got 4 to 14"),
        (Terms(), VocabShard(0, 10, 20), 4, "without a group"),
        (Terms(), VocabShard.whole(10), 0, "chunking.tokens"),
    ],
)
def test_bad_scalars_and_shards_are_named(terms: Terms, shard: VocabShard, chunk: int, message: str) -> None:
    hidden_LH, weight_VH, streams = good_inputs()
    with pytest.raises(ValueError, match=message):
        policy_head(hidden_LH, weight_VH, streams, terms, shard, Chunking(chunk))


@pytest.mark.parametrize(
    ("chunking", "message"),
    [
        (Chunking(backend="cutlass"), "chunking.backend: expected auto or torch or triton, got cutlass"),
        (Chunking(logits="fp8"), "chunking.logits: expected fp32 or bf16, got fp8"),
        (Chunking(logits="bf16"), "chunking.logits: expected fp32 but for triton with bf16 inputs"),
        (Chunking(backend="triton"), "hidden_LH: expected one of torch.float32, torch.bfloat16, got torch.float64"),
    ],
)
def test_ways_that_do_not_exist_or_do_not_fit_are_named(chunking: Chunking, message: str) -> None:
    hidden_LH, weight_VH, streams = good_inputs()
    with pytest.raises(ValueError, match=message):
        policy_head(hidden_LH, weight_VH, streams, Terms(), VocabShard.whole(10), chunking)


def test_kernels_on_a_cpu_need_their_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    hidden_LH, weight_VH, streams = good_inputs()
    with pytest.raises(ValueError, match=r"chunking.backend: expected torch for CPU tensors"):
        policy_head(
            hidden_LH.float(), weight_VH.float(), streams, Terms(), VocabShard.whole(10), Chunking(backend="triton")
        )


def test_a_group_that_is_not_initialised_is_named() -> None:
    hidden_LH, weight_VH, streams = good_inputs()
    shard = VocabShard(0, 10, 20, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shard.group: expected an initialised torch.distributed"):
        policy_head(hidden_LH, weight_VH, streams, Terms(), shard)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(9, 16, dtype=torch.float64), "main_grad: expected the weight's shape"),
        (torch.zeros(10, 16, dtype=torch.float32), "main_grad: expected torch.float64"),
    ],
)
def test_a_main_grad_that_does_not_fit_is_named(buffer: Tensor, message: str) -> None:
    hidden_LH, weight_VH, streams = good_inputs()
    with pytest.raises(ValueError, match=message):
        policy_head(hidden_LH, weight_VH, streams, Terms(), VocabShard.whole(10), main_grad=MainGrad(buffer))
