"""Rollouts through SGLang: the client's overhead, episode times, cache hit rates, and the time of a weight sync.

    python tools/bench_rollout.py --python PATH_OF_AN_INTERPRETER_WITH_SGLANG --out benchmarks/rollout_cpu.json
    python tools/bench_rollout.py --device cuda --model /models/Qwen3-8B --out benchmarks/rollout_8b.json

One server runs a Qwen3 with random weights or --model; on a GPU it shares the card with this process, as it does with
an actor. `bare` sends prompts directly to SGLang's API, `streamed` does the same with streaming and measures the time
to the first token; `client` is the trainer's engine. They alternate and decode greedily, so that all generate the same
tokens. `oversample_*` play full steps of Household (rollout_steps.py). `sync_*` pushes all weights of a model,
alternating with one copy of as many bytes within this process, and reports the parts of its time: seconds to fill the
buckets alone, for each request to the server, and for a request without payload.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import bench_schema
import torch
import typer
from bench_schema import Bar
from rich.console import Console
from rollout_steps import Step, setup_of, step
from transformers import AutoModelForCausalLM, AutoTokenizer

from icrl_megatron.engines.flat_buffer import sizes
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_build import tensor_shapes
from icrl_megatron.engines.sglang_server import Server, ServerSpec, check_version, installed_version
from icrl_megatron.engines.sglang_weights import Bucket, SharedMemory, filled
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.prompts import template_words
from icrl_megatron.settings.schema import EngineSettings, TinyModel
from icrl_megatron.tasks import registry
from icrl_megatron.utils.errors import ConfigError

MODELS = {
    "cpu": TinyModel(layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=768, tie_embeddings=False),
    "cuda": TinyModel(layers=16, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=6144, tie_embeddings=False),
}
LARGER = {
    "cpu": TinyModel(layers=6, hidden=1024, heads=8, kv_heads=4, head_dim=128, ffn=3072, tie_embeddings=False),
    "cuda": TinyModel(layers=12, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12288, tie_embeddings=False),
}
"""Models that are only synced, with several times as many bytes. On a GPU, a third of Qwen3-8B's layers."""
PRECISION = {"cpu": ("fp32", torch.float32), "cuda": ("bf16", torch.bfloat16)}
GPU_FRACTION = 0.4
"""Fraction of the card's memory for the server; this process holds the model too."""
COPIED_AT_ONCE = 1 << 30
"""Bytes per copy; larger copies are split."""
CONTEXT = 1024
NEW_TOKENS = 48
OVERSAMPLE = 1.5
REQUEST_TURNS = 5
"""Passes over the requests per round: the server's own time varies by a fifth between passes."""
CLIENT_BAR = 1.1
"""Maximum seconds of the client, relative to the bare requests."""
SYNC_BAR = 1.5
"""Maximum seconds of a sync, relative to one copy of its bytes."""


@dataclass(frozen=True)
class Turn:
    """One pass over all prompts."""

    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Spread:
    p50: float
    p95: float
    max: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        ordered = sorted(values)
        return Spread(statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1])


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(8, vocabulary) for _ in range(rng.randint(16, 128))] for _ in range(count)]


async def bare(server: Server, asked: list[list[int]], first_tokens: list[float]) -> Turn:
    """Sends all requests at once with streaming; appends the seconds to each one's first token."""
    begun = time.perf_counter()

    async def one(session: aiohttp.ClientSession, ids: list[int]) -> int:
        body = {
            "input_ids": ids,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
            "return_logprob": True,
        }
        last = b""
        async with session.post(f"{server.url}/generate", json=body, headers=server.headers()) as reply:
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    if not last:
                        first_tokens.append(time.perf_counter() - begun)
                    last = line
        return int(json.loads(last[6:])["meta_info"]["completion_tokens"])

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=2**22) as session:
        tokens = sum(await asyncio.gather(*(one(session, ids) for ids in asked)))
    return Turn(time.perf_counter() - begun, tokens)


async def unary(server: Server, asked: list[list[int]]) -> Turn:
    """The same without streaming: the client's requests without the client."""
    begun = time.perf_counter()

    async def one(session: aiohttp.ClientSession, ids: list[int]) -> int:
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
        async with session.post(f"{server.url}/generate", json=body, headers=server.headers()) as reply:
            return int((await reply.json())["meta_info"]["completion_tokens"])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tokens = sum(await asyncio.gather(*(one(session, ids) for ids in asked)))
    return Turn(time.perf_counter() - begun, tokens)


async def through(engine: SGLangEngine, asked: list[list[int]]) -> Turn:
    begun = time.perf_counter()
    sampling = Sampling(0.0, NEW_TOKENS, 0, ())
    done = await asyncio.gather(*(engine.generate(ids, sampling) for ids in asked))
    return Turn(time.perf_counter() - begun, sum(len(c.ids) for c in done))


