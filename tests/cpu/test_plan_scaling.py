"""Plans for other numbers of GPUs: scaling, its picture, and whole nodes."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from icrl_megatron.plan import hardware, planner
from icrl_megatron.plan.scaling import efficiency, fitting, picture, scale
from icrl_megatron.plan.search import search
from icrl_megatron.plan.show import show_scaling
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

RECIPE = "qwen3_8b_alfworld_4xh100"
H100 = hardware.GPUS["h100"]


def load(*overrides: str) -> Settings:
    return settings_module.load(RECIPE, overrides)


def test_scaling_from_8_to_1024_gpus(tmp_path: Path) -> None:
    points = scale(load(), H100)
    assert [point.gpus for point in points] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert points[-1].same_batch is None  # 512 replicas for 128 episodes
    shares = [efficiency(points, plan) for _, plan in fitting(points, grown_batch=True)]
    assert shares[0] == 1
    assert all(0 < share <= 1.25 for share in shares)
    own, grown = points[3].same_batch, points[3].grown_batch
    assert own is not None and grown is not None
    assert own.tokens_a_second_a_gpu < grown.tokens_a_second_a_gpu
    # The recipe has 16 tasks on 4 GPUs, so there are 32 on 8.
    doubled = planner.plan(load("rollout.tasks_per_step=32"), gpus=8)
    assert points[0].grown_batch == doubled
    assert picture(points, tmp_path / "scaling.png", RECIPE).read_bytes().startswith(b"\x89PNG")


def test_the_host_plans_every_sample_of_the_step() -> None:
    """Credit, balance and packing are not shared out, so their seconds grow with the batch, not with the GPUs."""
    points = scale(load(), H100)
    first, last = points[0].grown_batch, points[-1].grown_batch
    assert first is not None and last is not None
    samples = len(last.work.sequence_S)
    assert last.times.phases["host"] == pytest.approx(1.3e-5 * samples)
    assert samples / len(first.work.sequence_S) == pytest.approx(1024 / 8, rel=0.05)
    assert last.times.total > last.times.phases["host"] + last.times.phases["decode"]


def test_search_and_suggestions_use_whole_nodes() -> None:
    found = search(load(), 12, H100)
    assert not found.best
    assert "12 GPUs are not whole nodes of 8" in {one.reason for one in found.rejected}
    settings = load("launch.ranks=6", "model.path=models/Qwen3-32B")
    words = planner.cheapest_change(planner.plan(settings), settings)
    assert "12 GPUs" not in words


def test_layouts_that_do_not_fit_are_marked_and_not_drawn(tmp_path: Path) -> None:
    points = scale(load("model.path=models/Qwen3-32B", "actor.tensor_parallel=8"), H100)
    drawn = [points[i].gpus for i, _ in fitting(points, grown_batch=True)]
    assert 8 not in drawn
    assert drawn
    console = Console(width=200, record=True, file=StringIO())
    show_scaling(points, console)
    line = next(line for line in console.export_text().splitlines() if line.startswith("8 "))
    assert "does not fit" in line
    assert "%" not in line
    assert picture(points, tmp_path / "x", RECIPE).read_bytes().startswith(b"\x89PNG")
    nothing = scale(load("model.path=models/Qwen3-32B", "actor.offload=none"), H100)
    with pytest.raises(ConfigError, match="nothing to draw"):
        picture(nothing, tmp_path / "y.png", RECIPE)
