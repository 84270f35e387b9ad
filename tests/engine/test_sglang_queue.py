"""Requests that wait in SGLang's own queue, because its KV cache is small; and one that is too small."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_cases import CONTEXT, engine_on, engine_settings, generate, load, reference_logprobs, serving, spec, weights

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.types import Completion
from icrl_megatron.utils.errors import ConfigError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = [[8 + i % 20, 9, 10 + i % 7] for i in range(24)]
LONG = [(prompt, Sampling(1.0, 400, seed, ())) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def tight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose cache holds one whole context and no more."""
    with serving(model, tmp_path_factory.mktemp("tight"), engine_settings(kv_tokens=CONTEXT)) as started:
        yield started


def check(completions: list[Completion], model: Path) -> None:
    """Some were aborted in the queue, with nothing; some were not; and no token is of other weights than it says."""
    reference = load(model)
    assert any(c.finish_reason == "abort" and not len(c.ids) for c in completions)
    assert any(len(c.ids) for c in completions)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        if len(completion.ids):
            again = reference_logprobs(reference, prompt, completion.ids, 1.0)
            assert float((again - torch.tensor(completion.logprobs)).abs().max()) < 1e-4


def test_requests_aborted_in_sglangs_queue_do_not_make_a_server_lost(tight: Server, model: Path) -> None:
    engine = engine_on(tight, model, engine_settings(request_timeout_s=1.0))
    engine.update_weights(weights(load(model)), 1)
    completions = generate(engine, LONG)
    check(completions, model)
    assert engine.lost() == ""
    assert engine.stats.aborted >= sum(c.finish_reason == "abort" for c in completions)


def test_an_interruption_reaches_running_queued_and_waiting_requests(tight: Server, model: Path) -> None:
    engine = engine_on(tight, model, engine_settings(max_batch=12))
    engine.update_weights(weights(load(model)), 1)

    async def interrupted() -> tuple[list[Completion], float]:
        asked = [asyncio.ensure_future(engine.generate(*request)) for request in LONG]
        await asyncio.sleep(0.7)
        begun = time.monotonic()
        await engine.interrupt()
        return list(await asyncio.wait_for(asyncio.gather(*asked), 60)), time.monotonic() - begun

    completions, took = asyncio.run(interrupted())
    check(completions, model)
    assert took < 20
    assert engine.take_stats().requests < len(LONG), "those at the gate were not sent"
    assert engine.lost() == ""
    # What was interrupted ended with its event loop.
    assert generate(engine, [(PROMPTS[0], Sampling(0.0, 4, 0, ()))])[0].ids.any()


def test_a_cache_holds_one_context_and_a_smaller_one_is_refused(tight: Server, model: Path, tmp_path: Path) -> None:
    engine = engine_on(tight, model, engine_settings())
    longest = [8 + i % 20 for i in range(CONTEXT - 1)]
    assert len(generate(engine, [(longest, Sampling(0.0, 1, 0, ()))])[0].ids) == 1

    small = Server(spec(model, tmp_path / "sglang.log", engine_settings(kv_tokens=128)))
    small.start()
    with pytest.raises(ConfigError, match=r"holds 136 tokens.*takes 520: raise engine\.kv_tokens or engine\.memory"):
        small.wait_ready()
    assert not small.alive()
