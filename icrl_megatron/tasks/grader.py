"""A pool of grading processes that can be killed: `\\boxed{9^{9^{9^9}}}` costs one process, not the run."""

from __future__ import annotations

import asyncio
import json
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.grading import is_number

START_TIMEOUT_S = 120.0
PATIENCE = 20.0
"""The worker ends itself when its CPU time is used up. It is killed after this many times as much wall-clock time."""
LINE_BYTES = 1 << 20
"""The longest verdict that is read; verdicts have a few hundred bytes."""


class Worker:
    """A process that answers a line of JSON with a line of JSON. If `ask` raises, the process is dead."""

    def __init__(
        self,
        module: str = "icrl_megatron.tasks.grade_worker",
        line_bytes: int = LINE_BYTES,
        arguments: tuple[str, ...] = (),
        command: tuple[str, ...] = (),
    ) -> None:
        """`line_bytes`: the longest answer that is read. `arguments`: of the module's command line. `command`: the
        whole command, in place of a module."""
        run = command or (sys.executable, "-m", module, *arguments)
        self._process = subprocess.Popen(
            run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._rest, self._line_bytes = b"", line_bytes
        try:
            self._line(START_TIMEOUT_S)
        except (TimeoutError, EOFError, ValueError) as error:
            self.close()
            raise EnvironmentFailure(f"{' '.join(run[:3])} did not start: are its imports installed?") from error

    def ask(self, job: dict[str, Any], wait_s: float) -> dict[str, Any]:
        """Raises EOFError if the process died on the job or its answer is not a JSON object, TimeoutError if it did not
        answer, ValueError if the answer is longer than `line_bytes`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            return _answer(self._line(wait_s))
        except BrokenPipeError as error:
            self.close()
            raise EOFError from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            chunk = self._process.stdout.read(65536)
            if not chunk:
                raise EOFError
            self._rest += chunk
            if len(self._rest) > self._line_bytes:
                raise ValueError(f"the answer has more than {self._line_bytes} bytes")
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _answer(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EOFError from error
    if not isinstance(found, dict):
        raise EOFError
    return found


class WorkerPool:
    """Processes that are started when first needed, and a thread for each to wait for its answers."""

    def __init__(self, workers: int, name: str) -> None:
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def close(self) -> None:
        """Ends the processes; the pool must not be used afterwards."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def _worker(self) -> Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._started()

    def _started(self) -> Worker:
        return Worker()


class Grader(WorkerPool):
    """Grades for many coroutines at once, on `workers` processes.

    If a process hangs or dies on an answer, the answer is tried once more on a new process, in case the machine caused
    it; if that fails too, the answer is wrong and counted in `killed`. If processes do not start, EnvironmentFailure is
    raised.
    """

    def __init__(self, workers: int, timeout_s: float, tolerance: float = 0.0) -> None:
        super().__init__(workers, "grader")
        self._timeout_s, self._tolerance = timeout_s, tolerance
        self._lock = threading.Lock()
        self.killed = 0
        """Answers on which both processes hung or died."""

    async def correct(self, answer: str, label: str) -> bool:
        return await self.judge({"kind": "correct", "answer": answer, "label": label, "tolerance": self._tolerance})

    async def judge(self, job: dict[str, Any]) -> bool:
        """Runs one job of `grade_worker.answer_job`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, job)

    def readable(self, labels: list[str]) -> list[bool]:
        """Whether the grader can parse each label; runs in parallel and blocks."""
        return list(self._threads.map(self._run, ({"kind": "readable", "label": label} for label in labels)))

    def unreadable(self, labels: Iterable[str]) -> list[str]:
        """Those of the labels that are not answers, so that no reply could be right; each once, in their order."""
        hard = [label for label in dict.fromkeys(labels) if not is_number(label)]
        return [label for label, ok in zip(hard, self.readable(hard), strict=True) if not ok]

    def _run(self, job: dict[str, Any]) -> bool:
        for _ in range(2):
            worker = self._worker()
            try:
                verdict = worker.ask({**job, "timeout_s": self._timeout_s}, PATIENCE * self._timeout_s)
            except (TimeoutError, EOFError, ValueError):
                continue
            self._idle.put(worker)
            return verdict["correct"] is True
        with self._lock:
            self.killed += 1
        return False
