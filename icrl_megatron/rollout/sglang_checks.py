"""Does the server hold the weights it was sent? A checksum per parameter, as SGLang's own /weights_checker makes them.

SGLang keeps q, k and v in one parameter, and gate and up in another, each worker with its share (models/qwen3.py), and
pads the vocabulary to a multiple of 64 (layers/vocab_parallel_embedding.py). Its hash on a CPU is the beginning of
SHA-256 over the bytes (managers/mm_utils.py); on a GPU it is a kernel of its own, which this module asks SGLang for.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from icrl_megatron.config import ConfigError
from icrl_megatron.rollout.engine import EngineError

_FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "self_attn.k_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "self_attn.v_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp.gate_proj": ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
    "mlp.up_proj": ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
}
_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Split over the workers by input."""
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64


class Checksums:
    """What the parameters of a server's `workers` must hash to, from Hugging Face tensors in any order.

    A fused parameter is held until its parts are there; nothing else is.
    """

    def __init__(self, workers: int, tied: bool) -> None:
        self.expected: list[dict[str, str]] = [{} for _ in range(workers)]
        self._workers, self._tied = workers, tied
        self._held: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        module = next((m for m in _FUSED if name.endswith(f"{m}.weight")), None)
        if module is None:
            self._put(name, [[part] for part in self._split(name, tensor)])
            return
        fused, parts = _FUSED[module]
        target = name.replace(module, fused)
        held = self._held.setdefault(target, {})
        held[module.split(".")[1]] = tensor.clone()
        if len(held) == len(parts):
            shares = [self._rows(held[part]) for part in parts]
            self._put(target, [[share[w] for share in shares] for w in range(self._workers)])
            del self._held[target]

    def compare(self, answer: dict[str, Any]) -> None:
        """Raises EngineError with the first name that differs, lacks, or was never sent."""
        found = _by_worker(answer)
        if len(found) != self._workers:
            raise EngineError(f"SGLang gave the checksums of {len(found)} workers, not of {self._workers}.")
        for worker, (expected, actual) in enumerate(zip(self.expected, found, strict=True)):
            for name, value in expected.items():
                if name not in actual:
                    raise EngineError(f"The engine has no parameter {name!r}: it computes another model.")
                if actual[name] != value:
                    raise EngineError(
                        f"Worker {worker} of the engine holds other values of {name!r} than it was sent "
                        f"({actual[name]}, not {value}): the weights were not synced whole."
                    )
            alias = {"lm_head.weight"} if self._tied else set()
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


def _hash(parts: list[Tensor]) -> str:
    """As SGLang hashes the parts in one tensor."""
    if parts[0].is_cuda:
        try:
            from sglang.srt.managers.mm_utils import tensor_hash
        except ImportError as error:
            raise ConfigError(
                "Checksums of weights on a GPU need SGLang in the trainer's own environment: install it there"
            ) from error
        return f"{tensor_hash(torch.cat(parts)):016x}"
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _by_worker(answer: dict[str, Any]) -> list[dict[str, str]]:
    """One mapping for each tensor-parallel worker, in their order."""
    try:
        ranks = answer["ranks"]
        placed = [(_tensor_rank(r["parallelism_info"]), r["checksums"]) for r in ranks]
        return [checksums for _, checksums in sorted(placed, key=lambda p: p[0])]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"SGLang's /weights_checker answered {str(answer)[:300]}.") from error


def _tensor_rank(info: Any) -> int:
    one = info[0] if isinstance(info, list) else info
    return int(one["tp_rank"])
