"""Checkpoints that survive crashes, detect damage, and load into any grid.

A checkpoint holds, for every Hugging Face tensor, the fp32 main weight and both moments as rectangles in safetensors
files (`shards.py`), the model's configuration and tokenizer, and a record with the checksum of each file
(`manifest.py`). Any TP x PP x DP grid reads the parts that it needs. A folder gets its final name only when it is
complete and synced to disk, so after a crash the last good checkpoint remains.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from icrl_megatron.actor import manifest as manifests
from icrl_megatron.actor.manifest import META, PART, DamagedError, Manifest, SavedProgress, complete
from icrl_megatron.actor.optimizer import STATES, Optimizer
from icrl_megatron.actor.shards import INDEX, ShardReader, ShardWriter, WrittenShards, write_index
from icrl_megatron.actor.side_files import read_side_files
from icrl_megatron.distributed.grid import (
    Failure,
    Grid,
    attempt,
    gather_objects,
    raise_failures,
    run_on_all_ranks,
    sum_over_ranks,
)
from icrl_megatron.model.weights import Slice, WeightRow
from icrl_megatron.utils.disk import disk_errors, require_space
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.files import sync
from icrl_megatron.utils.step_names import step_name, step_of

__all__ = ["META", "SIDE_FILES", "Checkpoint", "NonFiniteError", "SavedProgress", "complete", "find", "load", "save"]

T = TypeVar("T")

SIDE_FILES = "model"
_BYTES = 4 * len(STATES)
"""Bytes per weight, including its moments."""
_SPARE_BYTES, _SPARE_SHARE = 1 << 16, 0.002
"""Reserve for headers, the index, and rounding of file sizes to blocks: bytes, plus a share of the tensors' bytes."""
_READERS = 4
"""Files that a rank verifies concurrently."""


class NonFiniteError(HopelessError):
    """Weights or moments contain NaN or infinity; nothing was saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with verified files."""

    folder: Path
    manifest: Manifest

    @property
    def progress(self) -> SavedProgress:
        return self.manifest.progress

    @property
    def side_files(self) -> Path:
        """The model's configuration and tokenizer, a Hugging Face folder without weights."""
        return self.folder / SIDE_FILES

    def load(self, rows: list[WeightRow], optimizer: Optimizer, grid: Grid) -> SavedProgress:
        """Reads weights and optimizer state into this grid, whatever grid wrote them. Collective over all ranks.

        Raises ConfigError, on all ranks, if the checkpoint holds another model or cannot be read.
        """

        def work() -> None:
            reader = ShardReader(self.folder, self.manifest.files)
            for row in rows:
                states = {n: row.join([reader.read(f"{n}/{part.name}", part) for part in row.slices]) for n in STATES}
                optimizer.write(row.param, {n: t.to(row.param.device) for n, t in states.items()})

        run_on_all_ranks(grid, lambda: _named(self.folder, work))
        optimizer.steps = self.progress.optimizer_steps
        return self.progress


def save(
    root: Path,
    rows: list[WeightRow],
    optimizer: Optimizer,
    grid: Grid,
    progress: SavedProgress,
    like: Path,
    keep: int | None = None,
    beside: Mapping[str, Sequence[str]] | None = None,
    run: str = "",
    best: int | None = None,
) -> Path:
    """Writes `root/step_NNNNNN`, then deletes all but the newest `keep` checkpoints of the same `run` (None: none is
    deleted) and the one of the step `best`. Collective over all ranks; errors are raised on all of them.

    The configuration and tokenizer of the Hugging Face folder `like` are included, so that a checkpoint can be exported
    without other files. `beside`: lines of additional files, by file name. All ranks share the writing, and each holds
    at most a few files (`shards.FILE_BYTES`) in host memory.

    Raises NonFiniteError, and ConfigError if the disk is full or the write fails, or if the step was saved before.
    `root` is then unchanged.
    """
    _check_finite(rows, optimizer, grid, progress.step)
    final = root / step_name(progress.step)
    part, what = final.with_name(final.name + PART), f"the checkpoint of step {progress.step}"
    lines = {name: "".join(f"{line}\n" for line in of).encode() for name, of in (beside or {}).items()}
    tensor_bytes = int(sum_over_ranks(grid, {"": float(_bytes_to_write(rows, grid))})[""])

    def begin() -> dict[str, bytes]:
        files = lines | {f"{SIDE_FILES}/{name}": data for name, data in read_side_files(like).items()}
        spare = _SPARE_BYTES + int(_SPARE_SHARE * tensor_bytes)
        require_space(root, tensor_bytes + sum(map(len, files.values())) + spare, what)
        if final.exists():
            raise ConfigError(
                f"{final}: a checkpoint of this step already exists; move it away, or choose another folder"
            )
        _delete(part)
        part.mkdir(parents=True)
        return files

    def first(work: Callable[[], T], what: str) -> T | None:
        def on_disk() -> T | None:
            with disk_errors(root, what):
                return work() if grid.rank == 0 else None

        return run_on_all_ranks(grid, on_disk)

    try:
        files = first(begin, what)
        written = _write(part, rows, optimizer, grid, what)
        first(lambda: _finish(part, final, Manifest(progress, run, {}), files or {}, written), what)
    except BaseException:
        if grid.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise
    if keep is not None:
        first(lambda: _delete_old(final, keep, run, best), "the deletion of older checkpoints")
    return final


