"""The head on a GPU against eager torch, Liger, Megatron and verl: device time and memory. Needs torch and triton.

    python tools/bench_head_cuda.py --out benchmarks/head_cuda.json [--quick] [--tune]

Three operations, each for the head of Qwen3-4B and 8B, at TP 1 and at one rank's share of TP 2, 4 and 8:

    given    logits in bf16 -> statistics, loss, gradient of the logits
    train    hidden states and weight in bf16 -> loss, both gradients
    score    hidden states and weight in bf16 -> log-probs

Peers take turns in one process, each run between two events on the device after a sweep over a buffer larger than the
L2 cache; medians are reported. A peer that is not installed, or runs out of memory, is named with its reason.
`python tools/bench_head.py --device cuda` is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_schema
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
    policy_head,
    score_head,
    token_objective,
)
from icrl_kernels.chunking import TokenOutputs  # noqa: E402

DEVICE = "cuda"
VOCABULARY = 151936
MODELS = {"Qwen3-4B": 2560, "Qwen3-8B": 4096}
BF16_FLOPS, COPY_BYTES_PER_S = 790e12, 3.0e12
"""Of one H100: measured on such a card, in the design notes of this project."""
GB = 1e9
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
            return own_L + 0.2 * torch.randn(shape.tokens, generator=draw, device=DEVICE)

        advantages_L = torch.randn(shape.tokens, generator=draw, device=DEVICE)
        coefficients_L = torch.full_like(advantages_L, 1.0 / shape.tokens)
        calibrated_L = torch.rand(shape.tokens, generator=draw, device=DEVICE) > 0.5
        self.streams = Streams(self.targets_L, coefficients_L, advantages_L, around(), around(), calibrated_L)
        self.hidden_LH.requires_grad_()
        self.weight_VH.requires_grad_()

    def clear(self) -> None:
        self.hidden_LH.grad = self.weight_VH.grad = None


def eager_loss(logits_LV: Tensor, inputs: Inputs) -> Tensor:
    """As training code without a kernel writes it: fp32 logits, log_softmax, gather, Eq. 6."""
    logprobs_LV = logits_LV.float().log_softmax(-1)
    logprobs_L = logprobs_LV.gather(1, inputs.targets_L[:, None])[:, 0]
    return token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum()


def given_peers(inputs: Inputs) -> dict[str, Run | str]:
    """Logits given in bf16; the kernels overwrite them, so every peer works on a copy that is made untimed."""
    from icrl_kernels.triton_chunks import TritonChunks

    tokens = inputs.shape.tokens
    with torch.no_grad():
        logits_LV = inputs.hidden_LH @ inputs.weight_VH.T
    chunks = TritonChunks(inputs.hidden_LH, inputs.weight_VH, 1.0, inputs.shard, tokens, "bf16")
    outputs = TokenOutputs.empty(inputs.targets_L, torch.float32)
    span = slice(0, tokens)

    def ours() -> Tensor:
        slopes_4C = chunks.objective(span, inputs.streams, inputs.terms, outputs)
        return chunks.logit_gradients(inputs.targets_L, outputs.entropy_L, slopes_4C, inputs.terms)

    def restore() -> None:
        chunks.buffer_CV[:, : inputs.shard.valid].copy_(logits_LV)

    def with_grad(loss_of: Callable[[Tensor], Tensor]) -> Run:
        leaf = logits_LV.detach().requires_grad_()

        def run() -> Tensor | None:
            leaf.grad = None
            loss_of(leaf).backward()
            return leaf.grad

        return run

    ours.before = restore  # type: ignore[attr-defined]
    peers: dict[str, Run | str] = {"kernels": ours, "eager": with_grad(lambda z: eager_loss(z, inputs))}
    peers["liger vocab-parallel CE"] = optional(lambda: with_grad(_liger_ce(inputs)))
    peers["liger grpo_loss"] = optional(lambda: with_grad(_liger_grpo(inputs)))
    peers["megatron fused CE"] = optional(lambda: with_grad(_megatron_ce(inputs)))
    return peers


def _liger_ce(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    entropy = LigerVocabParallelCrossEntropy()

    def loss(logits_LV: Tensor) -> Tensor:
        logprobs_L = -entropy(logits_LV[:, None], inputs.targets_L[:, None])[:, 0]
        return token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum()

    return loss


def _liger_grpo(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    assert inputs.streams.old_logprobs_L is not None
    old_1L, advantage_1 = inputs.streams.old_logprobs_L[None, 1:], inputs.streams.advantages_L[:1]

    def loss(logits_LV: Tensor) -> Tensor:
        # One sequence of all tokens, with one logit more than its completion has tokens.
        given_1LV, targets_1L = logits_LV[None], inputs.targets_L[None, 1:]
        options = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.28, "inplace": False}
        return triton_grpo_loss(given_1LV, old_1L, None, targets_1L, advantage_1, **options)[0].sum()

    return loss


def _megatron_ce(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    one_rank_group()
    group = parallel_state.get_tensor_model_parallel_group()

    def loss(logits_LV: Tensor) -> Tensor:
        logprobs_L = -fused_vocab_parallel_cross_entropy(logits_LV[:, None], inputs.targets_L[:, None], group)[:, 0]
        return token_objective(logprobs_L, torch.zeros_like(logprobs_L), inputs.streams, inputs.terms).loss_L.sum()

    return loss


def one_rank_group() -> None:
    """Megatron's groups, for one process."""
    from megatron.core import parallel_state

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


