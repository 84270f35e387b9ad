"""Result folders whose writers are killed, run concurrently, or lack permission."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from disks import AS_NOBODY, python
from result_folders import write

from icrl_megatron.utils import results

WRITES_REPEATEDLY = """
import sys
from pathlib import Path
from icrl_megatron.utils import results
target, first, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if mode == "two renames":
    results._exchanged = lambda one, other: False
print("ready", flush=True)
for number in range(first, 10**9):
    with results.writing(target, results.MODEL) as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text(str(number) * 1000)
"""


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_writer_killed_at_any_time_leaves_a_complete_result(mode: str, tmp_path: Path) -> None:
    target, appeared = tmp_path / "out", False
    for killed in range(8):
        command = [sys.executable, "-c", WRITES_REPEATEDLY, str(target), str(killed + 1), mode]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.03 + 0.023 * killed)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Between the two renames, the old result is in the temporary folder; the next writer restores it.
        aside = [p for p in tmp_path.glob(".out.*") if (p / "replaced").exists() or (p / "out" / "a").exists()]
        assert target.exists() or (mode == "two renames" and aside) or not appeared
        appeared = appeared or target.exists()
        if target.exists():
            assert len({(target / name).read_text() for name in ("a", "b", "c")}) == 1
    assert appeared
    for left in tmp_path.glob(".out.*"):  # a writer that was killed before it took its lock: cleaned up by age
        os.utime(left, (0, 0))
    write(target, results.MODEL, "last")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


EXITS_BETWEEN_RENAMES = """
import os, sys
from pathlib import Path
from icrl_megatron.utils import results
results._exchanged = lambda one, other: False
target, real = Path(sys.argv[1]), Path.rename
def rename(path, to):
    real(path, to)
    if Path(to).name == "replaced":
        os._exit(9)
Path.rename = rename
with results.writing(target, results.MODEL) as folder:
    (folder / "a.json").write_text("new")
"""


def test_old_result_is_restored_after_a_crash_between_renames(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, results.MODEL, "old")
    assert python(EXITS_BETWEEN_RENAMES, str(target))[0] == 9
    assert not target.exists()
    with suppress(ZeroDivisionError), results.writing(target, results.MODEL):
        raise ZeroDivisionError
    assert (target / "a.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A target that a running process is writing."""
    program = WRITES_REPEATEDLY.replace('for name in ("a", "b", "c"):', "sys.stdin.read()\n        for name in ('a',):")
    silent = program.replace('print("ready", flush=True)', "")
    command = [sys.executable, "-c", silent, str(tmp_path / "out"), "1", ""]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    while not list(tmp_path.glob(".out.*/out")):
        assert process.poll() is None
        time.sleep(0.01)
    yield tmp_path / "out"
    process.kill()
    process.communicate()


def test_folder_of_another_writer_is_kept(held: Path) -> None:
    (other,) = held.parent.glob(".out.*")
    write(held, results.MODEL, "mine")
    assert other.is_dir() and (held / "a.json").read_text() == "mine"


def test_concurrent_writers_leave_one_complete_result(tmp_path: Path) -> None:
    program = WRITES_REPEATEDLY.replace("10**9", "first + 20")
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    started = [subprocess.Popen([*command, str(100 * i), ""], stdout=subprocess.PIPE) for i in range(1, 4)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    for process in started:
        process.communicate()
    assert len({(tmp_path / "out" / name).read_text() for name in ("a", "b", "c")}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# Permissions.

WITH_UMASK = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from matplotlib.figure import Figure
from icrl_megatron.utils import results
from icrl_megatron.utils.files import AppendFile, save_picture, write_atomically
os.umask(int(sys.argv[1], 8))
out = Path(sys.argv[2])
with results.writing(out / "model", results.MODEL) as folder:
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    shutil.copytree(sys.argv[3], folder / "copied")
write_atomically(out / "settings.yaml", ["a"])
save_picture(Figure(), out / "curve.png")
AppendFile(out / "logs" / "metrics.jsonl", "x").write(b"a")
"""


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(mask: int, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "tokenizer.json").touch(mode=0o400)
    code, _, err = python(WITH_UMASK, oct(mask), str(tmp_path / "out"), str(private))
    assert code == 0, err
    modes = {str(p.relative_to(tmp_path / "out")): p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert len(modes) == 9
    assert modes == {name: (0o777 if (tmp_path / "out" / name).is_dir() else 0o666) & ~mask for name in modes}


AS_ANOTHER = f"""
import sys
from pathlib import Path
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils import results
{AS_NOBODY}
try:
    results.check(Path(sys.argv[1]), results.MODEL, overwrite=True)
except ConfigError as error:
    print(error)
"""


def test_missing_permissions_are_found_before_any_work(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest's own folders are private
        folder.chmod(0o755)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "shared" / "hers").mkdir(mode=0o755)
    for target in (tmp_path / "out", tmp_path / "out" / "deep", tmp_path / "shared" / "hers"):
        code, out, err = python(AS_ANOTHER, str(target))
        assert (code, err) == (0, "")
        assert out == (
            f"{target}: cannot write the Hugging Face export: permission denied; change the permissions, or choose a "
            "folder that you may write to\n"
        )
    assert python(AS_ANOTHER, str(tmp_path / "shared" / "his"))[:2] == (0, "")
