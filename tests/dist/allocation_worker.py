"""`torchrun allocation_worker.py FOLDER...` writes to each folder the bytes that every rank holds after an update with
its settings.yaml."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from icrl_megatron.distributed import platform
from icrl_megatron.settings.loading import load_saved


def allocated(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages of the tensors, so that views are not counted twice."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def measure(folder: Path) -> None:
    from megatron.core import parallel_state

    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.distributed import grid as grids

    settings = load_saved(folder / "settings.yaml")
    grid = grids.build(settings)
    actor = Actor(settings, Path(settings.model.path), grid)
    for param in actor.wrapped.parameters():
        param.main_grad.fill_(1e-3)
    assert actor.optimizer.step(1e-6, healthy=True).applied
    distributed = actor.optimizer.distributed
    weights = allocated(actor.wrapped.parameters())
    buffers = [buffer.grad_data for buffer in actor.wrapped.buffers]
    gradients = allocated(buffers)
    mains = [p for group in distributed.optimizer.param_groups for p in group["params"]]
    moments = [v for s in distributed.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    optimizer = {k: v for k, v in allocated([*mains, *moments]).items() if k not in weights}
    found = {name: sum(of.values()) for name, of in (("weights", weights), ("gradients", gradients))}
    found["parameters"] = sum(param.numel() for param in actor.wrapped.parameters())
    found["optimizer"] = sum(optimizer.values())
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    parallel_state.destroy_model_parallel()


def main(folders: list[Path]) -> None:
    platform.prepare("cpu")
    for folder in folders:
        measure(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
