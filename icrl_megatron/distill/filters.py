"""Filters of trajectories before training: pure functions, each with a report. Complexity, correctness, redundancy,
format, reflection and error correction follow the description of Chain-of-Agents (arXiv 2508.13167).

A filter says for each trajectory how many copies of it remain. What it draws depends on the seed and the trajectory
alone, not on the others or their order. FILTERS is the table: another filter is a function and a line there, and its
name in settings/distill_schema.py.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from icrl_megatron.agents.grammar import GRAMMARS, format_score
from icrl_megatron.distill import roles
from icrl_megatron.distill.check import check
from icrl_megatron.distill.rows import BadRowError
from icrl_megatron.distill.similarity import Index, Shingles, shingles
from icrl_megatron.distill.trajectory import USER, Segment, Trajectory
from icrl_megatron.settings.distill_schema import DistillFilters

EXAMPLES, SHOWN_CHARS = 3, 300
"""In a report."""
NEED_NO_REFLECTION = ("math", "code", "reasoning_gym")
"""Task sets whose solutions check themselves by computing."""
_COMMON, _COMMON_PROBLEMS = 0.1, 3
"""A shingle in more than this share of the problems, and in that many, is part of the instructions."""


@dataclass(frozen=True)
class Rules:
    """What filters read besides the trajectories."""

    settings: DistillFilters = field(default_factory=DistillFilters)
    seed: int = 0
    heldout: tuple[str, ...] = ()
    """Held-out problems, as the solver first reads them."""
    grammars: Mapping[str, str] = field(default_factory=dict)
    """Task set -> name in `agents/grammar.py`; `calls` for others."""


@dataclass(frozen=True)
class FilterVerdict:
    """What becomes of a trajectory."""

    copies: int = 1
    why: str = ""
    """The same words for the same reason; empty if nothing changes."""
    detail: str = ""
    """What is particular to this trajectory."""


KEPT = FilterVerdict()
Filter = Callable[[Sequence[Trajectory], Rules], list[FilterVerdict]]


def each(judge: Callable[[Trajectory, Rules], FilterVerdict]) -> Filter:
    """A filter that judges each trajectory without the others."""

    @functools.wraps(judge)
    def filter_(trajectories: Sequence[Trajectory], rules: Rules) -> list[FilterVerdict]:
        return [judge(one, rules) for one in trajectories]

    return filter_


@dataclass(frozen=True)
class FilterReport:
    """What one filter did."""

    name: str
    read: int
    kept: int
    """How many of the trajectories that were read."""
    dropped: int
    added: int
    """Further copies."""
    why: Mapping[str, int]
    """Reason -> trajectories."""
    examples: tuple[str, ...]
    """The first few, each with its task and what was found."""


def filtered(
    trajectories: Sequence[Trajectory], rules: Rules
) -> tuple[tuple[Trajectory, ...], tuple[FilterReport, ...]]:
    """Applies the filters in the order of the table, but for those that `settings.leave_out` names. Last, it drops what
    cannot be written, with a report if there is any."""
    reports = []
    for name, filter_ in FILTERS.items():
        if name not in rules.settings.leave_out:
            trajectories, report = applied(name, filter_, trajectories, rules)
            reports.append(report)
    trajectories, report = applied("writing", _writable, trajectories, rules)
    return tuple(trajectories), (*reports, report) if report.dropped else tuple(reports)


@each
def _writable(one: Trajectory, rules: Rules) -> FilterVerdict:
    try:
        check(one)
    except BadRowError as error:
        return FilterVerdict(0, "cannot be written", str(error))
    return KEPT


def applied(
    name: str, filter_: Filter, trajectories: Sequence[Trajectory], rules: Rules
) -> tuple[tuple[Trajectory, ...], FilterReport]:
    """(what one filter keeps, in order; its report)."""
    verdicts = filter_(trajectories, rules)
    both = list(zip(trajectories, verdicts, strict=True))
    changed = [(one, verdict) for one, verdict in both if verdict.why]
    examples = (f"{one.task_id}: {verdict.why} {verdict.detail}".strip()[:SHOWN_CHARS] for one, verdict in changed)
    dropped = sum(verdict.copies == 0 for verdict in verdicts)
    report = FilterReport(
        name,
        len(verdicts),
        len(verdicts) - dropped,
        dropped,
        sum(max(0, verdict.copies - 1) for verdict in verdicts),
        dict(sorted(Counter(verdict.why for _, verdict in changed).items())),
        tuple(example for _, example in zip(range(EXAMPLES), examples, strict=False)),
    )
    return tuple(one for one, verdict in both for _ in range(verdict.copies)), report


@each
def correctness(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Drops wrong answers, and those that were not judged."""
    why = "the answer was not judged" if one.correct is None else "wrong answer"
    return KEPT if one.correct else FilterVerdict(0, why, f"{_answer(one)!r}")


