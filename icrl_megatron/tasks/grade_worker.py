"""Grades mathematical answers in a separate process: `python -m icrl_megatron.tasks.grade_worker`.

Reads one JSON job per line and writes one JSON verdict per line. A job that exceeds its CPU time ends the process by
SIGPROF's default action, which also ends code that Python cannot interrupt, such as a power of big integers;
`grader.py` then starts another process. The limit is CPU time because, on a busy machine, a wall-clock limit would make
correct answers wrong.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 2 << 30
FULL_SCORE = 0.99
MAX_ANSWER_CHARS = 2000
"""Answers of real problems are shorter; a longer one is wrong."""
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![A-Za-z\d.])")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:,\d{3})*|\d*)(?:\.\d+)?%?")


def last_box(text: str) -> str | None:
    """The content of the last complete \\boxed{...} or \\fbox{...} with balanced braces; None if there is none."""
    if "box" not in text:  # avoids scanning megabytes of braces one by one
        return None
    opened: list[int | None] = []
    found: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, brace.start()
    return text[found[0] : found[1]].strip() if found else None


def normalised(answer: str) -> str:
    """Removes dollar signs, and writes 4.5e33 as a power of ten: as LaTeX it would be 4.5 times Euler's e."""
    stripped = answer.strip().strip("$").strip()
    if (inner := last_box(stripped)) is not None:
        stripped = inner
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", stripped)


def plain_number(text: str) -> float | None:
    """A decimal number; commas between thousands and a percent sign are allowed. None for anything else."""
    compact = text.replace("\\%", "%").replace("\\,", "").replace("{,}", ",").replace(" ", "")
    power = re.fullmatch(r"(.+?)\\times10\^\{?([+-]?\d+)\}?", compact)
    if power is not None:
        mantissa = plain_number(power[1])
        return None if mantissa is None or abs(int(power[2])) > 300 else mantissa * 10.0 ** int(power[2])
    if not _NUMBER.fullmatch(compact) or not any(c.isdigit() for c in compact):
        return None
    value = float(compact.rstrip("%").replace(",", ""))
    return value / 100 if compact.endswith("%") else value


@functools.cache
def parse_in_two_stages() -> None:
    """Makes math-verify's LaTeX parser try the fast prediction mode first. Parsing is most of the cost of grading.

    ANTLR's documentation of `PredictionMode.SLL`: it returns the parse tree that full LL would, or reports a syntax
    error; on an error we parse again with LL. The trees are the same, and so are the verdicts.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    class TwoStages(latex2sympy2._Latex2Sympy):
        mode = PredictionMode.LL

        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = self.mode
            return parser

        def parse(self, latex_str: str) -> Any:
            self.mode = PredictionMode.SLL
            with contextlib.suppress(Exception):
                return super().parse(latex_str)
            self.mode = PredictionMode.LL
            return super().parse(latex_str)

    latex2sympy2._Latex2Sympy = TwoStages


def parsed(answer: str) -> list[Any]:
    """math-verify's parse of one answer. The answer is always boxed, because a bare one is only partly parsed
    (`3\\sqrt{13}` as 3)."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    parse_in_two_stages()
    configuration = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # math-verify's time limit also uses a signal, and would replace ours.
    found: list[Any] = parse(f"$\\boxed{{{answer}}}$", extraction_config=configuration, parsing_timeout=None)
    return found


@functools.lru_cache(maxsize=4096)
def correct(answer: str, label: str, tolerance: float) -> bool:
    """Whether an answer equals a label. `tolerance` is relative, and applies if both are plain numbers."""
    # Cached, because the episodes of a group often end in the same answer.
    from math_verify import verify

    if len(answer) > MAX_ANSWER_CHARS:
        return False
    given, gold = normalised(answer), normalised(label)
    if given == gold:
        return True
    left, right = plain_number(given), plain_number(gold)
    if left is not None and right is not None:
        return math.isclose(left, right, rel_tol=max(tolerance, 1e-9), abs_tol=0.0)
    # The order matters: verify(gold, answer) is not symmetric.
    return bool(verify(list(_gold(gold)), parsed(given), timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _gold(label: str) -> tuple[Any, ...]:
    """The parsed label, cached because all episodes of a task are graded against it."""
    return tuple(parsed(label))


def readable(label: str) -> bool:
    """Whether the grader can parse a label as more than a string."""
    gold = normalised(label)
    return plain_number(gold) is not None or any(not isinstance(part, str) for part in parsed(gold))


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
    return correct(job["answer"], job["label"], job["tolerance"])


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
