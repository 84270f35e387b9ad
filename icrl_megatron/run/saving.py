"""The checkpoints of one run folder: where a run resumes, what is saved, and what is saved after an error.

run folder/progress.json      the newest saved step, so that a run whose checkpoints are gone does not restart from 0
run folder/model_files/       configuration, tokenizer, templates: copied into checkpoints and exports
run folder/checkpoints/       step_NNNNNN; step_NNNNNN.damaged is kept and not used
"""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.actor import checkpoint, manifest
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.side_files import read_side_files, write_side_files
from icrl_megatron.distributed.grid import Grid, barrier, gather_objects, run_on_all_ranks
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.settings.loading import KEPT_MODEL
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.step_names import step_name

CHECKPOINTS = "checkpoints"
LEDGER = "progress.json"
WAIT_S, HURRIED_WAIT_S = 30.0, 5.0
"""How long a failed rank waits for the others, which may hang in a collective; the second value applies once it was
asked to stop, as torchrun asks the remaining ranks when one has died."""

Log = Callable[[str], None]
Files = Mapping[str, Sequence[str]]
"""Lines of additional files in a checkpoint, by file name."""


@dataclass(frozen=True)
class Start:
    """Where a run begins or resumes; the same on every rank."""

    run_dir: Path
    run: str
    """Identifies the run folder in its checkpoints."""
    found: checkpoint.Checkpoint | None
    """The checkpoint that it resumes from; None: it begins."""
    model_path: Path
    """The original model folder; it may be gone once there is a checkpoint."""

    @property
    def model(self) -> Path:
        """The run's copy of the model's folder, without weights."""
        return self.run_dir / KEPT_MODEL

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer: the run's copy with a checkpoint, otherwise the original folder, for error
        messages."""
        return self.model_path if self.found is None else self.model

    @property
    def has_weights(self) -> bool:
        """Whether the starting weights can still be read."""
        return self.model_path.is_dir()

    @property
    def folder(self) -> Path:
        """The folder that actor and engines are built from: the original model folder, or the run's copy if that is
        gone."""
        return self.model_path if self.has_weights else self.model


def begin(run_dir: Path, model_path: Path, grid: Grid, log: Log) -> Start:
    """Finds and verifies the checkpoint that the run in `run_dir` resumes from, and copies the files of the model's
    folder other than weights. Collective over all ranks, which hold the run folder's lock.

    Raises ConfigError if the run had a checkpoint and has none now: it must not silently restart from step 0.
    """
    root = run_dir / CHECKPOINTS

    def first(work: Callable[[], str]) -> str:
        done = run_on_all_ranks(grid, lambda: work() if grid.rank == 0 else "")
        return str(gather_objects(grid, done)[0])

    def clean() -> str:
        for leftover in manifest.leftovers(root):
            shutil.rmtree(leftover, ignore_errors=True)
        return ""

    first(clean)
    found = checkpoint.newest(root, grid, log, set_aside=True)
    run = first(lambda: _ledger(run_dir, found, log))
    first(lambda: _keep_model(found.side_files if found is not None else model_path, run_dir / KEPT_MODEL))
    return Start(run_dir, run, found, model_path)


def require_weights(start: Start, settings: Settings) -> None:
    """Raises ConfigError if the model's folder is gone and a part of the run needs the starting weights again."""
    kind, why = settings.engine.kind, engine_kind(settings.engine.kind).needs_folder
    needs = {
        f"algo.kl_coef={settings.algo.kl_coef:g} (the reference model)": settings.algo.kl_coef > 0,
        "rollout.critic=frozen": settings.rollout.critic == "frozen",
        f"engine.kind={kind} ({why})": bool(why),
    }
    named = [what for what, needed in needs.items() if needed]
    if start.found is None:
        named.insert(0, "the first step, since there is no checkpoint yet,")
    if named and not start.has_weights:
        raise ConfigError(
            f"model.path={start.model_path}: the folder is gone, and {', '.join(named)} needs its weights; put a copy "
            "of the same model there, and run the same command again"
        )


@dataclass(frozen=True)
class _Completed:
    """The state after a step, for a checkpoint of it."""

    progress: checkpoint.SavedProgress
    beside: Callable[[], Files]
    begun: int
    """`Optimizer.begun` after the step."""


