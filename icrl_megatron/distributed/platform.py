"""All CPU and GPU differences: device, backend, layer spec, FP8, and the CUDA calls that Megatron makes on a CPU.

Megatron-Core (0.16 to 0.19) names CUDA in code that a CPU run executes: factory calls with `device="cuda"`, the RNG
tracker, and `Tensor.type()` strings that the optimizers compare. `prepare()` must run before Megatron is used; on a CPU
it replaces those calls with their CPU equivalents, and on a GPU it only selects the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from icrl_kernels import Chunking
from icrl_megatron.settings.schema import ActorSettings
from icrl_megatron.utils.errors import ConfigError

FP8_RECIPES = {"current": "tensorwise", "blockwise": "blockwise"}
"""Values of `actor.fp8` to Megatron's `fp8_recipe`. Only recipes with scales from the tensor itself: delayed scaling
uses earlier passes, so scoring and training with the same weights would not compute the same function."""
_FP8_TOKENS = {"off": 1, "current": 16, "blockwise": 128}
"""Required multiple of an FP8 product's tokens: cuBLAS's (as in Megatron's get_fp8_align_size), or the block size."""
_NAMES_CUDA = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
)
"""Megatron modules used in CPU runs that create tensors with a literal device="cuda"."""

FOR_GPUS = ("apex", "flash_mla", "transformer_engine")
"""Optional libraries of Megatron that this program uses only on GPUs."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_LARGEST_MMAP_THRESHOLD, _KEPT_FREE_BYTES = 32 << 20, 1 << 20
_device: torch.device | None = None
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By `actor.precision`."""


def spare_the_compiler() -> None:
    """Disables torch's compiler without a GPU, where nothing is compiled. Megatron's decorators would still import it,
    which takes a quarter of a rank's startup. Call it before Megatron is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def hide_gpu_libraries() -> None:
    """Hides GPU libraries as if they were not installed, if there is no GPU. Call it before Megatron is imported.

    Megatron uses Transformer Engine's or Apex's optimizer and norms whenever it can import them, and those fail on CPU
    tensors. For FlashMLA, which SGLang installs, it expects an ImportError, but without a driver gets an OSError.
    """
    if not torch.cuda.is_available():
        for name in FOR_GPUS:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None makes the import fail


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Makes `import name` fail inside the block, as if the module were not installed, unless it is already imported."""
    was_imported = sys.modules.setdefault(name, None) is not None  # type: ignore[arg-type]  # None makes the import fail
    try:
        yield
    finally:
        if not was_imported:
            del sys.modules[name]


def keep_no_record_of_collectives() -> None:
    """Turns off torch's flight recorder (gloo and NCCL keep their last 2000 collectives in it). Call it before the
    process group is created. For CPU runs, where nothing reads the recorder.

    A record consists of small C++ allocations that live for about 200 steps. They are made in the middle of a step,
    between the step's tensors on the same heap, so a freed tensor leaves a hole too small for the next larger tensor.
    Resident memory of rulebook_easy grew by 87 MiB from step 50 to step 300 this way. On a GPU the tensors are not on
    this heap, and NCCL dumps the recorder when a collective times out, so it stays on.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")


def return_freed_memory() -> None:
    """Makes the C heap give its free end back to the system. For CPU runs, whose tensors are on it.

    glibc raises the limit above which it does so, up to 64 MiB, when large blocks are freed. The heap then keeps the
    memory of larger batches, in pieces between blocks that live on: rulebook_easy grew by 29 MiB from step 75 to step
    300, with a policy that did not change. Setting a limit also stops the other one from following the sizes of
    blocks, so it is set to its maximum: a block that is mapped anew for every use costs page faults (with 1 MiB, an
    update took 1.9 times as long). Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)


def keep_fp8_scales_exact() -> None:
    """Keeps FP8 block scales in fp32 on Hopper. By default Transformer Engine rounds them to powers of two, which
    Blackwell's products need and which costs accuracy on Hopper. The variable is read at import: call this before
    Megatron is imported. Only ranks query the GPU; other processes may fork, so they must not."""
    rank = os.environ.get("LOCAL_RANK")
    if rank and torch.cuda.is_available() and torch.cuda.get_device_capability(int(rank))[0] == 9:
        os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")


def show_gpu_library(name: str) -> None:
    """Undoes `hide_gpu_libraries` for code that imports one of these libraries itself."""
    if sys.modules.get(name, name) is None:
        del sys.modules[name]


def prepare(choice: str = "auto") -> torch.device:
    """Selects this rank's device and prepares the process for Megatron; call it before any use of Megatron.

    Args:
        choice: auto | cpu | cuda (`launch.device`).

    Raises:
        ConfigError: cuda was requested and there is none.
    """
    global _device
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise ConfigError("launch.device=cuda: torch sees no GPU here; use launch.device=auto, or see `icrl doctor`")
    if choice == "cpu" or not has_cuda:
        keep_no_record_of_collectives()
        return_freed_memory()
        if _device is None:
            _stand_in_for_cuda()
        _device = torch.device("cpu")
    else:
        _device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(_device)
    return _device


def device() -> torch.device:
    """The device chosen by `prepare`."""
    if _device is None:
        raise RuntimeError("platform.prepare() has not run")
    return _device


def backend() -> str:
    """torch.distributed's backend: NCCL for GPU tensors plus gloo for host tensors, or only gloo on a CPU."""
    return "gloo" if device().type == "cpu" else "cpu:gloo,cuda:nccl"


