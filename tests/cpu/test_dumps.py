"""Dumps of a run's episodes: which are chosen, the shards of the ranks, crashes, resumes and full disks."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from disks import fill, small_disk

from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.engines.rank import Share
from icrl_megatron.report.show import show
from icrl_megatron.rollout.fixed_sources import DumpSource
from icrl_megatron.rollout.played import RolloutRequest
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.telemetry import dump_writer
from icrl_megatron.telemetry.dump_shards import shard_path
from icrl_megatron.telemetry.dump_writer import DumpWriter, Losses, StepDump, chosen
from icrl_megatron.telemetry.dumps import Credited, Decode, Rollouts, credit_of, encoded
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Ids, Task, Turn
from icrl_megatron.utils.errors import ConfigError

GROUPS = 6
GROUP_SIZE = 4


def decode(ids: Ids) -> str:
    return " ".join(map(str, ids))


def played(step: int) -> list[Episode]:
    """A step's groups, with log-probs that fp32 can hold and others that it cannot."""
    return [_episode(f"maze/train/{task}", index, step) for task in range(GROUPS) for index in range(GROUP_SIZE)]


def _episode(task_id: str, index: int, step: int) -> Episode:
    rng = random.Random(f"{task_id}{index}{step}")
    odd = (math.inf, -0.0, 1 / 3, -1e-300) if index % 2 else (-0.5, -1.0, -2.0, -0.25)

    def said(*older: tuple[int, int]) -> Completion:
        return Completion(tuple(rng.randrange(150_000) for _ in odd), odd, "stop", step, older)

    plain = tuple(rng.randrange(150_000) for _ in range(9))
    turn = Turn(said((0, 2)), "nörth\u2028\n", None, "a wall", (3, 4), 2, (1, 2))
    tries = tuple(
        Attempt(k, (*plain, *range(k)), plain, (turn, replace(turn, completion=said())), 0.5 * k, k == 1, "s", "done")
        for k in range(2)
    )
    measured = replace(tries[0], measures=(("calls", 3.0),))
    critique = Critique(0, (5, 6), said(), "Go south.")
    return Episode(Task(task_id, "maze", "train", "3x3"), index, (measured, tries[1]), (critique,))


def dump(step: int, episodes: Sequence[Episode], text: Decode = decode) -> StepDump:
    return StepDump(step, credit_of(episodes, ()), text)


def written(folder: Path, steps: Sequence[int], rank: int = 0, world: int = 1, resumed: int = 0) -> None:
    """What a rank of a run dumps that continues after the step `resumed`."""
    writer = DumpWriter(folder, rank, world, resumed)
    for step in steps:
        writer.submit(dump(step, played(step)[rank::world]))
    writer.close()
    assert writer.take_losses() == Losses()


@pytest.mark.parametrize("limit", [1, 4, 10, 23, 24, 1000, None])
def test_any_number_of_ranks_dumps_the_same_episodes(limit: int | None) -> None:
    for step in (1, 2):
        everyone = [(e.task.task_id, e.index) for e in played(step)]
        sample = chosen(everyone, limit, 7, step)
        assert len(sample) == min(len(everyone), limit or 1000)
        assert sample <= set(everyone)
        shuffled = random.Random(step).sample(everyone, len(everyone))
        assert chosen(iter(shuffled), limit, 7, step) == sample
        tasks = [task for task, _ in sample]
        assert sum(tasks.count(task) < GROUP_SIZE for task in set(tasks)) <= 1  # groups are whole, but one


def test_the_lot_is_fair_and_differs_between_steps_and_seeds() -> None:
    everyone = [(f"maze/train/{task}", index) for task in range(50) for index in range(2)]
    counts = dict.fromkeys(everyone, 0)
    for step in range(200):
        for one in chosen(everyone, 20, 0, step):
            counts[one] += 1
    assert min(counts.values()) > 20 and max(counts.values()) < 65  # 40 +- 4.4 standard deviations
    assert len({frozenset(chosen(everyone, 20, seed, 1)) for seed in range(5)}) == 5


