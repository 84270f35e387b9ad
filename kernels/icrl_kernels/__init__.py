"""The head of the policy: log-prob, entropy, calibration weight and clipped loss without a [tokens, vocabulary].

`head.policy_head` and `head.score_head` are what the actor calls, `objective.token_objective` is the loss they stand on
(ICRL Eq. 6), and `reference` is the same computation with all logits at once, for tests and benchmarks. `torch_chunks`
computes on CPUs, `triton_chunks` and `triton_kernels` on GPUs; the latter are imported only when they are used.
"""

from __future__ import annotations

from icrl_kernels.chunking import Chunking
from icrl_kernels.head import HeadOutput, MainGrad, policy_head, score_head
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
    "policy_head",
    "reference_head",
    "reference_scores",
    "score_head",
    "token_objective",
]
