"""Requests that go on under other weights, on the real local engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_engines import make_engine, make_model, prompts, sampling, teacher_forced
from safetensors.torch import load_file

from icrl_megatron.engines.continuing import ContinuingEngine, continued, rest_seed
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.types import Completion, IdArray


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of the same shape with other weights: version 0 and later ones."""
    return [make_model(tmp_path_factory.mktemp(f"model{seed}"), tied=False, seed=seed) for seed in range(3)]


def everything(ids: IdArray, stop: Sequence[str]) -> IdArray:
    return ids


def played(engine: LocalEngine, folders: list[Path], passes: int, count: int) -> list[Completion]:
    """Completions of `count` requests; after every `passes` passes of the event loop come new weights."""

    async def run() -> list[Completion]:
        continuing = ContinuingEngine(engine, everything)
        asked = [
            asyncio.ensure_future(continuing.generate(prompt, sampling(seed, new=20, stop=())))
            for seed, prompt in enumerate(prompts(count))
        ]
        for version, folder in enumerate(folders[1:], 1):
            for _ in range(passes):
                await asyncio.sleep(0)
            await continuing.pause()
            engine.update_weights(load_file(folder / "model.safetensors").items(), version)
            continuing.resume()
        return await asyncio.gather(*asked)

    return asyncio.run(run())


@pytest.mark.parametrize("passes", [0, 6, 9])
def test_every_token_has_the_log_prob_of_the_weights_whose_version_it_carries(folders: list[Path], passes: int) -> None:
    found = played(make_engine(folders[0]), folders, passes, count=5)
    versions_seen = set()
    for prompt, completion in zip(prompts(5), found, strict=True):
        assert (len(completion.ids), completion.finish_reason) == (20, "length")
        spans = [*completion.older, (completion.weight_version, 20 - sum(n for _, n in completion.older))]
        versions = np.repeat([version for version, _ in spans], [n for _, n in spans])
        versions_seen |= set(versions.tolist())
        assert (np.diff(versions) >= 0).all()
        for version in set(versions.tolist()):
            mine = versions == version
            expected = teacher_forced(folders[version], prompt, completion.ids.tolist(), 1.0).numpy()
            np.testing.assert_allclose(completion.logprobs[mine], expected[mine], atol=2e-5)
            assert (completion.stale(version) == (versions < version)).all()
    assert versions_seen == ({2} if passes == 0 else {0, 1, 2})


async def test_a_request_waits_until_the_engine_has_weights(folders: list[Path]) -> None:
    engine = make_engine(folders[0])
    continuing = ContinuingEngine(engine, everything)
    continuing.hold()
    asked = asyncio.ensure_future(continuing.generate([7, 8], sampling(0)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not asked.done()
    await continuing.pause()
    engine.update_weights(load_file(folders[1] / "model.safetensors").items(), 5)
    continuing.resume()
    assert (await asked).weight_version == 5


async def test_a_request_before_the_others_has_one_version_and_does_not_continue(folders: list[Path]) -> None:
    engine = make_engine(folders[0])
    continuing = ContinuingEngine(engine, everything)
    waits = asyncio.ensure_future(continuing.generate([7, 8], sampling(0, new=20, stop=())))
    ended: list[str] = []
    waits.add_done_callback(lambda _: ended.append("waits"))
    for version, folder in enumerate(folders[1:], 1):
        for _ in range(9):
            await asyncio.sleep(0)
        await continuing.pause()
        engine.update_weights(load_file(folder / "model.safetensors").items(), version)
        begun = asyncio.ensure_future(continuing.before_others([9, 10], sampling(1, new=20, stop=())))
        begun.add_done_callback(lambda _, version=version: ended.append(str(version)))  # type: ignore[misc]
        if version == 1:
            assert (await begun).finish_reason == "length"
            continuing.resume()
            continue
        for _ in range(9):
            await asyncio.sleep(0)
        continuing.resume()
        await continuing.pause()
        assert begun.done(), "the next pause ends it"
        engine.update_weights(load_file(folders[0] / "model.safetensors").items(), 3)
        continuing.resume()
    cut_off = await begun
    assert (cut_off.weight_version, cut_off.older, cut_off.finish_reason) == (2, (), "abort")
    assert 0 < len(cut_off.ids) < 20
    assert len((await waits).ids) == 20 and ended[0] == "1"
    expected = teacher_forced(folders[2], [9, 10], cut_off.ids.tolist(), 1.0).numpy()
    np.testing.assert_allclose(cut_off.logprobs, expected, atol=2e-5)


async def test_the_rest_of_a_reply_draws_other_random_numbers(folders: list[Path]) -> None:
    """With the same ones, a policy that does not depend on the context would repeat the beginning."""
    seeds = {rest_seed(seed, tokens) for seed in range(20) for tokens in range(1, 20)}
    assert len(seeds) == 380 and max(seeds) < 2**63 and rest_seed(3, 4) == rest_seed(3, 4)
    engine = make_engine(folders[0])
    with torch.no_grad():  # every token is as likely as every other one
        for parameter in engine._model.parameters():
            parameter.zero_()
    state = {name: torch.zeros_like(p) for name, p in engine._model.named_parameters()}
    continuing = ContinuingEngine(engine, everything)
    asked = asyncio.ensure_future(continuing.generate([7], sampling(1, new=20, stop=())))
    for _ in range(9):
        await asyncio.sleep(0)
    await continuing.pause()
    engine.update_weights(state.items(), 1)
    continuing.resume()
    found = await asked
    ((_, begun),) = found.older
    length = min(begun, 20 - begun)
    assert length > 2 and found.ids[:length].tolist() != found.ids[begun : begun + length].tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=6))
def test_joining_replies_keeps_every_token_and_its_version(parts: list[tuple[int, int]]) -> None:
    versions = np.repeat(np.cumsum([step for step, _ in parts]), [n for _, n in parts])
    reply: Completion | None = None
    begin = 0
    for version, (_, n) in zip(np.cumsum([step for step, _ in parts]).tolist(), parts, strict=True):
        part = Completion(range(begin, begin + n), [-1.0] * n, "abort", version)  # type: ignore[arg-type]
        reply = part if reply is None else continued(reply, part)
        begin += n
    assert reply is not None and reply.ids.tolist() == list(range(begin)) and len(reply.logprobs) == begin
    for version in range(20):
        assert (reply.stale(version) == (versions < version)).all()
    assert not reply.stale(None).any()
