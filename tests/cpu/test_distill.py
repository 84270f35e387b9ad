"""`icrl distill` as a user meets it: real processes, a kill, and mistakes in settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import qwen_tokenizers

pytest.importorskip("bm25s")

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.distill import command, readers, records, writers
from icrl_megatron.distill.events import Event, Run
from icrl_megatron.distill.trajectory import Segment, Trajectory
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.files import locked

ENDPOINT = ("distill.system=endpoint", "distill.endpoint={url: 'http://h/v1', model: m}")


def settings(*overrides: str) -> Settings:
    return load("archive", ["tasks.limit=20", "distill.attempts=2", *overrides])


def started(out: Path, *overrides: str) -> subprocess.Popen[str]:
    arguments = ["distill", "archive", "--out", str(out), *overrides]
    code = "from icrl_megatron.cli import main; main()"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report(out: Path) -> dict:
    return json.loads(out.with_suffix(".report.json").read_text())


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "archive.jsonl"
    said = command.run(settings(), out, sharegpt=out.with_name("plain.jsonl"))
    assert "40 of 40 attempts finished" in said and said.endswith(f"counts in {out.with_suffix('.report.json')}")
    return out


def test_the_file_holds_what_the_report_counts(whole: Path) -> None:
    counts, found = report(whole), rows(whole)
    assert (counts["problems"], counts["attempts"], counts["finished"], counts["failed"]) == (20, 40, 40, {})
    assert 8 < counts["right"] < 36 and counts["written"] == len(found) > 4
    assert counts["tokens"]["searcher"]["read"] > counts["tokens"]["searcher"]["written"] > 0
    for row in found:
        roles = [message["role"] for message in row["messages"]]
        assert roles[0] == "user" and roles[-1] == "assistant" and "tool" in roles
        assert row["messages"][1]["content"].startswith("<plan>")
        assert row["messages"][-1]["content"].endswith("</answer>")
        assert json.loads(row["trajectory"])["correct"] is True
        tools = {tool["function"]["name"] for tool in json.loads(row["tools"])}
        made = [call for message in row["messages"] for call in message.get("tool_calls", [])]
        assert {call["function"]["name"] for call in made} <= tools == {"search", "page", "calculator"}
        answered = [message["tool_call_id"] for message in row["messages"] if message["role"] == "tool"]
        assert answered == [call["id"] for call in made]


def test_other_trainers_read_the_same_text(whole: Path) -> None:
    """Qwen's chat template renders both files alike, where a trainer puts tags around answers and nothing else."""
    vocabulary = qwen_tokenizers.build("qwen2_5")
    plain = rows(whole.with_name("plain.jsonl"))
    assert len(plain) == len(rows(whole))
    for row, other in zip(rows(whole), plain, strict=True):
        tools = [{"type": "function", "function": one} for one in json.loads(other["tools"])]
        assert tools == json.loads(row["tools"]) and other["system"] == ""
        said = [(turn["from"], turn["value"]) for turn in other["conversations"]]
        assert [who for who, _ in said[:3]] == ["human", "gpt", "observation"] and said[-1][0] == "gpt"
        seen = {"gpt": "{}", "human": "{}", "observation": "<tool_response>\n{}\n</tool_response>"}
        roles = {"gpt": "assistant", "human": "user", "observation": "user"}
        messages = [{"role": roles[who], "content": seen[who].format(text)} for who, text in said]
        render = partial(vocabulary.apply_chat_template, tools=tools, tokenize=False)
        assert render(row["messages"]) == render(messages)


