"""Metrics, their files across a resume, dumps, and their display."""

from __future__ import annotations

import io
import json
import math
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.report.bands import smoothed
from icrl_megatron.report.plots import learning_curve
from icrl_megatron.report.show import show
from icrl_megatron.settings.presets import apply_preset
from icrl_megatron.settings.schema import AlgoSettings, Settings
from icrl_megatron.telemetry.dumps import Rollouts, write_dump
from icrl_megatron.telemetry.metrics import heldout_metrics, rollout_metrics
from icrl_megatron.telemetry.writer import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter, read_rows
from icrl_megatron.types import Attempt, Completion, Critique, DroppedEpisode, Episode, Ids, Task, Turn
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.progress import Progress


def completion(n: int) -> Completion:
    return Completion(tuple(range(n)), tuple(-1.0 / (3 + i) for i in range(n)), "stop", weight_version=7)


def attempt(round: int, outcome: float, lengths: tuple[int, ...] = (3, 2)) -> Attempt:
    last = len(lengths) - 1
    turns = tuple(
        Turn(completion(n), f"go north {i}", "north" if i else None, "A wall. [red]" if i < last else "", (9,))
        for i, n in enumerate(lengths)
    )
    ended = (outcome, outcome == 1.0, "You stand outside.", "max_turns")
    return Attempt(round, (1, 2, 3 + round), (1, 2, 3), turns, *ended)


def episode(index: int, outcomes: list[float], source: str = "maze") -> Episode:
    critiques = [Critique(k, (5, 6), completion(4), "Go “south” instead.") for k in range(len(outcomes) - 1)]
    attempts = tuple(attempt(k, r) for k, r in enumerate(outcomes))
    return Episode(Task(f"{source}/train/0", source, "train", "grid 3x3"), index, attempts, tuple(critiques))


def decode(ids: Ids) -> str:
    return " ".join(f"<{i}>" for i in ids)


PLAYED = [episode(0, [0.0, 1.0]), episode(1, [0.5, 0.25]), episode(2, [1.0]), episode(0, [0.0, 0.0], "house")]


def test_rollout_metrics() -> None:
    report = credit(headers_of(PLAYED), AlgoSettings(), train_critic=True)
    got = rollout_metrics(headers_of(PLAYED), [DroppedEpisode(PLAYED[0].task, 9, "boom")], report)
    expected = {
        "reward/attempt": 1.5 / 4,
        "reward/revision": 1.25 / 3,
        "reward/critique": 0.75 / 3,  # 1, -0.25, 0
        "reward/round_0": 1.5 / 4,
        "reward/round_1": 1.25 / 3,
        "success/critique_free": 0.25,
        "success/with_critique": 0.5,
        "success/round_1": 1 / 3,
        "success/source/maze": 1 / 3,
        "success/source/house": 0.0,
        "revision/gain": 0.75 / 3,
        "critique/tokens": 4.0,
        "attempt/tokens": 5.0,
        "attempt/turns": 2.0,
        "attempt/lost_turns": 1.0,
        "attempt/stop_max_turns": 1.0,
        "attempt/stop_done": 0.0,
        "tokens/used": 7 * 5.0 + 3 * 4.0,
        "episodes/played": 4.0,
        "episodes/dropped": 1.0,
        "infrastructure/bad_answers": 0.0,
        "groups/count": 4.0,
        "groups/flat_share": 0.5,  # both groups of `house`: two equal attempts, one critique
        "samples/count": 10.0,
        "samples/flat_share": 0.3,
    }
    assert {k: got[k] for k in expected} == pytest.approx(expected)
    assert heldout_metrics(headers_of(PLAYED)) == pytest.approx(
        {
            "heldout/critique_free": 0.25,
            "heldout/critique_free/house": 0.0,
            "heldout/critique_free/maze": 1 / 3,
            "heldout/reward": 0.375,
            "heldout/attempts/house": 1.0,
            "heldout/attempts/maze": 3.0,
            "tokens/evaluation": float(sum(e.generated_tokens() for e in PLAYED)),
        }
    )


