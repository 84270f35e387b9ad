"""Frees the actor's GPU memory for the engine during rollouts: `actor.offload`.

optimizer: moments and fp32 main weights move to pinned host memory. all: gradients are freed too, without a copy, since
every step begins by zeroing them. Weights stay on the GPU because they are sent to the engine. On an H100, 27.5 GB left
in 0.42 s and returned in 0.46 s; the first time takes 11 s more, for pinning (docs/GPU.md). A CPU run has no second
memory, so only gradients are freed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from icrl_megatron.actor.optimizer import Optimizer


@dataclass
class Offload:
    """`release` and `restore` alternate; repeated calls have no effect."""

    what: str
    """none | optimizer | all."""
    optimizer: Optimizer
    wrapped: Any
    """Megatron's DistributedDataParallel."""
    _homes: list[tuple[Tensor, torch.device]] = field(default_factory=list)
    _sizes: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)
    _released: bool = False

    def release(self) -> None:
        """Frees the device memory."""
        if self.what == "none" or self._released:
            return
        self._released = True
        for tensor in self._states():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
            self._homes.append((tensor, tensor.device))
            tensor.data = host
        if self.what == "all":
            for storage in self._gradients():
                self._sizes.append((storage, storage.nbytes()))
                storage.resize_(0)  # the buffer and its views stay valid, without memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Restores the device memory: states with their values, gradients undefined until they are zeroed."""
        for tensor, device in self._homes:
            tensor.data = tensor.data.to(device)
        for storage, size in self._sizes:
            storage.resize_(size)
        self._homes, self._sizes, self._released = [], [], False

    def _states(self) -> Iterator[Tensor]:
        """Moments, and main weights that are not the parameters themselves, that are on a GPU."""
        inner = self.optimizer.distributed.optimizer
        parameters = {p.untyped_storage().data_ptr() for p in self.wrapped.parameters()}
        mains = [p for group in inner.param_groups for p in group["params"]]
        moments = [t for state in inner.state.values() for name, t in state.items() if name.startswith("exp_avg")]
        for tensor in (*mains, *moments):
            if tensor.is_cuda and tensor.untyped_storage().data_ptr() not in parameters:
                yield tensor

    def _gradients(self) -> list[torch.UntypedStorage]:
        buffers = (*self.wrapped.buffers, *self.wrapped.expert_parallel_buffers)
        return [buffer.grad_data.untyped_storage() for buffer in buffers]
