"""A step's episodes, simulated: how long attempts and critiques get, and what of it is generated, read and trained.

Lengths are log-normal and cut where the settings cut them, so the long tail that a synchronous step waits for is there.
What the tasks' own numbers are is in `PROFILES`: assumptions, until a run's rollouts are measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import MathSource, ToolsSource
from icrl_megatron.settings.task_schema import TaskSource

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """What an attempt at a task of one source looks like."""

    prompt_tokens: float
    turns: float
    """Mean, when nothing cuts the attempt short."""
    reply_tokens: float
    """Mean of a turn."""
    reply_spread: float
    """Standard deviation of a reply's length over its mean."""
    observation_tokens: float
    critique_tokens: float
    latency_s: float
    """Seconds that the environment takes per turn."""
    success: float
    """Share of first attempts that succeed: the others get a critique and another attempt."""
    call_s: float = 0.0
    """Seconds of a tool call. Every turn but the last makes one."""
    calls_at_once: int = 64
    """Calls that run at a time in the process that plays an engine's episodes; the others wait."""


PROFILES: dict[str, Profile] = {
    "alfworld": Profile(700, 18, 120, 0.8, 60, 57, 0.05, 0.5),
    "webshop": Profile(900, 8, 150, 0.8, 500, 94, 0.2, 0.5),
    "searchqa": Profile(500, 4, 200, 0.8, 600, 80, 0.5, 0.4),
    "math": Profile(200, 1, 1100, 0.8, 0, 150, 0.01, 0.6),
}
"""Assumed. Only the critiques of ALFWorld and WebShop (57 and 94 tokens) are the paper's, of its trained 8B critic."""
DEFAULT_PROFILE = Profile(300, 4, 20, 0.5, 20, 20, 0.0, 0.5)
"""For the small embedded tasks, assumed too."""


def profile_of(source: TaskSource) -> Profile:
    """The source's profile, with what its `plan` settings say. Calls replace the latency of turns."""
    profile, asked = PROFILES.get(source.name, DEFAULT_PROFILE), source.plan
    given = {name: getattr(asked, name) for name in ("prompt_tokens", "reply_tokens", "observation_tokens")}
    profile = replace(profile, **{name: value for name, value in given.items() if value})
    if isinstance(source, ToolsSource) and "python" in source.agent.tools:
        profile = replace(profile, calls_at_once=source.data.grading_workers)
    if asked.calls:
        profile = replace(profile, turns=asked.calls + 1)
    return replace(profile, call_s=asked.call_s, latency_s=0.0) if asked.calls or asked.call_s else profile


def assumptions(settings: Settings) -> list[str]:
    """A line for each source whose turns or replies are assumed: what is assumed, what the settings allow, and the
    settings that replace it."""
    rollout, lines = settings.rollout, []
    for number, source in enumerate(settings.tasks.sources):
        profile, most = profile_of(source), rollout.max_turns
        if isinstance(source, MathSource) and not source.agent.tools:
            most = min(most, source.answer_turns)
        given = {"reply_tokens": source.plan.reply_tokens, "calls": source.plan.calls}
        missing = [f"tasks.sources.{number}.plan.{name}" for name, value in given.items() if not value]
        if missing:
            turns = "1 turn" if profile.turns == 1 else f"{profile.turns:g} turns"
            lines.append(
                f"assumed, not measured, of an attempt at {source.name}: {turns} of {profile.reply_tokens:,.0f} tokens "
                f"on average; the settings allow {most} of up to {rollout.longest_turn():,}. If yours differ, set "
                f"{' and '.join(missing)}" + (" (turns - 1)" if not source.plan.calls else "")
            )
    return lines


@dataclass(frozen=True)
class Workload:
    """One step. Arrays have one entry an episode ([E]) or one a trained sequence ([S])."""

    episodes_a_task: int
    generated_E: Floats
    """Tokens decoded one after another: attempts and critiques follow each other."""
    read_E: Floats
    """Tokens prefilled: prompts (shared by a task's episodes), observations and critics' prompts."""
    context_E: Floats
    """Mean tokens in the cache while the episode decodes."""
    waiting_E: Floats
    """Seconds spent in its environment, without tools."""
    calling_E: Floats
    """Seconds of its tool calls."""
    queued_E: Floats
    """The same, divided by the number of calls that run at a time: the sum over an engine's episodes is the shortest
    time in which their calls can be made."""
    sequence_S: Floats
    """Tokens of each trained sequence, prompt included."""
    loss_S: Floats
    """Loss tokens of each trained sequence."""

    @property
    def trained_tokens(self) -> float:
        return float(self.sequence_S.sum())

    @property
    def generated_tokens(self) -> float:
        return float(self.generated_E.sum())


def simulate(settings: Settings, seed: int = 0) -> Workload:
    """A step's workload by the settings and the profiles of their task sources, mixed by weight."""
    rollout, sources = settings.rollout, settings.tasks.sources
    key = tuple((profile_of(source), source.weight) for source in sources)
    limits = (rollout.max_turns, rollout.longest_turn(), rollout.max_critique_tokens, rollout.context_tokens)
    shared = settings.rollout.critic == "self"
    needed = rollout.tasks_per_step
    tasks = (math.ceil(needed * rollout.oversample), needed)
    return _simulate(key, tasks, rollout.episodes_per_task, rollout.rounds, limits, shared, seed)


