"""Rollout dumps: one JSON object per line and episode, from which the episodes can be restored exactly.

A line holds the episode, the decoded prompts, and the credit of each of its samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from icrl_megatron.headers import EpisodeHeader
from icrl_megatron.types import Attempt, Completion, Critique, Episode, IdArray, Sample, Task, Turn, as_json
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.step_names import step_name, steps_in

ROLLOUTS_FOLDER = "rollouts"


@dataclass(frozen=True)
class Credited:
    """The credit of one sample of an episode."""

    reward: float
    advantage: float
    weights: tuple[float, ...] = ()
    """Calibration weight of each generated token of an internalised revision that was trained; else empty."""


@dataclass(frozen=True)
class DumpRecord:
    """One line of a dump."""

    episode: Episode
    prompts: dict[str, str]
    """Decoded prompts by "<round>/<role>", as the engine saw them."""
    credit: dict[str, Credited]
    """By "<round>/<role>"; a sample that was not trained (frozen critic, filtered group) has no entry."""


def dump_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / ROLLOUTS_FOLDER / f"{step_name(step)}.jsonl"


def dumped_steps(run_dir: str | Path) -> list[int]:
    """Steps whose rollouts are in this run folder, in ascending order."""
    return steps_in(Path(run_dir) / ROLLOUTS_FOLDER, ".jsonl")


def write_dump(
    run_dir: str | Path,
    step: int,
    episodes: Iterable[Episode],
    samples: Sequence[Sample],
    decode: Callable[[IdArray], str],
    weights: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> Path:
    """Writes rollouts/step_<step>.jsonl atomically, the episodes sorted by task and index; returns its path.

    `weights` is `StepStats.calibration_weights`."""
    credited, path = _credited(samples, weights), dump_path(run_dir, step)
    lines = (_line(_record(e, credited, decode)) for e in sorted(episodes, key=_order))
    write_atomically(path, lines, f"the rollouts of step {step}")
    return path


def write_part(
    run_dir: str | Path,
    step: int,
    rank: int,
    episodes: Iterable[Episode],
    samples: Sequence[Sample],
    decode: Callable[[IdArray], str],
    weights: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> None:
    """Writes the episodes of one rank, as `write_dump` does; `join_parts` makes one dump of the parts of all ranks."""
    mine = sorted(episodes, key=_order)
    own = {f"{e.task.task_id}#{e.index}" for e in mine}
    credited = _credited((s for s in samples if s.episode_id() in own), weights)
    lines = (_line(_record(e, credited, decode)) for e in mine)
    write_atomically(_part(run_dir, step, rank), lines, f"the rollouts of step {step}")


def join_parts(run_dir: str | Path, step: int, headers: Iterable[EpisodeHeader], world: int) -> Path:
    """Joins the parts of all ranks into the dump of a step, the episodes sorted by task and index, and removes them.
    One line is in memory at a time."""
    path, parts = dump_path(run_dir, step), [_part(run_dir, step, rank) for rank in range(world)]
    with ExitStack() as opened:
        files = [opened.enter_context(part.open(encoding="utf-8", newline="\n")) for part in parts]
        lines = (files[header.rank].readline()[:-1] for header in sorted(headers, key=_order))
        write_atomically(path, lines, f"the rollouts of step {step}")
    for part in parts:
        part.unlink()
    return path


def _part(run_dir: str | Path, step: int, rank: int) -> Path:
    path = dump_path(run_dir, step)
    return path.with_name(f".{path.name}.{rank}")


def _order(of: Episode | EpisodeHeader) -> tuple[str, int]:
    return of.task.task_id, of.index


def _credited(samples: Iterable[Sample], weights: Mapping[str, tuple[float, ...]]) -> dict[str, Credited]:
    return {s.sample_id: Credited(s.reward, s.advantage, weights.get(s.sample_id, ())) for s in samples}


def read_dump(path: str | Path) -> list[DumpRecord]:
    """Raises ConfigError on a missing or damaged file."""
    path = Path(path)
    try:
        # Not splitlines(), which also splits at other characters that an environment's texts may contain.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise ConfigError(
            f"No rollouts at {path}: {error.strerror}. Give the folder of a run that has dumped some."
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number} is not a dumped episode ({error!r}): take a whole dump."
            ) from error
    return records


def read_episodes(path: str | Path) -> list[Episode]:
    """The episodes of a dump, as they were written. Raises ConfigError on a missing or damaged file."""
    return [record.episode for record in read_dump(path)]


def _record(episode: Episode, credited: dict[str, Credited], decode: Callable[[IdArray], str]) -> DumpRecord:
    prompts = {f"{a.round}/{'revision' if a.round else 'attempt'}": decode(a.prompt_ids) for a in episode.attempts}
    prompts |= {f"{c.round}/critique": decode(c.prompt_ids) for c in episode.critiques}
    stem = f"{episode.task.task_id}#{episode.index}"
    return DumpRecord(episode, prompts, {k: credited[f"{stem}/{k}"] for k in prompts if f"{stem}/{k}" in credited})


def _line(record: DumpRecord) -> str:
    return json.dumps(
        {k: vars(record)[k] for k in ("prompts", "credit", "episode")}, default=as_json, ensure_ascii=False
    )


def _parse(line: dict[str, Any]) -> DumpRecord:
    e = line["episode"]
    episode = Episode(
        task=Task(**e["task"]),
        index=e["index"],
        attempts=tuple(map(_attempt, e["attempts"])),
        critiques=tuple(Critique(**{**c, "completion": Completion.parse(c["completion"])}) for c in e["critiques"]),
    )
    credit = {k: Credited(c["reward"], c["advantage"], tuple(c.get("weights", ()))) for k, c in line["credit"].items()}
    return DumpRecord(episode, line["prompts"], credit)


def _turn(fields: dict[str, Any]) -> Turn:
    kept = {"completion": Completion.parse(fields["completion"]), "answer_chars": tuple(fields.get("answer_chars", ()))}
    return Turn(**{**fields, **kept})


def _attempt(fields: dict[str, Any]) -> Attempt:
    turns = tuple(map(_turn, fields["turns"]))
    measures = tuple((name, value) for name, value in fields.get("measures", ()))
    return Attempt(**{**fields, "turns": turns, "measures": measures})
