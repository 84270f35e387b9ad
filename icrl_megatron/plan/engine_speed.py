"""Seconds that an engine decodes and prefills, as the planner and the simulation of asynchronous rollouts use them."""

from __future__ import annotations

from dataclasses import dataclass

from icrl_megatron.model.flops import counts
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan.calibration import CONSTANTS, Constants
from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout, engine_bytes, engine_parameters, kv_bytes_a_token


@dataclass(frozen=True)
class DecodeSpeed:
    """Seconds of one iteration of an engine: the roofline of reading the weights and the cache against the products,
    then a fixed part (tensor-parallel latency and the scheduler)."""

    weights_s: float = 0.0
    cached_s: float = 0.0
    """For each token in the cache."""
    running_s: float = 0.0
    """For each running request."""
    fixed_s: float = 0.0

    def step(self, running: float, cached: float) -> float:
        return max(self.weights_s + cached * self.cached_s, running * self.running_s) + self.fixed_s


def decode_speed(shape: ModelShape, layout: Layout, gpu: Gpu, constants: Constants = CONSTANTS) -> DecodeSpeed:
    tensor, bandwidth = layout.engine_tensor, gpu.memory_bandwidth * constants.bandwidth_efficiency
    latency = 2.0 * shape.layers * constants.all_reduce_latency_s if tensor > 1 else 0.0
    return DecodeSpeed(
        weights_s=engine_bytes(shape, layout) / bandwidth,
        cached_s=kv_bytes_a_token(shape, tensor, layout.item) / bandwidth,
        running_s=2.0 * engine_parameters(shape, tensor) / (gpu.bf16_flops * constants.prefill_efficiency),
        fixed_s=latency + constants.decode_overhead_s,
    )


def prefill_token_s(shape: ModelShape, layout: Layout, gpu: Gpu, constants: Constants = CONSTANTS) -> float:
    """Seconds to prefill one token."""
    flops = 2.0 * shape.layers * counts(shape).layer
    return flops / (layout.engine_tensor * gpu.bf16_flops * constants.prefill_efficiency)
