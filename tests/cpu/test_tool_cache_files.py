"""Files of the tool cache that are no caches, damaged, or on bad disks, and wrong settings: refused and left alone."""

from __future__ import annotations

import asyncio
import sqlite3
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from disks import read_only, small_disk
from whole_runs import icrl

from icrl_megatron.agents.cache import ToolCache, check, file_system
from icrl_megatron.agents.tools import ToolFailure
from icrl_megatron.settings.task_schema import ToolCacheSettings
from icrl_megatron.utils.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tools.sqlite"


def cache_at(path: Path, mode: str = "read_write") -> closing[ToolCache]:
    return closing(ToolCache(ToolCacheSettings(mode, str(path))))


def filled(path: Path) -> bytes:
    cache = ToolCache(ToolCacheSettings("read_write", str(path)))
    for i in range(200):
        cache.put(("t", "1", str(i)), "answer " * 100)
    cache.close()
    return path.read_bytes()


def overwritten(path: Path) -> None:
    content = filled(path)
    path.write_bytes(content[:40_960] + b"\xff" * 40_960 + content[81_920:])


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE answers (tool TEXT)")


def newer(path: Path) -> None:
    ToolCache(ToolCacheSettings("read_write", str(path))).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")


BAD = {
    "text": (lambda path: path.write_text("not a database\n" * 100), "file is not a database"),
    "empty": (lambda path: path.touch(), "a database of another program, or empty"),
    "foreign": (foreign, "a database of another program, or empty"),
    "newer": (newer, "it has version 2 of the format, and this program reads version 1"),
    "folder": (lambda path: path.mkdir(), "it is not a file"),
    "truncated": (lambda path: path.write_bytes(filled(path)[:50_000]), "(malformed|it is damaged)"),
    "overwritten": (overwritten, "(malformed|it is damaged)"),
}


@pytest.mark.parametrize("mode", ["read_write", "replay"])
@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_cache_is_refused_and_left_alone(name: str, mode: str, path: Path) -> None:
    make, said = BAD[name]
    make(path)  # type: ignore[no-untyped-call]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(ConfigError, match=rf"^tasks\.tool_cache\.path={path}: .*{said}.*; move it away, choose"):
        check(ToolCacheSettings(mode, str(path)))
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_damage_that_is_found_during_the_run_is_a_failure(path: Path) -> None:
    overwritten(path)
    failures = 0
    with cache_at(path) as cache:
        for i in range(200):
            try:
                assert asyncio.run(cache.get(("t", "1", str(i)))) == "answer " * 100
            except ToolFailure as error:
                failures += "tools.sqlite: database disk image is malformed" in str(error)
    assert 10 < failures < 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mode=read_write",), "tasks.tool_cache.mode=read_write needs a file: set tasks.tool_cache.path"),
        (("mode=replay", "path=gone.sqlite"), "tasks.tool_cache.path=gone.sqlite: no such file, so there is nothing"),
        (("mode=replay", "path=notes.txt"), "tasks.tool_cache.path=notes.txt: SQLite cannot use it (file is not"),
        (("mode=read_write", "path=notes.txt/x"), "tasks.tool_cache.path=notes.txt/x: notes.txt is not a folder"),
        (("mode=sometimes",), "tasks.tool_cache.mode=sometimes: choose one of off, read_write, replay"),
        (("expiry_s=-1",), "tasks.tool_cache.expiry_s=-1.0: must be a finite number, at least 0"),
    ],
)
def test_wrong_settings_are_refused(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine\n" * 100)
    code, _, err = icrl("train", "quickstart", "--dry-run", *(f"tasks.tool_cache.{word}" for word in words))
    assert code == 2 and said in err
    assert (tmp_path / "notes.txt").read_text() == "mine\n" * 100


def test_network_file_systems_are_known() -> None:
    mounts = textwrap.dedent("""\
        /dev/sda / ext4 rw 0 0
        server:/x /shared nfs4 rw 0 0
        tmpfs /shared/fast tmpfs rw 0 0
        user@host: /far fuse.sshfs rw 0 0
        """)
    places = {
        "/tmp/x": "ext4",
        "/shared/a/x": "nfs4",
        "/shared/fast/x": "tmpfs",
        "/far/x": "sshfs",
        "/sharedx/x": "ext4",
    }
    assert {place: file_system(Path(place), mounts) for place in places} == places
    assert file_system(Path("/x"), "") == ""


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", 1024) as disk:
        path = disk / "tools.sqlite"
        with cache_at(path) as cache:
            for i in range(60):
                cache.put(("t", "1", str(i)), str(i) * 20_000)
                cache._writer.submit(int).result()
            assert asyncio.run(cache.get(("t", "1", "3"))) == "3" * 20_000
            assert asyncio.run(cache.get(("t", "1", "59"))) is None
        check(ToolCacheSettings("replay", str(path)))
    assert "database or disk is full; answers are not stored" in capfd.readouterr().err


def test_a_read_only_disk_can_be_replayed_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk:
        path = disk / "tools.sqlite"
        filled(path)
        read_only(disk)
        check(ToolCacheSettings("replay", str(path)))
        with cache_at(path, "replay") as cache:
            assert asyncio.run(cache.get(("t", "1", "7"))) == "answer " * 100
        with pytest.raises(ConfigError, match="the file or its folder cannot be written"):
            check(ToolCacheSettings("read_write", str(path)))
        with pytest.raises(ConfigError, match="the file system is read-only; mount it for writing"):
            check(ToolCacheSettings("read_write", str(disk / "other.sqlite")))
