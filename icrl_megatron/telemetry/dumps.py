"""Dumped episodes: one JSON object per line, from which an episode can be restored exactly.

A line holds the step, the decoded prompt of the first attempt, the credit of each sample, and the episode. Prompts of
critiques and revisions are there as token ids only: their text is that of the parts before. Texts are plain; sequences
of numbers are packed ("i4:", "f4:" or "f8:", then little-endian values in base64): smaller and faster than lists.
Every rank appends the episodes that it played to a file of its own (`dump_shards.py`, `dump_writer.py`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from icrl_megatron.telemetry.dump_shards import Shards, line_of, shard_path
from icrl_megatron.types import Attempt, Completion, Critique, Episode, IdArray, Sample, Task, Turn
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile

IDS = frozenset(("ids", "prompt_ids", "plain_prompt_ids", "observation_ids"))
FLOATS = frozenset(("logprobs", "weights"))
"""Fields that are packed."""
_TYPES = {"i4": "<i4", "f4": "<f4", "f8": "<f8"}

Decode = Callable[[IdArray], str]


@dataclass(frozen=True)
class Credited:
    """The credit of one sample of an episode."""

    reward: float
    advantage: float
    weights: tuple[float, ...] = ()
    """Calibration weight of each generated token of an internalised revision that was trained; else empty."""


Credit = dict[str, Credited]
""""<round>/<role>" -> credit; a sample that was not trained (frozen critic, filtered group) has no entry."""


@dataclass(frozen=True)
class DumpRecord:
    episode: Episode
    prompt: str
    """Decoded prompt of the first attempt, as the engine saw it."""
    credit: Credit


class Rollouts:
    """The dumped episodes of a run, from the shards of all its ranks.

    Example: Rollouts("runs/quickstart").read(40)
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Looks for the steps; reads no episode. Raises ConfigError on a file that is no shard."""
        self._shards = Shards(Path(run_dir))

    @property
    def steps(self) -> list[int]:
        """Steps with dumped episodes, ascending."""
        return self._shards.steps

    def read(self, step: int) -> list[DumpRecord]:
        """The episodes of a step, by task and index; none if it was not dumped. Raises ConfigError on a damaged
        shard."""
        records = []
        for path, offset, line in self._shards.lines(step):
            try:
                records.append(parse(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ConfigError(
                    f"{path}, byte {offset}: not a dumped episode ({error!r}); move that file away"
                ) from error
        return sorted(records, key=lambda record: (record.episode.task.task_id, record.episode.index))

    def episodes(self, step: int) -> list[Episode]:
        """The same without prompt and credit."""
        return [record.episode for record in self.read(step)]


def credit_of(
    episodes: Sequence[Episode],
    samples: Iterable[Sample],
    weights: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> list[tuple[Episode, Credit]]:
    """The credit of each episode. `weights` is `StepStats.calibration_weights`."""
    found: dict[str, Credit] = {f"{e.task.task_id}#{e.index}": {} for e in episodes}
    for sample in samples:
        stem, round, role = sample.sample_id.rsplit("/", 2)
        if stem in found:
            of_tokens = weights.get(sample.sample_id, ())
            found[stem][f"{round}/{role}"] = Credited(sample.reward, sample.advantage, of_tokens)
    return list(zip(episodes, found.values(), strict=True))


def write_dump(
    run_dir: str | Path,
    step: int,
    episodes: Sequence[Episode],
    samples: Sequence[Sample],
    decode: Decode,
    rank: int = 0,
) -> Path:
    """Appends all episodes to the shard of a rank and returns its path: for commands that end afterwards. A run has
    a `DumpWriter`. Raises ConfigError on disk errors."""
    file = AppendFile(shard_path(Path(run_dir), rank), f"the rollouts of step {step}")
    for episode, credit in credit_of(episodes, samples):
        file.write(encoded(step, episode, credit, decode))
    file.close()
    return file.path


def encoded(step: int, episode: Episode, credit: Credit, decode: Decode) -> bytes:
    fields = {"prompt": decode(episode.attempts[0].prompt_ids), "credit": credit, "episode": episode}
    # Dataclasses become objects of their fields, at any depth.
    return line_of(step, json.dumps(fields, default=_fields, ensure_ascii=False))


def parse(line: bytes) -> DumpRecord:
    """Inverse of `encoded`. Raises ValueError, LookupError, TypeError, AttributeError or RecursionError for any other
    line."""
    found = json.loads(line)
    e = found["episode"]
    episode = Episode(
        task=Task(**e["task"]),
        index=e["index"],
        attempts=tuple(map(_attempt, e["attempts"])),
        critiques=tuple(
            Critique(**_unpacked(c) | {"completion": _completion(c["completion"])}) for c in e["critiques"]
        ),
    )
    credit = {role: Credited(**_unpacked(of)) for role, of in found["credit"].items()}
    return DumpRecord(episode, str(found["prompt"]), credit)


def _fields(value: object) -> dict[str, Any]:
    return {name: _packed(name, of) for name, of in vars(value).items()}


def _packed(name: str, value: Any) -> Any:
    if name in IDS:
        return _text("i4", np.asarray(value, _TYPES["i4"]))
    if name in FLOATS:  # most engines compute in fp32
        wide = np.asarray(value, _TYPES["f8"])
        narrow = wide.astype(_TYPES["f4"])
        return _text("f4", narrow) if (narrow == wide).all() else _text("f8", wide)
    return value


def _text(kind: str, values: np.ndarray) -> str:
    return f"{kind}:{binascii.b2a_base64(values.tobytes(), newline=False).decode('ascii')}"


def _unpacked(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _numbers(of) if name in IDS | FLOATS else of for name, of in fields.items()}


def _numbers(text: str) -> tuple[Any, ...]:
    kind, _, packed = text.partition(":")
    return tuple(np.frombuffer(base64.b64decode(packed, validate=True), _TYPES[kind]).tolist())


def _completion(fields: dict[str, Any]) -> Completion:
    return Completion.parse(_unpacked(fields))


def _turn(fields: dict[str, Any]) -> Turn:
    chars = tuple(fields["answer_chars"])
    return Turn(**_unpacked(fields) | {"completion": _completion(fields["completion"]), "answer_chars": chars})


def _attempt(fields: dict[str, Any]) -> Attempt:
    turns = tuple(map(_turn, fields["turns"]))
    measures = tuple((name, value) for name, value in fields["measures"])
    return Attempt(**_unpacked(fields) | {"turns": turns, "measures": measures})
