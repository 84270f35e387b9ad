"""Result folders replace only unchanged earlier results of the same kind; anything else at the target is kept."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (writes its cache once, before tests change HOME)
import pytest
from disks import small_disk
from result_folders import link, put, tree, write

from icrl_megatron import cli
from icrl_megatron.utils import results
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import save_picture
from icrl_megatron.utils.result_files import begins_with

KINDS = [results.MODEL, results.CHECKPOINT, results.EVALUATION, results.INDEX]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate working directory and HOME for each test."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")


# Allowed and rejected targets.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_result_is_complete_and_replaces_an_earlier_one(kind: results.Kind, tmp_path: Path) -> None:
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


def test_empty_folder_and_result_with_a_deleted_file_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for text in ("one", "two"):
        write(tmp_path / "out", results.MODEL, text)
        assert (tmp_path / "out" / "a.json").read_text() == text
        (tmp_path / "out" / "a.json").unlink()


def _file_for_folder(target: Path) -> None:
    (target / "inner" / "b.txt").unlink()
    link(target / "inner" / "b.txt", "/etc/hostname")


def _marker_changed(target: Path, change: Callable[[str], str]) -> None:
    put(target / results.MARKER, change((target / results.MARKER).read_text()))


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda target: put(target / "notes.md"),
    "added_deep": lambda target: put(target / "inner" / "gguf" / "q4.gguf"),
    "link_added": lambda target: link(target / "link", target.parent),
    "edited": lambda target: put(target / "a.json", "NEW"),  # of the same size
    "end_of_weights": lambda target: put(target / "a.json", "x" * 4_999_999 + "#"),
    "file_for_folder": _file_for_folder,
    "other_kind": lambda target: _marker_changed(target, lambda text: text.replace('"model"', '"evaluation"')),
    "marker_cut": lambda target: _marker_changed(target, lambda text: text[: len(text) // 2]),
    "marker_strange": lambda target: _marker_changed(target, lambda _: '{"kind": "model", "files": ["a.json"]}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_result_is_not_replaced(change: str, tmp_path: Path) -> None:
    target = write(tmp_path / "out", results.MODEL, "x" * 5_000_000 if change == "end_of_weights" else "new")
    CHANGES[change](target)
    before = tree(target)
    with pytest.raises(ConfigError, match=rf"^{target}: .*--overwrite to replace it$"):
        write(target, results.MODEL, "later")
    assert tree(target) == before and sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "work"]
    write(target, results.MODEL, "later", overwrite=True)
    assert (target / "a.json").read_text() == "later" and "notes.md" not in tree(target)


RECORD = '{"format": 2, "files": {"rank.safetensors": {}, "model/config.json": {}}}'
EVAL = '{"successes": {}, "subsets": {}, "scores": [], "generated_tokens": 0}'


@pytest.mark.parametrize(
    ("kind", "files", "known"),
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
def test_unmarked_results_are_replaced_only_if_known(
    kind: results.Kind, files: dict[str, str], known: bool, tmp_path: Path
) -> None:
    """Results of older versions have no marker. An old export cannot be told from any other model folder."""
    for name, text in files.items():
        put(tmp_path / "out" / name, text)
    if known:
        write(tmp_path / "out", kind)
        assert "a.json" in tree(tmp_path / "out")
    else:
        with pytest.raises(ConfigError, match="is not known to be an earlier"):
            write(tmp_path / "out", kind)
        assert tree(tmp_path / "out").keys() >= files.keys() - {"model/config.json"}


def test_target_that_appears_while_writing_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"notes\.md"), results.writing(target, results.MODEL) as folder:
        (folder / "a.json").write_text("new")
        target.mkdir()
        (target / "notes.md").write_text("mine")
    assert tree(target) == {"notes.md": "mine"}


def test_failed_write_leaves_only_the_old_result(tmp_path: Path) -> None:
    write(tmp_path / "out", results.MODEL, "old")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), results.writing(tmp_path / "out", results.MODEL) as folder:
        (folder / "a.json").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == before


# Every command with every target that it must reject.


def _source(tmp_path: Path) -> Path:
    """A folder that `icrl eval`, import and export accept as their source."""
    return put(tmp_path / "models" / "mine" / "config.json", "{}").parent


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "export": lambda source, target: ["export", str(source), str(target)],
    "import": lambda source, target: ["import", str(source), str(target)],
    "eval": lambda source, target: ["eval", str(source), "--task", "rulebook_easy", "--out", str(target)],
}


def _fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "target")
    return tmp_path / "target"


def _the_weights_of_the_source(tmp_path: Path) -> Path:
    """A model in the Hugging Face cache is a folder of links."""
    weights = put(tmp_path / "blobs" / "1234")
    link(tmp_path / "models" / "mine" / "model.safetensors", weights)
    return weights.parent


def _collection(tmp_path: Path) -> Path:
    put(tmp_path / "target" / "other" / "model.safetensors")
    return put(tmp_path / "target" / "notes.md").parent


def _run(tmp_path: Path) -> Path:
    (tmp_path / "target" / "checkpoints" / "step_000002").mkdir(parents=True)
    return put(tmp_path / "target" / "metrics.jsonl", "{}").parent


Makes = dict[str, Callable[[Path], Path]]
NEVER: Makes = {
    "file": lambda path: put(path / "target"),
    "fifo": _fifo,
    "below_a_file": lambda path: put(path / "target") / "out",
    "link_to_folder": lambda path: link(path / "target", path / "home"),
    "link_to_nothing": lambda path: link(path / "target", path / "gone"),
    "link_loop": lambda path: link(path / "target", path / "target"),
    "here": lambda path: Path(),
    "up": lambda path: Path(".."),
    "here_in_other_words": lambda path: path / "home" / ".." / "work",
    "root": lambda path: Path("/"),
    "home": lambda path: path / "home",
    "the_source": lambda path: path / "models" / "mine",
    "above_the_source": lambda path: path / "models",
    "above_the_source_through_a_link": lambda path: link(path / "link", path) / "models",
    "the_weights_of_the_source": _the_weights_of_the_source,
    "inside_a_result": lambda path: write(path / "other", results.MODEL) / "sub" / "out",
    "a_checkpoint": lambda path: put(path / "step_000004" / "icrl.json", RECORD).parent,
    "inside_a_checkpoint": lambda path: put(path / "step_000004" / "icrl.json", RECORD).with_name("out"),
}
WITH_OVERWRITE: Makes = {
    "collection": _collection,
    "run": _run,
    "hidden": lambda path: put(path / "target" / ".git").parent,
    "other_result": lambda path: write(path / "target", results.INDEX),
}
MAKES = NEVER | WITH_OVERWRITE
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail and returns its message: one line, before torch is imported."""
    late = ("icrl_megatron.actor.convert", "icrl_megatron.engines.local")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["icrl", *arguments])
        for name in late:
            monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        err = capsys.readouterr().err
        assert ended.value.code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not any(name in sys.modules for name in late)
        return err

    return run


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("made", NEVER)
@pytest.mark.parametrize("command", COMMANDS)
def test_target_is_always_rejected(command: str, made: str, overwrite: bool, tmp_path: Path, refused: Refused) -> None:
    source, target = _source(tmp_path), NEVER[made](tmp_path)
    before = tree(tmp_path) if made != "fifo" else {}
    assert str(target) in refused(*COMMANDS[command](source, target), *(["--overwrite"] if overwrite else []))
    assert made == "fifo" or tree(tmp_path) == before


