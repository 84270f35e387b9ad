"""Runs programs that a model wrote, in bubblewrap: with nothing of the host but a Python and its libraries, no network,
no other process, and limits on time, memory, files and output.

How each limit is enforced (bubblewrap's manual, setrlimit(2), seccomp(2)):

    files       an empty read-only root; of the host, only the interpreter, its standard library and shared libraries.
                Only a small tmpfs at /tmp is writable
    network     an empty network namespace
    processes   a system-call filter allows threads and denies processes. RLIMIT_NPROC would not bind root
    memory      RLIMIT_AS of the one process, a tmpfs of limited size, and no other shared memory (same filter)
    time        RLIMIT_CPU, and a wall-clock limit after which everything in the process namespace is killed
    output      a limit on the bytes that are read, after which everything is killed too
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import selectors
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icrl_megatron.utils.errors import ConfigError, EnvironmentFailure
from icrl_megatron.utils.sandbox_guest import READY

End = Literal["done", "failed", "cpu", "clock", "output"]

TMP_BYTES = 16 << 20
OUTPUT_BYTES = 4 << 20
"""Limit on standard output, standard error and report together."""
CLOCK_FACTOR, CLOCK_EXTRA_S = 3.0, 5.0
"""The wall-clock limit is computed from the CPU limit. Time in which the program was runnable but got no CPU on a busy
machine does not count, up to `HELD_UP_FACTOR` times the limit."""
HELD_UP_FACTOR = 10.0
NOBODY = "65534"


@dataclass(frozen=True)
class SandboxLimits:
    cpu_s: float
    memory_bytes: int

    @property
    def clock_s(self) -> float:
        return CLOCK_FACTOR * self.cpu_s + CLOCK_EXTRA_S


@dataclass(frozen=True)
class Ran:
    """The result and output of one run."""

    end: End
    """done: exit code 0; failed: another exit code, or a signal; the others name the limit at which it was killed."""
    output: bytes
    errors: bytes
    report: bytes
    """The report of the guest (or of a program that impersonates it)."""


class Sandbox:
    """Runs programs; usable from any number of threads. Raises ConfigError if bubblewrap is missing."""

    def __init__(self, limits: SandboxLimits) -> None:
        found = shutil.which("bwrap")
        if found is None:
            raise ConfigError(
                "programs are run in a sandbox, and bubblewrap (bwrap) is not installed: apt-get install bubblewrap"
            )
        self._bwrap, self.limits = found, limits
        self._filter = seccomp_filter()

    def check(self) -> None:
        """Runs one line. Raises ConfigError with bubblewrap's error if it cannot create its namespaces here."""
        try:
            ran = self.run("print(6 * 7)")
        except EnvironmentFailure as error:
            raise ConfigError(
                f"the sandbox does not work on this machine: {error}. It needs user namespaces: allow them "
                "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a "
                "container, one started with --security-opt seccomp=unconfined)"
            ) from error
        if ran.output.strip() != b"42":
            raise ConfigError(
                f"the sandbox does not work on this machine: print(6 * 7) ended as {ran.end}, with "
                f"{(ran.errors or ran.output)[-300:]!r}; are data.program_memory_mib and data.grading_timeout_s enough "
                "for Python to start?"
            )

    def run(self, program: str, stdin: str = "", call: bool = False) -> Ran:
        """Runs a program and blocks. `call`: also evaluate the test on stdin in its process (`sandbox_guest`).

        Raises EnvironmentFailure if the sandbox was not created; the program then did not run.
        """
        with contextlib.ExitStack() as stack:
            code, data, rules = (stack.enter_context(_memory(part)) for part in (program, stdin, self._filter))
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            guest = {
                "cpu_s": math.ceil(self.limits.cpu_s),
                "memory": self.limits.memory_bytes,
                "file": TMP_BYTES,
                "report": writing,
                "call": call,
            }
            try:
                process = subprocess.Popen(
                    [self._bwrap, *_bwrap_arguments(), "--ro-bind-data", str(code), "/program.py",
                     "--seccomp", str(rules),
                     "--remount-ro", "/", "--", _PYTHON, "-s", "-P", "-S", "/guest.py", json.dumps(guest)],
                    stdin=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(code, rules, writing),
                    env=_environment(),
                )  # fmt: skip
            except OSError as error:
                raise EnvironmentFailure(f"{self._bwrap} cannot be started ({error})") from error
            finally:
                os.close(writing)
            return _watched(process, reading, self.limits)