def load(folder: Path, rows: list[WeightRow], optimizer: Optimizer, grid: Grid) -> SavedProgress:
    """Verifies one checkpoint and reads it into this grid. Collective over all ranks. Raises ConfigError if it is
    damaged, cannot be read, or is of another model or version."""
    return _opened(folder, grid).load(rows, optimizer, grid)


def find(source: Path, grid: Grid | None = None, log: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint `source`, or the newest good one if `source` is a folder of them; `log` reports damaged ones.
    Collective over all ranks of `grid`; None: this process only.

    Raises ConfigError if a checkpoint named by the user is damaged, or there is no good one.
    """
    if (source / META).exists() or step_of(source.name) is not None:
        return _opened(source, grid)
    found = newest(source, grid, log)
    if found is None:
        raise ConfigError(
            f"{source}: no complete checkpoint there; give a step_NNNNNN folder or the folder that has them"
        )
    return found


def newest(root: Path, grid: Grid | None, log: Callable[[str], None], set_aside: bool = False) -> Checkpoint | None:
    """The newest undamaged checkpoint under `root`; None if there is no checkpoint. Collective over all ranks of
    `grid`, with the same result.

    Damaged ones are skipped with one message and, with `set_aside`, renamed to step_NNNNNN.damaged. Raises ConfigError
    if all are damaged, or if one cannot be read now or is of another version, since that does not prove damage.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for folder in reversed(_first_rank(grid, lambda: complete(root))):
        try:
            found = Checkpoint(folder, _verify(folder, grid))
        except DamagedError as error:
            damaged.append((folder, error))
            continue
        if step_name(found.progress.step) != folder.name:
            raise ConfigError(f"{folder}: holds step {found.progress.step}; restore the name of the folder")
        if damaged:
            listed = "; ".join(f"{bad.name}: {why}" for bad, why in damaged)
            kept = _first_rank(grid, lambda: [_set_aside(bad) for bad, _ in damaged]) if set_aside else []
            where = f" (kept as {', '.join(path.name for path in kept)})" if kept else ""
            log(f"{root}: damaged checkpoint{where}, using {folder.name} instead. {listed}")
        return found
    if damaged:
        listed = "; ".join(f"{bad.name}: {why}" for bad, why in damaged)
        raise ConfigError(
            f"{root}: all checkpoints are damaged ({listed}). Put a good copy of one in its place, or begin a new run "
            "with another run_dir"
        )
    return None


def _opened(folder: Path, grid: Grid | None) -> Checkpoint:
    return _named(folder, lambda: Checkpoint(folder, _verify(folder, grid)))


def _named(folder: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except DamagedError as error:
        raise ConfigError(
            f"{folder}: damaged checkpoint ({error}); put a good copy in its place, or use another checkpoint"
        ) from error


def _verify(folder: Path, grid: Grid | None) -> Manifest:
    """Each rank reads a share of the files. Raises DamagedError or ConfigError, the same on every rank."""
    rank, world = (0, 1) if grid is None else (grid.rank, grid.world)

    def check() -> Manifest:
        found = manifests.read(folder)
        mine = manifests.shares(found.files, world)[rank]
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(lambda name: manifests.check_file(folder, name, found.files[name]), mine):
                pass
        return found

    found, failed = attempt(check)
    damage = (failed.file, failed.reason) if isinstance(failed, DamagedError) else None
    broken = failed if damage is None else None
    everyone = _gather(grid, (damage, Failure.of(broken) if broken is not None else None))
    raise_failures(broken, [failure for _, failure in everyone])
    for other, (named, _) in enumerate(everyone):
        if named is not None:
            _confirm(folder, DamagedError(*named), other, grid)
            raise DamagedError(*named)
    assert found is not None
    return found


def _confirm(folder: Path, damage: DamagedError, seen_by: int, grid: Grid | None) -> None:
    """Rank 0 reads the file again. Raises ConfigError if it finds no damage: then the other rank's machine sees the
    file system differently, which does not prove damage."""

    def again() -> bool:
        try:
            found = manifests.read(folder)
            if damage.file in found.files:
                manifests.check_file(folder, damage.file, found.files[damage.file])
        except DamagedError:
            return True
        return False

    if not _first_rank(grid, again):
        raise ConfigError(
            f"{folder}: {damage} when rank {seen_by} reads it, but not when rank 0 does; check the file system of that "
            "rank's machine, and run the same command again"
        )


def _gather(grid: Grid | None, mine: T) -> list[T]:
    return [mine] if grid is None else gather_objects(grid, mine)


def _first_rank(grid: Grid | None, work: Callable[[], T]) -> T:
    """Returns on every rank the result of `work` on rank 0; raises on every rank what it raises there."""
    if grid is None:
        return work()
    done = run_on_all_ranks(grid, lambda: work() if grid.rank == 0 else None)
    result: T = gather_objects(grid, done)[0]
    return result


def _set_aside(folder: Path) -> Path:
    kept = manifests.set_aside_name(folder)
    with disk_errors(folder, f"the new name {kept.name} of the damaged checkpoint"):
        folder.rename(kept)
    return kept


def _check_finite(rows: list[WeightRow], optimizer: Optimizer, grid: Grid, step: int) -> None:
    """Raises NonFiniteError on all ranks if any rank has a value that is not finite."""
    broken = ((row.name, state) for row in rows if (state := optimizer.non_finite(row.param)))
    for found in gather_objects(grid, next(broken, None)):
        if found is not None:
            raise NonFiniteError(
                f"step {step} was not saved: the {_STATE_NAMES[found[1]]} of {found[0]} are not all finite, so an "
                "update destroyed the model. Earlier checkpoints are untouched: lower optim.learning_rate or raise "
                "optim.eps, and resume from the newest one"
            )


_STATE_NAMES = dict(zip(STATES, ("weights", "first moments", "second moments"), strict=True))


def _to_write(rows: list[WeightRow], grid: Grid) -> Iterator[tuple[WeightRow, list[tuple[int, Slice]]]]:
    """Each row with the (index, rectangle)s of it that this rank writes. Data-parallel and
    context-parallel ranks, which have the same weights, alternate; a tensor that is not sharded is written by the first
    rank of its tensor-parallel group."""
    copies, own = grid.data * grid.context, grid.data_rank * grid.context + grid.context_rank
    for number, row in enumerate(rows):
        mine = not row.duplicate and number % copies == own
        parts = [(i, p) for i, p in enumerate(row.slices) if p.size != p.full or grid.tensor_rank == 0]
        yield row, [(i, p) for i, p in parts if mine and 0 not in p.size]


def _bytes_to_write(rows: list[WeightRow], grid: Grid) -> int:
    return sum(_BYTES * math.prod([*p.size]) for _, parts in _to_write(rows, grid) for _, p in parts)


def _write(part: Path, rows: list[WeightRow], optimizer: Optimizer, grid: Grid, what: str) -> list[WrittenShards]:
    """Writes this rank's rectangles; returns what each rank has written. A rank that fails still takes part in the
    collectives, so that the others do not hang; then all ranks raise."""
    writer = ShardWriter(part, grid.rank)
    failed: BaseException | None = None

    def add(state: str, whole: Tensor, row: WeightRow, parts: list[tuple[int, Slice]]) -> None:
        with disk_errors(part.parent, what):
            pieces = row.split(whole)
            for index, rectangle in parts:
                writer.add(f"{state}/{rectangle.name}", pieces[index], rectangle)

    def close() -> WrittenShards:
        with disk_errors(part.parent, what):
            return writer.close()

    for row, parts in _to_write(rows, grid):
        for state, whole in optimizer.read(row.param):
            if parts and failed is None:
                _, failed = attempt(partial(add, state, whole, row, parts))
    written, not_closed = attempt(close)
    failed = failed or not_closed
    everyone = gather_objects(grid, (written, None if failed is None else Failure.of(failed)))
    raise_failures(failed, [failure for _, failure in everyone])
    return [of for of, _ in everyone]


def _finish(
    part: Path, final: Path, manifest: Manifest, files: Mapping[str, bytes], written: Sequence[WrittenShards]
) -> None:
    """Writes everything but the shards, the record last, and then renames the folder. Only on rank 0."""
    records = {name: record for of in written for name, record in of.files.items()}
    records[INDEX] = write_index(part, (piece for of in written for piece in of.pieces))
    for name, data in files.items():
        records[name] = manifests.write_file(part / name, data)
    manifests.write(part, replace(manifest, files=records))
    for folder in (*(p for p in part.rglob("*") if p.is_dir()), part):
        sync(folder)
    part.rename(final)
    sync(final.parent)


def _delete_old(final: Path, keep: int, run: str, best: int | None) -> None:
    """Deletes the oldest checkpoints of `run` up to `final`, until `keep` are left, but never that of the step `best`,
    and nothing else."""
    mine = [p for p in complete(final.parent) if p == final or _run_of(p) == run]
    for old in mine[: mine.index(final) + 1][:-keep]:
        if step_of(old.name) == best:
            continue
        part = old.with_name(old.name + PART)
        _delete(part)
        old.rename(part)  # if the process is killed here, no checkpoint looks damaged
        _delete(part)


def _run_of(folder: Path) -> str | None:
    try:
        return manifests.read(folder).run
    except (DamagedError, ConfigError):
        return None


def _delete(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
