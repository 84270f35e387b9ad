"""Import this before Megatron: it silences Megatron's startup notices, keeps torch's compiler and GPU libraries out of
processes without a GPU, and has Python's garbage collector visit Megatron's modules less often."""

import atexit
import gc
import importlib
import logging
import warnings

from icrl_megatron.distributed import platform

# The notices are about optional accelerators (`icrl doctor` reports those) and about Megatron's own use of torch.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads a checkpoint alone
logging.getLogger("megatron.core").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA toolkit without a GPU
platform.spare_the_compiler()
platform.hide_gpu_libraries()
platform.keep_fp8_scales_exact()

# Megatron's modules live as long as the process. With Python's usual thresholds the collector visits their objects many
# times during the imports, and once more at exit, where frozen objects are left out: to import train.py and exit takes
# 4.2 s of CPU time instead of 5.9 s.
gc.set_threshold(50_000, 20, 100)
atexit.register(gc.freeze)

# Megatron's inference engine imports wandb for charts that nothing here draws. Trackers import it when a run uses it.
with platform.hidden("wandb"):
    importlib.import_module("megatron.core.inference.contexts.dynamic_context")
