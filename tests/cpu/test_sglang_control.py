"""The SGLang client with HTTP servers whose control requests hang, fail or get invalid answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from local_servers import Handler, threaded

from icrl_megatron.engines import sglang
from icrl_megatron.engines.protocol import EngineError, NoAnswerError
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_server import Server, ServerSpec, require_cache
from icrl_megatron.engines.sglang_weights import SharedMemory
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, TinyModel
from icrl_megatron.utils.errors import ConfigError

SHAPES = {"model.embed_tokens.weight": (16, 2)}
WEIGHTS = [("model.embed_tokens.weight", torch.ones(16, 2))]
LIMIT_S = 1.0
DONE = b'{"success": true, "message": "", "ranks": []}'
SAYS = {"/flush_cache": b"Cache flushed.\n", "/release_memory_occupation": b"null"}
"""Path -> the successful answer of SGLang 0.5.23; all other paths get DONE."""


@dataclass
class Fake:
    """A fake server: `answers` has (status, body) for paths that do not succeed."""

    url: str = ""
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    hangs_at: str = ""
    asked: list[str] = field(default_factory=list)

    def reply(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        if path == self.hangs_at:
            time.sleep(3 * LIMIT_S)
        return self.answers.get(path, (200, SAYS.get(path, DONE)))


@pytest.fixture
def fake() -> Iterator[Fake]:
    found = Fake()

    class Answers(Handler):
        def do_POST(self) -> None:
            self.body()
            status, body = found.reply(self.path.partition("?")[0])
            self.send(body, status)

    with threaded(Answers) as found.url:
        yield found


class OwnServer(Server):
    """A server as if this run had started it, without a process."""

    killed = False

    def alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True


def engine_on(fake: Fake, folder: Path, ours: bool = True) -> SGLangEngine:
    settings = EngineSettings(kind="sglang", sync_timeout_s=LIMIT_S)
    spec = ServerSpec(folder, settings, "fp32", 64, folder / "sglang.log", on_cpu=True)
    server = OwnServer(spec, fake.url) if ours else Server(None, fake.url)

    def transport() -> SharedMemory:
        return SharedMemory(server, 1, None, 0, LIMIT_S)

    return SGLangEngine(server, settings, transport, SHAPES, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "_CONTROL_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(sglang, "_DEATH_GRACE_S", 0.1)


def update(engine: SGLangEngine) -> None:
    engine.update_weights(WEIGHTS, 1)


def verify(engine: SGLangEngine) -> None:
    engine.verify(WEIGHTS, ModelShape.of_tiny(TinyModel()))


CALLS: dict[str, Callable[[SGLangEngine], None]] = {
    "/begin_weight_update": update,
    "/update_weights_from_tensor": update,
    "/end_weight_update": update,
    "/flush_cache": SGLangEngine.sleep,
    "/release_memory_occupation": SGLangEngine.sleep,
    "/weights_checker": verify,
}
INVALID = {
    "a proxy's page": (200, b"<html>busy</html>"),
    "a truncated answer": (200, b'{"succ'),
    "an unrelated answer": (200, b"{}"),
    "an internal error": (500, b"boom"),
}


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("answer", [*INVALID, "none"])
def test_own_server_with_invalid_answers_is_lost_and_killed(fake: Fake, tmp_path: Path, path: str, answer: str) -> None:
    if answer == "none":
        fake.hangs_at = path
    else:
        fake.answers[path] = INVALID[answer]
    engine = engine_on(fake, tmp_path)
    CALLS[path](engine)
    assert path in engine.lost()
    assert not engine.server.alive()
    assert engine._version == 0
    before = len(fake.asked)
    for call in CALLS.values():  # later calls of a step neither fail nor send requests
        if call is not verify:
            call(engine)
    assert len(fake.asked) == before


@pytest.mark.parametrize("path", CALLS)
def test_rejection_and_invalid_answers_of_external_servers_end_the_run(fake: Fake, tmp_path: Path, path: str) -> None:
    fake.answers[path] = (400, b'{"success": false, "message": "not in this state"}')
    ours = engine_on(fake, tmp_path)
    with pytest.raises(EngineError, match=f"SGLang refused {path}.*not in this state"):
        CALLS[path](ours)
    assert ours.lost() == ""
    fake.answers[path] = (200, b'{"success": false, "message": "not in this state"}')
    if path not in SAYS:
        with pytest.raises(EngineError, match="not in this state"):
            CALLS[path](engine_on(fake, tmp_path))

    fake.answers[path] = (502, b"bad gateway")
    if path != "/release_memory_occupation":  # an external server keeps its memory
        with pytest.raises(NoAnswerError, match=f"{path}.*bad gateway"):
            CALLS[path](engine_on(fake, tmp_path, ours=False))


def test_successful_answers_are_accepted(fake: Fake, tmp_path: Path) -> None:
    engine = engine_on(fake, tmp_path)
    update(engine)
    engine.sleep()
    assert (engine.lost(), engine._version, len(fake.asked)) == ("", 1, 5)


def test_checksum_mismatch_ends_the_run(fake: Fake, tmp_path: Path) -> None:
    ranks = b'[{"parallelism_info": {"tp_rank": 0}, "checksums": {"model.embed_tokens.weight": "00"}}]'
    fake.answers["/weights_checker"] = (200, b'{"success": true, "message": "", "ranks": ' + ranks + b"}")
    with pytest.raises(EngineError, match=r"other values of 'model\.embed_tokens\.weight'"):
        verify(engine_on(fake, tmp_path))


def test_cache_smaller_than_a_context_is_rejected() -> None:
    require_cache({"max_total_num_tokens": 520}, 512, "the server", "engine.kv_tokens")
    with pytest.raises(ConfigError, match=r"the server holds 519 tokens.*context_tokens=512 takes 520: raise engine"):
        require_cache({"max_total_num_tokens": 519}, 512, "the server", "engine.kv_tokens")


def test_quantizing_server_is_started_to_accept_new_weights(tmp_path: Path) -> None:
    settings = EngineSettings(kind="sglang", quantization="fp8", server_args=["--last"])
    words = ServerSpec(tmp_path, settings, "bf16", 64, tmp_path / "log", on_cpu=False).command(1)
    assert words[words.index("--quantization") + 1] == "fp8"
    assert words[words.index("--load-format") + 1] == "flash_rl"
    assert words[-1] == "--last"
    plain = ServerSpec(tmp_path, EngineSettings(kind="sglang"), "bf16", 64, tmp_path / "log", on_cpu=False)
    assert "--load-format" not in plain.command(1)
