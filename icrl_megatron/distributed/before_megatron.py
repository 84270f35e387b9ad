"""Import this before Megatron: it silences Megatron's startup notices, and keeps torch's compiler and GPU libraries
out of processes without a GPU."""

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
