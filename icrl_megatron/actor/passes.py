"""Runs one micro-batch through the model and the head: the functions that Megatron's schedules call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from icrl_kernels import Chunking, HeadOutput, MainGrad, Streams, Terms, VocabShard, policy_head, score_head
from icrl_megatron.actor.plain_loss import PlainLoss
from icrl_megatron.data.context import BatchShare
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.model.context import gather_whole
from icrl_megatron.model.gpt import PolicyModel, packed_params
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.types import MicroBatch


@dataclass(frozen=True)
class Frozen:
    """Log-probs of one micro-batch's loss tokens under frozen weights, [L] fp32; None if not scored."""

    old_L: Tensor | None = None
    """log pi_old(y|q). None: this pass is the old policy."""
    behaviour_L: Tensor | None = None
    """log pi(y|q,c) by the trainer (`calibration.denominator=recomputed`); None: the engine's log-probs are used."""
    reference_L: Tensor | None = None

    def of(self, batch: MicroBatch) -> Frozen:
        """The log-probs of the loss tokens in a context-parallel rank's share of the micro-batch."""
        if not isinstance(batch, BatchShare):
            return self
        own = torch.from_numpy(batch.loss.own)
        streams = (self.old_L, self.behaviour_L, self.reference_L)
        return Frozen(*[None if of_L is None else of_L.index_select(0, own.to(of_L.device)) for of_L in streams])


@dataclass(frozen=True)
class HeadPlan:
    """The head's inputs besides the tensors."""

    terms: Terms
    shard: VocabShard
    chunking: Chunking
    mismatch_cap: float | None
    """Truncation of the engine-mismatch weight; None: the mismatch is only measured."""
    loss: PlainLoss | None = None
    """None: the fused head computes the objective (`AlgoSettings.fused`)."""


Measure = Callable[[MicroBatch, Frozen, HeadOutput], dict[str, float]]


def head_shard(shape: ModelShape, grid: Grid) -> VocabShard:
    """This rank's columns of the vocabulary; padding columns are outside `valid`."""
    per_rank = shape.padded_vocab(grid.tensor) // grid.tensor
    start = min(grid.tensor_rank * per_rank, shape.vocab)
    group = parallel_state.get_tensor_model_parallel_group() if grid.tensor > 1 else None
    return VocabShard(start, min(per_rank, shape.vocab - start), shape.vocab, group)


def train_pass(model: Any, plan: HeadPlan, batches: list[tuple[MicroBatch, Frozen]], measure: Measure) -> list[Any]:
    """Forward and backward over all micro-batches, or this rank's shares of them; reduces the gradients into the
    model's buffer.

    Returns the result of `measure` for each micro-batch on the last stage; an empty list elsewhere.
    """

    def step(batches_left: Iterator[tuple[MicroBatch, Frozen]], module: Any) -> tuple[Tensor, Any]:
        batch, frozen = next(batches_left)
        return _hidden(module, batch), partial(_loss, batch, frozen, plan, _inner(module), measure)

    return _run(step, model, batches, forward_only=False)


def score_pass(model: Any, plan: HeadPlan, batches: list[MicroBatch]) -> list[Tensor]:
    """Log-probs [L] of each micro-batch's loss tokens, on the last stage; an empty list elsewhere. Given this rank's
    shares, it gathers the log-probs of whole micro-batches, because another prompt divides the tokens differently."""

    def step(batches_left: Iterator[MicroBatch], module: Any) -> tuple[Tensor, Any]:
        batch = next(batches_left)
        return _hidden(module, batch), partial(_scores, batch, plan, _inner(module))

    with torch.no_grad():
        return _run(step, model, batches, forward_only=True)


def _run(step: Callable[..., Any], model: Any, batches: list[Any], forward_only: bool) -> list[Any]:
    longest = max(int((b if isinstance(b, MicroBatch) else b[0]).cu_seqlens[-1]) for b in batches)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=longest,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _inner(module: Any) -> PolicyModel:
    return module.module if hasattr(module, "ddp_config") else module


def _hidden(module: Any, batch: MicroBatch) -> Tensor:
    """[T, 1, H] final hidden states on the last stage (this rank's part of T under sequence parallelism)."""
    device = platform.device()
    cu_seqlens = torch.from_numpy(batch.cu_seqlens).to(device)
    longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
    return module(
        torch.from_numpy(batch.tokens_T).to(device)[None],
        torch.from_numpy(batch.positions_T).to(device)[None],
        None,
        packed_seq_params=packed_params(cu_seqlens, longest, batch.tokens if isinstance(batch, BatchShare) else None),
    )