def test_heldout_metrics_of_later_rounds() -> None:
    played = [episode(0, [0.0, 0.0, 1.0]), *PLAYED]
    first, all_rounds = heldout_metrics(headers_of(played)), heldout_metrics(headers_of(played), rounds=3)
    later = {name: all_rounds[name] for name in all_rounds if name not in first}
    assert {name: all_rounds[name] for name in first} == first
    assert later == pytest.approx(
        {
            "heldout/by_round_1": 2 / 5,
            "heldout/by_round_1/house": 0.0,
            "heldout/by_round_1/maze": 2 / 4,
            "heldout/by_round_2": 3 / 5,
            "heldout/by_round_2/house": 0.0,
            "heldout/by_round_2/maze": 3 / 4,
            "heldout/critique_tokens": 4.0,
            "heldout/wrong_to_right": 2.0,
            "heldout/stayed_wrong": 3.0,
        }
    )
    assert heldout_metrics(headers_of([]), rounds=3) == {}
    assert "heldout/critique_tokens" not in heldout_metrics(headers_of([episode(0, [1.0])]), rounds=2)


def test_unmeasured_metrics_are_omitted() -> None:
    alone = [episode(0, [1.0])]
    got = rollout_metrics(headers_of(alone), [], credit(headers_of(alone), AlgoSettings(), True))
    assert not [name for name in got if "critique/" in name or "revision" in name]
    assert all(math.isfinite(v) for v in got.values())


def test_resume_removes_rows_after_the_checkpoint(tmp_path: Path) -> None:
    def run(folder: Path, steps: range, resume: int | None) -> None:
        with closing(MetricsWriter(folder, resume)) as writer:
            for step in steps:
                writer.write(step, {"reward/attempt": 1.0 / (step + 3), "time/train": 0.0})

    run(tmp_path / "whole", range(6), None)
    run(tmp_path / "killed", range(5), None)
    with (tmp_path / "killed" / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    run(tmp_path / "killed", range(3, 6), 2)
    assert (tmp_path / "killed" / METRICS_FILE).read_bytes() == (tmp_path / "whole" / METRICS_FILE).read_bytes()
    assert [row["step"] for row in read_rows(tmp_path / "killed" / METRICS_FILE)] == list(range(6))
    assert [p.name for p in (tmp_path / "killed").iterdir() if p.name.endswith(".tmp")] == []

    run(tmp_path / "killed", range(2), None)
    assert len(read_rows(tmp_path / "killed" / METRICS_FILE)) == 2


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_checkpoint_restores_lost_rows_of_its_step(lost: int, tmp_path: Path) -> None:
    """A machine crash can truncate the metrics file after the checkpoint was saved."""
    with closing(MetricsWriter(tmp_path, None)) as writer:
        for step, value in [(1, 1.0), (2, 2.0), (2, math.nan)]:  # the second row of a step is its evaluation
            writer.write(step, {"loss": value})
        saved = writer.saved()
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    (tmp_path / "saved.jsonl").write_text("".join(f"{line}\n" for line in saved))
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 3 - lost]) + b"".join(lines[3 - lost : 4 - lost])[:-9])
    MetricsWriter(tmp_path, 2, read_rows(tmp_path / "saved.jsonl")).close()
    assert path.read_bytes() == whole


def test_tensorboard_shows_the_same_numbers_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume, value in [(range(5), None, 1.0), (range(3, 6), 2, 2.0)]:
        with closing(MetricsWriter(tmp_path, resume)) as writer:
            for step in steps:
                writer.write(step, {"loss": value})
    board = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_non_finite_numbers_are_written_as_valid_json(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path, None)) as writer:
        writer.write(0, {"loss": float("nan"), "ratio": 0.1 + 0.2})
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 0, "loss": None, "ratio": 0.1 + 0.2}
    assert math.isnan(read_rows(tmp_path / METRICS_FILE)[0]["loss"])


def test_unusable_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir"):
        MetricsWriter(tmp_path / "file" / "run", None)
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_rows(tmp_path / METRICS_FILE)