def train_peers(inputs: Inputs) -> dict[str, Run | str]:
    main_grad_VH = torch.zeros_like(inputs.weight_VH, dtype=torch.float32)
    hidden_LH, weight_VH = inputs.hidden_LH, inputs.weight_VH

    def ours(logits: str) -> Run:
        def run() -> None:
            inputs.clear()
            main, chunking = MainGrad(main_grad_VH), Chunking(logits=logits)
            policy_head(
                hidden_LH, weight_VH, inputs.streams, inputs.terms, inputs.shard, chunking, main
            ).loss.backward()

        return run

    def eager() -> None:
        inputs.clear()
        eager_loss(hidden_LH @ weight_VH.T, inputs).backward()

    peers: dict[str, Run | str] = {"kernels": ours("fp32"), "kernels, bf16 logits": ours("bf16"), "eager": eager}
    peers["liger FLCE"] = optional(lambda: _liger_flce(inputs))
    peers["verl"] = optional(lambda: _verl(inputs))
    return peers


def _liger_flce(inputs: Inputs) -> Run:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run() -> None:
        inputs.clear()
        liger_fused_linear_cross_entropy(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L).backward()

    return run


def _verl(inputs: Inputs) -> Run:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def run() -> None:
        inputs.clear()
        logprobs_L, _ = linear_cross_entropy(inputs.hidden_LH, inputs.weight_VH, inputs.targets_L, 1.0)
        token_objective(logprobs_L, logprobs_L, inputs.streams, inputs.terms).loss_L.sum().backward()

    return run


def score_peers(inputs: Inputs) -> dict[str, Run | str]:
    hidden_LH, weight_VH, targets_L = inputs.hidden_LH, inputs.weight_VH, inputs.targets_L

    def ours(logits: str) -> Run:
        return lambda: score_head(hidden_LH, weight_VH, targets_L, 1.0, inputs.shard, Chunking(logits=logits))

    @torch.no_grad()
    def eager() -> Tensor:
        return (hidden_LH @ weight_VH.T).float().log_softmax(-1).gather(1, targets_L[:, None])

    return {"kernels": ours("fp32"), "kernels, bf16 logits": ours("bf16"), "eager": eager}


def optional(make: Callable[[], Run]) -> Run | str:
    """The peer, or why there is none: other people's packages fail in ways of their own."""
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


OPERATIONS = {"given": given_peers, "train": train_peers, "score": score_peers}


def floor_ms(operation: str, shape: Shape) -> float:
    """The least an H100 needs: bytes of the logits in three passes, or three products (one for score)."""
    if operation == "given":
        return 3 * 2 * shape.tokens * shape.columns / COPY_BYTES_PER_S * 1e3
    return flops(operation, shape) / BF16_FLOPS * 1e3


def flops(operation: str, shape: Shape) -> float:
    products = {"given": 0, "train": 3, "score": 1}[operation]
    return 2.0 * products * shape.tokens * shape.columns * shape.hidden