@pytest.mark.parametrize("made", WITH_OVERWRITE)
@pytest.mark.parametrize("command", COMMANDS)
def test_target_is_rejected_without_overwrite(command: str, made: str, tmp_path: Path, refused: Refused) -> None:
    source, target = _source(tmp_path), WITH_OVERWRITE[made](tmp_path)
    before = tree(tmp_path)
    message = refused(*COMMANDS[command](source, target))
    assert str(target) in message and "choose another folder" in message and "--overwrite" in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize("made", WITH_OVERWRITE)
def test_overwrite_replaces_the_target(made: str, tmp_path: Path) -> None:
    target = write(WITH_OVERWRITE[made](tmp_path), results.MODEL, overwrite=True)
    assert tree(target).keys() == {".icrl-result", "a.json", "inner", "inner/b.txt"}


def test_import_keeps_other_steps(tmp_path: Path) -> None:
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


def test_mount_point_is_rejected(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(ConfigError, match="a mount point, which cannot be replaced; name a folder inside it"):
            write(disk, results.MODEL)
        write(disk / "out", results.MODEL)


# Single files.

PICTURE = ["plan", "qwen3_8b_alfworld_4xh100", "--picture"]


@pytest.mark.parametrize(
    ("made", "never"), [("file", False), ("link_to_nothing", True), ("collection", True), ("fifo", True)]
)
@pytest.mark.parametrize("command", ["report", "plan"])
def test_page_or_picture_replaces_only_its_own(
    command: str, made: str, never: bool, tmp_path: Path, refused: Refused
) -> None:
    target = MAKES[made](tmp_path)
    before = tree(tmp_path) if made != "fifo" else {}
    arguments = [*PICTURE, str(target)] if command == "plan" else ["report", str(tmp_path), "--out", str(target)]
    said = refused(*arguments)
    assert str(target) in said and ("--overwrite" in said) == (not never)
    if never:
        refused(*arguments, "--overwrite")
    assert made == "fifo" or tree(tmp_path) == before


def test_earlier_pictures_and_pages_are_recognized(tmp_path: Path) -> None:
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
def test_table_of_arms_does_not_replace_other_files(name: str, tmp_path: Path, refused: Refused) -> None:
    put(tmp_path / name, "{}")
    arms = ("ablate", "rulebook_easy", "--arms", "icrl", "--table", "--out")
    assert f"no ablation wrote its {name}" in refused(*arms, str(tmp_path))
    assert "a file, and the runs need a folder" in refused(*arms, str(tmp_path / name))


# Run folders.

TRAIN = ["train", "rulebook_easy", "--dry-run"]


@pytest.mark.parametrize("where", ["hf", "baseline_grpo/hf"])
@pytest.mark.parametrize("made", ["file", "link_to_folder", "link_to_nothing", *WITH_OVERWRITE])
def test_run_checks_its_export_folder_at_the_start(where: str, made: str, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "run"
    (run / where).parent.mkdir(parents=True)
    MAKES[made](tmp_path).rename(run / where)
    before = tree(tmp_path)
    assert str(run / where) in refused(*TRAIN, f"run_dir={run}", "baseline=grpo")
    assert tree(tmp_path) == before


def test_run_resumes_with_its_own_export_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run" / "hf", results.MODEL)
    monkeypatch.setattr(sys, "argv", ["icrl", *TRAIN, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "rollouts", "tensorboard", "report.json", "learning_curve.png", "task_success.jsonl",
             "control_before.json", "control_after.json"]
)  # fmt: skip
def test_run_rejects_a_folder_with_files_of_its_names(name: str, tmp_path: Path, refused: Refused) -> None:
    run = put(tmp_path / "run" / name).parent
    said = refused(*TRAIN, f"run_dir={run}")
    assert f"it holds {name} but no settings.yaml" in said and "choose another run_dir" in said
    assert tree(run) == {name: "mine"}
