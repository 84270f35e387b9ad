"""Megatron's distributed optimizer (Adam), with its state in the parameters' own shapes for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from icrl_megatron.distributed.platform import DTYPES
from icrl_megatron.model.gpt import PolicyModel
from icrl_megatron.settings.schema import ActorSettings, OptimSettings

STATES = ("param", "exp_avg", "exp_avg_sq")
"""fp32 tensors kept per parameter: main weight, first and second moment."""


@dataclass(frozen=True)
class Applied:
    """The result of one optimizer step."""

    grad_norm: float
    """Global 2-norm before clipping; if it is inf or NaN, no update was applied."""
    applied: bool


def wrap(model: PolicyModel) -> DistributedDataParallel:
    """Wraps the model with a flat fp32 gradient buffer that is reduce-scattered over the data-parallel and the
    context-parallel ranks."""
    config = model.config
    config.finalize_model_grads_func = _finalize
    return DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), model
    )


def _finalize(model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division: the coefficients of the tokens are already global."""
    finalize_model_grads(model, None, **kwargs)


class Optimizer:
    """Applies optimizer steps with a learning rate chosen by the caller."""

    def __init__(self, model: DistributedDataParallel, actor: ActorSettings, optim: OptimSettings) -> None:
        self.optim = optim
        self.megatron: Any = get_megatron_optimizer(
            OptimizerConfig(
                lr=optim.learning_rate,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                adam_eps=optim.eps,
                clip_grad=optim.clip_grad,
                bf16=actor.precision == "bf16",
                params_dtype=DTYPES[actor.precision],
                use_distributed_optimizer=True,
            ),
            [model],
            use_gloo_process_groups=False,
        )
        self.distributed: Any = self.megatron.chained_optimizers[0]
        self.begun = 0
        """Updates that this process began to apply: if it changed, the weights may have changed."""

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def step(self, learning_rate: float, healthy: bool) -> Applied:
        """Clips and applies the reduced gradients unless they or the loss (`healthy`) are not finite."""
        for group in self.megatron.param_groups:
            # Megatron's scheduler, unused here, sets both; it exempts norms (wd_mult 0), which would decay otherwise.
            group["lr"], group["weight_decay"] = learning_rate, self.optim.weight_decay * group["wd_mult"]
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not (healthy and math.isfinite(norm)):
            return Applied(norm, False)
        if self.optim.clip_grad > 0:
            self.distributed.clip_grad_norm(self.optim.clip_grad)
        self.begun += 1
        self.megatron.step_with_ready_grads()
        return Applied(norm, True)

    @torch.no_grad()
    def read(self, param: torch.nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """(state name, fp32 tensor in the parameter's shape) for each of STATES. Collective over data-parallel
        and context-parallel ranks."""
        shards = self._shards(param)
        span = self.distributed._get_model_param_range_map(param)["param"] if shards else None
        for name in STATES:
            flat = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
            if span is not None:
                flat[span.start : span.end] = shards[name].flatten()
            # Shards do not overlap, so the sum is their concatenation, however buckets divide a parameter.
            dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            yield name, flat.view(param.shape)

    @torch.no_grad()
    def non_finite(self, param: torch.nn.Parameter) -> str:
        """The first of STATES with a NaN or infinity in this rank's shard of the parameter; "" if there is none."""
        for name, shard in self._shards(param).items():
            if shard.numel() and not all(math.isfinite(edge) for edge in torch.aminmax(shard)):
                return name
        return ""

    @torch.no_grad()
    def write(self, param: torch.nn.Parameter, states: dict[str, Tensor]) -> None:
        """Sets this rank's shard and the parameter itself from tensors of the parameter's shape."""
        param.copy_(states["param"])
        shards = self._shards(param)
        if not shards:
            return
        span = self.distributed._get_model_param_range_map(param)["param"]
        for name in STATES:
            shards[name].copy_(states[name].flatten()[span.start : span.end].view_as(shards[name]))

    @torch.no_grad()
    def forget(self) -> None:
        """Zeroes the moments and the update count, as before the first step."""
        for state in self.distributed.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name].zero_()
        self.steps = 0

    @property
    def steps(self) -> int:
        """Number of applied updates."""
        inner = self.distributed.optimizer
        counted = inner.param_groups if self._fused else inner.state.values()
        return max((int(c["step"]) for c in counted if "step" in c), default=0)

    @steps.setter
    def steps(self, value: int) -> None:
        inner = self.distributed.optimizer
        if self._fused:
            # A new optimizer has no count yet; starting at 1 would apply the wrong bias correction to loaded moments.
            for group in inner.param_groups:
                group["step"] = value
        else:
            for state in inner.state.values():
                state["step"] = torch.tensor(float(value))

    @property
    def _fused(self) -> bool:
        """Transformer Engine's and Apex's Adam keep the step in param_groups, torch's in its states."""
        return not isinstance(self.distributed.optimizer, (torch.optim.Adam, torch.optim.AdamW))

    def _shards(self, param: torch.nn.Parameter) -> dict[str, Tensor]:
        """This rank's flat shards of the parameter's states, created as zeros before the first step; {} if it has
        none."""
        if param not in self.distributed.model_param_group_index_map:
            return {}
        group, order = self.distributed.model_param_group_index_map[param]
        main = self.distributed.optimizer.param_groups[group]["params"][order]
        state = self.distributed.optimizer.state[main]
        if "exp_avg" not in state:
            if not self._fused:
                state["step"] = torch.tensor(0.0)
            # On the parameter's device even if the main weight is offloaded: `Offload` restores only what it released.
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(main, device=param.device)
        return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
