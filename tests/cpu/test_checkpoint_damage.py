"""Damaged checkpoints: every damaged byte is found, the newest intact checkpoint is used, and a checkpoint that only
cannot be read now is not treated as damaged."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the stand-ins for CUDA would hide the GPU from other tests of this process", allow_module_level=True)

from actors import load, make_actor, same, save, step, weights
from commands import python, run
from safetensors.torch import save_file

from icrl_megatron.actor import checkpoint, manifest
from icrl_megatron.actor.actor import Actor
from icrl_megatron.distributed import grid as grids
from icrl_megatron.utils.errors import ConfigError

NOBODY = 65534


@pytest.fixture(scope="module")
def saved(folder: Path, grid: grids.Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    actor = make_actor(folder, grid)
    for number in (1, 2):
        step(actor, seed=number)
        save(actor, folder, root, number)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest(root: Path, grid: grids.Grid) -> tuple[Path, list[str]]:
    """The checkpoint from which a run would resume, and its messages."""
    said: list[str] = []
    found = checkpoint.newest(root, grid, said.append, set_aside=True)
    assert found is not None
    return found.folder, said


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def files(root: Path) -> list[str]:
    step_2 = root / "step_000002"
    return sorted(p.relative_to(step_2).as_posix() for p in step_2.rglob("*") if p.is_file())


def test_a_checkpoint_lists_every_file_with_its_checksum(saved: Path) -> None:
    listed = json.loads((saved / "step_000002" / "icrl.json").read_text())["files"]
    assert sorted([*listed, "icrl.json"]) == files(saved)
    for name, record in listed.items():
        path = saved / "step_000002" / name
        assert record == {"bytes": path.stat().st_size, "sha256": run("sha256sum", path).stdout.split()[0]}


@pytest.mark.parametrize("how", ["first", "middle", "last", "cut", "longer", "empty", "gone"])
def test_after_damage_the_checkpoint_before_is_used(saved: Path, grid: grids.Grid, tmp_path: Path, how: str) -> None:
    """There is one message, and the damaged folder is kept unchanged under another name."""
    for number, name in enumerate(files(saved)):
        root = shutil.copytree(saved, tmp_path / str(number))
        path = root / "step_000002" / name
        data, size = path.read_bytes(), path.stat().st_size
        if how in ("first", "middle", "last"):
            flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[how])
        elif how == "gone":
            path.unlink()
        else:
            path.write_bytes({"cut": data[: size // 3], "longer": data + b" ", "empty": b""}[how])
        if (name, how) == ("icrl.json", "longer"):
            continue  # a space after JSON means nothing
        damaged = sorted(p.name for p in (root / "step_000002").rglob("*"))
        found, said = newest(root, grid)
        assert found == root / "step_000001", name
        assert len(said) == 1 and name in said[0] and "step_000002.damaged" in said[0], said
        assert names(root) == ["step_000001", "step_000002.damaged"]
        assert sorted(p.name for p in (root / "step_000002.damaged").rglob("*")) == damaged


def test_every_flipped_bit_of_the_record_is_found(root: Path) -> None:
    folder = root / "step_000002"
    whole, good = (folder / "icrl.json").read_bytes(), manifest.read(folder)
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            (folder / "icrl.json").write_bytes(data)
            with pytest.raises(manifest.DamagedError, match=r"icrl\.json"):
                manifest.read(folder)
    (folder / "icrl.json").write_bytes(whole)
    assert manifest.read(folder) == good


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{}", '{"step": 4}', "[" * 100_000, '"' + "x" * 50, "\0" * 64])
def test_a_malformed_record_is_damage(root: Path, text: str) -> None:
    (root / "step_000002" / "icrl.json").write_text(text)
    with pytest.raises(manifest.DamagedError, match=r"icrl\.json"):
        manifest.read(root / "step_000002")


def test_the_step_of_a_damaged_checkpoint_is_saved_again(make: Callable[..., Actor], folder: Path, root: Path) -> None:
    intact = make()
    load(intact, root / "step_000002")
    expected = weights(intact)
    flip(next((root / "step_000002").glob("rank_*")), 5000)
    found, _ = newest(root, intact.grid)
    actor = make()
    load(actor, found)
    step(actor, seed=2)
    assert same(weights(actor), expected)
    again = save(actor, folder, root, 2)
    resumed = make()
    load(resumed, again)
    assert same(weights(resumed), expected)
    assert names(root) == ["step_000001", "step_000002", "step_000002.damaged"]


def test_all_damaged_checkpoints_of_a_step_are_kept(saved: Path, root: Path, grid: grids.Grid) -> None:
    earlier = ["step_000002.damaged", "step_000002.damaged2"]
    for name in earlier:
        shutil.copytree(saved / "step_000002", root / name)
    (root / "step_000002" / "index.json").unlink()
    newest(root, grid)
    assert names(root) == ["step_000001", *earlier, "step_000002.damaged3"]


def test_a_run_with_only_damaged_checkpoints_is_not_started_from_the_beginning(root: Path, grid: grids.Grid) -> None:
    for name in ("step_000001", "step_000002"):
        (root / name / "icrl.json").unlink()
    stops_with(root, grid, r"all checkpoints are damaged \(step_000002: icrl\.json is missing; step_000001")


def test_a_damaged_checkpoint_given_by_path_is_refused(make: Callable[..., Actor], root: Path) -> None:
    flip(next((root / "step_000002").glob("rank_*")), -9)
    before = names(root)
    for read in (lambda: checkpoint.find(root / "step_000002"), lambda: load(make(), root / "step_000002")):
        with pytest.raises(ConfigError, match=r"step_000002: damaged checkpoint \(rank_00000_0000\.safetensors has"):
            read()
    said: list[str] = []
    assert checkpoint.find(root, log=said.append).folder == root / "step_000001"
    assert len(said) == 1
    assert names(root) == before  # only the run itself renames its checkpoints


def stops_with(root: Path, grid: grids.Grid, match: str) -> None:
    """Resuming is refused with this error, and no checkpoint is renamed."""
    before = names(root)
    with pytest.raises(ConfigError, match=match):
        newest(root, grid)
    assert names(root) == before


@pytest.mark.parametrize("name", ["icrl.json", "index.json", "model/tokenizer.json"])
def test_a_file_without_read_permission_is_not_damage(saved: Path, grid: grids.Grid, name: str) -> None:
    with tempfile.TemporaryDirectory() as public:
        root = shutil.copytree(saved, Path(public) / "checkpoints")
        for readable in (Path(public), root, *(p for p in root.rglob("*") if p.is_dir())):
            readable.chmod(0o755)
        (root / "step_000002" / name).chmod(0)
        with as_nobody():
            stops_with(root, grid, rf"{name}: cannot be read now \(Permission denied\)")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, to which permission bits do not apply."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(mine)


def test_an_input_output_error_is_not_damage(root: Path) -> None:
    """Reading /proc/PID/mem at address 0, mounted over a file, fails with EIO."""
    path = root / "step_000002" / "index.json"
    if run("mount", "--bind", f"/proc/{os.getpid()}/mem", path).returncode:
        pytest.skip("cannot mount here")
    try:
        assert path.stat().st_size == 0
        record = manifest.FileRecord(0, "")
        with pytest.raises(ConfigError, match=r"index\.json: cannot be read now \(Input/output error\)"):
            manifest.check_file(root / "step_000002", "index.json", record)
    finally:
        run("umount", path, check=True)


def test_too_little_memory_is_not_damage(tmp_path: Path) -> None:
    """A process with a limited address space cannot read 400 MB."""
    program = """