class Timed(Server):
    """A server that records the time of each request."""

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self.took: dict[str, list[float]] = {}

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        begun = time.perf_counter()
        try:
            return super().post(path, body, timeout)
        finally:
            self.took.setdefault(path, []).append(time.perf_counter() - begun)


def syncs(engine: SGLangEngine, server: Timed, folder: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians over pushes of all weights, each followed by one copy of as many bytes within this process."""
    dtype = PRECISION[device.type][1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    # A tied head is the embedding, and is not sent separately.
    tensors = [(name, p.detach()) for name, p in model.named_parameters()]
    size = sum(t.nbytes for _, t in tensors)
    source = torch.ones(min(size, COPIED_AT_ONCE), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    pushes, copies = [], []
    for i in range(rounds + 1):
        if i == 1:  # the first push creates the buffers
            server.took.clear()
            pushes.clear()
            copies.clear()
        begun = time.perf_counter()
        engine.update_weights(tensors, 100 + i)
        pushes.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for start in range(0, size, len(source)):
            target[: size - start].copy_(source[: size - start])
        if device.type == "cuda":
            torch.cuda.synchronize()
        copies.append(time.perf_counter() - begun)
    requests = {
        path.strip("/"): {"count": len(took) / rounds, "seconds": statistics.median(took)}
        for path, took in server.took.items()
    }
    for _ in range(rounds):
        server.post("/flush_cache", {}, 60.0)
    push, copy = statistics.median(pushes), statistics.median(copies)
    return {
        "bytes": size,
        "seconds": push,
        "gb_per_s": size / push / 1e9,
        "copy_seconds": copy,
        "sync_over_copy": push / copy,
        "fastest_over_fastest": min(pushes) / min(copies),
        "fill_seconds": _filling(tensors, rounds, device),
        "empty_request_seconds": statistics.median(server.took["/flush_cache"][-rounds:]),
        "requests": requests,
    }


def _filling(tensors: list[tuple[str, torch.Tensor]], rounds: int, device: torch.device) -> float:
    """Seconds to copy all tensors into buckets, without sending them."""
    largest, total = sizes({name: tuple(t.shape) for name, t in tensors}, tensors[0][1].itemsize)
    limit = max(largest, min(total, EngineSettings().bucket_mib << 20))
    bucket, took = Bucket(limit, device), []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        for _ in filled(tensors, (bucket, bucket), limit):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def requests_of(engine: SGLangEngine, folder: Path, rounds: int, requests: int) -> dict[str, dict[str, float]]:
    """Medians of bare, streamed and client."""
    asked = prompts(requests, AutoTokenizer.from_pretrained(folder).vocab_size)
    server, first_tokens = engine.server, list[float]()
    turns: dict[str, list[Turn]] = {"bare": [], "streamed": [], "client": []}

    def flush() -> None:  # otherwise a later pass would find the earlier one's prompts in the cache
        engine.server.post("/flush_cache", {}, 60.0)

    for i in range(rounds + 1):
        flush()
        taken = {"bare": asyncio.run(unary(server, asked))}
        flush()
        taken["client"] = asyncio.run(through(engine, asked))
        flush()
        seen: list[float] = []
        taken["streamed"] = asyncio.run(bare(server, asked, seen))
        if i:  # the first round warms up
            first_tokens += seen
            for name, turn in taken.items():
                turns[name].append(turn)
    found = {
        name: {
            "seconds": statistics.median(t.seconds for t in of),
            "tokens_per_s": statistics.median(t.tokens_per_s for t in of),
            "tokens": float(of[0].tokens),
        }
        for name, of in turns.items()
    }
    found["streamed"] |= {f"first_token_{name}_s": value for name, value in asdict(Spread.of(first_tokens)).items()}
    return found


def steps_of(engine: SGLangEngine, folder: Path, rounds: int, tasks: int) -> dict[str, dict[str, float]]:
    """Steps with and without oversampling, in turns; seconds of an episode are over all episodes of all turns."""
    setup = setup_of(folder, CONTEXT)
    taken: dict[float, list[Step]] = {1.0: [], OVERSAMPLE: []}
    for i in range(rounds + 1):
        for oversample, steps in taken.items():
            engine.server.post("/flush_cache?timeout=60", {}, 90.0)
            engine.take_stats()  # of what came before
            done = step(engine, setup, tasks, oversample, i)
            if i:  # the first warms up
                steps.append(done)
    found: dict[str, dict[str, float]] = {}
    for oversample, steps in taken.items():
        spread = asdict(Spread.of([s for one in steps for s in one.episode_seconds]))
        found[f"oversample_{oversample:g}"] = {
            "step_seconds": statistics.median(s.seconds for s in steps),
            "episodes": statistics.median(len(s.episode_seconds) for s in steps),
            "cut_off": statistics.median(s.cut_off for s in steps),
            **{f"episode_{name}_s": value for name, value in spread.items()},
            "used_tokens_per_s": statistics.median(s.used_tokens / s.seconds for s in steps),
            "generated_tokens_per_s": statistics.median(s.generated_tokens / s.seconds for s in steps),
            "discarded_share": statistics.median(1 - s.used_tokens / s.generated_tokens for s in steps),
            "cache_hit_rate": statistics.median(s.cache_hit_rate for s in steps),
        }
    return found


@contextmanager
def serving(
    model: TinyModel | Path, settings: EngineSettings, device: torch.device, spec: type[ServerSpec] = ServerSpec
) -> Iterator[tuple[SGLangEngine, Timed, Path]]:
    """A ready server on a model, its client, and the model's folder, which is built for a `TinyModel`."""
    precision, dtype = PRECISION[device.type]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "model" if isinstance(model, TinyModel) else model
        if isinstance(model, TinyModel):
            words = template_words("compact") | set(registry.get("household").vocabulary())  # type: ignore[attr-defined]
            words |= {f"w{i}" for i in range(4096)}
            build_tiny(folder, replace(model, max_positions=CONTEXT * 2), sorted(words), 0)
        log, on_cpu = Path(where) / "sglang.log", device.type == "cpu"
        server = Timed(spec(folder, settings, precision, CONTEXT, log, on_cpu))
        shared = SharedMemory(server, 1, None, 0, settings.sync_timeout_s)
        engine = SGLangEngine(server, settings, lambda: shared, tensor_shapes(folder), dtype, device)
        server.start()
        try:
            server.wait_ready()
            yield engine, server, folder
        finally:
            engine.close()


def refused(device: str, python: str, model: Path | None) -> str:
    """Why this cannot be measured here; empty if it can."""
    if device not in MODELS:
        return f"--device {device}: one of {', '.join(MODELS)}"
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU here; --device cpu measures without one"
    if model is not None and not (model / "config.json").exists():
        return f"--model {model}: not a Hugging Face folder (it has no config.json)"
    try:
        check_version(installed_version(python), EngineSettings(python=python), python or sys.executable)
    except ConfigError as error:
        return str(error)
    return ""


def main(
    python: Annotated[str, typer.Option(help="Interpreter that has SGLang; empty: this one.")] = "",
    device: Annotated[str, typer.Option(help="cpu | cuda.")] = "cpu",
    model: Annotated[Path | None, typer.Option(help="A Qwen3 folder instead of random weights.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each, after a warm-up.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Prompts per turn.")] = 64,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks per step, 4 episodes each.")] = 10,
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
) -> None:
    """Measures and writes the result; exits with 1 if a bar is missed, and with 2 if this machine cannot measure it."""
    reason = refused(device, python, model)
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    settings = EngineSettings(
        kind="sglang", python=python, max_batch=64, startup_timeout_s=900.0, memory_fraction=GPU_FRACTION
    )
    report = bench_schema.about(("torch", "transformers", "aiohttp"))
    report["card"] = bench_schema.card(device)
    medians: dict[str, dict[str, float]] = {}
    pushed: dict[str, Any] = {}
    here = torch.device(device, 0) if device == "cuda" else torch.device(device)
    served = (model,) if model is not None else (LARGER[device], MODELS[device])
    for one in served:
        with serving(one, settings, here) as (engine, server, folder):
            sync = syncs(engine, server, folder, 3 * rounds, here)
            pushed[f"sync_{sync['bytes'] / 1e6:.0f}_mb"] = sync
            print(sync, file=sys.stderr)
            if one is served[-1]:
                report["versions"]["sglang"] = server.info().get("version")
                medians |= requests_of(engine, folder, REQUEST_TURNS * rounds, requests)
                medians |= steps_of(engine, folder, rounds, tasks)
    medians |= {name: {k: v for k, v in sync.items() if k != "requests"} for name, sync in pushed.items()}
    over = medians["client"]["seconds"] / medians["bare"]["seconds"]
    report |= {
        "medians": medians,
        "client_over_bare": over,
        "requests_of_a_push": {name: sync["requests"] for name, sync in pushed.items()},
        "models": [asdict(one) if isinstance(one, TinyModel) else one.name for one in served],
        "bars": bars(over, pushed),
    }
    Console().print_json(json.dumps(bench_schema.stamped("rollout", report)))
    if out is not None:
        bench_schema.write(out, "rollout", report)
    if not all(bar.held for bar in report["bars"]):
        raise typer.Exit(1)


def bars(over: float, pushed: dict[str, Any]) -> list[Bar]:
    client = Bar("seconds of the client as a share of the bare requests'", over, CLIENT_BAR)
    syncs = [
        Bar(f"seconds of {name} as a share of one copy's", sync["sync_over_copy"], SYNC_BAR)
        for name, sync in pushed.items()
    ]
    return [client, *syncs]


if __name__ == "__main__":
    typer.run(main)
