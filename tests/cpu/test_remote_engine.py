"""External SGLang servers: their number of workers, the address they connect to, API keys, and their own memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from local_servers import Handler, threaded
from safetensors.torch import load_file

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.engines.kind import EngineRequest
from icrl_megatron.engines.protocol import EngineError, NoAnswerError
from icrl_megatron.engines.rank import Engines
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_build import _address, build
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_deltas import DeltaEngine
from icrl_megatron.engines.sglang_group import gloo_on
from icrl_megatron.engines.sglang_server import TESTED, Server
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.settings.schema import EngineSettings, Settings, TinyModel
from icrl_megatron.utils.errors import ConfigError

WORKERS = 2
NO_UPDATE = "no weight-update session is open; call begin_weight_update() first"


@dataclass
class FakeServer:
    """An HTTP server with a fixed status and answer for each path."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    answers: dict[str, tuple[int, object]] = field(default_factory=dict)
    key: str = ""
    """The required API key; empty: none."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Answers(Handler):
        def do_POST(self) -> None:
            self.body()
            self.do_GET()

        def do_GET(self) -> None:
            fake.asked.append(self.path)
            given = self.headers.get("Authorization", "")
            status, answer = fake.answers.get(self.path, (200, {}))
            if fake.key and given != f"Bearer {fake.key}":
                status, answer = 401, {"error": "Unauthorized"}
            elif answer == "echo":
                answer = {"success": False, "message": given}
            flushed = self.path.startswith("/flush_cache")  # SGLang answers this with plain text
            self.send(b"Cache flushed." if flushed else json.dumps(answer).encode(), status)

    fake.answers["/server_info"] = 200, {"version": TESTED[-1], "tp_size": WORKERS}
    fake.answers["/end_weight_update"] = 400, {"success": False, "message": NO_UPDATE}
    with threaded(Answers) as fake.url:
        yield fake


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "model"
    build_tiny(folder, TinyModel(tie_embeddings=False), ["look"], 0)
    return folder


def connect(server: FakeServer, model: Path, api_key_env: str = "", sync: str = "full") -> Engines:
    """Engines of the only rank of a run. External servers ignore engine.tensor_parallel."""
    engine = EngineSettings(kind="sglang", urls=[server.url], tensor_parallel=1, api_key_env=api_key_env, sync=sync)
    settings = Settings(engine=engine)
    grid = Grid(0, 1, 1, 0, 1, 0, 1, 0, None)
    return build(EngineRequest(settings, model, grid, torch.float32, torch.device("cpu"), model / "logs"))


def test_one_rank_can_use_a_server_with_two_workers(server: FakeServer, model: Path) -> None:
    engine = connect(server, model).trained
    assert isinstance(engine, SGLangEngine)
    tensors, shape = load_file(model / "model.safetensors"), ModelShape.read(model)
    expected = Checksums(WORKERS, shape)
    for name, tensor in tensors.items():
        expected.add(name, tensor)
    ranks = [{"parallelism_info": {"tp_rank": w}, "checksums": c} for w, c in enumerate(expected.expected)]
    server.answers["/weights_checker"] = 200, {"success": True, "ranks": ranks}
    assert engine.verify(tensors.items(), shape)


def test_open_update_is_ended_and_server_memory_is_kept(server: FakeServer, model: Path) -> None:
    engine = connect(server, model).trained
    assert server.asked.count("/end_weight_update") == 1
    engine.sleep()
    engine.wake_weights()
    engine.wake()
    assert [path for path in server.asked if "cache" in path or "memory" in path] == ["/flush_cache?timeout=60"]


def test_server_that_cannot_end_an_update_is_rejected(server: FakeServer, model: Path) -> None:
    server.answers["/end_weight_update"] = 400, {"success": False, "message": "it is broken"}
    with pytest.raises(ConfigError, match=r"engine\.urls: .*it is broken"):
        connect(server, model)


def test_api_key_is_sent_and_never_shown(server: FakeServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "a-secret-of-the-lab"
    with pytest.raises(ConfigError, match=r"engine\.urls: .* API key \(401\): .* engine\.api_key_env"):
        connect(server, model)
    monkeypatch.setenv("LAB_KEY", server.key)
    engine = connect(server, model, "LAB_KEY").trained
    assert isinstance(engine, SGLangEngine)
    assert engine.server.answers()
    assert server.key not in repr(engine.server)
    engine.sleep()
    for status in (200, 400, 500):
        server.answers["/weights_checker"] = status, "echo"
        with pytest.raises(EngineError) as error:
            engine.server.post("/weights_checker", {}, 10.0)
        assert "Bearer ***" in str(error.value) and server.key not in str(error.value)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, r"without the loader of deltas; copy .*icrl_deltas\.py .*--custom-weight-loader icrl_deltas\.load_1"),
        ({"custom_weight_loader": ["icrl_deltas.load_0"]}, "without the loader of deltas"),
        ({"custom_weight_loader": ["icrl_deltas.load_1"], "dp_size": 2}, "--dp-size 2"),
        ({"custom_weight_loader": ["icrl_deltas.load_1"], "quantization": "fp8"}, "--quantization fp8"),
    ],
)
def test_server_without_deltas_is_rejected(
    server: FakeServer, model: Path, info: dict[str, object], message: str
) -> None:
    server.answers["/server_info"] = 200, {"version": TESTED[-1], "tp_size": WORKERS, **info}
    with pytest.raises(ConfigError, match=rf"engine\.sync=delta: .*{message}.* engine\.sync=full"):
        connect(server, model, sync="delta")
    connect(server, model)


def test_server_with_the_loader_of_deltas_is_accepted(server: FakeServer, model: Path) -> None:
    info = {"version": TESTED[-1], "tp_size": WORKERS, "custom_weight_loader": ["icrl_deltas.load_1"], "dp_size": 1}
    server.answers["/server_info"] = 200, info
    assert isinstance(connect(server, model, sync="delta").trained, DeltaEngine)


@pytest.mark.parametrize("answer", [(500, {}), (200, {}), (200, []), (200, {"weight_version": None})])
def test_version_that_the_server_does_not_report_is_not_ours(server: FakeServer, answer: tuple[int, object]) -> None:
    server.answers["/model_info"] = answer
    known = Server(None, server.url)
    if answer == (200, {"weight_version": None}):
        assert known.weight_version() == "None"
    else:
        with pytest.raises(NoAnswerError, match="/model_info does not answer"):
            known.weight_version()


def test_local_server_connects_over_loopback() -> None:
    assert _address("http://127.0.0.1:30000") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"engine\.urls: http://nowhere\.invalid:1 cannot be reached"):
        _address("http://nowhere.invalid:1")


def test_remote_server_connects_to_the_outward_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """MASTER_ADDR and the host's name may both be 127.0.0.1, which another machine cannot reach."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    own = [a.address for of in psutil.net_if_addrs().values() for a in of if a.family == socket.AF_INET]
    outer = [address for address in own if not address.startswith("127.")]
    if not outer:
        pytest.skip("this machine has only loopback addresses")
    assert _address(f"http://{outer[0]}:30000") == outer[0]


GLOO = """
import os, sys
from icrl_megatron.engines.sglang_group import gloo_on
from datetime import timedelta
import torch.distributed as dist
os.environ["GLOO_SOCKET_IFNAME"] = "none_has_this_name"
store = dist.HashStore()
with gloo_on("127.0.0.1"):
    dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=20))
assert os.environ["GLOO_SOCKET_IFNAME"] == "none_has_this_name"
try:
    dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=20))
except RuntimeError:
    sys.exit(0)
sys.exit("gloo did not read the name")
"""


def test_weight_group_uses_that_address() -> None:
    """It does not use GLOO_SOCKET_IFNAME, which the launcher may have set to loopback."""
    done = subprocess.run([sys.executable, "-c", GLOO], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_interface_variable_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with gloo_on("127.0.0.1"):
        assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
