"""Answers of tools in one SQLite file, shared by all ranks of a run and by later runs.

An entry is found by tool, version (`ToolSpec.version`) and arguments. Failures of the infrastructure are never stored.
With `tasks.tool_cache.mode=replay` the file is only read, and a call that it does not have fails. So that such a run
observes the same, what a tool said of the model's mistakes (`ToolUseError`) is recorded too; only replays use it.

The file uses SQLite's write-ahead log (https://sqlite.org/wal.html): readers never wait for a writer, a killed process
loses at most its last answers, and all processes must be on one machine. Reads and writes run in one thread each, so
that neither the disk nor another process's write stops the event loop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from icrl_megatron.agents.tools import ToolFailure, ToolUseError
from icrl_megatron.settings.task_schema import ToolCacheSettings
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError

APPLICATION_ID, SCHEMA_VERSION = 0x49435254, 1
"""Stored in the header of the file (https://sqlite.org/pragma.html: application_id, user_version)."""
PAGE_BYTES = 4096
MOST_ENTRY_BYTES = 1 << 20
"""Longer answers are not stored (arguments included)."""
MOST_WAITING_BYTES = 64 << 20
"""Of answers that wait to be written; more are not stored."""
BUSY_S = 10.0
"""How long a write waits for the write of another process."""
_TABLE = """
CREATE TABLE answers (
    tool TEXT NOT NULL, version TEXT NOT NULL, arguments TEXT NOT NULL, answer TEXT NOT NULL, stored_s REAL NOT NULL,
    mistake INTEGER NOT NULL, PRIMARY KEY (tool, version, arguments)
)"""
_READ = "SELECT answer, stored_s, mistake FROM answers WHERE tool = ? AND version = ? AND arguments = ?"
_WRITE = """
INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (tool, version, arguments) DO UPDATE
SET answer = excluded.answer, stored_s = excluded.stored_s, mistake = excluded.mistake
WHERE answers.mistake OR answers.stored_s < ?"""
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "sshfs", "afs",
            "wekafs", "panfs", "orangefs"}  # fmt: skip
"""File systems whose other machines do not see SQLite's shared memory, as /proc/self/mounts names them."""

Entry = tuple[str, str, str]
"""(tool, version, arguments as `ToolCall.written_arguments` has them)"""


class ToolCache:
    """The cache of one process. Any number of event loops and processes may use a file at the same time."""

    def __init__(self, settings: ToolCacheSettings) -> None:
        """Creates the file if it does not exist (not with mode=replay). Raises ConfigError as `check` does, without
        reading the whole file."""
        self.path, self.replay, self._expiry_s = Path(settings.path), settings.mode == "replay", settings.expiry_s
        _prepare(settings)
        self._reader, self._writer = (ThreadPoolExecutor(1, f"tool-cache-{what}") for what in ("read", "write"))
        self._reads = _connect(self.path, self.replay)
        self._writes = _connect(self.path, self.replay)
        self._writes.execute(f"PRAGMA max_page_count = {settings.max_mib * 2**20 // PAGE_BYTES}")
        self._waiting: list[tuple[Entry, str, bool]] = []
        self._waiting_bytes, self._lock, self._warned = 0, threading.Lock(), False

    @staticmethod
    def of(settings: ToolCacheSettings) -> ToolCache | None:
        return None if settings.mode == "off" else ToolCache(settings)

    def close(self) -> None:
        """Writes what waits and closes the file. A process that ends without it writes what waits, too."""
        for thread in (self._reader, self._writer):
            thread.shutdown()
        for connection in (self._reads, self._writes):
            connection.close()

    async def get(self, entry: Entry) -> str | None:
        """The stored answer, or None. Raises ToolFailure if the file cannot be read. With mode=replay, also raises
        ToolFailure if the file has no answer, and ToolUseError if the tool called it a mistake."""
        found = await asyncio.wrap_future(self._reader.submit(self._read, entry))
        if found is None and self.replay:
            tool, version, arguments = entry
            raise ToolFailure(
                f"tasks.tool_cache.mode=replay: {self.path} has no answer of tool {tool!r} (version {version!r}) to "
                f"{arguments[:200]}; repeat the run that wrote the file with the same settings, or record the missing "
                "answers with tasks.tool_cache.mode=read_write"
            )
        return found

    def put(self, entry: Entry, answer: str, mistake: bool = False) -> None:
        """Stores an answer soon, without waiting for it. `mistake`: it is the message of a ToolUseError.

        The first answer of two processes stays until it expires. An answer that cannot be stored is lost, with one
        warning for each process."""
        if self.replay:
            return
        size = sum(len(text.encode(errors="replace")) for text in (*entry, answer))
        if size > MOST_ENTRY_BYTES:
            return
        with self._lock:
            full = self._waiting_bytes + size > MOST_WAITING_BYTES
            if not full:
                self._waiting.append((entry, answer.encode(errors="replace").decode(), mistake))
                self._waiting_bytes += size
        if full:
            self._warn("more answers arrive than the disk takes; choose a file on a faster disk")
        else:
            self._writer.submit(self._flush)

    def _oldest(self) -> float:
        """Answers stored before this time (seconds since 1970) have expired."""
        return 0.0 if self._expiry_s is None else time.time() - self._expiry_s

    def _read(self, entry: Entry) -> str | None:
        try:
            rows = self._reads.execute(_READ, entry).fetchall()
        except sqlite3.Error as error:
            raise ToolFailure(f"tool cache {self.path}: {error}") from error
        if not rows:
            return None
        answer, stored_s, mistake = rows[0]
        if self.replay and mistake:
            raise ToolUseError(answer)
        return str(answer) if self.replay or (not mistake and stored_s >= self._oldest()) else None

    def _flush(self) -> None:
        """Writes all that waits in one transaction."""
        with self._lock:
            entries, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not entries:
            return
        now, oldest = time.time(), self._oldest()
        try:
            with _transaction(self._writes):
                rows = [(*entry, answer, now, mistake, oldest) for entry, answer, mistake in entries]
                self._writes.executemany(_WRITE, rows)
        except sqlite3.Error as error:
            self._warn(
                f"{error}; answers are not stored. If the file is full, raise tasks.tool_cache.max_mib or choose "
                "another tasks.tool_cache.path"
            )

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            print(f"warning: tool cache {self.path}: {what}", file=sys.stderr, flush=True)