@each
def complexity(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Drops trajectories with few interactions: what agents said, called and answered; observations do not count."""
    count = sum(segment.kind != "observation" for segment in one.segments)
    enough = count >= rules.settings.min_interactions
    return KEPT if enough else FilterVerdict(0, "too few interactions", f"({count})")


@each
def form(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Drops broken sequences, and those that the grammar of their task set does not allow."""
    turns, tools = _turns(one), [spec.name for spec in one.tools]
    if problem := next(filter(None, (_broken(turn, set(tools)) for turn in turns)), ""):
        return FilterVerdict(0, "broken sequence", f"({problem})")
    grammar = rules.grammars.get(source_of(one), "calls")
    if any(format_score(_replies(turn), GRAMMARS[grammar], tools) < 1 for turn in turns):
        return FilterVerdict(0, f"against the grammar {grammar}", " ".join(s.agent for s in one.segments))
    return KEPT


@each
def length(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Drops trajectories with too many characters, the problem and observations included."""
    count = len(one.system) + len(one.problem) + len(_text(one))
    return KEPT if count <= rules.settings.max_chars else FilterVerdict(0, "too long", f"({count} characters)")


@each
def redundancy(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Drops trajectories that repeat calls with the same answer more often than `max_repeats`. With another answer, the
    repeated call changed something, or something had changed."""
    made = (segment.call.key() for segment in one.segments if segment.call)
    seen = (s.text for s in one.segments if s.kind == "observation" and s.agent != USER)
    calls = Counter(zip(made, seen, strict=False))
    repeats = calls.total() - len(calls)
    if repeats <= rules.settings.max_repeats:
        return KEPT
    return FilterVerdict(0, "redundant calls", f"({repeats}, such as {calls.most_common(1)[0][0][0]})")


def leakage(trajectories: Sequence[Trajectory], rules: Rules) -> list[FilterVerdict]:
    """Drops trajectories whose problem is nearly a held-out one. Instructions that most problems share do not count."""
    problems = {text: shingles(text) for text in [*rules.heldout, *(one.problem for one in trajectories)]}
    common = _common(problems.values())
    index, same = Index(rules.settings.leakage_similarity), {_plain(text) for text in rules.heldout}
    for text in rules.heldout:
        index.add(text, problems[text] - common)
    found = {one.problem: index.find(problems[one.problem] - common) for one in trajectories}

    def judge(one: Trajectory) -> FilterVerdict:
        like = one.problem if _plain(one.problem) in same else found[one.problem]
        return KEPT if like is None else FilterVerdict(0, "nearly a held-out problem", f"({like!r})")

    return [judge(one) for one in trajectories]


def duplicates(trajectories: Sequence[Trajectory], rules: Rules) -> list[FilterVerdict]:
    """Drops trajectories whose segments are nearly those of one before."""
    index, verdicts = Index(rules.settings.duplicate_similarity), []
    for one in trajectories:
        text = shingles(_text(one))
        like = index.find(text)
        verdicts.append(KEPT if like is None else FilterVerdict(0, "near-duplicate", f"(of {like})"))
        if like is None:
            index.add(one.task_id, text)
    return verdicts


@each
def reflection(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Keeps a share of the trajectories without a reflection or check; all of mathematics and code."""
    thinks = any(segment.agent in (roles.REFLECTION, roles.CHECK) for segment in one.segments)
    if thinks or source_of(one) in NEED_NO_REFLECTION:
        return KEPT
    drawn = _draw(rules.seed, "reflection", one) < rules.settings.keep_without_reflection
    return KEPT if drawn else FilterVerdict(0, "without reflection, not drawn")


@each
def correction(one: Trajectory, rules: Rules) -> FilterVerdict:
    """Copies trajectories in which a low check led to another answer that is right."""
    copies = rules.settings.correction_copies
    copied = copies > 1 and one.correct and _corrected(one)
    return FilterVerdict(copies, "corrected an error after a low check") if copied else KEPT


FILTERS: dict[str, Filter] = {
    "correctness": correctness,
    "complexity": complexity,
    "format": form,
    "length": length,
    "redundancy": redundancy,
    "leakage": leakage,
    "duplicates": duplicates,
    "reflection": reflection,
    "correction": correction,
}
"""In the order in which they apply: copies are made of what is left."""


def source_of(one: Trajectory) -> str:
    """The task set, with which the ids of its tasks begin."""
    return one.task_id.partition("/")[0]


def _answer(one: Trajectory) -> str:
    return one.segments[-1].text if one.segments and one.segments[-1].kind == "answer" else ""


def _said(segment: Segment) -> str:
    return segment.call.key() if segment.call else segment.text


def _text(one: Trajectory) -> str:
    return "\n".join(f"{segment.agent} {_said(segment)}" for segment in one.segments)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _turns(one: Trajectory) -> list[list[Segment]]:
    """The segments before each message of the user, and those after the last one. Each part should end with an answer.
    An environment may end with a call: a last part that was judged right counts as answered."""
    turns = [list[Segment]()]
    for segment in one.segments:
        if segment.agent == USER and segment.kind == "observation":
            turns.append([])
        else:
            turns[-1].append(segment)
    if one.correct and turns[-1] and turns[-1][-1].kind == "observation":
        turns[-1].append(Segment(roles.ANSWER, "-", "answer"))
    return turns


def _broken(segments: Sequence[Segment], tools: set[str]) -> str:
    """What is wrong with the sequence; empty if nothing is."""
    waiting: list[str] = []
    for number, segment in enumerate(segments):
        if segment.kind == "observation":
            if not waiting or waiting.pop(0) != segment.agent:
                return f"segment {number} is an observation without its call"
            continue
        if waiting and (segment.kind != "call" or segments[number - 1].kind == "observation"):
            return f"segment {number} is between a call and its observation"
        if segment.call:
            waiting.append(segment.agent)
            if segment.call.name not in tools or segment.agent != segment.call.name:
                return f"segment {number} calls the unknown tool {segment.call.name!r}"
        elif not segment.text.strip():
            return f"segment {number} is empty"
    if waiting:
        return "a call without its observation"
    answers = [number for number, segment in enumerate(segments) if segment.kind == "answer"]
    return "" if answers == [len(segments) - 1] else "not one answer at its end"


def _replies(segments: Sequence[Segment]) -> list[str]:
    """What agents say between tags; a call ends its reply."""
    replies = [""]
    for segment in segments:
        if segment.kind != "observation":
            tag = "answer" if segment.kind == "answer" else segment.agent
            replies[-1] += f"<{tag}>{_said(segment)}</{tag}>"
        if segment.call:
            replies.append("")
    return replies


def _common(texts: Iterable[Shingles]) -> Shingles:
    """Shingles of the instructions: those of many different problems."""
    counts, problems = Counter[int](), 0
    for text in texts:
        counts.update(text)
        problems += 1
    least = max(_COMMON * problems, _COMMON_PROBLEMS)
    return frozenset(shingle for shingle, count in counts.items() if count > least)


def _draw(seed: int, name: str, one: Trajectory) -> float:
    """A number in [0, 1), the same for the same trajectory."""
    text = f"{seed} {name} {one.task_id} {_text(one)}"
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64


def _corrected(one: Trajectory) -> bool:
    """Whether a check below GOOD_SCORE is followed by another answer than the one that was checked."""
    suggested = ""
    for segment in one.segments:
        if segment.agent == roles.SUGGESTION:
            suggested = segment.text
        score = roles.score_of(segment.text) if segment.agent == roles.CHECK else None
        if score is not None and score < roles.GOOD_SCORE and suggested != _answer(one):
            return True
    return False
