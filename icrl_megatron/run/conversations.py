"""Conversations from files as episodes for supervised training, and the loss on those that are held out.

All ranks encode a share of the rows and exchange the tokens: 5 bytes per token on each rank.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from icrl_megatron.distill import readers
from icrl_megatron.distill.encode import Encoded, encode
from icrl_megatron.distill.rows import BadRowError
from icrl_megatron.distill.trajectory import USER
from icrl_megatron.distributed.grid import gather_objects
from icrl_megatron.engines.rank import ONE_RANK, Share
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.rollout.played import Played, RolloutRequest, WithoutEngine, shared
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.run import start
from icrl_megatron.run.conversation_checks import fraction, tool_format
from icrl_megatron.run.evaluator import Evaluator
from icrl_megatron.run.parts import Delivered, Parts
from icrl_megatron.run.problems import NAMED, ProblemShare
from icrl_megatron.run.state import RunState
from icrl_megatron.settings.loading import model_folder
from icrl_megatron.settings.schema import ConversationFiles, Settings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.tasks.datasets import content_hash
from icrl_megatron.telemetry.metrics import HELDOUT_NLL, HELDOUT_TOKENS
from icrl_megatron.telemetry.writer import METRICS_FILE, MetricsRow, read_rows
from icrl_megatron.types import Episode, Split, Task
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Conversation:
    """One row of a file."""

    where: str
    """File and line."""
    problem: str
    """A hash of the user's messages."""
    encoded: Encoded | None
    bad: str = ""
    """Why it cannot be trained on."""
    too_long: int = 0
    """Its tokens, if they are more than allowed."""


@dataclass(frozen=True)
class Conversations(WithoutEngine):
    """The conversations of a run, as a source of episodes; the same on every rank."""

    train: dict[str, list[Task]]
    """By entry of `warm_start.data`."""
    heldout: tuple[Task, ...]
    encoded: Mapping[str, Encoded]
    """By task id."""
    dropped: int = 0
    """Rows left out: those that cannot be trained on, and those that are too long."""
    sources: Sequence[TaskSource] = field(default_factory=list)
    """Names and weights of the entries, for the sampler."""
    share: Share = ONE_RANK

    def play(self, request: RolloutRequest) -> Played:
        return shared(self.episodes(request.tasks), self.share, generated=0)

    def episodes(self, tasks: Sequence[Task]) -> Iterator[Episode]:
        """A task that is drawn twice gives two episodes with different indices."""
        drawn = Counter[str]()
        for task in tasks:
            yield self.encoded[task.task_id].episode(task, drawn[task.task_id])
            drawn[task.task_id] += 1

    def steps(self, settings: Settings) -> int:
        """`warm_start.steps`, or the steps of `warm_start.epochs`."""
        warm, rows = settings.warm_start, sum(map(len, self.train.values()))
        return warm.steps if warm.epochs is None else math.ceil(warm.epochs * rows / warm.episodes_per_step)


def load(
    settings: Settings, prompter: Prompter, positions: int, share: ProblemShare, log: Callable[[str], None]
) -> Conversations:
    """Reads and encodes the conversations of `warm_start.data` and `warm_start.heldout`. Collective over all processes
    of `share`.

    Raises ConfigError, which names file and line, for rows that the rules of the settings do not drop, if no row is
    left, and for a held-out problem that is also trained on.
    """
    warm = settings.warm_start
    found = {f"data/{i}": _read(entry, settings, prompter, share) for i, entry in enumerate(warm.data)}
    part = fraction(warm)
    if warm.heldout and part is None:
        like = warm.data[0]
        entry = ConversationFiles(path=warm.heldout, format=like.format, tool_format=like.tool_format)
        found["heldout"] = _read(entry, settings, prompter, share)
    every = [row for rows in found.values() for row in rows]
    dropped = _refuse(every, settings, positions, log)
    usable = {name: [row for row in rows if row.encoded is not None] for name, rows in found.items()}
    apart = _held_out(usable, part)
    train, heldout, encoded = dict[str, list[Task]](), list[Task](), dict[str, Encoded]()
    for name, rows in usable.items():
        for number, row in enumerate(rows):
            split: Split = "heldout" if name == "heldout" or row.problem in apart else "train"
            task = Task(f"{name}/{number}", name, split, row.where)
            (heldout if split == "heldout" else train.setdefault(name, [])).append(task)
            assert row.encoded is not None
            encoded[task.task_id] = row.encoded
    for i, entry in enumerate(warm.data):
        if not train.get(f"data/{i}"):
            raise ConfigError(
                f"warm_start.data.{i}.path={entry.path}: no conversation is left to train on ({dropped} rows dropped, "
                f"{len(heldout)} held out); add rows, or correct those that are dropped"
            )
    if warm.heldout and not heldout:
        raise ConfigError(
            f"warm_start.heldout={warm.heldout}: no conversation is held out; give a file with usable rows"
        )
    sources = [TaskSource(name=f"data/{i}", weight=entry.weight) for i, entry in enumerate(warm.data)]
    return Conversations(train, tuple(heldout), encoded, dropped, sources, Share(share.index, share.count))


