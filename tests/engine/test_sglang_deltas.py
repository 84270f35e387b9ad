"""Deltas to an external server (`engine.sync=delta`): the real SGLang with the loader, in bf16."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_cases import CONTEXT, UNTIED, Tensors, engine_settings, generate, load, weights
from test_sglang_runs import command, steps
from whole_runs import icrl

from icrl_megatron.distributed import net
from icrl_megatron.engines.on_server import icrl_deltas
from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_deltas import DeltaEngine
from icrl_megatron.engines.sglang_group import OverGroup
from icrl_megatron.engines.sglang_server import Server, ServerSpec
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.types import Completion

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]

ARGUMENTS = ["--custom-weight-loader", icrl_deltas.LOADER]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class WithLoader(ServerSpec):
    """Finds the loader as docs/ENGINES.md says."""

    def environment(self, port: int, key: str, meeting: Path) -> dict[str, str]:
        return super().environment(port, key, meeting) | {"PYTHONPATH": str(Path(icrl_deltas.__file__).parent)}


@pytest.fixture(scope="module")
def started(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = engine_settings(server_args=ARGUMENTS)
    server = Server(WithLoader(model, settings, "bf16", CONTEXT, tmp_path_factory.mktemp("s") / "log", on_cpu=True))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def remote(started: Server, model: Path, deltas: bool) -> SGLangEngine:
    """An engine that knows the server only by its address."""
    shape = ModelShape.read(model)
    server, settings = Server(None, started.url, started.key), engine_settings(sync_timeout_s=60.0)

    def transport() -> OverGroup:
        return OverGroup(server, 1, "127.0.0.1", CPU, settings.sync_timeout_s)

    if deltas:
        return DeltaEngine(server, settings, transport, shape, torch.bfloat16, CPU)
    return SGLangEngine(server, settings, transport, shape.tensors(), torch.bfloat16, CPU)


class Masters:
    """fp32 weights that move by the same step at random, like Adam's at a learning rate of 1e-6."""

    def __init__(self, model: Path) -> None:
        self.tensors = weights(load(model))

    def step(self) -> Tensors:
        """In bf16."""
        self.tensors = [(name, t + 1e-6 * torch.randn_like(t).sign()) for name, t in self.tensors]
        return [(name, t.bfloat16()) for name, t in self.tensors]


def said(engine: SGLangEngine) -> list[Completion]:
    return generate(engine, [([8, 9, 10 + i], Sampling(0.0, 8, 0, ())) for i in range(4)])


def checksums(started: Server) -> object:
    return started.post("/weights_checker", {"action": "checksum"}, 60.0)["ranks"][0]["checksums"]


def test_ten_deltas_and_a_full_push_in_every_doubt(
    started: Server, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    masters, engine, other = Masters(model), remote(started, model, True), remote(started, model, False)
    whole = sum(t.nbytes for _, t in masters.step())
    for version in range(1, 12):
        tensors = masters.step()
        engine.update_weights(tensors, version)
        stats = engine.take_stats()
        assert stats.full_pushes == (version == 1)
        assert (stats.sync_bytes >= whole) if version == 1 else (0 < stats.sync_bytes < 0.1 * whole), version
    expected, answers = checksums(started), said(engine)
    assert {c.weight_version for c in answers} == {11}
    other.update_weights(masters.step(), 12)
    assert checksums(started) != expected
    other.update_weights(tensors, 11)
    assert checksums(started) == expected
    assert [c.ids.tolist() for c in said(other)] == [c.ids.tolist() for c in answers]
    assert [c.logprobs.tolist() for c in said(other)] == [c.logprobs.tolist() for c in answers]

    other.update_weights(masters.step(), 11)  # other weights of the version that the engine sent
    engine.update_weights(tensors := masters.step(), 12)
    assert engine.take_stats().full_pushes == 1
    engine.verify(tensors, UNTIED)

    other.update_weights(tensors, 20)
    engine.update_weights(tensors := masters.step(), 13)
    assert engine.take_stats().full_pushes == 1
    engine.verify(tensors, UNTIED)

    port = int(started.url.rpartition(":")[2])
    monkeypatch.setattr(net, "free_port", lambda: port)
    started.kill()
    started.start()
    started.wait_ready()
    engine.server.key = started.key  # a restarted external server keeps its key
    engine.update_weights(tensors := masters.step(), 14)
    assert engine.take_stats().full_pushes == 1
    engine.verify(tensors, UNTIED)
    engine.update_weights(masters.step(), 15)
    assert engine.take_stats().full_pushes == 0
    assert {c.weight_version for c in said(engine)} == {15}
    reasons = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "was sent all" in r.message]
    assert [r.rpartition("weights of version ")[2][:2] for r in reasons] == ["12", "13", "14"]
    assert "than it was sent" in reasons[0]
    assert "it has version '20' instead of 12" in reasons[1]
    assert "it has version 'default' instead of 13" in reasons[2]


def test_a_run_with_deltas(started: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("SERVER_KEY", started.key)
    given = (f"engine.urls=[{started.url}]", "engine.api_key_env=SERVER_KEY", "engine.sync=delta", "steps=2")
    code, _, err = icrl(*command(folder, model, *given, "actor.precision=bf16", "optim.learning_rate=1e-6"))
    assert code == 0, err
    first, second = steps(folder)
    assert (first["engine/full_pushes"], second["engine/full_pushes"]) == (1, 0)
    assert 0 < second["engine/sync_mib"] < 0.1 * first["engine/sync_mib"]
    assert started.weight_version() == "3"
