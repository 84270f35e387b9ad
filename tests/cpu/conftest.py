"""Fixtures for tests with a tiny actor (actors.py). What needs torch is imported only where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import Browser

    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.distributed.grid import Grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of a tiny model."""
    from icrl_megatron.model.tiny import build_tiny
    from icrl_megatron.settings.schema import TinyModel

    out = tmp_path_factory.mktemp("tiny")
    tiny = TinyModel(hidden=32, heads=2, kv_heads=1, ffn=48, max_positions=64)
    build_tiny(out, tiny, [f"w{i}" for i in range(20)], seed=1)
    return out


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    """A grid of one rank."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        pytest.skip("the stand-ins for CUDA would hide the GPU from other tests of this process")
    from icrl_megatron.distributed import grid as grids
    from icrl_megatron.settings.schema import Settings

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # remembered, so that what single_process sets does not outlive the module
            patch.delenv(name)
        grids.single_process()
        yield grids.build(Settings())
        grids.shutdown()
    assert not dist.is_initialized()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders are relative paths; without WORLD_SIZE the test process is not a rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to environment servers are tried again almost at once."""
    from icrl_megatron.tasks import servers

    monkeypatch.setattr(servers, "BACKOFF_S", 0.001)


@pytest.fixture
def make(folder: Path, grid: Grid) -> Callable[..., Actor]:
    """make(precision, **algo): a new actor with the weights of `folder`."""
    from actors import make_actor

    return partial(make_actor, folder, grid)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from browser import Browser, executable

    program = executable()
    if program is None:
        pytest.skip("no Chromium on the path (ICRL_CHROMIUM names another)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
