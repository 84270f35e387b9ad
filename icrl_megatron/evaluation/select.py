"""`icrl select`: measures a model's success on training questions and keeps those of the wanted difficulty."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from icrl_megatron.agents import cache as tool_cache
from icrl_megatron.evaluation.measured import Question
from icrl_megatron.evaluation.result import EvalRequest
from icrl_megatron.evaluation.run import ROOM_BYTES, check, check_engine, play, run_settings, settings_of
from icrl_megatron.run.heldout import unusable
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import DataSource, options
from icrl_megatron.settings.task_sections import Rows
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.dataset_files import files_of
from icrl_megatron.tasks.datasets import chosen_rows, id_range, row_hash
from icrl_megatron.types import Task
from icrl_megatron.utils.disk import require_space
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.files import digest, locked, write_atomically
from icrl_megatron.utils.records import RecordFile
from icrl_megatron.utils.result_files import begins_with, check_file
from icrl_megatron.utils.results import folder_digest

_HEAD = "icrl_select"
_FIRST_KEY = "questions"
_SHOWN = 3
"""Number of examples and failures in the report."""
_BAR = 40
_OF_ROLLOUT = (
    *("temperature", "max_turn_tokens", "parse_truncated", "max_turns", "max_calls", "repeat_limit", "context_tokens"),
    *("repeats_over_invalid", "templates", "chat_template_args", "max_observation_bytes", "max_observation_tokens"),
)
"""Settings of `rollout` that decide whether an attempt succeeds."""
_FREE_SOURCE = (
    *("weight", "plan", "serve", "data.train", "data.heldout", "data.servers", "data.request_timeout_s"),
    *("data.grading_workers", "agent.endpoint.api_key_env", "agent.endpoint.timeout_s", "agent.endpoint.concurrency"),
)
"""Options of a source, or sections of them, that may change: rows are compared themselves."""


@dataclass(frozen=True)
class SelectRequest:
    """The arguments of one `icrl select`."""

    model: Path
    """As for `icrl eval`."""
    out: Path
    """The JSONL file of kept rows."""
    task: str = ""
    """The task set; if empty, the run's only one."""
    samples: int = 8
    at_least: float = 0.0
    at_most: float = 0.3
    """Questions whose mean success lies between these, both included, are kept."""
    problems: int | None = None
    """Only the first ones; None means all."""
    overrides: tuple[str, ...] = ()
    overwrite: bool = False

    def evaluation(self) -> EvalRequest:
        tasks = (self.task,) if self.task else ()
        return EvalRequest(self.model, tasks, samples=self.samples, problems=self.problems, overrides=self.overrides)

    @property
    def report(self) -> Path:
        return self.out.with_suffix(".report.json")

    @property
    def records(self) -> Path:
        return self.out.with_suffix(".measured.jsonl")


def select(request: SelectRequest) -> int:
    """Plays the questions that are not measured yet, and writes the rows that are kept, with a report. Returns 0, or
    the exit code of failed ranks, whose message has been printed.

    Raises ConfigError on wrong input, before playing, and if the records belong to other settings; HopelessError if
    nothing could be measured or nothing is kept.
    """
    evaluation = request.evaluation()
    check(evaluation)
    if not 0 <= request.at_least <= request.at_most <= 1:
        raise ConfigError(
            f"--at-least={request.at_least:g} --at-most={request.at_most:g}: give bounds from 0 to 1, the lower first"
        )
    settings = settings_of(evaluation, run_settings(request.model)[0])
    source, data = _source(settings)
    _check_files(request, data)
    tool_cache.check(settings.tasks.tool_cache)
    check_engine(evaluation, settings)
    require_space(request.out, ROOM_BYTES, "the questions")
    catalogue = registry.Catalogue([source], settings.rollout.max_observation_bytes)

    def questions() -> list[Task]:
        return catalogue.problems(source.name, "train")[: settings.tasks.limit][: request.problems]

    tasks, left_out = questions(), unusable(settings, "train")
    with locked(request.out.parent, f".{request.out.name}.lock", f"--out={request.out}"):
        identities: list[Mapping[str, Any]] = []

        def left(folder: Path) -> list[Task]:
            identities.append(_identity(folder, settings, source, request.samples))
            known = _recorded(request, identities[0], tasks)
            return [task for task in tasks if task.task_id not in known or not known[task.task_id].finished]

        if code := play(evaluation, settings, request.out, left, request.records):
            return code
        # Read again, because rows are kept by their place, and the files may have changed while questions were played.
        known = _recorded(request, identities[0], questions())
        found = [known[task.task_id] for task in tasks if task.task_id in known]
        counted = _counts(request, found, tasks) | {"unusable": left_out}
        print(_write(request, counted, partial(chosen_rows, data), _kept(request, found)))
    return 0


