"""Checks SGLang's answer to a request before it is used for training.

Facts about SGLang 0.5.23 are from its managers/tokenizer_manager.py and scheduler_components/output_streamer.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

from icrl_megatron.types import Completion, FinishReason, Ids, id_array, logprob_array

_ANSWER_BYTES, _BYTES_A_TOKEN = 1 << 20, 256
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class GarbageError(ValueError):
    """An answer that cannot be used; the message says why."""


@dataclass(frozen=True)
class UsableAnswer:
    """An answer that can be used."""

    completion: Completion
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were read from the prefix cache."""


def answer_bytes(tokens: int) -> int:
    """Maximum bytes read of an answer with so many new tokens: about five times the size of the tokens with their
    log-probs, plus room for everything else."""
    return _ANSWER_BYTES + _BYTES_A_TOKEN * tokens


def read(text: bytes, longest: int, vocabulary: int, version: int) -> UsableAnswer:
    """`version` is the version of the last weight push; 0 if there was none. A whole reply is generated with it,
    because no request is running when weights change. Raises GarbageError.

    A request that was aborted in SGLang's queue has no counters. It has the tokens generated before SGLang put it back
    into the queue, as far as they were reported (every SGLANG_FORCE_STREAM_INTERVAL tokens), and mostly none.
    """
    try:
        meta = json.loads(text)["meta_info"]
        reason = meta["finish_reason"]
        kind = _REASONS.get(reason["type"] if isinstance(reason, dict) else reason)
        if kind is None:
            raise GarbageError(f"SGLang ended a request for an unknown reason: {str(reason)[:300]}.")
        pairs = meta.get("output_token_logprobs") or ()
        ids, logprobs = tuple(p[1] for p in pairs), tuple(float(p[0]) for p in pairs)
        stamp = meta["weight_version"] if version else version
        read = meta.get("prompt_tokens", 0) if kind == "abort" else meta["prompt_tokens"]
        counted = int(read), int(meta.get("cached_tokens") or 0)
    except GarbageError:
        raise
    except (ValueError, RecursionError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise GarbageError(f"SGLang's answer lacks {error!r}: {text[:300]!r}") from error
    if len(ids) > longest or not (ids or kind == "abort"):
        raise GarbageError(f"SGLang's answer cannot be used: {str(reason)[:300]}, {len(ids)} tokens.")
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < vocabulary]:
        raise GarbageError(f"SGLang's answer has {wrong[0]!r} among its ids: the model has 0..{vocabulary - 1}.")
    if not all(math.isfinite(p) and p <= 1e-6 for p in logprobs):
        raise GarbageError("SGLang gave invalid log-probs (NaN, infinite or positive): check the last weight update.")
    if str(stamp) != str(version):
        raise GarbageError(f"SGLang answered with weights of version {stamp!r}: version {version} was pushed last.")
    return UsableAnswer(Completion(id_array(ids), logprob_array(logprobs), kind, version), *counted)


def ended(reply: Completion, stop_ids: Ids) -> Completion:
    """A reply that was aborted right after its end token has ended and must not continue: SGLang checks for an abort
    first (0.5.23, `Req.update_finish_state`)."""
    if reply.finish_reason == "abort" and len(reply.ids) and int(reply.ids[-1]) in stop_ids:
        return replace(reply, finish_reason="stop")
    return reply
