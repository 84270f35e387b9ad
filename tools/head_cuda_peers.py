"""Who takes part in tools/bench_head_cuda.py: our head and its peers, on the same inputs, as functions to be timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

for _part in (".", "kernels"):  # without an installation too
    sys.path.insert(0, str(Path(__file__).parents[1] / _part))

from icrl_kernels import (  # noqa: E402
    Chunking,
    MainGrad,
    Streams,
    Terms,
    VocabShard,
    logprob_head,
    policy_head,
    score_head,
    token_objective,
)
from icrl_kernels.chunking import TokenOutputs  # noqa: E402

DEVICE = "cuda"
VOCABULARY = 151936
MODELS = {"Qwen3-4B": 2560, "Qwen3-8B": 4096}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    model: str
    tokens: int
    tensor_parallel: int

    @property
    def hidden(self) -> int:
        return MODELS[self.model]

    @property
    def columns(self) -> int:
        return VOCABULARY // self.tensor_parallel


class Inputs:
    """bf16 hidden states and weight, streams near the policy's own log-probs, and a gradient buffer as Megatron's."""

    def __init__(self, shape: Shape) -> None:
        draw = torch.Generator(DEVICE).manual_seed(0)
        self.shape, self.terms, self.shard = shape, Terms(), VocabShard.whole(shape.columns)
        self.hidden_LH = torch.randn(shape.tokens, shape.hidden, generator=draw, device=DEVICE).bfloat16()
        weight_VH = torch.randn(shape.columns, shape.hidden, generator=draw, device=DEVICE)
        self.weight_VH = weight_VH.mul_(2.0 / shape.hidden**0.5).bfloat16()
        self.targets_L = torch.randint(shape.columns, (shape.tokens,), generator=draw, device=DEVICE)
        own_L, _ = score_head(self.hidden_LH, self.weight_VH, self.targets_L, 1.0, self.shard)

        def around() -> Tensor:
            # So near that no ratio is clipped: a clipped row has no gradient, and only our kernels would skip it.
            return own_L + 0.02 * torch.randn(shape.tokens, generator=draw, device=DEVICE)

        advantages_L = torch.randn(shape.tokens, generator=draw, device=DEVICE)
        coefficients_L = torch.full_like(advantages_L, 1.0 / shape.tokens)
        calibrated_L = torch.rand(shape.tokens, generator=draw, device=DEVICE) > 0.5
        self.streams = Streams(self.targets_L, coefficients_L, advantages_L, around(), around(), calibrated_L)
        self.hidden_LH.requires_grad_()
        self.weight_VH.requires_grad_()

    def clear(self) -> None:
        self.hidden_LH.grad = self.weight_VH.grad = None

    def wrong_by(self, mean_entropy: bool) -> float:
        """Relative error of the gradients that a peer left, against ours of the same loss: the objective, or the mean
        cross entropy. A peer without a gradient of the weight is compared by that of the hidden states."""
        got = [self.hidden_LH.grad, self.weight_VH.grad]
        self.clear()
        nll_L = -logprob_head(self.hidden_LH, self.weight_VH, self.targets_L, 1.0, self.shard)[0]
        if mean_entropy:
            nll_L.mean().backward()
        else:
            token_objective(-nll_L, torch.zeros_like(nll_L), self.streams, self.terms).loss_L.sum().backward()
        want = [self.hidden_LH.grad, self.weight_VH.grad]
        self.clear()
        pairs = [(g, w) for g, w in zip(got, want, strict=True) if g is not None and w is not None]
        if not pairs:
            raise ValueError("it left no gradient")
        return max(relative_error(g, w) for g, w in pairs)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`. It goes by blocks of rows: fp32 copies of all gradients of 16384
    tokens would take 10 GB each."""
    off, size = 0.0, 0.0
    for got_block, want_block in zip(got.split(512), want.split(512), strict=True):
        off += float((got_block.float() - want_block.float()).square().sum())
        size += float(want_block.float().square().sum())
    return float((off / size) ** 0.5)


def eager_loss(logits_LV: Tensor, inputs: Inputs) -> Tensor:
    """As training code without a kernel writes it: fp32 logits, log_softmax, gather, Eq. 6."""
    logprobs_LV = logits_LV.float().log_softmax(-1)
    logprobs_L = logprobs_LV.gather(1, inputs.targets_L[:, None])[:, 0]
    return token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum()


def own_pass(inputs: Inputs, chunking: Chunking) -> Run:
    """Our forward and backward pass, adding to a gradient buffer as Megatron's."""
    main_grad_VH = torch.zeros_like(inputs.weight_VH, dtype=torch.float32)

    def run() -> None:
        policy_head(
            inputs.hidden_LH,
            inputs.weight_VH,
            inputs.streams,
            inputs.terms,
            inputs.shard,
            chunking,
            MainGrad(main_grad_VH),
        ).loss.backward()

    return prepared(run, inputs.clear)


def train_peers(inputs: Inputs) -> dict[str, Run | str]:
    hidden_LH, weight_VH = inputs.hidden_LH, inputs.weight_VH

    def eager() -> None:
        eager_loss(hidden_LH @ weight_VH.T, inputs).backward()

    peers: dict[str, Run | str] = {
        "kernels": own_pass(inputs, Chunking()),
        "kernels, bf16 logits": own_pass(inputs, Chunking(logits="bf16")),
    }
    peers["eager"] = checked(prepared(eager, inputs.clear), inputs)
    for name, make in OTHERS.items():
        peers[name] = optional(lambda make=make: make(inputs))  # type: ignore[misc]
    return peers


