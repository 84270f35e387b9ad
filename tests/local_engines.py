"""Tiny local engines, and what a plain forward pass computes instead."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.settings.schema import EngineSettings, TinyModel

WORDS = [f"w{i}" for i in range(60)]
STOP = 1


def make_model(folder: Path, tied: bool = True, seed: int = 0) -> Path:
    build_tiny(folder, TinyModel(hidden=32, ffn=64, head_dim=8, tie_embeddings=tied, max_positions=96), WORDS, seed)
    return folder


def make_engine(folder: Path, **settings: float) -> LocalEngine:
    return LocalEngine(folder, EngineSettings(**settings), torch.float32, "cpu")  # type: ignore[arg-type]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 60) for _ in range(rng.randrange(1, 40))] for _ in range(count)]


def sampling(seed: int, temperature: float = 1.0, new: int = 12, stop: tuple[int, ...] = (STOP,)) -> Sampling:
    return Sampling(temperature, new, seed, stop)


def teacher_forced(folder: Path, prompt: list[int], ids: Sequence[int], temperature: float) -> torch.Tensor:
    """[len(ids)] log-probs of one forward pass without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
