"""Checks a user's own loss on a small example before a model is loaded."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from icrl_megatron.algo.losses import Loss, LossInputs, PolicyTerm, named
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.utils.errors import ConfigError

LENGTHS = (3, 2)


def check_loss(name: str, algo: AlgoSettings) -> None:
    """Calls the loss on two packed sequences and on each of them alone.

    Raises ConfigError if the function does not exist, fails, returns tensors of another shape or type, or has no
    gradient, or if the loss of a sequence differs when it is alone, because results would depend on packing and on the
    grid.
    """
    function, example = named(name), _example()
    term = _called(name, function, example, algo)
    for what, values_L in (("loss_L", term.loss_L), *((f"metrics[{k!r}]", v) for k, v in term.metrics.items())):
        _check_tensor(name, what, values_L, floating=what == "loss_L")
    for what in ("clipped_low_L", "clipped_high_L"):
        _check_tensor(name, what, getattr(term, what), floating=False)
    if not term.loss_L.requires_grad:
        raise ConfigError(f"algo.loss={name}: loss_L has no gradient; compute it from logprobs_L or entropy_L")
    for number in range(example.sequences):
        own_L = example.sequence_L == number
        alone = _called(name, function, _only(example, own_L), algo)
        if not torch.allclose(alone.loss_L, term.loss_L[own_L], rtol=1e-4, atol=1e-6):
            raise ConfigError(
                f"algo.loss={name}: the loss of a sequence changes with the other sequences of its micro-batch, so it "
                "would depend on packing and on the number of GPUs; compute it from the token's own sequence "
                "(LossInputs.sequence_L)"
            )


def _example() -> LossInputs:
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    sequence_L = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old_L, behaviour_L, engine_L, entropy_L = torch.rand(4, tokens, generator=draw) + 0.5
    current_L = -old_L + torch.randn(tokens, generator=draw)
    return LossInputs(
        logprobs_L=current_L.requires_grad_(),
        entropy_L=entropy_L.requires_grad_(),
        old_L=-old_L,
        behaviour_L=-behaviour_L,
        engine_L=-engine_L,
        advantages_L=torch.tensor([1.0, -0.5])[sequence_L],
        mask_L=torch.ones(tokens, dtype=torch.bool),
        sequence_L=sequence_L,
        sequences=len(LENGTHS),
    )


def _only(inputs: LossInputs, chosen_L: Tensor) -> LossInputs:
    """One sequence of the example, as a separate micro-batch."""
    tensors = {f.name: getattr(inputs, f.name)[chosen_L] for f in fields(inputs) if f.name.endswith("_L")}
    return replace(inputs, **tensors | {"sequence_L": torch.zeros_like(tensors["sequence_L"])}, sequences=1)


def _called(name: str, function: Loss, inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    try:
        term = function(inputs, algo)
    except Exception as error:  # the user's function may raise anything
        raise ConfigError(f"algo.loss={name} fails on an example of two sequences: {error!r}") from error
    if not isinstance(term, PolicyTerm):
        raise ConfigError(f"algo.loss={name} returns {type(term).__name__}; it must return a PolicyTerm")
    return term


def _check_tensor(name: str, what: str, values_L: object, floating: bool) -> None:
    length = sum(LENGTHS)
    if not isinstance(values_L, Tensor) or values_L.shape != (length,):
        found = list(values_L.shape) if isinstance(values_L, Tensor) else type(values_L).__name__
        raise ConfigError(f"algo.loss={name}: {what} must be a tensor with one value per token, got {found}")
    if floating != values_L.is_floating_point() and not what.startswith("metrics"):
        kind = "floating" if floating else "bool"
        raise ConfigError(f"algo.loss={name}: {what} must be {kind}, got {values_L.dtype}")
