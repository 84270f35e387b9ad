"""What an override means: exactly what was typed, or a refusal whose remedy can be pasted into a shell."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from icrl_megatron.run.checks import check_values
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

MATH = "tasks.sources=[{name: math, data: {train: [a.jsonl], heldout: [b.jsonl]}}]"


def value_of(override: str, *before: str) -> Any:
    found: Any = S.load("rulebook_easy", [*before, override])
    for part in override.split("=")[0].replace("[", ".").replace("]", "").split("."):
        found = found[int(part)] if part.isdigit() else found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def remedy_of(override: str, *before: str) -> str:
    """The override that the refusal offers, as a shell passes it on."""
    with pytest.raises(ConfigError) as caught:
        check_values(S.load("rulebook_easy", [*before, override]))
    message = str(caught.value)
    offered = re.search(r"(?:[Ww]rite|e\.g\.) (\S.*)$", message)
    assert offered, message
    assert "\n" not in message
    words = shlex.split(offered[1])
    assert len(words) == 1, message
    return words[0]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=010", 10),
        ("steps=0100", 100),
        ("steps=+7", 7),
        ('steps="100"', 100),
        ("optim.learning_rate=1E-6", 1e-6),
        ("optim.learning_rate=.000001", 1e-6),
        ("optim.learning_rate=1.e-6", 1e-6),
        ("optim.learning_rate=010", 10.0),
        ("algo.internalise=FALSE", False),
        ("algo.internalise=off", False),
        ("algo.internalise=y", True),
        ("max_generated_tokens=null", None),
        ("name=2024-01-02", "2024-01-02"),
        ("name=null", "null"),
        ("name=no", "no"),
        ("name=a #x", "a #x"),
        ("name=a: b", "a: b"),
        ("name='it''s'", "it's"),
        ("engine.server_args=[--x=1, 010, 1:20, yes, 0x10, ~, 2024-01-02, 1_000, null, http://h:1]", None),
        ("rollout.chat_template_args={enable_thinking: False, mode: fast}", {"enable_thinking": False, "mode": "fast"}),
    ],
)
def test_a_value_is_what_was_typed(override: str, value: object) -> None:
    if value is None and "[" in override:
        value = override.partition("[")[2].rstrip("]").split(", ")
    got = value_of(override)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("override", ["data.train=[1:20, 020:026]", "data.heldout=[0:60]", "data.train.0=1:20"])
def test_ranges_of_task_ids_stay_text(override: str) -> None:
    expected = override.partition("=")[2].strip("[]").split(", ")
    got = value_of(f"tasks.sources.0.{override}", MATH)
    assert ([got] if isinstance(got, str) else got) == expected


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("steps=1:30", "steps=60"),
        ("steps=1e2", "steps=100"),
        ("steps=100.0", "steps=100"),
        ("steps=1_000", "steps=1000"),
        ("steps=0x10", "steps=16"),
        ("steps=0o17", "steps=15"),
        ("steps=~", "steps=60"),
        ("steps=", "steps=60"),
        ("steps=٣", "steps=60"),
        ("+steps=3", "steps=3"),
        ("optim.learning_rate=1e_6", "optim.learning_rate=0.0006"),
        ("optim.learning_rate=1,5e-3", "optim.learning_rate=1.5e-3"),
        ("optim.learning_rate=1:20.5", "optim.learning_rate=0.0006"),
        ("optim.learning_rate=inf", "optim.learning_rate=0.0006"),
        ("optim.lr=1e-6", "optim.learning_rate=1e-6"),
        ("algo.internalise=null", "algo.internalise=true"),
        ("max_generated_tokens=None", "max_generated_tokens=null"),
        ("max_generated_tokens=", "max_generated_tokens=null"),
        ("rollout.chat_template_args.enable_thinking=no", "rollout.chat_template_args.enable_thinking=false"),
        ("rollout.chat_template_args.budget=100", 'rollout.chat_template_args.budget="100"'),
        ("rollout.chat_template_args.day=2024-01-02", 'rollout.chat_template_args.day="2024-01-02"'),
        ("rollout.chat_template_args=enable_thinking=false", "rollout.chat_template_args={enable_thinking: false}"),
        ("engine.server_args=--a", "engine.server_args=[--a]"),
        ("engine.server_args=", "engine.server_args=[]"),
        ("engine.server_args=[*.jsonl, @b]", 'engine.server_args=["*.jsonl", "@b"]'),
        ("engine.server_args=a b's", 'engine.server_args=["a b\'s"]'),
        ('engine.server_args=[--x, {"a": 1}]', r'engine.server_args=[--x, "{\"a\": 1}"]'),
        ("tasks.sources=household", "tasks.sources=[{name: household}]"),
        ("tasks.sources={name: household}", "tasks.sources=[{name: household}]"),
        ("warm_start.data=chats.jsonl", "warm_start.data=[{path: chats.jsonl}]"),
        ("tasks.sources=[{name:math,data:{train:[a],heldout:[b]}}]", None),
        ("tasks.sources=[{name: math, data: {train: a, heldout: b}, weight: 1_0}]", None),
        ("tasks.sources.1.weight=2", "tasks.sources.0.weight=2"),
        ("tasks.sources.-1.weight=2", "tasks.sources.0.weight=2"),
        ("tasks.source.weight=2", "tasks.sources.0.weight=2"),
        ("run_dir=~/x", "run_dir=/home/me/x"),
        ("run_dir=$HOME/x y", "run_dir=/home/me/x y"),
        ("name=..", "name=run"),
        ("name=a\nb", "name=run"),
    ],
)
def test_other_values_name_one_that_works(override: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    offered = remedy_of(override)
    assert remedy is None or offered == remedy
    check_values(S.load("rulebook_easy", [offered]))


@settings(max_examples=20)
@given(st.integers(0, 10**9), st.integers(0, 3))
def test_integers_are_decimal(number: int, zeros: int) -> None:
    assert value_of(f"steps={'0' * zeros}{number}") == number


@settings(max_examples=20)
@given(st.lists(st.from_regex(r"[A-Za-z0-9_.:+~-]*[A-Za-z0-9_]", fullmatch=True), min_size=1, max_size=4))
def test_words_in_lists_stay_text(words: list[str]) -> None:
    plain = [word if yaml_plain(word) else f"'{word}'" for word in words]
    assert value_of(f"engine.server_args=[{', '.join(plain)}]") == words


def yaml_plain(word: str) -> bool:
    try:
        node = yaml.compose(f"[{word}]", yaml.BaseLoader)
    except yaml.YAMLError:
        return False
    return isinstance(node.value[0], yaml.ScalarNode) and node.value[0].value == word


@settings(max_examples=20)
@given(st.from_regex(r"[0-9_:.eExXa-fo~,+-]{1,8}", fullmatch=True))
def test_a_number_is_read_as_python_reads_it_or_refused(text: str) -> None:
    try:
        got = value_of(f"steps={text}")
    except ConfigError as error:
        assert f"={text}: expected an integer" in str(error)
        return
    assert got == int(text)
    assert "_" not in text


@pytest.mark.parametrize(
    "value", ["[" * 1200, "# only a comment", "a: [", "{a: 1, a: 2}", "--- a\n--- b", "!!python/x 1"]
)
def test_no_value_ends_in_a_traceback(value: str) -> None:
    for name in ("engine.server_args", "rollout.chat_template_args", "tasks.sources", "tasks"):
        with pytest.raises(ConfigError, match=re.escape(name)):
            S.load("rulebook_easy", [f"{name}={value}"])


def test_remedies_survive_a_real_shell() -> None:
    remedy = 'engine.server_args=["it\'s $HOME", "{\\"a\\": [1]}"]'
    with pytest.raises(ConfigError) as caught:
        S.load("rulebook_easy", ['engine.server_args=[it\'s $HOME, {"a": [1]}]'])
    pasted = str(caught.value).partition("write ")[2]
    said = subprocess.run(["bash", "-c", f"printf %s {pasted}"], capture_output=True, text=True, check=True).stdout
    assert value_of(said) == value_of(remedy)


@pytest.mark.parametrize("line", ["seed: 010", "seed: 10"])
def test_files_of_settings_follow_the_same_rules(line: str, tmp_path: Path) -> None:
    text = S.to_yaml(S.load("rulebook_easy", [MATH, "name=1:30", "tasks.sources.0.data.train=[1:20, no]"]))
    (tmp_path / "s.yaml").write_text(re.sub(r"(?m)^seed: .*$", line, text))
    read = S.load_saved(tmp_path / "s.yaml")
    assert (read.seed, read.name, read.tasks.sources[0].data.train) == (10, "1:30", ["1:20", "no"])  # type: ignore[attr-defined]


@settings(max_examples=8)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12))
def test_saved_texts_come_back(text: str) -> None:
    assume("${" not in text and text != "???")
    with tempfile.TemporaryDirectory() as folder:
        S.save(Settings(name=text), Path(folder) / "s.yaml")
        assert S.load_saved(Path(folder) / "s.yaml").name == text
