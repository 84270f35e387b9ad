"""`icrl report` on a real run, opened in a real browser; the weights in the dumps against what the trainer measured."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, executable
from whole_runs import icrl

from icrl_megatron.config import ConfigError
from icrl_megatron.telemetry.dumps import dump_path, dumped_steps, read_dump
from icrl_megatron.telemetry.page import PageSize, run_data, write_page
from icrl_megatron.telemetry.page_episodes import Speller
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)><!--"


def test_every_calibrated_token_has_its_weight_in_the_dump(finished_run: Path) -> None:
    rows = {int(r["step"]): r for r in read_rows(finished_run / METRICS_FILE) if "tokens/generated" in r}
    compared = 0
    for step in dumped_steps(finished_run):
        weights: list[float] = []
        for record in read_dump(dump_path(finished_run, step)):
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


def test_the_page_holds_the_run_and_no_network(finished_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = icrl("report", str(finished_run), "--out", str(page), "--episodes", "30")
    assert code == 0, err
    assert str(page) in out
    text = page.read_text()
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', text)
    assert "https://" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    (run,) = data["runs"]
    assert len(run["episodes"]["shown"]) == 30 and run["episodes"]["total"] == 6 * 16
    assert len(run["steps"]) == 6 and len(run["weights"]["steps"]) > 0
    assert all(sum(shares) == pytest.approx(1.0, abs=0.01) for shares in run["weights"]["shares"])
    assert {"rollout", "train"} <= set(run["times"])


def test_the_pieces_of_a_text_join_to_the_text(finished_run: Path) -> None:
    from icrl_megatron.settings import load_saved

    speller = Speller.of_run(finished_run, load_saved(finished_run / "settings.yaml"))
    for record in read_dump(dump_path(finished_run, 1))[:20]:
        for attempt in record.episode.attempts:
            for turn in attempt.turns:
                pieces = speller.pieces(turn.completion.ids)
                assert pieces is not None and len(pieces) == len(turn.completion.ids)
                assert "".join(pieces).strip() == turn.text.strip()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        write_page([tmp_path], tmp_path / "page.html")


def test_data_does_not_grow_with_the_run(finished_run: Path) -> None:
    assert len(run_data(finished_run, PageSize(episodes=5))["episodes"]["shown"]) == 5


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = executable()
    if program is None:
        pytest.skip("no Chromium on the path (ICRL_CHROMIUM names another)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs; the second has an episode that tries to break out of the page."""
    folder = tmp_path_factory.mktemp("page")
    hostile = folder / "hostile"
    shutil.copytree(finished_run, hostile, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    file = dump_path(hostile, 1)
    lines = file.read_text().splitlines()
    first = json.loads(lines[0])
    first["prompts"]["0/attempt"] = HOSTILE
    first["episode"]["attempts"][0]["summary"] = HOSTILE
    file.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    return write_page([finished_run, hostile], folder / "page.html", PageSize(episodes=200))


def test_a_person_clicks_through_to_an_episode(browser: Browser, page: Path) -> None:
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
    held = {colour for w, colour in weights if w < 0.2}
    moved = {colour for w, colour in weights if w >= 1.2}
    assert not held & moved
    browser.move("document.querySelector('#episode [data-w]')")
    browser.wait("!document.getElementById('tip').hidden && /^w \\d/.test(document.getElementById('tip').textContent)")
    assert browser.errors == []


def test_hostile_text_stays_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("document.title") == "ICRL report"
    for field, value, event in (("select", "1", "change"), ("input[type=search]", "onerror", "input")):
        browser.evaluate(
            f"(() => {{ const field = document.querySelector('#filters {field}'); field.value = '{value}';"
            f"field.dispatchEvent(new Event('{event}')); }})()"
        )
    browser.wait("document.querySelectorAll('#list li').length === 1")
    assert HOSTILE in browser.evaluate("document.querySelector('#episode .problem').textContent")
    assert browser.evaluate("document.images.length") == 0
    assert browser.errors == [] and all(r.startswith("file:") for r in browser.requests)
