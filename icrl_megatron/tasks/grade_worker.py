"""Grades mathematical answers in a separate process: `python -m icrl_megatron.tasks.grade_worker`.

Reads one JSON job per line and writes one JSON verdict per line. A job that exceeds its CPU time ends the process by
SIGPROF's default action, which also ends code that Python cannot interrupt, such as a power of big integers;
`grader.py` then starts another process. The limit is CPU time because, on a busy machine, a wall-clock limit would make
correct answers wrong.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from typing import Any

from icrl_megatron.tasks.answers import last_box
from icrl_megatron.tasks.formulas import parsed
from icrl_megatron.tasks.grading import correct, readable

MEMORY_BYTES = 2 << 30
FULL_SCORE = 0.99


@functools.lru_cache(maxsize=64)
def _generated(family: str, count: int, seed: int, level: int) -> Any:
    from icrl_megatron.tasks.reasoning_gym import dataset

    return dataset(family, count, seed, level)


def full_score(job: dict[str, Any]) -> bool:
    """Whether a family's own scorer gives an answer the full score; an answer on which it raises is wrong."""
    found = _generated(job["family"], job["count"], job["seed"], job["level"])
    return float(found.score_answer(job["answer"], found[job["index"]])) >= FULL_SCORE


def answer_job(job: dict[str, Any]) -> bool:
    if job["kind"] == "readable":
        return readable(job["label"])
    if job["kind"] == "reasoning_gym":
        return full_score(job)
    answer = job["answer"]
    return correct(last_box(answer) or answer, job["label"], job["tolerance"])


def main() -> None:
    import logging

    logging.disable(logging.CRITICAL)  # avoids one log line for every answer that is not mathematics
    # The limit includes the address space that Python and sympy have already mapped.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    parsed("1")  # imports before the time limit of the first answer starts
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, job["timeout_s"])
        try:
            verdict: dict[str, Any] = {"correct": answer_job(job)}
        except (Exception, RecursionError, MemoryError) as error:
            verdict = {"correct": False, "error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
