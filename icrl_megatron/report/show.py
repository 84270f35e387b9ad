"""Prints one episode: problem, attempts, critiques, and the reward and advantage of each."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from icrl_megatron.telemetry.dumps import DumpRecord, dump_path, dumped_steps, read_dump
from icrl_megatron.types import Attempt, Critique
from icrl_megatron.utils.console import PlainConsole, text
from icrl_megatron.utils.errors import ConfigError


def show(
    run_dir: str | Path, step: int | None = None, index: int | None = None, console: Console | None = None
) -> None:
    """Prints episode `index` of a step's dump (default: the last step and its first episode with a revision).

    Raises ConfigError if the run has no such step or the step no such episode.
    """
    steps = dumped_steps(run_dir)
    if not steps:
        raise ConfigError(f"{run_dir} holds no rollouts: give the folder of a run that has trained at least one step.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"Step {step} was not dumped in {run_dir}: choose one of {steps[0]} to {steps[-1]}.")
    records = read_dump(dump_path(run_dir, step))
    if not records:
        raise ConfigError(f"Step {step} of {run_dir} has no episodes: choose another step.")
    if index is None:
        index = next((i for i, r in enumerate(records) if r.episode.critiques), 0)
    if not 0 <= index < len(records):
        raise ConfigError(f"Episode {index} does not exist: step {step} has episodes 0 to {len(records) - 1}.")
    out = console or PlainConsole()
    out.print(f"step {step}, episode {index} of {len(records)}", style="dim")
    out.print(render(records[index]))


def render(record: DumpRecord) -> RenderableType:
    """The whole episode, in chronological order."""
    episode = record.episode
    title = Text.assemble(
        text(episode.task.task_id, "bold"), f", try {episode.index}, {episode.generated_tokens()} tokens"
    )
    parts: list[RenderableType] = [
        title,
        Panel(text(record.prompts["0/attempt"].strip()), title="problem", title_align="left", border_style="blue"),
    ]
    for attempt in episode.attempts:
        parts += _attempt(record, attempt)
        if attempt.round < len(episode.critiques):
            parts.append(_critique(record, episode.critiques[attempt.round]))
    return Group(*parts)


def _attempt(record: DumpRecord, attempt: Attempt) -> list[RenderableType]:
    role = "revision" if attempt.round else "attempt"
    style = "green" if attempt.success else "red"
    parts: list[RenderableType] = [Rule(f"round {attempt.round}: {role}", align="left", style=style)]
    for number, turn in enumerate(attempt.turns, start=1):
        many = len(attempt.turns) > 1
        parts.append(Padding(text(turn.text.strip() or "(nothing)"), (0, 0, 0, 2)))
        if turn.action is None:
            parts.append(Padding(Text("no action could be read", style="yellow"), (0, 0, 0, 2)))
        if turn.observation:
            head = f"observed after turn {number}: " if many else "observed: "
            parts.append(Padding(Text.assemble((head, "dim"), text(turn.observation.strip(), "cyan")), (0, 0, 0, 4)))
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


def _critique(record: DumpRecord, critique: Critique) -> RenderableType:
    return Panel(
        text(critique.text.strip() or "(empty)"),
        title=f"critique, {len(critique.completion.ids)} tokens",
        title_align="left",
        subtitle=_earned(record, f"{critique.round}/critique"),
        subtitle_align="left",
        border_style="magenta",
    )


def _earned(record: DumpRecord, key: str) -> str:
    credited = record.credit.get(key)
    return f"reward {credited.reward:g}, advantage {credited.advantage:+.2f}" if credited else "not trained"
