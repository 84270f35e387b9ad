"""What the real SGLang returns, and what it holds after a sync, next to transformers."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import (
    CONTEXT,
    UNTIED,
    changed,
    engine_on,
    engine_settings,
    generate,
    greedy,
    load,
    reference_logprobs,
    repeating,
    serving,
    spec,
    weights,
)
from safetensors.torch import save_file

from icrl_megatron.distributed import platform
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import EngineError, RequestFailedError, Sampling
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_build import _remote
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.engines.sync import WeightSync
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.prompts import tokenizer
from icrl_megatron.settings.schema import EngineSettings, RolloutSettings, Settings, TinyModel
from icrl_megatron.utils.errors import ConfigError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOLERANCE = 1e-4
PROMPTS = [[8 + i % 30, 8 + i // 2, 9 + i % 5, 11, 8 + i * 7 % 30] for i in range(48)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_1000_logprobs_agree_with_transformers(engine: SGLangEngine, model: Path, temperature: float) -> None:
    reference = load(model)
    engine.update_weights(weights(reference), 1)
    sampling = [Sampling(temperature, 64, seed, ()) for seed in range(len(PROMPTS))]
    completions = generate(engine, list(zip(PROMPTS, sampling, strict=True)))
    worst = max(
        float((reference_logprobs(reference, p, c.ids, temperature or 1.0) - torch.tensor(c.logprobs)).abs().max())
        for p, c in zip(PROMPTS, completions, strict=True)
    )
    tokens = sum(len(c.ids) for c in completions)
    print(f"temperature {temperature}: {tokens} tokens, largest difference {worst:.1e}")
    assert tokens >= 1000
    assert worst < TOLERANCE


def test_new_weights_are_live_stamped_and_checksummed(engine: SGLangEngine, model: Path) -> None:
    reference = load(model)
    engine.update_weights(weights(reference), 1)
    greedily = Sampling(0.0, 24, 0, ())
    before = generate(engine, [(PROMPTS[0], greedily)])[0]
    new = changed(reference, 1)
    engine.update_weights(iter(new), 2)
    engine.verify(iter(new), UNTIED)
    reference.load_state_dict(dict(new))
    end = reference.config.eos_token_id
    after = generate(engine, [(p, greedily) for p in PROMPTS[:8]])
    assert [tuple(c.ids.tolist()) for c in after] == [greedy(reference, p, 24, end) for p in PROMPTS[:8]]
    assert before.weight_version == 1
    assert {c.weight_version for c in after} == {2}
    assert before.ids.tolist() != after[0].ids.tolist()

    other = [(n, t + 1.0 if n == "model.layers.1.self_attn.k_proj.weight" else t) for n, t in new]
    with pytest.raises(EngineError, match=r"other values of 'model\.layers\.1\.self_attn\.qkv_proj\.weight'"):
        engine.verify(iter(other), UNTIED)


def test_stop_strings_end_replies_as_in_the_local_engine(engine: SGLangEngine, model: Path) -> None:
    """Also in the middle of a token: the whole token and its log-prob stay."""
    reference, decode = load(model), tokenizer(model).decode
    engine.update_weights(weights(reference), 1)
    everything = zip(PROMPTS, generate(engine, [(p, Sampling(0.0, 24, 0, ())) for p in PROMPTS]), strict=True)
    prompts, free = zip(*[(p, reply) for p, reply in everything if len(reply.ids) > 9], strict=True)
    stops = [(decode([int(reply.ids[6 + i % 3])]).strip()[: 2 + i % 2], "never") for i, reply in enumerate(free)]
    asked = [(p, Sampling(0.0, 24, 0, (), stop)) for p, stop in zip(prompts, stops, strict=True)]
    stopped = generate(engine, asked)
    local = LocalEngine(model, EngineSettings(), torch.float32, "cpu")
    for reply, ours, whole, stop in zip(stopped, generate(local, asked), free, stops, strict=True):
        count = next(n for n in range(1, 25) if stop[0] in decode(whole.ids[:n].tolist()))
        assert (
            reply.ids.tolist() == ours.ids.tolist() == whole.ids[:count].tolist()
            and reply.finish_reason == ours.finish_reason == "stop"
        )
        torch.testing.assert_close(
            torch.tensor(reply.logprobs), torch.tensor(whole.logprobs[:count]), atol=1e-5, rtol=0
        )
    assert any(not decode(reply.ids.tolist()).endswith(stop[0]) for reply, stop in zip(stopped, stops, strict=True))


def test_qwen2_on_two_workers_is_synced_and_checksummed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The biases of q, k and v reach SGLang's fused bias, half of it on each worker. Replies are those of
    transformers."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")  # one NUMA node serves both
    model, settings = tmp_path / "model", engine_settings(tensor_parallel=2)
    build_tiny(model, TinyModel(family="qwen2", tie_embeddings=False), [f"w{i}" for i in range(60)], 0)
    with serving(model, tmp_path, settings) as server:
        engine, reference = engine_on(server, model, settings), load(model)
        new, shape = changed(reference, 1), ModelShape.read(model)
        engine.update_weights(iter(new), 1)
        engine.verify(iter(new), shape)
        reference.load_state_dict(dict(new))
        replies = generate(engine, [(p, Sampling(0.0, 24, 0, ())) for p in PROMPTS[:8]])
        end = reference.config.eos_token_id
        assert [tuple(c.ids.tolist()) for c in replies] == [greedy(reference, p, 24, end) for p in PROMPTS[:8]]
        for prompt, reply in zip(PROMPTS, replies, strict=False):
            expected = reference_logprobs(reference, prompt, reply.ids, 1.0)
            assert float((expected - torch.tensor(reply.logprobs)).abs().max()) < TOLERANCE
        other = [(n, t + 1.0 if n == "model.layers.1.self_attn.k_proj.bias" else t) for n, t in new]
        with pytest.raises(EngineError, match=r"other values of 'model\.layers\.1\.self_attn\.qkv_proj\.bias'"):
            engine.verify(iter(other), shape)


LOAD_QKV = """
import hashlib, json, sys
from types import SimpleNamespace
import torch
from safetensors.torch import load_file
from sglang.srt.layers import linear
for file, kv_heads in zip(sys.argv[1::2], sys.argv[2::2]):
    parts, found = load_file(file), []
    for rank in range(4):
        linear._resolve_linear_group = lambda _: SimpleNamespace(rank_in_group=rank, world_size=4)
        layer = linear.QKVParallelLinear(8, 3, 4, int(kv_heads), bias=True, params_dtype=torch.float32)
        for name, part in parts.items():
            projection, kind = name.split(".")[-2:]
            param = getattr(layer, kind)
            param.weight_loader(param, part, projection[0])
        values = {kind: getattr(layer, kind).data.contiguous().numpy().tobytes() for kind in ("weight", "bias")}
        found.append({f"self_attn.qkv_proj.{k}": hashlib.sha256(v).hexdigest()[:16] for k, v in values.items()})
    print(json.dumps(found))
