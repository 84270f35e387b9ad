"""Tool time in plans: calls, seconds per call, and queues."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from icrl_megatron.agents.toolbox import ToolLimits
from icrl_megatron.plan import command, hardware, planner, timing
from icrl_megatron.plan.engine_speed import decode_speed
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.plan.workload import PROFILES, Profile, Workload, profile_of, simulate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings

H100, SHAPE, LAYOUT = hardware.GPUS["h100"], PUBLISHED["Qwen3-8B"], Layout(1)
WEB, CODE = "coa_qwen3_8b_web_8xh100", "coa_qwen3_8b_code_8xh100"
MATH = "qwen3_8b_math_4xh100"


def load(recipe: str, *overrides: str) -> Settings:
    return settings_module.load(recipe, overrides)


def rollout_of(
    calling: tuple[float, float], queued: float = 0.0, waiting: tuple[float, float] = (0, 0)
) -> timing.Rollout:
    """A short and a long episode on one engine."""
    zero, one = np.zeros(2), np.ones(2)
    work = Workload(
        1, np.array([100.0, 1000.0]), zero, 500 * one, np.array(waiting), np.array(calling), queued / 2 * one, one, one
    )
    return timing.play(SHAPE, LAYOUT, work, H100, 40e9)


@pytest.mark.parametrize("calling", [(0, 0), (1, 0), (60, 0), (0, 7), (60, 7), (5, 60)])
@pytest.mark.parametrize("waiting", [(0, 0), (20, 1)])
def test_episode_time_is_decoding_plus_waiting_plus_calls(calling: tuple[int, int], waiting: tuple[int, int]) -> None:
    speed = decode_speed(SHAPE, LAYOUT, H100)
    both, alone = (speed.step(running, running * 500) for running in (1.5, 1.0))
    short = 100 * both
    long = short + 900 * alone
    rollout = rollout_of(calling, waiting=waiting)
    assert rollout.decode == pytest.approx(long)
    assert rollout.waiting == pytest.approx(max(short + waiting[0], long + waiting[1]) - long)
    end = max(short + waiting[0] + calling[0], long + waiting[1] + calling[1])
    assert rollout.decode + rollout.waiting + rollout.calling == pytest.approx(end)


def test_rollout_is_at_least_as_long_as_its_queue_of_calls() -> None:
    decode = rollout_of((0, 0)).decode
    assert rollout_of((1, 1), queued=1000).calling == pytest.approx(1000 - decode)
    assert rollout_of((1, 1), queued=decode / 2).calling == pytest.approx(1)


def test_tool_time_is_calls_times_seconds() -> None:
    # Enough turns, so that nothing is truncated and the mean number of calls is as specified.
    wide = ("rollout.max_turns=100", "tasks.sources.0.plan.calls=6")
    once = simulate(load(WEB, *wide, "tasks.sources.0.plan.call_s=2"))
    assert once.calling_E.mean() == pytest.approx(6 * 2, rel=0.05)
    assert np.allclose(once.calling_E % 2, 0), "whole calls"
    assert np.allclose(simulate(load(WEB, *wide, "tasks.sources.0.plan.call_s=6")).calling_E, 3 * once.calling_E)
    assert np.allclose(once.queued_E, once.calling_E / 64)
    assert once.waiting_E.sum() == 0, "the latency of SearchQA's turns applies only to AgentGym's server"
    programs = simulate(load(CODE, "tasks.sources.0.data.grading_workers=5"))
    assert np.allclose(programs.queued_E, programs.calling_E / 5)
    assert simulate(load(WEB, "tasks.sources.0.plan.call_s=0")).calling_E.sum() == 0


def test_step_time_grows_with_the_longest_episode_or_the_queue() -> None:
    def step(recipe: str, call_s: int, *more: str) -> float:
        return planner.plan(load(recipe, f"tasks.sources.0.plan.call_s={call_s}", *more)).times.total

    def calls(recipe: str, engines: int) -> list[np.ndarray]:
        work = simulate(load(recipe, "tasks.sources.0.plan.call_s=1"))
        by_task = work.calling_E.reshape(-1, work.episodes_a_task)
        return [by_task[engine::engines].ravel() for engine in range(engines)]

    longest = max(max(one.max(), one.sum() / 64) for one in calls(WEB, 4))
    assert step(WEB, 3000) - step(WEB, 2000) == pytest.approx(1000 * longest, rel=0.01)
    queue = max(one.sum() / 12 for one in calls(CODE, 4))
    assert queue > max(one.max() for one in calls(CODE, 4)), "programs wait in a queue in this case"
    assert step(CODE, 3000) - step(CODE, 2000) == pytest.approx(1000 * queue, rel=0.01)


def test_profile_comes_from_the_source() -> None:
    (source,) = load(WEB).tasks.sources
    plan = source.plan
    found = profile_of(source)
    for name in ("prompt_tokens", "reply_tokens", "observation_tokens"):
        assert getattr(found, name) == getattr(plan, name), name
    assert (found.turns, found.call_s) == (13, 3)
    assert profile_of(replace(source, plan=type(plan)())) == PROFILES["searchqa"]


def test_planner_and_toolbox_have_the_same_concurrency() -> None:
    assert Profile.calls_at_once == ToolLimits.concurrency


def test_plan_names_what_it_assumes_of_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*overrides: str) -> str:
        command.run(MATH, list(overrides), None, "h100", False, False, None)
        return capsys.readouterr().out

    assumed = said()
    assert "an attempt at math: 1 turn of 1,100 tokens on average; the settings allow 30 of up to 16,384" in assumed
    assert "set tasks.sources.0.plan.reply_tokens and tasks.sources.0.plan.calls (turns - 1)" in assumed
    assert "allow 1 of up to 2,048" in said("tasks.sources.0.answer_turns=1", "rollout.max_turn_tokens=2048")
    assert "allow 8 of up to" in said("rollout.max_turns=8")
    measured = said("tasks.sources.0.plan.reply_tokens=5000", "tasks.sources.0.plan.calls=2")
    assert "assumed, not measured" not in measured and "everything below is predicted" in measured
