"""The SGLang client with HTTP servers that misbehave in ways that a real server cannot be made to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
import torch
from aiohttp import web
from local_servers import Replies, serving

from icrl_megatron.engines import sglang
from icrl_megatron.engines.protocol import EngineError, EngineLostError, RequestFailedError, Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_checks import Checksums, word_hash
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.engines.sglang_weights import Answer, Bucket, Transport, WeightSender
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, TinyModel
from icrl_megatron.types import Completion

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SHAPES = {"model.embed_tokens.weight": (16, 2)}
STOP = 7
SAMPLING = Sampling(1.0, 4, 0, (STOP,))
GOOD = {"type": "length", "length": 2}


def answer(**meta: object) -> dict[str, object]:
    given = {
        "finish_reason": GOOD,
        "prompt_tokens": 2,
        "cached_tokens": 1,
        "weight_version": "default",
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
    }
    return {"meta_info": {**given, **meta}}


def no_transport() -> Transport:
    raise AssertionError("no weights are sent here")


def talk(
    generate: Handler, count: int = 1, version: int = 0, key: str = "", seen: list[tuple[str, str]] | None = None
) -> tuple[list[Completion | BaseException], SGLangEngine]:
    """Sends `count` requests in turn to a server whose /generate is `generate`. `version` is that of the last pushed
    weights. The path and API key of all other requests are appended to `seen`."""

    async def healthy(request: web.Request) -> web.Response:
        if seen is not None:
            seen.append((request.path, request.headers.get("Authorization", "")))
        return web.Response()

    async def run() -> tuple[list[Completion | BaseException], SGLangEngine]:
        routes = web.post("/generate", generate), web.post("/abort_request", healthy), web.get("/health", healthy)
        settings = EngineSettings(kind="sglang", request_timeout_s=0.3)
        found: list[Completion | BaseException] = []
        async with serving(*routes) as url:
            server = Server(None, url, key)
            engine = SGLangEngine(server, settings, no_transport, SHAPES, torch.float32, torch.device("cpu"))
            engine._version = version
            for _ in range(count):
                found += await asyncio.gather(engine.generate((1, 2), SAMPLING), return_exceptions=True)
        return found, engine

    return asyncio.run(run())


KEY = "a-secret-of-this-run"


def test_api_key_is_sent_and_hidden_in_messages() -> None:
    seen: list[tuple[str, str]] = []

    async def echo(request: web.Request) -> web.Response:
        seen.append((request.path, request.headers["Authorization"]))
        return web.Response(status=[400, 200, 500][len(seen) % 3], text=str(dict(request.headers)))

    found, _ = talk(echo, 3, key=KEY)
    assert {given for _, given in seen} == {f"Bearer {KEY}"}
    assert KEY not in "".join(map(str, found)) and "***" in "".join(map(str, found))

    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(1.0)
        return web.json_response(answer())

    seen.clear()
    talk(slow, key=KEY, seen=seen)
    assert ("/abort_request", f"Bearer {KEY}") in seen


def test_completion_has_ids_and_logprobs() -> None:
    server = Replies(answer())
    (completion,), engine = talk(server.answer)
    (body,) = server.seen
    assert (body["input_ids"], body["sampling_params"]["top_p"]) == ([1, 2], 1.0)
    assert completion == Completion((5, 6), (-1.0, -2.0), "length", 0)
    assert (engine.stats.prompt_tokens, engine.stats.cached_tokens) == (2, 1)


@pytest.mark.parametrize(
    "body",
    [
        "no json",
        "[" * 200_000,
        "[]",
        "{}",
        answer(output_token_logprobs=[[float("nan"), 5, None]]),
        answer(output_token_logprobs=[[0.5, 5, None]]),
        answer(output_token_logprobs=[[-1.0, 5, None]] * 5),
        answer(finish_reason={"type": "what"}),
        answer(output_token_logprobs=[]),
        answer(output_token_logprobs=[[-1.0, 16, None]]),
        answer(output_token_logprobs=[[-1.0, -7, None]]),
        answer(output_token_logprobs=[[-1.0, 5.0, None]]),
        answer(output_token_logprobs=[[-1.0, True, None]]),
    ],
)
def test_invalid_answer_fails_its_request_and_three_lose_the_engine(body: object) -> None:
    reply = (lambda: web.Response(text=body)) if isinstance(body, str) else body
    found, engine = talk(Replies(reply).answer, 4)
    assert [type(f) for f in found] == [RequestFailedError] * 2 + [EngineLostError] * 2
    assert "3 answers in a row" in engine.lost()


def queued(**changes: object) -> dict[str, object]:
    """The answer of SGLang 0.5.23 to a request that it aborted in its queue (_handle_abort_req)."""
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    meta = {"finish_reason": reason, "weight_version": "9", "e2e_latency": 1.0, "completion_tokens": 0}
    return {"text": "", "output_ids": [], "meta_info": {**meta, "output_token_logprobs": [], **changes}}


def test_a_reply_that_ended_as_it_was_aborted_is_not_continued() -> None:
    """SGLang looks for an abort before it looks for an end token."""
    aborted = Replies(queued(output_token_logprobs=[[-1.0, 5, None], [-0.5, STOP, None]]))
    found, _ = talk(aborted.answer, 1, version=9)
    assert found == [Completion((5, STOP), (-1.0, -0.5), "stop", 9)]


def test_request_aborted_in_the_queue_is_neither_valid_nor_invalid() -> None:
    kept = queued(output_token_logprobs=[[-1.0, 5, None]])  # it ran, was requeued, and keeps the tokens reported so far
    no_such = answer(weight_version="9", finish_reason={"type": "what"})
    aborts = Replies(queued(), kept, no_such, queued(), no_such, queued(), queued(), no_such)
    found, engine = talk(aborts.answer, 8, version=9)
    nothing = Completion((), (), "abort", 9)
    assert found[:2] == [nothing, Completion((5,), (-1.0,), "abort", 9)]
    kinds = [RequestFailedError, Completion, RequestFailedError, Completion, Completion, EngineLostError]
    assert [type(f) for f in found[2:]] == kinds
    assert engine.stats.prompt_tokens == 0


@pytest.mark.parametrize(("stamp", "fits"), [("9", True), ("3", False), ("10", False), ("default", False)])
def test_answer_from_other_weights_than_the_last_pushed_is_invalid(stamp: str, fits: bool) -> None:
    (found,), _ = talk(Replies(answer(weight_version=stamp)).answer, version=9)
    if fits:
        assert isinstance(found, Completion) and found.weight_version == 9
    else:
        assert isinstance(found, RequestFailedError) and "version 9 was pushed last" in str(found)


def test_server_error_is_retried_and_rejection_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "_DEATH_GRACE_S", 0.1)
    (completion,), engine = talk(Replies(lambda: web.Response(status=503), answer()).answer)
    assert isinstance(completion, Completion)
    assert engine.stats.retries == 1
    rejects = Replies(lambda: web.Response(status=400, text="too long"))
    (error,), _ = talk(rejects.answer, 1)
    assert isinstance(error, RequestFailedError)
    assert "too long" in str(error)
    assert len(rejects.seen) == 1


def test_server_that_never_answers_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "ABORT_GRACE_S", 0.3)

    async def never(request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    (error,), engine = talk(never)
    assert isinstance(error, EngineLostError)
    assert "hangs" in str(error)
    with pytest.raises(EngineError, match="The run cannot restart it"):
        engine.revive()


class Recorded:
    """Records its calls, and copies a bucket as late as allowed: when the caller waits for the answer."""

    def __init__(self, error: str = "") -> None:
        self.calls: list[str] = []
        self.seen: dict[str, torch.Tensor] = {}
        self.options: list[dict[str, object]] = []
        self.buckets: list[tuple[list[str], int]] = []
        """Names in each bucket, and the size of its buffer."""
        self._error = error

    def begin(self, lost: str) -> Answer:
        self.calls.append("begin")
        return lambda: None

    def send(self, bucket: Bucket, options: dict[str, object]) -> Answer:
        self.calls.append("send")
        self.options.append(options)
        placed = list(bucket.placed)
        self.buckets.append(([p.name for p in placed], len(bucket.buffer)))

        def wait() -> None:
            self.calls.append("answer")
            if self._error:
                raise EngineError(self._error)
            for p in placed:
                assert p.name not in self.seen
                self.seen[p.name] = bucket.buffer[p.start : p.end].view(p.dtype).view(p.shape).clone()

        return wait

    def close(self) -> None:
        pass


def tensors_and_sink() -> tuple[list[tuple[str, torch.Tensor]], WeightSender]:
    tensors = [(f"t{i}", torch.full((i + 1, 3), float(i))) for i in range(6)]
    sink = WeightSender({name: tuple(t.shape) for name, t in tensors}, torch.float32, torch.device("cpu"), 512)
    sink.limit = 100
    return tensors, sink


def test_two_alternating_buckets_send_every_tensor_once() -> None:
    tensors, sink = tensors_and_sink()
    transport = Recorded()
    sink.send_all(tensors, 7, transport)
    assert list(transport.seen) == [name for name, _ in tensors]
    assert all(torch.equal(transport.seen[name], tensor) for name, tensor in tensors)
    assert transport.calls == ["begin", *["send", "answer"] * (len(transport.calls) // 2)]
    assert len(transport.options) > 2
    assert [o["flush_cache"] for o in transport.options] == [False] * (len(transport.options) - 1) + [True]
    assert [o["weight_version"] for o in transport.options][-2:] == [None, "7"]


def test_no_copy_is_pending_after_a_failed_update() -> None:
    tensors, sink = tensors_and_sink()
    transport = Recorded()
    with pytest.raises(EngineError, match="lacks 1 of the model's tensors; first 't5'"):
        sink.send_all(tensors[:-1], 7, transport)
    assert transport.calls[-1] == "answer"
    assert transport.options[-1]["weight_version"] is None

    failing = Recorded("no room")
    with pytest.raises(EngineError, match="no room"):
        sink.send_all(tensors, 7, failing)
    assert failing.calls.count("send") == 1


@pytest.mark.parametrize(
    ("bucket_mib", "sent", "mib"),
    [
        (1, [["a"], ["b"], ["c"], ["d"]], 3),  # the largest tensor must fit anyway
        (2, [["a"], ["b"], ["c", "d"]], 3),
        (4, [["a", "b"], ["c", "d"]], 4),
        (512, [["a", "b", "c", "d"]], 6),
    ],
)
def test_as_few_buckets_as_their_size_allows(bucket_mib: int, sent: list[list[str]], mib: int) -> None:
    tensors = [(name, torch.full((size, 256, 1024), 1.0)) for name, size in zip("abcd", (1, 3, 1, 1), strict=True)]
    shapes = {name: tuple(t.shape) for name, t in tensors}
    sink, transport = WeightSender(shapes, torch.float32, torch.device("cpu"), bucket_mib), Recorded()
    for version in (1, 2):
        transport.buckets.clear()
        transport.seen.clear()
        sink.send_all(tensors, version, transport)
        assert [names for names, _ in transport.buckets] == sent
        assert {size for _, size in transport.buckets} == {mib << 20}


def test_checksums_of_two_workers_cover_their_shards() -> None:
    torch.manual_seed(0)
    prefix = "model.layers.0."
    q, k, v = torch.randn(8, 4), torch.randn(4, 4), torch.randn(4, 4)
    down, embedding = torch.randn(4, 6), torch.randn(70, 4)
    shape = ModelShape.of_tiny(TinyModel(kv_heads=2))
    expected = Checksums(2, shape)
    for name, tensor in (("q_proj", q), ("v_proj", v), ("k_proj", k)):
        expected.add(f"{prefix}self_attn.{name}.weight", tensor)
    expected.add(f"{prefix}mlp.down_proj.weight", down)
    expected.add("model.embed_tokens.weight", embedding)
    shares = Checksums(1, shape)
    shares.add("qkv", torch.cat([q[4:], k[2:], v[2:]]))
    shares.add("down", down[:, 3:].contiguous())
    shares.add("vocabulary", torch.cat([embedding[64:], torch.zeros(58, 4)]))
    second = expected.expected[1]
    assert second[f"{prefix}self_attn.qkv_proj.weight"] == shares.expected[0]["qkv"]
    assert second[f"{prefix}mlp.down_proj.weight"] == shares.expected[0]["down"]
    assert second["model.embed_tokens.weight"] == shares.expected[0]["vocabulary"]


@pytest.mark.parametrize(("kv_heads", "held"), [(1, (0, 0, 0, 0)), (2, (0, 0, 1, 1)), (4, (0, 1, 2, 3))])
def test_four_workers_replicate_fewer_key_value_heads(kv_heads: int, held: tuple[int, ...]) -> None:
    """Like SGLang's QKVParallelLinear; heads have three rows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(12), torch.randn(3 * kv_heads), torch.randn(3 * kv_heads)
    shape = ModelShape.of_tiny(TinyModel(kv_heads=kv_heads))
    expected, shares = Checksums(4, shape), Checksums(1, shape)
    for name, tensor in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        expected.add(f"self_attn.{name}.bias", tensor)
    for worker, head in enumerate(held):
        rows = slice(3 * head, 3 * head + 3)
        shares.add("qkv", torch.cat([q[3 * worker : 3 * worker + 3], k[rows], v[rows]]))
        assert expected.expected[worker]["self_attn.qkv_proj.bias"] == shares.expected[0]["qkv"]


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [
        (0, torch.float32, 0),
        (1, torch.float32, 0x4087E4143241FFF1),
        (5, torch.bfloat16, 0xB0C7CAE84C841975),
        (8192, torch.float32, 0xC3409EF0A2FF6AFF),
        (20001, torch.bfloat16, 0x7CFE927DCA460A31),
        (40000, torch.float32, 0x6E19D206290BCA5C),
    ],
)
def test_gpu_checksum_equals_sglangs(count: int, dtype: torch.dtype, expected: int) -> None:
    """Expected values are from the kernel of SGLang 0.5.23 in Triton's interpreter."""
    assert word_hash((torch.arange(count) * 0.37 - count / 5).to(dtype)) == expected


def test_gpu_checksum_of_a_tensor_hashed_in_parts() -> None:
    """As above, for more words than are hashed at once."""
    half = (torch.arange(2_200_003) * 2654435761).remainder(65521).to(torch.bfloat16)
    assert word_hash(torch.cat([half, half])) == 0x76CE81E400265105


def test_signals_do_not_stop_the_first_shared_buffer_of_a_process() -> None:
    # The ticks of the watchdog, a thousand times as often.
    code = (
        "import signal, torch\n"
        "from icrl_megatron.engines.sglang_weights import Bucket\n"
        "from icrl_megatron.rollout.timer import KernelTimer\n"
        "signal.signal(signal.SIGRTMAX - 5, lambda *_: None)\n"
        "timer = KernelTimer(signal.SIGRTMAX - 5)\n"
        "timer.set(1e-3, 1e-3)\n"
        "assert Bucket(1 << 10, torch.device('cpu')).buffer.is_shared()\n"
        "timer.set(0.0)\n"
        "assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