def _source(settings: Settings) -> tuple[DataSource, Rows]:
    """The one source, and its `data`: its training problems are rows of files. Raises ConfigError."""
    names = ", ".join(source.name for source in settings.tasks.sources)
    if len(settings.tasks.sources) != 1:
        raise ConfigError(f"the settings have several task sets ({names}): name the one to select from with --task")
    (source,) = settings.tasks.sources
    data = source.data if isinstance(source, DataSource) else None
    if not isinstance(source, DataSource) or not isinstance(data, Rows) or any(map(id_range, data.train)):
        raise ConfigError(
            f"task set {names!r}: `icrl select` keeps rows of data files, and this one's problems are not rows; use "
            "math, code or searchqa with files in data.train, or tasks.curriculum=true, which draws problems by their "
            "success during training"
        )
    return source, data


def _check_files(request: SelectRequest, data: Rows) -> None:
    out, real = request.out, request.out.resolve()
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out={out}: rows are written as JSONL; give a name that ends in .jsonl")
    for given in (*data.train, *data.heldout):
        for file in files_of(given):
            if file.resolve() in (real, request.records.resolve()):
                raise ConfigError(f"--out={out}: the rows are read from there; give another name")
    check_file(request.report, "a report", begins_with(f'"{_FIRST_KEY}"'.encode()), request.overwrite)
    check_file(out, "a file of questions", partial(_ours, request.report), request.overwrite)


def _ours(report: Path, out: Path) -> bool:
    try:
        return bool(json.loads(report.read_text(encoding="utf-8"))["sha256"] == digest(out))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _identity(folder: Path, settings: Settings, source: DataSource, samples: int) -> dict[str, Any]:
    """What decides the measurements: records with another identity must not be mixed."""
    sampling = {name: getattr(settings.rollout, name) for name in _OF_ROLLOUT}
    task = {
        name: value
        for name, value in options(source)
        if not any(f"{name}.".startswith(f"{free}.") for free in _FREE_SOURCE)
    }
    whole = {"model": folder_digest(folder), "samples": samples, "sampling": sampling, "task": task}
    return dict(json.loads(json.dumps(whole, default=vars)))


def _recorded(request: SelectRequest, identity: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Question]:
    """The newest record of each question. Raises ConfigError if the rows have changed, or as `RecordFile` does."""
    known: dict[str, Question] = {}

    def add(fields: dict[str, Any]) -> None:
        question = Question.parse(fields, request.samples)
        known[question.task_id] = question

    RecordFile(request.records, _HEAD, identity, add, "measured question", "its questions were measured with").close()
    for task in tasks:
        if task.task_id in known and known[task.task_id].content != row_hash(task):
            raise ConfigError(
                f"{request.records}: {task.task_id} was another question when it was measured, because the rows have "
                "changed: give another --out, or delete that file to play everything again"
            )
    return known


def _kept(request: SelectRequest, found: Iterable[Question]) -> set[str]:
    return {q.task_id for q in found if q.successes and request.at_least <= q.success <= request.at_most}


