"""Errors of log-probs and calibration weights if a chunk's logits are stored in bf16 or fp32, against float64.

    python tools/logit_precision.py [--tokens 64]

Hidden states and weights are bf16 and random, scaled so that the largest logit of a row of 151936 is about 8, 16 and
32; targets are sampled from the softmax. Products are summed in fp32 and then stored, as in the head on a GPU.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

VOCABULARY, WIDTH = 151936, 64


def main(tokens: Annotated[int, typer.Option(min=1)] = 64) -> None:
    """Prints mean and maximum errors by size and storage type of the logits."""
    title = f"error of the log-prob (nats) and of a weight exp(a - b) of two of them, {tokens} tokens"
    table = Table("largest logit", "logits", "log-prob mean", "log-prob max", "weight mean", "weight max", title=title)
    for size in (8.0, 16.0, 32.0):
        for stored in (torch.float32, torch.bfloat16):
            largest, error_L, weight_L = errors(tokens, size, stored)
            numbers = [f"{n:.1e}" for n in (error_L.mean(), error_L.max(), weight_L.mean(), weight_L.max())]
            table.add_row(f"{largest:.0f}", str(stored).removeprefix("torch."), *numbers)
    Console().print(table)


def errors(tokens: int, size: float, stored: torch.dtype) -> tuple[float, Tensor, Tensor]:
    """(largest logit of all, |log-prob - float64's| [L], |weight / float64's - 1| [L])."""
    draw = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(VOCABULARY, WIDTH, generator=draw).bfloat16()
    # The largest of 151936 standard normals is about 4.4; two prompts give nearly the same hidden state.
    shared_LH = torch.randn(tokens, WIDTH, generator=draw) * size / 4.4 / WIDTH**0.5
    truth, found, largest = [], [], 0.0
    targets_L1 = torch.empty(0)
    for which in range(2):
        hidden_LH = (shared_LH * (1 + 0.02 * torch.randn(tokens, WIDTH, generator=draw))).bfloat16()
        exact_LV = hidden_LH.double() @ weight_VH.double().T
        if which == 0:
            targets_L1, largest = torch.multinomial(exact_LV.softmax(-1), 1, generator=draw), float(exact_LV.max())
        truth.append(exact_LV.log_softmax(-1).gather(1, targets_L1)[:, 0])
        rounded_LV = (hidden_LH.float() @ weight_VH.float().T).to(stored).double()
        found.append(rounded_LV.log_softmax(-1).gather(1, targets_L1)[:, 0])
    ratio_L = ((found[0] - found[1]) - (truth[0] - truth[1])).exp()
    return largest, (found[0] - truth[0]).abs(), (ratio_L - 1).abs()


if __name__ == "__main__":
    typer.run(main)
