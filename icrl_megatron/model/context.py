"""Tensors of whole micro-batches from the shares of context-parallel ranks."""

from __future__ import annotations

from icrl_megatron.distributed import before_megatron  # noqa: F401

# isort: split
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from icrl_megatron.utils.portions import Portion


def gather_whole(own_N: Tensor, portion: Portion) -> Tensor:
    """The whole array on every context-parallel rank, from each rank's portion along the first dimension.

    The gradient of a portion is the sum over the ranks of their gradients of the whole, so each rank's loss counts only
    its own tokens. Collective over the context-parallel group.
    """
    if portion.longest == 0:  # no rank has anything, and all of them know it
        return own_N
    places = torch.from_numpy(portion.places).to(own_N.device)
    gathered: Tensor = _GatherWhole.apply(own_N, places, portion.longest)
    return gathered


class _GatherWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_N: Tensor, places: Tensor, longest: int) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        ctx.places, ctx.longest, ctx.own, ctx.group = places, longest, len(own_N), group
        padded = own_N.contiguous()
        if len(own_N) < longest:
            padded = torch.cat([own_N, own_N.new_zeros(longest - len(own_N), *own_N.shape[1:])])
        everyone = own_N.new_empty(dist.get_world_size(group) * longest, *own_N.shape[1:])
        dist.all_gather_into_tensor(everyone, padded, group=group)
        return everyone.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        shape = grad_N.shape[1:]
        everyone = grad_N.new_zeros(dist.get_world_size(ctx.group) * ctx.longest, *shape)
        everyone.index_copy_(0, ctx.places, grad_N)
        own = grad_N.new_empty(ctx.longest, *shape)
        dist.reduce_scatter_tensor(own, everyone, group=ctx.group)
        return own[: ctx.own], None, None
