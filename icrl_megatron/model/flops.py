"""Parameters and floating-point operations of a dense decoder, from its shape alone: what the planner predicts times
from, and what balances samples over replicas. Imports no torch. docs/PLANNER.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.algo_schema import AlgoSettings
from icrl_megatron.settings.schema import Settings


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, by part of the model."""

    layer: int
    linear: int
    """Parameters of a layer's matrices, without norms and biases."""
    norms: int
    """Parameters of a layer's norms, which every tensor-parallel rank holds whole."""
    embedding: int
    """Parameters of one of the two embeddings; the output one is the same tensor where the model ties them."""
    total: int


def counts(shape: ModelShape) -> Counts:
    """Parameters of the whole model. A layer has matrices q, k, v, o, gate, up and down, two norms, and the head norms
    and biases of its family."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * query + 2 * key_value)
    linear = attention + 3 * shape.hidden * shape.ffn
    norms = 2 * shape.hidden + 2 * shape.head_dim * shape.family.qk_norm
    layer = linear + norms + (query + 2 * key_value) * shape.family.qkv_bias
    embedding = shape.vocab * shape.hidden
    total = shape.layers * layer + embedding * (1 if shape.tied else 2) + shape.hidden
    return Counts(layer, linear, norms, embedding, total)


@dataclass(frozen=True)
class Passes:
    """What of the actor's work a step asks for."""

    updates: int
    scored: int
    """Forward passes over every sequence besides training: old policy, behaviour prompts, reference model."""
    head_everywhere: bool = False
    """Whether the head runs over prompts too (ours does not; other trainers' do)."""
    head_products: int = 3
    """Matrix products of the head in a training pass: 4 where its backward pass recomputes the logits."""
    behaviour: int = 0
    """How many of the `scored` passes read the behaviour prompts."""

    @staticmethod
    def of(algo: AlgoSettings) -> Passes:
        """Ours: with one update the training pass is the old policy itself."""
        old = algo.updates_per_step > 1 or algo.mismatch_correction.enabled
        behaviour = algo.calibration.enabled and algo.calibration.denominator == "recomputed"
        scored = int(old) + int(behaviour) + int(algo.kl_coef > 0)
        return Passes(algo.updates_per_step, scored, False, 3 if algo.fused() else 4, int(behaviour))


@dataclass(frozen=True)
class Forward:
    """FLOPs of one forward pass: two a parameter and token. Causal attention adds 2 x heads x head size x length^2 a
    layer (half of both products)."""

    token: int
    """FLOPs of all layers, for one token."""
    square: int
    """FLOPs of attention, for a sequence of one token; a sequence of n tokens has n^2 times as many."""
    loss_token: int
    """FLOPs of the head, for one token."""

    @staticmethod
    def of(shape: ModelShape) -> Forward:
        count = counts(shape)
        return Forward(
            token=2 * shape.layers * count.layer,
            square=2 * shape.layers * shape.heads * shape.head_dim,
            loss_token=2 * count.embedding,
        )


def layer_passes(recompute: str) -> tuple[int, int]:
    """Forward passes that the FLOPs of a training pass equal: over the layers' matrices, and over their attention. A
    backward pass is two; `actor.recompute` adds one to what it computes again."""
    return 3 + (recompute == "full"), 3 + (recompute != "none")


@dataclass(frozen=True)
class SampleFlops:
    """What one sample costs its replica in a step, scoring included, in integers: the same on every rank, whatever its
    processor.

    Example: SampleFlops(train=(8, 2), behaviour=(0, 0), loss_token=5) for 3 tokens, 1 of them with loss: 24 + 18 + 5
    """

    train: tuple[int, int]
    """FLOPs for each token of the train prompt and response, and for the square of their number."""
    behaviour: tuple[int, int]
    """The same for the behaviour prompt and the response."""
    loss_token: int
    """The head's. The other stages of a pipeline wait for the last one, which alone has the head, so its FLOPs count
    once for each stage."""

    @staticmethod
    def of(shape: ModelShape, settings: Settings) -> SampleFlops:
        actor = settings.actor
        return SampleFlops.of_passes(shape, Passes.of(settings.algo), actor.recompute, actor.pipeline_parallel)

    @staticmethod
    def of_passes(shape: ModelShape, passes: Passes, recompute: str, pipeline: int) -> SampleFlops:
        """`pipeline`: stages."""
        forward, scored = Forward.of(shape), passes.scored - passes.behaviour
        matrices, attention = layer_passes(recompute)
        return SampleFlops(
            train=((matrices + scored) * forward.token, (attention + scored) * forward.square),
            behaviour=(passes.behaviour * forward.token, passes.behaviour * forward.square),
            loss_token=(passes.head_products + passes.scored) * forward.loss_token * pipeline,
        )

    def each(
        self, train_S: npt.NDArray[np.int64], behaviour_S: npt.NDArray[np.int64], loss_S: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """FLOPs of each sample [S], from its tokens under both prompts and its loss tokens. int64 holds one of 1 T
        parameters and 1 M tokens."""
        flops_S = loss_S * self.loss_token
        for tokens_S, (token, square) in ((train_S, self.train), (behaviour_S, self.behaviour)):
            flops_S = flops_S + tokens_S * (token + square * tokens_S)
        return flops_S
