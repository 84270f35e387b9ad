"""Result folders: whatever is in the place of one stays, unless it is an unchanged earlier result of the same kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (it writes its cache once, and not into a test's home)
import pytest
from disks import AS_NOBODY, python, small_disk

from icrl_megatron import cli
from icrl_megatron.utils import results
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import save_picture
from icrl_megatron.utils.result_files import begins_with

KINDS = [results.MODEL, results.CHECKPOINT, results.EVALUATION, results.INDEX]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a home of the test's own."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what links lead to, contents of files, "/" for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_text()
    return found


def write(target: Path, kind: results.Kind, text: str = "new", **options: bool) -> None:
    with results.writing(target, kind, **options) as folder:
        (folder / "a.json").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text(text)


# What a target may be, and what it may not.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_result_appears_whole_and_replaces_its_earlier_self(kind: results.Kind, tmp_path: Path) -> None:
    target, sibling = tmp_path / "deep" / "er" / "out", tmp_path / "deep" / "er" / "out.part"
    write(target, kind, "one")
    sibling.write_text("mine")
    write(target, kind, "two")
    assert tree(target).keys() == {".icrl-result", "a.json", "inner", "inner/b.txt"}
    assert (target / "a.json").read_text() == (target / "inner" / "b.txt").read_text() == "two"
    marker = json.loads((target / results.MARKER).read_text())
    assert marker["kind"] == kind.name and marker["files"].keys() == {"a.json", "inner/b.txt"}
    assert tree(target.parent).keys() == {"out", "out.part", *(f"out/{n}" for n in tree(target))}
    assert results.describe(target) == "2 files, 0.0 KiB"


def test_an_empty_folder_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", results.MODEL)
    assert (tmp_path / "out" / "a.json").read_text() == "new"


def _added(target: Path) -> None:
    (target / "notes.md").write_text("mine")


def _added_deep(target: Path) -> None:
    (target / "inner" / "gguf").mkdir()
    (target / "inner" / "gguf" / "q4.gguf").write_text("mine")


def _link_added(target: Path) -> None:
    (target / "link").symlink_to(target.parent)


def _edited(target: Path) -> None:
    (target / "a.json").write_text("NEW")  # of the same size


def _file_for_folder(target: Path) -> None:
    (target / "inner" / "b.txt").unlink()
    (target / "inner" / "b.txt").symlink_to("/etc/hostname")


def _end_of_weights(target: Path) -> None:
    with (target / "a.json").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"#")


def _other_kind(target: Path) -> None:
    marker = json.loads((target / results.MARKER).read_text())
    (target / results.MARKER).write_text(json.dumps(marker | {"kind": "evaluation"}))


def _marker_cut(target: Path) -> None:
    text = (target / results.MARKER).read_text()
    (target / results.MARKER).write_text(text[: len(text) // 2])


def _marker_strange(target: Path) -> None:
    (target / results.MARKER).write_text('{"kind": "model", "files": ["a.json"]}')


@pytest.mark.parametrize(
    "change",
    [
        _added, _added_deep, _link_added, _edited, _end_of_weights, _file_for_folder, _other_kind, _marker_cut,
        _marker_strange,
    ],
)  # fmt: skip
def test_what_somebody_put_into_a_result_is_not_deleted_with_it(change: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, results.MODEL, "x" * 5_000_000 if change is _end_of_weights else "new")
    change(target)
    before = tree(target)
    with pytest.raises(ConfigError, match=rf"^{target}: .*--overwrite to replace it$"):
        write(target, results.MODEL, "later")
    assert tree(target) == before and sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "work"]
    write(target, results.MODEL, "later", overwrite=True)
    assert (target / "a.json").read_text() == "later" and "notes.md" not in tree(target)


def test_a_file_that_is_gone_from_a_result_is_no_loss(tmp_path: Path) -> None:
    write(tmp_path / "out", results.MODEL)
    (tmp_path / "out" / "a.json").unlink()
    write(tmp_path / "out", results.MODEL, "two")
    assert (tmp_path / "out" / "a.json").read_text() == "two"


RECORD = '{"format": 2, "files": {"rank.safetensors": {}, "model/config.json": {}}}'
EVAL = '{"successes": {}, "subsets": {}, "scores": [], "generated_tokens": 0}'


@pytest.mark.parametrize(
    ("kind", "files", "ours"),
    [
        (results.CHECKPOINT, {"icrl.json": RECORD, "rank.safetensors": "", "model/config.json": ""}, True),
        (results.CHECKPOINT, {"icrl.json": RECORD, "rank.safetensors": "", "notes.md": "mine"}, False),
        (results.CHECKPOINT, {"rank.safetensors": "", "model/config.json": ""}, False),
        (results.EVALUATION, {"eval.json": EVAL, "eval.png": "", "logs/servers.1/a.log": ""}, True),
        (results.EVALUATION, {"eval.json": EVAL, "other.json": "mine"}, False),
        (results.EVALUATION, {"eval.json": "{}"}, False),
        (results.INDEX, {"source.json": '{"size": 1, "changed": 2}', "offsets.npy": "", "vocab.index.json": ""}, True),
        (results.INDEX, {"source.json": '{"size": 1, "changed": 2}', "notes": "mine"}, False),
        (results.MODEL, {"config.json": "{}", "model.safetensors": ""}, False),
    ],
)  # fmt: skip
def test_results_of_older_versions_have_no_marker(
    kind: results.Kind, files: dict[str, str], ours: bool, tmp_path: Path
) -> None:
    """Those that can be told with certainty are replaced; anybody's model folder looks like an old export."""
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    if ours:
        write(tmp_path / "out", kind)
        assert "a.json" in tree(tmp_path / "out")
    else:
        with pytest.raises(ConfigError, match="is not known to be an earlier"):
            write(tmp_path / "out", kind)
        assert tree(tmp_path / "out").keys() >= files.keys() - {"model/config.json"}


