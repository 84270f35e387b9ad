"""Which settings of a run may change when it is resumed, why the others may not, and the record of each change.

A setting may change unless that would contradict the checkpoints or the steps before them. Before the first checkpoint
any setting may change, because nothing depends on the settings yet. Imports no torch.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icrl_megatron.run import files as run_files
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.loading import SAVED_NAME
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.step_names import step_name, step_of, steps_in

CHANGES_FILE = "settings_changes.jsonl"
"""In the run folder: one line per changed setting: step, name, old, new, time."""
EARLIER_FOLDER = "settings_before"
"""In the run folder: earlier settings: step_NNNNNN.yaml until that step, start_NNN.yaml of the runs it started from."""

Since = Literal["start", "training", "end of the warm start"]


@dataclass(frozen=True)
class Rule:
    """Whether a setting may change in a run."""

    reason: str = ""
    """Why it may not change; empty if it may at any time."""
    since: Since = "training"
    """From when on it may not change: the first checkpoint of any stage, the first training step, or the warm start's
    result."""


FREE = Rule()
_MODEL = Rule("the checkpoints hold the weights of this model", "start")
_RANDOM = Rule("problems and samples of the steps so far were drawn with it and could not be reproduced", "start")
_PRECISION = Rule("the steps so far were computed in the other precision", "start")
_MOMENTS = Rule("the optimizer's moments in the checkpoints are averages with this decay", "start")
_WARM_START = Rule("the warm start is over and is not repeated", "end of the warm start")
_ALGORITHM = Rule("it is part of the algorithm of the steps so far")
_POLICY = Rule("the policy in the checkpoints was trained to sample at this temperature")
_STARTED = Rule("it only applies when a run begins, and this run resumes from its own checkpoints")
_MODE = Rule("some of the run's steps would be training and some would not")

RULES: dict[str, Rule] = {
    "name": FREE,
    "run_dir": FREE,
    "seed": _RANDOM,
    "steps": FREE,
    "max_generated_tokens": FREE,
    "baseline": FREE,
    "start_from": _STARTED,
    "start_with_moments": _STARTED,
    "model": _MODEL,
    "tasks": FREE,
    "data.seed": _RANDOM,
    "warm_start": _WARM_START,
    # Which rows are used may be corrected; after the warm start, they are not read.
    **{
        f"warm_start.{name}": FREE
        for name in ("data", "heldout", "heldout_interval", "patience", "max_tokens", "too_long", "bad_rows")
    },
    "rollout": FREE,
    "rollout.rounds": _ALGORITHM,
    "rollout.critic": _ALGORITHM,
    "rollout.temperature": _POLICY,
    "engine": FREE,
    "algo": _ALGORITHM,
    "algo.max_resamples": FREE,
    "algo.dynamic_sampling": FREE,
    "algo.on_no_signal": FREE,
    "algo.updates_per_step": FREE,
    "algo.mismatch_correction": FREE,
    "actor": FREE,
    "actor.precision": _PRECISION,
    "optim": FREE,
    "optim.beta1": _MOMENTS,
    "optim.beta2": _MOMENTS,
    "eval": FREE,
    "checkpoint": FREE,
    "trackers": FREE,
    "telemetry": FREE,
    "distill": FREE,
    "debug.mode": _MODE,
    "debug.dump": FREE,
    "launch": FREE,
}
"""Setting name, or section name for all of its settings -> rule. The longest matching name applies."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from the run's previous settings."""

    name: str
    old: object
    new: object


def rule_of(name: str) -> Rule:
    """The rule of the setting `name` (dotted; elements of lists by number)."""
    parts = re.sub(r"\.\d+(?=\.|$)", "", name).split(".")
    return next(RULES[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in RULES)


def check_resume(saved: Settings, settings: Settings, folder: Path) -> None:
    """Raises ConfigError if `settings` cannot resume the run in `folder`, which had `saved`. The error names every
    setting that may not change, and why."""
    passed = _passed(folder)
    refused, allowed = [], []
    for change in changes(saved, settings):
        rule = rule_of(change.name)
        if rule.reason and rule.since in passed:
            refused.append(f"{change.name} (was {_shown(change.old)}, now {_shown(change.new)}): {rule.reason}")
        else:
            allowed.append(change.name)
    if not refused:
        return
    harmless = f" ({', '.join(allowed)} may differ)" if allowed else ""
    raise ConfigError(
        f"{folder} holds a run with other settings: {'; '.join(refused)}{harmless}. Give the same values to resume it, "
        f"or begin a new run with another run_dir{_offer(folder)}"
    )


def changes(saved: Settings, settings: Settings) -> list[Change]:
    """Every setting whose value differs."""
    return [Change(name, old, new) for name, (old, new) in settings_module.changed(saved, settings).items()]


def adopt(settings: Settings, folder: Path) -> list[str]:
    """Saves `settings` as those of the run in `folder`, records the old ones, and returns one line per change.

    Call it while the run folder is locked, after `check_resume`. A change before the first training step also removes
    the results of a start with the other settings.
    """
    saved, passed = folder / SAVED_NAME, _passed(folder)
    found = changes(settings_module.load_saved(saved), settings) if saved.exists() else []
    lines = []
    if found and passed:
        step = max(steps_in(folder / "checkpoints"), default=0)
        before = folder / EARLIER_FOLDER / f"{step_name(step)}.yaml"
        if not before.exists():  # otherwise no step was made since the last change
            before.parent.mkdir(exist_ok=True)
            shutil.copyfile(saved, before)
        _append(folder / CHANGES_FILE, step, found)
        lines = [f"resume: {c.name} changes from {_shown(c.old)} to {_shown(c.new)} after step {step}" for c in found]
    if found and "training" not in passed:
        _clear_start(folder, passed, [change.name for change in found])
    settings_module.save(settings, saved)
    return lines


def earlier(folder: Path) -> list[Settings]:
    """Earlier settings of the run in `folder`, preceded by those of the run that its weights come from
    (`run/start.py`); oldest first."""
    paths = (folder / EARLIER_FOLDER).glob("*.yaml")
    return [settings_module.load_saved(path) for path in sorted(paths, key=lambda p: (step_of(p.stem) or -1, p.name))]


def _passed(folder: Path) -> set[Since]:
    """The stages that the run in `folder` has passed."""
    trained = bool(steps_in(folder / "checkpoints")) or any(r["step"] > 0 for r in read_rows(folder / METRICS_FILE))
    warmed = (folder / "warm_start" / "hf").exists()
    if trained:
        return {"start", "end of the warm start", "training"}
    if warmed:
        return {"start", "end of the warm start"}
    return {"start"} if steps_in(folder / "warm_start" / "checkpoints") else set()


def _append(path: Path, step: int, found: Sequence[Change]) -> None:
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = [{"step": step, "name": c.name, "old": c.old, "new": c.new, "time": now} for c in found]
    write_atomically(path, [*kept, *(json.dumps(row) for row in rows)])


def _clear_start(folder: Path, passed: set[Since], changed: Sequence[str]) -> None:
    """Removes what the next start would reuse: the control report, start weights, the random model."""
    (folder / "control_before.json").unlink(missing_ok=True)
    if not passed:
        shutil.rmtree(folder / "warm_start" / "random", ignore_errors=True)
    if any(name.startswith(("start_from", "model.", "actor.precision")) for name in changed):
        run_files.clear_start(folder / run_files.START)


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)


def _offer(folder: Path) -> str:
    root = folder / "checkpoints"
    return f"; start_from={root} starts it from these weights" if steps_in(root) else ""
