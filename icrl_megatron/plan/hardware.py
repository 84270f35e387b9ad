"""What the planner knows of GPUs and of the wires between them: data-sheet numbers, with their sources."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.utils.errors import ConfigError, did_you_mean

GIB = 2**30
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight. Rates are peaks; what is reached of them is in `calibration.Constants`."""

    name: str
    memory_bytes: float
    """What the driver reports as total, a little under the nominal size."""
    bf16_flops: float
    """Dense, per second."""
    fp8_flops: float
    """Dense, per second; 0 where there is none."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink_bandwidth: float
    """Bytes per second in one direction, to the other GPUs of the node."""
    network_bandwidth: float
    """Bytes per second in one direction and per GPU, to other nodes: one 400 Gb/s port each (A100: 200 Gb/s)."""
    host_bandwidth: float
    """Bytes per second in one direction to the host's memory: PCIe, of generation 5 (A100: 4) with 16 lanes."""
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79.1 * GIB, 312e12, 0.0, 2.039e12, 300e9, 25e9, 32e9, "NVIDIA A100 80GB SXM data sheet"),
        Gpu("h100", 79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, 64e9, "NVIDIA H100 SXM data sheet"),
        Gpu("h200", 139.8 * GIB, 989e12, 1979e12, 4.8e12, 450e9, 50e9, 64e9, "NVIDIA H200 SXM data sheet"),
        Gpu("b200", 178.3 * GIB, 2250e12, 4500e12, 7.7e12, 900e9, 50e9, 64e9, "NVIDIA HGX B200 data sheet"),
    )
}


def get(name: str) -> Gpu:
    """The GPU of that name. Raises ConfigError with the nearest ones."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    remedy = did_you_mean(name.lower(), GPUS, f"choose one of {', '.join(GPUS)}", cutoff=0.4)
    raise ConfigError(f"--gpu {name}: not a GPU that the planner knows; {remedy}")


def detect() -> Gpu | None:
    """The GPU of this machine with the memory that its driver reports; None without one, or one of another kind."""
    if not Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _of_smi(done.stdout) if done.returncode == 0 else None


def _of_smi(output: str) -> Gpu | None:
    """The smallest GPU of nvidia-smi's lines "name, MiB"."""
    found: list[Gpu] = []
    for line in output.splitlines():
        name, _, mib = line.rpartition(",")
        known = next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)
        if known is None or not mib.strip().isdecimal():
            return None
        values = {**known.__dict__, "memory_bytes": float(mib) * 2**20}
        found.append(Gpu(**values))
    return min(found, key=lambda gpu: gpu.memory_bytes, default=None)
