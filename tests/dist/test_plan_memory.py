"""The planner's memory estimate for a small model against real Megatron ranks on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.plan import memory
from icrl_megatron.plan.layout import Layout, local_parameters
from icrl_megatron.settings.loading import save
from icrl_megatron.settings.schema import Settings, TinyModel

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WORKER = Path(__file__).with_name("allocation_worker.py")
TOLERANCE = 0.10
GRIDS = {
    "one process, fp32": (1, 1, 1, "fp32", "qwen3"),
    "tensor parallel 2, bf16": (2, 2, 1, "bf16", "qwen3"),
    "tensor parallel 2, bf16, qwen2": (2, 2, 1, "bf16", "qwen2"),
    "data parallel 2, bf16": (2, 1, 1, "bf16", "qwen3"),
    "pipeline parallel 2, fp32": (2, 1, 2, "fp32", "qwen3"),
}


@pytest.mark.parametrize(("ranks", "tensor", "pipeline", "precision", "family"), GRIDS.values(), ids=list(GRIDS))
def test_planned_state_equals_what_ranks_hold(
    ranks: int, tensor: int, pipeline: int, precision: str, family: str, tmp_path: Path
) -> None:
    tiny = TinyModel(family, layers=4, hidden=64, heads=4, kv_heads=2, ffn=192, tie_embeddings=False)
    build_tiny(tmp_path / "model", tiny, [f"w{i}" for i in range(500)], seed=0)
    settings = Settings()
    settings.model.path = str(tmp_path / "model")
    settings.actor.precision = precision
    settings.actor.tensor_parallel, settings.actor.pipeline_parallel = tensor, pipeline
    settings.actor.sequence_parallel = tensor > 1
    save(settings, tmp_path / "settings.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={ranks}", str(WORKER)]
    command += [str(tmp_path / name) for name in ("model", "settings.yaml")] + [str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]

    shape, layout = ModelShape.read(tmp_path / "model"), Layout.of(settings, ranks)
    planned = memory.state(shape, layout)
    held = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert local_parameters(shape, layout) == max(rank["parameters"] for rank in held)
    for name in ("weights", "gradients", "optimizer"):
        most = max(rank[name] for rank in held)
        assert getattr(planned, name) == pytest.approx(most, rel=TOLERANCE), (name, held)