import resource, sys
from pathlib import Path
import torch
from icrl_megatron.actor.shards import Piece, ShardReader, write_index
from icrl_megatron.model.weights import Slice
from icrl_megatron.utils.errors import ConfigError
folder, shape = Path(sys.argv[1]), (100, 1000, 1000)
write_index(folder, [Piece("param/w", shape, "one.safetensors", (0, 0, 0), shape)])
reader = ShardReader(folder, ["one.safetensors"])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
try:
    reader.read("param/w", Slice("w", shape, (0, 0, 0), shape))
except ConfigError as error:
    print(error)
"""
    save_file({"param/w": torch.zeros(100, 1000, 1000)}, tmp_path / "one.safetensors")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for spare in (50_000_000, 450_000_000):  # too little for the tensor; too little for tensor and file
        ended = python("-c", program, tmp_path, str(spare), env=env)
        assert ended.returncode == 0, ended.stderr
        assert "not enough memory to read the checkpoint, which is not damaged" in ended.stdout, ended.stdout


def test_a_record_of_another_version_is_not_damage(root: Path, grid: grids.Grid) -> None:
    path = root / "step_000002" / "icrl.json"
    text = path.read_text()
    content = json.loads(text) | {"format": 3}
    del content["sha256"]
    content["sha256"] = manifest._checksum(content)
    earlier = '{"step": 2, "weight_version": 3, "optimizer_steps": 2, "generated_tokens": 20}'
    another = "written by another version of this program"
    for record, said in (
        (text.replace("{", '{"new_field": 1, ', 1), rf"{another} \(it has new_field\)"),
        (text.replace('"progress": {', '"progress": {"epoch": 1,'), rf"{another} \(it has epoch\)"),
        (json.dumps(content), rf"{another} \(its format differs\)"),
        (earlier, r"written by an earlier version .* export it with that version"),
    ):
        path.write_text(record)
        stops_with(root, grid, said)


def test_a_renamed_checkpoint_is_not_damage(root: Path, grid: grids.Grid) -> None:
    (root / "step_000002").rename(root / "step_000005")
    stops_with(root, grid, r"step_000005: holds step 2; restore the name of the folder")


def test_a_symbolic_link_is_not_followed(root: Path, grid: grids.Grid) -> None:
    path = root / "step_000002" / "index.json"
    path.symlink_to(path.rename(root / "elsewhere.json"))
    stops_with(root, grid, r"index\.json: is a symbolic link")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_record_that_lists_files_outside_is_refused(root: Path, grid: grids.Grid, name: str) -> None:
    folder = root / "step_000002"
    found = manifest.read(folder)
    (folder / "icrl.json").unlink()
    manifest.write(folder, manifest.Manifest(found.progress, "", {**found.files, name: manifest.FileRecord(1, "0")}))
    stops_with(root, grid, "outside the checkpoint")


def test_other_files_and_folders_are_left_unchanged(root: Path, grid: grids.Grid) -> None:
    others = ["step_2", "step_0000003", "step_x", "notes.txt", "step_000009.part.txt", "best_step_000007"]
    for name in others:
        (root / name).mkdir() if "txt" not in name else (root / name).write_text("mine")
    (root / "step_000008").write_text("a file")
    assert newest(root, grid) == (root / "step_000002", [])
    assert manifest.leftovers(root) == []
    assert all((root / name).exists() for name in (*others, "step_000008"))


def test_ranks_verify_about_as_many_bytes_each() -> None:
    listed = {str(i): manifest.FileRecord(size, "") for i, size in enumerate((9, 8, 7, 6, 5, 4, 3, 2, 1))}
    for ranks in (1, 2, 3, 20):
        shares = manifest.shares(listed, ranks)
        assert sorted(name for share in shares for name in share) == sorted(listed)
        assert max(sum(listed[n].bytes for n in share) for share in shares) <= max(9, 45 / ranks + 4)


def test_verifying_closes_its_files(root: Path, grid: grids.Grid) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    newest(root, grid)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
