"""The only module that knows a CPU from a GPU: device, backend, layer spec, FP8, and what Megatron needs on a CPU.

Megatron-Core 0.16 names CUDA in places that a CPU run passes through: factory calls with `device="cuda"`, the RNG
tracker, `Tensor.type()` strings that the optimizers compare. `prepare()` must run before Megatron is used; on a CPU
it answers those calls with their CPU equivalents, and on a GPU it does nothing but pick the device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from typing import Any

import psutil
import torch

from icrl_kernels import Chunking
from icrl_megatron.settings.schema import ActorSettings
from icrl_megatron.utils.errors import ConfigError

FP8_RECIPES = {"current": "tensorwise", "blockwise": "blockwise"}
"""Our names to Megatron's `fp8_recipe`. Only those whose scales come from the tensor itself: delayed scaling takes them
from the passes before, and scoring and training of the same weights would not compute the same function."""
_FP8_TOKENS = {"off": 1, "current": 16, "blockwise": 128}
"""Tokens of an FP8 product come in multiples of this: what cuBLAS takes (as in Megatron's get_fp8_align_size), or a
block."""
_NAMES_CUDA = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
)
"""Megatron modules on a CPU run's path that make tensors with a literal device="cuda"."""

FOR_GPUS = ("apex", "flash_mla", "transformer_engine")
"""Optional libraries of Megatron that this program uses on GPUs alone."""

_device: torch.device | None = None


def spare_the_compiler() -> None:
    """Without a GPU nothing is compiled; Megatron's decorators would import torch's compiler all the same, which takes
    a quarter of a rank's start. Call it before Megatron is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def hide_gpu_libraries() -> None:
    """Without a GPU, libraries for GPUs are as if not installed; call it before Megatron is imported.

    Megatron takes Transformer Engine's or Apex's optimizer and norms wherever it can import them, and those fail on CPU
    tensors; of FlashMLA, which SGLang brings, it expects an ImportError, and without a driver gets an OSError.
    """
    if not torch.cuda.is_available():
        for name in FOR_GPUS:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own way to say: not there


def keep_no_record_of_collectives() -> None:
    """Turns off torch's flight recorder (gloo and NCCL keep their last 2000 collectives in it). Call it before the
    process group is made. For CPU runs, where nothing reads the recorder.

    A record consists of small C++ allocations that stay for about 200 steps. They are made in the middle of a step,
    between the step's tensors on the same heap, so a freed tensor leaves a hole that the next larger tensor does not
    fit into. Resident memory of rulebook_easy grew by 87 MiB from step 50 to step 300 this way. On a GPU the tensors
    are not on this heap, and NCCL dumps the recorder when a collective times out, so it stays on.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")


def keep_fp8_scales_exact() -> None:
    """Transformer Engine else rounds the scales of blocks to powers of two, which Blackwell's products need and which
    costs accuracy on Hopper. Read when it is imported: call it before Megatron is. Of ranks alone the GPU is asked:
    others, which may fork, leave it alone."""
    rank = os.environ.get("LOCAL_RANK")
    if rank and torch.cuda.is_available() and torch.cuda.get_device_capability(int(rank))[0] == 9:
        os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")


def show_gpu_library(name: str) -> None:
    """For those who look at one of these libraries themselves."""
    if sys.modules.get(name, name) is None:
        del sys.modules[name]


def prepare(choice: str = "auto") -> torch.device:
    """Picks this rank's device and readies the process for Megatron; call it before anything of Megatron's.

    Args:
        choice: auto | cpu | cuda (`launch.device`).

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    global _device
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise ConfigError("launch.device=cuda: torch sees no GPU here; use launch.device=auto, or see `icrl doctor`")
    if choice == "cpu" or not has_cuda:
        keep_no_record_of_collectives()
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
    """torch.distributed's backend: NCCL for GPU tensors with gloo beside it for host ones, gloo alone on a CPU."""
    return "gloo" if device().type == "cpu" else "cpu:gloo,cuda:nccl"


def memory_gib() -> float:
    """Memory in use: on a GPU by all processes together; on a CPU, resident in this process."""
    if device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def synchronize() -> None:
    """Waits for the device's queue, so that a phase's wall-clock time is the phase's own."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def head_chunking(actor: ActorSettings) -> Chunking:
    """How the head is computed here. Raises ConfigError where its kernels are asked for and cannot run."""
    on_cpu = device().type == "cpu"
    backend = "torch" if on_cpu and actor.head_backend == "auto" else actor.head_backend
    if on_cpu and backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ConfigError("actor.head_backend=triton: there is no GPU here; use auto, or TRITON_INTERPRET=1 to debug")
    if backend == "torch" and actor.head_logits == "bf16":
        raise ConfigError("actor.head_logits=bf16: the torch head, which CPUs use, has fp32 logits; use fp32")
    return Chunking(actor.head_chunk_tokens, backend, actor.head_logits)


def token_multiple(actor: ActorSettings) -> int:
    """What a micro-batch's tokens must be a multiple of: each rank of a sequence-parallel group has a whole share."""
    return _FP8_TOKENS[actor.fp8] * (actor.tensor_parallel if actor.sequence_parallel else 1)


def transformer_engine_layers(layers: str, bf16: bool) -> bool:
    """Whether `actor.layers` means Transformer Engine's modules: with auto, for bf16 on a GPU.

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
    """Lifts Megatron's demand for Apex where weight gradients are added to their fp32 buffers.

    Transformer Engine's layers do that in the matrix product itself. Megatron 0.16 demands Apex's extension for its own
    `ColumnParallelLinear` too. The only one in our model is the output layer, whose forward pass never runs: the head
    uses its weight alone.
    """
    importlib.import_module("megatron.core.tensor_parallel.layers")._grad_accum_fusion_available = True  # type: ignore[attr-defined]


def fp8_config(settings: ActorSettings) -> dict[str, Any]:
    """TransformerConfig arguments for `actor.fp8`; empty when off.

    E4M3 with a scale for each block; with one for a whole tensor, gradients take E5M2 for its range. The head stays in
    bf16 by Megatron's own default of quantising only the decoder's linears.

    Raises:
        ConfigError: the recipe is unknown, precision is not bf16, or the hardware has no FP8.
    """
    if settings.fp8 == "off":
        return {}
    if settings.fp8 not in FP8_RECIPES:
        raise ConfigError(f"actor.fp8={settings.fp8}: expected off or one of {', '.join(FP8_RECIPES)}")
    if settings.precision != "bf16":
        raise ConfigError(f"actor.fp8={settings.fp8} needs actor.precision=bf16, got {settings.precision}")
    require_fp8_hardware(settings.fp8)
    return {
        "fp8": "hybrid" if settings.fp8 == "current" else "e4m3",
        "fp8_recipe": FP8_RECIPES[settings.fp8],
    }


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
    """A CPU has one implicit queue: every wait on it is already over. A class, because annotations name it."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def synchronize(self) -> None: ...


def _stand_in_for_cuda() -> None:
    """Answers the CUDA calls that Megatron makes on every path. Only in a process that has no use for CUDA."""
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
    """torch as those Megatron modules see it: factories read a literal `device="cuda"` as the CPU.

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
    """`Tensor.type()` with the name that Megatron's optimizers look for; conversions are untouched."""

    @functools.wraps(original)
    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    return typed


def _patch_megatron() -> None:
    """Inside Megatron: the tensor factories above, and the RNG tracker, which keeps CUDA generator states."""
    for name in _NAMES_CUDA:
        importlib.import_module(name).torch = _TorchOnCPU()  # type: ignore[attr-defined]
    rng: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
