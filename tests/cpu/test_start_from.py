"""Runs that start from another run's checkpoint: bit-identical weights, with or without optimizer moments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from begun_run import write_rows
from safetensors.torch import load_file
from whole_runs import Batch, batch, from_model, rows, train

from icrl_megatron.run import start
from icrl_megatron.run.checks import validate
from icrl_megatron.settings import loading as S
from icrl_megatron.utils.errors import ConfigError

WEIGHTS = "model.safetensors"
ACTOR = ("actor/loss", "actor/grad_norm", "actor/entropy", "actor/nll")


@pytest.fixture(scope="module")
def ran(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """A run of three steps from a dump, and runs that start from its second step with the third step's episodes."""
    folder = tmp_path_factory.mktemp("start")
    model = from_model(finished_run)
    rest = ["eval.interval=0", "checkpoint.interval=1", "checkpoint.keep=9", "optim.learning_rate=1e-3"]
    third = folder / "third" / "rollouts"
    third.mkdir(parents=True)
    lines = (finished_run / "rollouts" / "rank_00000.jsonl").read_text().split("\n")
    of_third = [line.replace('"step": 3,', '"step": 1,', 1) for line in lines if '"step": 3,' in line]
    (third / "rank_00000.jsonl").write_text("\n".join([*of_third, ""]))

    def dumped(name: str, of: Path, *more: str) -> list[str]:
        return train(folder / name, *rest, "debug.mode=from_dump", f"debug.dump={of}", *more)

    three = [*model, "steps=3"]
    runs = {p: dumped(f"first_{p}", finished_run, *three, f"actor.precision={p}") for p in ("fp32", "bf16")}
    first = batch(folder, runs)
    assert all(ended.code == 0 for ended in first.values()), first
    imported = batch(folder, {"import": ["import", str(finished_run / "hf"), str(folder / "imported")]})
    second = folder / "first_fp32" / "checkpoints" / "step_000002"
    shutil.copytree(folder / "first_fp32", folder / "gone")  # a run that is deleted later
    gone, live = f"start_from={folder / 'gone'}", f"start_from={finished_run}"
    commands = {}
    for precision in ("fp32", "bf16"):
        given = f"start_from={folder / f'first_{precision}' / 'checkpoints' / 'step_000002'}"
        for name, moments in (("with", "true"), ("without", "false")):
            chosen = [given, f"start_with_moments={moments}", f"actor.precision={precision}"]
            commands[f"{name}_{precision}"] = dumped(f"{name}_{precision}", folder / "third", *chosen, "steps=1")
    plain = train(folder / "plain", *rest, live, "steps=2", "algo.clip_high=0.5", "tasks.sources=[{name: household}]")
    plain += ["rollout.critic=frozen", "algo.kl_coef=0.1", "baseline=grpo", "optim.learning_rate=1e-6"]
    commands |= {
        "zero": dumped("zero", folder / "third", f"start_from={second}", "steps=0", "model.init=null"),
        "from_import": dumped("from_import", folder / "third", f"start_from={folder / 'imported'}", "steps=1"),
        "plain": plain,
        "half": train(folder / "half", *rest, gone, "steps=0", "checkpoint.interval=50"),
    }
    ended = batch(folder, commands)
    shutil.rmtree(folder / "gone")
    own = folder / "half" / "checkpoints"
    shutil.rmtree(own)  # as if it had been killed before its first own checkpoint
    for left in ("metrics.jsonl", "progress.json"):
        (folder / "half" / left).unlink(missing_ok=True)
    half = train(folder / "half", *rest, gone, "steps=1", "checkpoint.interval=50")
    # Without moments, a run equals one from the exported weights: the export of fp32 is exact.
    exported = [f"model.path={folder / 'zero' / 'hf'}", "warm_start.steps=0", "steps=1", "actor.precision=fp32"]
    ended |= batch(folder, {"half_again": half, "fresh": dumped("fresh", folder / "third", *exported)})
    return Batch(folder, imported | ended)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["with", "without"])
def test_training_continues_bit_for_bit_only_with_the_moments(ran: Batch, moments: str, precision: str) -> None:
    first, second = f"first_{precision}", f"{moments}_{precision}"
    ran.succeeded(second)
    there = [row for row in rows(ran.folder / first) if "actor/loss" in row][2]
    here = next(row for row in rows(ran.folder / second) if "actor/loss" in row)
    assert here["step"] == 1 and there["step"] == 3
    assert [here[name] for name in ACTOR] == [there[name] for name in ACTOR]  # measured before the update
    exports = [load_file(ran.folder / run / "hf" / WEIGHTS) for run in (first, second)]
    same = all(torch.equal(tensor, exports[1][name]) for name, tensor in exports[0].items())
    assert same is (moments == "with")
    if moments == "without":
        assert here["actor/ratio_deviation_max"] <= 2e-2  # the first update checks the scoring pass again


def test_start_without_moments_equals_a_fresh_optimizer(ran: Batch) -> None:
    ran.succeeded("fresh")
    exports = [load_file(ran.folder / run / "hf" / WEIGHTS) for run in ("fresh", "without_fp32")]
    assert all(torch.equal(tensor, exports[1][name]) for name, tensor in exports[0].items())


def test_an_imported_checkpoint_can_be_trained_from(ran: Batch, finished_run: Path) -> None:
    ran.succeeded("import")
    ran.succeeded("from_import")
    there, here = (load_file(folder / WEIGHTS) for folder in (finished_run / "hf", ran.folder / "from_import/start/hf"))
    assert there.keys() == here.keys() and all(torch.equal(tensor, here[name]) for name, tensor in there.items())
    assert any("actor/loss" in row for row in rows(ran.folder / "from_import"))


