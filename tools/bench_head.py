"""The head against its peers, on a CPU or on a GPU.

    python tools/bench_head.py --out benchmarks/head_cpu.json          what tools/bench_head_cpu.py does
    python tools/bench_head.py --device cuda [--quick] [--tune]        what tools/bench_head_cuda.py does

On a GPU a checkout, torch and triton are enough: nothing else is imported before it is known where to measure.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def on_gpu(words: list[str]) -> list[str] | None:
    """The command of the GPU's benchmark, with all the other words, where --device says cuda."""
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
