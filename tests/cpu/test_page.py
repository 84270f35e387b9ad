"""`icrl report` of a real run in a real browser, and the calibration weights in its dumps against the metrics."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser
from whole_runs import icrl

from icrl_megatron.report.page import PageSize, write_page
from icrl_megatron.report.page_choice import SHORTEST, choose
from icrl_megatron.report.page_curves import POINTS, Measured, group_data, times
from icrl_megatron.report.page_episodes import Speller
from icrl_megatron.settings.loading import SAVED_NAME, load_saved, save
from icrl_megatron.settings.schema import OptimSettings, Settings
from icrl_megatron.settings.task_schema import TaskSettings, TaskSource
from icrl_megatron.telemetry.dump_shards import shard_path
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows
from icrl_megatron.utils.errors import ConfigError

INJECTION = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)><!--"


def test_dumps_have_the_weight_of_every_calibrated_token(finished_run: Path) -> None:
    rows = {int(r["step"]): r for r in read_rows(finished_run / METRICS_FILE) if "tokens/generated" in r}
    compared = 0
    rollouts = Rollouts(finished_run)
    for step in rollouts.steps:
        weights: list[float] = []
        for record in rollouts.read(step):
            for attempt in record.episode.attempts:
                credited = record.credit.get(f"{attempt.round}/{'revision' if attempt.round else 'attempt'}")
                if attempt.round == 0:
                    assert credited is not None and credited.weights == ()
                elif credited is not None:
                    assert len(credited.weights) == sum(len(t.completion.ids) for t in attempt.turns)
                    weights += credited.weights
        if weights:
            mean = rows[step]["actor/calibration_weight"]
            assert sum(weights) / len(weights) == pytest.approx(mean, abs=1e-4)
            assert all(0 <= w <= 2.0 for w in weights)
            compared += 1
    assert compared > 0


def test_page_contains_the_run_and_no_links(finished_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = icrl("report", str(finished_run), "--out", str(page), "--episodes", "30")
    assert code == 0, err
    assert str(page) in out
    text = page.read_text()
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', text)
    assert "https://" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    (run,) = data["runs"]
    episodes, weights = run["episodes"], run["weights"]
    assert (len(episodes["shown"]), episodes["kept"], episodes["read"], episodes["dumped"]) == (30, 6 * 16, 6, 6)
    assert run["steps"] == 6 and len(weights["steps"]) > 0
    assert all(sum(shares) == pytest.approx(1.0, abs=0.01) for shares in weights["shares"])
    assert {"rollout", "train"} <= set(run["times"]["phases"])
    (group,) = data["groups"]
    rows = read_rows(finished_run / METRICS_FILE)
    measured = {int(r["step"]): r["actor/calibration_weight"] for r in rows if r.get("actor/calibrated")}
    assert group["transfer"]["mean"]["mean"] == pytest.approx([measured[s] for s in weights["steps"]], abs=1e-3)
    (task,) = group["tasks"]
    assert task["name"] == "rulebook_easy"
    evaluated = [r["heldout/critique_free"] for r in rows if "tokens/evaluation" in r]
    assert [h["mean"] for h in task["heldout"]] == evaluated
    assert run["evaluation_tokens"] == sum(r.get("tokens/evaluation", 0) for r in rows) > 0


def test_token_pieces_join_to_the_text(finished_run: Path) -> None:
    speller = Speller.of_run(finished_run, load_saved(finished_run / "settings.yaml"))
    for record in Rollouts(finished_run).read(1)[:20]:
        for attempt in record.episode.attempts:
            for turn in attempt.turns:
                pieces = speller.pieces(turn.completion.ids.tolist())
                assert pieces is not None and len(pieces) == len(turn.completion.ids)
                assert "".join(pieces).strip() == turn.text.strip()


def test_folder_without_metrics_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        write_page([tmp_path], tmp_path / "page.html")


def test_every_run_folder_can_be_reported_on(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    baseline = run / "baseline_grpo"  # as `baseline=grpo` leaves it: like a run, without settings
    shutil.copytree(finished_run, baseline, ignore=shutil.ignore_patterns("checkpoints", SAVED_NAME, "warm_start"))
    kept = [run / "settings.yaml", run / "warm_start" / "hf", baseline / "hf"]
    warm = run / "warm_start"
    for folder, label, losses in ((baseline, "rulebook_easy_grpo", 0), (warm, "rulebook_easy_warm_start", 1)):
        code, out, err = icrl("report", str(folder))
        assert code == 0, err
        assert str(folder / "report.html") in "".join(out.split("\n"))
        data = json.loads(re.search(r'id="data">(.*?)</script>', (folder / "report.html").read_text(), re.S)[1])  # type: ignore[index]
        (shown,) = data["runs"]
        assert shown["label"] == label
        assert bool(data["groups"][0]["supervised"]["training"]["x"]) == bool(losses)
        assert (shown["setup"]["rounds"] == "1") == (folder == baseline)
    assert all(path.exists() for path in kept)
    code, _, err = icrl("report", str(run / "rollouts"))
    assert code == 2 and "give the folder of a run" in err


def test_page_size_is_bounded(finished_run: Path) -> None:
    few = choose(finished_run, 2.0, PageSize(episodes=5, steps=3), runs=1)
    assert (len(few.records), few.read, few.dumped) == (5, 3, 6)
    assert len({step for step, _ in few.records}) == 3
    whole = choose(finished_run, 2.0, PageSize(), runs=1)
    assert len(whole.records) == 96 and whole.limit == PageSize().tokens
    # Texts are truncated first, then episodes are omitted, until the page is within its limit.
    tokens = sum(r.episode.generated_tokens() for _, r in whole.records)
    assert tokens > 300
    small = choose(finished_run, 2.0, PageSize(total_tokens=300), runs=1)
    assert small.limit == SHORTEST and 0 < len(small.records) < 96
    assert sum(r.episode.generated_tokens() for _, r in small.records) <= 300
    assert len(choose(finished_run, 2.0, PageSize(total_tokens=300), runs=3).records) < len(small.records)
    row = {"tokens/generated": 10.0, "time/train_s": 1.0, "reward/attempt": 0.5}
    long = Measured("long", Settings(), [{"step": float(step), **row} for step in range(1, 9000)])
    data = group_data([long], [0])
    assert len(data["curves"]["step"]["reward/attempt"]["x"]) <= POINTS
    spent = times(long)
    assert len(spent["steps"]) <= POINTS and sum(spent["counts"]) == 8999


def copied(run: Path, to: Path, **changes: object) -> Path:
    """A copy with changed settings of the files of a run folder that a page reads."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    saved = load_saved(to / SAVED_NAME)
    save(replace(saved, **changes), to / SAVED_NAME)  # type: ignore[arg-type]
    return to


