"""Who may speak to a server that a run has started, and where it listens; with the real SGLang."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engine_cases import generate
from sockets import listeners

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.utils import processes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POSTED = (
    "/generate", "/begin_weight_update", "/update_weights_from_tensor", "/update_weights_from_distributed",
    "/init_weights_update_group", "/update_weights_from_disk", "/end_weight_update", "/release_memory_occupation",
    "/resume_memory_occupation", "/weights_checker", "/flush_cache", "/abort_request", "/configure_logging",
)  # fmt: skip
ASKED = ("/server_info", "/model_info", "/v1/models", "/get_weights_by_name")


def status(server: Server, path: str, key: str | None, body: dict[str, object] | None = None) -> int:
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_is_done_for_those_who_have_no_key(server: Server, engine: SGLangEngine) -> None:
    for key in (None, "", "wrong", server.key[:-1]):
        assert {status(server, path, key, {}) for path in POSTED} == {401}
        assert {status(server, path, key) for path in ASKED} == {401}
    assert status(server, "/server_info", server.key) == 200
    assert status(server, "/health", None) == 200  # which SGLang leaves open
    (said,) = generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])
    assert len(said.ids)


def test_the_key_is_in_no_command_line_and_no_log(server: Server) -> None:
    assert server.spec is not None and len(server.key) > 40
    log = server.spec.log.read_text(errors="replace")
    assert "server_args=" in log and server.key not in log
    tree = processes.tree(server.pid() or 0)
    assert len(tree) >= 3
    for process in tree:
        assert server.key not in " ".join(process.cmdline())


def test_a_server_listens_on_loopback_only(server: Server, engine: SGLangEngine) -> None:
    generate(engine, [([8, 9], Sampling(0.0, 4, 0, ()))])
    found = listeners(server.pid() or 0)
    assert len(found) > 1  # its own address, and gloo's
    assert [one for one in found if not one.local] == []
    environment = Path(f"/proc/{server.pid()}/environ").read_bytes().split(b"\0")
    assert b"GLOO_SOCKET_IFNAME=lo" in environment and b"NCCL_SOCKET_IFNAME=lo" in environment