def test_a_target_that_changed_while_it_was_written_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"notes\.md"), results.writing(target, results.MODEL) as folder:
        (folder / "a.json").write_text("new")
        target.mkdir()
        (target / "notes.md").write_text("mine")
    assert tree(target) == {"notes.md": "mine"}


def test_a_block_that_fails_leaves_the_old_result_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out", results.MODEL, "old")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), results.writing(tmp_path / "out", results.MODEL) as folder:
        (folder / "a.json").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == before


# Every command, against every target that it must refuse.


def _source(tmp_path: Path) -> Path:
    """Reads like a model to `icrl eval`, and holds what an import and an export read."""
    source = tmp_path / "models" / "mine"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    return source


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "export": lambda source, target: ["export", str(source), str(target)],
    "import": lambda source, target: ["import", str(source), str(target)],
    "eval": lambda source, target: ["eval", str(source), "--task", "rulebook_easy", "--out", str(target)],
}


def _file(tmp_path: Path) -> Path:
    (tmp_path / "target").write_text("mine")
    return tmp_path / "target"


def _fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "target")
    return tmp_path / "target"


def _below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "target").write_text("mine")
    return tmp_path / "target" / "out"


def _link_to_folder(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "target"


def _link_to_nothing(tmp_path: Path) -> Path:
    (tmp_path / "target").symlink_to(tmp_path / "gone")
    return tmp_path / "target"


def _link_loop(tmp_path: Path) -> Path:
    (tmp_path / "target").symlink_to(tmp_path / "target")
    return tmp_path / "target"


def _here(tmp_path: Path) -> Path:
    return Path()


def _up(tmp_path: Path) -> Path:
    return Path("..")


def _here_in_other_words(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".." / "work"


def _root(tmp_path: Path) -> Path:
    return Path("/")


def _home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def _the_source(tmp_path: Path) -> Path:
    return tmp_path / "models" / "mine"


def _above_the_source(tmp_path: Path) -> Path:
    return tmp_path / "models"


def _above_the_source_through_a_link(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path)
    return tmp_path / "link" / "models"


def _the_weights_of_the_source(tmp_path: Path) -> Path:
    """A model in the cache of its hub is a folder of links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1234").write_text("mine")
    (tmp_path / "models" / "mine" / "model.safetensors").symlink_to(tmp_path / "blobs" / "1234")
    return tmp_path / "blobs"


def _inside_a_result(tmp_path: Path) -> Path:
    write(tmp_path / "other", results.MODEL)
    return tmp_path / "other" / "sub" / "out"


def _a_checkpoint(tmp_path: Path) -> Path:
    return _inside_a_checkpoint(tmp_path).parent


def _inside_a_checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "step_000004").mkdir()
    (tmp_path / "step_000004" / "icrl.json").write_text(RECORD)
    return tmp_path / "step_000004" / "out"


NEVER = [
    _file, _fifo, _below_a_file, _link_to_folder, _link_to_nothing, _link_loop, _here, _up, _here_in_other_words, _root,
    _home, _the_source, _above_the_source, _above_the_source_through_a_link, _the_weights_of_the_source,
    _inside_a_result, _a_checkpoint, _inside_a_checkpoint,
]  # fmt: skip


def _collection(tmp_path: Path) -> Path:
    (tmp_path / "target" / "other").mkdir(parents=True)
    (tmp_path / "target" / "other" / "model.safetensors").write_text("mine")
    (tmp_path / "target" / "notes.md").write_text("mine")
    return tmp_path / "target"


def _run(tmp_path: Path) -> Path:
    (tmp_path / "target" / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "target" / "metrics.jsonl").write_text("{}")
    return tmp_path / "target"


def _hidden(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / ".git").write_text("mine")
    return tmp_path / "target"


def _other_result(tmp_path: Path) -> Path:
    write(tmp_path / "target", results.INDEX)
    return tmp_path / "target"


ON_PURPOSE = [_collection, _run, _hidden, _other_result]


def icrl(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says; it must be one line, and come before torch."""
    monkeypatch.setattr(sys, "argv", ["icrl", *arguments])
    for name in ("icrl_megatron.actor.convert", "icrl_megatron.engines.local"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "icrl_megatron.actor.convert" not in sys.modules and "icrl_megatron.engines.local" not in sys.modules
    return err


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("made", NEVER)
@pytest.mark.parametrize("command", COMMANDS)
def test_refused_always(
    command: str, made: Callable[[Path], Path], overwrite: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, target = _source(tmp_path), made(tmp_path)
    before = tree(tmp_path) if made is not _fifo else {}
    arguments = COMMANDS[command](source, target) + (["--overwrite"] if overwrite else [])
    assert str(target) in icrl(arguments, monkeypatch, capsys)
    assert made is _fifo or tree(tmp_path) == before


@pytest.mark.parametrize("made", ON_PURPOSE)
@pytest.mark.parametrize("command", COMMANDS)
def test_refused_without_overwrite(
    command: str, made: Callable[[Path], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, target = _source(tmp_path), made(tmp_path)
    before = tree(tmp_path)
    said = icrl(COMMANDS[command](source, target), monkeypatch, capsys)
    assert str(target) in said and "choose another folder" in said and "--overwrite" in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("made", ON_PURPOSE)
def test_overwrite_is_on_purpose(made: Callable[[Path], Path], tmp_path: Path) -> None:
    target = made(tmp_path)
    write(target, results.MODEL, overwrite=True)
    assert tree(target).keys() == {".icrl-result", "a.json", "inner", "inner/b.txt"}


def test_an_import_stays_beside_other_steps(tmp_path: Path) -> None:
    root, source = tmp_path / "checkpoints", _source(tmp_path)
    for step in ("step_000020", "step_000040.part"):
        (root / step).mkdir(parents=True)
    write(root / "eval_step_000020", results.EVALUATION)
    assert results.check_import(root, source) == root / "step_000000"
    write(root / "step_000000", results.CHECKPOINT, "earlier")
    assert results.check_import(root, source) == root / "step_000000"
    (root / "step_000000" / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"step_000000: notes\.md was added"):
        results.check_import(root, source)
    assert results.check_import(root, source, overwrite=True) == root / "step_000000"
    (root / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"it holds notes\.md, so it is not a folder of checkpoints"):
        results.check_import(root, source)


def test_a_mount_point_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(ConfigError, match="a mount point, which cannot be replaced; name a folder inside it"):
            write(disk, results.MODEL)
        write(disk / "out", results.MODEL)


# Single files.

PICTURE = ["plan", "qwen3_8b_alfworld_4xh100", "--picture"]


@pytest.mark.parametrize(
    ("made", "never"), [(_file, False), (_link_to_nothing, True), (_collection, True), (_fifo, True)]
)
@pytest.mark.parametrize("command", ["report", "plan"])
def test_a_page_or_picture_replaces_no_other_file(
    command: str, made: Callable[[Path], Path], never: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = made(tmp_path)
    before = tree(tmp_path) if made is not _fifo else {}
    arguments = [*PICTURE, str(target)] if command == "plan" else ["report", str(tmp_path), "--out", str(target)]
    said = icrl(arguments, monkeypatch, capsys)
    assert str(target) in said and ("--overwrite" in said) == (not never)
    if never:
        icrl([*arguments, "--overwrite"], monkeypatch, capsys)
    assert made is _fifo or tree(tmp_path) == before


def test_earlier_pictures_and_pages_are_recognised(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from icrl_megatron.plan.scaling import require_writable
    from icrl_megatron.report.page import WEB

    page = begins_with(b"<title>ICRL report</title>")
    assert page(WEB / "page.html") and not page(Path(__file__))
    save_picture(Figure(), tmp_path / "ours.png")
    require_writable(tmp_path / "ours.png")
    Figure().savefig(tmp_path / "theirs.png")
    with pytest.raises(ConfigError, match="not a picture that this program wrote"):
        require_writable(tmp_path / "theirs.png")
    require_writable(tmp_path / "theirs.png", overwrite=True)


@pytest.mark.parametrize("name", ["ablation.md", "ablation.png", "ablation.json"])
def test_a_table_of_arms_replaces_no_other_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("{}")
    said = icrl(["ablate", "rulebook_easy", "--arms", "icrl", "--out", str(tmp_path), "--table"], monkeypatch, capsys)
    assert f"no ablation wrote its {name}" in said
    said = icrl(
        ["ablate", "rulebook_easy", "--arms", "icrl", "--out", str(tmp_path / name), "--table"], monkeypatch, capsys
    )
    assert "a file, and the runs need a folder" in said


# A run's own folder.

TRAIN = ["train", "rulebook_easy", "--dry-run"]


@pytest.mark.parametrize("where", ["hf", "baseline_grpo/hf"])
@pytest.mark.parametrize("made", [_file, _link_to_folder, _link_to_nothing, *ON_PURPOSE])
def test_a_run_finds_at_its_start_what_its_end_would_replace(
    where: str, made: Callable[[Path], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    (run / where).parent.mkdir(parents=True)
    made(tmp_path).rename(run / where)
    before = tree(tmp_path)
    said = icrl([*TRAIN, f"run_dir={run}", "baseline=grpo"], monkeypatch, capsys)
    assert str(run / where) in said
    assert tree(tmp_path) == before


def test_a_run_goes_on_beside_its_own_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run" / "hf", results.MODEL)
    monkeypatch.setattr(sys, "argv", ["icrl", *TRAIN, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "rollouts", "tensorboard", "report.json", "learning_curve.png", "task_success.jsonl",
             "control_before.json", "control_after.json"]
)  # fmt: skip
def test_a_run_begins_in_no_folder_with_files_of_its_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    said = icrl([*TRAIN, f"run_dir={tmp_path / 'run'}"], monkeypatch, capsys)
    assert f"it holds {name} but no settings.yaml" in said and "choose another run_dir" in said
    assert tree(tmp_path / "run") == {name: "mine"}


# Crashes and company.

REWRITES = """
import sys
from pathlib import Path
from icrl_megatron.utils import results
target, first, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if mode == "two renames":
    results._exchanged = lambda one, other: False
print("ready", flush=True)
for number in range(first, 10**9):
    with results.writing(target, results.MODEL) as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text(str(number) * 1000)
"""


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_killed_at_any_moment_old_or_new_is_there(mode: str, tmp_path: Path) -> None:
    target, appeared = tmp_path / "out", False
    for killed in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", REWRITES, str(target), str(killed + 1), mode], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.03 + 0.023 * killed)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Between two renames the old result is in the temporary folder, and the next writer puts it back.
        aside = [p for p in tmp_path.glob(".out.*") if (p / "replaced").exists() or (p / "out" / "a").exists()]
        assert target.exists() or (mode == "two renames" and aside) or not appeared
        appeared = appeared or target.exists()
        if target.exists():
            assert len({(target / name).read_text() for name in ("a", "b", "c")}) == 1
    assert appeared
    for left in tmp_path.glob(".out.*"):  # killed before it had locked its folder: only age tells
        os.utime(left, (0, 0))
    write(target, results.MODEL, "last")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "work"]


DIES_BETWEEN = """
import os, sys
from pathlib import Path
from icrl_megatron.utils import results
results._exchanged = lambda one, other: False
target, real = Path(sys.argv[1]), Path.rename
def rename(path, to):
    real(path, to)
    if Path(to).name == "replaced":
        os._exit(9)
Path.rename = rename
with results.writing(target, results.MODEL) as folder:
    (folder / "a.json").write_text("new")
"""


def test_the_old_result_comes_back_after_a_crash_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, results.MODEL, "old")
    assert python(DIES_BETWEEN, str(target))[0] == 9
    assert not target.exists()
    with suppress(ZeroDivisionError), results.writing(target, results.MODEL):
        raise ZeroDivisionError
    assert (target / "a.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "work"]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A target that a living process is writing."""
    program = REWRITES.replace('for name in ("a", "b", "c"):', "sys.stdin.read()\n        for name in ('a',):")
    process = subprocess.Popen(
        [sys.executable, "-c", program.replace('print("ready", flush=True)', ""), str(tmp_path / "out"), "1", ""],
        stdin=subprocess.PIPE,
    )
    while not list(tmp_path.glob(".out.*/out")):
        assert process.poll() is None
        time.sleep(0.01)
    yield tmp_path / "out"
    process.kill()
    process.communicate()


def test_what_another_process_is_writing_stays(held: Path) -> None:
    (theirs,) = held.parent.glob(".out.*")
    write(held, results.MODEL, "mine")
    assert theirs.is_dir() and (held / "a.json").read_text() == "mine"


def test_many_writers_of_one_target_leave_one_whole_result(tmp_path: Path) -> None:
    program = REWRITES.replace("10**9", "first + 20")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "out"), str(100 * i), ""], stdout=subprocess.PIPE
        )
        for i in range(1, 4)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    for process in started:
        process.communicate()
    assert len({(tmp_path / "out" / name).read_text() for name in ("a", "b", "c")}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "work"]


# Permissions.

WITH_UMASK = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from matplotlib.figure import Figure
from icrl_megatron.utils import results
from icrl_megatron.utils.files import AppendFile, save_picture, write_atomically
os.umask(int(sys.argv[1], 8))
out = Path(sys.argv[2])
with results.writing(out / "model", results.MODEL) as folder:
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    shutil.copytree(sys.argv[3], folder / "copied")
write_atomically(out / "settings.yaml", ["a"])
save_picture(Figure(), out / "curve.png")
AppendFile(out / "logs" / "metrics.jsonl", "x").write(b"a")
"""


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(mask: int, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "tokenizer.json").touch(mode=0o400)
    code, _, err = python(WITH_UMASK, oct(mask), str(tmp_path / "out"), str(private))
    assert code == 0, err
    modes = {str(p.relative_to(tmp_path / "out")): p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert len(modes) == 9
    assert modes == {name: (0o777 if (tmp_path / "out" / name).is_dir() else 0o666) & ~mask for name in modes}


AS_ANOTHER = f"""
import sys
from pathlib import Path
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils import results
{AS_NOBODY}
try:
    results.check(Path(sys.argv[1]), results.MODEL, overwrite=True)
except ConfigError as error:
    print(error)
"""


def test_permissions_are_found_before_any_work(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest's own folders are private
        folder.chmod(0o755)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "shared" / "hers").mkdir(mode=0o755)
    for target in (tmp_path / "out", tmp_path / "out" / "deep", tmp_path / "shared" / "hers"):
        code, out, err = python(AS_ANOTHER, str(target))
        assert (code, err) == (0, "")
        assert out == (
            f"{target}: cannot write the Hugging Face export: permission denied; change the permissions, or choose a "
            "folder that you may write to\n"
        )
    assert python(AS_ANOTHER, str(tmp_path / "shared" / "his"))[:2] == (0, "")
