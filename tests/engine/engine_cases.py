"""What the tests of the real engine share: settings, a server's engine, requests, and transformers as the reference."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_build import tensor_shapes
from icrl_megatron.engines.sglang_server import Server, ServerSpec
from icrl_megatron.engines.sglang_weights import SharedMemory
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.prompts import template_words
from icrl_megatron.settings.schema import EngineSettings, TinyModel
from icrl_megatron.tasks import registry
from icrl_megatron.types import Completion

CONTEXT = 512
Tensors = list[tuple[str, torch.Tensor]]
UNTIED = ModelShape.of_tiny(TinyModel(tie_embeddings=False))


def tiny(folder: Path, family: str, seed: int = 0) -> Path:
    """A model with an untied head, the words of Rulebook and the tags of tools."""
    words = template_words("compact") | set(registry.get("rulebook_easy").vocabulary())  # type: ignore[attr-defined]
    words |= {f"<{end}{tag}>" for tag in ("search", "page", "python", "answer") for end in ("", "/")}
    build_tiny(folder, TinyModel(family=family, tie_embeddings=False), sorted(words), seed)
    return folder


def engine_settings(**changes: object) -> EngineSettings:
    given = {"kind": "sglang", "python": os.environ["ICRL_ENGINE_PYTHON"], "max_batch": 64, "startup_timeout_s": 400.0}
    return EngineSettings(**{**given, **changes})  # type: ignore[arg-type]


def spec(model: Path, log: Path, settings: EngineSettings) -> ServerSpec:
    return ServerSpec(model, settings, "fp32", CONTEXT, log, on_cpu=True)


@contextmanager
def serving(model: Path, folder: Path, settings: EngineSettings) -> Iterator[Server]:
    """A ready server, which ends with the block."""
    started = Server(spec(model, folder / "sglang.log", settings))
    started.start()
    try:
        started.wait_ready()
        yield started
    finally:
        started.kill()


def engine_on(server: Server, model: Path, settings: EngineSettings) -> SGLangEngine:
    return SGLangEngine(
        server,
        settings,
        lambda: SharedMemory(server, settings.tensor_parallel, None, 0, settings.sync_timeout_s),
        tensor_shapes(model),
        torch.float32,
        torch.device("cpu"),
    )


def generate(engine: SGLangEngine, requests: Sequence[tuple[Sequence[int], Sampling]]) -> list[Completion]:
    async def together() -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(p, s) for p, s in requests)))

    return asyncio.run(together())


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights(model: PreTrainedModel) -> Tensors:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def changed(model: PreTrainedModel, seed: int) -> Tensors:
    """Other weights of the same shapes, near enough to be a model and far enough to say other things."""
    torch.manual_seed(seed)
    return [(name, tensor + 0.05 * torch.randn_like(tensor)) for name, tensor in weights(model)]


def repeating(model: PreTrainedModel, token: int) -> Tensors:
    """Weights with which greedy replies are this token again and again: every hidden vector is the same."""
    changed = []
    for name, tensor in weights(model):
        value = torch.ones_like(tensor)
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            value.zero_()
        if name.endswith("lm_head.weight"):
            value[token] = 1.0
        changed.append((name, value))
    return changed


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], temperature: float
) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs: torch.Tensor = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], steps: int, end: int) -> tuple[int, ...]:
    """What the model says without sampling, up to its end token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return tuple(ids[len(prompt) :])
