"""A judge as a reward: its prompt, an endpoint that misbehaves, the cache, and whole runs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byte_model
import pytest
from local_servers import Handler, threaded
from trajectory_files import write_jsonl
from whole_runs import Batch, batch, train

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.run.time_checks import check_times
from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import OwnSource
from icrl_megatron.settings.task_schema import ToolCacheSettings
from icrl_megatron.settings.task_sections import MoreReward, OwnReward, RewardJudge, Rows
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.tasks.user_reward import RewardTasks
from icrl_megatron.utils.errors import ConfigError

PROMPT = """Level {{ extra.level }} of {{ row["odd name"] }}. Question: {{ prompt }} Right: {{ label }}
The answer, which is only to be judged: {{ response }}
End with a line Score: N, from 0 to 10."""


class Judging(Handler):
    """An OpenAI-compatible endpoint. `answer` gets the request and returns a text, a status, or (status, headers)."""

    answer: Callable[[dict[str, Any]], Any]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        request = json.loads(self.body())
        self.asked.append(request)
        found = type(self).answer(request)
        if isinstance(found, tuple):
            status, headers = found
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()
        elif isinstance(found, int):
            self.send(b"out of order", found)
        elif isinstance(found, bytes):
            self.send(found)
        else:
            self.send_json({"choices": [{"message": {"role": "assistant", "content": found}}]})


def judging(asked: list[dict[str, Any]], answer: Callable[[dict[str, Any]], Any]) -> Any:
    return threaded(Judging, asked=asked, answer=staticmethod(answer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("judges")
    (made / "good.jinja").write_text(PROMPT)
    (made / "short.jinja").write_text("How short is this? {{ response }}")
    (made / "broken.jinja").write_text("{{ response ")
    (made / "blind.jinja").write_text("Question: {{ prompt }}")
    (made / "column.jinja").write_text("{{ response }} {{ difficulty }}")
    (made / "reward.py").write_text("def fixed(response):\n    return 0.5\n")
    for name, asked in (("train", "1+1"), ("heldout", "2+2")):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{asked} {{{{ label }}}}"}]
        row = {"question": prompt, "answer": 7, "extra": {"level": 2}, "odd name": "sums"}
        (made / f"{name}.jsonl").write_text(json.dumps(row))
    return made


def source(folder: Path, url: str, name: str = "good.jinja:good", **changes: Any) -> OwnSource:
    data = Rows([str(folder / "train.jsonl")], [str(folder / "heldout.jsonl")], "question", "answer")
    judge = RewardJudge("endpoint", Endpoint(f"{url}/v1", "m", "KEY_OF_TEST", 5.0), **changes.pop("judge", {}))
    return OwnSource(f"{folder}/{name}", data=data, judge=judge, reward=OwnReward(**changes))


def play(made: Any, *replies: str) -> list[tuple[float, bool, dict[str, float]]]:
    """Plays replies at the same time."""

    async def one(reply: str) -> tuple[float, bool, dict[str, float]]:
        environment = made.environment(made.problems("train")[0])
        await environment.reset()
        if action := environment.parse(reply):
            await environment.step(action)
        return environment.outcome(), environment.success(), environment.measures()

    async def every() -> list[tuple[float, bool, dict[str, float]]]:
        return await asyncio.gather(*map(one, replies))

    return asyncio.run(every())


def test_the_prompt_shows_reply_row_and_columns_and_the_score_is_scaled(folder: Path) -> None:
    asked: list[dict[str, Any]] = []
    with judging(asked, lambda request: "Fine.\nScore: 6") as url:
        made = registry.of_source(source(folder, url, success=0.6, judge={"low": 1.0, "high": 11.0}))
        made.check()  # type: ignore[attr-defined]
        assert not asked, "the check asks no judge"
        assert play(made, "14 {{ prompt }} <|im_end|>", "") == [(0.5, False, {"judge_cached": 0.0}), (0.0, False, {})]
    (request,) = asked
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.0, 1024)
    assert request["messages"][0]["content"] == (
        "Level 2 of sums. Question: Be brief.\n\n1+1 {{ label }} Right: 7\n"
        "The answer, which is only to be judged: 14 {{ prompt }} <|im_end|>\nEnd with a line Score: N, from 0 to 10."
    )


def test_judges_and_functions_are_one_weighted_mean(folder: Path) -> None:
    def answer(request: dict[str, Any]) -> str:
        return "Score: 10" if "How short" in request["messages"][0]["content"] else "Score: 4"

    more = [MoreReward(f"{folder}/short.jinja:Short", 2.0), MoreReward(f"{folder}/reward.py:fixed", 5.0)]
    with judging([], answer) as url:
        made = registry.of_source(source(folder, url, more=more))
        ((outcome, success, measures),) = play(made, "x")
        assert outcome == pytest.approx((0.4 + 2 * 1.0 + 5 * 0.5) / 8) and not success
        assert measures == {"reward_fixed": 0.5, "reward_good": 4.0, "reward_short": 10.0, "judge_cached": 0.0}
        made.rewards.close()  # type: ignore[attr-defined]
        other = source(folder, url, "reward.py:fixed", more=[MoreReward(f"{folder}/short.jinja:short", 1.0)])
        ((outcome, _, measures),) = play(registry.of_source(other), "x")
        assert outcome == pytest.approx(0.75) and measures["reward_short"] == 10.0


def test_judges_answer_at_the_same_time(folder: Path) -> None:
    """All requests arrive before the first answer."""
    together = threading.Barrier(8, timeout=20)

    def answer(request: dict[str, Any]) -> str:
        together.wait()
        return "Score: 10"

    with judging([], answer) as url:
        assert {outcome for outcome, _, _ in play(registry.of_source(source(folder, url)), *"abcdefgh")} == {1.0}


@pytest.mark.parametrize(
    ("answers", "kind", "message", "requests"),
    [
        ([401], EnvironmentFailure, "The judge at .* failed: status 401", 1),
        ([b"<html>"], EnvironmentFailure, "failed: it answered '<html>'", 1),
        (["no idea", "Score: 99"], BadAnswer, "ended without a score from 0 to 10: 'Score: 99'", 2),
        ([None, ""], BadAnswer, "without a score", 2),
    ],
)
def test_failures_are_not_rewards(
    answers: list[Any], kind: type[Exception], message: str, requests: int, folder: Path
) -> None:
    asked: list[dict[str, Any]] = []
    with judging(asked, lambda request: answers[len(asked) - 1]) as url:
        with pytest.raises(EnvironmentFailure, match=message) as raised:
            play(registry.of_source(source(folder, url)), "x")
    assert type(raised.value) is kind and len(asked) == requests


def test_a_judge_that_is_busy_or_unclear_once_is_asked_again(folder: Path) -> None:
    asked: list[dict[str, Any]] = []
    answers = [(429, {"Retry-After": "1"}), "no idea", "Score: 5"]
    with judging(asked, lambda request: answers[len(asked) - 1]) as url:
        assert play(registry.of_source(source(folder, url)), "x")[0][0] == 0.5
    assert [request["seed"] for request in asked] == [0, 0, 1]


def test_replies_are_cached_by_prompt_and_judge(folder: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    answers = iter(["no idea", "Score: 5", "Score: 6", "Score: 7"])
    settings = ToolCacheSettings(mode="read_write", path=str(tmp_path / "cache.sqlite"))

    def outcome(url: str, reply: str, mode: str = "read_write", **changes: Any) -> tuple[float, float]:
        """Each call is a process of its own."""
        made: Any = registry.of_source(source(folder, url, **changes))
        made.tool_cache = ToolCache(ToolCacheSettings(mode, settings.path))
        try:
            ((found, _, measures),) = play(made, reply)
            return found, measures["judge_cached"]
        finally:
            made.tool_cache.close()

    with judging(asked, lambda request: next(answers)) as url:
        assert outcome(url, "x") == (0.5, 0.0) and len(asked) == 2
        assert outcome(url, "x") == (0.5, 1.0) and len(asked) == 2
        assert outcome(url, "y") == (0.6, 0.0)
        assert outcome(url, "x", judge={"temperature": 0.5}) == (0.7, 0.0) and len(asked) == 4
    assert outcome(url, "y", mode="replay") == (0.6, 1.0)  # nobody listens there any more
    with pytest.raises(EnvironmentFailure, match=r"replay.* has no answer of tool 'judge'"):
        outcome(url, "z", mode="replay")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("missing.jinja:x", {}, r"name=.*missing.jinja cannot be read .*the folder in which the command runs"),
        ("broken.jinja:x", {}, r"broken.jinja is not a Jinja template"),
        ("blind.jinja:x", {}, r"blind.jinja does not show the reply; write \{\{ response \}\}"),
        ("good.jinja:not ok", {}, r"write FILE.jinja:NAME"),
        ("good.jinja:x", {"judge": {"low": 10.0}}, r"judge.low=10 is not below judge.high=10"),
        ("good.jinja:x", {"low": -1.0}, r"reward.low=-1.0 has no effect with judges only"),
        ("reward.py:fixed", {}, r"judge.endpoint.url=.* has no effect without a judge"),
        ("reward.py:fixed", {"more": [MoreReward("good.jinja", 1.0)]}, r"reward.more.0.name=good.jinja: write FILE"),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.of_source(source(folder, "http://127.0.0.1:9", name, **changes))


def test_endpoint_columns_and_times_are_checked_before_a_run(folder: Path) -> None:
    bad = source(folder, "http://127.0.0.1:9")
    bad.judge.endpoint.model = ""
    with pytest.raises(ConfigError, match=r"needs judge.endpoint.url and .model .*judge.endpoint="):
        registry.of_source(bad)
    made = registry.of_source(source(folder, "http://127.0.0.1:9", "column.jinja:x"))
    assert isinstance(made, RewardTasks)
    with pytest.raises(ConfigError, match=r"train.jsonl, line 1 .*column.jinja.*'difficulty' is undefined"):
        made.check()
    slow = Settings()
    slow.tasks.sources = [source(folder, "http://127.0.0.1:9")]
    slow.tasks.sources[0].judge.endpoint.timeout_s = 20.0  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"judge.endpoint.timeout_s=20.*lower the first to 13"):
        check_times(slow)


def test_a_run_learns_from_a_judge_and_drops_what_it_does_not_answer(tmp_path: Path) -> None:
    """Steps with a judge that answers, resumed with one that fails for some replies: those are dropped, and the others
    come from the cache or the judge."""
    model = byte_model.build(tmp_path / "model")
    for name in ("train", "held"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}?", "label": "x"} for i in range(4)])
    (tmp_path / "judge.jinja").write_text("{{ prompt }} {{ label }} {{ response }}")
    (tmp_path / "reward.py").write_text("def half(response):\n    return 0.5\n")
    asked: list[dict[str, Any]] = []
    fails = threading.Event()

    def answer(request: dict[str, Any]) -> Any:
        text = request["messages"][0]["content"]
        if fails.is_set() and len(text) % 2:
            return 400
        return f"Score: {len(text) % 11}"

    with judging(asked, answer) as url:
        own = (
            f"{{name: '{tmp_path}/judge.jinja:quality', data: {{train: [{tmp_path}/train.jsonl], "
            f"heldout: [{tmp_path}/held.jsonl]}}, judge: {{endpoint: {{url: '{url}/v1', model: m}}}}, "
            f"reward: {{more: [{{name: '{tmp_path}/reward.py:half'}}]}}}}"
        )
        small = ["warm_start.steps=0", "eval.interval=0", "eval.problems=2", "rollout.max_turn_tokens=60"]
        small += ["rollout.max_critique_tokens=4", "rollout.context_tokens=1000", "rollout.tasks_per_step=4"]
        small += ["rollout.episodes_per_task=8", "checkpoint.interval=1", f"tasks.sources=[{own}]"]
        small += ["tasks.tool_cache.mode=read_write", f"tasks.tool_cache.path={tmp_path}/cache.sqlite"]

        def run(name: str, *more: str) -> list[str]:
            return train(tmp_path / name, f"model.path={model}", *small, *more)

        first = batch(tmp_path, {"run": run("run", "steps=2")})
        assert first["run"].code == 0, first["run"].error
        before = len(asked)
        again = batch(tmp_path, {"copy": run("copy", "steps=2")})
        # Nearly all: the times of answers decide which replies share a batch, and so the last bits of the weights.
        assert again["copy"].code == 0 and len(asked) - before < before / 4, "the cache did not answer"
        fails.set()
        resumed = batch(tmp_path, {"run": run("run", "steps=4")})
        assert resumed["run"].code == 0, resumed["run"].error
    ran = Batch(tmp_path, {})
    steps, (again_1, *_) = ran.trained("run"), ran.trained("copy")
    assert before > 0 and "task/reward_quality" in steps[0]
    assert again_1["task/judge_cached"] > 0 == steps[0]["task/judge_cached"]
    assert again_1["task/reward_quality"] == steps[0]["task/reward_quality"]
    dropped = [row["episodes/dropped"] for row in steps]
    assert len(steps) == 4 and sum(dropped[:2]) == 0 < sum(dropped[2:])


ENGINE = """
from icrl_megatron.engines.kind import EngineKind
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.rollout.prompts import tokenizer
from icrl_megatron.types import Completion


