"""SGLang beside a model on one GPU, through the trainer's own engine: starts, serves, sleeps, is synced, is compared.

    python tools/gpu_engine.py --model 0.6b --out gpu_out/engine_0.6b
    python tools/gpu_engine.py --device cpu --python PATH_OF_AN_INTERPRETER_WITH_SGLANG --out /tmp/engine_cpu

Three servers in turn, each on random weights that are sent to it: `bf16`, `fp8` (engine.quantization=fp8) and `eager`
(without CUDA graphs). A part that fails is written down, and the next one begins. <out>/engine.json is written after
every part, with <out>/NAME.log beside it. Ends with 1 when a part failed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import bench_schema
import gpu_engine_parts as parts
import gpu_model
import gpu_server
import torch
import typer
from gpu_engine_parts import Bench

from icrl_megatron.engines.sglang_build import tensor_shapes
from icrl_megatron.engines.sglang_server import Server, ServerSpec
from icrl_megatron.engines.sglang_weights import SharedMemory
from icrl_megatron.settings.schema import EngineSettings

GRAPHS_OFF = ("--cuda-graph-backend-decode=disabled",)
GRAPHS = ("--cuda-graph-bs-decode", "1", "8", "16", "32", "48", "64")
"""Fewer sizes of a batch than by default, which are captured one by one at every start."""
SERVERS: dict[str, tuple[str, ...]] = {
    "bf16": ("push", "generate", "mismatch", "new_weights", "sleep_and_wake", "deadline"),
    "fp8": ("push", "generate", "mismatch", "new_weights"),
    "eager": ("push", "generate"),
}
"""The parts that are run on each server, after its start."""
PART_LIMIT_S = 60
TRACEBACK_LINES = 6
FILES_BYTES = 20 << 30


class OutOfTimeError(KeyboardInterrupt):
    """A part took longer than its limit. It may be raised anywhere, and asyncio passes on this kind only."""


@dataclass
class Record:
    """Everything that was measured so far, in a file that is written anew after every part."""

    path: Path
    about: dict[str, Any]
    medians: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, limit_s: int, part: Callable[[], dict[str, float]]) -> bool:
        """Runs a part and writes what it returned, or why it failed; says whether it succeeded."""
        begun = time.perf_counter()
        try:
            with limited(limit_s):
                found = part()
        except (Exception, OutOfTimeError) as error:
            last = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
            self.failures[name] = f"{type(error).__name__}: {str(error)[:4000]}\n" + "\n".join(last)
            print(f"FAILED {name} after {time.perf_counter() - begun:.1f} s: {self.failures[name]}", flush=True)
        else:
            self.medians[name] = found | {"part_seconds": time.perf_counter() - begun}
            print(f"{name}: {json.dumps({k: round(v, 6) for k, v in self.medians[name].items()})}", flush=True)
        report = self.about | {"medians": self.medians, "failures": self.failures}
        bench_schema.write(self.path, "gpu_engine", report)
        return name not in self.failures


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises OutOfTimeError in the main thread after so many seconds. A hanging CUDA call does not notice."""

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def scratch() -> str | None:
    """Memory, where there is enough of it for a model's files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > FILES_BYTES else None


def settings_of(name: str, device: str, python: str, fraction: float, start_limit_s: int) -> EngineSettings:
    extra: tuple[str, ...] = ()
    if device == "cuda":
        extra = gpu_server.ARGUMENTS + (GRAPHS_OFF if name == "eager" else GRAPHS)
    return EngineSettings(
        kind="sglang",
        python=python,
        # Weights are sent before anything is asked. Only a server that quantizes has to read the model's files first.
        # The model's folder has no tokenizer.
        server_args=[*extra, "--skip-tokenizer-init", *([] if name == "fp8" else ["--load-format=dummy"])],
        quantization="fp8" if name == "fp8" else "",
        memory_fraction=fraction,
        max_batch=parts.CONCURRENT,
        startup_timeout_s=float(start_limit_s),
        sync_timeout_s=PART_LIMIT_S - 5.0,
        request_timeout_s=PART_LIMIT_S - 5.0,
    )


def serve(name: str, folder: Path, settings: EngineSettings, model: Any, record: Record, limit_s: int) -> None:
    """One server: its start, its parts, and its end whatever happens."""
    device = next(model.parameters()).device
    dtype, precision = (torch.bfloat16, "bf16") if device.type == "cuda" else (torch.float32, "fp32")
    log = record.path.parent / f"{name}.log"
    spec = ServerSpec(folder, settings, precision, parts.CONTEXT, log, on_cpu=device.type == "cpu")
    server = Server(spec)
    transport = SharedMemory(server, 1, None, 0, settings.sync_timeout_s)
    bench = Bench(server, settings, lambda: transport, tensor_shapes(folder), dtype, device, model)
    try:
        if record.run(f"{name}/start", limit_s, lambda: parts.start(bench)):
            for part in SERVERS[name]:
                record.run(f"{name}/{part}", PART_LIMIT_S, lambda part=part: getattr(parts, part)(bench))  # type: ignore[misc]
                if not server.alive():
                    record.failures[f"{name}/server"] = f"it died in {part}: {server.log_end()}"
                    break
    finally:
        transport.close()
        server.kill()


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(gpu_model.SHAPES)}.")] = "0.6b",
    servers: Annotated[str, typer.Option(help=f"Some of {','.join(SERVERS)}.")] = ",".join(SERVERS),
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the logs.")] = Path("benchmarks/gpu_engine"),
    device: Annotated[str, typer.Option(help="cuda | cpu (a small model).")] = "cuda",
    python: Annotated[str, typer.Option(help="Interpreter with SGLang; empty: this one.")] = "",
    memory_fraction: Annotated[float, typer.Option(help="Of the GPU's memory, for a server.")] = 0.4,
    start_limit_s: Annotated[int, typer.Option(help="A server must be ready by then.")] = 150,
) -> None:
    chosen = servers.split(",")
    if device not in ("cuda", "cpu") or model not in gpu_model.SHAPES or not set(chosen) <= set(SERVERS):
        print(f"error: --device={device} --model={model} --servers={servers}: see --help", file=sys.stderr)
        raise typer.Exit(2)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        os.environ.update(gpu_server.environment(os.environ))
    model = model if device == "cuda" else "tiny"
    packages = ("torch", "triton", "transformers", "sglang", "sglang-kernel")
    record = Record(
        out / "engine.json", bench_schema.about(packages) | {"card": bench_schema.card(device), "model": model}
    )
    with tempfile.TemporaryDirectory(dir=scratch()) as where:
        made: list[Any] = []
        if record.run("model", PART_LIMIT_S, lambda: parts.build(model, Path(where), torch.device(device), made)):
            for name in chosen:
                if name == "fp8":
                    record.run("fp8/files", PART_LIMIT_S, lambda: parts.write(made[0], Path(where)))
                settings = settings_of(name, device, python, memory_fraction, start_limit_s)
                try:
                    serve(name, Path(where), settings, made[0], record, start_limit_s + 20)
                except (Exception, OutOfTimeError) as error:  # the next server starts all the same
                    record.failures[f"{name}/end"] = f"{type(error).__name__}: {error}"
    record.run("end", PART_LIMIT_S, lambda: {"failures": float(len(record.failures))})
    raise typer.Exit(int(bool(record.failures)))


if __name__ == "__main__":
    typer.run(main)
