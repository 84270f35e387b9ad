"""Import this before Megatron: it silences Megatron's startup notices, keeps torch's compiler and GPU libraries out of
processes without a GPU, and imports Megatron with Python's garbage collector off."""

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

# Megatron's modules live as long as the process, but the collector visits their objects many times during the imports,
# and again when the process ends. Frozen objects are not visited: to import train.py and exit takes 3.6 s of CPU time
# instead of 5.5 s on a busy machine.
gc.disable()
for _name in ("megatron.core.models.gpt.gpt_layer_specs", "megatron.core.models.gpt", "megatron.core.optimizer"):
    importlib.import_module(_name)
gc.freeze()
gc.enable()
