"""`python compile_kernels.py`: compiles every kernel for an H100; prints JSON. Needs triton, no GPU, no interpreter."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from icrl_kernels import triton_kernels as kernels
from icrl_kernels.triton_chunks import TOKENS_PER_PROGRAM, TUNING

H100 = GPUTarget("cuda", 90, 32)
TUNED = TUNING[9]
LANES = 32
FLAGS = {"HAS_OLD": True, "HAS_BEHAVIOUR": True, "HAS_REFERENCE": True, "HAS_ENTROPY": True}
SIZES = {"BLOCK": TUNED.block, "ROWS": TOKENS_PER_PROGRAM}
LAUNCHED = {"columns": 151936, "stride": 151936, "gradient_stride": 151936}
"""Qwen3's values of the integers on which a kernel may specialize; pointers are aligned too."""
POINTERS = {"targets_ptr": "*i64", "calibrated_ptr": "*u8", "finite_ptr": "*u8"}
INTEGERS = {"rows", "columns", "stride", "gradient_stride", "first_column", "splits", "parts"}
VARIANTS: dict[str, dict[str, Any]] = {
    "split_statistics": {"logits_ptr": "*fp32"},
    "split_statistics of bf16": {"logits_ptr": "*bf16"},
    "split_statistics of odd columns": {"logits_ptr": "*fp32", "columns": 50257},
    "logit_gradients": {"logits_ptr": "*fp32", "gradients_ptr": "*bf16"},
    "logit_gradients in place": {"logits_ptr": "*bf16", "gradients_ptr": "*bf16"},
    "logit_gradients of fp32": {"logits_ptr": "*fp32", "gradients_ptr": "*fp32"},
    "logit_gradients without entropy": {"logits_ptr": "*fp32", "gradients_ptr": "*bf16", "HAS_ENTROPY": False},
    "logit_gradients in place without entropy": {"logits_ptr": "*bf16", "gradients_ptr": "*bf16", "HAS_ENTROPY": False},
    "logit_gradients of odd columns": {"logits_ptr": "*fp32", "gradients_ptr": "*bf16", "columns": 50257},
    "merge_statistics": {},
    "score_tokens": {},
    "token_objective": {},
}
"""Kernel -> its differences from the defaults: pointer types, flags, launched integers."""


def type_of(name: str, variant: dict[str, Any]) -> str:
    if name.endswith("_ptr"):
        return variant.get(name) or POINTERS.get(name) or ("*u8" if name.startswith("clipped") else "*fp32")
    return "i32" if name in INTEGERS else "fp32"


def aligned(parameter: Any, variant: dict[str, Any]) -> bool:
    """Whether the launch declares this parameter to be a multiple of 16."""
    if parameter.is_constexpr or parameter.do_not_specialize:
        return False
    return parameter.name.endswith("_ptr") or {**LAUNCHED, **variant}.get(parameter.name, 1) % 16 == 0


def report(name: str, variant: dict[str, Any]) -> dict[str, Any]:
    kernel = getattr(kernels, name.split()[0])
    values = {**FLAGS, **SIZES, **variant}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else type_of(p.name, variant) for p in kernel.params}
    attributes = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if aligned(p, variant)}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = TUNED.warps if "BLOCK" in constants else 4
    built = triton.compile(source, target=H100, options={"num_warps": warps})
    per_lane = TUNED.block / (TUNED.warps * LANES)
    return {
        "cubin_bytes": len(built.asm["cubin"]),
        "shared_bytes": built.metadata.shared,
        **resources(built.asm["cubin"]),
        "threads": warps * LANES,
        "instructions_an_element": loop_length(built.asm["cubin"]) / per_lane if "BLOCK" in constants else None,
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", built.asm["ptx"])),
        "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", built.asm["ptx"])),
        "row_multiplications": re.findall(r"arith\.muli %row(?:_\d+)?, .* : (i\d+)", built.asm["ttir"]),
        "constants": sorted(constants),
        "specialised": [
            p.name for p in kernel.params if p.name in INTEGERS and not p.do_not_specialize and not p.is_constexpr
        ],
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack, where spilled registers would be."""
    text = cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def loop_length(cubin: bytes) -> int:
    """Machine instructions in the shortest loop with an exponential, which a thread runs for its part of a block."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump("-sass", cubin))]
    loops = []
    for at, text in code:
        jump = re.search(r"BRA\S*.*?0x([0-9a-f]+)", text)
        body = [other for place, other in code if jump and int(jump[1], 16) <= place <= at]
        if any("MUFU.EX2" in other for other in body):
            loops.append(len(body))
    return min(loops)


def cuobjdump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps({name: report(name, variant) for name, variant in VARIANTS.items()}, indent=1))
