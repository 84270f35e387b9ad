"""The curriculum: its draws, which depend only on observed successes, and a resumed run with it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from whole_runs import icrl, rows, train

from icrl_megatron.data.curriculum import Curriculum, append_history, cut_history, read_history
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError

TASKS = [Task(f"t/train/{i}", "t", "train", str(i)) for i in range(40)]


def test_tasks_that_always_or_never_succeed_are_drawn_less() -> None:
    curriculum = Curriculum(floor=0.1)
    for i, task in enumerate(TASKS):
        curriculum.observe({task.task_id: (0.0, 1.0, 0.5, 0.5)[i % 4]})
    counts: Counter[str] = Counter()
    for seed in range(400):
        drawn = curriculum.draw(TASKS, 8, random.Random(seed))
        assert len(set(drawn)) == 8
        counts.update(t.task_id for t in drawn)
    never, always, sometimes = (sum(counts[TASKS[i].task_id] for i in range(k, 40, 4)) for k in (0, 1, 2))
    assert sometimes > 5 * max(never, always) and min(never, always) > 0


def test_weights_follow_the_recent_visits() -> None:
    curriculum = Curriculum(floor=0.2)
    assert curriculum.weight("new") == 1.0
    for share, weight in ((0.0, 0.2), (0.5, 0.2 + 0.8 * 0.75), (1.0, 1.0), (1.0, 0.2 + 0.8 * 4 * (5 / 6) / 6)):
        curriculum.observe({"a": share})
        assert curriculum.weight("a") == pytest.approx(weight)


def test_a_draw_depends_only_on_observed_successes() -> None:
    def sampler() -> TaskSampler:
        other = [Task(f"u/train/{i}", "u", "train", str(i)) for i in range(3)]
        sources = [TaskSource("t", 3.0), TaskSource("u", 1.0)]
        return TaskSampler(sources, {"t": TASKS, "u": other}, 5, Curriculum(0.1))

    one, other = sampler(), sampler()
    seen = {t.task_id: 0.0 for t in TASKS[:20]}
    for each in (one, other):
        assert each.curriculum is not None
        each.curriculum.observe(seen)
    assert one.draw(3, 0, 8) == other.draw(3, 0, 8) != one.draw(3, 1, 8)
    # The mixture is kept, and a source with fewer problems than its share provides all of them.
    assert Counter(t.source for t in one.draw(0, 0, 16)) == {"t": 12, "u": 4}
    assert {t.task_id for t in one.draw(0, 0, 16) if t.source == "u"} == {"u/train/0", "u/train/1", "u/train/2"}


def test_the_history_is_cut_at_the_step_of_a_resumed_run(tmp_path: Path) -> None:
    for step in range(1, 6):
        append_history(tmp_path, step, {"a": step / 10})
    with (tmp_path / "task_success.jsonl").open("a") as file:
        file.write('{"step": 6, "succ')  # killed while writing
    cut_history(tmp_path, 3)
    append_history(tmp_path, 4, {"a": 0.9})
    assert read_history(tmp_path, 10) == [{"a": 0.1}, {"a": 0.2}, {"a": 0.3}, {"a": 0.9}]
    (tmp_path / "task_success.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        read_history(tmp_path, 10)


def test_a_run_with_a_curriculum_resumes_to_the_same_numbers(finished_run: Path, tmp_path: Path) -> None:
    model = f"model.path={finished_run / 'warm_start' / 'hf'}"
    start = [model, "warm_start.steps=0", "eval.interval=0", "tasks.curriculum=true"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for folder, steps in ((whole, 4), (halved, 2), (halved, 4)):
        code, _, err = icrl(*train(folder, *start, f"steps={steps}", "tasks.limit=12"))
        assert code == 0, err
    trained = [[r for r in rows(f) if "tokens/generated" in r] for f in (whole, halved)]
    assert len(trained[0]) == 4 and trained[0] == trained[1]
    assert read_history(whole, 4) == read_history(halved, 4) and len(read_history(whole, 4)) == 4