def _read(entry: ConversationFiles, settings: Settings, prompter: Prompter, share: ProblemShare) -> list[Conversation]:
    mine = []
    for number, row in enumerate(readers.read(entry.path, entry.format)):
        if number % share.count == share.index:
            mine.append((number, _encoded(row, tool_format(settings, entry), settings, prompter)))
    everyones = [one for part in share.gather(mine) for one in part]
    return [row for _, row in sorted(everyones, key=lambda one: one[0])]


def _encoded(row: readers.Read, form: str, settings: Settings, prompter: Prompter) -> Conversation:
    if row.trajectory is None:
        return Conversation(row.where, "", None, row.problem)
    later = [segment.text for segment in row.trajectory.segments if segment.agent == USER]
    problem = content_hash("\n".join([row.trajectory.problem, *later]))
    try:
        found = encode(row.trajectory, form, prompter)
    except BadRowError as error:
        return Conversation(row.where, problem, None, str(error))
    tokens, limit = len(found.ids_T), _limit(settings)
    if tokens <= limit:
        return Conversation(row.where, problem, found)
    cut = found.first(limit) if settings.warm_start.too_long == "cut" else None
    if cut is not None and len(cut.ids_T):
        return Conversation(row.where, problem, cut)
    return Conversation(row.where, problem, None, too_long=tokens)


def _limit(settings: Settings) -> int:
    return settings.warm_start.max_tokens or settings.rollout.context_tokens


def _refuse(rows: Sequence[Conversation], settings: Settings, positions: int, log: Callable[[str], None]) -> int:
    """The number of rows to leave out, which is logged. Raises ConfigError where the settings do not drop them."""
    warm = settings.warm_start
    bad, long = [row for row in rows if row.bad], [row for row in rows if row.too_long]
    name = "rollout.context_tokens" if warm.max_tokens is None else "warm_start.max_tokens"
    if bad:
        places: dict[str, list[str]] = {}
        for row in bad:
            places.setdefault(row.bad, []).append(row.where)
        named = [f"{', '.join(at[:NAMED])}{', ...' * (len(at) > NAMED)}: {why}" for why, at in places.items()]
        first = "; ".join([*named[:NAMED], *["..."] * (len(named) > NAMED)])
        said = f"{len(bad)} of {len(rows)} rows cannot be trained on: {first}"
        if warm.bad_rows == "error":
            raise ConfigError(f"{said}. Correct them, or set warm_start.bad_rows=drop")
        log(f"{said}. They are left out")
    if long:
        most = max(long, key=lambda row: row.too_long)
        said = (
            f"{len(long)} of {len(rows)} conversations are longer than {name}={_limit(settings)}, the longest is "
            f"{most.where} with {most.too_long} tokens"
        )
        if warm.too_long == "error":
            raise ConfigError(
                f"{said}. Raise {name} (the model has {positions} positions), or set warm_start.too_long=drop or cut"
            )
        log(f"{said}. They are left out")
    return len(bad) + len(long)