def test_shards_of_two_ranks_give_the_samples_of_one(finished_run: Path, tmp_path: Path) -> None:
    """The shard of a real run, dealt out to two ranks."""
    lines = shard_path(finished_run, 0).read_bytes().splitlines(keepends=True)
    for rank in (0, 1):
        shard_path(tmp_path, rank).parent.mkdir(exist_ok=True)
        shard_path(tmp_path, rank).write_bytes(b"".join(reversed(lines[rank::2])))
    one, two = Rollouts(finished_run), Rollouts(tmp_path)
    assert one.steps == two.steps == [1, 2, 3, 4, 5, 6]
    assert all(one.read(step) == two.read(step) for step in one.steps)
    request = RolloutRequest((), 4, Seeds(run=0, step=8), 2)  # the third step again
    sources = [DumpSource(two, Share(rank, 2)) for rank in (0, 1)]
    first, second = (source.play(request) for source in sources)
    whole = one.episodes(3)
    assert first.headers == second.headers and len(first.headers) == len(whole)
    assert sorted((*first.episodes, *second.episodes), key=whole.index) == whole
    samples = credit(first.headers, AlgoSettings(), True).samples
    assert [replace(s, rank=0) for s in samples] == list(credit(headers_of(whole), AlgoSettings(), True).samples)
    assert len(samples) >= 16
    recorded = {
        f"{r.episode.task.task_id}#{r.episode.index}/{role}": (c.reward, c.advantage)
        for r in two.read(3)
        for role, c in r.credit.items()
    }
    assert {s.sample_id: (s.reward, s.advantage) for s in samples} == recorded