def test_dump_round_trip(tmp_path: Path) -> None:
    report = credit(headers_of(PLAYED), AlgoSettings(), train_critic=True)
    path = write_dump(tmp_path, 12, PLAYED, report.samples, decode)
    assert path == tmp_path / "rollouts" / "rank_00000.jsonl"
    assert list(path.parent.iterdir()) == [path]
    episodes = Rollouts(tmp_path).episodes(12)
    assert episodes == sorted(PLAYED, key=lambda e: (e.task.task_id, e.index))
    assert hash(episodes[0]) == hash(PLAYED[3])  # contains tuples at every level, not lists
    assert "Go “south” instead." in path.read_text(encoding="utf-8")

    records = Rollouts(tmp_path).read(12)
    assert records[1].prompt == "<1> <2> <3>"
    credited = {s.sample_id: (s.reward, s.advantage) for s in report.samples}
    read = {
        f"{r.episode.task.task_id}#{r.episode.index}/{k}": (c.reward, c.advantage)
        for r in records
        for k, c in r.credit.items()
    }
    assert read == credited


def shown(run_dir: Path, **which: int) -> str:
    console = Console(file=io.StringIO(), width=80)
    show(run_dir, **which, console=console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_show(tmp_path: Path) -> None:
    settings = apply_preset(Settings(), "reference").algo
    for step in (2, 10):
        write_dump(tmp_path, step, PLAYED, credit(headers_of(PLAYED), settings, True).samples, decode)
    assert Rollouts(tmp_path).steps == [2, 10]

    text = shown(tmp_path, index=1)
    order = ["step 10", "maze/train/0", "<1> <2> <3>", "attempt", "go north 0", "[red]", "failed", "critique, 4 tokens"]
    order += ["Go “south” instead.", "revision", "succeeded", "outcome 1"]
    places = [text.index(piece) for piece in order]
    assert places == sorted(places)
    assert "reward 0, advantage -" in text
    assert shown(tmp_path, index=0).count("not trained") == 2  # the filter removed that group's critique and revision
    assert "step 2," in shown(tmp_path, step=2)

    for which, message in [({"step": 3}, "Step 3 .* 2 to 10"), ({"index": 4}, "0 to 3")]:
        with pytest.raises(ConfigError, match=message):
            shown(tmp_path, **which)
    with pytest.raises(ConfigError, match="holds no rollouts"):
        shown(tmp_path / "rollouts")


def test_progress_in_a_terminal_and_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(terminal: bool, enabled: bool = True) -> str:
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
        progress = Progress(enabled, console)
        with progress.phase("Training", total=2) as outer:
            for _ in range(2):
                with progress.phase("Rollouts", total=8) as inner:
                    for k in range(8):
                        inner.advance(note=f"success 0.{k}")
                outer.advance()
        progress.log("done [1/2]")
        return console.file.getvalue()

    assert run(terminal=False) == "done [1/2]\n"
    assert run(terminal=True, enabled=False) == ""
    bars = run(terminal=True)
    assert "Training" in bars
    assert bars.endswith("done [1/2]\n")
    monkeypatch.setattr("icrl_megatron.utils.progress.PLAIN_INTERVAL_S", 0.0)
    lines = run(terminal=False).splitlines()
    assert lines[0] == "Rollouts  1/8  0 s  success 0.0"
    assert lines[-2:] == ["Training  2/2  0 s", "done [1/2]"]


def test_failed_phase_restores_the_terminal() -> None:
    progress = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError, match="boom"), progress.phase("Rollouts"):
        raise RuntimeError("boom")
    assert progress.bars is None


def test_learning_curve(tmp_path: Path) -> None:
    rows = [{"step": float(s), "success/critique_free": s / 40, "tokens/generated": 1e4} for s in range(40)] + [
        {"step": 40.0, "heldout/critique_free": 0.9},
        {"step": 41.0, "success/critique_free": math.nan},
    ]
    path = learning_curve([("ICRL", rows), ("GRPO", rows[:10]), ("empty", [])], tmp_path / "curve.png", "Rulebook")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_smoothing_keeps_length_and_constants() -> None:
    assert smoothed([0.5] * 50) == pytest.approx([0.5] * 50)
    assert smoothed([0.0, 1.0, 0.0]) == pytest.approx([0.5, 1 / 3, 0.5])
    assert smoothed([0.3]) == [0.3]