def per_token(inputs: Inputs, nll_of: Callable[[], Tensor]) -> Run:
    """Our objective over a peer's cross entropy of each token."""

    def run() -> None:
        logprobs_L = -nll_of().float()
        token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum().backward()

    return checked(prepared(run, inputs.clear), inputs)


def _liger_flce(inputs: Inputs) -> Run:
    """Mean cross entropy, which is less than our objective: it needs no second pass over per-token numbers."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run() -> None:
        liger_fused_linear_cross_entropy(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L).backward()

    return checked(prepared(run, inputs.clear), inputs, mean_entropy=True)


def _liger_scaled(inputs: Inputs) -> Run:
    """Liger's CuTe kernels for Hopper: cross entropy and entropy of each token, at a temperature."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    apply = LigerFusedLinearScaledCrossEntropyFunction.apply

    def nll() -> Tensor:
        found = apply(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L, 1.0)
        return found[0] if isinstance(found, tuple) else found

    return per_token(inputs, nll)


def _cut(inputs: Inputs) -> Run:
    """Cut cross entropy without its gradient filter, which drops small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    def nll() -> Tensor:
        found: Tensor = linear_cross_entropy(
            inputs.hidden_LH, inputs.weight_VH, inputs.targets_L, reduction="none", filter_eps=None
        )
        return found

    return per_token(inputs, nll)


def _quack(inputs: Inputs) -> Run:
    """Mean cross entropy by CuTe kernels for Hopper."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run() -> None:
        chunked_linear_cross_entropy(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L).backward()

    return checked(prepared(run, inputs.clear), inputs, mean_entropy=True)


def _verl(inputs: Inputs) -> Run:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return per_token(
        inputs, lambda: -linear_cross_entropy(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L, 1.0)[0]
    )


OTHERS = {
    "liger FLCE": _liger_flce,
    "liger scaled FLCE": _liger_scaled,
    "cut cross entropy": _cut,
    "quack": _quack,
    "verl": _verl,
}


def score_peers(inputs: Inputs) -> dict[str, Run | str]:
    hidden_LH, weight_VH, targets_L = inputs.hidden_LH, inputs.weight_VH, inputs.targets_L

    def ours(logits: str) -> Run:
        return lambda: score_head(hidden_LH, weight_VH, targets_L, 1.0, inputs.shard, Chunking(logits=logits))

    @torch.no_grad()
    def eager() -> Tensor:
        return (hidden_LH @ weight_VH.T).float().log_softmax(-1).gather(1, targets_L[:, None])

    def liger() -> Run:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        apply = LigerFusedLinearScaledCrossEntropyFunction.apply
        run = torch.no_grad()(lambda: apply(hidden_LH, weight_VH, targets_L, 1.0))
        return scored(inputs, run, lambda found: -(found[0] if isinstance(found, tuple) else found).float())

    return {
        "kernels": ours("fp32"),
        "kernels, bf16 logits": scored(inputs, ours("bf16"), lambda found: found[0]),
        "eager": scored(inputs, eager, lambda found: found[:, 0]),
        "liger scaled FLCE": optional(liger),
    }


def scored(inputs: Inputs, run: Run, logprobs_of: Callable[[Any], Tensor]) -> Run:
    """With the relative error of its log-probs, which `logprobs_of` finds in what it returns."""

    def wrong_by() -> float:
        # Relative to the spread of log-probs: their mean is far from 0 and would hide an error.
        want_L, _ = score_head(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L, 1.0, inputs.shard, Chunking())
        return relative_error(logprobs_of(run()) - want_L.mean(), want_L - want_L.mean())

    return compared(run, "logprob", wrong_by)


def tuning_passes(inputs: Inputs, tokens: int) -> tuple[dict[str, tuple[Run, int]], Tensor]:
    """The two passes over fp32 logits, with the bytes that each moves; and dloss/dlogprob of the tokens."""
    from icrl_kernels.triton_chunks import TritonChunks

    chunks = TritonChunks(inputs.hidden_LH, inputs.weight_VH, 1.0, inputs.shard, tokens, "fp32")
    chunks.buffer_CV.normal_()
    outputs, span = TokenOutputs.empty(inputs.targets_L, torch.float32), slice(0, tokens)
    # These logits are not those of the old log-probs, and a clipped row would be skipped.
    streams = replace(inputs.streams.slice(span), old_logprobs_L=None)
    slopes_4C = chunks.objective(span, streams, inputs.terms, outputs)
    size = tokens * inputs.shape.columns

    def gradients() -> Tensor:
        return chunks.logit_gradients(
            streams.targets_L, outputs.entropy_L[span], slopes_4C, inputs.terms.entropy_coef != 0
        )

    return {
        "statistics": (lambda: chunks.statistics(streams.targets_L), 4 * size),
        "gradients": (gradients, 6 * size),
    }, (slopes_4C[2])


def prepared(run: Run, before: Callable[[], None]) -> Run:
    """With what has to be done before each run, neither timed nor counted as its memory."""
    run.before = before  # type: ignore[attr-defined]
    return run


def checked(run: Run, inputs: Inputs, mean_entropy: bool = False) -> Run:
    """With the relative error of the gradients that it leaves in the inputs."""
    return compared(run, "gradient", lambda: inputs.wrong_by(mean_entropy))


def compared(run: Run, output: str, wrong_by: Callable[[], float]) -> Run:
    """With the relative error of an output against ours, asked for after a run."""
    run.output, run.wrong_by = output, wrong_by  # type: ignore[attr-defined]
    return run


def optional(make: Callable[[], Run]) -> Run | str:
    """The peer, or why there is none: other people's packages fail in ways of their own."""
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
