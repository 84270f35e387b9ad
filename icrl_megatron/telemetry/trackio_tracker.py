"""Trackio (0.43): a local database below <run_dir>/trackio, or the Space named by Trackio's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from icrl_megatron.telemetry.trackers import COLUMNS, Identity, Sink, TableRow


class TrackioSink:
    def __init__(self, trackio: Any) -> None:
        self._trackio = trackio

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def table(self, step: int, rows: Sequence[TableRow]) -> None:
        table = self._trackio.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._trackio.log({"episodes": table}, step=step)

    def close(self) -> None:
        self._trackio.finish()


def start(identity: Identity) -> Sink:
    settings = identity.settings
    if settings.offline:  # Trackio reads it at import
        os.environ["TRACKIO_DIR"] = str(identity.folder / "trackio")
    import trackio

    trackio.init(
        project=settings.project,
        name=f"{identity.name}-{identity.run_id[:8]}",
        group=settings.group or None,
        config={name: str(value) for name, value in identity.config.items()},
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return TrackioSink(trackio)