def measure(peers: dict[str, Run | str], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and extra bytes by peer; what could not run says why."""
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, run in peers.items():
        reason = run if isinstance(run, str) else _warm(run)
        if isinstance(reason, str):
            found[name] = {"missing": reason}
        else:
            found[name], runs[name] = {"extra_gb": reason / GB}, run  # type: ignore[assignment]
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, flush))
    for name, values in times.items():
        found[name] |= {"ms": statistics.median(values), "ms_min": min(values), "ms_max": max(values)}
    return found


def _warm(run: Run) -> int | str:
    """Runs twice, for compilation and for its peak memory above what is allocated before."""
    try:
        for _ in range(2):
            getattr(run, "before", lambda: None)()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    except Exception as error:
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _timed(run: Run, flush: Tensor) -> float:
    getattr(run, "before", lambda: None)()
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def bench(shapes: list[Shape], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        for operation, peers_of in OPERATIONS.items():
            inputs = Inputs(shape)
            peers = measure(peers_of(inputs), rounds)
            floor = floor_ms(operation, shape)
            for values in peers.values():
                if "ms" in values:
                    values["tflops_per_s"] = flops(operation, shape) / values["ms"] / 1e9
                    values["share_of_floor"] = floor / values["ms"]
            rows.append({"operation": operation, **asdict(shape), "floor_ms_h100": floor, "peers": peers})
            print(line(rows[-1]), flush=True)
            del inputs
            torch.cuda.empty_cache()
    return rows


def line(row: dict[str, Any]) -> str:
    cells = [
        f"{name} {v['ms']:.2f} ms {v['extra_gb']:.2f} GB" if "ms" in v else f"{name}: {v['missing'][:40]}"
        for name, v in row["peers"].items()
    ]
    return f"{row['operation']:5} {row['model']} T {row['tokens']} TP {row['tensor_parallel']}: " + "; ".join(cells)


def tune(tokens: int) -> list[dict[str, Any]]:
    """Times of the two kernels that pass over logits, by block, warps and programs a multiprocessor."""
    from icrl_kernels import triton_chunks

    inputs, rows = Inputs(Shape("Qwen3-8B", tokens, 1)), []
    outputs = TokenOutputs.empty(inputs.targets_L, torch.float32)
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    own = triton_chunks._tuning
    try:
        for block in (1024, 2048, 4096, 8192):
            for warps in (4, 8, 16):
                for programs in (1, 2, 4, 8):
                    setting = triton_chunks.Tuning(block, warps, programs)
                    triton_chunks._tuning = lambda _, chosen=setting: chosen  # type: ignore[misc,assignment]
                    rows.append(asdict(setting) | _tuned(inputs, outputs, flush))
    finally:
        triton_chunks._tuning = own
    return sorted(rows, key=lambda row: row["statistics_ms"] + row["gradients_ms"])


def _tuned(inputs: Inputs, outputs: TokenOutputs, flush: Tensor) -> dict[str, float]:
    from icrl_kernels.triton_chunks import TritonChunks

    tokens = 2048
    chunks = TritonChunks(inputs.hidden_LH, inputs.weight_VH, 1.0, inputs.shard, tokens, "fp32")
    chunks.buffer_CV.normal_()
    streams, span = inputs.streams.slice(slice(0, tokens)), slice(0, tokens)
    slopes_4C = chunks.objective(span, streams, inputs.terms, outputs)
    runs = {
        "statistics_ms": lambda: chunks.statistics(streams.targets_L),
        "gradients_ms": lambda: chunks.logit_gradients(
            streams.targets_L, outputs.entropy_L[span], slopes_4C, inputs.terms
        ),
    }
    return {name: statistics.median([_timed(run, flush) for _ in range(12)][2:]) for name, run in runs.items()}


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{peer: {quantity: milliseconds}} of what was measured."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        quantity = f"{row['operation']} {row['model']} T {row['tokens']} TP {row['tensor_parallel']} _ms"
        for peer, values in row["peers"].items():
            if "ms" in values:
                found.setdefault(peer, {})[quantity] = values["ms"]
    return found


def about() -> dict[str, Any]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    names = ("torch", "triton", "liger-kernel", "megatron-core", "verl", "transformer-engine")
    return {
        "command": " ".join(["python", "tools/bench_head_cuda.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": card or torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "versions": {name: installed(name) for name in names},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/head_cuda.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the 8B head at T 8192, TP 1 and 8, five rounds")
    parser.add_argument("--tune", action="store_true", help="launch parameters instead of peers")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; tools/bench_head.py measures on a CPU", file=sys.stderr)
        return 2
    degrees = (1, 8) if chosen.quick else (1, 2, 4, 8)
    lengths, models = ((8192,), ("Qwen3-8B",)) if chosen.quick else ((8192, 16384), tuple(MODELS))
    shapes = [Shape(model, tokens, tp) for model in models for tokens in lengths for tp in degrees]
    result = {"tuning": tune(8192)} if chosen.tune else {"rows": bench(shapes, 5 if chosen.quick else chosen.rounds)}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    stamped = bench_schema.stamped("head_cuda", about() | result | {"medians": medians(result.get("rows", []))})
    chosen.out.write_text(json.dumps(stamped, indent=1) + "\n")
    print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
