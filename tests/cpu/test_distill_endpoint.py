"""`icrl distill` with a system behind an endpoint that fails, refuses, or answers in another format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from local_servers import Handler, threaded

pytest.importorskip("bm25s")

from icrl_megatron.distill import command
from icrl_megatron.evaluation.system import measure
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import HopelessError


def settings(url: str, *overrides: str) -> Settings:
    endpoint = ("distill.system=endpoint", "distill.endpoint.model=m", f"distill.endpoint.url={url}/v1")
    return load("archive", ["tasks.limit=20", "distill.attempts=2", *endpoint, *overrides])


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads(out.with_suffix(".report.json").read_text()))


def reply(prompt: str, brief: str) -> str:
    """A model that is always sure that the answer is 7."""
    if "You plan" in prompt:
        return "<plan>worker: look</plan>"
    if "You do one job" in prompt:
        call = '<tool_call>{"name": "search", "arguments": {"query": "p 0 0 1"}}</tool_call>'
        return "found" if "observation]" in brief else call
    if "You answer" in prompt:
        return "<answer>7</answer>"
    return "enough" if "You judge" in prompt else "<double_check>4</double_check>"


class Model(Handler):
    broken: list[bool]

    def do_POST(self) -> None:
        prompt, brief = (message["content"] for message in json.loads(self.body())["messages"][:2])
        text = reply(prompt, brief)
        if self.broken and "p 4 5 9" in brief:  # the first problem
            return self.send(b"no", 400)
        if self.broken and "You answer" in prompt and "p 4 2 7" in brief:
            text = "I would say 7"
        usage = {"prompt_tokens": 5, "completion_tokens": 2}
        return self.send_json({"choices": [{"message": {"content": text}}], "usage": usage})


class Refusing(Handler):
    status = 403
    content = b"go away"

    def do_POST(self) -> None:
        self.body()
        self.send(self.content, self.status)


def test_attempts_that_fail_are_counted_never_written_and_tried_again(tmp_path: Path) -> None:
    out, broken = tmp_path / "a.jsonl", [True]
    with threaded(Model, broken=broken) as url:
        words = (url, "tasks.limit=4", "distill.attempts=1", "distill.agents=[{name: verifier, written_price: 0}]")
        kept = "distill.filters.leave_out=[correctness,duplicates,reflection]"
        given = settings(*words, kept)
        command.run(given, out)
        counts = report(out)
        failed = counts["failed"]
        assert counts["finished"] == 4 - sum(failed.values()) and set(failed) == {"endpoint", "unreadable"}
        assert counts["written"] == counts["finished"] < 4
        assert all("archive/train/" in line for line in counts["failures"]) and counts["cost"] == {}
        broken.clear()
        priced = settings(*words, kept, "distill.endpoint.read_price=1", "distill.endpoint.written_price=10")
        assert "cost of the finished attempts: " in command.run(priced, out)
    counts = report(out)
    assert (counts["finished"], counts["failed"], counts["written"], counts["right"]) == (4, {}, 4, 0)
    assert counts["tokens"]["planner"] == {"read": 20, "written": 8}
    assert counts["cost"]["planner"] == pytest.approx((20 * 1 + 8 * 10) / 1e6)
    assert counts["cost"]["verifier"] == pytest.approx(counts["tokens"]["verifier"]["read"] / 1e6)


def test_a_measured_system_that_writes_no_answer_is_wrong_and_is_not_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"

    class Vague(Model):
        def do_POST(self) -> None:
            prompt, brief = (message["content"] for message in json.loads(self.body())["messages"][:2])
            asked.append(prompt)
            text = "I would say 7" if "You answer" in prompt else reply(prompt, brief)
            self.send_json({"choices": [{"message": {"content": text}}]})

    asked: list[str] = []
    with threaded(Vague, broken=[]) as url:
        given = settings(url, "eval.problems=2", "distill.attempts=1")
        said = measure(given, out)
        requests = len(asked)
        assert measure(given, out) == said and len(asked) == requests > 0
        assert said.startswith("0.0 % right, ") and "0 attempts failed" in said
        saved = json.loads(out.with_suffix(".eval.json").read_text())
        assert list(saved["successes"].values()) == [[[False]], [[False]]]
        measures = saved["scores"][0]["measures"]
        assert measures["answered"] == 0.0 and measures["calls_search"] == 1.0 and measures["seconds_worker"] > 0


def test_an_endpoint_that_is_gone_stops_the_command(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with threaded(Refusing) as url:
        with pytest.raises(HopelessError, match=r"6 attempts in a row failed.*go away"):
            command.run(settings(url, "distill.concurrency=2"), out)
    # The other attempt at that time may end before it is canceled.
    assert report(out)["failed"] in ({"endpoint": 6}, {"endpoint": 7}) and not out.exists()


@pytest.mark.parametrize("status", [401, 200])
def test_an_endpoint_that_refuses_or_answers_other_json_ends_the_command_at_once(status: int, tmp_path: Path) -> None:
    with threaded(Refusing, status=status, content=b"[]") as url:
        endpoint = ("distill.system=endpoint", f"distill.endpoint={{url: '{url}/v1', model: m}}")
        arguments = ["distill", "archive", "--out", str(tmp_path / "a.jsonl"), *endpoint]
        main = "from icrl_megatron.cli import main; main()"
        command = [sys.executable, "-c", main, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "48 attempts in a row failed" in done.stderr
