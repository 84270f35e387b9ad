"""The external critic with a small OpenAI-compatible endpoint over real HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from local_servers import Replies, said, serving
from transformers import AutoTokenizer

from icrl_megatron.engines.protocol import RequestFailedError
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.external import ExternalSpeaker
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask
from icrl_megatron.run.checks import validate
from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.rollout_schema import RolloutSettings
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.types import Completion
from icrl_megatron.utils import addresses
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.Response]]


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, TinyModel(), ["try", "red", "again"], 0)
    return Prompter(AutoTokenizer.from_pretrained(folder), RolloutSettings(templates="compact"))


def ask(prompter: Prompter, handler: Handler, limit: int = 8) -> Completion:
    """One request to an endpoint that answers with `handler`."""
    (completion,) = ask_often(prompter, handler, 1, limit)
    return completion


def ask_often(
    prompter: Prompter, handler: Handler, count: int, limit: int = 8, interrupted_after_s: float | None = None
) -> list[Completion]:
    """Several requests at the same time, of which two are sent at once."""

    async def talk() -> list[Completion]:
        async with serving(web.post("/v1/chat/completions", handler)) as url:
            settings = Endpoint(url=f"{url}/v1/", model="m", api_key_env="KEY_OF_TEST")
            speaker = ExternalSpeaker(settings, 0.5, prompter, Connections(2))
            question = Ask("critique", (1, 2), limit, 7, "", None, "what happened")
            asked = [asyncio.ensure_future(speaker.reply(question)) for _ in range(count)]
            if interrupted_after_s is not None:
                await asyncio.sleep(interrupted_after_s)
                await speaker.interrupt()
            return list(await asyncio.gather(*asked))

    return asyncio.run(talk())


def test_the_request_is_text_and_the_reply_becomes_ids(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "secret")
    seen = {}

    async def answer(request: web.Request) -> web.Response:
        seen.update(json.loads(await request.text()), key=request.headers["Authorization"])
        return said("try red")

    completion = ask(prompter, answer)
    assert prompter.decode(completion.ids) == "try red"
    assert completion.finish_reason == "stop"
    assert completion.logprobs.tolist() == [0.0] * len(completion.ids)
    assert seen["messages"] == [{"role": "user", "content": "what happened"}]
    assert (seen["model"], seen["max_tokens"], seen["temperature"], seen["key"]) == ("m", 8, 0.5, "Bearer secret")


def test_a_long_reply_is_cut_at_the_token_limit(prompter: Prompter) -> None:
    completion = ask(prompter, Replies("try red again again again").answer, limit=3)
    assert (len(completion.ids), completion.finish_reason) == (3, "length")


def test_a_request_is_repeated_after_429_but_not_after_401(prompter: Prompter) -> None:
    busy_once = Replies(lambda: web.Response(status=429), "red")
    assert prompter.decode(ask(prompter, busy_once.answer).ids) == "red"
    refuses = Replies(lambda: web.Response(status=401, text="no key"))
    with pytest.raises(RequestFailedError, match=r"status 401.*no key"):
        ask(prompter, refuses.answer)
    assert len(refuses.seen) == 1


def test_a_malformed_reply_is_a_failed_request(prompter: Prompter) -> None:
    with pytest.raises(RequestFailedError, match="answered"):
        ask(prompter, Replies({"choices": []}).answer)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "try "}, {"type": "text", "text": "red"}], "try red"),
        ("red \ud800 again", "red ? again"),
        ([], ""),
        (None, ""),
        ([{"type": "image_url", "image_url": {"url": "x"}}], None),
        ([{"type": "text", "text": 3}], None),
        (["red"], None),
        ({"text": "red"}, None),
        (7, None),
    ],
)
def test_a_reply_must_be_text_or_parts_of_text(prompter: Prompter, content: object, text: str | None) -> None:
    replies = Replies(lambda: said(content))
    if text is None:
        with pytest.raises(RequestFailedError, match="answered"):
            ask(prompter, replies.answer)
    else:
        assert tuple(ask(prompter, replies.answer).ids) == prompter.encode_reply(text)


def test_an_interruption_ends_sent_and_waiting_requests(prompter: Prompter) -> None:
    seen = []

    async def slow(request: web.Request) -> web.Response:
        seen.append(1)
        await asyncio.sleep(20)
        return said("red")

    begun = time.monotonic()
    assert ask_often(prompter, slow, 5, interrupted_after_s=0.3) == [Completion((), (), "abort", 0)] * 5
    assert time.monotonic() - begun < 10
    assert len(seen) == 2


def test_an_external_critic_without_an_address_or_with_a_password_is_refused() -> None:
    at = ("rollout.critic=external", "rollout.external.model=m")
    for overrides in (at[:1], (*at, "rollout.external.url=http://me:pw@h/v1")):
        with pytest.raises(ConfigError, match=r"rollout\.external\.url(?!.*pw)"):
            validate(load("rulebook_easy", overrides))


@pytest.mark.parametrize("password", ["hunter2", "pa/ss", "p#w?x", "a@b", "a://b"])
def test_addresses_are_shown_without_passwords(password: str) -> None:
    assert addresses.shown(f"http://user:{password}@host:1/v1?key=secret") == "http://host:1/v1"
    with pytest.raises(ConfigError) as refused:
        addresses.check_base(f"http://user:{password}@host:1/v1", "critic.url")
    assert password not in str(refused.value) and "host:1/v1" in str(refused.value)
