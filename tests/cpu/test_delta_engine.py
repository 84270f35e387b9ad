"""When an engine with `engine.sync=delta` sends differences, and when all weights. The server is an HTTP server that
holds weights; they reach it without a process group. tests/engine/test_sglang_deltas.py has the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from local_servers import Handler, threaded
from torch import Tensor

from icrl_megatron.engines.on_server.icrl_deltas import DeltaPiece, decode
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_deltas import DeltaEngine
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.engines.sglang_weights import Answer, Bucket
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, TinyModel

SHAPE = ModelShape.of_tiny(TinyModel(layers=1, hidden=16, ffn=16, heads=2, kv_heads=1, head_dim=8), 64)
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


@dataclass
class Held:
    """A server with its weights, and the transport that changes them."""

    url: str = ""
    version: str = "default"
    tensors: Tensors = field(default_factory=dict)
    pushes: list[str] = field(default_factory=list)
    loses: str = ""
    """A kind of push that does not change the weights."""
    closed: int = 0

    def begin(self, lost: str) -> Answer:
        return lambda: None

    def send(self, bucket: Bucket, options: dict[str, Any]) -> Answer:
        whole = {name: tensor.clone() for name, tensor in bucket.tensors(bucket.placed)}
        return self._take("full", whole, options)

    def send_pieces(self, pieces: Sequence[DeltaPiece], data: Tensor, options: dict[str, Any]) -> Answer:
        changed, start, raw = {}, 0, data.numpy().tobytes()
        for piece in pieces:
            end = start + sum(piece.sizes)
            words = decode(piece, raw[start:end], CPU).view(torch.int16)
            changed[piece.name] = (self.tensors[piece.name].view(torch.int16) + words).view(torch.bfloat16)
            start = end
        return self._take("delta", changed, options)

    def _take(self, kind: str, tensors: Tensors, options: dict[str, Any]) -> Answer:
        if kind != self.loses:
            self.tensors = {**self.tensors, **tensors}
        if options["weight_version"] is not None:
            self.version = options["weight_version"]
            self.pushes.append(kind)
        return lambda: None

    def close(self) -> None:
        self.closed += 1

    def checksums(self) -> dict[str, str]:
        found = Checksums(1, SHAPE)
        for name, tensor in self.tensors.items():
            found.add(name, tensor)
        return found.expected[0]


@pytest.fixture
def held() -> Iterator[Held]:
    found = Held()

    class Answers(Handler):
        def do_POST(self) -> None:
            self.body()
            self.do_GET()

        def do_GET(self) -> None:
            answer: dict[str, Any] = {"success": True, "weight_version": found.version}
            if self.path == "/weights_checker":
                answer["ranks"] = [{"parallelism_info": {"tp_rank": 0}, "checksums": found.checksums()}]
            self.send(json.dumps(answer).encode(), 200)

    with threaded(Answers) as found.url:
        yield found


@pytest.fixture
def engine(held: Held) -> DeltaEngine:
    server, settings = Server(None, held.url), EngineSettings(kind="sglang")
    return DeltaEngine(server, settings, lambda: held, SHAPE, torch.bfloat16, CPU)  # type: ignore[arg-type, return-value]


def drawn(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPE.tensors().items()}


def near(tensors: Tensors) -> Tensors:
    """The same weights with two changed."""
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        new[name].view(torch.int16).view(-1)[7] += 1
    return new


def holds(held: Held, tensors: Tensors) -> bool:
    return all(torch.equal(held.tensors[n].view(torch.int16), t.view(torch.int16)) for n, t in tensors.items())


def test_full_push_then_differences(engine: DeltaEngine, held: Held) -> None:
    tensors = drawn(0)
    engine.update_weights(tensors.items(), 1)
    first = engine.take_stats()
    for version in (2, 3):
        tensors = near(tensors)
        engine.update_weights(tensors.items(), version)
        assert holds(held, tensors)
    engine.update_weights(tensors.items(), 4)  # nothing changed
    stats = engine.take_stats()
    assert (held.pushes, held.version) == (["full", "delta", "delta", "delta"], "4")
    assert (first.full_pushes, stats.full_pushes) == (1, 0)
    assert 0 < stats.sync_bytes < 0.1 * first.sync_bytes


@pytest.mark.parametrize("reported", ["default", "7"])
def test_another_version_is_sent_all_weights_over_a_new_group(engine: DeltaEngine, held: Held, reported: str) -> None:
    engine.update_weights(drawn(0).items(), 1)
    held.version, held.tensors = reported, drawn(1)
    engine.update_weights(near(drawn(0)).items(), 2)
    assert (held.pushes, held.closed) == (["full", "full"], 1)
    assert holds(held, near(drawn(0)))
    assert engine.take_stats().full_pushes == 2


def test_other_checksums_need_all_weights(engine: DeltaEngine, held: Held, caplog: pytest.LogCaptureFixture) -> None:
    engine.update_weights(drawn(0).items(), 1)
    held.tensors = drawn(1)
    engine.update_weights(near(drawn(0)).items(), 2)
    assert held.pushes == ["full", "delta", "full"]
    assert holds(held, near(drawn(0)))
    assert engine.take_stats().full_pushes == 2
    assert "was sent all weights of version 2: Worker 0 of the engine has other values of" in caplog.text
    held.loses = "delta"  # the loader failed
    engine.update_weights(near(near(drawn(0))).items(), 3)
    assert held.pushes[3:] == ["delta", "full"]
    assert holds(held, near(near(drawn(0))))


def test_weights_that_differ_after_a_full_push_end_the_run(engine: DeltaEngine, held: Held) -> None:
    engine.update_weights(drawn(0).items(), 1)
    held.tensors, held.loses = drawn(1), "full"
    with pytest.raises(EngineError, match="has other values of"):
        engine.update_weights(near(drawn(0)).items(), 2)


def test_bad_tensors_are_refused_before_they_are_sent_and_then_all_are_sent(engine: DeltaEngine, held: Held) -> None:
    engine.update_weights(drawn(0).items(), 1)
    bad = near(drawn(0))
    del bad["model.norm.weight"]
    with pytest.raises(EngineError, match=r"Update 2 lacks 1 of the model's tensors; first 'model\.norm\.weight'"):
        engine.update_weights(bad.items(), 2)
    with pytest.raises(EngineError, match="has no tensor 'other'"):
        engine.update_weights({"other": torch.zeros(1)}.items(), 2)
    engine.update_weights(near(near(drawn(0))).items(), 2)
    assert held.pushes == ["full", "full"]
    assert holds(held, near(near(drawn(0))))