def test_steps_and_tokens_count_from_zero(ran: Batch) -> None:
    ran.succeeded("zero")
    assert [row["step"] for row in rows(ran.folder / "zero")] == [0]
    kept = json.loads((ran.folder / "zero" / "checkpoints" / "step_000000" / "icrl.json").read_text())
    progress = kept.get("progress", kept)
    assert (progress["step"], progress["generated_tokens"], progress["optimizer_steps"]) == (0, 0, 0)


def test_tasks_and_algorithm_may_differ_from_the_first_run(ran: Batch) -> None:
    ran.succeeded("plain")
    assert "without its optimizer moments" in ran.ended["plain"].said
    assert not (ran.folder / "plain" / "warm_start").exists()
    first = next(row for row in rows(ran.folder / "plain") if "actor/loss" in row)
    assert abs(first["actor/kl_reference"]) <= 1e-8  # the reference model is the starting point
    before, baseline = (rows(ran.folder / "plain" / folder)[0] for folder in ("", "baseline_grpo"))
    assert before["heldout/critique_free"] == baseline["heldout/critique_free"]


def test_first_run_may_be_deleted_later(ran: Batch) -> None:
    ran.succeeded("half")
    ran.succeeded("half_again")
    assert max(row["step"] for row in rows(ran.folder / "half")) == 1


# --- rejected before anything starts


def run_with_checkpoint(folder: Path, *overrides: str) -> Path:
    """The parts of a run folder that are read before torch is imported: settings and model configurations."""
    S.save(S.load("rulebook_easy", [f"run_dir={folder}", *overrides]), folder / S.SAVED_NAME)
    for step in (1, 2, 10):
        model = folder / "checkpoints" / f"step_{step:06d}" / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config(2)))
    return folder


def config(layers: int) -> dict[str, object]:
    sizes = {"num_hidden_layers": layers, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"head_dim": 16, "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 1024}
    return {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e4, **sizes, **more}


def test_start_from_accepts_a_run_its_checkpoints_or_one_checkpoint(tmp_path: Path) -> None:
    run = run_with_checkpoint(tmp_path / "a")
    for given in (run, run / "checkpoints", run / "checkpoints" / "step_000010"):
        assert start.source(str(given)) == run / "checkpoints" / "step_000010"
        validate(S.load("rulebook_easy", [f"run_dir={tmp_path / 'b'}", f"start_from={given}"]))
    assert start.source(str(run / "checkpoints" / "step_000002")).name == "step_000002"
    for unusable in ("step_000011.part", "step_000012.damaged"):
        (run / "checkpoints" / unusable / "model").mkdir(parents=True)
        (run / "checkpoints" / unusable / "model" / "config.json").write_text("{}")
        (run / "checkpoints" / unusable / "icrl.json").write_text("{}")
    assert start.source(str(run)).name == "step_000010"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("start_with_moments=true", "start_with_moments=true needs a checkpoint: give start_from"),
        ("start_from=nowhere", "start_from=nowhere: no checkpoint there; give a step_NNNNNN folder"),
        (
            "start_from=other",
            "start_from=other: a Hugging Face folder.* give model.path=other .* icrl import other FOLDER",
        ),
        ("start_from=A run_dir=A", r"start_from \(was '', now 'A'\): .* this run resumes from its own checkpoints"),
        ("start_from=C/checkpoints run_dir=C", "is in the run folder C itself: leave start_from empty"),
        ("start_from=A model.path=other", "another model than model.path=other .* leave model.path empty"),
        (
            "start_from=A start_with_moments=true optim.beta2=0.9",
            "averages with optim.beta2=0.98, and the run has 0.9: set optim.beta2=0.98",
        ),
        ("start_from=A rollout.context_tokens=2000", "the model has 1024 positions"),
        ("start_from=A actor.tensor_parallel=2 launch.ranks=2", "key-value heads"),
    ],
)
def test_contradictions_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_checkpoint(Path("A"))
    run_with_checkpoint(Path("C"))
    Path("C/settings.yaml").unlink()
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps(config(4)))
    with pytest.raises(ConfigError, match=message):
        validate(S.load("rulebook_easy", ["run_dir=B", *overrides.split()]))


def test_model_path_of_the_same_model_is_accepted(tmp_path: Path) -> None:
    run = run_with_checkpoint(tmp_path / "a")
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "config.json").write_text(json.dumps(config(2)))
    paths = [f"run_dir={tmp_path / 'b'}", f"start_from={run}"]
    for model in (tmp_path / "same", tmp_path / "not_there"):
        validate(S.load("rulebook_easy", [*paths, f"model.path={model}"]))


def test_rows_that_the_first_run_trained_on_cannot_be_held_out(tmp_path: Path) -> None:
    rows_of = {name: write_rows(tmp_path / f"{name}.jsonl", at) for name, at in (("a", 0), ("b", 10), ("c", 20))}

    def sources(trained: str, held: str) -> str:
        data = f"{{train: [{rows_of[trained]}], heldout: [{rows_of[held]}]}}"
        return f"tasks.sources=[{{name: math, data: {data}}}]"

    steps = ["rollout.tasks_per_step=2"]
    run = run_with_checkpoint(tmp_path / "run", sources("a", "b"), *steps)
    given = [f"run_dir={tmp_path / 'next'}", f"start_from={run}", *steps]
    validate(S.load("rulebook_easy", [*given, sources("c", "b")]))
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: this held-out problem is a training problem too"):
        validate(S.load("rulebook_easy", [*given, sources("c", "a")]))
