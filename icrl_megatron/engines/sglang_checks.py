"""Verifies that a server holds the weights it was sent, with the checksum per parameter of SGLang's /weights_checker.

SGLang stores q, k and v in one parameter, and gate and up in another, sharded over the workers (models/qwen2.py and
qwen3.py). If there are more workers than key-value heads, several neighboring workers hold the same head
(layers/linear.py: QKVParallelLinear). Servers on a CPU pad these heads instead, which is not supported here. The
vocabulary is padded to a multiple of 64 (layers/vocab_parallel_embedding.py). The hash on a CPU is the beginning of
SHA-256 over the bytes (managers/mm_utils.py). On a GPU it is `word_hash`, reimplemented here in torch so that the
trainer does not need SGLang.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.sglang_server import Server, require_cache
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.utils.errors import ConfigError

_FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "self_attn.k_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "self_attn.v_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp.gate_proj": ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
    "mlp.up_proj": ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
}
_KEYS_VALUES = ("k_proj", "v_proj")
_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Sharded over the workers by input."""
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64
_LOW = 0xFFFFFFFF
_TILE = 8192
"""Words that are hashed to one number."""
_TILES_AT_ONCE = 256
"""8 MiB of a tensor, and several times that of scratch."""


class Checksums:
    """The expected hashes of the parameters of a server's `workers`, computed from Hugging Face tensors in any order.

    The parts of a fused parameter are kept until all of them have arrived. No other tensor is kept.
    """

    def __init__(self, workers: int, shape: ModelShape) -> None:
        self.expected: list[dict[str, str]] = [{} for _ in range(workers)]
        self._workers, self._shape = workers, shape
        self._held: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        module = next((m for m in _FUSED if name.endswith((f"{m}.weight", f"{m}.bias"))), None)
        if module is None:
            self._put(name, [[part] for part in self._split(name, tensor)])
            return
        fused, parts = _FUSED[module]
        target = name.replace(module, fused)
        held = self._held.setdefault(target, {})
        held[module.split(".")[1]] = tensor.clone()
        if len(held) == len(parts):
            shares = [self._heads(held[p]) if p in _KEYS_VALUES else self._rows(held[p]) for p in parts]
            self._put(target, [[share[w] for share in shares] for w in range(self._workers)])
            del self._held[target]

    def compare(self, answer: dict[str, Any]) -> None:
        """Raises EngineError with the first name whose hash differs, that is missing, or that was never sent."""
        found = _by_worker(answer)
        if len(found) != self._workers:
            raise EngineError(f"SGLang returned checksums of {len(found)} workers instead of {self._workers}.")
        for worker, (expected, actual) in enumerate(zip(self.expected, found, strict=True)):
            for name, value in expected.items():
                if name not in actual:
                    raise EngineError(f"The engine has no parameter {name!r}: it runs a different model.")
                if actual[name] != value:
                    raise EngineError(
                        f"Worker {worker} of the engine has other values of {name!r} than it was sent "
                        f"({actual[name]}, not {value}): the weight update is incomplete."
                    )
            alias = {"lm_head.weight"} if self._shape.tied else set()
            extra = sorted(set(actual) - set(expected) - alias)
            if extra:
                raise EngineError(f"The engine's parameter {extra[0]!r} was never sent.")

    def _put(self, name: str, by_worker: list[list[Tensor]]) -> None:
        for worker, parts in enumerate(by_worker):
            self.expected[worker][name] = _hash(parts)

    def _split(self, name: str, tensor: Tensor) -> list[Tensor]:
        if name in _VOCABULARY:
            multiple = _VOCABULARY_MULTIPLE
            if -(-tensor.shape[0] // multiple) * multiple % self._workers:
                multiple *= self._workers
            padding = -tensor.shape[0] % multiple
            return self._rows(torch.nn.functional.pad(tensor, (0, 0, 0, padding)))
        if name.endswith(_COLUMNS):
            return list(tensor.chunk(self._workers, dim=1))
        return [tensor] * self._workers

    def _rows(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(self._workers))

    def _heads(self, tensor: Tensor) -> list[Tensor]:
        """Each worker's rows of a key or value projection."""
        copies = max(1, self._workers // self._shape.kv_heads)
        return [share for share in tensor.chunk(self._workers // copies) for _ in range(copies)]


def _hash(parts: list[Tensor]) -> str:
    """Hashes the parts as SGLang hashes one tensor that contains them."""
    if parts[0].is_cuda:
        return f"{word_hash(torch.cat(parts)):016x}"
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def word_hash(tensor: Tensor) -> int:
    """SGLang's hash of a tensor on a GPU (0.5.23: kernels/ops/memory/gpu_tensor_hash.py), on any device.

    The bytes are 32-bit words. Each word is mixed with its position, under two seeds. The sums over a tile of words,
    mixed again, are the halves of a 64-bit number; the sum of these numbers gets a final mix.
    """
    bytes_ = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(bytes_, (0, -len(bytes_) % 4)).view(torch.int32)
    if len(words) == 0:
        return 0
    seed = 0x243F6A88
    total = 0
    for begin in range(0, len(words), _TILES_AT_ONCE * _TILE):
        span = words[begin : begin + _TILES_AT_ONCE * _TILE].long() & _LOW
        place = torch.arange(begin, begin + len(span), device=words.device)
        high = _tiles(span, place, 0x27D4EB2D, seed, 15, len(words))
        low = _tiles(span, place, 0x165667B1, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & _LOW, 13, len(words))
        total += (sum(high.tolist()) << 32) + sum(low.tolist())
    x = total & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def _tiles(words: Tensor, place: Tensor, factor: int, seed: int, turn: int, count: int) -> Tensor:
    """int64 below 2^32 for each tile of the words, of which the whole tensor has `count`."""
    turned = place << turn | place >> 32 - turn
    mixed = _mix(words ^ (place * factor + seed ^ turned) & _LOW)
    by_tile = torch.nn.functional.pad(mixed, (0, -len(mixed) % _TILE)).view(-1, _TILE)
    return _mix((by_tile.sum(1) ^ 4 * count) & _LOW)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer; the products wrap, and only their low halves count."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _LOW
    x = (x ^ x >> 13) * 0xC2B2AE35 & _LOW
    return x ^ x >> 16


def _by_worker(answer: dict[str, Any]) -> list[dict[str, str]]:
    """One mapping per tensor-parallel worker, in rank order."""
    try:
        ranks = answer["ranks"]
        placed = [(_tensor_rank(r["parallelism_info"]), r["checksums"]) for r in ranks]
        return [checksums for _, checksums in sorted(placed, key=lambda p: p[0])]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"SGLang's /weights_checker answered {str(answer)[:300]}.") from error


def _tensor_rank(info: Any) -> int:
    one = info[0] if isinstance(info, list) else info
    return int(one["tp_rank"])


def require_context(server: Server, context_tokens: int) -> None:
    """Raises ConfigError if an external server allows less than `rollout.context_tokens`."""
    info = server.info()
    allowed = info.get("context_length")
    if isinstance(allowed, int) and allowed < context_tokens:
        raise ConfigError(
            f"rollout.context_tokens={context_tokens}: the server at {server.url} was started with --context-length "
            f"{allowed}; start it with at least {context_tokens + 8}, or lower the setting"
        )
    require_cache(
        info, context_tokens, f"the server at {server.url}", "its --max-total-tokens or --mem-fraction-static"
    )