def _write(
    request: SelectRequest,
    counted: dict[str, Any],
    rows_of: Callable[[set[str]], Iterable[Mapping[str, Any]]],
    kept: set[str],
) -> str:
    """Writes rows and report; returns the summary. Raises HopelessError if there is no row."""
    if kept:
        rows = (json.dumps(row, ensure_ascii=False, default=str) for row in rows_of(kept))
        write_atomically(request.out, rows, "the questions")
        counted["sha256"] = digest(request.out)
    write_atomically(request.report, [json.dumps(counted, indent=1, ensure_ascii=False)], "the report")
    if not kept:
        why = f"; the first failure: {counted['failures'][0]}" if counted["failures"] else ""
        raise HopelessError(
            f"no question is kept of {counted[_FIRST_KEY]} ({counted['too_easy']} too easy, {counted['too_hard']} too "
            f"hard, {counted['failed']} failed{why}): see {request.report}. Other bounds, --at-least and --at-most, "
            "play nothing again, and failed questions are played again"
        )
    return _summary(request, counted)


def _counts(request: SelectRequest, found: Sequence[Question], tasks: Sequence[Task]) -> dict[str, Any]:
    measured, kept = [question for question in found if question.successes], _kept(request, found)
    too_long = [question for question in found if question.too_long]
    failed = [question for question in found if not question.finished]
    easy = [question for question in measured if question.success > request.at_most]
    hard = [question for question in measured if question.success < request.at_least]
    by_count = Counter(sum(question.successes) for question in measured)
    attempts = len(measured) * request.samples
    answers = [question.answered for question in measured]
    text = {task.task_id: str(json.loads(task.problem)["prompt"])[:200] for task in tasks}

    def examples(questions: Iterable[Question]) -> list[dict[str, Any]]:
        shown = list(questions)[:_SHOWN]
        return [{"id": q.task_id, "success": q.success, "prompt": text[q.task_id]} for q in shown]

    return {
        _FIRST_KEY: len(tasks),
        "model": str(request.model),
        "samples": request.samples,
        "at_least": request.at_least,
        "at_most": request.at_most,
        "kept": len(kept),
        "too_easy": len(easy),
        "too_hard": len(hard),
        "too_long": len(too_long),
        "failed": len(tasks) - len(measured) - len(too_long),
        "histogram": [by_count[successes] for successes in range(request.samples + 1)],
        "success": sum(q.success for q in measured) / max(1, len(measured)),
        "answered": None if not answers or None in answers else sum(a or 0 for a in answers) / attempts,
        "tokens": {"generated": sum(q.generated for q in measured), "read": sum(q.read for q in measured)},
        "examples": {
            "kept": examples(q for q in measured if q.task_id in kept),
            "too_easy": examples(easy),
            "too_hard": examples(hard),
        },
        "failures": [f"{question.task_id}: {question.failure}" for question in failed[:_SHOWN]],
    }


def _summary(request: SelectRequest, counted: Mapping[str, Any]) -> str:
    histogram, samples = counted["histogram"], request.samples
    largest = max(histogram)
    lines = [f"right of {samples}  questions"]
    for right, questions in enumerate(histogram):
        inside = "kept" if request.at_least <= right / samples <= request.at_most else ""
        lines.append(f"{right:10}  {questions:9}  {'#' * round(_BAR * questions / largest)} {inside}".rstrip())
    lines.append(
        f"{counted['kept']} of {counted['questions']} questions kept, {counted['too_easy']} too easy, "
        f"{counted['too_hard']} too hard, {counted['too_long']} too long, {counted['failed']} failed"
    )
    if counted["failed"]:
        lines += [f"failed: {one}" for one in counted["failures"]]
        lines.append("the same command plays the failed questions again")
    return "\n".join([*lines, f"written to {request.out}: rows for data.train; counts in {request.report}"])
