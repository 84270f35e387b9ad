"""Seeded faults in a small run: afterwards, the same command gives the results of an uninterrupted run.

In each campaign, one run has several faults in a row and then runs to its end. Its metrics and its exported model must
be bit-identical to those of an uninterrupted run on the same grid.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import faulty_run
import pytest
import whole_runs
from campaign import Campaign, Fault
from conftest import FAULTS_ENV, RECORDS_ENV
from faults import ENVIRONMENT_FAULTS, FAULTS, mount_small_disk

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

STEPS = 40
PER_CAMPAIGN = 6
DISK_MIB = 24
"""Size of the file system with the run folder; a run takes about 4 MiB."""
GRIDS = {1: (), 2: ("launch.ranks=2", "actor.tensor_parallel=2")}
WEIGHTS = "model.safetensors"


def total() -> int:
    return int(os.environ.get(FAULTS_ENV, "60"))


def of_environments() -> list[Fault]:
    """The environment faults: about as many of each kind as of the other kinds."""
    count = round(total() * len(ENVIRONMENT_FAULTS) / (len(FAULTS) + len(ENVIRONMENT_FAULTS)))
    return [ENVIRONMENT_FAULTS[i % len(ENVIRONMENT_FAULTS)] for i in range(count)]


def plan() -> list[tuple[int, int, list[Fault]]]:
    """(campaign, ranks, faults): all kinds about equally often, in a seeded order; every third campaign has TP 2."""
    count = total() - len(of_environments())
    playable = [fault for fault in FAULTS if not fault.needs()]
    rng = random.Random(0)
    drawn: list[Fault] = []
    while len(drawn) < count:
        drawn += rng.sample(playable, len(playable))
    drawn = drawn[:count]
    parts = [drawn[i : i + PER_CAMPAIGN] for i in range(0, count, PER_CAMPAIGN)]
    return [(i, 2 if i % 3 == 1 else 1, part) for i, part in enumerate(parts)]


def command(folder: Path, model: Path, ranks: int) -> list[str]:
    changes = (f"steps={STEPS}", f"model.path={model}", "model.init=null", "warm_start.steps=0", "eval.interval=10")
    small = ("rollout.tasks_per_step=2", "rollout.episodes_per_task=4", "eval.problems=4")
    return whole_runs.train(folder, *changes, *small, *GRIDS[ranks])


@pytest.fixture(scope="session")
def model(finished_run: Path) -> Path:
    return finished_run / "warm_start" / "hf"


@pytest.fixture(scope="session")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Number of ranks -> an uninterrupted run."""
    found = {}
    for ranks in {ranks for _, ranks, _ in plan()}:
        found[ranks] = tmp_path_factory.mktemp(f"undisturbed{ranks}") / "run"
        code, _, err = whole_runs.icrl(*command(found[ranks], model, ranks))
        assert code == 0, err
    yield found


@pytest.mark.parametrize(("number", "ranks", "faults"), plan(), ids=lambda v: str(v) if isinstance(v, int) else "")
def test_run_with_repeated_faults_ends_bit_identical(
    number: int, ranks: int, faults: list[Fault], undisturbed: dict[int, Path], model: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with ExitStack() as stack:
        if mount_small_disk(disk, DISK_MIB):
            stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=False)
        folder = disk / "run"
        run = Campaign(folder, tmp_path, command(folder, model, ranks), STEPS)
        stack.callback(lambda: run.running() and run.kill())
        rng = random.Random(1000 + number)
        try:
            for fault in faults:
                run.apply(fault, rng)
            finish(run)
            compare(run, undisturbed[ranks])
        except BaseException:
            run.records[-1].survived = False
            raise
        finally:
            write_records(run, number)


def test_environment_faults_cost_only_their_episodes(model: Path, tmp_path: Path) -> None:
    folder, steps = tmp_path / "run", 30 * len(of_environments())
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    words = [*command(folder, model, 1), f"steps={steps}", "eval.interval=0", "rollout.environment_timeout_s=1"]
    program = (sys.executable, str(Path(faulty_run.__file__)), str(tmp_path / "faults"))
    run = Campaign(folder, tmp_path, words, steps, program, one_rank)
    run.faults.mkdir()
    rng = random.Random(7)
    try:
        run.begin()
        run.wait_for_step(1)  # episodes of the first evaluation are not counted
        for fault in of_environments():
            run.apply(fault, rng)
        finish(run)
        rows = [row for row in whole_runs.rows(folder) if "tokens/generated" in row]
        places = [row["step"] for row in rows]
        run.records[-1].doubled = len(places) - len(set(places))
        assert places == list(range(1, steps + 1))
        met = [record.detail for record in run.records]
        assert sum(row["episodes/dropped"] for row in rows) == sum(kind in faulty_run.DROPPED for kind in met), met
        assert sum(row["episodes/texts_cut"] for row in rows) == met.count("huge")
    except BaseException:
        run.records[-1].survived = False
        raise
    finally:
        if run.running():
            run.kill()
        write_records(run, 999)


def finish(run: Campaign) -> None:
    """Runs the command until it succeeds, at most twice."""
    for _ in range(2):
        run.begin()
        code, printed = run.end()
        if code == 0:
            return
    raise AssertionError((code, printed[-3000:]))


def compare(run: Campaign, undisturbed: Path) -> None:
    there, here = whole_runs.rows(undisturbed), whole_runs.rows(run.folder)
    places = [(row["step"], "tokens/generated" in row) for row in here]
    run.records[-1].doubled = len(places) - len(set(places))
    assert [row["step"] for row in here] == [row["step"] for row in there]
    assert here == there
    assert (run.folder / "hf" / WEIGHTS).read_bytes() == (undisturbed / "hf" / WEIGHTS).read_bytes()
    assert sum(r.lost for r in run.records) == 0, run.records


def write_records(run: Campaign, number: int) -> None:
    (Path(os.environ[RECORDS_ENV]) / f"{number:03d}.json").write_text(json.dumps([asdict(r) for r in run.records]))


def test_plan_includes_every_possible_kind_of_fault() -> None:
    played = {fault.name for _, _, faults in plan() for fault in faults}
    missing = {fault.name: fault.needs() for fault in FAULTS if fault.name not in played}
    assert all(missing.values()) or total() < len(FAULTS) + 2, missing