class Saver:
    """Saves the last completed step: when it is due, when the run ends, and when it fails. Collective over all
    ranks."""

    def __init__(self, start: Start, actor: Actor, keep: int, log: Log, stopping: Callable[[], bool]) -> None:
        """`log` prints on rank 0; `stopping` returns whether this rank was asked to stop."""
        self._start, self._actor, self._grid, self._keep = start, actor, actor.grid, keep
        self._log, self._stopping = log, stopping
        self._saved = start.found.progress.step if start.found is not None else None
        self._completed: _Completed | None = None
        self._failed = False
        self.best: int | None = None
        """The step that will be exported; its checkpoint is not deleted. None: the last step."""

    @property
    def run_dir(self) -> Path:
        return self._start.run_dir

    @property
    def model(self) -> Path:
        """The run's copy of the model's folder, without weights."""
        return self._start.model

    @property
    def folder(self) -> Path:
        """The checkpoint that the run resumes from; call it only if there is one."""
        assert self._start.found is not None
        return self._start.found.folder

    def restore(self) -> checkpoint.SavedProgress | None:
        """Loads the checkpoint that the run resumes from; None if it begins. Raises ConfigError as
        `Checkpoint.load`."""
        found = self._start.found
        if found is None:
            return None
        progress = found.load(self._actor.rows, self._actor.optimizer, self._grid)
        self._log(f"resuming from {found.folder}")
        return progress

    def load_best(self) -> None:
        """Replaces the weights by those of the step `best`, if that is not the last one. Call it after the last
        checkpoint is saved. Raises ConfigError as `checkpoint.load`."""
        if self.best is None or self.best == self._saved:
            return
        folder = self._start.run_dir / CHECKPOINTS / step_name(self.best)
        try:
            checkpoint.load(folder, self._actor.rows, self._actor.optimizer, self._grid)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. Or move it away: the same command then exports the step with the next lowest held-out loss"
            ) from error

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of the step."""
        return (self._start.run_dir / CHECKPOINTS / step_name(step)).is_dir()

    def completed(self, progress: checkpoint.SavedProgress, beside: Callable[[], Files] = dict) -> None:
        """Records a completed step and its progress. `beside` is called when it is saved, on all ranks."""
        self._completed = _Completed(progress, beside, self._actor.optimizer.begun)

    def save(self) -> None:
        """Saves the last completed step unless it is saved already. Raises as `checkpoint.save`."""
        done, actor = self._completed, self._actor
        if done is None or self._saved == done.progress.step:
            return
        root, self._failed = self._start.run_dir / CHECKPOINTS, True
        checkpoint.save(
            root,
            actor.rows,
            actor.optimizer,
            self._grid,
            done.progress,
            self._start.model,
            self._keep,
            done.beside(),
            self._start.run,
            self.best,
        )
        self._saved, self._failed = done.progress.step, False
        run_on_all_ranks(self._grid, self._note_saved)

    def _note_saved(self) -> None:
        if self._grid.rank == 0 and self._saved is not None:
            _write_ledger(self._start.run_dir, self._start.run, self._saved)

    @contextmanager
    def on_error(self) -> Iterator[None]:
        """Saves the last completed step if the body raises and the weights are still those of that step."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            try:
                self._save_after(error)
            except Exception as failed:  # the first error must always reach the user
                self._say(f"the last completed step could not be saved ({_line(failed)}); {self._standing()}")
            raise

    def _save_after(self, error: BaseException) -> None:
        done = self._completed
        if self._failed or done is None or done.progress.step in (0, self._saved):
            return  # saving itself failed, or there is nothing to lose
        if not barrier(self._grid, "icrl/failed", lambda: HURRIED_WAIT_S if self._stopping() else WAIT_S):
            self._explain(error, f"not all ranks could be reached, so nothing was saved; {self._standing()}")
            return
        mine = (done.progress.step, self._actor.optimizer.begun == done.begun)
        everyone = gather_objects(self._grid, mine)
        if any(theirs != everyone[0] for theirs in everyone) or not all(unchanged for _, unchanged in everyone):
            self._explain(error, f"an update had begun to change the weights, so nothing was saved; {self._standing()}")
            return
        try:
            self.save()
        except (ConfigError, HopelessError) as failed:
            self._explain(error, f"{failed}; {self._standing()}")
            return
        self._say(f"saved step {self._saved}, the last completed one")

    def _explain(self, error: BaseException, message: str) -> None:
        """Logs why nothing was saved, unless the run ends with a one-line remedy, such as for a full disk."""
        if not isinstance(error, ConfigError):
            self._say(message)

    def _standing(self) -> str:
        if self._saved is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {step_name(self._saved)}"

    def _say(self, message: str) -> None:
        if self._grid.rank == 0:
            self._log(message)
        else:
            print(message, file=sys.stderr)


def _ledger(run_dir: Path, found: checkpoint.Checkpoint | None, log: Log) -> str:
    """The run's id, from its progress.json, which is created if needed. On rank 0. Raises as `begin`."""
    path, root = run_dir / LEDGER, run_dir / CHECKPOINTS
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        run, saved = str(known["run"]), int(known["saved_step"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        run, saved = "", 0
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    reached = found.progress.step if found is not None else 0
    if found is None:
        _check_never_saved(run_dir, run, saved, log)
    elif saved > reached and not (root / f"{step_name(saved)}{manifest.DAMAGED}").exists():
        log(f"{root}: step {saved} was saved last and is missing; {found.folder.name} is the newest")
    if not run or saved != reached:
        run = run or uuid.uuid4().hex
        _write_ledger(run_dir, run, reached)
    return run


def _check_never_saved(run_dir: Path, run: str, saved: int, log: Log) -> None:
    """For a run without checkpoints: raises ConfigError unless it certainly never had one."""
    remedy = "Put the checkpoints back there, or begin a new run with another run_dir or name"
    root = run_dir / CHECKPOINTS
    if saved > 0:
        raise ConfigError(f"{root}: step {saved} was saved, and no checkpoint is there now. {remedy}")
    rows = read_rows(run_dir / METRICS_FILE)
    if not run and (rows or (run_dir / LEDGER).exists()):
        raise ConfigError(
            f"{run_dir} holds a run, but it has neither checkpoints nor a readable {LEDGER}, which says whether there "
            f"were any. {remedy}"
        )
    if rows and rows[-1]["step"] > 0:
        log(f"the run ended at step {rows[-1]['step']:g} before its first checkpoint, and begins again")


def _write_ledger(run_dir: Path, run: str, saved: int) -> None:
    with disk_errors(run_dir, LEDGER):
        write_atomically(run_dir / LEDGER, [json.dumps({"run": run, "saved_step": saved})])


def _keep_model(source: Path, kept: Path) -> str:
    """Copies a model's side files to `kept`, which is replaced if this program wrote it. If the source is gone, the
    existing copy stays. Raises ConfigError if `kept` holds anything else."""
    if not source.is_dir() and (kept / "config.json").exists():
        return ""
    files = read_side_files(source)
    with results.writing(kept, results.MODEL_FILES, remedy=results.MOVE_AWAY) as folder:
        with disk_errors(kept, "the model's configuration and tokenizer"):
            write_side_files(files, folder)
    return ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
