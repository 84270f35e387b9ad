"""The parts of `gpu_engine.py`: each asks one thing of a server and returns its numbers, or raises."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_model
import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from icrl_megatron.engines.flat_buffer import Shapes
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.engines.sglang_weights import Transport
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.types import Completion

CONTEXT = 2048
CONCURRENT = 64
PROMPT_TOKENS = 64
NEW_TOKENS = {"cuda": 256, "cpu": 32}
COMPARED = 16
"""Replies whose log-probs are compared."""
SPREAD = 0.05
"""Standard deviation of the weights: with Qwen3's 0.02 random weights say nearly every token as often."""
CHANGE = 0.01
"""Standard deviation of what is added for the second weights."""
PUSHES = 3
DEADLINE_S = 1.0


@dataclass
class Bench:
    """A server, its engine, and the model whose weights it gets."""

    server: Server
    settings: EngineSettings
    transport: Callable[[], Transport]
    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    model: Any
    version: int = 0
    replies: list[Completion] = field(default_factory=list)
    """To the first prompts, with the weights that the model has now."""
    engine: SGLangEngine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self.client(self.settings)

    def client(self, settings: EngineSettings) -> SGLangEngine:
        return SGLangEngine(self.server, settings, self.transport, self.shapes, self.dtype, self.device)

    def push(self) -> float:
        """Seconds of sending all weights of the model."""
        self.version += 1
        begun = time.perf_counter()
        self.engine.update_weights(self.weights(), self.version)
        return time.perf_counter() - begun

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        """A tied head is the embedding, and is not sent."""
        return [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]

    def used_gib(self) -> float:
        """On the whole card; on a CPU the server's own."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            return float(total - free) / 2**30
        return self.server.memory_bytes() / 2**30


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(8, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def build(name: str, folder: Path, device: torch.device, made: list[Any]) -> dict[str, float]:
    """Appends a model of random weights to `made`, and writes its config.json."""
    begun, dtype = time.perf_counter(), torch.bfloat16 if device.type == "cuda" else torch.float32
    fields = gpu_model.SHAPES[name].config() | {"initializer_range": SPREAD, "max_position_embeddings": CONTEXT * 2}
    config = Qwen3Config(**fields | {"pad_token_id": 0, "bos_token_id": None, "dtype": dtype})
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config.save_pretrained(folder)
    made.append(model)
    weights = sum(p.nbytes for p in model.parameters())
    return {"seconds": time.perf_counter() - begun, "weights_gib": weights / 2**30}


def write(model: Any, folder: Path) -> dict[str, float]:
    """The model's weights, beside its config.json."""
    begun = time.perf_counter()
    model.save_pretrained(folder)
    return {"seconds": time.perf_counter() - begun}


def start(bench: Bench) -> dict[str, float]:
    """Until the server answers."""
    before, begun = bench.used_gib(), time.perf_counter()
    bench.engine.start()
    bench.engine.wait_ready()
    info = bench.server.info()
    return {
        "seconds": time.perf_counter() - begun,
        "before_gib": before,
        "after_gib": bench.used_gib(),
        "kv_tokens": float(info.get("max_total_num_tokens") or 0),
        "host_gib": psutil.virtual_memory().used / 2**30,
    }


def push(bench: Bench) -> dict[str, float]:
    """All weights, several times; then a checksum of each, where the server keeps them as they are."""
    size = sum(t.nbytes for _, t in bench.weights())
    first, took = bench.push(), [bench.push() for _ in range(PUSHES)]
    seconds = statistics.median(took)
    found = {"first_seconds": first, "seconds": seconds, "bytes": float(size), "gb_per_s": size / seconds / 1e9}
    if not bench.settings.quantization:
        begun = time.perf_counter()
        if not bench.engine.verify(bench.weights(), shape_of(bench)):
            raise RuntimeError(f"the server was lost: {bench.engine.lost()}")
        found["verify_seconds"] = time.perf_counter() - begun
    return found


def shape_of(bench: Bench) -> ModelShape:
    assert bench.server.spec is not None
    return ModelShape.read(bench.server.spec.model)


def ask(engine: SGLangEngine, asked: list[list[int]], sampling: Sampling) -> list[Completion]:
    async def together() -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(ids, sampling) for ids in asked)))

    return asyncio.run(together())


def generate(bench: Bench) -> dict[str, float]:
    """Tokens a second of CONCURRENT requests at once, and of one alone."""
    asked = prompts(CONCURRENT, vocabulary(bench))
    ask(bench.engine, asked, Sampling(1.0, 8, 0, ()))  # warms up
    begun = time.perf_counter()
    bench.replies = ask(bench.engine, asked, Sampling(1.0, NEW_TOKENS[bench.device.type], 0, ()))
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    alone = ask(bench.engine, asked[:1], Sampling(1.0, NEW_TOKENS[bench.device.type], 0, ()))
    alone_s = time.perf_counter() - begun
    tokens = sum(len(c.ids) for c in bench.replies)
    return {
        "seconds": seconds,
        "tokens": float(tokens),
        "tokens_per_s": tokens / seconds,
        "alone_tokens_per_s": len(alone[0].ids) / alone_s,
    }


