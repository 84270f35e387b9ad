"""Bytes of weight deltas (`engine.sync=delta`) against full pushes, at the learning rate and Adam of a recipe.

    python tools/bench_deltas.py                    # a Qwen3 of 0.1B on a CPU, ten steps of Adam, a few minutes
    python tools/bench_deltas.py --steps 3 --hidden 128 --layers 2

How many bf16 weights a step changes depends on the size of the step relative to the distance of neighboring bf16
values, which is 2^-8 to 2^-7 of the weight itself. So the model need not be trained, but its weights must be of the
size that those of trained models have. Here they are normal with a standard deviation of `--std`, by default 0.02,
with which Qwen3's published configurations initialize; norms are near 1. Half the size means twice as many changes.
Adam moves a weight by at most about the learning rate, in the first step by exactly that. Two cases are measured:

- adam: fp32 main weights and Adam with the recipe's learning rate, betas, weight decay and clipping, on gradients of
  the language-modeling loss of new random tokens in each step
- bound: every weight moves by the whole learning rate in every step, up or down at random

Each step's bf16 weights are encoded relative to those before, decoded, and compared bit for bit. Other forms of the
last step's differences are measured beside it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_schema
import torch
from bench_schema import Bar
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from icrl_megatron.engines.on_server.icrl_deltas import DeltaPiece, decode, encode
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import OptimSettings

TARGET = 0.03
TOKENS = (1, 128)
Weights = dict[str, Tensor]


def deflated(data: bytes, strategy: int) -> int:
    packer = zlib.compressobj(level=1, wbits=-15, strategy=strategy)
    return len(packer.compress(data) + packer.flush())


def other_forms(old: Tensor, new: Tensor) -> dict[str, int]:
    """Bytes of the same differences in other forms."""
    before, after = (t.reshape(-1).view(torch.int16) for t in (old, new))
    mask = before != after
    where, changed = mask.nonzero().reshape(-1), int(mask.sum())
    bits = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8).to(torch.uint8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
    xor = (before ^ after).numpy().tobytes()
    return {
        "int32 indices and new values": 6 * changed,
        "deflated indices and new values": deflated(where.int().numpy().tobytes(), zlib.Z_DEFAULT_STRATEGY)
        + deflated(after[where].numpy().tobytes(), zlib.Z_DEFAULT_STRATEGY),
        "bitmap deflated, new values": deflated(packed.numpy().tobytes(), zlib.Z_DEFAULT_STRATEGY) + 2 * changed,
        "XOR, deflated": deflated(xor, zlib.Z_DEFAULT_STRATEGY),
        "XOR, Huffman codes": deflated(xor, zlib.Z_HUFFMAN_ONLY),
    }


def build(arguments: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    heads = max(4, arguments.hidden // 64)
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=arguments.std,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def adam(model: Qwen3ForCausalLM, optim: OptimSettings, steps: int) -> Iterator[None]:
    """Yields after each step."""
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.learning_rate, betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, TOKENS)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        yield


@torch.no_grad()
def bound(model: Qwen3ForCausalLM, optim: OptimSettings, steps: int) -> Iterator[None]:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter).sign_(), alpha=optim.learning_rate)
        yield


CASES = {"adam": adam, "bound": bound}


def rounded(model: Qwen3ForCausalLM) -> Weights:
    return {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}


def compare(old: Weights, new: Weights) -> dict[str, float]:
    """Bytes of a full push and of a delta, changed weights, and seconds of encoding and decoding on one thread."""
    found: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would count as work
    for name, tensor in new.items():
        begun = time.process_time()
        sizes, data = encode(old[name], tensor)
        encoded = time.process_time()
        differences = decode(DeltaPiece(name, tuple(tensor.shape), "bfloat16", sizes), data, tensor.device)
        added = (old[name].view(torch.int16) + differences.view(torch.int16)).view(torch.bfloat16)
        spent = {"encode_cpu_s": encoded - begun, "decode_cpu_s": time.process_time() - encoded}
        if not torch.equal(added.view(torch.int16), tensor.view(torch.int16)):
            raise SystemExit(f"{name} is not bit-equal after its delta")
        changed = int((differences.view(torch.int16) != 0).sum())
        add(found, {"full": tensor.nbytes, "ours": len(data), "changed": changed, **spent})
    torch.set_num_threads(threads)
    return found


def add(total: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0) + value


def measure(
    arguments: argparse.Namespace, move: Callable[[Qwen3ForCausalLM, OptimSettings, int], Iterator[None]]
) -> dict[str, Any]:
    model = build(arguments)
    first = last = before = rounded(model)
    total: dict[str, float] = {}
    each = []
    for step, _ in enumerate(move(model, load(arguments.recipe).optim, arguments.steps), 1):
        before, last = last, rounded(model)
        found = compare(before, last)
        add(total, found)
        each.append(found["ours"] / found["full"])
        changed = 2 * found["changed"] / found["full"]
        print(f"  step {step}: {changed:.2%} of the weights changed, {each[-1]:.2%} of the bytes", flush=True)
    whole = compare(first, last)
    across, mean = whole["ours"] / whole["full"], total["ours"] / total["full"]
    print(f"  all {arguments.steps} steps: {mean:.2%} of the bytes; as one delta: {across:.2%} of one push")
    spent = {name: total[name] / (total["full"] / 2**30) for name in ("encode_cpu_s", "decode_cpu_s")}
    print("  " + ", ".join(f"{name} {value:.1f} per GiB of weights" for name, value in spent.items()))
    forms: dict[str, float] = {"ours": each[-1] * whole["full"]}
    for name, tensor in last.items():
        add(forms, other_forms(before[name], tensor))
    print("  the last step in other forms:")
    for name, size in sorted(forms.items(), key=lambda pair: pair[1]):
        print(f"  {size / whole['full']:7.2%}  {name}")
    return {"each": each, "mean": mean, "across": across, **spent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="qwen3_8b", help="whose optimizer settings are used")
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="by default both")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.case or sorted(CASES):
        print(f"{name}:")
        found[name] = measure(arguments, CASES[name])
    bars = [Bar(f"{name}: largest delta, share of a full push", max(of["each"]), TARGET) for name, of in found.items()]
    if arguments.out:
        medians = {name: {"largest_share": max(of.pop("each")), **of} for name, of in found.items()}
        bench_schema.write(arguments.out, "deltas", bench_schema.about() | {"medians": medians, "bars": bars})
    for bar in bars:
        print(bar.line())
    return int(not all(bar.held for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