def check(settings: ToolCacheSettings) -> None:
    """Creates the file if it does not exist, and else reads it once as a whole. Nothing that exists is changed.

    Raises ConfigError for a missing path or file, a file that is damaged, of another program or another version, a
    file that cannot be written, and a network file system.
    """
    if settings.mode == "off":
        return
    path = _prepare(settings)
    with _sqlite_errors(path), closing(_connect(path, read_only=True)) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _refused(path, f"it is damaged ({' '.join(found.split())})")


def _prepare(settings: ToolCacheSettings) -> Path:
    """The path of the file, which then exists and has the right format."""
    if not settings.path:
        raise ConfigError(
            f"tasks.tool_cache.mode={settings.mode} needs a file: set tasks.tool_cache.path, e.g. /tmp/tools.sqlite, "
            "or tasks.tool_cache.mode=off"
        )
    path, replay = Path(settings.path), settings.mode == "replay"
    if not replay:
        _check_file_system(path)
    if replay and not path.exists():
        raise ConfigError(
            f"tasks.tool_cache.path={path}: no such file, so there is nothing to replay; record one with "
            "tasks.tool_cache.mode=read_write"
        )
    if path.parent.exists() and not path.parent.is_dir():
        raise _refused(path, f"{path.parent} is not a folder")
    if not path.exists():
        _create(path)
    if not path.is_file():
        raise _refused(path, "it is not a file")
    # Read through SQLite: closing the file in any other way drops the locks of this process's open caches.
    with _sqlite_errors(path), closing(_connect(path, read_only=True)) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise _refused(path, "it is a database of another program, or empty")
    if version != SCHEMA_VERSION:
        raise _refused(path, f"it has version {version} of the format, and this program reads version {SCHEMA_VERSION}")
    if not replay and not all(os.access(one, os.W_OK) for one in (path, path.parent)):
        raise _refused(path, "the file or its folder cannot be written")
    return path


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"tasks.tool_cache.path={path}: {why}. It was not changed; move it away, choose another path, or set "
        "tasks.tool_cache.mode=off"
    )


def _network(path: Path) -> str:
    """The type of the network file system that holds `path`; empty if it is on a local one."""
    kind = file_system(path, Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace"))
    return kind if kind in _NETWORK else ""


def _check_file_system(path: Path) -> None:
    if kind := _network(path):
        raise ConfigError(
            f"tasks.tool_cache.path={path}: it is on a network file system ({kind}), where several machines would "
            "damage the file; choose a path on a local disk of each node, e.g. /tmp/tools.sqlite. "
            "tasks.tool_cache.mode=replay can read a copy from anywhere"
        )


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, which need not exist; `mounts` has the form of /proc/self/mounts.
    Empty if it is unknown."""
    folder = path.resolve().parent
    found = [line.split() for line in mounts.splitlines()]
    fitting = [(words[1], words[2]) for words in found if len(words) > 2 and folder.is_relative_to(words[1])]
    return max(fitting, key=lambda mount: len(mount[0]), default=("", ""))[1].removeprefix("fuse.")


def _create(path: Path) -> None:
    """Creates an empty cache, unless another process was faster. The file appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with disk_errors(path, "the tool cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _sqlite_errors(path), closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute(_TABLE)
                connection.execute("PRAGMA journal_mode = WAL")
            with suppress(FileExistsError):
                os.link(temporary, path)  # unlike a rename, it never replaces a file
        finally:
            temporary.unlink(missing_ok=True)


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """A connection without implicit transactions. It is used by one thread at a time."""
    how = "mode=ro" if read_only else "mode=rw"
    nobody_writes = read_only and not path.with_name(f"{path.name}-wal").exists()
    if nobody_writes and (_network(path) or not os.access(path.parent, os.W_OK)):
        how = "immutable=1"  # SQLite's shared memory cannot be there, and is not needed
    uri = f"{path.absolute().as_uri()}?{how}"
    made = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    made.execute("PRAGMA synchronous = NORMAL")  # in this mode a commit waits for no disk, and a crash damages nothing
    return made


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back when the disk is full
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _refused(path, f"SQLite cannot use it ({error})") from error
