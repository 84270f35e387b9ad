"""The chunked head in autograd: accumulation, loss scaling, Megatron's main_grad, and activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import WAYS, WIDTH, How, assert_near, make_inputs, put_streams, run_head
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from icrl_kernels import MainGrad, Terms, VocabShard, policy_head

every_way = pytest.mark.parametrize("how", WAYS, ids=str)


@every_way
@pytest.mark.parametrize("into_main_grad", [False, True])
def test_gradients_accumulate_and_scale(how: How, into_main_grad: bool) -> None:
    """Over two micro-batches; rows of the weight beyond the vocabulary get no gradient."""
    terms = Terms(entropy_coef=0.05)
    hidden_LH, weight_VH, streams = make_inputs(24, 45, terms, vocabulary=40)
    _, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, streams, terms, 40, 5, how)
    hidden_LH, weight_VH = how.put(hidden_LH).requires_grad_(), how.put(weight_VH).requires_grad_()
    streams, before = put_streams(streams, how), how.put(torch.randn(45, WIDTH))
    buffer = before.clone()
    for part in (slice(0, 10), slice(10, 24)):
        shard, chunking = VocabShard.whole(40), how.chunking(5)
        main = MainGrad(buffer, scale=3.0) if into_main_grad else None
        loss = policy_head(hidden_LH[part], weight_VH, streams.slice(part), terms, shard, chunking, main).loss
        (loss * 3.0).backward()
    assert hidden_LH.grad is not None and (weight_VH.grad is None) == into_main_grad
    found = weight_VH.grad if weight_VH.grad is not None else buffer - before
    assert_near(hidden_LH.grad.cpu(), 3 * grad_hidden, how.tolerance, how.floor)
    assert_near(found.cpu(), 3 * grad_weight, how.tolerance, how.floor)
    assert not found[40:].any()


def test_a_main_grad_with_another_scale_than_the_loss_is_refused() -> None:
    hidden_LH, weight_VH, streams = make_inputs(4, 10, Terms())
    main = MainGrad(torch.zeros_like(weight_VH), scale=2.0)
    loss = policy_head(hidden_LH.requires_grad_(), weight_VH, streams, Terms(), VocabShard.whole(10), main_grad=main)
    with pytest.raises(RuntimeError, match="scaled"):
        loss.loss.backward()


@every_way
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_does_not_change_gradients(how: How, use_reentrant: bool) -> None:
    terms = Terms()
    inputs_LH, weight_VH, streams = make_inputs(12, 40, terms)
    mix_HH = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shard, streams = VocabShard.whole(40), put_streams(streams, how)

    def gradients(wrapped: bool) -> list[Tensor]:
        leaves = [how.put(t).clone().requires_grad_() for t in (inputs_LH, mix_HH, weight_VH)]

        def loss(x_LH: Tensor, mix_HH: Tensor, weight_VH: Tensor) -> Tensor:
            return policy_head(torch.tanh(x_LH @ mix_HH), weight_VH, streams, terms, shard, how.chunking(5)).loss

        out = checkpoint(loss, *leaves, use_reentrant=use_reentrant) if wrapped else loss(*leaves)
        out.backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    plain, wrapped = gradients(False), gradients(True)
    assert len(plain) == len(wrapped) == 3
    for got, want in zip(wrapped, plain, strict=True):
        assert_near(got, want, min(how.tolerance, 1e-6), how.floor)


@every_way
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("head_is_last", [True, False])
def test_with_checkpointing_a_chunk_is_computed_at_most_twice(
    how: How, use_reentrant: bool, head_is_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MainGrad gets the gradient as often as its docstring says."""
    from icrl_kernels import head

    inputs_LH, weight_VH, streams = make_inputs(40, 30, Terms())
    inputs_LH, weight_VH, streams = how.put(inputs_LH), how.put(weight_VH), put_streams(streams, how)
    make, passes = head.chunks_of, []

    def counted(*args: Any) -> Any:
        chunks = make(*args)
        train = chunks.train
        chunks.train = lambda span, *rest: (passes.append(span.start), train(span, *rest))
        return chunks

    monkeypatch.setattr(head, "chunks_of", counted)

    def added(wrapped: bool) -> Tensor:
        passes.clear()
        leaf_LH, buffer_VH = inputs_LH.clone().requires_grad_(), torch.zeros_like(weight_VH)

        def loss(x_LH: Tensor) -> Tensor:
            shard, main = VocabShard.whole(30), MainGrad(buffer_VH)
            output = policy_head(torch.tanh(x_LH), weight_VH, streams, Terms(), shard, how.chunking(2), main)
            return output.loss if head_is_last else output.loss * torch.ones_like(output.loss)

        (checkpoint(loss, leaf_LH, use_reentrant=use_reentrant) if wrapped else loss(leaf_LH)).backward()
        return buffer_VH

    plain, wrapped = added(False), added(True)
    again = use_reentrant or not head_is_last
    assert all(passes.count(start) == 1 + again for start in range(0, 40, 2))
    assert_near(wrapped, plain * (1 + (again and not use_reentrant)), how.tolerance, how.floor)


def test_gradients_of_bf16_hidden_states_are_scaled_before_rounding() -> None:
    hidden_LH, weight_VH, streams = make_inputs(30, 40, Terms())
    hidden_LH, weight_VH = hidden_LH.bfloat16(), weight_VH.bfloat16()

    def gradient(scale: float) -> Tensor:
        leaf_LH = hidden_LH.clone().requires_grad_()
        (policy_head(leaf_LH, weight_VH, streams, Terms(), VocabShard.whole(40)).loss * scale).backward()
        assert leaf_LH.grad is not None
        return leaf_LH.grad

    assert torch.equal(gradient(1 / 3), (gradient(1.0).float() * (1 / 3)).bfloat16())


def test_a_second_backward_is_refused() -> None:
    hidden_LH, weight_VH, streams = make_inputs(4, 10, Terms())
    loss = policy_head(hidden_LH.requires_grad_(), weight_VH, streams, Terms(), VocabShard.whole(10)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


@every_way
def test_only_required_gradients_are_computed(how: How) -> None:
    terms = Terms()
    hidden_LH, weight_VH, streams = make_inputs(8, 20, terms)
    _, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, streams, terms, 20, 3, how)
    shard, chunking, streams = VocabShard.whole(20), how.chunking(3), put_streams(streams, how)
    hidden_LH, weight_VH = how.put(hidden_LH).clone(), how.put(weight_VH).clone()
    policy_head(hidden_LH.requires_grad_(), weight_VH, streams, terms, shard, chunking).loss.backward()
    policy_head(hidden_LH.detach(), weight_VH.requires_grad_(), streams, terms, shard, chunking).loss.backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    assert torch.equal(hidden_LH.grad.cpu(), grad_hidden) and torch.equal(weight_VH.grad.cpu(), grad_weight)
    with torch.no_grad():
        assert not policy_head(hidden_LH, weight_VH, streams, terms, shard, chunking).loss.requires_grad