def test_seeds_of_one_experiment_share_a_curve(finished_run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / f"icrl_{n}" for n in (0, 1, 2)]
    seeds = [copied(finished_run, folder, seed=n, run_dir=str(folder)) for n, folder in enumerate(folders)]
    other = copied(finished_run, tmp_path / "again", optim=OptimSettings(learning_rate=1e-5))
    metrics, success = seeds[1] / METRICS_FILE, '"success/source/rulebook_easy": '
    metrics.write_text(metrics.read_text().replace(success, f'{success}1e-9, "x": '))
    out = write_page([*seeds, other], tmp_path / "page.html", PageSize(episodes=4))
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])  # type: ignore[index]
    assert [(g["label"], g["seeds"], g["runs"]) for g in data["groups"]] == [
        ("icrl", [0, 1, 2], [0, 1, 2]),
        ("again", [load_saved(finished_run / SAVED_NAME).seed], [3]),
    ]
    seeded, alone = (g["tasks"][0]["curve"]["step"] for g in data["groups"])
    assert seeded["seeds"] == 3 and alone["seeds"] == 1
    assert seeded["mean"] == pytest.approx([2 / 3 * y for y in alone["mean"]], abs=1e-5)
    assert seeded["low"] == pytest.approx([0.0] * 6, abs=1e-5)
    assert seeded["high"] == pytest.approx(alone["mean"], abs=1e-5)


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of one run and of two seeds of another; the last has an episode with text that tries to inject HTML."""
    folder = tmp_path_factory.mktemp("page")
    another = copied(finished_run, folder / "other_0", optim=OptimSettings(learning_rate=1e-5))
    hostile = copied(finished_run, folder / "hostile", optim=OptimSettings(learning_rate=1e-5), seed=7)
    file = shard_path(hostile, 0)
    lines = file.read_text().splitlines()
    first = json.loads(lines[0])
    first["prompt"] = INJECTION
    first["episode"]["attempts"][0]["summary"] = INJECTION
    file.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    return write_page([finished_run, another, hostile], folder / "page.html", PageSize(episodes=200))


def test_clicks_lead_to_an_episode(browser: Browser, page: Path) -> None:
    browser.open(page)
    charts = browser.evaluate("[...document.querySelectorAll('#learning svg')].length")
    assert charts >= 3
    browser.click("document.querySelector('button[data-axis=tokens]')")
    browser.wait("document.querySelector('button[data-axis=tokens]').classList.contains('on')")
    assert "generated tokens" in browser.evaluate("document.querySelector('#chart-free svg').textContent")

    browser.click("document.querySelector('button[data-outcome=failed]')")
    browser.wait("document.querySelector('button[data-outcome=failed]').classList.contains('on')")
    shown = browser.evaluate("document.querySelectorAll('#list li').length")
    assert shown > 0
    assert browser.evaluate("document.querySelectorAll('#list .dot:not(.failed)').length") == 0
    browser.click(f"document.querySelectorAll('#list li')[{shown - 1}]")
    browser.wait(f"document.querySelectorAll('#list li')[{shown - 1}].classList.contains('on')")
    roles = browser.evaluate("[...document.querySelectorAll('#episode .col')].map(c => c.dataset.role)")
    assert roles == ["attempt", "critique", "revision"]
    weights = browser.evaluate(
        "[...document.querySelectorAll('#episode [data-w]')]"
        ".map(t => [+t.dataset.w, getComputedStyle(t).backgroundColor])"
    )
    assert weights
    low = {color for w, color in weights if w < 0.2}
    high = {color for w, color in weights if w >= 1.2}
    assert not low & high
    assert browser.evaluate("document.querySelectorAll('#chart-free path.band').length") == 1
    assert browser.evaluate("document.querySelector('#tables table').rows.length") == 1 + 2  # head, experiments
    browser.move("document.querySelector('#episode [data-w]')")
    browser.wait("!document.getElementById('tip').hidden && /^w \\d/.test(document.getElementById('tip').textContent)")
    assert browser.errors == []


def test_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.getElementById('list').focus()")
    assert browser.evaluate("found.length") > 2
    browser.evaluate("choose(0)")
    browser.press("ArrowDown")
    browser.wait("document.querySelectorAll('#list li')[1].getAttribute('aria-selected') === 'true'")
    assert browser.evaluate("document.getElementById('list').getAttribute('aria-activedescendant')") == "e1"
    browser.evaluate("changed('sort', 'spread')")  # so that the first episode has a revision with weights
    browser.evaluate("document.querySelector('#episode [data-w]').closest('.text').focus()")
    browser.press("ArrowRight")
    browser.wait("!document.getElementById('tip').hidden && /: w \\d/.test(document.getElementById('tip').textContent)")
    browser.evaluate("document.querySelector('#chart-free svg').focus()")
    browser.press("End")
    browser.wait("/^step \\d+: /.test(document.getElementById('tip').textContent)")
    assert "from" in browser.evaluate("document.querySelector('#chart-free svg').getAttribute('aria-label')")
    assert browser.errors == []


def test_page_fits_a_phone_and_has_two_themes(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.screenshot(tmp_path / "narrow.png", 420, 900)
    assert browser.evaluate("document.documentElement.scrollWidth <= 420")
    assert browser.evaluate("+document.querySelector('#chart-free svg').getAttribute('viewBox').split(' ')[2] <= 420")
    color = "getComputedStyle(document.body).backgroundColor"
    found = []
    for theme in ("light", "dark"):
        browser.click("document.getElementById('theme')")
        browser.wait(f"document.documentElement.dataset.theme === '{theme}'")
        found.append(browser.evaluate(color))
    assert found[0] != found[1]
    assert (tmp_path / "narrow.png").read_bytes().startswith(b"\x89PNG")
    assert browser.errors == []


@pytest.fixture(scope="module")
def two_tasks(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a run on two task sets, of which one is solved and the other is not, with long ids of problems."""
    sources = [TaskSource("rulebook_easy"), TaskSource("household")]
    folder = tmp_path_factory.mktemp("two")
    run = copied(finished_run, folder / "run", tasks=TaskSettings(sources))
    lines = []
    for line in (run / METRICS_FILE).read_text().splitlines():
        row = json.loads(line)
        if "heldout/critique_free" in row:
            row |= {"heldout/critique_free/rulebook_easy": 1.0, "heldout/critique_free/household": 0.0}
            row |= {"heldout/critique_free": 0.5, "heldout/attempts/household": 8.0}
        if "success/source/rulebook_easy" in row:
            row["success/source/household"] = 0.0
        lines.append(json.dumps(row))
    (run / METRICS_FILE).write_text("\n".join(lines) + "\n")
    for file in (run / "rollouts").iterdir():
        file.write_text(file.read_text().replace('"rulebook_easy/train/', '"rulebook_easy/train/long_name_of_a_file/'))
    return write_page([run], folder / "page.html", PageSize(episodes=60))


