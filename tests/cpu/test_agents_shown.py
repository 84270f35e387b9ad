"""`icrl show` and `icrl report` of a run whose model calls tools: colors, folded calls, and texts that stay texts."""

from __future__ import annotations

import asyncio
import io
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from terminals import in_a_terminal

from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.report.page import PageSize, write_page
from icrl_megatron.report.page_episodes import Speller, episode
from icrl_megatron.report.segments import colors, split
from icrl_megatron.report.show import show
from icrl_megatron.settings.loading import SAVED_NAME, save
from icrl_megatron.settings.task_options import ArchiveSource
from icrl_megatron.tasks.archive import Archive
from icrl_megatron.telemetry.dump_shards import shard_path
from icrl_megatron.telemetry.dumps import DumpRecord, Rollouts, write_dump
from icrl_megatron.telemetry.metrics import rollout_metrics
from icrl_megatron.telemetry.writer import METRICS_FILE
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Task, Turn
from icrl_megatron.utils.console import PlainConsole
from icrl_recipes.tiny import archive as archive_recipe

HOSTILE = (
    "</details></div></noscript></script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
    "<svg onload=window.owned=1></svg> /*DATA*/ /*JS*/ & \" ' <!--"
)
LONG = "word " * 300 + "the end"
TAGS = {"ARTICLE", "B", "DETAILS", "DIV", "H2", "H3", "H4", "P", "SPAN", "SUMMARY"}


