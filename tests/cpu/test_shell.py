"""What a shell user meets first: -h, --version, completion, and settings that were typed as options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import icrl_megatron
from icrl_megatron.settings import loading as S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bash(tmp_path: Path) -> object:
    """Runs a line in bash, where `icrl` is a command and HOME is an empty folder."""
    command = tmp_path / "bin" / "icrl"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom icrl_megatron.cli import main\nmain()\n")
    command.chmod(0o755)
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "recipes"))
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": paths, "PATH": f"{command.parent}:{os.environ['PATH']}"}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", f"{line}\nexit $?"], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("line", ["icrl -h", "icrl env check -h"])
def test_h_is_help(bash, line: str) -> None:  # type: ignore[no-untyped-def]
    done = bash(line)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_version(bash) -> None:  # type: ignore[no-untyped-def]
    assert bash("icrl --version").stdout == f"icrl-megatron {icrl_megatron.__version__}\n"


def test_installed_completion_knows_commands_recipes_and_settings(bash, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = bash("icrl --install-completion")
    assert done.returncode == 0, done.stderr
    assert ".bash_completions/icrl.sh" in (tmp_path / ".bashrc").read_text()
    words = {
        "tr": ("train",),
        "train quick": ("quickstart",),
        "train quickstart optim.learning": ("optim.learning_rate=", "optim.learning_rate=1e-06"),
        "plan qwen3_8b algo.calibration.": ("algo.calibration.enabled=", None),
        "train quickstart algo.internal": ("algo.internalise=true", "algo.internalise=false"),
        "eval runs/x actor.head_lo": ("actor.head_logits=fp32", "actor.head_logits=bf16"),
    }
    asked = "".join(
        f"COMP_WORDS=(icrl {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); COMPREPLY=(); _icrl_completion icrl; "
        'printf "%s " "${COMPREPLY[@]}"; echo; '
        for typed in words
    )
    done = bash(f"source {tmp_path}/.bash_completions/icrl.sh; {asked}")
    for line, (typed, expected) in zip(done.stdout.splitlines(), words.items(), strict=True):
        if None in expected:
            assert expected[0] in line.split(), typed
        else:
            assert line.split() == list(expected), typed


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train rulebook_easy --steps 5", ["steps=5"]),
        ("train rulebook_easy --steps=5 --dry-run", ["steps=5"]),
        ("train rulebook_easy steps=3 --seed", ["seed=0"]),
        ("train rulebook_easy --lr 1e-5", ["warm_start.learning_rate=1e-5", "optim.learning_rate=1e-5"]),
        ("sft rulebook_easy --algo.internalise --dry-run", ["algo.internalise=true"]),
        ("eval nowhere --engine.server-args '[a b]'", ["engine.server_args=[a b]"]),
    ],
)
def test_a_setting_typed_as_an_option_is_explained(bash, typed: str, offered: list[str]) -> None:  # type: ignore[no-untyped-def]
    done = bash(f"icrl {typed}")
    assert done.returncode == 2
    found = re.search(r"^error: --\S+ is a setting, .*; write (.*)$", done.stderr)
    assert found, done.stderr
    assert [word for word in shlex.split(found[1]) if word != "or"] == offered
    S.load("rulebook_easy", offered)


def test_other_unknown_options_are_usage_errors(bash) -> None:  # type: ignore[no-untyped-def]
    done = bash("icrl train rulebook_easy --bogus 5")
    assert done.returncode == 2 and "No such option: --bogus" in done.stderr