def vocabulary(bench: Bench) -> int:
    return int(bench.model.config.vocab_size)


def compared(bench: Bench) -> list[tuple[list[int], Completion]]:
    """The first prompts with their replies, which are asked for where there are none."""
    asked = prompts(COMPARED, vocabulary(bench))
    if not bench.replies:
        bench.replies = ask(bench.engine, asked, Sampling(1.0, NEW_TOKENS[bench.device.type], 0, ()))
    return list(zip(asked, bench.replies, strict=False))


@torch.no_grad()
def scored(bench: Bench, replies: list[tuple[list[int], Completion]]) -> torch.Tensor:
    """The model's own log-probs of all tokens of the replies, end to end."""
    found = []
    for prompt, reply in replies:
        ids_1T = torch.tensor([[*prompt, *reply.ids]], device=bench.device)
        logits_RV = bench.model(ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        said_R1 = torch.tensor(reply.ids, dtype=torch.int64, device=bench.device)[:, None]
        found.append(torch.log_softmax(logits_RV, -1).gather(1, said_R1)[:, 0].cpu())
    return torch.cat(found)


def said(replies: list[tuple[list[int], Completion]]) -> torch.Tensor:
    return torch.cat([torch.tensor(reply.logprobs) for _, reply in replies])


def distance(one: torch.Tensor, other: torch.Tensor, name: str) -> dict[str, float]:
    apart = (one - other).abs()
    return {f"{name}_mean": float(apart.mean()), f"{name}_max": float(apart.max())}


def mismatch(bench: Bench) -> dict[str, float]:
    """How far the server's log-probs are from the model's in its own precision, and both from those in fp32."""
    replies = compared(bench)
    from_server, from_model = said(replies), scored(bench, replies)
    bench.model.float()
    try:
        exact = scored(bench, replies)
    finally:
        bench.model.to(bench.dtype)  # bf16 to fp32 and back changes nothing
    return {
        "tokens": float(len(from_server)),
        "logprob_mean": float(exact.mean()),
        **distance(from_server, from_model, "server_to_model"),
        **distance(from_server, exact, "server_to_fp32"),
        **distance(from_model, exact, "model_to_fp32"),
    }


def new_weights(bench: Bench) -> dict[str, float]:
    """Changes the model and sends it: the server must then be near the new one, and far from the old one."""
    replies = compared(bench)
    old = scored(bench, replies)
    torch.manual_seed(bench.version)
    for parameter in bench.model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=CHANGE)
    moved = distance(scored(bench, replies), old, "new_to_old_model")
    bench.replies = []
    seconds = bench.push()
    replies = compared(bench)
    stamps = {reply.weight_version for _, reply in replies}
    if stamps != {bench.version}:
        raise RuntimeError(f"replies carry the versions {sorted(stamps)}, not {bench.version}")
    found = {"push_seconds": seconds, **moved, **distance(said(replies), scored(bench, replies), "server_to_new_model")}
    if found["server_to_new_model_mean"] > 0.5 * found["new_to_old_model_mean"]:
        raise RuntimeError(f"the server does not serve the new weights: {found}")
    return found


def sleep_and_wake(bench: Bench) -> dict[str, float]:
    """The card's memory at each stage; the weights are sent again while it wakes, and must then be served."""
    found, begun = {"awake_gib": bench.used_gib()}, time.perf_counter()

    def stage(name: str, do: Callable[[], object]) -> None:
        nonlocal begun
        begun = time.perf_counter()
        do()
        found[f"{name}_seconds"] = time.perf_counter() - begun
        found[f"{name}_gib"] = bench.used_gib()

    stage("sleep", bench.engine.sleep)
    stage("wake_weights", bench.engine.wake_weights)
    stage("push", bench.push)
    stage("wake", bench.engine.wake)
    bench.replies = []
    replies = compared(bench)
    found |= distance(said(replies), scored(bench, replies), "server_to_model")
    if not bench.settings.quantization and not bench.engine.verify(bench.weights(), shape_of(bench)):
        raise RuntimeError(f"the server was lost: {bench.engine.lost()}")
    return found


def deadline(bench: Bench) -> dict[str, float]:
    """Requests that cannot be done in time are aborted with what they have, and the server takes the next ones."""
    hurried = bench.client(replace(bench.settings, request_timeout_s=DEADLINE_S))
    asked, room = prompts(CONCURRENT, vocabulary(bench)), CONTEXT - PROMPT_TOKENS - 1
    begun = time.perf_counter()
    replies = ask(hurried, asked, Sampling(1.0, room, 0, ()))
    seconds = time.perf_counter() - begun
    cut = [reply for reply in replies if reply.finish_reason == "abort"]
    if not cut or not any(len(reply.ids) for reply in cut):
        raise RuntimeError(f"{len(cut)} of {len(replies)} requests were aborted, and none has tokens")
    after = ask(bench.engine, asked[:4], Sampling(1.0, 8, 0, ()))
    return {
        "seconds": seconds,
        "deadline_s": DEADLINE_S,
        "aborted": float(len(cut)),
        "kept_tokens": float(sum(len(reply.ids) for reply in cut)),
        "answered_after": float(sum(bool(len(reply.ids)) for reply in after)),
    }
