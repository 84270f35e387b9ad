"""A plugin of SGLang (entry point `sglang.srt.plugins`) with what its CPU server lacks for deterministic inference.

Stock SGLang 0.5.23 on a CPU refuses the attention backend torch_native, looks for an accelerator when it sets up
batch-invariant products, and has no sgl_kernel.murmur_hash32_cpu, which turns a request's seed into noise. The plugin
allows the backend, leaves the products alone (requests come one at a time, so no batch varies), and adds the hash.
"""

from __future__ import annotations

import torch

NAME = "cpu_deterministic"
_LOW = 0xFFFFFFFF


def register() -> None:
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *_: None
    torch.library.define("sgl_kernel::murmur_hash32_cpu", "(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    torch.library.impl("sgl_kernel::murmur_hash32_cpu", "CPU", murmur_hash32)


def murmur_hash32(seed_N: torch.Tensor, positions_N: torch.Tensor, columns_M: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits) of (seed, position, column): uint32 [N, M]. `seed_N`: uint64."""
    seeds_N = seed_N.view(torch.int64)
    hashed_NM = torch.zeros(len(seeds_N), len(columns_M), dtype=torch.int64)
    for block in (seeds_N & _LOW, seeds_N >> 32 & _LOW, positions_N.to(torch.int64)):
        hashed_NM = _mix(hashed_NM, block[:, None])
    hashed_NM = _mix(hashed_NM, columns_M.to(torch.int64)[None, :]) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed_NM = (hashed_NM ^ hashed_NM >> shift) * factor & _LOW
    return (hashed_NM ^ hashed_NM >> 16).to(torch.uint32)


def _mix(hashed: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    mixed = hashed ^ _turned(block * 0xCC9E2D51 & _LOW, 15) * 0x1B873593 & _LOW
    return _turned(mixed, 13) * 5 + 0xE6546B64 & _LOW


def _turned(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words << bits | words >> 32 - bits) & _LOW
