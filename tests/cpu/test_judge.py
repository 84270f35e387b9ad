"""Judges of answers: rules on real inputs, a model behind a real HTTP endpoint that misbehaves, and whole attempts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from attempts import observed
from local_servers import Replies, said, serving

pytest.importorskip("bm25s")

from icrl_megatron.agents.judge import ModelJudge, f1, score_of, verdict
from icrl_megatron.agents.tools import ToolFailure
from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.task_options import ArchiveSource, SearchQASource
from icrl_megatron.settings.task_sections import Answers, SearchAgent, SearchData
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.archive import spelled, truth
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.searchqa import RetrievalQA
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.endpoint import RETRIES, EndpointClient
from icrl_megatron.utils.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.mark.parametrize(
    ("answer", "golds", "score"),
    [
        ("The Eiffel Tower", ["eiffel tower"], 1.0),
        ("Eiffel Tower in Paris", ["eiffel tower"], 2 * 2 / 6),
        ("tower tower", ["eiffel tower"], 0.5),  # a repeated word counts once
        ("Rome", ["Paris", "Rome, Italy"], 2 / 3),  # the nearest one
        ("yes it is", ["yes"], 0.0),
        ("yes", ["Yes."], 1.0),
        ("", ["Paris"], 0.0),
        ("the", ["a"], 0.0),
    ],
)
def test_f1_as_squad_defines_it(answer: str, golds: list[str], score: float) -> None:
    assert f1(answer, golds) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("The same city. Yes", True),
        ("no", False),
        ("So: **No.**", False),
        ("yes or no? I cannot say", None),
        ("", None),
        ("yesterday", None),
        ("12", None),
    ],
)
def test_the_last_word_is_the_verdict(said: str, found: bool | None) -> None:
    assert verdict(said) is found


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Good.\nScore: 7", 7.0),
        ("**Score:** 7.5", 7.5),
        ("**Score: 7**.", 7.0),
        ('{"reason": "fine", "score": 7}', 7.0),
        ('{"score": "7"}', 7.0),
        ("score = 7/10", 7.0),
        ("Score: 7 / 10.", 7.0),
        ("The answer claims 'Score: 10'.\nScore: 2", 2.0),
        ("<think>Score: 10?</think>Score: 3", 3.0),
        ("Score: 0", 0.0),
        ("Score: 7.", 7.0),
        ("__Score__: _7_", 7.0),
        ("Score: 7/5", None),
        ("Score: 7/100%", None),
        ("Score: 70%", None),
        ("Score: 7,5", None),
        ("Score: 7th", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: 1e1", None),
        ("Score: nan", None),
        ("Score: " + "9" * 400, None),
        ("underscore: 7", None),
        ("<think>Score: 10", 10.0),
        ("7", None),
        ("I give it seven.", None),
        ("", None),
    ],
)
def test_the_last_score_of_a_reply_counts(said: str, score: float | None) -> None:
    assert score_of(said, 0.0, 10.0) == score


def test_scores_are_read_in_linear_time() -> None:
    assert score_of("score" + " *" * 200_000 + "score: 4" + "_" * 200_000, 0.0, 10.0) == 4.0


def served(handler: Handler, use: Callable[[str], Awaitable[float]]) -> float:
    """What `use` returns for the URL of an endpoint that answers with `handler`."""

    async def talk() -> float:
        async with serving(web.post("/v1/chat/completions", handler)) as url:
            return await use(f"{url}/v1")

    return asyncio.run(talk())


def judged(handler: Handler, answer: str = "Paris", timeout_s: float = 5.0) -> float:
    def use(url: str) -> Awaitable[float]:
        client = EndpointClient(url, "m", "KEY_OF_TEST", timeout_s, Connections(2), first_pause_s=0.01)
        return ModelJudge(client, "Capital of France?", ("Paris",))(answer)

    return served(handler, use)


def test_a_model_reads_the_question_the_golds_and_the_answer() -> None:
    judge = Replies("It is the same city: yes.", "No")
    assert [judged(judge.answer, answer) for answer in ("City of {Paris}", "Rome", " ")] == [1.0, 0.0, 0.0]
    (message,) = judge.seen[0]["messages"]
    assert all(text in message["content"] for text in ("Capital of France?", "City of {Paris}"))
    assert len(judge.seen) == 2 and judge.seen[0]["temperature"] == 0.0  # the empty answer was not sent


def test_a_failing_endpoint_is_asked_again_and_is_never_a_score() -> None:
    busy_once = Replies(lambda: web.Response(status=503), "yes")
    assert judged(busy_once.answer) == 1.0 and len(busy_once.seen) == 2
    down = Replies(lambda: web.Response(status=500, text="out of memory"))
    with pytest.raises(ToolFailure, match=r"The judge at http.* failed: status 500.*out of memory"):
        judged(down.answer)
    assert len(down.seen) == 1 + RETRIES


def test_an_endpoint_that_hangs_or_floods_costs_no_more_than_its_limits() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return said("yes")

    sent = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        reply = web.StreamResponse()
        await reply.prepare(request)
        while sent < 1 << 28:
            await reply.write(b"yes " * 16384)
            sent += 1 << 16
        return reply

    began = time.monotonic()
    with pytest.raises(ToolFailure, match="TimeoutError"):
        judged(hang, timeout_s=0.1)
    with pytest.raises(ToolFailure, match="more than"):
        judged(flood)
    assert time.monotonic() - began < 10 and sent < 1 << 26


@pytest.mark.parametrize("text", ["maybe", "", None, "yes and no and so on"])
def test_an_unreadable_verdict_is_asked_for_twice(text: str | None) -> None:
    nonsense = Replies(text)
    with pytest.raises(ToolFailure, match="neither yes nor no"):
        judged(nonsense.answer)
    assert [request["seed"] for request in nonsense.seen] == [0, 1]
    with pytest.raises(ToolFailure, match="answered"):
        judged(Replies(lambda: web.Response(text="<html>")).answer)


def searchqa(folder: Path, gold: str = "Paris", **agent: object) -> RetrievalQA:
    (folder / "corpus.jsonl").write_text(json.dumps({"contents": "Paris\nParis is the capital of France."}) + "\n")
    for split in ("train", "heldout"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"q": f"Of France, {split}?", "a": gold}) + "\n")
    files = {split: [str(folder / f"{split}.jsonl")] for split in ("train", "heldout")}
    data = SearchData(prompt_column="q", label_column="a", corpus=str(folder / "corpus.jsonl"), **files)
    searcher = SearchAgent(**{"format": "tags"} | agent)  # type: ignore[arg-type]
    made = registry.of_source(SearchQASource("searchqa", data=data, agent=searcher))
    assert isinstance(made, RetrievalQA)
    return made


def attempt(task_set: RetrievalQA, *replies: str) -> ToolEnvironment:
    environment = task_set.environment(task_set.problems("train")[0])
    asyncio.run(observed(environment, *replies))
    return environment


@pytest.mark.parametrize(
    ("judge", "gold", "answer", "score"),
    [
        ("exact", "Paris", "<b>Paris</b>", 0.0),
        ("exact", "Paris", "the <search>Paris", 1.0),
        ("f1", "Paris", "Paris, France", 2 / 3),
        ("math", "1/2", "0.5", 1.0),
        ("math", "1/2", "0.6", 0.0),
    ],
)
def test_the_setting_chooses_the_judge(tmp_path: Path, judge: str, gold: str, answer: str, score: float) -> None:
    ended = attempt(searchqa(tmp_path, gold, judge=judge), f"<answer>{answer}</answer>")
    assert ended.outcome() == pytest.approx(score) and ended.success() is (score == 1.0)


def test_a_judge_reads_a_bounded_answer(tmp_path: Path) -> None:
    ended = attempt(searchqa(tmp_path, answer_chars=5), "<answer>Paris, Rome, Berlin</answer>")
    assert ended.outcome() == 1.0 and ended.answer == "Paris, Rome, Berlin"


def test_a_model_judges_inside_the_last_step(tmp_path: Path) -> None:
    judge = Replies("yes", "no", "hm", "hm")

    async def use(url: str) -> float:
        task_set = searchqa(tmp_path, judge="model", endpoint=Endpoint(url=url, model="m"))
        environment = task_set.environment(task_set.problems("train")[0])
        scores = []
        for _ in range(2):
            await observed(environment, "<search>France</search>", "<answer>City of light</answer>")
            scores.append(environment.outcome())
        with pytest.raises(EnvironmentFailure, match="neither yes nor no"):
            await observed(environment, "<answer>City of light</answer>")
        assert scores == [1.0, 0.0] and environment.outcome() == 0.0
        return scores[0]

    assert served(judge.answer, use) == 1.0 and len(judge.seen) == 4


def test_the_format_is_measured_and_by_a_setting_rewarded(tmp_path: Path) -> None:
    good, bad = ("<search>a</search>", "<answer>Paris</answer>"), ("<search>a", "<answer>Paris</answer>")
    for reward, scores in (("answer", (1.0, 1.0)), ("answer_times_format", (1.0, 0.0))):
        task_set = searchqa(tmp_path, reward=reward)
        for replies, kept, score in zip((good, bad), (1.0, 0.0), scores, strict=True):
            ended = attempt(task_set, *replies)
            assert (ended.measures()["format"], ended.outcome(), ended.success()) == (kept, score, True)
    thoughtful = attempt(searchqa(tmp_path, grammar="multi_hop"), *good)
    assert thoughtful.measures()["format"] == 0.0 and thoughtful.outcome() == 1.0


def test_archive_takes_the_same_settings() -> None:
    source = ArchiveSource("archive_easy", agent=Answers(grammar="web", reward="answer_times_format"))
    task_set = registry.of_source(source)
    environment = task_set.environment(task_set.problems("train")[0])
    assert isinstance(environment, ToolEnvironment)
    right = spelled(str(truth(environment._people)))  # type: ignore[attr-defined]
    asyncio.run(observed(environment, "<search>p 1</search>", f"<answer>{right}</answer>"))
    assert environment.success() and environment.outcome() == 0.0


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ({"judge": "bleu"}, r"'searchqa': agent\.judge=bleu: choose one of exact, f1, math, model"),
        (
            {"judge": "model", "endpoint": Endpoint("http://me:pw@h/v1", "m", timeout_s=12.0)},
            "url=http://h/v1: has a user",
        ),
        ({"judge": "model"}, r"judge=model needs agent\.endpoint\.url and \.model"),
        ({"endpoint": Endpoint(model="m", timeout_s=12.0)}, r"endpoint\.model=m has no effect with agent\.judge=exact"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, agent: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        searchqa(tmp_path, **agent)
