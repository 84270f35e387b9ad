"""Rollouts through SGLang: what the client costs, how long episodes take, what the cache finds, what a sync takes.

    python tools/bench_rollout.py --python PATH_OF_AN_INTERPRETER_WITH_SGLANG --out benchmarks/rollout_cpu.json

One server on a tiny Qwen3. `bare` sends the same prompts to the same API with nothing around it (a streaming request
each, so the time to the first token is seen); `client` is the trainer's engine. The two take turns, greedily, so that
both generate the same tokens. `episodes` are Household's, several turns each. `sync` pushes the model's weights, and
`copy` copies as many bytes once within this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from icrl_megatron.config import EngineSettings, RolloutSettings, TinyModel
from icrl_megatron.rollout.engine import Sampling
from icrl_megatron.rollout.engines import tensor_shapes
from icrl_megatron.rollout.episode import Stage, play_episode
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.sglang import SGLangEngine
from icrl_megatron.rollout.sglang_server import Server, ServerSpec
from icrl_megatron.rollout.sglang_weights import SharedMemory
from icrl_megatron.rollout.speakers import EngineSpeaker, Seeds, engine_casting
from icrl_megatron.tasks import registry
from icrl_megatron.tiny import build_tiny
from icrl_megatron.types import Task

MODEL = TinyModel(layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=768, tie_embeddings=False)
CONTEXT = 512
NEW_TOKENS = 48
CLIENT_BAR = 1.1
"""Most seconds of the client as a share of the bare requests'."""
SYNC_BAR = 1.5
"""Most seconds of a sync as a share of one copy of its bytes."""


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


async def bare(url: str, asked: list[list[int]], first_tokens: list[float]) -> Turn:
    """Streaming requests, all at once; appends each one's seconds to the first token."""
    begun = time.perf_counter()

    async def one(session: aiohttp.ClientSession, ids: list[int]) -> int:
        body = {
            "input_ids": ids,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
            "return_logprob": True,
        }
        last = b""
        async with session.post(f"{url}/generate", json=body) as reply:
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


async def unary(url: str, asked: list[list[int]]) -> Turn:
    """The same without streaming: what the client's requests are, bare."""
    begun = time.perf_counter()

    async def one(session: aiohttp.ClientSession, ids: list[int]) -> int:
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
        async with session.post(f"{url}/generate", json=body) as reply:
            return int((await reply.json())["meta_info"]["completion_tokens"])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tokens = sum(await asyncio.gather(*(one(session, ids) for ids in asked)))
    return Turn(time.perf_counter() - begun, tokens)


async def through(engine: SGLangEngine, asked: list[list[int]]) -> Turn:
    begun = time.perf_counter()
    sampling = Sampling(0.0, NEW_TOKENS, 0, ())
    done = await asyncio.gather(*(engine.generate(ids, sampling) for ids in asked))
    return Turn(time.perf_counter() - begun, sum(len(c.ids) for c in done))


