"""What is reached of the data sheets' peaks. docs/PLANNER.md says where each number is from, and which was fitted."""

from __future__ import annotations

from dataclasses import dataclass

from icrl_megatron.plan.hardware import GIB


@dataclass(frozen=True)
class Constants:
    """Shares of peaks, latencies and fixed costs."""

    training_efficiency: float = 0.5
    """Share of the peak FLOP/s that training and scoring reach without communication and bubbles. MEASURED on one H100:
    Qwen3-4B with full recomputation, 8192 packed tokens, executed FLOPs (docs/GPU.md)."""
    layer_launch_s: float = 3.6e-3
    """Host time of a layer for one micro-batch in one direction, which a GPU cannot be faster than. FITTED to the
    forward passes of Qwen3-1.7B and 4B on that machine, which took 3.6 to 3.8 ms a layer in both."""
    optimizer_bytes: float = 64.0
    """Bytes a parameter that the optimizer step moves, norm and clipping included. FITTED to 1.7B and 4B there."""
    fp8_gain: float = 1.3
    """Assumed: how much faster the layers' products get in FP8, their casts and everything else included."""
    prefill_efficiency: float = 0.5
    """Assumed: share of the peak FLOP/s in an engine's prefill."""
    bandwidth_efficiency: float = 0.8
    """Assumed: share of the memory bandwidth that decoding reaches."""
    link_efficiency: float = 0.75
    """Assumed: share of NVLink's and the network's bandwidth that large collectives reach."""
    decode_overhead_s: float = 3e-3
    """Assumed: an engine's scheduler, sampler and kernel launches, per iteration."""
    all_reduce_latency_s: float = 12e-6
    """Assumed: one small all-reduce inside a node; two a layer in tensor-parallel decoding."""
    hop_latency_s: float = 6e-6
    """Assumed: one step of a ring between GPUs; grows a data-parallel collective by 2 (n - 1) of them a bucket."""
    bucket_parameters: int = 40_000_000
    """Megatron's gradient bucket: max(40 M, 1 M x data-parallel size) parameters."""
    sync_fixed_s: float = 1.0
    """Assumed: waking an engine, versions, checks, and putting it to sleep; once a step."""
    step_fixed_s: float = 1.0
    """Assumed: resetting environments, metrics and dumps; once a step."""
    host_sample_s: float = 1.3e-5
    """Credit, balance and packing, which every rank computes for all samples of a step. MEASURED on two x86-64 cores
    with Python 3.11: CPU seconds a sample of `python tools/bench_balance.py`, 100,000 samples, 1,024 replicas."""

    reserved_bytes: float = 3.0 * GIB
    """Assumed: CUDA contexts of two processes, NCCL's buffers, cuBLAS workspaces."""
    fragmentation: float = 0.05
    """Assumed: share of what the allocator hands out that is lost between blocks."""
    engine_workspace_bytes: float = 2.5 * GIB
    """Assumed: an engine's CUDA graphs and activations while it is awake."""
    engine_asleep_bytes: float = 0.5 * GIB
    """Assumed: what an engine keeps on the GPU while it sleeps."""
    sync_bucket_bytes: float = 1.0 * GIB
    """Assumed: flattened bucket that weights are handed over in, twice."""


CONSTANTS = Constants()