def played(task_set: Archive, task: Task, index: int) -> Episode:
    """The teacher's attempt, its critique, and its next attempt."""
    tokenizer = build_tokenizer(task_set.vocabulary())
    teacher, attempts, critiques = task_set.teacher(task, random.Random(index)), [], []

    def said(reply: str) -> Completion:
        ids = tuple(tokenizer(reply)["input_ids"])
        return Completion(ids, (-0.5,) * len(ids), "stop", 0)

    async def attempt(round: int) -> Attempt:
        environment, turns = task_set.environment(task), []
        observation, done = await environment.reset(), False
        while not done:
            reply = teacher.act(observation, critiques[-1].text if critiques else None)
            action = environment.parse(reply)
            assert action is not None
            result = await environment.step(action)
            observation, done = result.observation, result.done
            turns.append(Turn(said(reply), reply, action, observation, ()))
        ended = environment.outcome(), environment.success(), environment.summary()
        measures = tuple(environment.measures().items())
        return Attempt(round, (), (), tuple(turns), *ended, "done", measures=measures)

    for round in (0, 1):
        attempts.append(asyncio.run(attempt(round)))
        if round == 0:
            text = teacher.criticise(attempts[0].summary)
            critiques.append(Critique(0, (), said(text), text))
    return Episode(task, index, tuple(attempts), tuple(critiques))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with episodes of Archive's teacher. The first episode's texts try to break out of the page."""
    folder, task_set = tmp_path_factory.mktemp("agents") / "run", Archive(ArchiveSource("archive"))
    (folder / "rollouts").mkdir(parents=True)
    settings = archive_recipe()
    save(settings, folder / SAVED_NAME)
    build_tokenizer(task_set.vocabulary()).save_pretrained(folder / "hf")
    episodes = [played(task_set, task, i) for i, task in enumerate(task_set.problems("train")[:8])]
    report = credit(headers_of(episodes), settings.algo, True)
    rows = []
    for step in (1, 2):
        write_dump(folder, step, episodes, report.samples, lambda ids: "sum size home ?")
        cost = {"step": step, "tokens/generated": 100.0, "tokens/generated_total": 100.0 * step}
        rows.append(rollout_metrics(headers_of(episodes), [], report) | cost)
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))

    file = shard_path(folder, 0)
    lines = file.read_text().split("\n")
    number = next(i for i, line in enumerate(lines) if '"step": 2,' in line)
    first = json.loads(lines[number])
    turns = first["episode"]["attempts"][0]["turns"]
    turns[0]["observation"], turns[1]["observation"] = HOSTILE, LONG
    first["episode"]["attempts"][0]["summary"] = first["prompt"] = HOSTILE
    lines[number] = json.dumps(first)
    file.write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_page([run], run / "report.html")


def shown(run: Path, full: bool = False, **terminal: object) -> str:
    console = PlainConsole(file=io.StringIO(), width=80, **terminal)
    show(run, 2, 0, console, full)
    return console.file.getvalue()  # type: ignore[attr-defined]


def escape(name: str) -> str:
    """The terminal's escape sequence of an agent's color."""
    color = colors(["answer", "calculator", "check", "page", "plan", "search"])[name]
    return "\x1b[38;2;{};{};{}m".format(*(int(color[i : i + 2], 16) for i in (1, 3, 5)))


def test_show_colors_each_agent_and_cuts_calls_and_observations(run: Path) -> None:
    text = shown(run, force_terminal=True, color_system="truecolor")
    for name in ("plan", "search", "answer"):
        assert f"{escape(name)}<{name}>" in text
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert "the end" not in text and "--full" in lines[-1]
    assert max(map(len, lines)) <= 80
    assert sum("word word" in line for line in lines) == 1
    (observed,) = [line.rstrip() for line in lines if "word word" in line]
    assert observed.endswith("…")

    whole = shown(run, full=True, force_terminal=True, color_system="truecolor")
    assert "the end" in " ".join(whole.split()) and "--full" not in whole


def test_show_of_a_long_call(run: Path, tmp_path: Path) -> None:
    record = Rollouts(run).read(2)[1]
    attempt = record.episode.attempts[0]
    call = Turn(attempt.turns[0].completion, f"<plan> a </plan>\n<page>\n{LONG}\n</page>", "<page>x</page>", "", ())
    changed = replace(record.episode, attempts=(replace(attempt, turns=(call,)),), critiques=())
    write_dump(tmp_path, 2, [changed], [], lambda ids: "")
    text = shown(tmp_path)
    assert "the end" not in text and "<page> word word" in text and "<plan> a </plan>" in text
    assert "--full" in text
    assert "the end" in " ".join(shown(tmp_path, full=True).split())


def test_show_writes_no_colors_to_a_file_or_where_they_are_unwanted(run: Path) -> None:
    command = [sys.executable, "-m", "icrl_megatron.cli", "show", str(run), "--step", "2", "--episode", "0"]
    colored = in_a_terminal(command, COLORTERM="truecolor")
    assert escape("plan") in colored and "--full" in colored
    plain = in_a_terminal([*command, "--full"], NO_COLOR="1", COLORTERM="truecolor")
    assert not re.search("\x1b\\[[0-9;]*[34]8;", plain) and "<plan>" in plain and "the end" in " ".join(plain.split())
    piped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "\x1b" not in piped.stdout and "<plan>" in piped.stdout


def test_the_parts_on_the_page_hold_every_token_once(run: Path) -> None:
    spellers = [Speller.of_run(run, archive_recipe()), Speller(None)]
    for record in Rollouts(run).read(1):
        for speller in spellers:
            for attempt, of_round in zip(record.episode.attempts, rounds(record, speller), strict=True):
                for turn, on_page in zip(attempt.turns, of_round["turns"], strict=True):
                    tokens = [token for part in on_page["parts"] for token in part["tokens"]]
                    assert "".join(token[0] for token in tokens).strip() == turn.text.strip()
                    if speller.tokenizer is not None:
                        assert len(tokens) == len(turn.completion.ids)
                    agents = [s.agent for s in split(turn.text, ("page", "calculator")) if s.text.strip()]
                    assert [part["agent"] for part in on_page["parts"]] == agents


def rounds(record: DumpRecord, speller: Speller) -> list[dict[str, Any]]:
    found = episode(1, record, speller, 4000, ("page", "calculator"))["rounds"]
    return [one for one in found if one["role"] != "critique"]


def test_a_long_text_keeps_its_agents(run: Path) -> None:
    (first, *_) = rounds(Rollouts(run).read(1)[0], Speller.of_run(run, archive_recipe()))
    cut = episode(1, Rollouts(run).read(1)[0], Speller.of_run(run, archive_recipe()), 3, ())["rounds"][0]
    assert [part["agent"] for part in first["turns"][0]["parts"]] == ["plan", "search"]
    assert [part["agent"] for part in cut["turns"][0]["parts"]] == ["plan", ""]
    assert "tokens more" in cut["turns"][0]["parts"][1]["tokens"][0][0]


def test_the_page_shows_each_agent_in_its_color(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.evaluate("choose(1)")
    key = browser.evaluate(
        "[...document.querySelectorAll('#episode .agents .agent')]"
        ".map(a => [a.textContent, getComputedStyle(a.querySelector('b'), '::before').backgroundColor])"
    )
    assert {"answer", "plan", "search"} <= {name for name, _ in key}
    assert len({color for _, color in key}) == len(key)
    borders = browser.evaluate(
        "[...document.querySelectorAll('#episode .col .agent')]"
        ".map(a => [a.querySelector('b').textContent, getComputedStyle(a).borderLeftColor])"
    )
    assert borders and all([name, color] in key for name, color in borders)
    folded = "[...document.querySelectorAll('#episode .col details')]"
    assert browser.evaluate(f"{folded}.length >= 4 && {folded}.every(d => !d.open)")
    assert browser.evaluate(f"{folded}.filter(d => d.matches('.obs')).length") > 0
    browser.click("document.querySelector('#episode .col details summary')")
    browser.wait(f"{folded}[0].open")
    browser.evaluate(f"{folded}[0].open = false")
    browser.evaluate("document.querySelector('#episode .col .text').focus()")
    for _ in range(8):  # the plan has six tokens, and the call follows
        browser.press("ArrowRight")
    browser.wait(f"{folded}[0].open")
    charts = browser.evaluate("[...document.querySelectorAll('#counted figcaption')].map(c => c.textContent)")
    assert charts[:3] == ["Calls by tool", "Repeated and invalid calls", "Share of attempts with an answer"]
    assert charts[3:] == ["changed_tags", "format"]  # whatever else an environment counts
    assert "search" in browser.evaluate("document.querySelector('#counted .legend').textContent")
    assert browser.errors == []


def test_an_observation_with_a_script_is_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.querySelectorAll('#list li').forEach((_, i) => choose(i))")
    browser.evaluate("choose(found.findIndex(e => e.problem.includes('owned')))")
    assert HOSTILE in browser.evaluate("document.querySelector('#episode .obs').textContent")
    assert browser.evaluate("typeof window.owned") == "undefined"
    assert browser.evaluate("document.querySelectorAll('#episode img, #episode script, #episode svg').length") == 0
    assert browser.errors == [] and all(r.startswith("file:") for r in browser.requests)


def test_without_javascript_the_episodes_are_still_there(browser: Browser, page: Path, tmp_path: Path) -> None:
    # The page's policy would stop a script even if a text were not escaped.
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text()))
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=bare.resolve().as_uri())
        browser.wait("document.readyState === 'complete' && location.href.endsWith('bare.html')")
        assert set(browser.evaluate("[...document.querySelectorAll('.static *')].map(e => e.tagName)")) <= TAGS
        texts = browser.evaluate("[...document.querySelectorAll('.static .obs')].map(o => o.textContent)")
        assert any(HOSTILE in text for text in texts)
        folded = "document.querySelectorAll('.static details')"
        assert browser.evaluate(f"[...{folded}].length > 10 && [...{folded}].every(d => !d.open)")
        browser.click(f"{folded}[0].querySelector('summary')")
        browser.wait(f"{folded}[0].open")
        assert browser.evaluate("getComputedStyle(document.getElementById('learning')).display") == "none"
        names = browser.evaluate("[...document.querySelectorAll('.static > .agents b')].map(b => b.textContent)")
        assert {"answer", "page", "plan", "search"} <= set(names)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_static_part_is_bounded(run: Path, page: Path, tmp_path: Path) -> None:
    out = write_page([run], tmp_path / "page.html", PageSize(episodes=2))
    assert out.read_text().count("<article>") == 2
    assert page.read_text().count("<article>") == 12  # of 16