@lru_cache(maxsize=64)
def _simulate(
    sources: tuple[tuple[Profile, float], ...],
    begun_needed: tuple[int, int],
    episodes: int,
    rounds: int,
    limits: tuple[int, int, int, int],
    train_critic: bool,
    seed: int,
) -> Workload:
    tasks, needed = begun_needed
    rng = np.random.default_rng(seed)
    weights = np.array([weight for _, weight in sources])
    chosen_T = rng.choice(len(sources), size=tasks, p=weights / weights.sum())
    parts = [_play(p, int((chosen_T == i).sum()), episodes, rounds, limits, rng) for i, (p, _) in enumerate(sources)]
    generated, read, context, waiting, calling, queued = (
        np.concatenate([part[0][k] for part in parts]) for k in range(6)
    )
    first = np.cumsum([0, *(len(part[0][0]) for part in parts)])
    rows = np.concatenate([part[1] + [0, 0, 0, start] for part, start in zip(parts, first[:-1], strict=True)])
    if needed < tasks:  # the quickest groups are trained on, and when the last of them is complete all others end
        longest_T = generated.reshape(tasks, episodes).max(axis=1)
        quickest = np.argsort(longest_T, kind="stable")[:needed]
        played = np.minimum(1.0, longest_T[quickest[-1]] / np.maximum(generated, 1.0))
        generated, read, waiting = generated * played, read * played, waiting * played
        calling, queued = calling * played, queued * played
        rows = rows[np.isin(rows[:, 3] // episodes, quickest)]
    sequences = rows if train_critic else rows[rows[:, 2] == 0]
    order = rng.permutation(tasks)  # tasks of a mixture come in any order, their episodes together
    columns = (generated, read, context, waiting, calling, queued)
    generated, read, context, waiting, calling, queued = (c.reshape(tasks, episodes)[order].ravel() for c in columns)
    of_sequences = (sequences[:, 0], sequences[:, 1])
    return Workload(episodes, generated, read, context, waiting, calling, queued, *of_sequences)


def _lengths(rng: np.random.Generator, mean: float, spread: float, shape: tuple[int, ...], most: float) -> Floats:
    """Log-normal, at least 1 and at most `most`, both inclusive."""
    variance = math.log1p(spread**2)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), shape)
    return np.clip(np.rint(drawn), 1, most)


def _play(
    profile: Profile,
    tasks: int,
    episodes: int,
    rounds: int,
    limits: tuple[int, int, int, int],
    rng: np.random.Generator,
) -> tuple[tuple[Floats, ...], Floats]:
    """Generated, read, context, waiting, calling and queued [E], and rows of sequences [S, 4]: tokens, loss tokens, is
    a critique, which episode's."""
    max_turns, max_reply, max_critique, window = limits
    count = tasks * episodes
    generated, read, context, waiting, calling = (np.zeros(count) for _ in range(5))
    read[::episodes] += profile.prompt_tokens  # the cache has it for the task's other episodes
    rows: list[Floats] = []
    alive = np.arange(count)
    for number in range(rounds):
        turns, replies, observed = _attempt(profile, len(alive), max_turns, max_reply, rng)
        room = window - profile.prompt_tokens
        share = np.minimum(1.0, room / np.maximum(replies + observed, 1))
        replies, observed = replies * share, observed * share
        generated[alive] += replies
        read[alive] += observed
        waiting[alive] += turns * profile.latency_s
        calling[alive] += (turns - 1) * profile.call_s
        whole = profile.prompt_tokens + replies + observed
        context[alive] = np.maximum(context[alive], profile.prompt_tokens + (replies + observed) / 2)
        rows.append(np.stack([whole, replies, np.zeros(len(alive)), alive], axis=1))
        failed = rng.random(len(alive)) >= profile.success
        alive, trajectory = alive[failed], (replies + observed)[failed]
        if number + 1 == rounds or not len(alive):
            break
        critique = _lengths(rng, profile.critique_tokens, 0.6, (len(alive),), max_critique)
        prompt = np.minimum(profile.prompt_tokens + trajectory, window - critique)
        generated[alive] += critique
        read[alive] += prompt + profile.prompt_tokens + critique
        rows.append(np.stack([prompt + critique, critique, np.ones(len(alive)), alive], axis=1))
    queued = calling / profile.calls_at_once
    return (generated, read, context, waiting, calling, queued), np.concatenate(rows)


def _attempt(
    profile: Profile, count: int, max_turns: int, max_reply: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """Turns, generated tokens and observed tokens of `count` attempts."""
    most = max(1, max_turns)
    if profile.turns > 1:
        turns = _lengths(rng, profile.turns, 0.5, (count,), most)
    else:
        turns = np.ones(count)
    replies = _lengths(rng, profile.reply_tokens, profile.reply_spread, (count, most), max_reply)
    played = np.arange(most)[None, :] < turns[:, None]
    return turns, (replies * played).sum(axis=1), (turns - 1) * profile.observation_tokens


def single_turn(
    tasks: int, episodes: int, prompt: float, mean: float, spread: float, most: float, seed: int = 0
) -> Workload:
    """Answers without turns or critiques whose mean length is `mean` after the cut at `most`: published workloads."""
    rng = np.random.default_rng(seed)
    count = tasks * episodes
    asked, replies = mean, np.zeros(count)
    for _ in range(40):  # the cut lowers the mean; ask for more until it is right
        replies = _lengths(np.random.default_rng(seed), asked, spread, (count,), most)
        asked *= mean / float(replies.mean())
    replies = rng.permutation(replies)
    read = np.zeros(count)
    read[::episodes] = prompt
    waiting, calling, queued = (np.zeros(count) for _ in range(3))
    return Workload(episodes, replies, read, prompt + replies / 2, waiting, calling, queued, replies + prompt, replies)