def test_episodes_and_credit_are_restored_exactly(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        written(tmp_path, [3, 4], rank, 3)
    names = [f"rank_0000{rank}.jsonl" for rank in range(3)]
    assert [p.name for p in sorted((tmp_path / "rollouts").iterdir())] == names
    assert Rollouts(tmp_path).episodes(4) == played(4)
    assert str(Rollouts(tmp_path).episodes(4)) == str(played(4))  # -0.0 too
    assert hash(Rollouts(tmp_path).episodes(3)[0]) == hash(played(3)[0])
    writer = DumpWriter(tmp_path / "nan", 0, 1, 0)
    weights = (1.5, 0.1, math.nan)
    writer.submit(StepDump(1, [(played(1)[0], {"1/revision": Credited(1.0, -0.7, weights)})], decode))
    writer.close()
    (record,) = Rollouts(tmp_path / "nan").read(1)
    assert str(record.credit) == str({"1/revision": Credited(1.0, -0.7, weights)})
    assert record.prompt == decode(played(1)[0].attempts[0].prompt_ids)


def test_a_line_that_was_cut_off_is_ignored_and_removed_on_resume(tmp_path: Path) -> None:
    written(tmp_path, [1, 2])
    path = shard_path(tmp_path, 0)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in (last + 1, last + 5, last + 30, last + 500, len(whole) - 1):
        for tail in (b"", bytes(3000)):  # after a power failure, blocks that were not written are zeros
            path.write_bytes(whole[:end] + tail)
            rollouts = Rollouts(tmp_path)
            assert rollouts.episodes(1) == played(1)
            assert rollouts.episodes(2) == played(2)[:-1]
            DumpWriter(tmp_path, 0, 1, 2)
            assert path.read_bytes() == whole[:last]
    written(tmp_path, [3], resumed=2)
    assert Rollouts(tmp_path).episodes(3) == played(3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_resumed_run_dumps_no_step_twice(tmp_path: Path, world: int) -> None:
    """A run of two ranks continues on another grid after a checkpoint of step 2."""
    for rank in (0, 1):
        written(tmp_path, [1, 2, 3, 4], rank, 2)
    for rank in range(world):
        written(tmp_path, [3, 4, 5], rank, world, resumed=2)
    rollouts = Rollouts(tmp_path)
    assert rollouts.steps == [1, 2, 3, 4, 5]
    assert all(rollouts.episodes(step) == played(step) for step in rollouts.steps)
    for rank in range(2):
        DumpWriter(tmp_path, rank, 2, 0)  # no checkpoint is left: it begins again
    assert Rollouts(tmp_path).steps == []


OLD = '{"prompts": {}, "credit": {}, "episode": {"index": 0}}\n'


@pytest.mark.parametrize("begin", [b"", b"shard"])
@pytest.mark.parametrize(
    "content", [OLD.encode(), b"\n", b"PK\x03\x04 no line", b'{"bytes": 12, "step": -1, \n', b"\0\n"]
)
def test_other_files_are_refused_and_left_alone(tmp_path: Path, begin: bytes, content: bytes) -> None:
    path = shard_path(tmp_path, 0)
    path.parent.mkdir()
    whole = encoded(1, played(1)[0], {}, decode) if begin else b""
    path.write_bytes(whole + content)
    for read in (lambda: Rollouts(tmp_path), lambda: DumpWriter(tmp_path, 0, 1, 0), lambda: show(tmp_path)):
        place = rf"rank_00000.jsonl, byte {len(whole)}"
        with pytest.raises(ConfigError, match=rf"{place}: not an episode .* move that file"):
            read()
    assert path.read_bytes() == whole + content


def test_lines_with_the_right_head_and_other_content_are_refused(tmp_path: Path) -> None:
    written(tmp_path, [1])
    path, whole = shard_path(tmp_path, 0), shard_path(tmp_path, 0).read_bytes()
    for old, new in (
        (b'"i4:', b'"i9:'),
        (b'"i4:', b'"i4:AAA'),
        (b'"f4:', b'"i4;'),
        (b'"attempts"', b'"attempt"'),
        (b'"finish_reason"', b'"finish"'),
        (b'"credit": {', b'"credit": [{'),
    ):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ConfigError, match=r"rank_00000.jsonl, byte 0: not a dumped episode .* move that file away"):
            Rollouts(tmp_path).read(1)
    # A text that somebody edited: the length in the head is then wrong.
    path.write_bytes(whole.replace(b"Go south.", b"Go north-east, please."))
    (text,) = {critique.text for e in Rollouts(tmp_path).episodes(1) for critique in e.critiques}
    assert text == "Go north-east, please." and len(Rollouts(tmp_path).episodes(1)) == GROUPS * GROUP_SIZE


def test_dumps_of_earlier_versions_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000001.jsonl").write_text(OLD)
    assert Rollouts(tmp_path).steps == []
    with pytest.raises(ConfigError, match=r"holds no rollouts: .* telemetry.dump=none"):
        show(tmp_path)


def test_a_full_disk_costs_episodes_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        writer = DumpWriter(disk / "run", 0, 1, 0)
        writer.submit(dump(1, played(1)))
        writer.flush()
        filler = fill(disk, leave_kib=24)
        for step in (2, 3):
            writer.submit(dump(step, played(step)))
        writer.flush()
        losses = writer.take_losses()
        assert 0 < losses.episodes <= 2 * len(played(2))
        assert losses.reason.startswith(f"{shard_path(disk / 'run', 0)}: cannot write the rollouts (")
        assert "the disk is full" in losses.reason
        filler.unlink()
        writer.submit(dump(4, played(4)))
        writer.close()
        assert writer.take_losses() == Losses()
        rollouts = Rollouts(disk / "run")
        assert rollouts.episodes(1) == played(1) and rollouts.episodes(4) == played(4)
        kept = sum(len(rollouts.episodes(step)) for step in (2, 3))
        assert kept + losses.episodes == 2 * len(played(2))


def test_a_writer_that_hangs_delays_one_step_and_then_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_writer, "WAIT_S", 0.3)
    monkeypatch.setattr(dump_writer, "FLUSH_S", 0.1)
    writing, released = threading.Event(), threading.Event()

    def hanging(ids: Ids) -> str:
        writing.set()
        assert released.wait(60)
        return ""

    writer, seconds = DumpWriter(tmp_path, 0, 1, 0), []
    for step in range(1, 6):
        begun = time.perf_counter()
        writer.submit(dump(step, played(step)[:step], hanging))
        seconds.append(time.perf_counter() - begun)
        assert writing.wait(60)
    assert seconds[2] >= 0.3 > max(seconds[:2] + seconds[3:])
    writer.flush()
    losses = writer.take_losses()
    assert losses.episodes == 3 + 4 + 5 and "two steps are still being written" in losses.reason
    monkeypatch.setattr(dump_writer, "FLUSH_S", 60.0)
    released.set()
    writer.flush()
    writer.submit(dump(6, played(6)))
    writer.close()
    assert Rollouts(tmp_path).steps == [1, 2, 6] and writer.take_losses() == Losses()


def test_an_error_in_the_thread_is_counted(tmp_path: Path) -> None:
    def failing(ids: Ids) -> str:
        raise ZeroDivisionError("a bug")

    writer = DumpWriter(tmp_path, 0, 1, 0)
    writer.submit(dump(1, played(1), failing))
    writer.submit(dump(2, played(2)))
    writer.close()
    assert writer.take_losses() == Losses(len(played(1)), "a bug")
    assert Rollouts(tmp_path).episodes(2) == played(2)


def test_ranks_and_settings_without_episodes_write_no_file(tmp_path: Path) -> None:
    writer = DumpWriter(tmp_path, 0, 1, 0)
    writer.submit(dump(1, []))
    writer.close()
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(("text", "limit"), [("all", None), ("none", 0), ("1", 1), ("2048", 2048)])
def test_setting(text: str, limit: int | None) -> None:
    assert load("quickstart", [f"telemetry.dump={text}"]).telemetry.episodes() == limit
    assert (load("quickstart", []).telemetry.episodes() or 0) >= 16 * 8
