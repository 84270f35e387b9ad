"""`icrl report RUN...`: one HTML file without a network, which shows what was learned and how critique became skill."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icrl_megatron import settings as settings_module
from icrl_megatron.config import ConfigError, Settings
from icrl_megatron.report import outcome
from icrl_megatron.rollout.intervals import proportion
from icrl_megatron.telemetry.dumps import dump_path, dumped_steps, read_dump
from icrl_megatron.telemetry.files import write_atomically
from icrl_megatron.telemetry.metrics import GENERATED, HELDOUT, HELDOUT_ATTEMPTS
from icrl_megatron.telemetry.page_episodes import Speller, episode
from icrl_megatron.telemetry.writer import METRICS_FILE, TIME_PREFIX, Row, read_rows

WEB = Path(__file__).parent / "web"
BINS = 24
"""Bars of the calibration weight's distribution, from 0 to w_max."""
CURVES = (
    *("success/critique_free", "success/with_critique", "reward/attempt", "reward/revision", "reward/critique"),
    *(
        "revision/gain",
        "critique/tokens",
        "attempt/tokens",
        "actor/calibration_weight",
        "actor/entropy",
        "actor/kl_old",
    ),
    *("actor/mismatch_abs", "actor/grad_norm"),
)


@dataclass(frozen=True)
class PageSize:
    """How much of a run goes into the page."""

    episodes: int = 240
    """Of each run, spread over its steps."""
    tokens: int = 4000
    """Of each text; what is longer is cut, and says so."""


def write_page(runs: Sequence[Path], out: Path, size: PageSize = PageSize()) -> Path:
    """Writes the page of these run folders to `out`. Raises ConfigError on a folder that is no run with metrics."""
    data = {"runs": [run_data(run, size) for run in runs]}
    labels = [run["label"] for run in data["runs"]]
    for run, folder in zip(data["runs"], runs, strict=True):
        if labels.count(run["label"]) > 1:
            run["label"] = folder.name
    parts = {name: (WEB / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    page = parts["html"].replace("/*CSS*/", parts["css"]).replace("/*JS*/", parts["js"])
    # "</" could end the script element, whatever a model wrote; JSON reads "<\/" as the same.
    text = json.dumps(_finite(data), separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    write_atomically(out, [page.replace("/*DATA*/", text)])
    return out


def run_data(run: Path, size: PageSize) -> dict[str, Any]:
    """Everything the page shows of one run, as JSON."""
    rows = read_rows(run / METRICS_FILE)
    if not rows or not (run / settings_module.SAVED_NAME).exists():
        raise ConfigError(f"{run}: no {METRICS_FILE} or {settings_module.SAVED_NAME} there; give the folder of a run")
    settings = settings_module.load_saved(run / settings_module.SAVED_NAME)
    steps = [row for row in rows if GENERATED in row]
    spent = np.cumsum([row[GENERATED] for row in steps]).tolist()
    records = [(step, record) for step in dumped_steps(run) for record in read_dump(dump_path(run, step))]
    return {
        "label": settings.name,
        "folder": str(run),
        "steps": [row["step"] for row in steps],
        "tokens": spent,
        "curves": {name: [row.get(name) for row in steps] for name in CURVES if any(name in row for row in steps)},
        "rounds": _rounds(steps),
        "times": _times(steps),
        "heldout": _heldout(rows, [s.name for s in settings.tasks.sources]),
        "table": _table(run, settings),
        "control": {when: _read(run / f"control_{when}.json") for when in ("before", "after")},
        "setup": _setup(settings),
        "w_max": settings.algo.calibration.w_max,
        "weights": _weights(records, settings.algo.calibration.w_max),
        "episodes": _episodes(run, settings, records, size),
    }


def _rounds(steps: Sequence[Row]) -> dict[str, list[float | None]]:
    names = sorted({name for row in steps for name in row if name.startswith("success/round_")})
    return {name.removeprefix("success/"): [row.get(name) for row in steps] for name in names}


def _times(steps: Sequence[Row]) -> dict[str, list[float]]:
    names = sorted({n for row in steps for n in row if n.startswith(TIME_PREFIX) and not n.endswith("_per_s")})
    return {n.removeprefix(TIME_PREFIX).removesuffix("_s"): [row.get(n, 0.0) for row in steps] for n in names}


def _heldout(rows: Sequence[Row], sources: Sequence[str]) -> list[dict[str, Any]]:
    """Evaluations over all task sets together, with Wilson's interval."""
    found = []
    for row in rows:
        trials = sum(int(row.get(f"{HELDOUT_ATTEMPTS}/{name}", 0)) for name in sources)
        if HELDOUT in row and trials:
            share = proportion(round(row[HELDOUT] * trials), trials)
            tokens = row.get("tokens/generated_total", 0.0)
            found.append({"step": row["step"], "tokens": tokens, **asdict(share)})
    return found


def _table(run: Path, settings: Settings) -> list[dict[str, Any]]:
    found = outcome(settings.name, run, settings)
    return [
        {"task": name, "before": asdict(found.before[name]), "after": asdict(found.after[name])} for name in found.after
    ]


def _setup(settings: Settings) -> dict[str, str]:
    rollout, algo = settings.rollout, settings.algo
    weight = f"w_max {algo.calibration.w_max:g}, {algo.calibration.denominator}" if algo.calibration.enabled else "off"
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


def _weights(records: Sequence[tuple[int, Any]], w_max: float) -> dict[str, Any]:
    """Per dumped step: the share of calibrated tokens in each of `BINS` bins of their weight."""
    edges = np.linspace(0.0, w_max, BINS + 1)
    columns: dict[int, list[float]] = {}
    for step, record in records:
        columns.setdefault(step, []).extend(w for credited in record.credit.values() for w in credited.weights)
    shares = {
        step: (np.histogram(np.clip(of, 0.0, w_max), edges)[0] / len(of)).round(4).tolist()
        for step, of in columns.items()
        if of
    }
    return {"steps": list(shares), "shares": list(shares.values()), "counts": [len(columns[s]) for s in shares]}


def _episodes(run: Path, settings: Settings, records: Sequence[tuple[int, Any]], size: PageSize) -> dict[str, Any]:
    """A choice of episodes, those with a weighted revision first, spread evenly over the run and in its order."""
    ranked = [i for i, (_, r) in enumerate(records) if any(c.weights for c in r.credit.values())]
    others = [i for i, (_, r) in enumerate(records) if not any(c.weights for c in r.credit.values())]
    chosen = _spread(ranked, max((3 * size.episodes) // 4, size.episodes - len(others)))
    chosen += _spread(others, size.episodes - len(chosen))
    speller = Speller.of_run(run, settings)
    shown = [episode(*records[i], speller, size.tokens) for i in sorted(chosen)]
    return {"total": len(records), "shown": shown}


def _spread(indices: Sequence[int], count: int) -> list[int]:
    if len(indices) <= count:
        return list(indices)
    return [indices[(i * len(indices)) // count] for i in range(count)]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _finite(value: Any) -> Any:
    """JSON in a browser has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(of) for name, of in value.items()}
    return [_finite(of) for of in value] if isinstance(value, list | tuple) else value
