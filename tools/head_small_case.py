"""A few small passes of the head's kernels, for compute-sanitizer: every kernel, masked tails, splits, all dtypes.

python tools/head_small_case.py [--device cuda|cpu]     (cpu: in Triton's interpreter)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from icrl_kernels import Chunking, Streams, Terms, VocabShard, logprob_head, policy_head, score_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    terms = Terms(temperature=0.9, kl_coef=0.1, entropy_coef=0.1)
    for dtype, logits in ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16")):
        for tokens, columns in ((1, 17), (37, 5003)):
            hidden_LH, weight_VH = (torch.randn(n, 64, device=device).to(dtype) for n in (tokens, columns))
            targets_L = torch.randint(columns, (tokens,), device=device)
            ones_L = torch.ones(tokens, device=device)
            streams = Streams(targets_L, ones_L, ones_L, -ones_L, -ones_L, ones_L > 0, -ones_L)
            shard, chunking = VocabShard.whole(columns), Chunking(16, backend="triton", logits=logits)
            hidden_LH.requires_grad_(), weight_VH.requires_grad_()
            policy_head(hidden_LH, weight_VH, streams, terms, shard, chunking).loss.backward()
            score_head(hidden_LH, weight_VH, targets_L, 0.9, shard, chunking)
            logprobs_L, entropy_L = logprob_head(hidden_LH, weight_VH, targets_L, 0.9, shard, chunking)
            (logprobs_L + entropy_L).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("small cases of the head are done")  # tools/gpu_stages.py looks for it


if __name__ == "__main__":
    main()
