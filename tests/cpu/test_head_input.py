"""Invalid input of the head: a ValueError names the argument, what was expected and what it got."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_cases import WAYS, How, make_inputs, run_head
from torch import Tensor

from icrl_kernels import Chunking, MainGrad, Streams, Terms, VocabShard, policy_head


def good_inputs() -> tuple[Tensor, Tensor, Streams]:
    """Four tokens over a vocabulary of ten."""
    ones_L = torch.ones(4)
    streams = Streams(torch.tensor([1, 3, 5, 9]), ones_L, ones_L, -ones_L, -ones_L, torch.ones(4, dtype=torch.bool))
    return torch.ones(4, 16, dtype=torch.float64), torch.ones(10, 16, dtype=torch.float64), streams


def test_good_inputs_pass() -> None:
    assert policy_head(*good_inputs(), Terms(), VocabShard.whole(10)).loss.isfinite()


HIDDEN_LH, WEIGHT_VH, STREAMS = good_inputs()
BAD_STREAMS: dict[str, dict[str, Tensor | None]] = {
    "targets_L: expected torch.int64": {"targets_L": STREAMS.targets_L.int()},
    "targets_L: expected shape": {"targets_L": STREAMS.targets_L[:3]},
    "targets_L: expected ids in 0 to 9, got ids from 3 to 10": {"targets_L": torch.tensor([3, 10, 5, 6])},
    "targets_L: expected ids": {"targets_L": STREAMS.targets_L - 20},
    "advantages_L: expected numbers, got NaN at 1 of 4": {"advantages_L": torch.tensor([0.0, torch.nan, 1.0, 1.0])},
    "advantages_L: expected finite": {"advantages_L": STREAMS.advantages_L / 0},
    "coefficients_L: expected numbers >= 0": {"coefficients_L": STREAMS.coefficients_L - 2},
    "old_logprobs_L": {"old_logprobs_L": torch.zeros(5)},
    "old_logprobs_L: expected a floating": {"old_logprobs_L": STREAMS.targets_L},
    "calibrated_L: expected torch.bool": {"calibrated_L": torch.ones(4)},
    "got behaviour_logprobs_L alone": {"calibrated_L": None},
    "got calibrated_L alone": {"behaviour_logprobs_L": None},
}
SHARD = VocabShard.whole(10)
BAD: dict[str, tuple[Tensor, Tensor, Streams]] = {
    "hidden_LH": (HIDDEN_LH[0], WEIGHT_VH, STREAMS),
    "hidden_LH: expected a contiguous tensor": (HIDDEN_LH.T.contiguous().T, WEIGHT_VH, STREAMS),
    "weight_VH": (HIDDEN_LH, WEIGHT_VH[:, :3], STREAMS),
    "weight_VH: expected the dtype": (HIDDEN_LH, WEIGHT_VH.float(), STREAMS),
    "weight_VH: expected a contiguous tensor": (HIDDEN_LH, WEIGHT_VH.T.contiguous().T, STREAMS),
    **{said: (HIDDEN_LH, WEIGHT_VH, replace(STREAMS, **changes)) for said, changes in BAD_STREAMS.items()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_tensors_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_head(*BAD[message], Terms(), SHARD)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (Terms(kl_coef=0.1), "reference_logprobs_L: .*kl_coef is 0.1, got None"),
        (Terms(temperature=0.0), "temperature"),
        (Terms(temperature=float("nan")), "temperature"),
        (Terms(temperature=None), "temperature: expected a finite number above 0, got None"),
        (Terms(temperature="1"), "temperature: expected a finite number above 0, got '1'"),
        (Terms(temperature=1e-39), "temperature: .*float32 can hold, got 1e-39"),
        (Terms(w_max=None), "w_max: expected a number, got None"),
        (Terms(w_max=-1.0), "w_max"),
        (Terms(clip_low=-0.1), "clip_low"),
        (Terms(entropy_coef=float("nan")), "entropy_coef"),
        (VocabShard.whole(11), "shard.valid: expected 0 to 10"),
        (VocabShard(4, 10, 12), "shard: expected columns within 0 to 12, got 4 to 14"),
        (VocabShard(0, 10, 20), "without a group"),
        (VocabShard(0, 10, 20, object()), "shard.group: expected an initialized torch.distributed"),
        (Chunking(0), "chunking.tokens"),
        (Chunking(2.5), "chunking.tokens: expected None or an integer of at least 1, got 2.5"),
        (Chunking(True), "chunking.tokens"),
        (Chunking(backend="cutlass"), "chunking.backend: expected auto or torch or triton, got cutlass"),
        (Chunking(logits="fp8"), "chunking.logits: expected fp32 or bf16, got fp8"),
        (Chunking(logits="bf16"), "chunking.logits: expected fp32 but for triton with bf16 inputs"),
        (Chunking(backend="triton"), "hidden_LH: expected one of torch.float32, torch.bfloat16, got torch.float64"),
        (MainGrad(torch.zeros(9, 16, dtype=torch.float64)), "main_grad: expected the weight's shape"),
        (MainGrad(torch.zeros(10, 16, dtype=torch.float32)), "main_grad: expected torch.float64"),
        (
            MainGrad(torch.zeros(10, 16, dtype=torch.float64, device="meta")),
            "main_grad: expected the device of weight_VH, cpu",
        ),
    ],
)
def test_other_bad_arguments_are_refused(odd: Any, message: str) -> None:
    given = {Terms: Terms(), VocabShard: SHARD, Chunking: Chunking(4), MainGrad: None} | {type(odd): odd}
    with pytest.raises(ValueError, match=message):
        policy_head(*good_inputs(), *given.values())


def test_kernels_on_a_cpu_need_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs, chunking = (HIDDEN_LH.float(), WEIGHT_VH.float(), STREAMS), Chunking(backend="triton")
    with pytest.raises(ValueError, match=r"chunking.backend: expected torch for CPU tensors"):
        policy_head(*inputs, Terms(), SHARD, chunking)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of one rank, with torch.distributed initialized."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    one = dist.new_group([0])
    assert isinstance(one, dist.ProcessGroup)
    yield one
    dist.destroy_process_group()


def test_groups_without_this_rank_and_incomplete_shards_are_refused(group: dist.ProcessGroup) -> None:
    def head(shard: VocabShard) -> Tensor:
        return policy_head(*good_inputs(), Terms(), shard).loss

    assert head(VocabShard(0, 10, 10, group)).isfinite()
    with pytest.raises(ValueError, match=r"shard.valid: expected 20 without a group of more ranks, got 10"):
        head(VocabShard(0, 10, 20, group))
    for without in (object(), "tp", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match=r"shard.group: expected a group that this rank is in, got"):
            head(VocabShard(0, 10, 10, without))  # type: ignore[arg-type]
    dist.destroy_process_group(group)
    with pytest.raises(ValueError, match=r"shard.group: expected a group that this rank is in, got"):
        head(VocabShard(0, 10, 10, group))


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_values_of_tokens_without_loss_are_not_read(how: How) -> None:
    terms = Terms(kl_coef=0.1, entropy_coef=0.05)
    hidden_LH, weight_VH, streams = make_inputs(9, 20, terms)
    streams = replace(streams, coefficients_L=torch.ones(9).index_fill_(0, torch.tensor([2, 5]), 0.0))
    clean = run_head(hidden_LH, weight_VH, streams, terms, 20, 4, how)
    for field in fields(streams):
        stream_L = getattr(streams, field.name)
        if field.name not in ("coefficients_L", "calibrated_L"):
            stream_L[2], stream_L[5] = (-100, 20) if field.name == "targets_L" else (float("nan"), float("inf"))
    poisoned = run_head(hidden_LH, weight_VH, streams, terms, 20, 4, how)
    assert int(poisoned[0].non_finite) == 0 and torch.equal(poisoned[0].loss, clean[0].loss)
    assert bool((poisoned[0].logprobs_L[[2, 5]] == -torch.inf).all())
    assert torch.equal(poisoned[1], clean[1]) and torch.equal(poisoned[2], clean[2])
