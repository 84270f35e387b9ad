"""The matrix products of the head alone, by rows of a chunk: what the choice of chunk sizes rests on. Needs one GPU.

    python tools/head_products.py --out benchmarks/head_products.json [--device cpu --size tiny]

For each number of rows: logits in fp32 and bf16, d(hidden) from gradients that lie in the front half of fp32 rows
(strided) and from dense ones, each with and without split-K sums in bf16, and d(W) added to fp32. Medians of 7 after 2,
by device events, in ms and TF/s. Then the three products in turn for two seconds, which shows what the card's power
limit leaves, and the bandwidth of a copy on the device.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_schema
import torch
from torch import Tensor

VOCABULARY = 151936
WIDTHS = {"full": (4096, 2560), "quick": (4096,), "tiny": (32,)}
ROWS = (1024, 2048, 2560, 2816, 3072, 3328, 4096)
SUSTAINED_ROWS, SUSTAINED_S = 3072, 2.0
ROUNDS, WARM = 7, 2


class Products:
    """The operands of one chunk, and its products."""

    def __init__(self, rows: int, width: int, columns: int, device: str) -> None:
        self.rows, self.width, self.columns, self.device = rows, width, columns, device
        self.hidden_CH = torch.randn(rows, width, device=device).bfloat16()
        self.weight_VH = (torch.randn(columns, width, device=device) * 2 / width**0.5).bfloat16()
        self.main_grad_VH = torch.zeros(columns, width, device=device)
        self.logits_CV = torch.empty(rows, columns, device=device)
        self.strided_CV = self.logits_CV.view(torch.bfloat16)[:, :columns]
        self.strided_CV.copy_(torch.randn(rows, columns, device=device) * 1e-3)
        self.dense_CV = self.strided_CV.contiguous()
        self.stored_CV, self.out_CH = torch.empty_like(self.dense_CV), torch.empty_like(self.hidden_CH)

    def runs(self) -> dict[str, Callable[[], Any]]:
        """Products by name. On a CPU, where a product has no fp32 output, the result is bf16."""
        wide = {"out_dtype": torch.float32} if self.device == "cuda" else {}

        def d_weight(grad_CV: Tensor) -> None:
            if wide:
                torch.addmm(self.main_grad_VH, grad_CV.T, self.hidden_CH, **wide, out=self.main_grad_VH)
            else:
                self.main_grad_VH.add_(grad_CV.T @ self.hidden_CH)

        return {
            "d_hidden_strided": lambda: torch.mm(self.strided_CV, self.weight_VH, out=self.out_CH),
            "d_hidden_dense": lambda: torch.mm(self.dense_CV, self.weight_VH, out=self.out_CH),
            "d_weight_strided": lambda: d_weight(self.strided_CV),
            "d_weight_dense": lambda: d_weight(self.dense_CV),
            "logits_bf16": lambda: torch.mm(self.hidden_CH, self.weight_VH.T, out=self.stored_CV),
            # Last: it overwrites the strided gradients.
            "logits_fp32": lambda: (
                torch.mm(self.hidden_CH, self.weight_VH.T, **wide, out=self.logits_CV)
                if wide
                else self.logits_CV.copy_(self.hidden_CH @ self.weight_VH.T)
            ),
        }

    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.width


def timed(run: Callable[[], Any], flush: Tensor) -> float:
    """Median milliseconds, with a cold L2 cache."""
    if flush.device.type == "cpu":
        return bench_schema.run_ms(run, "cpu")
    found = []
    for _ in range(ROUNDS + WARM):
        flush.zero_()
        found.append(bench_schema.run_ms(run, "cuda"))
    return statistics.median(found[WARM:])


def measured(products: Products, flush: Tensor) -> dict[str, Any]:
    """{product: {ms, tf}}; a product that fails says why."""
    row: dict[str, Any] = {"rows": products.rows, "hidden": products.width}
    for name, run in products.runs().items():
        for reduced in (True, False) if name.startswith("d_hidden") else (True,):
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
            try:
                ms = timed(run, flush)
                row[name + ("" if reduced else "_exact_sum")] = {"ms": ms, "tf": products.flops() / ms / 1e9}
            except Exception as error:
                row[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    return row


def sustained(products: Products) -> float:
    """TF/s of the three products in turn for SUSTAINED_S seconds."""
    runs, turns, began = products.runs(), 0, time.perf_counter()
    while time.perf_counter() - began < SUSTAINED_S:
        for name in ("logits_fp32", "d_hidden_strided", "d_weight_strided"):
            runs[name]()
        torch.cuda.synchronize()
        turns += 1
    return 3 * products.flops() * turns / (time.perf_counter() - began) / 1e12


def copy_tb_per_s(flush: Tensor) -> float:
    """Bytes read and written a second by a copy on the device, in TB/s."""
    size = 2**30 if flush.is_cuda else 2**20
    source = torch.randint(255, (size,), dtype=torch.uint8, device=flush.device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), flush) / 1e9


def main() -> int:
    chosen = bench_schema.parser(__doc__, "benchmarks/head_products.json").parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu --size tiny is a dry run", file=sys.stderr)
        return 2
    tiny = chosen.size == "tiny"
    columns, all_rows = (500, (8, 24)) if tiny else (VOCABULARY, ROWS)
    flush = torch.empty(1024 if tiny else 256 * 2**20, dtype=torch.uint8, device=chosen.device)
    rows: list[dict[str, Any]] = []
    for width in WIDTHS[chosen.size]:
        for count in all_rows:
            products = Products(count, width, columns, chosen.device)
            rows.append(measured(products, flush))
            if count == SUSTAINED_ROWS:
                rows[-1]["sustained_tf"] = sustained(products)
            print(json.dumps(rows[-1]), flush=True)
            del products
    copy = copy_tb_per_s(flush)
    print(f"copy {copy:.2f} TB/s")
    medians = {f"{r['rows']} x {r['hidden']}": {f"{n}_ms": v["ms"] for n, v in r.items() if _ran(v)} for r in rows}
    card = bench_schema.card(chosen.device)
    report = bench_schema.about(("torch",)) | {"card": card, "copy_tb_per_s": copy, "medians": medians, "rows": rows}
    bench_schema.write(chosen.out, "head_products", report)
    return 0


def _ran(value: Any) -> bool:
    return isinstance(value, dict) and "ms" in value


if __name__ == "__main__":
    sys.exit(main())
