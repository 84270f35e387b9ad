"""Compares the head with other implementations, on a CPU or on a GPU.

    python tools/bench_head.py --out benchmarks/head_cpu.json          runs tools/bench_head_cpu.py
    python tools/bench_head.py --device cuda [--quick] [--tune]        runs tools/bench_head_cuda.py

On a GPU a checkout, torch and triton suffice: nothing else is imported before the device is known.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def on_gpu(words: list[str]) -> list[str] | None:
    """With --device cuda, the command of the GPU benchmark with all other words; else None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    known, others = parser.parse_known_args(words)
    there = [sys.executable, str(Path(__file__).with_name("bench_head_cuda.py")), *others]
    return there if known.device == "cuda" else None


if __name__ == "__main__":
    there = on_gpu(sys.argv[1:])
    if there is not None:
        sys.exit(subprocess.run(there, check=False).returncode)
    import bench_head_cpu

    bench_head_cpu.run()