async def episodes(engine: SGLangEngine, folder: Path, count: int) -> tuple[list[float], int]:
    """Seconds of each episode, and the tokens of all of them."""
    settings = RolloutSettings(max_turn_tokens=24, max_critique_tokens=24, context_tokens=CONTEXT, templates="compact")
    prompter = Prompter(AutoTokenizer.from_pretrained(folder), settings)
    stage = Stage(registry.environment, prompter, settings)
    casting = engine_casting(EngineSpeaker(engine, 1.0, prompter.stop_ids))
    tasks = list(registry.get("household").problems("train"))[: -(-count // 4)]

    async def one(task: Task, index: int) -> tuple[float, int]:
        begun = time.perf_counter()
        played = await play_episode(task, index, stage, casting, Seeds(0, 0))
        tokens = played.generated_tokens() if hasattr(played, "generated_tokens") else 0
        return time.perf_counter() - begun, tokens

    done = await asyncio.gather(*(one(t, i) for t in tasks for i in range(4)))
    return [seconds for seconds, _ in done], sum(tokens for _, tokens in done)


def syncs(engine: SGLangEngine, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of pushing all weights, against one copy of as many bytes within this process; medians."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = [(name, p.detach()) for name, p in model.named_parameters()]
    size = sum(t.nbytes for _, t in tensors)
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    pushes, copies = [], []
    for i in range(rounds):
        begun = time.perf_counter()
        engine.update_weights(tensors, 100 + i)
        pushes.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - begun)
    push, copy = statistics.median(pushes), statistics.median(copies)
    return {"bytes": size, "seconds": push, "gb_per_s": size / push / 1e9, "copy_seconds": copy, "ratio": push / copy}


def measure(engine: SGLangEngine, folder: Path, rounds: int, requests: int) -> dict[str, Any]:
    asked = prompts(requests, AutoTokenizer.from_pretrained(folder).vocab_size)
    url, first_tokens = engine.server.url, list[float]()
    turns: dict[str, list[Turn]] = {"bare": [], "streamed": [], "client": []}

    def flush() -> None:  # else a later turn would find the earlier one's prompts in the cache
        engine.server.post("/flush_cache", {}, 60.0)

    for i in range(rounds + 1):
        flush()
        taken = {"bare": asyncio.run(unary(url, asked))}
        flush()
        taken["client"] = asyncio.run(through(engine, asked))
        flush()
        seen: list[float] = []
        taken["streamed"] = asyncio.run(bare(url, asked, seen))
        if i:  # the first round warms up
            first_tokens += seen
            for name, turn in taken.items():
                turns[name].append(turn)
    found: dict[str, Any] = {
        name: {
            "seconds": statistics.median(t.seconds for t in of),
            "tokens_per_s": statistics.median(t.tokens_per_s for t in of),
            "tokens": of[0].tokens,
        }
        for name, of in turns.items()
    }
    found["client_over_bare"] = found["client"]["seconds"] / found["bare"]["seconds"]
    found["first_token_s"] = asdict(Spread.of(first_tokens))
    engine.take_stats()
    begun = time.perf_counter()
    seconds, tokens = asyncio.run(episodes(engine, folder, requests))
    stats = engine.take_stats()
    found["episodes"] = {
        "count": len(seconds),
        "seconds": asdict(Spread.of(seconds)),
        "tokens_per_s": tokens / (time.perf_counter() - begun),
        "requests": stats.requests,
        "cache_hit_rate": stats.cached_tokens / max(1, stats.prompt_tokens),
    }
    found["sync"] = syncs(engine, folder, max(rounds, 3))
    return found


def main(
    python: Annotated[str, typer.Option(help="Interpreter that has SGLang; empty: this one.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each, after one that warms up.")] = 3,
    requests: Annotated[int, typer.Option(help="Prompts in a turn, and episodes.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    settings = EngineSettings(kind="sglang", python=python, max_batch=64)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "model"
        words = template_words("compact") | set(registry.get("household").vocabulary())  # type: ignore[attr-defined]
        build_tiny(folder, replace(MODEL, max_positions=CONTEXT * 2), sorted(words | {f"w{i}" for i in range(4096)}), 0)
        server = Server(ServerSpec(folder, settings, "fp32", CONTEXT, Path(where) / "sglang.log", on_cpu=True))
        shapes = tensor_shapes(folder)
        engine = SGLangEngine(
            server,
            settings,
            lambda: SharedMemory(server, 1, None, 0, settings.sync_timeout_s),
            shapes,
            torch.float32,
            torch.device("cpu"),
        )
        server.start()
        try:
            begun = time.perf_counter()
            server.wait_ready()
            report: dict[str, Any] = {"ready_s": time.perf_counter() - begun}
            report |= measure(engine, folder, rounds, requests)
            report["versions"] = {"sglang": server.info().get("version"), "torch": torch.__version__}
        finally:
            engine.close()
    report |= {
        "command": "python tools/bench_rollout.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": asdict(MODEL),
        "bars": {"client_over_bare": CLIENT_BAR, "sync_ratio": SYNC_BAR},
        "aiohttp": version("aiohttp"),
    }
    Console().print_json(json.dumps(report))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
