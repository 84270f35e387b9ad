"""The command line in real processes: exit codes, messages, and no import of torch unless it is needed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from commands import Done, python
from omegaconf import OmegaConf

from icrl_megatron.settings import loading as S

ROOT = Path(__file__).resolve().parents[2]


def icrl(*arguments: str, cwd: Path, code: str = "from icrl_megatron.cli import main; main()") -> Done:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return python("-c", code, *arguments, cwd=cwd, env=env)


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
        (["train", "quickstart", "actor.context_parallel=3", "--dry-run"], "use launch.ranks=6 or a multiple of it"),
        (["train", "qwen3_4b", "model.path=nowhere", "launch.device=auto"], "model.path=nowhere: no such folder"),
        (["train", "quickstart", "run_dir=/proc/icrl"], "run folder /proc/icrl cannot be written"),
        (["sft", "quickstart", "warm_start.steps=0"], "warm_start.steps=0: nothing to do"),
    ],
)
def test_user_errors_are_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = icrl(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["train", "qwen3_8b"], ["sft", "qwen3_4b"], ["eval", "model", "--task", "math"]])
def test_a_recipe_for_gpus_without_a_gpu_says_so_before_anything_else(command: list[str], tmp_path: Path) -> None:
    """The model and the data do not exist either, which would be the next message."""
    (tmp_path / "model").mkdir()
    more = ["launch.device=cuda", "tasks.sources.0.data.train=[gone.jsonl]"] if command[0] == "eval" else []
    code = (
        "import os, sys\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\nfrom icrl_megatron.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = icrl(*command, *more, cwd=tmp_path, code=code)
    assert done.returncode == 2 and done.stderr.startswith("error: launch.device=cuda: ")
    assert "icrl train quickstart" in done.stderr and done.stderr.count("\n") == 1
    assert "model.path" in icrl(*command[:2], "--dry-run", cwd=tmp_path, code=code).stderr or command[0] == "eval"


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train"], ["show", "run", "--step", "x"]])
def test_usage_errors_are_code_2(arguments: list[str], tmp_path: Path) -> None:
    assert icrl(*arguments, cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ("train", "sft", "import", "export", "show", "doctor", "recipes")),
        (["recipes"], ("quickstart", "rulebook_hard", "rulebook_easy", "household", "qwen3_4b", "qwen3_8b")),
        (["train", "quickstart", "--dry-run"], ("optim:",)),
    ],
)
def test_commands_without_a_model_import_little(arguments: list[str], shown: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom icrl_megatron.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'nemo_run', 'sglang'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = icrl(*arguments, cwd=tmp_path, code=code)
    assert done.stderr == "heavy: []\n" and all(text in done.stdout for text in shown)


def test_packaging_has_the_command_and_the_folders_and_no_wrong_apex() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["icrl"] == "icrl_megatron.cli:main"
    assert project["tool"]["setuptools"]["packages"]["find"]["where"] == [".", "kernels", "recipes"]
    locked = {package["name"] for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    assert "megatron-core" in locked and "apex" not in locked  # that package on the index is an unrelated program
