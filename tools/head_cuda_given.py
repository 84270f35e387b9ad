"""Who takes part in the operation `given` of tools/bench_head_cuda.py: kernels that get logits and return gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from head_cuda_peers import Inputs, Run, compared, eager_loss, optional, prepared, relative_error
from torch import Tensor

from icrl_kernels import Streams, token_objective
from icrl_kernels.chunking import TokenOutputs


def given_peers(inputs: Inputs) -> dict[str, Run | str]:
    """Logits given in bf16. Our kernels overwrite them, so their buffer is filled again before each run, untimed."""
    given = Given(inputs)
    peers: dict[str, Run | str] = {
        "kernels": prepared(lambda: given.gradients(inputs.streams), given.restore),
        "eager": given.peer(lambda z: eager_loss(z, inputs)),
    }
    peers["liger vocab-parallel CE"] = optional(lambda: given.peer(_liger_ce(inputs)))
    peers["liger grpo_loss"] = optional(lambda: given.peer(_liger_grpo(inputs), grpo_streams(inputs)))
    peers["megatron fused CE"] = optional(lambda: given.peer(_megatron_ce(inputs)))
    return peers


class Given:
    """The logits of all tokens in bf16, and our kernels on a copy of them."""

    def __init__(self, inputs: Inputs) -> None:
        from icrl_kernels.triton_chunks import TritonChunks

        self.inputs, tokens = inputs, inputs.shape.tokens
        with torch.no_grad():
            self.logits_LV = inputs.hidden_LH @ inputs.weight_VH.T
        self.chunks = TritonChunks(inputs.hidden_LH, inputs.weight_VH, 1.0, inputs.shard, tokens, "bf16")
        self.outputs = TokenOutputs.empty(inputs.targets_L, torch.float32)

    def restore(self) -> None:
        self.chunks.buffer_CV[:, : self.inputs.shard.valid].copy_(self.logits_LV)

    def gradients(self, streams: Streams) -> Tensor:
        """Of our objective, in the memory of the copy."""
        targets_L, has_entropy = streams.targets_L, self.inputs.terms.entropy_coef != 0
        span = slice(0, targets_L.shape[0])
        slopes_4C = self.chunks.objective(span, streams, self.inputs.terms, self.outputs)
        return self.chunks.logit_gradients(targets_L, self.outputs.entropy_L[span], slopes_4C, has_entropy)

    def peer(self, loss_of: Callable[[Tensor], Tensor], streams: Streams | None = None) -> Run:
        """A peer's loss of the logits by autograd, which is compared with our objective of `streams`."""
        leaf, same = self.logits_LV.detach().requires_grad_(), streams or self.inputs.streams

        def run() -> Tensor | None:
            loss_of(leaf).backward()
            return leaf.grad

        def clear() -> None:
            leaf.grad = None

        def wrong_by() -> float:
            got_LV, rows = leaf.grad, same.targets_L.shape[0]
            if got_LV is None:
                raise ValueError("it left no gradient")
            self.restore()
            try:
                return relative_error(got_LV[:rows], self.gradients(same))
            finally:
                clear()

        return compared(prepared(run, clear), "gradient", wrong_by)


def grpo_streams(inputs: Inputs) -> Streams:
    """GRPO's objective of all tokens but the last, with the advantage of the first, as a case of ours."""
    assert inputs.streams.old_logprobs_L is not None
    old_L, targets_L = inputs.streams.old_logprobs_L[:-1], inputs.targets_L[:-1]
    advantages_L = inputs.streams.advantages_L[:1].expand_as(old_L).contiguous()
    return Streams(targets_L, torch.ones_like(old_L), advantages_L, old_L)


def _liger_ce(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    entropy = LigerVocabParallelCrossEntropy()

    def loss(logits_LV: Tensor) -> Tensor:
        logprobs_L = -entropy(logits_LV[:, None], inputs.targets_L[:, None])[:, 0]
        return token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum()

    return loss


def _liger_grpo(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    same, terms = grpo_streams(inputs), inputs.terms
    old_1L, targets_1L, advantage_1 = same.old_logprobs_L, same.targets_L[None], same.advantages_L[:1]
    assert old_1L is not None
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": terms.clip_low, "eps_high": terms.clip_high}

    def loss(logits_LV: Tensor) -> Tensor:
        # One sequence, with one row of logits more than it has tokens: row i belongs to token i.
        found = triton_grpo_loss(logits_LV[None], old_1L[None], None, targets_1L, advantage_1, inplace=False, **options)
        total: Tensor = found[0].sum()
        return total

    return loss


def _megatron_ce(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    one_rank_group()
    group = parallel_state.get_tensor_model_parallel_group()

    def loss(logits_LV: Tensor) -> Tensor:
        logprobs_L = -fused_vocab_parallel_cross_entropy(logits_LV[:, None], inputs.targets_L[:, None], group)[:, 0]
        return token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum()

    return loss


def one_rank_group() -> None:
    """Megatron's groups, for one process."""
    from megatron.core import parallel_state

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
