"""Control characters from models, environments and files, in a real terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
from agentgym_server import State, serving
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from terminals import in_a_terminal
from whole_runs import SMALL, from_model, icrl

from icrl_megatron.telemetry.dump_shards import shard_path
from icrl_megatron.utils.console import PlainConsole
from icrl_megatron.utils.terminal import printable

HOSTILE = "\x1b]0;owned\x07 \x1b[8mhidden \x9b2J \u202etxt.exe \u2066x\u2069 \r\x7f\x00 \x1b]52;c;AAAA\x1b\\"
SHOWN = (r"\x1b]0;owned\x07", r"\x1b[8mhidden", r"\x9b2J", r"\u202etxt.exe")
OURS = re.compile("\x1b\\[[0-9;]*[mABCDKGHJ]|\x1b\\[\\?25[lh]")
"""Sequences that rich writes: colors, cursor movements and visibility. The "hidden" color is not allowed."""
GUARD = "from icrl_megatron.utils.terminal import guard; guard(); "


def raw_controls(text: str) -> set[str]:
    """The control characters in a text, as Python escapes, except for the sequences that rich writes."""
    rest = OURS.sub(lambda found: "\x1b[8m" if found[0] == "\x1b[8m" else "", text)
    odd = {c for c in rest if unicodedata.category(c) in ("Cc", "Cs") or "\u2066" <= c <= "\u2069" or c == "\u202e"}
    return {ascii(c) for c in odd - set("\n\t")}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("\x00\x07\x08\x0b\x0c\r\x7f\x80\x9f", r"\x00\x07\x08\x0b\x0c\x0d\x7f\x80\x9f"),
        ("\u202a\u202b\u202c\u202d\u202e", r"\u202a\u202b\u202c\u202d\u202e"),
        ("\u2066\u2067\u2068\u2069\u200e\u200f\u061c", r"\u2066\u2067\u2068\u2069\u200e\u200f\u061c"),
        ("\u2028\u2029\ud800\udfff", r"\u2028\u2029\ud800\udfff"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Grüße 漢字 👩\u200d💻 שלום", "Grüße 漢字 👩\u200d💻 שלום"),
    ],
)
def test_control_characters_are_escaped_and_letters_kept(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_every_unicode_control_character_is_escaped() -> None:
    every = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cs"))
    assert len(every) == 65 + 2048
    assert {c for c in printable(every) if not c.isprintable()} == {"\n", "\t"}


def test_all_ways_to_print_are_escaped() -> None:
    programs = (
        "print({0!r})", "import sys; sys.stdout.write({0!r})", "import sys; sys.stderr.writelines([{0!r}])",
        "import warnings; warnings.warn({0!r})", "import logging; logging.error({0!r})", "raise RuntimeError({0!r})",
        "import threading; threading.Thread(target=lambda: 1 / [{0!r}], daemon=True).start(); raise OSError({0!r})",
        "from rich.console import Console; Console(highlight=False).print({0!r})",
    )  # fmt: skip
    for code in programs:
        got = in_a_terminal([sys.executable, "-c", GUARD + code.format(HOSTILE)])
        assert raw_controls(got) == set(), (code, got)
        assert r"\x1b]0;owned" in got, (code, got)


def test_characters_outside_the_terminals_encoding_are_escaped() -> None:
    got = in_a_terminal([sys.executable, "-c", GUARD + r"print('a\u6f22b \ud800')"], PYTHONIOENCODING="ascii:strict")
    assert got == "a\\u6f22b \\ud800\n"


BARS = """
import sys, time
from icrl_megatron.utils.progress import Progress
progress = Progress()
with progress.phase("a [bold]phase\\x1b]0;owned\\x07", 2) as bar:
    bar.advance(1, "\\x1b]0;owned\\x07")
    time.sleep(0.3)
    progress.log({0!r})
    print({0!r})
    print({0!r}, file=sys.stderr)
