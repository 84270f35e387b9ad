"""MLflow (3.17: MlflowClient). Offline runs are in the file store <run_dir>/mlruns: `mlflow ui --backend-store-uri`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from icrl_megatron.telemetry.trackers import COLUMNS, Identity, Sink, TableRow
from icrl_megatron.utils.step_names import step_name

_TAG = "icrl.run_id"
_PARAMS, _VALUE_CHARS = 100, 500
"""MLflow's limits on the parameters per batch and on the length of a parameter's value."""


class MlflowSink:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(_name(name), value, now, step) for name, value in metrics.items() if math.isfinite(value)]
        self._client.log_batch(self._run_id, metrics=found)

    def table(self, step: int, rows: Sequence[TableRow]) -> None:
        columns = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
        self._client.log_dict(self._run_id, columns, f"episodes/{step_name(step)}.json")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _name(metric: str) -> str:
    """Keeps one group level: in a file store, heldout/reward cannot be both a file and the folder of another metric."""
    group, slash, rest = metric.partition("/")
    return group + slash + rest.replace("/", ".")


def start(identity: Identity) -> Sink:
    if identity.settings.offline:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    settings = identity.settings
    client = MlflowClient(tracking_uri=(identity.folder / "mlruns").absolute().as_uri() if settings.offline else None)
    experiment = client.get_experiment_by_name(settings.project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(settings.project)
    known = client.search_runs([experiment_id], filter_string=f"tags.`{_TAG}` = '{identity.run_id}'")
    if known:
        client.update_run(known[0].info.run_id, status="RUNNING")
        return MlflowSink(client, known[0].info.run_id)
    tags = {_TAG: identity.run_id, "group": settings.group, **dict.fromkeys(settings.tags, "true")}
    run = client.create_run(experiment_id, run_name=identity.name, tags={k: v for k, v in tags.items() if v})
    params = [Param(name, str(value)[:_VALUE_CHARS]) for name, value in identity.config.items()]
    for begin in range(0, len(params), _PARAMS):
        client.log_batch(run.info.run_id, params=params[begin : begin + _PARAMS])
    return MlflowSink(client, run.info.run_id)