def memory_gib() -> float:
    """Memory in use in GiB: on a GPU, by all processes; on a CPU, resident memory of this process."""
    if device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def synchronize() -> None:
    """Waits for the device's queue, so that the wall-clock time of a phase includes only its own work."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def head_chunking(actor: ActorSettings) -> Chunking:
    """How the head is computed on this device. Raises ConfigError if the Triton kernels are requested but cannot
    run."""
    on_cpu = device().type == "cpu"
    backend = "torch" if on_cpu and actor.head_backend == "auto" else actor.head_backend
    if on_cpu and backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ConfigError("actor.head_backend=triton: there is no GPU here; use auto, or TRITON_INTERPRET=1 to debug")
    if backend == "torch" and actor.head_logits == "bf16":
        raise ConfigError("actor.head_logits=bf16: the torch head, which CPUs use, has fp32 logits; use fp32")
    return Chunking(actor.head_chunk_tokens, backend, actor.head_logits)


def sequence_multiple(actor: ActorSettings) -> int:
    """The required multiple of a sequence's tokens: a context-parallel rank has two chunks of it (data/context.py)."""
    return 1 if actor.context_parallel == 1 else 2 * actor.context_parallel


def token_multiple(actor: ActorSettings) -> int:
    """The required multiple of a micro-batch's tokens, and of `sequence_multiple`: each rank of a context-parallel and
    of a sequence-parallel group has an equal share."""
    shares = (actor.tensor_parallel if actor.sequence_parallel else 1) * sequence_multiple(actor)
    return _FP8_TOKENS[actor.fp8] * shares


def transformer_engine_layers(layers: str, bf16: bool) -> bool:
    """Whether `actor.layers` selects Transformer Engine's modules: with auto, for bf16 on a GPU.

    Transformer Engine multiplies fp32 matrices in TF32. On an H100 its log-probs of an fp32 model differed from the
    local engine's by 2.8e-4 on average, and 1e-5 is the limit for fp32. So fp32 gets torch's layers.
    """
    return layers == "transformer_engine" or (layers == "auto" and bf16 and device().type == "cuda")


def fusions(layers: str, bf16: bool) -> dict[str, bool]:
    """TransformerConfig arguments for `actor.layers`: the fused kernels of Transformer Engine's layers.

    Without the fused rotary embedding, Megatron copies the sequence lengths to the host in every layer.
    """
    fused = transformer_engine_layers(layers, bf16) and device().type == "cuda"
    if fused:
        _let_transformer_engine_add_gradients()
    return {"apply_rope_fusion": fused, "bias_activation_fusion": fused, "gradient_accumulation_fusion": fused}


def _let_transformer_engine_add_gradients() -> None:
    """Bypasses Megatron's requirement for Apex when weight gradients are accumulated into their fp32 buffers.

    Transformer Engine's layers accumulate in the matrix product itself. Megatron 0.16 requires Apex's extension also
    for its own `ColumnParallelLinear`. This model has only one, the output layer, whose forward pass never runs: the
    head uses only its weight.
    """
    importlib.import_module("megatron.core.tensor_parallel.layers")._grad_accum_fusion_available = True  # type: ignore[attr-defined]


def fp8_config(settings: ActorSettings) -> dict[str, Any]:
    """TransformerConfig arguments for `actor.fp8`; empty when off.

    E4M3 with a scale per block; with one scale per tensor, gradients use E5M2 for its range. The head stays in bf16
    because Megatron by default quantizes only the decoder's linear layers.

    Raises:
        ConfigError: the hardware has no FP8.
    """
    if settings.fp8 == "off":
        return {}
    require_fp8_hardware(settings.fp8)
    return {"fp8": "hybrid" if settings.fp8 == "current" else "e4m3", "fp8_recipe": FP8_RECIPES[settings.fp8]}


def require_fp8_hardware(recipe: str) -> None:
    """Raises ConfigError unless the device has FP8 tensor cores (compute capability 8.9; 9.0 for blockwise scaling)."""
    remedy = "use actor.fp8=off, or run on Hopper or newer"
    if device().type == "cpu":
        raise ConfigError(f"actor.fp8={recipe}: this machine has no GPU with FP8; {remedy}")
    found = torch.cuda.get_device_capability(device())
    needed = (9, 0) if recipe == "blockwise" else (8, 9)
    if found < needed:
        raise ConfigError(f"actor.fp8={recipe} needs compute capability {needed}, this GPU has {found}; {remedy}")


class _Stream:
    """A no-op CUDA stream: a CPU has one implicit queue. A class, because annotations name it."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def synchronize(self) -> None: ...


def _stand_in_for_cuda() -> None:
    """Replaces the CUDA calls that Megatron makes on every path. Only for a process that does not use CUDA."""
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    tensor_class: Any = torch.Tensor
    module_class: Any = torch.nn.Module
    cuda.current_device = lambda: cpu
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.Stream = _Stream
    cuda.stream = lambda stream: stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    tensor_class.cuda = module_class.cuda = lambda self, *_, **__: self
    tensor_class.type = _typed_as_cuda(torch.Tensor.type)
    _patch_megatron()


class _TorchOnCPU:
    """torch for the modules of `_NAMES_CUDA`: factories treat a literal `device="cuda"` as the CPU.

    Patching torch itself would hide its factories from device contexts (transformers builds models under one).
    """

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("tensor", "zeros"):
            return found

        def made(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return found(*args, **kwargs)

        return made


def _typed_as_cuda(original: Any) -> Any:
    """`Tensor.type()` with the type name that Megatron's optimizers expect; conversions are unchanged."""

    @functools.wraps(original)
    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    return typed


def _patch_megatron() -> None:
    """Patches Megatron: the tensor factories above, and the RNG tracker, which stores CUDA generator states."""
    for name in _NAMES_CUDA:
        importlib.import_module(name).torch = _TorchOnCPU()  # type: ignore[attr-defined]
    rng: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
