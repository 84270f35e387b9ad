"""Prints one episode: problem, attempts, critiques, and the reward and advantage of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from icrl_megatron.report.segments import TaggedText, colors, split, tools_of
from icrl_megatron.telemetry.dumps import DumpRecord, Rollouts
from icrl_megatron.types import Attempt, Critique
from icrl_megatron.utils.console import PlainConsole, text
from icrl_megatron.utils.errors import ConfigError

PEEK_CHARS = 400
"""A line shows at most this much of a call or an observation, and no more than fits."""


@dataclass(frozen=True)
class Look:
    """How the texts of a step's episodes are shown."""

    tools: frozenset[str]
    colors: Mapping[str, str]
    full: bool
    """Whether calls and observations are shown whole."""

    @staticmethod
    def of(records: Sequence[DumpRecord], full: bool = False) -> Look:
        tools = tools_of(record.episode for record in records)
        episodes = [record.episode for record in records]
        said = [turn.text for e in episodes for attempt in e.attempts for turn in attempt.turns]
        said += [critique.text for e in episodes for critique in e.critiques]
        return Look(tools, colors(s.agent for reply in said for s in split(reply, tools)), full)

    def cuts(self, attempt: Attempt) -> bool:
        """Whether an attempt has a call or an observation."""
        return any(t.observation or any(s.kind == "call" for s in split(t.text, self.tools)) for t in attempt.turns)


def show(
    run_dir: str | Path,
    step: int | None = None,
    index: int | None = None,
    console: Console | None = None,
    full: bool = False,
) -> None:
    """Prints episode `index` of a step's dump (default: the last step and its first episode with a revision).

    Tool calls and observations are cut to a line each, unless `full`.

    Raises ConfigError if the run has no such step or the step no such episode.
    """
    rollouts = Rollouts(run_dir)
    steps = rollouts.steps
    if not steps:
        raise ConfigError(
            f"{run_dir} holds no rollouts: give the folder of a run that has trained at least one step, not with "
            "telemetry.dump=none."
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"Step {step} was not dumped in {run_dir}: choose one of {steps[0]} to {steps[-1]}.")
    records = rollouts.read(step)
    if index is None:
        index = next((i for i, r in enumerate(records) if r.episode.critiques), 0)
    if not 0 <= index < len(records):
        raise ConfigError(f"Episode {index} does not exist: step {step} has episodes 0 to {len(records) - 1}.")
    out = console or PlainConsole()
    out.print(f"step {step}, episode {index} of {len(records)}", style="dim")
    look = Look.of(records, full)
    out.print(render(records[index], look))
    if not full and any(map(look.cuts, records[index].episode.attempts)):
        out.print("Calls and observations are cut to a line each; --full shows them whole.", style="dim")


def render(record: DumpRecord, look: Look) -> RenderableType:
    """The whole episode, in chronological order."""
    episode = record.episode
    title = Text.assemble(
        text(episode.task.task_id, "bold"), f", try {episode.index}, {episode.generated_tokens()} tokens"
    )
    parts: list[RenderableType] = [
        title,
        Panel(text(record.prompt.strip()), title="problem", title_align="left", border_style="blue"),
    ]
    for attempt in episode.attempts:
        parts += _attempt(record, attempt, look)
        if attempt.round < len(episode.critiques):
            parts.append(_critique(record, episode.critiques[attempt.round], look))
    return Group(*parts)


def _said(reply: str, look: Look) -> list[RenderableType]:
    """Each agent of a reply in its color, a call in one line."""
    segments = [segment for segment in split(reply, look.tools) if segment.text.strip()]
    return [_segment(segment, look) for segment in segments]


def _segment(segment: TaggedText, look: Look) -> RenderableType:
    style = look.colors.get(segment.agent, "")
    if segment.kind == "call" and not look.full:
        return _line(segment.text, style)
    return text(segment.text.strip(), style)


def _line(said: str, style: str) -> Text:
    """The beginning of a text, cut where the line ends."""
    words = " ".join(said[: 4 * PEEK_CHARS].split())
    shown = text(words[:PEEK_CHARS] + ("…" if len(words) > PEEK_CHARS or len(said) > 4 * PEEK_CHARS else ""), style)
    shown.no_wrap, shown.overflow = True, "ellipsis"
    return shown


def _attempt(record: DumpRecord, attempt: Attempt, look: Look) -> list[RenderableType]:
    role = "revision" if attempt.round else "attempt"
    style = "green" if attempt.success else "red"
    parts: list[RenderableType] = [Rule(f"round {attempt.round}: {role}", align="left", style=style)]
    for number, turn in enumerate(attempt.turns, start=1):
        many = len(attempt.turns) > 1
        parts += [Padding(said, (0, 0, 0, 2)) for said in _said(turn.text, look) or [Text("(nothing)")]]
        if turn.action is None:
            parts.append(Padding(Text("no action could be read", style="yellow"), (0, 0, 0, 2)))
        if turn.observation:
            head = f"observed after turn {number}: " if many else "observed: "
            whole = text(turn.observation.strip(), "italic")
            observed = whole if look.full else _line(turn.observation, "italic")
            line = Text.assemble((head, "dim"), observed, no_wrap=observed.no_wrap, overflow=observed.overflow)
            parts.append(Padding(line, (0, 0, 0, 4)))
    verdict = "succeeded" if attempt.success else "failed"
    parts.append(
        Text.assemble(
            (verdict, f"bold {style}"),
            text(f", outcome {attempt.outcome:g}, stopped: {attempt.stop_reason}, "),
            _earned(record, f"{attempt.round}/{role}"),
        )
    )
    if attempt.summary:
        parts.append(text(attempt.summary.strip(), "dim"))
    return parts


def _critique(record: DumpRecord, critique: Critique, look: Look) -> RenderableType:
    return Panel(
        Group(*(_said(critique.text, look) or [Text("(empty)")])),
        title=f"critique, {len(critique.completion.ids)} tokens",
        title_align="left",
        subtitle=_earned(record, f"{critique.round}/critique"),
        subtitle_align="left",
        border_style="magenta",
    )


def _earned(record: DumpRecord, key: str) -> str:
    credited = record.credit.get(key)
    return f"reward {credited.reward:g}, advantage {credited.advantage:+.2f}" if credited else "not trained"
