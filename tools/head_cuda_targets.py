"""What tools/bench_head_cuda.py reports of its measurements: rates, shares of an H100's floor, and the bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bench_schema

BF16_FLOPS, COPY_BYTES_PER_S = 790e12, 3.0e12
"""Of one H100: measured on such a card, in the design notes of this project."""
BF16_BYTES = 2
PRODUCTS = {"given": 0, "train": 3, "score": 1}
LOGIT_PASSES = 3
"""Over given logits: read for the statistics; read and written for the gradient."""
MODEL, TENSOR_PARALLEL = "Qwen3-8B", 1
"""Of all bars."""
OURS = ("kernels", "kernels, bf16 logits")
Row = dict[str, Any]
"""An operation and a shape with what every peer measured."""


@dataclass(frozen=True)
class Target:
    """At most `limit` of a quantity; with a peer, at least that many times less than the peer."""

    operation: str
    tokens: int
    quantity: str
    limit: float
    peer: str = ""
    subjects: tuple[str, ...] = OURS


PUBLIC = ("liger FLCE", "liger scaled FLCE", "cut cross entropy", "quack", "verl")
"""Kernels of other projects for the whole head."""
TARGETS = (
    Target("given", 8192, "ms", 3.1),
    Target("given", 8192, "ms", 2.5, "liger vocab-parallel CE"),
    Target("given", 8192, "ms", 5.0, "megatron fused CE"),
    Target("train", 8192, "ms", 52.0, subjects=OURS[:1]),
    Target("train", 8192, "ms", 47.0, subjects=OURS[1:]),
    *(Target("train", 8192, "ms", 1.15, peer) for peer in PUBLIC),
    Target("score", 8192, "ms", 16.0),
    Target("train", 16384, "extra_gb", 2.5),
    Target("train", 16384, "extra_gb", 10.0, "eager"),
)
"""Extra memory is what a pass allocates at its peak; main_grad exists before the pass."""


def flops(operation: str, tokens: int, columns: int, hidden: int) -> float:
    return 2.0 * PRODUCTS[operation] * tokens * columns * hidden


def logit_bytes(tokens: int, columns: int) -> float:
    """The least that `given` moves."""
    return float(LOGIT_PASSES * BF16_BYTES * tokens * columns)


def floor_ms(operation: str, tokens: int, columns: int, hidden: int) -> float:
    """The least an H100 needs: bytes of the logits in three passes, or three products (one for score)."""
    if operation == "given":
        return logit_bytes(tokens, columns) / COPY_BYTES_PER_S * 1e3
    return flops(operation, tokens, columns, hidden) / BF16_FLOPS * 1e3


def with_rates(values: Row, operation: str, tokens: int, columns: int, hidden: int) -> Row:
    """What a peer measured, with what follows of its milliseconds: GB/s where only logits move, else TF/s."""
    if "ms" not in values:
        return values
    if operation == "given":
        rate = {"gb_per_s": logit_bytes(tokens, columns) / values["ms"] / 1e6}
    else:
        rate = {"tflops_per_s": flops(operation, tokens, columns, hidden) / values["ms"] / 1e9}
    return values | rate | {"share_of_floor": floor_ms(operation, tokens, columns, hidden) / values["ms"]}


def line(row: Row) -> str:
    cells = []
    for name, v in row["peers"].items():
        if "ms" in v:
            rate = f"{v['gb_per_s']:.0f} GB/s" if "gb_per_s" in v else f"{v['tflops_per_s']:.0f} TF/s"
            memory = f"{v['extra_gb']:.2f} GB extra"
            cells.append(f"{name} {v['ms']:.2f} ms, {rate}, {v['share_of_floor']:.0%} of the floor, {memory}")
        else:
            cells.append(f"{name}: {v['missing'][:40]}")
    return f"{where(row)}: " + "; ".join(cells)


def where(row: Row) -> str:
    return f"{row['operation']} {row['model']} T {row['tokens']} TP {row['tensor_parallel']}"


def medians(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{peer: {quantity: value}} of what was measured: milliseconds, extra memory, GB/s."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for peer, values in row["peers"].items():
            for key in ("ms", "extra_gb", "gb_per_s"):
                if "ms" in values and key in values:
                    # The end of a quantity's name is its unit's in bench_schema.
                    found.setdefault(peer, {})[f"{where(row)} {'_ms' if key == 'ms' else key}"] = values[key]
    return found


def bars(rows: list[Row]) -> list[bench_schema.Bar]:
    """Every target with the value that was measured for it; the value is None where it could not be measured."""
    found = []
    for target in TARGETS:
        for subject in target.subjects[: 1 if target.operation == "given" else 2]:
            ours, theirs = (_value(rows, target, name) for name in (subject, target.peer or subject))
            name = f"{subject}: {target.operation} {MODEL} T {target.tokens} TP {TENSOR_PARALLEL} {target.quantity}"
            if not target.peer:
                found.append(bench_schema.Bar(name, ours, target.limit))
                continue
            ratio = None if ours is None or theirs is None else theirs / ours
            name = f"{name}, times less than {target.peer}"
            found.append(bench_schema.Bar(name, ratio, target.limit, at_least=True))
    return found


def _value(rows: list[Row], target: Target, peer: str) -> float | None:
    for row in rows:
        key = (row["operation"], row["model"], row["tokens"], row["tensor_parallel"])
        if key == (target.operation, MODEL, target.tokens, TENSOR_PARALLEL):
            return row["peers"].get(peer, {}).get(target.quantity)
    return None
