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
from icrl_megatron.settings.loading import load_saved, save
from icrl_megatron.settings.schema import Settings, TinyModel

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WORKER = Path(__file__).with_name("allocation_worker.py")
TOLERANCE = 0.10
GRIDS = {  # ranks, TP, PP, precision, family
    "one process, fp32": (1, 1, 1, "fp32", "qwen3"),
    "tensor parallel 2, bf16": (2, 2, 1, "bf16", "qwen3"),
    "tensor parallel 2, bf16, qwen2": (2, 2, 1, "bf16", "qwen2"),
    "data parallel 2, bf16": (2, 1, 1, "bf16", "qwen3"),
    "pipeline parallel 2, fp32": (2, 1, 2, "fp32", "qwen3"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a grid -> the folder with its settings, and with what each of its ranks holds."""
    found = {name: tmp_path_factory.mktemp("grid") for name in GRIDS}
    for name, (_, tensor, pipeline, precision, family) in GRIDS.items():
        tiny = TinyModel(family, layers=4, hidden=64, heads=4, kv_heads=2, ffn=192, tie_embeddings=False)
        build_tiny(found[name] / "model", tiny, [f"w{i}" for i in range(500)], seed=0)
        settings = Settings()
        settings.model.path = str(found[name] / "model")
        settings.actor.precision = precision
        settings.actor.tensor_parallel, settings.actor.pipeline_parallel = tensor, pipeline
        settings.actor.sequence_parallel = tensor > 1
        save(settings, found[name] / "settings.yaml")
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={ranks}", str(WORKER)]
        command += [str(folder) for name, folder in found.items() if GRIDS[name][0] == ranks]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("name", GRIDS)
def test_planned_state_equals_what_ranks_hold(folders: dict[str, Path], name: str) -> None:
    ranks, folder = GRIDS[name][0], folders[name]
    shape, layout = ModelShape.read(folder / "model"), Layout.of(load_saved(folder / "settings.yaml"), ranks)
    planned = memory.state(shape, layout)
    held = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert local_parameters(shape, layout) == max(rank["parameters"] for rank in held)
    for key in ("weights", "gradients", "optimizer"):
        most = max(rank[key] for rank in held)
        assert getattr(planned, key) == pytest.approx(most, rel=TOLERANCE), (key, held)