"""
"""Loads q, k and v as each of four GPU workers does. (A server on a CPU pads key-value heads instead.)"""


def test_four_workers_load_fewer_key_value_heads_as_expected(tmp_path: Path) -> None:
    expected, words = [], []
    for kv_heads in (1, 2, 4):
        sizes, file = {"q": 12, "k": 3 * kv_heads, "v": 3 * kv_heads}, tmp_path / f"{kv_heads}.safetensors"
        parts = {f"self_attn.{n}_proj.weight": torch.randn(size, 8) for n, size in sizes.items()}
        parts |= {f"self_attn.{n}_proj.bias": torch.randn(size) for n, size in sizes.items()}
        checks = Checksums(4, ModelShape.of_tiny(TinyModel(heads=4, kv_heads=kv_heads)))
        for name, part in parts.items():
            checks.add(name, part)
        save_file(parts, file)
        expected.append(checks.expected)
        words += [str(file), str(kv_heads)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["ICRL_ENGINE_PYTHON"], "-c", LOAD_QKV, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")] == expected


@pytest.mark.parametrize("bucket_mib", [1, 512])
def test_small_buckets_give_the_same_weights(server: Server, model: Path, bucket_mib: int) -> None:
    engine = engine_on(server, model, engine_settings(bucket_mib=bucket_mib))
    engine._sender.limit = 60_000 if bucket_mib == 1 else engine._sender.limit  # a tiny model fits in one
    new = changed(load(model), 3)
    engine.update_weights(new, 5)
    engine.verify(new, UNTIED)


def test_malformed_updates_are_refused_and_the_server_lives(engine: SGLangEngine, model: Path) -> None:
    good = weights(load(model))
    name, tensor = good[3]
    bad = {
        "has no tensor 'model.nonsense'": [("model.nonsense", tensor)],
        "has shape": [(name, tensor[:1])],
        "is torch.bfloat16": [(name, tensor.bfloat16())],
        "was sent twice": [good[3], good[3]],
        "lacks": good[:-1],
    }
    for message, tensors in bad.items():
        with pytest.raises(EngineError, match=message):
            engine.update_weights(tensors, 7)
    with pytest.raises(EngineError, match="a part of the weights of version 7"):
        generate(engine, [(PROMPTS[0], Sampling(0.0, 4, 0, ()))])
    engine.update_weights(good, 8)
    assert generate(engine, [(PROMPTS[0], Sampling(0.0, 4, 0, ()))])[0].weight_version == 8


def test_a_request_past_its_deadline_keeps_its_tokens(server: Server, model: Path) -> None:
    """No reply ends by itself, and the deadline is a third of the time that all tokens take on this machine."""
    patient = engine_on(server, model, engine_settings())
    patient.update_weights(repeating(load(model), token=9), 1)
    short, long = Sampling(0.0, 48, 0, ()), Sampling(0.0, 480, 0, ())
    generate(patient, [(p, short) for p in PROMPTS])  # the first requests after an update are slower
    begun = time.perf_counter()
    assert all(c.ids.tolist() == [9] * 48 for c in generate(patient, [(p, short) for p in PROMPTS]))
    hurried = engine_on(server, model, engine_settings(request_timeout_s=10 / 3 * (time.perf_counter() - begun)))
    hurried.update_weights(repeating(load(model), token=9), 2)
    replies = generate(hurried, [(p, long) for p in PROMPTS])
    assert {c.finish_reason for c in replies} == {"abort"}
    assert all(len(c.ids) == len(c.logprobs) < 480 for c in replies)
    assert any(len(c.ids) for c in replies)
    assert hurried.stats.aborted == len(PROMPTS)


def test_a_cancelled_request_is_aborted_and_the_others_go_on(engine: SGLangEngine, model: Path) -> None:
    engine.update_weights(weights(load(model)), 1)

    async def one_leaves() -> int:
        left = asyncio.ensure_future(engine.generate(PROMPTS[0], Sampling(1.0, 400, 0, ())))
        stays = asyncio.ensure_future(engine.generate(PROMPTS[1], Sampling(0.0, 20, 0, ())))
        await asyncio.sleep(0.2)
        left.cancel()
        return len((await stays).ids)

    assert asyncio.run(one_leaves()) > 0


def test_turns_of_an_episode_find_their_prefix_in_the_cache(engine: SGLangEngine, model: Path) -> None:
    engine.update_weights(weights(load(model)), 1)
    prompt = [8 + i * i % 30 for i in range(200)]
    generate(engine, [(prompt, Sampling(0.0, 4, 0, ()))])
    engine.take_stats()
    generate(engine, [([*prompt, 12, 13], Sampling(0.0, 4, 0, ()))])
    stats = engine.take_stats()
    assert stats.prompt_tokens == 202
    assert stats.cached_tokens >= 199
    engine.update_weights(weights(load(model)), 2)
    generate(engine, [([*prompt, 12, 13], Sampling(0.0, 4, 0, ()))])
    assert engine.take_stats().cached_tokens == 0  # what the old weights computed is gone


def test_sleep_and_wake_in_two_stages(engine: SGLangEngine, model: Path) -> None:
    engine.update_weights(weights(load(model)), 1)
    engine.sleep()
    with pytest.raises(EngineError, match="sleeps"):
        generate(engine, [(PROMPTS[0], Sampling(0.0, 4, 0, ()))])
    engine.wake_weights()
    engine.update_weights(weights(load(model)), 2)
    engine.wake()
    assert generate(engine, [(PROMPTS[0], Sampling(0.0, 4, 0, ()))])[0].weight_version == 2


def test_an_open_update_is_ended(
    server: Server, engine: SGLangEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", server.key)
    remote = engine_settings(urls=[server.url], api_key_env="SERVER_KEY")
    settings = Settings(engine=remote, rollout=RolloutSettings(context_tokens=CONTEXT))
    tensors = weights(load(model))
    server.post("/begin_weight_update", {}, 60.0)
    with pytest.raises(EngineError, match="already open"):
        server.post("/begin_weight_update", {}, 60.0)
    for _ in range(2):  # and where none is open nothing is wrong
        _remote(settings, server.url)
    engine.update_weights(tensors, 4)
    assert engine.verify(tensors, UNTIED)


def test_servers_started_in_turn_sleep_until_weights_are_pushed(model: Path, tmp_path: Path) -> None:
    """As beside an actor on a GPU, where a frozen critic's server gives its memory too, and keeps its weights."""
    logs = (tmp_path / name for name in ("trained.log", "critic.log"))
    trained, critic = (engine_on(Server(spec(model, log, engine_settings())), model, engine_settings()) for log in logs)
    engines = Engines(trained, trained, critic, Share(0, 1), in_turn=True)
    running: list[tuple[bool, bool]] = []
    platform.prepare("cpu")  # it answers how much memory is in use
    try:
        engines.wait_ready(lambda: running.append((trained.server.alive(), critic.server.alive())))
        assert running[0] == (True, False) and running[-1] == (True, True)
        request = [(PROMPTS[0], Sampling(0.0, 8, 0, ()))]
        for engine in (trained, critic):
            with pytest.raises(EngineError, match="sleeps"):
                generate(engine, request)
        reference = load(model)
        later, end = changed(reference, seed=3), reference.config.eos_token_id
        sync = WeightSync(SimpleNamespace(stream=lambda: iter(later)), trained, frozen=critic)  # type: ignore[arg-type]
        sync.push()
        sync.sleep()
        sync.push()
        said = {name: generate(engine, request)[0] for name, engine in (("critic", critic), ("trained", trained))}
        assert tuple(said["critic"].ids.tolist()) == greedy(reference, PROMPTS[0], 8, end=end)
        reference.load_state_dict(dict(later))
        trained_ids, critic_ids = (tuple(said[name].ids.tolist()) for name in ("trained", "critic"))
        assert trained_ids == greedy(reference, PROMPTS[0], 8, end=end) != critic_ids
    finally:
        engines.close()


def test_a_request_that_cannot_be_served_is_refused_by_name(engine: SGLangEngine) -> None:
    with pytest.raises(RequestFailedError, match="SGLang"):
        generate(engine, [([8] * 600, Sampling(0.0, 4, 0, ()))])


def test_verify_sync_says_whether_a_server_holds_a_folder(engine: SGLangEngine, model: Path) -> None:
    reference = load(model)
    tool = Path(__file__).parents[2] / "tools" / "verify_sync.py"
    engine.update_weights(changed(reference, 2), 1)
    differs = subprocess.run(
        [sys.executable, str(tool), engine.server.url, str(model), "--api-key-env", "SERVER_KEY"],
        env={**os.environ, "SERVER_KEY": engine.server.key}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert differs.returncode == 1, differs.stderr
    assert "has other values of" in differs.stdout

    engine.update_weights(weights(reference), 2)
    verify = runpy.run_path(str(tool))["verify"]
    assert verify(engine.server.url, model, engine.server.key) == 19
    with pytest.raises(ConfigError, match="does not answer"):
        verify("http://127.0.0.1:9", model)
