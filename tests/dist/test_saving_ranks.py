"""A run on two ranks that fails on one: all ranks end, and the last completed step is saved if possible."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import run_ranks
from whole_runs import rows

from icrl_megatron.actor import manifest
from icrl_megatron.run.state import NEWEST_ROWS
from icrl_megatron.utils.step_names import step_name

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("saving_worker.py")


@dataclass(frozen=True)
class Ranks:
    folder: Path
    ended: list[dict[str, dict[str, str]]]
    """[rank][run]["how" | "said"]."""

    def how(self, run: str) -> list[str]:
        return [rank[run]["how"] for rank in self.ended]

    def said(self, run: str) -> list[str]:
        return [rank[run]["said"] for rank in self.ended]

    def saved(self, run: str, step: int) -> manifest.Manifest:
        return manifest.read(self.folder / run / "checkpoints" / step_name(step))

    def files(self, name: str, step: int) -> dict[str, manifest.FileRecord]:
        """File checksums, without the rows of the step, which contain wall-clock times."""
        return {file: of for file, of in self.saved(name, step).files.items() if file != NEWEST_ROWS}

    def checkpoints(self, run: str) -> list[str]:
        return sorted(p.name for p in (self.folder / run / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def ranks(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(finished_run / "warm_start" / "hf", folder / "model")
    run_ranks(str(WORKER), 2, folder, timeout_s=500)
    return Ranks(folder, [json.loads((folder / f"ended_{rank}.json").read_text()) for rank in range(2)])


def test_failed_engine_on_one_rank_ends_all_after_saving(ranks: Ranks) -> None:
    other, own = ranks.how("engine")
    assert own == "EngineError: the engine failed"
    assert other.startswith("OtherRankError: rank 1 failed: Traceback")
    assert "EngineError: the engine failed" in other
    assert "saved step 2, the last completed one" in ranks.said("engine")[0]
    assert ranks.files("engine", 2) == ranks.files("whole", 2)
    assert ranks.saved("engine", 2).progress == ranks.saved("whole", 2).progress
    assert ranks.how("engine again") == ["done", "done"]
    assert rows(ranks.folder / "engine") == rows(ranks.folder / "whole")


def test_failed_rank_that_cannot_reach_the_others_gives_up_in_time(ranks: Ranks) -> None:
    """It fails between collectives, so the other rank cannot be reached and nothing is saved, as the message says."""
    other, own = ranks.how("alone")
    assert own == "MemoryError: no memory is left"
    assert other.startswith("RuntimeError: ")
    assert "not all ranks could be reached, so nothing was saved; there is no checkpoint yet" in ranks.said("alone")[1]
    assert ranks.checkpoints("alone") == []


def test_non_finite_value_on_one_rank_prevents_saving_on_all(ranks: Ranks) -> None:
    for how in ranks.how("poisoned"):
        assert how.startswith("NonFiniteError: step 3 was not saved: the first moments of ")
    assert ranks.how("poisoned again") == ["done", "done"]
    assert "resuming from" in ranks.said("poisoned again")[0]
    assert rows(ranks.folder / "poisoned") == rows(ranks.folder / "whole")
    assert ranks.checkpoints("poisoned") == ["step_000004"]


def test_full_disk_on_one_rank_ends_all_with_the_same_message(ranks: Ranks) -> None:
    first, second = ranks.how("full")
    assert first == second
    assert first.startswith(f"ConfigError: {ranks.folder}/full/checkpoints: cannot write the checkpoint of step 3: ")
    assert ranks.said("full")[0].count("saved") == 0
    assert json.loads((ranks.folder / "left.json").read_text()) == ["step_000001", "step_000002"]
    assert ranks.how("full again") == ["done", "done"]
    assert f"resumingfrom{ranks.folder}/full/checkpoints/step_000002" in ranks.said("full again")[0].replace(" ", "")


def test_damage_seen_by_only_one_rank_is_an_error(ranks: Ranks) -> None:
    for how in ranks.how("blind"):
        assert how.startswith("ConfigError: ")
        assert "is missing when rank 1 reads it, but not when rank 0 does" in how


def test_all_ranks_fall_back_to_the_same_checkpoint(ranks: Ranks) -> None:
    assert ranks.how("damaged") == ["done", "done"]
    said = ranks.said("damaged")[0]
    assert said.count("damaged checkpoint") == 1
    assert "was saved last and is missing" not in said
    assert "rank_00001_0000.safetensors has" in said
    assert ranks.checkpoints("full") == ["step_000003", "step_000004", "step_000004.damaged"]
    assert rows(ranks.folder / "full") == rows(ranks.folder / "whole")
    assert ranks.files("full", 4) == ranks.files("whole", 4)
