"""What `icrl import` and `icrl export` say that they wrote is what lies there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from model_folders import make_folder
from safetensors.torch import load_file
from whole_runs import icrl

from icrl_megatron.run.checks import validate
from icrl_megatron.settings import loading as S
from icrl_megatron.utils.results import MARKER


def said_of(output: str) -> tuple[Path, int, int]:
    """(folder, parameters, files) of the message."""
    found = re.search(r"^written to (.*): a [\w ]+, ([\d,]+) parameters, (\d+) files, \d+\.\d KiB$", output, re.M)
    assert found, output
    return Path(found[1]), int(found[2].replace(",", "")), int(found[3])


@pytest.mark.parametrize("tied", [True, False])
def test_import_and_export_report_files_size_and_parameters(tied: bool, tmp_path: Path) -> None:
    model = make_folder(tmp_path / "model", tied=tied)
    count = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    imported = icrl("import", str(model), str(tmp_path / "my imports"))
    exported = icrl("export", str(tmp_path / "my imports"), str(tmp_path / "back"))
    for (code, out, err), folder in (
        (imported, tmp_path / "my imports" / "step_000000"),
        (exported, tmp_path / "back"),
    ):
        assert code == 0, err
        written = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
        assert said_of(out) == (folder, count, len(written))
    override = shlex.split(imported[1].splitlines()[-1])[-1]
    validate(S.load("rulebook_easy", ["rollout.context_tokens=200", "rollout.max_turn_tokens=64", override]))
