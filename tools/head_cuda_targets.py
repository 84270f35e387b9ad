"""What tools/bench_head_cuda.py reports of its measurements: rates, shares of an H100's floor, and the bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
class Bar:
    """At most `bar` of a quantity; or, with a peer, that many times less than the peer at least."""

    operation: str
    tokens: int
    quantity: str
    bar: float
    peer: str = ""


BARS = (
    Bar("given", 8192, "ms", 3.1),
    Bar("given", 8192, "ms", 2.5, "liger vocab-parallel CE"),
    Bar("given", 8192, "ms", 5.0, "megatron fused CE"),
    Bar("train", 8192, "ms", 47.0),
    Bar("train", 8192, "ms", 1.6, "verl"),
    Bar("score", 8192, "ms", 15.5),
    Bar("train", 16384, "extra_gb", 2.5),
    Bar("train", 16384, "extra_gb", 10.0, "eager"),
)
"""Of the issue. Extra memory is what a pass allocates at its peak; main_grad is there before it."""


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


def targets(rows: list[Row]) -> list[Row]:
    """Every bar with the value that is held against it; value and `held` are null where it could not be measured."""
    found = []
    for bar in BARS:
        for subject in OURS[: 1 if bar.operation == "given" else 2]:
            ours, theirs = (_value(rows, bar, name) for name in (subject, bar.peer or subject))
            value = ours
            if bar.peer:
                value = None if ours is None or theirs is None else theirs / ours
            held = None if value is None else (value >= bar.bar if bar.peer else value <= bar.bar)
            what = f"{bar.operation} {MODEL} T {bar.tokens} TP {TENSOR_PARALLEL} {bar.quantity}"
            asked = f"at least {bar.bar} times less than {bar.peer}" if bar.peer else f"at most {bar.bar}"
            row = {"subject": subject, "quantity": what, "asked": asked, "bar": bar.bar, "value": value, "held": held}
            found.append(row)
    return found


def _value(rows: list[Row], bar: Bar, peer: str) -> float | None:
    for row in rows:
        key = (row["operation"], row["model"], row["tokens"], row["tensor_parallel"])
        if key == (bar.operation, MODEL, bar.tokens, TENSOR_PARALLEL):
            return row["peers"].get(peer, {}).get(bar.quantity)
    return None


def target_line(target: Row) -> str:
    value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
    verdict = {None: "", True: "held", False: "MISSED"}[target["held"]]
    return f"{target['subject']}: {target['quantity']} {target['asked']}: {value} {verdict}".rstrip()
