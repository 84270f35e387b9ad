"""The JSON schema of all benchmark results, which `bench_report.py` reads.

    {"schema": 1, "benchmark": "step", "command": ..., "date": ..., "machine": ..., "versions": {...},
     "measurements": [{"subject": "icrl", "quantity": "cpu_seconds", "value": 0.58, "unit": "s"}, ...],
     "bars": [{"name": "CPU seconds, share of TRL's", "value": 0.52, "limit": 0.8, "at_least": false}, ...], ...}

Other keys are specific to one benchmark. Measurements that could not be made are omitted, and so is `bars` for
benchmarks that have none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
REQUIRED = ("schema", "benchmark", "command", "date", "machine", "versions", "measurements")
UNITS = {
    "seconds": "s",
    "_s": "s",
    "_ms": "ms",
    "_gb": "GB",
    "mib": "MiB",
    "gib": "GiB",
    "_per_s": "1/s",
    "_a_gpu": "1/s/GPU",
    "gb_per_s": "GB/s",
}
"""Suffix of a quantity's name -> its unit; quantities with other suffixes have no unit."""


@dataclass(frozen=True)
class Measurement:
    """One value of one quantity of a subject, with its unit."""

    subject: str
    quantity: str
    value: float
    unit: str


@dataclass(frozen=True)
class Bar:
    """A limit on one value of a benchmark."""

    name: str
    value: float | None
    """None: could not be measured."""
    limit: float
    at_least: bool = False
    """The limit is the smallest accepted value; otherwise it is the largest."""

    @property
    def held(self) -> bool | None:
        """Whether the value keeps the limit; None if it was not measured. NaN never keeps it."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def verdict(self) -> str:
        return {None: "not measured", True: "met", False: "MISSED"}[self.held]

    def asked(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:.4g}"

    def cells(self) -> tuple[str, str, str, str]:
        """Name, value, limit and verdict."""
        return self.name, "" if self.value is None else f"{self.value:.4g}", self.asked(), self.verdict()

    def line(self) -> str:
        return "  ".join(cell for cell in self.cells() if cell)


def unit_of(quantity: str) -> str:
    """The unit of a quantity, from the longest suffix that matches."""
    fitting = [end for end in UNITS if quantity.endswith(end)]
    return UNITS[max(fitting, key=len)] if fitting else ""


def measurements(medians: Mapping[str, Mapping[str, float]]) -> list[Measurement]:
    """The measurements in {subject: {quantity: value}}."""
    return [Measurement(s, q, float(v), unit_of(q)) for s, values in medians.items() for q, v in values.items()]


def require(extra: str, *modules: str) -> None:
    """Exits with 2 if modules with which a benchmark compares are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} cannot be imported; pip install -e '.[{extra}]'", file=sys.stderr)
        sys.exit(2)


def about(packages: tuple[str, ...] = ("torch", "megatron-core", "numpy")) -> dict[str, Any]:
    """Command, date, machine and versions."""
    versions = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *map(anywhere, sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
    }


def anywhere(word: str) -> str:
    """The word, but of an absolute path only the name, because the folder is specific to this machine."""
    return f".../{Path(word).name}" if Path(word).is_absolute() else word


def stamped(benchmark: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's report with the common keys added; `medians` become the measurements, `Bar`s become dicts."""
    rows = [asdict(row) for row in measurements(report["medians"])]
    found = {"schema": SCHEMA, "benchmark": benchmark, **report, "measurements": rows}
    return found | ({"bars": [asdict(bar) for bar in report["bars"]]} if "bars" in report else {})


def write(out: Path, benchmark: str, report: Mapping[str, Any]) -> None:
    """Writes a report with the common keys; creates the folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(stamped(benchmark, report), indent=1) + "\n")


def card(device: str) -> str:
    """Name of the GPU, or none."""
    import torch  # not at the top: some benchmarks do not need it

    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "none"


def parser(description: str | None, out: str = "", sizes: Sequence[str] = ("tiny", "quick", "full")) -> ArgumentParser:
    """A parser of --device, --size and, if `out` is its default, --out."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(out))
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--size", choices=sizes, default="full", help="tiny: a dry run on a CPU")
    return made


def run_ms(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run: by events on a GPU, else by the clock."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """The bars of a result that `read` returned."""
    return [Bar(**bar) for bar in result.get("bars", [])]


def read(path: Path) -> dict[str, Any]:
    """A result of this schema. Raises ValueError with the file and the missing keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    lacking = [key for key in REQUIRED if not isinstance(found, dict) or key not in found]
    if lacking:
        raise ValueError(
            f"{path}: not a benchmark result of this version, it lacks {', '.join(lacking)}; run the benchmark again"
        )
    return dict(found)
