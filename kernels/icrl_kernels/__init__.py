"""The policy head: log-prob, entropy, calibration weight and clipped loss without a [tokens, vocabulary] tensor.

The actor calls `head.policy_head`, which implements ICRL's objective (`objective.token_objective`, Eq. 6),
`head.score_head` without gradients, and `logprobs.logprob_head` for any other loss. `reference` is the same computation
with all logits at once, for tests and benchmarks. `torch_chunks` runs on CPUs, `triton_chunks` and `triton_kernels` on
GPUs; the latter are imported only when they are used.
"""

from __future__ import annotations

from icrl_kernels.chunking import Chunking
from icrl_kernels.head import HeadOutput, MainGrad, policy_head, score_head
from icrl_kernels.logprobs import logprob_head
from icrl_kernels.objective import Streams, Terms, TokenObjective, token_objective
from icrl_kernels.reference import reference_head, reference_scores
from icrl_kernels.vocabulary import VocabShard

__all__ = [
    "Chunking",
    "HeadOutput",
    "MainGrad",
    "Streams",
    "Terms",
    "TokenObjective",
    "VocabShard",
    "logprob_head",
    "policy_head",
    "reference_head",
    "reference_scores",
    "score_head",
    "token_objective",
]
