"""Limits of tools, servers and judges against `rollout.environment_timeout_s`: what is refused, and that the remedy
works."""

from __future__ import annotations

import asyncio
import re

import pytest

from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Arguments, ToolCall, ToolFailure, ToolSpec
from icrl_megatron.run.checks import validate_settings
from icrl_megatron.run.time_checks import call_times, check_times
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import SOURCES, source_of
from icrl_megatron.utils.errors import ConfigError

MCP = "tools: [mcp], mcp: [{command: [a]}, {url: 'http://h/mcp', start_s: 5, timeout_s: 28}]"
JUDGE = "judge: model, endpoint: {url: 'http://h/v1', model: m, timeout_s: 13.5}"


def settings(entry: str, *more: str) -> Settings:
    return load("quickstart", [f"tasks.sources=[{entry}]", *more])


@pytest.mark.parametrize(
    ("entry", "setting", "value", "longest"),
    [
        ("{name: alfworld, data: {servers: ['http://h'], request_timeout_s: 15}}", "data.request_timeout_s", 15, 61.75),
        ("{name: alfworld, data: {train: [games], request_timeout_s: 60}}", "data.request_timeout_s", 60, 60),
        (
            "{name: math, agent: {tools: [search, page]}, data: {servers: ['http://h'], request_timeout_s: 20}}",
            *("data.request_timeout_s", 20, 81.75),
        ),
        (
            "{name: searchqa, data: {servers: ['http://h'], request_timeout_s: 60}}",
            *("data.request_timeout_s", 60, 241.75),
        ),
        ("{name: math, agent: {tools: [page], page: {timeout_s: 30}}}", "agent.page.timeout_s", 30, 60.25),
        ("{name: math, agent: {tools: [python]}, data: {grading_timeout_s: 20}}", "data.grading_timeout_s", 20, 65),
        ("{name: code, data: {grading_timeout_s: 20}}", "data.grading_timeout_s", 20, 65),
        (f"{{name: math, agent: {{{MCP}}}}}", "agent.mcp.1.timeout_s", 28, 61.25),
        (f"{{name: searchqa, data: {{corpus: c}}, agent: {{{JUDGE}}}}}", "agent.endpoint.timeout_s", 13.5, 61),
    ],
)
def test_a_call_that_outlasts_the_step_is_refused(entry: str, setting: str, value: float, longest: float) -> None:
    with pytest.raises(ConfigError) as refused:
        validate_settings(settings(entry))
    said = str(refused.value)
    assert said.startswith(f"tasks.sources.0.{setting}={value:g}: ")
    assert f"can take {longest:g} s, but" in said and "rollout.environment_timeout_s=60" in said
    lower, higher = re.search(r"lower the first to (\S+) or less, or raise \S+ to (\d+) or more", said).groups()  # type: ignore[union-attr]
    check_times(settings(entry, f"tasks.sources.0.{setting}={lower}"))
    check_times(settings(entry, f"rollout.environment_timeout_s={higher}"))
    with pytest.raises(ConfigError):
        check_times(settings(entry, f"rollout.environment_timeout_s={int(higher) - 1}"))


def test_where_no_value_would_do_only_the_step_is_named() -> None:
    entry = "{name: math, agent: {tools: [mcp], mcp: [{command: [a], start_s: 70}]}}"
    with pytest.raises(ConfigError, match=r"costs the episode: raise rollout\.environment_timeout_s to 99 or more"):
        check_times(settings(entry))


@pytest.mark.parametrize("name", SOURCES)
def test_the_defaults_fit(name: str) -> None:
    check_times(settings(f"{{name: {name}}}"))
    if name in ("math", "searchqa", "code"):
        tools = "tools: [search, page, python, calculator, mcp], mcp: [{command: [a]}]"
        judge = ", judge: model, endpoint: {url: 'http://h/v1', model: m}" if name == "searchqa" else ""
        every = settings(f"{{name: {name}, data: {{servers: ['http://h']}}, agent: {{{tools}{judge}}}}}")
        check_times(every)
        assert len(list(call_times(every.tasks.sources[0]))) == 4 + bool(judge)


def test_pages_on_the_disk_and_a_local_index_have_no_limit() -> None:
    source = source_of("math")
    assert not list(call_times(source))
    entry = "{name: math, data: {corpus: c}, agent: {tools: [search, page, calculator], page: {path: p}}}"
    assert not list(call_times(settings(entry).tasks.sources[0]))


class _Fails:
    spec = ToolSpec.of_text("search", "", "query")

    def __init__(self) -> None:
        self.calls = 0

    async def call(self, arguments: Arguments) -> str:
        self.calls += 1
        raise ToolFailure("gone")


def test_a_tool_has_its_own_number_of_tries() -> None:
    """A search server is asked four times by its own client: the toolbox does not repeat that."""
    for limits, calls in ((ToolLimits(pause_s=0.001), 2), (ToolLimits(tries_of={"search": 1}), 1)):
        tool = _Fails()
        with pytest.raises(ToolFailure):
            asyncio.run(Toolbox([tool], limits).session().call(ToolCall("search", {"query": "a"})))
        assert tool.calls == calls
