"""Local processes in which several episodes play, one call at a time: ALFWorld's games, and environments of
verifiers. The other side is line_worker.py."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from icrl_megatron.tasks import line_worker
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.grader import START_TIMEOUT_S, Worker


class EpisodeProcess:
    """One process and the episodes that play in it, one call at a time. A call that hangs or kills it costs all of
    them; the next call starts a new process."""

    def __init__(self, start: Callable[[], Worker], what: str, timeout_s: float, answer_bytes: int) -> None:
        """`start` runs in a thread and may raise EnvironmentFailure. `what` names in messages what an episode plays.
        `answer_bytes`: the longest answer that the worker reads."""
        self.episodes = 0
        self._start, self._what, self._timeout_s, self._answer_bytes = start, what, timeout_s, answer_bytes
        self._worker: Worker | None = None
        self._left: deque[int] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="episodes")

    async def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Raises EnvironmentFailure if the process does not answer, or answers with an error."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, job)

    def ask_now(self, job: dict[str, Any]) -> dict[str, Any]:
        """The same, and blocks."""
        return self._thread.submit(self._ask, job).result()

    def warm(self) -> None:
        """Starts the process without waiting for it; if that fails, the next call tries again."""
        self._thread.submit(self._started)

    def forget(self, env: int) -> None:
        """Takes no lock and does not wait, because destructors call it. The next call tells the process."""
        self._left.append(env)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()

    def _started(self) -> Worker:
        if self._worker is None:
            self._worker = self._start()
        return self._worker

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        worker = self._started()
        try:
            left = [self._left.popleft() for _ in range(len(self._left))]
            answer = worker.ask({**job, "left": left}, self._timeout_s)
        except (TimeoutError, EOFError, ValueError) as error:
            self._worker = None
            raise EnvironmentFailure(f"a {job['do']} of {self._what} {self._fault(error)}") from error
        if "error" in answer:
            raise EnvironmentFailure(f"a {job['do']} of {self._what} failed: {answer['error']}")
        return answer

    def _fault(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"took over {self._timeout_s:g} s"
        if isinstance(error, ValueError):
            return f"answered more than rollout.max_observation_bytes = {self._answer_bytes} bytes: raise that"
        return "killed its process"


class ProcessEpisode:
    """An episode in a process. The worker knows it by its number (`line_worker.OpenEpisodes`)."""

    _numbers = itertools.count()

    def __init__(self, process: EpisodeProcess) -> None:
        self.process, self.number = process, next(self._numbers)
        process.episodes += 1

    async def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """As `EpisodeProcess.ask`."""
        return await self.process.ask({"do": do, "env": self.number, **job})

    def release(self) -> None:
        """Call once, when the episode is over."""
        self.process.episodes -= 1
        self.process.forget(self.number)


class EpisodeProcesses:
    """The processes of a task set."""

    def __init__(self, count: int, start: Callable[[], Worker], what: str, timeout_s: float, answer_bytes: int) -> None:
        """As `EpisodeProcess`."""
        self.each = tuple(EpisodeProcess(start, what, timeout_s, answer_bytes) for _ in range(count))

    @property
    def first(self) -> EpisodeProcess:
        return self.each[0]

    def warm(self) -> None:
        for process in self.each:
            process.warm()

    def begin(self) -> ProcessEpisode:
        """A new episode, in the process with the fewest."""
        return ProcessEpisode(min(self.each, key=lambda process: process.episodes))

    def close(self) -> None:
        """Ends the processes; they must not be used afterwards."""
        for process in self.each:
            process.close()


def started_elsewhere(
    python: str, module: str, load: dict[str, Any], what: str, answer_bytes: int
) -> tuple[Worker, dict[str, Any]]:
    """Starts line_worker.py for a module in the interpreter `python` (empty: this one), which may have none of our
    requirements: (the process, its answer to the job `load`). Raises EnvironmentFailure if it does not load `what`."""
    if python and not Path(python).is_file():
        raise EnvironmentFailure(f"data.python={python} is no interpreter; give the path of a python")
    python = python or sys.executable
    script = str(Path(line_worker.__file__).resolve())
    worker = Worker(line_bytes=answer_bytes, command=(python, "-P", script, module))
    try:
        found = worker.ask({**load, "do": "load", "left": []}, START_TIMEOUT_S)
    except (TimeoutError, EOFError, ValueError) as error:
        raise EnvironmentFailure(f"{what} was not loaded within {START_TIMEOUT_S:g} s") from error
    if "error" in found:
        worker.close()
        raise EnvironmentFailure(f"{what} cannot be loaded by {python}: {found['error']}")
    return worker, found
