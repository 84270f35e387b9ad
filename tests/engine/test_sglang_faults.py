"""Servers that never become ready, and what is said of them."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from engine_cases import CONTEXT, UNTIED, engine_on, engine_settings, generate, load, spec, weights

from icrl_megatron.distributed import net
from icrl_megatron.engines import sglang
from icrl_megatron.engines.protocol import EngineError, EngineLostError, Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_checks import require_context
from icrl_megatron.engines.sglang_server import Server, check_version, installed_version
from icrl_megatron.utils.errors import ConfigError

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_server_that_is_not_ready_in_time_is_killed_and_its_log_shown(model: Path, tmp_path: Path) -> None:
    server = Server(spec(model, tmp_path / "sglang.log", engine_settings(startup_timeout_s=2.0)))
    server.start()
    pid = server.pid()
    with pytest.raises(EngineError, match=r"not ready after engine.startup_timeout_s = 2 s.*The end of .*sglang\.log"):
        server.wait_ready()
    assert pid is not None
    assert not psutil.pid_exists(pid)


def test_a_server_that_ends_at_once_says_why(model: Path, tmp_path: Path) -> None:
    settings = engine_settings(server_args=["--no-such-argument"])
    server = Server(spec(model, tmp_path / "sglang.log", settings))
    server.start()
    with pytest.raises(EngineError, match=r"(?s)ended with code.*--no-such-argument"):
        server.wait_ready()


def test_a_killed_server_is_lost_and_comes_back_though_its_new_port_is_taken(
    server: Server, engine: SGLangEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(load(model))
    engine.update_weights(tensors, 1)
    os.kill(server.pid() or 0, 9)
    with pytest.raises(EngineLostError, match=r"(?s)died.*The end of"):
        generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])
    # What a step would do next: nothing of it reaches the dead server, and nothing fails.
    engine.sleep()
    engine.wake_weights()
    engine.update_weights(tensors, 2)
    engine.wake()
    engine.verify(tensors, UNTIED)

    find = net.free_port
    assert server.spec is not None
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        taken = holder.getsockname()[1]
        ports = iter([taken])
        monkeypatch.setattr(net, "free_port", lambda: next(ports, None) or find())
        engine.revive()
    starts = [f"port {taken}" in line for line in server.spec.log.read_text().splitlines() if line.startswith("=== ")]
    assert starts[:2] == [False, True] and not starts[-1]
    engine.update_weights(tensors, 2)
    assert generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])[0].weight_version == 2


def test_a_remote_server_with_a_shorter_context_is_refused(server: Server) -> None:
    require_context(server, CONTEXT)
    with pytest.raises(ConfigError, match=r"context-length 520; start it with at least 609, or lower the setting"):
        require_context(server, 601)


def test_a_server_that_hangs_is_lost(
    server: Server, engine: SGLangEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "ABORT_GRACE_S", 2.0)
    engine.update_weights(weights(load(model)), 1)
    hasty = engine_on(server, model, engine_settings(request_timeout_s=0.5))
    group = os.getpgid(server.pid() or 0)
    os.killpg(group, signal.SIGSTOP)
    try:
        with pytest.raises(EngineLostError, match="hangs"):
            generate(hasty, [([8, 9], Sampling(0.0, 4, 0, ()))])
    finally:
        os.killpg(group, signal.SIGCONT)
    assert generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])[0].ids.any()


def test_a_server_that_hangs_outside_of_requests_is_killed_and_comes_back(
    server: Server, engine: SGLangEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(load(model))
    engine.update_weights(tensors, 1)
    monkeypatch.setattr(sglang, "_CONTROL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(sglang, "_DEATH_GRACE_S", 0.5)
    pid = server.pid() or 0
    os.killpg(os.getpgid(pid), signal.SIGSTOP)
    engine.sleep()
    assert "did not answer /flush_cache" in engine.lost()
    assert not psutil.pid_exists(pid)
    engine.wake_weights()
    engine.update_weights(tensors, 2)
    engine.wake()
    with pytest.raises(EngineLostError, match="did not answer /flush_cache"):
        generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])

    monkeypatch.undo()
    engine.revive()
    engine.update_weights(tensors, 2)
    assert generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])[0].weight_version == 2


def test_versions_are_checked() -> None:
    settings = engine_settings()
    found = installed_version(settings.python)
    check_version(found, settings, "here")
    with pytest.raises(ConfigError, match=r"here has SGLang 0\.0\.1; this version was tested with"):
        check_version("0.0.1", settings, "here")
    with pytest.raises(ConfigError, match=r"pip install sglang=="):
        check_version(None, settings, "here")
