"""The local engine against plain forward passes of transformers: log-probs, sampling, batching, updates, errors."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_engines import STOP, WORDS, make_engine, make_model, prompts, sampling, teacher_forced
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from icrl_megatron.engines import decoding
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import EngineError, Sampling
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.types import Completion
from icrl_megatron.utils.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> LocalEngine:
    return make_engine(folder)


Requests = Sequence[tuple[list[int], Sampling]]


def run(engine: LocalEngine, requests: Requests) -> list[Completion]:
    async def together() -> list[Completion]:
        return await asyncio.gather(*[engine.generate(p, s) for p, s in requests])

    return asyncio.run(together())


def assert_plain_logprobs(folder: Path, requests: Requests, completions: list[Completion]) -> None:
    """The completions' log-probs are those of a plain forward pass at each request's temperature."""
    for (prompt, sample), completion in zip(requests, completions, strict=True):
        assert 1 <= len(completion.ids) <= sample.max_new_tokens
        expected = teacher_forced(folder, prompt, completion.ids, sample.temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass(folder: Path, engine: LocalEngine, temperature: float) -> None:
    shared = prompts(1, seed=9)[0]
    requests = [(p, sampling(i, temperature)) for i, p in enumerate([*prompts(12), shared, shared, shared])]
    assert_plain_logprobs(folder, requests, run(engine, requests))


def test_a_batch_can_mix_temperatures_stops_and_limits(folder: Path, engine: LocalEngine) -> None:
    wanted = [sampling(0, 0.0, 3), sampling(1, 0.7, 9, (STOP, 7)), sampling(2, 1.0, 1, ()), sampling(3, 2.0, 20, (9,))]
    requests = list(zip(prompts(4), wanted, strict=True))
    assert_plain_logprobs(folder, requests, run(engine, requests))


def test_greedy_takes_the_most_likely_token(folder: Path, engine: LocalEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompts(1)[0]
    (completion,) = run(engine, [(prompt, sampling(0, 0.0, 10))])
    ids = list(prompt)
    for token in completion.ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(engine: LocalEngine) -> None:
    requests = [(p, sampling(i, new=20)) for i, p in enumerate(prompts(20))]
    together = run(engine, requests)
    for request, batched in zip(requests, together, strict=True):
        (alone,) = run(engine, [request])
        assert np.array_equal(alone.ids, batched.ids)
        assert alone.logprobs.tolist() == pytest.approx(batched.logprobs.tolist(), abs=1e-5)
    assert run(engine, requests) == together
    assert len({c.ids.tobytes() for c in run(engine, [(requests[0][0], sampling(i)) for i in range(8)])}) > 1


def test_batch_and_prefill_sizes_do_not_change_the_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [(p, sampling(i)) for i, p in enumerate(prompts(15))]
    found = [[c.ids.tolist() for c in run(make_engine(folder, **limit), requests)] for limit in ({}, {"max_batch": 4})]
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 50)
    found.append([c.ids.tolist() for c in run(make_engine(folder), requests)])
    assert found[0] == found[1] == found[2]


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=40).map(sorted))
def test_prefill_chunks_cover_every_row_within_the_budget(lengths: list[int]) -> None:
    chunks = decoding._chunks(lengths)
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(len(lengths)))
    for c in chunks:
        assert c.stop - c.start == 1 or (c.stop - c.start) * lengths[c.stop - 1] <= decoding.PREFILL_TOKENS


def test_samples_follow_the_models_distribution(folder: Path, engine: LocalEngine) -> None:
    prompt, draws = prompts(1, seed=3)[0], 4000
    counts = Counter(c.ids[0] for c in run(engine, [(prompt, sampling(i, 0.7, 1)) for i in range(draws)]))
    vocabulary = range(len(build_tokenizer(WORDS)))
    logprobs = [float(teacher_forced(folder, prompt, [i], 0.7)[0]) for i in vocabulary]
    expected = torch.tensor(logprobs).exp() * draws
    observed = torch.tensor([float(counts[i]) for i in vocabulary])
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(vocabulary) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_ids_without_a_token_are_sampled_like_the_others(tmp_path: Path) -> None:
    """As in the trainer and SGLang, the softmax includes all rows of the head. Such an id decodes to nothing."""
    tokenizer = build_tokenizer(["a", "b"])
    tokenizer.save_pretrained(tmp_path)
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    engine = make_engine(tmp_path)
    requests = [([5, 6], sampling(i, 1.0, 20, ())) for i in range(20)]
    completions = run(engine, requests)
    assert_plain_logprobs(tmp_path, requests[:3], completions[:3])
    outside = [i for c in completions for i in c.ids if i >= len(tokenizer)]
    assert len(outside) > 100
    prompter = Prompter(tokenizer, RolloutSettings(templates="compact"))
    assert prompter.decode((5, *outside, 6)) == prompter.decode((5, 6))
    (again,) = run(engine, [([5, *outside[:10], 6], sampling(0, 1.0, 5, ()))])
    assert len(again.ids) == 5


def test_a_reply_ends_with_a_stop_id_or_at_its_limit(engine: LocalEngine) -> None:
    completions = run(engine, [(p, sampling(i, 1.0, 25, (STOP, 8, 9, 10))) for i, p in enumerate(prompts(30))])
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        stops = [i in (STOP, 8, 9, 10) for i in c.ids]
        assert not any(stops[:-1]) and len(c.ids) == len(c.logprobs)
        assert stops[-1] if c.finish_reason == "stop" else len(c.ids) == 25


def test_prompt_and_reply_are_limited_to_the_models_positions(engine: LocalEngine) -> None:
    (completion,) = run(engine, [([5] * 93, sampling(0, stop=()))])
    assert len(completion.ids) == 3 and completion.finish_reason == "length"
    with pytest.raises(EngineError, match="has 96 tokens, but the model has 96 positions"):
        run(engine, [([5] * 96, sampling(0))])


@pytest.mark.parametrize("prompt", [[], [-1], [10_000]])
def test_prompts_that_are_empty_or_have_unknown_ids_are_refused(engine: LocalEngine, prompt: list[int]) -> None:
    with pytest.raises(EngineError, match="ids outside"):
        run(engine, [(prompt, sampling(0))])


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_update_changes_the_replies_and_their_version(tmp_path: Path, tied: bool) -> None:
    old, new = make_model(tmp_path / "old", tied), make_model(tmp_path / "new", tied, seed=1)
    engine = make_engine(old)
    request = (prompts(1)[0], sampling(0))
    (before,) = run(engine, [request])
    assert before.weight_version == 0
    engine.update_weights(load_file(new / "model.safetensors").items(), 7)
    (after,) = run(engine, [request])
    assert after.weight_version == 7 and not np.array_equal(after.ids, before.ids)
    assert_plain_logprobs(new, [request], [after])


def test_after_a_malformed_update_the_engine_needs_a_complete_one(folder: Path, engine: LocalEngine) -> None:
    good = load_file(folder / "model.safetensors")
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert "lm_head.weight" not in good
    bad = [
        ([*good.items(), ("model.extra", torch.zeros(1))], r"no tensor 'model\.extra'"),
        ([*good.items(), (norm, good[norm])], r"'model\.norm\.weight' was sent twice"),
        ([(norm, torch.zeros(3))], r"'model\.norm\.weight' has shape \(3,\), the model's is \(32,\)"),
        ([(norm, good[norm].to(torch.int64))], r"'model\.norm\.weight' is torch\.int64"),
        ([(n, t) for n, t in good.items() if n != norm], r"lacks 1 of the model's tensors.*'model\.norm\.weight'"),
        ([*good.items(), ("lm_head.weight", good[embedding] + 1)], r"'lm_head\.weight' differs from"),
    ]
    for tensors, message in bad:
        with pytest.raises(EngineError, match=message):
            engine.update_weights(tensors, 3)
        with pytest.raises(EngineError, match="a part of the weights of version 3: send a complete update"):
            run(engine, [([5], sampling(0))])
    engine.update_weights([*good.items(), ("lm_head.weight", good[embedding])], 4)
    assert run(engine, [([5], sampling(0))])[0].weight_version == 4


async def test_updates_and_sleep_are_refused_while_requests_are_running(folder: Path, engine: LocalEngine) -> None:
    good = load_file(folder / "model.safetensors")
    running = asyncio.ensure_future(engine.generate([5, 6], sampling(0, new=30, stop=())))
    await asyncio.sleep(0)
    for call in (lambda: engine.update_weights(good.items(), 1), engine.sleep):
        with pytest.raises(EngineError, match="while requests are running"):
            call()
    assert len((await running).ids) == 30
    engine.update_weights(good.items(), 1)


def test_sleep_wake_and_close(folder: Path, engine: LocalEngine) -> None:
    request = (prompts(1)[0], sampling(0))
    before = run(engine, [request])
    engine.sleep()
    for _ in range(2):
        with pytest.raises(EngineError, match=r"sleeps: call wake\(\)"):
            run(engine, [request])
        engine.update_weights(load_file(folder / "model.safetensors").items(), 1)
    engine.wake()
    assert np.array_equal(run(engine, [request])[0].ids, before[0].ids)
    engine.close()
    for call in (lambda: run(engine, [request]), lambda: engine.update_weights([], 2)):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_a_request_that_takes_too_long_is_an_error(folder: Path) -> None:
    engine = make_engine(folder, request_timeout_s=0.0)
    with pytest.raises(EngineError, match=r"1 requests of a batch of 1 had no answer after 0\.0 s"):
        run(engine, [([5], sampling(0, new=50, stop=()))])


def test_weights_that_are_not_finite_are_an_error(folder: Path, engine: LocalEngine) -> None:
    good = load_file(folder / "model.safetensors")
    engine.update_weights(((n, t * float("nan") if "norm" in n else t) for n, t in good.items()), 1)
    with pytest.raises(EngineError, match="not finite"):
        run(engine, [([5], sampling(0))])
    engine.update_weights(good.items(), 2)
    assert run(engine, [([5], sampling(0))])[0].weight_version == 2


async def test_a_cancelled_request_does_not_affect_the_others(engine: LocalEngine) -> None:
    expected = await engine.generate([5, 6], sampling(0))
    kept = asyncio.ensure_future(engine.generate([5, 6], sampling(0)))
    lost = asyncio.ensure_future(engine.generate([5, 7], sampling(1)))
    await asyncio.sleep(0)
    lost.cancel()
    assert np.array_equal((await kept).ids, expected.ids)


def test_folders_without_a_complete_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/config\.json: the file is missing"):
        make_engine(tmp_path / "nowhere")
    damaged = make_model(tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"tensor model\.norm\.weight is missing"):
        make_engine(damaged)
