"""`icrl launch` up to the import of NeMo-Run; tests/cluster tests it with NeMo-Run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from icrl_megatron.launch import nemo
from icrl_megatron.launch.nemo import Where
from icrl_megatron.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]


def tunnel() -> Where:
    return Where(on="slurm", account="a", partition="p", host="login", remote_home="/home/me/icrl")


def in_image(image: str) -> Where:
    return Where(on="slurm", account="a", partition="p", container=image)


def test_recipes_and_ranks_do_not_import_nemo_run() -> None:
    code = (
        "import sys, icrl_megatron.launch.nemo, icrl_recipes; icrl_recipes.registry(); "
        "assert 'nemo_run' not in sys.modules and 'torch' not in sys.modules; "
        "import icrl_megatron.launch.phases, icrl_megatron.launch.rank; assert 'nemo_run' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("where", "recipe", "overrides", "message"),
    [
        (Where(on="moon"), "quickstart", [], "--on moon: choose local or slurm"),
        (Where(site={"qos": "high"}), "quickstart", [], "--qos: --on local submits no job"),
        (Where(prologue="modules.sh"), "quickstart", [], "--prologue: --on local submits no job"),
        (Where(on="slurm", prologue="gone.sh"), "quickstart", [], "--prologue gone.sh: no such file"),
        (Where(on="slurm", account="a", partition="p", host="login"), "quickstart", [], "needs --remote-home"),
        (Where(), "quickstar", [], "did you mean quickstart"),
        (Where(), "qwen3_8b_2nodes", [], "launch.nodes=2: --on local has one machine"),
        (Where(container="gone.sqsh"), "quickstart", [], "--on local runs none"),
        (in_image("gone.sqsh"), "quickstart", [], "--container gone.sqsh: no such file"),
        (in_image(__file__), "quickstart", [], "no squashfs image"),
        (Where(ranks_per_node=3), "quickstart", [], "does not divide the 3 ranks"),
        (Where(ranks_per_node=-4), "quickstart", [], "--ranks-per-node -4: must be at least 1"),
        (Where(), "quickstart", ["stepz=1"], "did you mean steps"),
        (tunnel(), "quickstart", ["steps=-1"], "steps=-1: must be a finite number"),
        (tunnel(), "qwen3_8b_alfworld_4xh100", ["actor.tensor_parallel=3"], "does not divide the 4 ranks"),
    ],
)
def test_bad_arguments_are_rejected(where: Where, recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        nemo.resolve(recipe, overrides, where)


def test_with_a_tunnel_the_model_path_is_not_checked_locally() -> None:
    where = tunnel()
    settings = nemo.resolve("qwen3_8b_alfworld_4xh100", ["model.path=/only/there"], where)
    env = nemo.environment(where, settings)
    assert env["ICRL_HOME"] == "/home/me/icrl"
    assert env["ICRL_PYTHON"] == "python3"
    assert env["ICRL_RANKS_PER_NODE"] == "4"


def test_resolve_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    nemo.resolve("quickstart", [], Where())
    assert dict(os.environ) == before


def test_sglang_is_looked_for_only_where_the_run_will_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["engine.kind=sglang", f"run_dir={tmp_path / 'run'}"]
    image = tmp_path / "image.sqsh"
    image.write_bytes(b"hsqs")
    for where in (in_image(str(image)), Where(on="slurm", python="/only/on/the/nodes/python")):
        assert nemo.resolve("rulebook_easy", words, where).engine.kind == "sglang"
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setattr(nemo, "HOME", ROOT)
    for python in (sys.executable, str(other)):
        with pytest.raises(ConfigError, match=r"^engine\.kind=sglang: engine\.python=.* has no SGLang"):
            nemo.resolve("rulebook_easy", words, Where(on="slurm", python=python))


@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is not None, reason="NeMo-Run is installed here")
def test_missing_nemo_run_is_reported_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="make install-nemo"):
        nemo.launch("quickstart", [], Where())
