"""The command line as a user meets it: real processes, real exit codes, and no torch where none is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from icrl_megatron.settings import loading as S

ROOT = Path(__file__).resolve().parents[2]


def icrl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", "from icrl_megatron.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_dry_run_prints_the_resolved_settings(tmp_path: Path) -> None:
    done = icrl("train", "quickstart", "steps=3", "tasks.sources[1].weight=2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout)
    expected = S.load("quickstart", ["steps=3", "tasks.sources[1].weight=2"])
    assert S.load_saved(tmp_path / "printed.yaml") == expected
    assert list(OmegaConf.load(tmp_path / "printed.yaml")) == [name for name in S.field_types() if "." not in name]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "error: unknown recipe 'quikstart': did you mean quickstart?"),
        (["train", "quickstart", "rollout.round=3"], "did you mean rollout.rounds?"),
        (["train", "quickstart", "actor.tensor_parallel=3", "--dry-run"], "does not divide the 2 ranks"),
        (["train", "qwen3_4b", "model.path=nowhere"], "model.path=nowhere: no such folder"),
        (["train", "quickstart", "run_dir=/proc/icrl"], "run folder /proc/icrl cannot be written"),
        (["sft", "quickstart", "warm_start.steps=0"], "warm_start.steps=0: nothing to do"),
    ],
)
def test_user_errors_are_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = icrl(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train"], ["show", "run", "--step", "x"]])
def test_usage_errors_are_code_2(arguments: list[str], tmp_path: Path) -> None:
    assert icrl(*arguments, cwd=tmp_path).returncode == 2


def test_help_names_the_commands(tmp_path: Path) -> None:
    done = icrl("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("train", "sft", "import", "export", "show", "doctor", "recipes"):
        assert command in done.stdout


def test_recipes_are_listed(tmp_path: Path) -> None:
    done = icrl("recipes", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("quickstart", "rulebook_hard", "rulebook_easy", "household", "qwen3_4b", "qwen3_8b"):
        assert name in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["train", "quickstart", "--dry-run"]])
def test_no_heavy_import_before_it_is_needed(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom icrl_megatron.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'nemo_run', 'sglang'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == "heavy: []\n"


def test_packaging_names_what_make_and_users_rely_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["icrl"] == "icrl_megatron.cli:main"
    assert project["tool"]["setuptools"]["packages"]["find"]["where"] == [".", "kernels", "recipes"]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for requirement in ("torch==2.13.0", "megatron-core==0.16.1"):
        assert requirement in pinned
    assert not any(line.startswith("apex") for line in pinned)
