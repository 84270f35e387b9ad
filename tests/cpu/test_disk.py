"""Full, read-only and forbidden disks: one line with path, size and remedy, and no partly written file is left."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from disks import AS_NOBODY, fill, python, read_only, small_disk
from matplotlib.figure import Figure
from safetensors.torch import save_file
from whole_runs import kill_tree, start, train

from icrl_megatron.data.curriculum import append_history
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.writer import MetricsWriter, read_rows
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors, free_bytes, require_space, size_text
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile, locked, save_picture, write_atomically

TENSORS = {"x": torch.zeros(300_000)}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 512) as mounted:
        yield mounted


def _result(disk: Path) -> None:
    with results.writing(disk / "out", results.MODEL) as folder, disk_errors(disk / "out", "the export (1.1 MiB)"):
        save_file(TENSORS, folder / "model.safetensors")


def _wrapped(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def writer(disk: Path) -> None:
        with disk_errors(disk / "out", "the weights (1.1 MiB)"):
            write(disk / "out")

    return writer


def _torch_to_file(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(TENSORS, file)


def _lock(disk: Path) -> None:
    with locked(disk / "out", ".lock"):
        raise AssertionError("a lock on a disk that cannot be written")


WRITERS: dict[str, Callable[[Path], object]] = {
    "lines": lambda disk: write_atomically(disk / "out", ["x" * 1000] * 600, "the rollouts"),
    "record": lambda disk: AppendFile(disk / "out", "the metrics").write(bytes(600_000)),
    "picture": lambda disk: save_picture(Figure(figsize=(40, 40)), disk / "out"),
    "settings": lambda disk: settings_module.save(Settings(), disk / "out"),
    "history": lambda disk: append_history(disk / "out", 1, {str(i): 0.5 for i in range(60_000)}),
    "metrics": lambda disk: MetricsWriter(disk / "out", None).write(1, {str(i): 0.5 for i in range(60_000)}),
    "result": _result,
    "safetensors": _wrapped(lambda path: save_file(TENSORS, path)),
    "torch": _wrapped(lambda path: torch.save(TENSORS, path)),
    "torch to a file": _wrapped(_torch_to_file),
    "distributed checkpoint": _wrapped(lambda path: dcp.save(TENSORS, checkpoint_id=path)),
    "numpy": _wrapped(lambda path: np.save(path, np.zeros(300_000))),
}


def said(write: Callable[[Path], object], disk: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        write(disk)
    message = str(refused.value)
    assert "\n" not in message and message.startswith(f"{disk}/out")
    return message


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_reported(name: str, disk: Path) -> None:
    fill(disk, leave_kib=0 if name in ("settings", "picture") else 64)
    message = said(WRITERS[name], disk)
    assert "the disk is full" in message and "KiB free" in message and "choose a folder on another disk" in message
    assert name == "picture" or "iB)" in message  # the size
    left = [p for p in disk.rglob("*") if p.is_file() and p.name != "filler" and p.stat().st_size]
    if not name.startswith(("torch", "distributed", "numpy")):  # their callers write into new folders
        assert all(p.name.endswith(".jsonl") or "tfevents" in p.name or p.stat().st_size == 0 for p in left), left
        assert not [p for p in disk.rglob("*") if "tmp" in p.name]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*WRITERS, "lock"])
def test_a_read_only_disk_is_reported(name: str, disk: Path) -> None:
    read_only(disk)
    assert "the file system is read-only; mount it for writing" in said({**WRITERS, "lock": _lock}[name], disk)


FORBIDDEN = f"""
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_disk
from icrl_megatron.utils.errors import ConfigError
{AS_NOBODY}
for name, write in {{**test_disk.WRITERS, "lock": test_disk._lock}}.items():
    try:
        write(Path(sys.argv[1]))
    except ConfigError as error:
        print(name, error, sep=": ")