def _watched(process: subprocess.Popen[bytes], reading: int, limits: SandboxLimits) -> Ran:
    """Reads until the process and its pipes end, or a limit is reached."""
    assert process.stdout is not None and process.stderr is not None
    clock = Clock(process.pid, limits.clock_s)
    buffers = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray(), reading: bytearray()}
    cut: End | None = None
    try:
        with selectors.DefaultSelector() as selector:
            for pipe in buffers:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map() and cut is None:
                ready = selector.select(clock.left())
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    buffers[key.fd] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                if sum(map(len, buffers.values())) > OUTPUT_BYTES:
                    cut = "output"
                elif clock.is_up():
                    cut = "clock"
        code = _ended(process, clock) if cut is None else None
    finally:
        process.kill()  # also kills everything in its namespace
        process.wait(timeout=30)
        process.stdout.close()
        process.stderr.close()
    output, errors, report = (bytes(part) for part in buffers.values())
    if not report.startswith(READY):
        if cut == "clock":
            raise EnvironmentFailure(f"the sandbox did not start within {limits.clock_s:g} s")
        raise EnvironmentFailure(f"bubblewrap: {errors[-300:].decode(errors='replace').strip() or code}")
    end = cut or ("clock" if code is None else _end_of(code))
    return Ran(end, output, errors, report[len(READY) :])


def _ended(process: subprocess.Popen[bytes], clock: Clock) -> int | None:
    """Its exit code; None if it closed its pipes and did not exit."""
    while not clock.is_up():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=max(0.05, clock.left()))
    return None


class Clock:
    """A time limit that does not count time in which a process or its children wait for a CPU."""

    def __init__(self, pid: int, limit_s: float) -> None:
        self._pid, self._limit_s, self._begun = pid, limit_s, time.monotonic()
        self._deadline = self._begun + limit_s

    def left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def is_up(self) -> bool:
        """Whether the limit is reached. Waiting time is only measured once it seems to be."""
        if self.left():
            return False
        allowed = min(self._limit_s + held_up_s(self._pid), HELD_UP_FACTOR * self._limit_s)
        self._deadline = self._begun + allowed
        return self.left() < 0.05


def held_up_s(pid: int) -> float:
    """Seconds that the threads of a process and of its children were runnable and did not run (proc(5), schedstat); 0
    if the kernel does not report it."""
    total = 0.0
    with contextlib.suppress(OSError, IndexError, ValueError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[1]) / 1e9
            total += sum(held_up_s(int(child)) for child in (thread / "children").read_text().split())
    return total


def _end_of(code: int) -> End:
    if code == 0:
        return "done"
    return "cpu" if code in (128 + 24, 128 + 9) else "failed"  # SIGXCPU, or SIGKILL if the program ignored it


@contextmanager
def _memory(content: str | bytes) -> Iterator[int]:
    """An anonymous file, open at its beginning."""
    fd = os.memfd_create("icrl")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content if isinstance(content, bytes) else content.encode(errors="replace"))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


_PYTHON = "/python/bin/python3"
_OS_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_PYTHON_LIBRARIES = ("python", "ffi", "crypto", "ssl", "z", "bz2", "lzma", "expat", "sqlite3", "mpdec")
"""Libraries that the standard library loads in a Python with its own libraries (conda's, for example)."""


@functools.cache
def _bwrap_arguments() -> tuple[str, ...]:
    """bubblewrap's arguments: the namespaces and files of the sandbox."""
    base, binary = Path(sys.base_prefix), Path(sys.executable).resolve()
    shown: list[str] = []
    for name in _OS_LIBRARIES:
        path = Path(name)
        if path.is_symlink():
            shown += ["--symlink", str(path.readlink()), name]
        elif path.is_dir():
            shown += ["--ro-bind", name, name]
    stdlib = Path(sysconfig.get_path("stdlib"))
    inside = Path("/python") / stdlib.relative_to(base)
    shown += ["--ro-bind", str(binary), _PYTHON, "--ro-bind", str(stdlib), str(inside)]
    for name in _PYTHON_LIBRARIES:
        for library in sorted((base / "lib").glob(f"lib{name}[.0-9]*so*")):
            shown += ["--ro-bind", str(library), f"/python/lib/{library.name}"]
    guest = Path(__file__).with_name("sandbox_guest.py")
    devices = [part for name in ("null", "zero", "urandom") for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    return (
        *("--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *shown, *devices,
        *("--ro-bind", str(guest), "/guest.py"),
        *("--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
    )  # fmt: skip


def _environment() -> dict[str, str]:
    return {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": "/python/lib",
        "PYTHONHOME": "/python",
        "PYTHONHASHSEED": "0",  # makes the order of printed sets reproducible
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
    }


_DENIED = (
    *("fork", "vfork", "unshare", "setns", "mount", "ptrace", "bpf", "io_uring_setup", "keyctl", "add_key"),
    *("request_key", "userfaultfd", "perf_event_open", "process_vm_readv", "process_vm_writev"),
    *("memfd_create", "memfd_secret", "shmget", "mq_open"),  # memory that no process limit counts
)
_CLONE_THREAD = 0x10000


def seccomp_filter() -> bytes:
    """A BPF program for `bwrap --seccomp`: allows threads, denies new processes and the `_DENIED` system calls.

    clone3 returns ENOSYS so that libc creates threads with clone, whose flags a filter can read. Raises ConfigError if
    libseccomp is missing.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:  # it loads the system's libseccomp.so.2
        raise ConfigError(
            f"programs are run in a sandbox, which needs libseccomp ({error}): apt-get install libseccomp2"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.ERRNO(errno.EPERM))  # x32: the same calls by other numbers
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    for call in _DENIED:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), call)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
