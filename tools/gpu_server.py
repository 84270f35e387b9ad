"""What a SGLang server needs on a GPU machine without FlashInfer, beside a torch that is older than the one it pins.

`python tools/gpu_server.py` compiles the kernels that SGLang 0.5.23 compiles at its first request, all at once. They go
into the cache that its servers use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--attention-backend=triton",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    # By default graphs are captured for 58 lengths of a prompt, which takes longer than a short run.
    "--cuda-graph-backend-prefill=disabled",
)
HEAD_DIM, KV_ROW_BYTES = 128, 2048
"""Of every Qwen3 up to 32B: 8 key-value heads of 128 in bf16."""


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what the server and its compiler need."""
    env = dict(base)
    env["SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK"] = "1"  # 0.5.23 asks for kernels of another torch
    env["SGLANG_ENABLE_JIT_DEEPGEMM"] = "0"
    # The Rust core of the prefix cache is compiled for the pinned torch: with 2.11 it takes int64 tensors for int32.
    env["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # SGLang takes the parent of nvcc's folder, which is wrong where nvcc on the PATH is a script.
    toolkit = Path("/usr/local/cuda")
    if "CUDA_HOME" not in env and (toolkit / "bin" / "nvcc").exists():
        env["CUDA_HOME"] = str(toolkit)
    # The memory saver is preloaded into the workers, before torch brings its own libcudart. Without one they cannot
    # start at all.
    folders = [*cudart_folders(), *filter(None, env.get("LD_LIBRARY_PATH", "").split(":"))]
    if folders:
        env["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(folders))
    return env


def cudart_folders() -> list[str]:
    """Where the CUDA runtime is that torch's wheel depends on."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return sorted({str(path.parent) for root in roots for path in Path(root).glob("*/lib/libcudart.so.*")})


def builders() -> dict[str, Callable[[], Any]]:
    """The kernels of a dense Qwen3 in bf16, and those of its FP8 activations. Names are SGLang 0.5.23's own."""
    import torch

    dtype, ops = torch.bfloat16, "sglang.kernels.ops"

    def function(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"{ops}.{module}"), name)

    return {
        "qknorm": lambda: function("layernorm.norm", "_jit_qknorm_module")(HEAD_DIM, dtype),
        "activation": lambda: function("activation.activation", "activation_module")(dtype),
        "rope": lambda: function("attention.rope", "_jit_fused_rope_module")(True, HEAD_DIM, dtype, dtype),
        "kvcache": lambda: function("kvcache.kvcache", "_jit_kvcache_module")(KV_ROW_BYTES, KV_ROW_BYTES, 0),
        "per_token_quant_fp8": lambda: function("quantization.per_token_quant_fp8", "_jit_per_token_quant_fp8_module")(
            dtype
        ),
    }


def timed(build: Callable[[], Any]) -> str:
    begun = time.perf_counter()
    try:
        build()
    except Exception as error:  # the others may still be built
        return f"FAILED after {time.perf_counter() - begun:.1f} s: {type(error).__name__}: {str(error)[-800:]}"
    return f"{time.perf_counter() - begun:.1f} s"


def main() -> int:
    os.environ.update(environment(os.environ))
    found = builders()
    importlib.import_module("sglang.srt.layers.activation")  # once, before the threads
    with ThreadPoolExecutor(len(found)) as threads:
        said = dict(zip(found, threads.map(timed, found.values()), strict=True))
    for name, words in said.items():
        print(f"{name}: {words}", flush=True)
    return int(any(words.startswith("FAILED") for words in said.values()))


if __name__ == "__main__":
    sys.exit(main())