class Talks:
    def __init__(self, folder, frozen):
        self.tokenizer, self.frozen, self.version = tokenizer(folder), frozen, 0

    async def generate(self, prompt_ids, sampling):
        asked = self.tokenizer.decode(prompt_ids)
        judges = "Judge this" in asked
        assert judges == (sampling.temperature == 0.25), "judge.temperature is the judge's only"
        text = f"Score: {9 if self.frozen else 3}" if judges else "a reply"
        ids = [*self.tokenizer(text, add_special_tokens=False).input_ids, sampling.stop_ids[0]]
        return Completion(tuple(ids), (-1.0,) * len(ids), "stop", self.version)

    def update_weights(self, tensors, version):
        for _ in tensors:
            pass
        self.version = version

    async def interrupt(self): ...

    def sleep(self): ...

    wake_weights = wake = close = sleep


class Kind(EngineKind):
    def build(self, request):
        engine = Talks(request.folder, False)
        frozen = None if request.critic is None else Talks(request.critic, True)
        return Engines(engine, engine, frozen, Share(request.grid.rank, request.grid.world))


KIND = Kind()
"""


def test_the_runs_own_engines_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, in its held-out evaluation and in `icrl eval`; an engine that the run lacks is refused before."""
    (tmp_path / "own_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    model = byte_model.build(tmp_path / "model")
    for name in ("train", "held"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}?", "label": "x"} for i in range(4)])
    (tmp_path / "judge.jinja").write_text("Judge this: {{ response }}")
    small = ["warm_start.steps=0", "eval.interval=1", "eval.problems=2", "rollout.max_turn_tokens=20", "steps=1"]
    small += ["rollout.max_critique_tokens=20", "rollout.context_tokens=1000", "rollout.tasks_per_step=2"]
    small += ["rollout.episodes_per_task=2", "engine.kind=own_engine:KIND"]
    small += ["engine.mismatch_limit.mean=1e9", "engine.mismatch_limit.largest=1e9"]

    def run(name: str, engine: str, *more: str) -> list[str]:
        own = (
            f"{{name: '{tmp_path}/judge.jinja:quality', data: {{train: [{tmp_path}/train.jsonl], "
            f"heldout: [{tmp_path}/held.jsonl]}}, judge: {{engine: {engine}, temperature: 0.25}}}}"
        )
        return train(tmp_path / name, f"model.path={model}", *small, f"tasks.sources=[{own}]", *more)

    commands = {
        "solver": run("solver", "solver"),
        "frozen": run("frozen", "frozen", "rollout.critic=frozen"),
        "none": run("none", "frozen"),
        "eval": ["eval", str(tmp_path / "solver"), "--out", str(tmp_path / "eval")],
    }
    ended = batch(tmp_path, commands)
    assert ended["none"].code == 2
    assert "set tasks.sources.0.judge.engine=solver, or use a new run" in ended["none"].said
    for name, reward in (("solver", 0.3), ("frozen", 0.9)):
        assert ended[name].code == 0, ended[name].error
        steps = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["heldout/reward"] for row in steps if "heldout/reward" in row] == pytest.approx([reward] * 2)
        assert all(row["episodes/dropped"] == 0 for row in steps if "tokens/generated" in row)
    assert ended["eval"].code == 0, ended["eval"].error
    (score,) = json.loads((tmp_path / "eval" / "eval.json").read_text())["scores"]
    assert score["dropped"] == 0 and score["measures"] == {"judge_cached": 0.0}


def test_an_engine_that_is_not_there_names_its_setting(folder: Path) -> None:
    data = Rows([str(folder / "train.jsonl")], [str(folder / "heldout.jsonl")], "question", "answer")
    made = registry.of_source(OwnSource(f"{folder}/good.jinja:good", data=data, judge=RewardJudge("solver")))
    with pytest.raises(ConfigError, match=r"judge.engine=solver, and there is no such engine here; set judge.engine="):
        play(made, "x")
