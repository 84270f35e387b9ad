"""Weights & Biases (wandb 0.31: Run.log, Table). `wandb sync` uploads offline runs, which are below <run_dir>/wandb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from icrl_megatron.telemetry.trackers import COLUMNS, Identity, Sink, TableRow


class WandbSink:
    def __init__(self, run: Any, table: Any) -> None:
        self._run, self._table = run, table

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, rows: Sequence[TableRow]) -> None:
        self._run.log({"episodes": self._table(columns=list(COLUMNS), data=[list(row) for row in rows])}, step=step)

    def close(self) -> None:
        self._run.finish()


def start(identity: Identity) -> Sink:
    import wandb

    settings = identity.settings
    run = wandb.init(
        project=settings.project,
        name=identity.name,
        group=settings.group or None,
        tags=list(settings.tags),
        id=identity.run_id,
        resume="allow",
        dir=str(identity.folder),
        mode="offline" if settings.offline else "online",
        config=dict(identity.config),
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbSink(run, wandb.Table)