"""


def test_a_folder_without_write_permission_is_reported(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest's own folders are private
        folder.chmod(0o755)
    here = Path(__file__).parent
    code, out, err = python(FORBIDDEN, str(tmp_path), str(here), str(here.parent))
    assert code == 0, err
    found = dict(line.split(": ", 1) for line in out.splitlines())
    assert found.keys() == {*WRITERS, "lock"}
    for message in found.values():
        assert "permission denied; change the permissions, or choose a folder that you may write to" in message
        assert message.startswith(f"{tmp_path}/out")


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    reset = ConnectionResetError(errno.ECONNRESET, "reset")
    for error in (reset, FileNotFoundError(errno.ENOENT, "gone"), RuntimeError("shape"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as passed, disk_errors(tmp_path, "it"):
            raise error
        assert passed.value is error


def test_a_full_quota_is_reported(tmp_path: Path) -> None:
    """Only the errno is tested, because no quota can be set up here."""
    with pytest.raises(ConfigError, match=r"your disk quota is used up \(.* free\); delete files of yours there"):
        with disk_errors(tmp_path, "it"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_space_is_required_on_the_disk_of_a_folder_that_does_not_exist_yet(disk: Path) -> None:
    fill(disk, leave_kib=256)
    require_space(disk / "not" / "there", 200 << 10, "the checkpoint of step 20")
    with pytest.raises(ConfigError) as refused:
        require_space(disk / "not" / "there", 3 << 30, "the checkpoint of step 20")
    assert str(refused.value) == (
        f"{disk}/not/there: not enough disk space for the checkpoint of step 20: it needs 3.0 GiB, "
        f"{size_text(free_bytes(disk))} are free; free some space there, or choose a folder on another disk"
    )
    assert (size_text(123), size_text(5 << 20), size_text(1234 << 20)) == ("0.1 KiB", "0.0049 GiB", "1.2 GiB")


def test_a_record_is_written_completely_or_not_at_all(disk: Path) -> None:
    """A nearly full disk accepts the beginning of a record."""
    file, path = AppendFile(disk / "metrics.jsonl", "the metrics"), disk / "metrics.jsonl"
    with pytest.raises(ConfigError, match=r"the metrics \(1\.0 KiB\): the disk is full"):
        while True:
            file.write(b"x" * 999 + b"\n")
    assert path.stat().st_size % 1000 == 0 and path.stat().st_size % 4096 != 0


METRICS = """
import sys
from pathlib import Path
from icrl_megatron import cli
from icrl_megatron.telemetry.writer import MetricsWriter
def run():
    writer = MetricsWriter(Path(sys.argv[1]), None)
    for step in range(1, 10**6):
        writer.write(step, {"reward": 0.5, "loss": 1.5})
cli.app = run
cli.main()
"""


def test_metrics_on_a_full_disk_end_with_a_complete_row_and_one_message(disk: Path) -> None:
    """TensorBoard's own writer would print the traceback of a thread, and a buffered file one at exit."""
    filler = fill(disk, leave_kib=64)
    code, out, err = python(METRICS, str(disk / "run"))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {disk}/run/") and err.count("\n") == 1 and "the disk is full" in err
    rows = read_rows(disk / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 100
    assert (disk / "run" / "metrics.jsonl").read_bytes().endswith(b"}\n")
    filler.unlink()
    writer = MetricsWriter(disk / "run", len(rows) - 5)
    writer.write(len(rows) - 4, {"reward": 1.0})
    writer.close()
    assert read_rows(disk / "run" / "metrics.jsonl")[-1] == {"step": len(rows) - 4, "reward": 1.0}


@pytest.mark.parametrize("fault", ["full", "read_only"])
def test_a_run_whose_disk_fails_ends_with_one_line(fault: str, finished_run: Path, tmp_path: Path) -> None:
    model = ("model.init=null", f"model.path={finished_run / 'warm_start' / 'hf'}", "warm_start.steps=0")
    # Files that are open stay writable on the read-only disk, so there the next checkpoint fails.
    interval = 10 if fault == "read_only" else 100_000
    with small_disk(tmp_path / "disk", 65_536) as disk:
        settings = ("steps=5000", f"checkpoint.interval={interval}", "eval.interval=0")
        process = start(*train(disk / "run", *model, *settings))
        try:
            while len(read_rows(disk / "run" / "metrics.jsonl")) < 2:
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            if fault == "full":
                fill(disk)
            else:
                read_only(disk)
            out, err = process.communicate(timeout=120)
        except BaseException:
            kill_tree(process)
            raise
        shown = [line for line in err.splitlines() if not line.startswith(("starting", "rulebook_easy"))]
        errors, before = shown[-1:], " ".join(shown[:-1])
        assert process.returncode == 2, err
        assert errors[0].startswith(f"error: {disk}/run"), err
        # The dump may fail before the metrics do; that is reported and does not end the run.
        assert not before or re.match(r"step \d+: episodes are not dumped, training goes on", before), err
        assert " ".join(err.split()).count("cannot write") == 1 + bool(before), err
        assert ("the disk is full" if fault == "full" else "read-only") in errors[0]
        assert "Traceback" not in err and "rank" not in errors[0] and not out
