"""`python compile_kernels.py`: every kernel compiled for an H100, as JSON. Needs triton, no GPU and no interpreter."""

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

H100 = GPUTarget("cuda", 90, 32)
FLAGS = {"HAS_OLD": True, "HAS_BEHAVIOUR": True, "HAS_REFERENCE": True, "HAS_ENTROPY": True}
SIZES = {"BLOCK": 4096, "ROWS": 128}
POINTERS = {"targets_ptr": "*i64", "calibrated_ptr": "*u8", "finite_ptr": "*u8"}
INTEGERS = {"rows", "columns", "stride", "gradient_stride", "first_column", "splits", "parts"}
VARIANTS = {
    "split_statistics": {"logits_ptr": "*fp32"},
    "split_statistics of bf16": {"logits_ptr": "*bf16"},
    "logit_gradients": {"logits_ptr": "*fp32", "gradients_ptr": "*bf16"},
    "logit_gradients in place": {"logits_ptr": "*bf16", "gradients_ptr": "*bf16"},
    "logit_gradients of fp32": {"logits_ptr": "*fp32", "gradients_ptr": "*fp32"},
    "merge_statistics": {},
    "score_tokens": {},
    "token_objective": {},
}


def type_of(name: str, types: dict[str, str]) -> str:
    if name in types or name in POINTERS:
        return types.get(name, POINTERS.get(name, ""))
    if name.endswith("_ptr"):
        return "*u8" if name.startswith("clipped") else "*fp32"
    return "i32" if name in INTEGERS else "fp32"


def report(name: str, types: dict[str, str]) -> dict[str, Any]:
    kernel = getattr(kernels, name.split()[0])
    constants = {p.name: {**FLAGS, **SIZES}[p.name] for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else type_of(p.name, types) for p in kernel.params}
    # As at a launch: pointers and strides are multiples of 16.
    attributes = {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if p.name.endswith(("_ptr", "stride")) and not p.is_constexpr
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = 8 if "BLOCK" in constants else 4
    built = triton.compile(source, target=H100, options={"num_warps": warps})
    return {
        "cubin_bytes": len(built.asm["cubin"]),
        "shared_bytes": built.metadata.shared,
        **resources(built.asm["cubin"]),
        "row_multiplications": re.findall(r"arith\.muli %row(?:_\d+)?, .* : (i\d+)", built.asm["ttir"]),
        "constants": sorted(constants),
        "specialised": [
            p.name for p in kernel.params if p.name in INTEGERS and not p.do_not_specialize and not p.is_constexpr
        ],
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack, which spilled registers would lie in."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


if __name__ == "__main__":
    print(json.dumps({name: report(name, types) for name, types in VARIANTS.items()}, indent=1))
