"""`icrl eval`: statistics against their definitions, a critic behind a real endpoint, the program on a real run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from local_servers import Handler, threaded
from rich.console import Console
from scipy.stats import binomtest
from whole_runs import Batch, batch

from icrl_megatron.algo.headers import headers_of
from icrl_megatron.evaluation import run as evaluation
from icrl_megatron.evaluation.result import EvalRequest, Result, read_result
from icrl_megatron.evaluation.run import evaluate
from icrl_megatron.evaluation.scores import compare, estimate, score, successes, transitions
from icrl_megatron.evaluation.views import (
    comparison_table,
    rounds_table,
    scores_table,
    show,
    tools_table,
    transitions_table,
)
from icrl_megatron.report.show import show as show_episode
from icrl_megatron.settings.loading import save
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import ServedSource
from icrl_megatron.settings.task_sections import TaskServers
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Attempt, Completion, Critique, DroppedEpisode, Episode, Task, Turn
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.intervals import mcnemar, proportion, wilson_difference


def episode(task_id: str, index: int, outcomes: list[bool]) -> Episode:
    done = Completion((1, 2), (0.0, 0.0), "stop", 0)
    turn = Turn(done, "x", "x", "seen", (7, 8, 9))
    attempts = tuple(
        Attempt(r, (0,), (0,), (turn,), ok, ok == 1.0, "", "done", measures=(("answered", ok), ("calls_search", 3.0)))
        for r, ok in enumerate(map(float, outcomes))
    )
    said = Completion((1,) * 5, (0.0,) * 5, "stop", 0)
    critiques = tuple(Critique(r, (0,), said, "c") for r in range(len(outcomes) - 1))
    return Episode(Task(task_id, "t", "heldout", ""), index, attempts, critiques)


def test_scores_by_subset_with_rounds_and_transitions() -> None:
    a, b = "t/heldout/aime/0", "t/heldout/minerva/0"
    played = [episode(a, 0, [False, True]), episode(a, 1, [True])]
    played += [episode(b, 0, [False, False]), episode(b, 1, [False, True])]
    lost = [DroppedEpisode(Task(b, "t", "heldout", ""), 2, "gone")]
    aime, minerva, everything = score(headers_of(played), lost, rounds=2)
    assert (aime.subset, minerva.subset, everything.subset) == ("t/aime", "t/minerva", "all")
    assert (aime.average.mean, aime.passed.mean) == (0.5, 1.0)
    assert (minerva.average.mean, minerva.passed.mean, minerva.dropped) == (0.0, 0.0, 1)
    assert [p.mean for p in everything.rounds] == [0.25, 0.75]
    moved = everything.transitions
    assert (moved.wrong_to_right, moved.right_to_wrong, moved.stayed_wrong, moved.stayed_right) == (2, 0, 1, 0)
    assert everything.critique_tokens == 5.0 and everything.attempt_tokens == 2.0
    assert everything.read_tokens == 1 + 3
    assert everything.measures == pytest.approx({"answered": 3 / 7, "calls_search": 3.0})
    assert transitions([[True, False, False], [True, True]]).right_to_wrong == 1


def test_the_average_is_over_problems_not_over_samples() -> None:
    played = [episode("t/heldout/0", 0, [True]), *(episode("t/heldout/1", i, [False]) for i in range(9))]
    (found,) = score(headers_of(played), [], rounds=1)
    assert found.average.mean == 0.5 and found.rounds[0] == found.average


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 9), (10, 10), (2, 30)])
def test_mcnemar_is_the_binomial_tail(b: int, c: int) -> None:
    outcomes = sum(math.comb(b + c, k) for k in range(b + c + 1) if max(k, b + c - k) >= max(b, c))
    assert mcnemar(b, c) == pytest.approx(min(1.0, outcomes / 2 ** (b + c)))


def test_mcnemar_survives_many_pairs() -> None:
    assert mcnemar(20_000, 20_000) == pytest.approx(1.0, abs=0.01)
    assert 0 < mcnemar(10_300, 9_700) < 1e-3


def test_estimates_without_values_say_that_nothing_is_known() -> None:
    assert (estimate([]).low, estimate([]).high) == (0.0, 1.0)


@pytest.mark.parametrize(("hits", "n"), [(0, 4), (4, 4), (7, 20), (1, 1000)])
def test_every_share_has_the_same_interval(hits: int, n: int) -> None:
    """avg@1, pass@1, round 1 and the shares that training reports are one number with one interval: Wilson's."""
    (found,) = score(headers_of([episode(f"t/heldout/{i}", 0, [i < hits]) for i in range(n)]), [], rounds=1)
    assert found.average == found.passed == found.rounds[0]
    expected, share = binomtest(hits, n).proportion_ci(method="wilson"), proportion(hits, n)
    for low, high in ((found.average.low, found.average.high), (share.low, share.high)):
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_samples_of_a_problem_do_not_narrow_the_interval() -> None:
    one = score(headers_of([episode(f"t/heldout/{i}", 0, [i < 5]) for i in range(20)]), [], rounds=1)[0].average
    eight = [episode(f"t/heldout/{i}", s, [i < 5]) for i in range(20) for s in range(8)]
    assert one == score(headers_of(eight), [], rounds=1)[0].average


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998 (Stat. Med. 17:2635), table II, method 10: pairs with both, only first, only second, neither.
    for counts, expected in (((36, 12, 2, 0), (0.0569, 0.3404)), ((0, 0, 0, 10), (-0.2775, 0.2775))):
        both, first, second, neither = counts
        a = np.asarray([1.0] * both + [1.0] * first + [0.0] * second + [0.0] * neither)
        b = np.asarray([1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither)
        found = wilson_difference(a, b)
        assert found.mean == pytest.approx((first - second) / sum(counts))
        assert (found.low, found.high) == pytest.approx(expected, abs=2e-4)
        mirrored = wilson_difference(b, a)
        assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_comparison_is_paired() -> None:
    subset = {f"t/{i}": "t" for i in range(40)}
    first = {f"t/{i}": [[i % 4 != 0], [True]] for i in range(40)}
    second = {f"t/{i}": [[i % 4 == 1], [True]] for i in range(39)}
    (found,) = compare(first, second, subset)
    assert found.pairs == 78 and (found.only_first, found.only_second) == (19, 0)
    assert found.difference.mean == pytest.approx(19 / 78) and found.difference.low > 0
    assert found.mcnemar_p == pytest.approx(2 * 0.5**19)
    (itself,) = compare(first, first, subset)
    assert itself.difference.mean == 0 and itself.mcnemar_p == 1.0


def test_samples_are_paired_by_their_seed_even_where_episodes_were_lost() -> None:
    whole = successes(headers_of([episode("t/0", i, [i == 1]) for i in range(3)]), samples=3)
    lost = successes(headers_of([episode("t/0", i, [i == 1]) for i in (2, 1)]), samples=3)
    assert whole == {"t/0": [[False], [True], [False]]} and lost == {"t/0": [[], [True], [False]]}
    (found,) = compare(whole, lost, {"t/0": "t"})
    assert found.pairs == 2 and (found.only_first, found.only_second) == (0, 0)


def test_the_tables_fit_a_terminal_of_80_columns() -> None:
    names = ("t/heldout/olympiadbench/0", "t/heldout/aime24/0")
    played = [episode(name, i, [False] * 6) for name in names for i in range(8)]
    found = successes(headers_of(played), 8)
    result = Result(
        model="runs/qwen3_8b_math_4xh100", critic="http://critic:30000/v1", rounds=6, samples=8, generated_tokens=1,
        scores=score(headers_of(played), [], rounds=6), successes=found, subsets={}, contents={},
        comparison=compare(found, found, dict.fromkeys(names, "math/olympiadbench")),
        against="runs/grpo_8b_math_4xh100",
    )  # fmt: skip
    wide = Console(width=400)
    shown = [scores_table(result), rounds_table(result, 0), rounds_table(result, 3), transitions_table(result)]
    for table in [*shown, comparison_table(result), tools_table(result)]:
        assert wide.measure(table).maximum <= 80
    console = Console(width=80, file=io.StringIO())
    show(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    shown_parts = ("t/olympiadbench", "avg@8", "pass@8", "round 1", "round 6", "only the", "McNemar", "critique")
    assert all(part in text for part in (*shown_parts, "calls_search"))


# The program


class Critics(Handler):
    """An OpenAI-compatible endpoint that always advises the same, and fails its first answer."""

    seen: ClassVar[list[dict[str, Any]]] = []
    failures: ClassVar[Iterator[int]] = iter(())

    def do_GET(self) -> None:
        self.send_json({"data": [{"id": "adviser"}]})

    def do_POST(self) -> None:
        self.seen.append(json.loads(self.body()))
        if next(Critics.failures, None) is not None:
            self.send_json({"error": "busy"}, 503)
        else:
            self.send_json({"choices": [{"message": {"content": "<critic> elm oak fir </critic>"}}]})


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    Critics.failures = iter(range(1))
    with threaded(Critics) as url:
        yield f"{url}/v1"


class Evaluated(Batch):
    def result(self, name: str) -> dict[str, Any]:
        self.succeeded(name)
        return dict(json.loads((self.folder / name / "eval.json").read_text()))


@pytest.fixture(scope="module")
def ran(finished_run: Path, endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evals")
    start, saved, small = finished_run / "warm_start" / "hf", finished_run / "checkpoints", "--problems 12"

    def evaluation(model: Path, options: str, out: str = "") -> list[str]:
        return ["eval", str(model), *options.split(), *(["--out", str(folder / out)] if out else [])]

    commands = {
        "before": evaluation(start, f"{small} --samples 2", "before"),
        "after": evaluation(finished_run, f"{small} --samples 2 --rounds 2 --against {folder / 'before'}", "after"),
        "checkpoint": evaluation(saved, f"{small} --samples 2", "checkpoint"),
        "critic": evaluation(finished_run, f"{small} --rounds 2 --critic {endpoint}", "critic"),
        "swap": evaluation(finished_run, f"{small} --rounds 2 --critic {start} --revise-all", "swap"),
        "nobody": evaluation(finished_run, "--rounds 2 --critic http://127.0.0.1:9/v1", "nobody"),
        "subset": evaluation(finished_run, f"{small} --samples 2 --on rulebook_easy", "subset"),
        "saved_critic": evaluation(finished_run, f"{small} --rounds 3 --critic {saved}", "saved_critic"),
        "on_train": evaluation(finished_run, "--on train"),
        "no_critic": evaluation(finished_run, "--rounds 2 --critic /nowhere/critic"),
        "other_task": evaluation(finished_run, f"{small} --task rulebook_hard --against {folder / 'before'}"),
        "one_round": evaluation(finished_run, f"--critic {start}"),
        "no_task": evaluation(folder, ""),
        "unknown": evaluation(finished_run, "--task rulebok_hard"),
    }
    return Evaluated(folder, batch(folder, commands))


def test_two_models_on_the_same_problems(ran: Evaluated) -> None:
    before, after, folder = ran.result("before"), ran.result("after"), ran.folder
    assert list(before["successes"]) == list(after["successes"]) and len(before["successes"]) == 12
    assert all(len(tries) == 2 for tries in before["successes"].values())
    (compared,) = after["comparison"]
    assert compared["pairs"] == 24
    found, earlier = after["successes"], before["successes"]
    pairs = [pair for task in earlier for pair in zip(found[task], earlier[task], strict=True)]
    assert compared["only_first"] == sum(a[0] and not b[0] for a, b in pairs)
    episodes = Rollouts(folder / "after").episodes(0)
    assert successes(headers_of(episodes), 2) == after["successes"]
    assert all(turn.text for one in episodes for attempt in one.attempts for turn in attempt.turns)
    shown = io.StringIO()
    show_episode(folder / "after", index=3, console=Console(file=shown, width=100))
    assert episodes[3].task.task_id in shown.getvalue()
    assert (folder / "after" / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert len(after["scores"][0]["rounds"]) == 2


def test_a_checkpoint_and_its_export_are_the_same_model(ran: Evaluated) -> None:
    exported, loaded = (ran.result(name)["successes"] for name in ("after", "checkpoint"))
    assert {t: [e[0] for e in of] for t, of in exported.items()} == {t: [e[0] for e in of] for t, of in loaded.items()}


def test_another_critic_advises(ran: Evaluated) -> None:
    result = ran.result("critic")
    critiques = sum(result["scores"][0]["transitions"].values())
    assert critiques > 0 and result["scores"][0]["critique_tokens"] == 6  # three words, two tags, the end
    assert len(Critics.seen) >= critiques + 1  # the failed one was asked again
    assert all(request["model"] == "adviser" for request in Critics.seen)
    asked = Critics.seen[0]["messages"][0]["content"]
    assert "wrong" in asked and "<|" not in asked
    assert sum(ran.result("swap")["scores"][0]["transitions"].values()) == 12  # successes were revised too


def test_subsets_rounds_and_a_critic_from_a_checkpoint(ran: Evaluated) -> None:
    whole, part = (ran.result(name)["successes"] for name in ("checkpoint", "subset"))
    assert {t: [e[0] for e in of] for t, of in part.items()} == {t: [e[0] for e in of] for t, of in whole.items()}
    (scored,) = ran.result("saved_critic")["scores"]
    rounds = [round(12 * r["mean"]) for r in scored["rounds"]]
    assert len(rounds) == 3 and rounds == sorted(rounds)
    failed_first = 12 - rounds[0]
    critiques = sum(scored["transitions"].values())
    assert critiques == failed_first + (12 - rounds[1])  # every failure but those of the last round


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nobody", ["http://127.0.0.1:9/v1", "no OpenAI-compatible endpoint"]),
        ("one_round", ["--critic", "--rounds of at least 2"]),
        ("no_task", ["--task"]),
        ("on_train", ["--on train", "training rows"]),
        ("no_critic", ["/nowhere/critic", "neither a folder nor an address"]),
        ("other_task", ["--against", "it has no problem of this evaluation"]),
        ("unknown", ["rulebok_hard", "rulebook_hard"]),
    ],
)
def test_refused_with_one_message(ran: Evaluated, name: str, parts: list[str]) -> None:
    how = ran.ended[name]
    assert how.code == 2, how.error
    assert all(part in how.error for part in parts) and "Traceback" not in how.error


def test_other_files_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the result of an `icrl eval`"):
        read_result(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate(EvalRequest(tmp_path / "gone"))


@pytest.mark.parametrize("record", ["config.json", "icrl.json"])
def test_settings_inside_a_foreign_model_or_checkpoint_are_not_read(tmp_path: Path, record: str) -> None:
    """They could name commands that an evaluation starts."""
    settings = Settings()
    settings.tasks.sources = [ServedSource("textcraft", serve=TaskServers(command=f"touch {tmp_path / 'ran'}"))]
    model = tmp_path / "somebodys"
    save(settings, model / "settings.yaml")
    (model / record).write_text("{}")
    with pytest.raises(ConfigError, match="is not in a run folder"):
        evaluate(EvalRequest(model))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "settings.yaml").write_text((model / "settings.yaml").read_text())
    assert evaluation.run_settings(model) == (settings, [])  # of the run folder that the model lies in