def _held_out(found: Mapping[str, Sequence[Conversation]], part: float | None) -> set[str]:
    """Hashes of the problems that are held out as a fraction of all: whole problems, so that no attempt at one is
    trained on. Raises ConfigError if a problem of the held-out file is also trained on."""
    trained = {row.problem: row.where for name, rows in found.items() if name != "heldout" for row in rows}
    for row in found.get("heldout", ()):
        if row.problem in trained:
            raise ConfigError(
                f"{row.where}: this held-out problem is trained on too ({trained[row.problem]}), and its loss would "
                "measure memory; delete it from one of the files"
            )
    if part is None:
        return set()
    mixed = sorted(trained, key=lambda problem: hashlib.blake2b(problem.encode()).digest())
    return set(mixed[: math.ceil(part * len(mixed))])


def dry_run(settings: Settings) -> str:
    """Reads the conversations as the ranks do before they load the model. Returns their messages about rows that are
    left out; raises the same ConfigError."""
    if not settings.warm_start.data:
        return ""
    said: list[str] = []
    folder = start.configuration(settings) if settings.start_from else model_folder(settings)
    prompter = Prompter(tokenizer(folder), settings.rollout)
    load(settings, prompter, ModelShape.read(folder).max_positions, ProblemShare(), said.append)
    return "\n".join(said)


class HeldoutLoss(Evaluator):
    """Measures the held-out loss, ends the run when it stops falling, and chooses the step that is exported. All ranks
    call each method."""

    def __init__(self, parts: Parts, state: RunState, heldout: Delivered, log: Callable[[str], None]) -> None:
        self._parts, self._state, self._log, warm = parts, state, log, parts.settings.warm_start
        self._interval, self._patience = warm.heldout_interval, warm.patience
        self._plan = heldout.plan()
        self._tokens = float(self._plan.global_loss_tokens)
        rows = read_rows(state.run_dir / METRICS_FILE) if parts.grid.rank == 0 else []
        # Losses on other held-out files, before a resume that changed them, cannot be compared.
        known = {int(row["step"]): row[HELDOUT_NLL] for row in rows if row.get(HELDOUT_TOKENS) == self._tokens}
        self._losses: dict[int, float] = gather_objects(parts.grid, known)[0]
        self._judge()

    def due(self) -> bool:
        return self._state.step % self._interval == 0 or self._state.step >= self._parts.settings.steps

    def heldout(self) -> MetricsRow:
        loss = self._parts.actor.nll(self._plan)
        self._losses[self._state.step] = loss
        self._judge()
        return {HELDOUT_NLL: loss, HELDOUT_TOKENS: self._tokens}

    def alone(self) -> None:
        """Measures before the first step; the last step measures the loss itself, and here its export is announced."""
        if self._state.step == 0 and not self._state.evaluated():
            self._state.write(self.heldout())
        best = self._state.saver.best
        if self._state.finished() and best is not None:
            before, lowest = self._losses.get(0, math.inf), self._losses[best]
            rose = f"; before the first step it was {before:.4f}, so training made it worse" if before < lowest else ""
            self._log(
                f"the export has the weights of step {best} of {self._state.step}, with the lowest held-out loss "
                f"({lowest:.4f}){rose}"
            )

    def _judge(self) -> None:
        """Decides after each measurement whether the run ends, and which step is the best so far."""
        state = self._state
        state.ended_early = self._risen()
        # Only steps with a checkpoint: the current one gets one if it is the best.
        found = [
            (loss, step)
            for step, loss in self._losses.items()
            if step > 0 and math.isfinite(loss) and (step == state.step or state.saver.has(step))
        ]
        lowest = min(found)[1] if found and self._parts.grid.rank == 0 else None
        state.saver.best = gather_objects(self._parts.grid, lowest)[0]

    def _risen(self) -> bool:
        """Whether none of the last `patience` losses is below all those before them. A loss that is not a number counts
        as one that has not fallen."""
        known = [loss if math.isfinite(loss) else math.inf for loss in self._losses.values()]
        if self._patience is None or len(known) <= self._patience:
            return False
        return min(known[-self._patience :]) >= min(known[: -self._patience])