print({0!r})
"""


def test_output_beside_progress_bars_is_escaped() -> None:
    """While bars are shown, rich replaces stdout and stderr."""
    got = in_a_terminal([sys.executable, "-c", GUARD + BARS.format(HOSTILE)])
    assert raw_controls(got) - {r"'\r'"} == set(), got  # rich returns to the start of the line
    assert "\r\\x0d" not in got and got.count(r"\x9b2J") == 4
    assert r"a [bold]phase\x1b]0;o" in got


def test_console_escapes_all_kinds_of_text() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=400, force_terminal=True, color_system="truecolor")
    table = Table("[bold]name", title=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE, style="red"))
    for shown in (HOSTILE, Text(HOSTILE), Panel(HOSTILE, title=Text(HOSTILE)), table, "[link=file:///x]x[/link] :key:"):
        console.print(shown)
    got = out.getvalue()
    assert raw_controls(got) == set()
    assert all(got.count(one) >= 3 for one in SHOWN)
    assert "[link=file:///x]x[/link] :key:" in got and "[bold]name" in got


def test_escapes_do_not_truncate_a_long_line() -> None:
    out = io.StringIO()
    PlainConsole(file=out, width=40).print(f"{HOSTILE} " + "word " * 20 + "the end")
    assert "the end" in out.getvalue() and all(len(line) <= 40 for line in out.getvalue().splitlines())


def injected(value: object) -> object:
    """The value with HOSTILE appended to every text."""
    if isinstance(value, str):
        return value if value[:3] in ("i4:", "f4:", "f8:") else value + HOSTILE
    if isinstance(value, dict):
        return {name: injected(of) if name not in ("credit", "role") else of for name, of in value.items()}
    return [injected(of) for of in value] if isinstance(value, list) else value


def test_icrl_show_escapes_a_dump(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    lines = shard_path(finished_run, 0).read_text().splitlines()
    shard_path(tmp_path, 0).write_text("".join(f"{json.dumps(injected(json.loads(line)))}\n" for line in lines))
    # The name of a folder can contain control characters too.
    named = tmp_path / "run\x1b]0;owned\x07"
    named.mkdir()
    shutil.copytree(tmp_path / "rollouts", named / "rollouts")
    show = [sys.executable, "-m", "icrl_megatron.cli", "show", str(named)]
    got = in_a_terminal(show)
    assert "round 1: revision" in got, got
    assert raw_controls(got) == set()
    assert all(got.count(one) >= 5 for one in SHOWN)
    refused = in_a_terminal([*show, "--step", "99"])
    assert "Step 99 was not dumped" in refused and raw_controls(refused) == set()


def test_errors_of_an_environment_are_escaped(finished_run: Path, tmp_path: Path) -> None:
    """Both in the check before the run and in the rank's error."""
    state = State("alfworld", "A")
    model = [*from_model(finished_run), "steps=1", f"run_dir={tmp_path}"]
    with serving("alfworld", "A", state) as (url, _):
        source = f"tasks.sources=[{{name: alfworld, data: {{train: ['0:8'], heldout: ['8:16'], servers: ['{url}']}}}}]"
        words = ["train", "rulebook_easy", *SMALL, *model, source]
        state.fail["/reset"] = [None, *[(200, {"error": HOSTILE})] * 1000]
        got = in_a_terminal([sys.executable, "-m", "icrl_megatron.cli", *words], timeout_s=300)
        assert re.search("all \\d+ episodes were lost", got), got
        assert raw_controls(got) - {r"'\r'"} == set() and SHOWN[0] in got and SHOWN[1] in got

        code, _, err = icrl(*words)
        assert code == 2 and "tasks.sources: 'alfworld'" in err
        assert raw_controls(err) == set() and SHOWN[0] in err
        code, out, err = icrl("env", "check", url)
        assert code == 2 and raw_controls(out + err) == set() and SHOWN[0] in err