def test_task_sets_are_shown_separately(browser: Browser, two_tasks: Path) -> None:
    browser.open(two_tasks)
    tiles = browser.evaluate("[...document.querySelectorAll('.tile')].map(t => t.textContent)")
    assert any(tile.startswith("100 % → 100 %") and "rulebook_easy" in tile for tile in tiles)
    assert any(tile.startswith("0 % → 0 %") and "household" in tile for tile in tiles)
    captions = browser.evaluate("[...document.querySelectorAll('#chart-free figcaption')].map(c => c.textContent)")
    assert [caption.rpartition(": ")[2] for caption in captions] == ["rulebook_easy", "household"]
    assert not any("50 %" in tile for tile in tiles)
    rings = "document.querySelectorAll('#chart-free figure')[{}].querySelectorAll('circle').length"
    assert browser.evaluate(rings.format(0)) == browser.evaluate(rings.format(1)) > 0
    assert browser.errors == []


@pytest.mark.parametrize("width", [360, 768, 1280, 1800])
def test_ids_are_whole_and_no_row_is_half_empty(browser: Browser, two_tasks: Path, tmp_path: Path, width: int) -> None:
    browser.open(two_tasks)
    browser.screenshot(tmp_path / "page.png", width, 900)
    assert browser.evaluate(f"document.documentElement.scrollWidth <= {width}")
    ids = browser.evaluate(
        "[...document.querySelectorAll('#list em')].map(e => [e.textContent, e.scrollWidth <= e.clientWidth + 1,"
        "getComputedStyle(e).textOverflow])"
    )
    assert len(ids) > 20 and all(whole and overflow == "clip" for _, whole, overflow in ids)
    gaps = browser.evaluate(
        "[...document.querySelectorAll('.grid, .tiles')].filter(g => g.children.length && g.offsetWidth).map(g => {"
        "const s = getComputedStyle(g), inner = g.getBoundingClientRect().right - parseFloat(s.paddingRight);"
        "return Math.round(inner - g.lastElementChild.getBoundingClientRect().right); })"
    )
    assert len(gaps) >= 5 and all(abs(gap) <= 2 for gap in gaps), gaps
    assert browser.errors == []


def test_injected_html_is_shown_as_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("document.title") == "ICRL report"
    for field, value, event in (("select", "2", "change"), ("input[type=search]", "onerror", "input")):
        browser.evaluate(
            f"(() => {{ const field = document.querySelector('#filters {field}'); field.value = '{value}';"
            f"field.dispatchEvent(new Event('{event}')); }})()"
        )
    browser.wait("document.querySelectorAll('#list li').length === 1")
    assert INJECTION in browser.evaluate("document.querySelector('#episode .problem').textContent")
    assert browser.evaluate("document.images.length") == 0
    assert browser.errors == [] and all(r.startswith("file:") for r in browser.requests)