def test_parquet_holds_the_same_and_no_other_file_is_replaced(whole: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = tmp_path / "archive.parquet"
    out.with_suffix(".runs.jsonl").write_bytes(whole.with_suffix(".runs.jsonl").read_bytes())
    for _ in range(2):
        command.run(settings(), out)
    read = [[one.trajectory.segments for one in readers.read(str(path)) if one.trajectory] for path in (whole, out)]
    assert read[0] == read[1] != []
    for other in (pa.table({"messages": ["mine"]}), b"PAR1"):
        out.write_bytes(other) if isinstance(other, bytes) else pq.write_table(other, out)
        before = out.read_bytes()
        with pytest.raises(ConfigError, match="--overwrite"):
            command.run(settings(), out)
        assert out.read_bytes() == before


def test_several_answers_and_later_messages_in_the_form_of_other_trainers() -> None:
    calls = [Segment("search", "", "call", call=ToolCall("search", {"query": text})) for text in "ab"]
    seen = [Segment("search", text, "observation", trained=False) for text in ("one</tool_call>", "two")]
    more = [Segment("answer", "2", "answer"), Segment("user", "sure?", "observation", trained=False), *calls, *seen]
    spec = ToolSpec.of_text("search", "Searches.", "query")
    row = writers.sharegpt(Trajectory("t/1", "q", (*calls, *seen, *more), system="be good", tools=(spec,)))
    turns = row["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt", "observation", "gpt", "human", "gpt"]
    assert turns[2]["value"] == "one< /tool_call>\n</tool_response>\n<tool_response>\ntwo"
    assert row["system"] == "be good"
    assert turns[1]["value"].count("<tool_call>") == 2 and turns[3]["value"] == "<answer>2</answer>"


def test_a_model_of_archive_knows_every_word_of_the_file(whole: Path) -> None:
    from icrl_megatron.model.tiny import build_tokenizer
    from icrl_megatron.tasks.archive import Archive
    from icrl_megatron.tasks.registry import get

    archive = get("archive")
    assert isinstance(archive, Archive)
    tokenizer = build_tokenizer(archive.vocabulary())
    for message in (message for row in rows(whole) for message in row["messages"]):
        assert tokenizer.unk_token_id not in tokenizer.encode(message["content"], add_special_tokens=False)


def test_a_killed_command_goes_on_and_ends_with_the_same_files(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "archive.jsonl"
    overrides = ("tasks.limit=20", "distill.attempts=2", "distill.concurrency=1")
    runs, process = out.with_suffix(".runs.jsonl"), started(out, *overrides)
    deadline = time.monotonic() + 60
    while not (runs.exists() and runs.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    begun = runs.read_bytes()
    assert not out.exists() and begun.count(b"\n") < 41
    with runs.open("ab") as file:
        file.write(b'{"task_id": "archive/tra')  # what a kill in the middle of a record leaves
    said, errors = started(out, *overrides).communicate(timeout=60)
    assert "40 of 40 attempts finished" in said, errors
    whole_lines = begun[: begun.rfind(b"\n") + 1]
    assert runs.read_bytes().startswith(whole_lines) and runs.read_bytes().count(b"\n") == 41
    assert out.read_bytes() == whole.read_bytes()
    assert report(out) == report(whole)


def test_finished_attempts_are_not_played_again(tmp_path: Path) -> None:
    """Another choice of filters, and further attempts, use the runs that are there."""
    out = tmp_path / "a.jsonl"
    command.run(settings(), out)
    before = out.with_suffix(".runs.jsonl").read_bytes()
    command.run(settings("distill.filters.leave_out=[correctness]"), out)
    assert out.with_suffix(".runs.jsonl").read_bytes() == before
    assert "correctness" not in [one["name"] for one in report(out)["filters"]]
    command.run(settings("distill.attempts=3"), out)
    after = out.with_suffix(".runs.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 20


SEARCHQA = "data: {train: [a.jsonl], corpus: c.jsonl}, agent: {tools: [search, page, mcp], mcp: [{command: [a]}]}"


@pytest.mark.parametrize(
    ("override", "same"),
    [
        *((f"tasks.sources.0.{one}", False) for one in (
            "data.train=[b.jsonl]", "data.corpus=d.jsonl", "data.passages=4", "data.servers=[http://h]",
            "data.prompt_column=q", "serve.command=x", "agent.tools=[search]", "agent.page.path=/p",
            "agent.page.chars=10", "agent.python_state=true", "agent.grammar=web", "agent.mcp.0.command=[b]",
            "agent.judge=f1",
        )),
        *((f"tasks.sources.0.{one}", True) for one in (
            "weight=2", "plan.calls=3", "data.heldout=[h.jsonl]", "data.request_timeout_s=9", "data.grading_workers=4",
            "serve.startup_timeout_s=9", "agent.page.timeout_s=9", "agent.mcp.0.timeout_s=9",
            "agent.endpoint.timeout_s=9",
        )),
        ("rollout.max_observation_bytes=2048", False),
        ("rollout.environment_timeout_s=70", True),
        ("distill.rounds=2", False),
        ("distill.endpoint.temperature=0.5", False),
        ("distill.agents=[{name: planner, prompt: b.txt}]", False),
        ("distill.agents=[{name: planner, prompt: same.txt, url: 'http://x'}]", True),
        ("distill.attempts=9", True),
        ("tasks.limit=3", True),
    ],
)  # fmt: skip
def test_what_may_change_later(override: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.txt", "plan"), ("b.txt", "plan well"), ("same.txt", "plan")):
        Path(name).write_text(text)
    before = [f"tasks.sources=[{{name: searchqa, {SEARCHQA}}}]", "distill.agents=[{name: planner, prompt: a.txt}]"]
    first, second = (records.identity(settings(*before, *more), plays_model=False) for more in ([], [override]))
    assert (first == second) is same
    records.Records(tmp_path / "r", first, []).close()
    if not same:
        with pytest.raises(ConfigError, match=r"other settings \([a-z_.0-9, ]+\): give another --out"):
            records.Records(tmp_path / "r", second, [])


def test_runs_of_a_problem_that_has_changed_are_kept_and_not_used(tmp_path: Path) -> None:
    old, new = (Task("t/train/0", "t", "train", problem) for problem in ("1 + 1", "1 + 2"))
    event = Event("answerer", "answer", "answer", "2", (), 0)
    path, run = tmp_path / "r", Run(old.task_id, 0, "1 + 1", (event,), True, {})
    of_old, of_new = [(old.task_id, 0)], [(new.task_id, 0)]
    for task, found, outdated in ((old, [], 0), (new, [], 1), (old, of_old, 1), (new, of_new, 1)):
        kept = records.Records(path, {}, [task])
        assert (list(kept.runs), kept.outdated) == (found, outdated)
        if not found:
            kept.add(run)
        kept.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes\n", "not a file of runs"),
        (b"my notes", "not a file of runs"),
        (b'{"icrl_distill": {"seed": 1}}\n', r"made with other settings \(distill, seed, sources\)"),
        ({"events": None}, r"line 2: not a run"),
        ({"task_id": 5}, r"line 2: not a run \(task_id is '5'\)"),
        ({"problem": 7}, r"line 2: not a run \(problem is '7'\)"),
        ({"events": [{**vars(Event("a", "b", "text", "", (), 0)), "kind": "bogus"}]}, "not a run .*'bogus'"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path: Path, content: bytes | dict, message: str) -> None:
    out = tmp_path / "a.jsonl"
    runs = out.with_suffix(".runs.jsonl")
    if isinstance(content, dict):
        head = json.dumps({"icrl_distill": command.identity(settings(), plays_model=False)})
        run = {**asdict(Run("a/1", 0, "q", (), True, {})), **content}
        content = f"{head}\n{json.dumps({'task': '', **run})}\n".encode()
    runs.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        command.run(settings(), out)
    assert runs.read_bytes() == content
    runs.unlink()
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        command.run(settings(), out)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.attempts=0"], "distill.attempts=0"),
        (["distill.system=magic"], "choose one of scripted, endpoint"),
        (["distill.filters.leave_out=[beauty]"], "distill.filters.leave_out has beauty"),
        (["distill.filters.duplicate_similarity=0.2"], "between 0.5 and 1"),
        (["distill.system=endpoint"], "set distill.endpoint.url"),
        (["distill.system=endpoint", "engine.kind=sglang"], "model.path is empty: set model.path"),
        (["distill.system=endpoint", "engine.kind=sglang", "model.path=/nowhere"], "/nowhere: no such folder"),
        (["--heldout", "--sharegpt", "b.jsonl"], "leave one of them out"),
        (["--sharegpt", "b.json"], "--sharegpt=b.json: give another name"),
        (["distill.agents=[{name: poet}]"], "no effect with distill.system=scripted"),
        (["tasks.sources=[{name: household}]"], "'household' has no scripted team"),
        ([*ENDPOINT, "tasks.sources=[{name: household}]"], "'household' has no tools"),
        ([*ENDPOINT, "distill.agents=[{name: poet, tools: [rhyme]}]"], "has the tool 'rhyme'"),
    ],
)
def test_wrong_settings_are_found_at_the_start(
    tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icrl_megatron import cli

    out = tmp_path / "deep" / "a.jsonl"
    monkeypatch.setattr(sys, "argv", ["icrl", "distill", "archive", "--out", str(out), *overrides])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
    assert not out.parent.exists()


def test_another_suffix_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.jsonl or \.parquet"):
        command.run(settings(), tmp_path / "a.csv")
    out = tmp_path / "a.jsonl"
    with pytest.raises(HopelessError, match="no trajectory is left of 40 attempts"):
        command.run(settings("distill.filters.min_interactions=1000"), out)
    assert not out.exists() and report(out)["filters"][1]["why"] == {"too few interactions": report(out)["right"]}


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with locked(tmp_path, f".{out.name}.lock"), pytest.raises(ConfigError, match=rf"--out={out}: another run"):
        command.run(settings(), out)
    assert not out.with_suffix(".runs.jsonl").exists()


def test_the_writer_keeps_what_messages_hold(tmp_path: Path) -> None:
    one = Trajectory(
        "t/train/0", "why?", (Segment("think", "because"), Segment("plan", "do"), Segment("answer", "7", "answer")),
        system="be good",
    )  # fmt: skip
    writers.write(tmp_path / "a.jsonl", [one])
    (row,) = rows(tmp_path / "a.jsonl")
    assert row["messages"] == [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "<think>\nbecause\n</think>\n\n<plan>do</plan>\n<answer>7</answer>"},
    ]


def test_heldout_problems_are_read_before_anything_is_played(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1", "label": "2"}\n')
    source = f"{{name: math, data: {{train: [{tmp_path}/train.jsonl], heldout: [{tmp_path}/no.jsonl]}}, "
    given = [*ENDPOINT, f"tasks.sources=[{source}agent: {{tools: [calculator]}}}}]"]
    with pytest.raises(ConfigError, match=r"no\.jsonl"):
        command.prepare(settings(*given), tmp_path / "a.jsonl")
    command.prepare(settings(*given, "distill.filters.leave_out=[leakage]"), tmp_path / "a.jsonl")
