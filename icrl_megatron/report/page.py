"""`icrl report RUN...`: one HTML file that needs no network, with the learning curves, calibration and episodes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from icrl_megatron.report.bands import band
from icrl_megatron.report.final import controls, outcome
from icrl_megatron.report.page_choice import PageSize, choose
from icrl_megatron.report.page_curves import Measured, group_data, groups, times
from icrl_megatron.report.page_episodes import Speller, agents, episode
from icrl_megatron.report.page_static import static_episodes
from icrl_megatron.report.segments import colors, tools_of
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.arms import ARMS, BASELINE
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.metrics import EVALUATION_TOKENS
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.result_files import begins_with, check_file

WEB = Path(__file__).parent / "web"
WARM_START = "warm_start"
"""Folder of a run's supervised training."""
DEFAULT_SIZE = PageSize()
SCRIPTS = ("base.js", "charts.js", "episodes.js", "page.js")
"""In order of dependency; the page contains them as one script."""


def write_page(runs: Sequence[Path], out: Path, size: PageSize = DEFAULT_SIZE, overwrite: bool = False) -> Path:
    """Writes the page of these run folders to `out`. Raises ConfigError if a folder is not a run with metrics, or if
    `out` exists and is not an earlier page, unless `overwrite`."""
    check_file(out, "a page", begins_with(b"<title>ICRL report</title>"), overwrite)
    measured = _labelled(runs, [_measured(run) for run in runs])
    shown = [run_data(run, of, size, len(runs)) for run, of in zip(runs, measured, strict=True)]
    names = agents(one for run in shown for one in run["episodes"]["shown"])
    data: dict[str, Any] = {"runs": shown, "groups": [], "agents": colors(names)}
    for members in groups(measured):
        of_seeds = [shown[m]["weights"] for m in members]
        transfer = {name: asdict(band([(w["steps"], w[name]) for w in of_seeds])) for name in ("mean", "held", "moved")}
        data["groups"].append(group_data(measured, members) | {"transfer": transfer})
    parts = {name: (WEB / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    script = "\n".join(parts[name] for name in SCRIPTS)
    # "</" in a model's text could end the script element; JSON reads "<\/" as the same characters.
    text = json.dumps(_finite(data), separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    filled = {"CSS": parts["page.css"], "STATIC": static_episodes(data), "DATA": text, "JS": script}
    # In one pass: a text of a model may contain the place of another part.
    page = re.sub(r"/\*([A-Z]+)\*/", lambda place: filled[place[1]], parts["page.html"])
    write_atomically(out, [page])
    return out


def _measured(run: Path) -> Measured:
    rows = read_rows(run / METRICS_FILE)
    supervised = read_rows(run / WARM_START / METRICS_FILE)
    settings = _settings(run)
    if settings is None:
        raise ConfigError(f"{run}: no {METRICS_FILE} or {settings_module.SAVED_NAME} in it; give the folder of a run")
    if not (rows or supervised):
        raise ConfigError(f"{run}: no {METRICS_FILE} in it yet; wait until its first step, or give another run")
    if run.resolve().name == WARM_START:
        rows, supervised = [], rows
    return Measured(settings.name, settings, rows, supervised)


def _settings(run: Path) -> Settings | None:
    """The settings of a run, or of a baseline or warm start inside its folder. None if there are none."""
    folder = run.resolve()
    if (folder / settings_module.SAVED_NAME).exists():
        return settings_module.load_saved(folder / settings_module.SAVED_NAME)
    arm = next((name for name in ARMS if folder.name == BASELINE.format(name)), "")
    if not (arm or folder.name == WARM_START) or not (folder.parent / settings_module.SAVED_NAME).exists():
        return None
    above = settings_module.load_saved(folder.parent / settings_module.SAVED_NAME)
    settings = settings_module.apply_overrides(above, ARMS[arm].changes) if arm else above
    return replace(settings, name=f"{above.name}_{arm or WARM_START}", run_dir=str(run))


def _labelled(folders: Sequence[Path], runs: Sequence[Measured]) -> list[Measured]:
    """Labels experiments of the same name by their folders; the seeds of one experiment share a label."""
    found = list(runs)
    for parts in (1, 2):  # the folder's name, then also its parent's
        experiments = groups(runs)
        names = [found[members[0]].label for members in experiments]
        for members in experiments:
            if names.count(found[members[0]].label) > 1:
                label = "/".join(folders[members[0]].resolve().parts[-parts:])
                if len(members) > 1:  # icrl_0, icrl_1, icrl_2
                    label = label.removesuffix(f"_{runs[members[0]].settings.seed}")
                for m in members:
                    found[m] = replace(found[m], label=label)
    return found


def run_data(run: Path, measured: Measured, size: PageSize, runs: int = 1) -> dict[str, Any]:
    """Everything the page shows of one run, as JSON; `runs` is how many runs share the page's total size."""
    settings, costs = measured.settings, measured.costs()
    calibration = settings.algo.calibration
    choice = choose(run, calibration.w_max, size, runs)
    speller = Speller.of_run(run, settings)
    tools = tools_of(record.episode for _, record in choice.records)
    return {
        "label": measured.label,
        "folder": str(run),
        "seed": settings.seed,
        "steps": len(costs),
        "tokens": costs[-1] if costs else 0,
        "evaluation_tokens": sum(row.get(EVALUATION_TOKENS, 0.0) for row in measured.rows),
        "times": times(measured),
        "table": _table(run, settings),
        "control": controls(run),
        "setup": _setup(settings),
        "w_max": calibration.w_max,
        "weight_name": "Shaping f(p), in w's place," if settings.algo.shaping_gamma > 0 else "Calibration weight",
        "weights": choice.weights,
        "episodes": {
            "shown": [episode(step, record, speller, choice.limit, tools) for step, record in choice.records],
            "kept": choice.kept,
            "read": choice.read,
            "dumped": choice.dumped,
            "limit": choice.limit,
        },
    }


def _table(run: Path, settings: Settings) -> list[dict[str, Any]]:
    found = outcome(settings.name, run, settings)
    return [
        {"task": name, "before": asdict(found.before[name]), "after": asdict(found.after[name])} for name in found.after
    ]


def _setup(settings: Settings) -> dict[str, str]:
    rollout, algo = settings.rollout, settings.algo
    weight = f"w_max {algo.calibration.w_max:g}, {algo.calibration.denominator}" if algo.calibration.enabled else "off"
    if algo.shaping_gamma > 0:
        weight = f"off; shaped, p / (p + {algo.shaping_gamma:g})"
    if rollout.rounds == 1:
        weight = "no revisions"
    return {
        "tasks": ", ".join(s.name for s in settings.tasks.sources),
        "batch": f"{rollout.tasks_per_step} tasks x {rollout.episodes_per_task} episodes",
        "rounds": str(rollout.rounds),
        "critic": rollout.critic,
        "groups": algo.group_by,
        "calibration": weight,
        "revisions": "internalised" if algo.internalise else "trained with their critique",
        "learning rate": f"{settings.optim.learning_rate:g}",
        "seed": str(settings.seed),
    }


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity with None: JSON in a browser has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(of) for name, of in value.items()}
    return [_finite(of) for of in value] if isinstance(value, list | tuple) else value