def _loss_tokens(hidden_T1H: Tensor, batch: MicroBatch, model: PolicyModel) -> Tensor:
    """[L, H] hidden states that predict loss tokens, complete on every tensor-parallel rank.

    Each rank's head gradient covers only its own columns; the regions' backward passes sum it over the ranks.
    """
    index_L = torch.from_numpy(batch.loss_index_L).to(hidden_T1H.device)
    if model.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_T1H[:, 0]).index_select(0, index_L)
    return copy_to_tensor_model_parallel_region(hidden_T1H[:, 0].index_select(0, index_L))


def _loss(
    batch: MicroBatch, frozen: Frozen, plan: HeadPlan, model: PolicyModel, measure: Measure, hidden_T1H: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    hidden_LH = _loss_tokens(hidden_T1H, batch, model)
    streams = _streams(batch, frozen, plan, hidden_LH.device)
    weight_VH = model.head_weight_VH()
    # Megatron does not scale a per-token loss before its backward pass, and neither does this.
    main_grad = MainGrad(weight_VH.main_grad) if hasattr(weight_VH, "main_grad") else None
    if plan.loss is None:
        out = policy_head(hidden_LH, weight_VH, streams, plan.terms, plan.shard, plan.chunking, main_grad)
    else:
        temperature = plan.terms.temperature
        out = plan.loss(hidden_LH, weight_VH, batch, streams, temperature, plan.shard, plan.chunking, main_grad)
    count = torch.tensor(len(batch.targets_L), dtype=torch.int, device=hidden_LH.device)
    return out.loss, count, measure(batch, frozen, out)


def _streams(batch: MicroBatch, frozen: Frozen, plan: HeadPlan, device: torch.device) -> Streams:
    def on_device(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device)

    rollout_L = on_device(batch.rollout_logprobs_L)
    advantages_L, calibrated_L = on_device(batch.advantages_L), on_device(batch.calibrated_L)
    if plan.mismatch_cap is not None:
        # Under the prompt that the engine saw: pi_train from the scoring pass, if that prompt was scored.
        same_prompt_L, trainer_L = on_device(batch.same_prompt_L), _required(frozen.old_L)
        if frozen.behaviour_L is not None:
            trainer_L = torch.where(same_prompt_L, trainer_L, frozen.behaviour_L)
        engine_mismatch_L = (trainer_L - rollout_L).exp().clamp(max=plan.mismatch_cap)
        if frozen.behaviour_L is None:
            # The log-prob under another prompt does not measure engine mismatch; where it is the denominator of w_t,
            # the mismatch is already part of w_t.
            engine_mismatch_L = engine_mismatch_L.masked_fill(~same_prompt_L | calibrated_L, 1.0)
        advantages_L = advantages_L * engine_mismatch_L
    return Streams(
        targets_L=on_device(batch.targets_L),
        coefficients_L=on_device(batch.coefficients_L),
        advantages_L=advantages_L,
        old_logprobs_L=frozen.old_L,
        behaviour_logprobs_L=rollout_L if frozen.behaviour_L is None else frozen.behaviour_L,
        calibrated_L=calibrated_L,
        reference_logprobs_L=frozen.reference_L,
    )


def _required(tensor_L: Tensor | None) -> Tensor:
    if tensor_L is None:
        raise RuntimeError("mismatch correction needs the scoring pass")
    return tensor_L


def _scores(batch: MicroBatch, plan: HeadPlan, model: PolicyModel, hidden_T1H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden_LH = _loss_tokens(hidden_T1H, batch, model)
    targets_L = torch.from_numpy(batch.targets_L).to(hidden_LH.device)
    logprobs_L, _ = score_head(
        hidden_LH, model.head_weight_VH(), targets_L, plan.terms.temperature, plan.shard, plan.chunking
    )
    if isinstance(batch, BatchShare):
        logprobs_L = gather_whole(logprobs_L, batch.loss)
    return hidden_LH.new_zeros(()), torch.tensor(0, dtype=torch.int, device=hidden_LH.device), logprobs_L
