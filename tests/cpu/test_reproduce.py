"""`icrl reproduce`: its table of cells, the list, the commands and jobs of cells, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from model_folders import with_model
from paper_cells import write_data
from typer.main import get_command
from typer.testing import CliRunner

from icrl_megatron import cli
from icrl_megatron.engines import sglang_kind
from icrl_megatron.evaluation import cell_values, cell_views, reproduce, reproduce_slurm
from icrl_megatron.evaluation.cell_values import Results, described
from icrl_megatron.evaluation.reproduce import CellPhase, Reproduction, chosen, differing, parse
from icrl_megatron.launch.slurm_queue import Queue
from icrl_megatron.plan import planner
from icrl_megatron.settings import loading
from icrl_megatron.settings.arms import ARMS
from icrl_megatron.tasks.published import SETS
from icrl_megatron.utils.errors import ConfigError
from icrl_recipes import registry
from icrl_recipes.cells import CELLS, Critic, Evaluation, Figure

ROOT = Path(__file__).resolve().parents[2]
RECIPES = tuple(dict.fromkeys(recipe for cell in CELLS.values() for recipe in cell.recipes))


def asked(out: Path, *words: str, seeds: str = "0", critic: str = "") -> Reproduction:
    return parse(words, seeds, out, critic)


def score(subset: str, success: Sequence[float], tokens: float = 0.0, lost: int = 0) -> dict[str, object]:
    """Of an evaluation, as eval.json has it; `success` by round."""
    return {
        "subset": subset,
        "rounds": [{"mean": one, "problems": 10} for one in success],
        "transitions": {"wrong_to_right": 3, "stayed_wrong": 1, "right_to_wrong": 0, "stayed_right": 0},
        "critique_tokens": tokens,
        "dropped": lost,
    }


def finish(phase: CellPhase, *scores: dict[str, object], overrides: Sequence[str] = ()) -> None:
    """Writes what a finished phase leaves that this command reads."""
    phase.folder.mkdir(parents=True, exist_ok=True)
    if phase.evaluation is not None:
        (phase.folder / "eval.json").write_text(json.dumps({"scores": scores}))
        return
    loading.save(loading.load(phase.recipe, [*phase.words[2:], *overrides]), phase.folder / "settings.yaml")
    (phase.folder / "report.json").write_text("{}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the data and models that the recipes name; models have weights that are zero."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    (folder / "models").mkdir()
    for recipe in ("qwen3_4b_alfworld_2xh100", "qwen3_4b_instruct_2507_alfworld_2xh100", "qwen3_8b_alfworld_4xh100"):
        settings = loading.load(recipe)
        with_model(settings, folder / settings.model.path)
    return folder


def test_every_run_of_the_paper_has_cells() -> None:
    of_the_paper = re.compile(
        r"(qwen3|grpo|critique_grpo)_(4b|4b_instruct_2507|8b)_(alfworld|webshop|searchqa|math)_\dxh100"
    )
    arms = ("ablation_", "gspo_", "scaling_inter_", "reference_preset")
    assert set(RECIPES) == {n for n in registry() if of_the_paper.fullmatch(n) or n.startswith(arms)}
    assert {cell.method for cell in CELLS.values()} == set(ARMS)
    for cell in CELLS.values():  # a mean has parts of one kind
        assert len({reading.figure for reading in cell.readings}) == 1
        assert all(set(r.evaluation.on) <= set(SETS) for r in cell.readings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_cell_resolves_is_valid_and_fits(recipe: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each run that cells need, with the recipe's own settings and models, and data where its recipe names it."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sglang_kind, "installed_version", lambda python: "0.5.23")  # it is in the image
    cells = tuple(cell for cell in CELLS.values() if cell.recipes == (recipe,))
    few = ("tasks.sources.0.data.train=[51713:51813]",) if "searchqa" in recipe else ()  # of 169,615 ids: a second each
    (settings,) = reproduce.check(Reproduction(cells, (0,), place / "out", few, "http://critic:30000/v1"))
    planner.require_fit(planner.plan(settings), settings)


def test_cells_share_runs_and_evaluations(tmp_path: Path) -> None:
    one = asked(tmp_path, "agentic-icrl-8b-alfworld", "rounds-icrl-8b-alfworld-*", "critic-itself-8b-alfworld-*")
    assert len(one.cells) == 6
    name = "qwen3_8b_alfworld_4xh100_0"
    assert [phase.name for phase in one.phases()] == [name, f"{name}_rounds3"]
    every = Reproduction(tuple(CELLS.values()), (0, 1), tmp_path, critic="http://critic:30000/v1")
    assert len(every.runs()) == 2 * len(RECIPES)
    names = [phase.name for phase in every.phases()]
    assert len(set(names)) == len(names) == len({phase.folder for phase in every.phases()})


def test_phases_are_commands_of_a_run_and_its_evaluations(tmp_path: Path) -> None:
    run = tmp_path / "qwen3_8b_math_4xh100_3"
    train, first, second = asked(tmp_path, "math-icrl-8b-average", "model.path=/m", seeds="3").phases()
    assert train.words == ("train", "qwen3_8b_math_4xh100", "model.path=/m", f"run_dir={run}", "seed=3")
    assert first.words[:4] == ("eval", str(run), "--rounds=3", "--samples=1")
    assert first.words[4:7] == ("--on=math500", "--on=minerva", "--on=olympiadbench")
    assert second.words[3:6] == ("--samples=32", "--on=aime24", "--on=amc23")
    assert second.words[-1] == "model.path=/m" and f"--out={second.folder}" in second.words
    critics = asked(tmp_path, "critic-*-8b-webshop-tokens", critic="http://c:1/v1").phases()[1:]
    assert [[w for w in p.words if w.startswith("--critic")] for p in critics] == [
        [], ["--critic=models/Qwen3-8B"], ["--critic=http://c:1/v1"]
    ]  # fmt: skip


def test_our_number_is_the_mean_over_parts_and_seeds(tmp_path: Path) -> None:
    some = asked(tmp_path, "agentic-grpo-8b-average", seeds="0,1")
    (cell,) = some.cells
    assert Results(tmp_path).of(cell) == cell_values.Ours({}, begun=False)
    for phase in some.phases():
        by_task = {"alfworld": 0.5, "webshop": 0.6, "searchqa": 0.7}
        mean = next(value for task, value in by_task.items() if task in phase.recipe) + 0.1 * phase.seed
        if phase.seed == 0 or phase.evaluation is None or "searchqa" not in phase.recipe:
            finish(phase, score("part", [0.0]), score("all", [mean], lost=1))
    found = Results(tmp_path).of(cell)
    assert found.by_seed == {0: pytest.approx(60.0)} and (found.lost, found.changed) == (3, ())
    finish(some.phases()[-1], score("all", [0.8]))
    assert Results(tmp_path).of(cell).value == pytest.approx(65.0)


def test_numbers_of_an_evaluation(tmp_path: Path) -> None:
    some = asked(tmp_path, "rounds-icrl-8b-alfworld-*", "critic-itself-8b-alfworld-tokens", "agentic-icrl-8b-alfworld")
    train, evaluation = some.phases()
    finish(train, overrides=["steps=3", "engine.memory_fraction=0.5"])
    (seconds,) = (cell for cell in some.cells if cell.figure is Figure.SECOND)
    assert Results(tmp_path).of(seconds) == cell_values.Ours({}, begun=True)
    finish(evaluation, score("alfworld", [0.25, 0.5, 0.75], tokens=57.5))
    values = {cell.figure: Results(tmp_path).of(cell).value for cell in some.cells}
    assert values == {
        Figure.SUCCESS: 25.0, Figure.SECOND: 50.0, Figure.THIRD: 75.0, Figure.RESCUED: 75.0, Figure.TOKENS: 57.5
    }  # fmt: skip
    assert Results(tmp_path).of(seconds).changed == ("steps=3",)
    finish(evaluation, score("alfworld", [1.0, 1.0, 1.0]))
    (tokens,) = (cell for cell in some.cells if cell.figure is Figure.TOKENS)
    assert Results(tmp_path).of(tokens).value is None  # no critique was written
    (evaluation.folder / "eval.json").write_text('{"scores": [{"subset": "alfworld"}]}')
    with pytest.raises(ConfigError, match=r"eval\.json: not the result of an `icrl eval`.*move its folder away"):
        Results(tmp_path).of(seconds)


def test_a_subset_is_read_by_its_name(tmp_path: Path) -> None:
    some = asked(tmp_path, "agentic-grpo-4b-searchqa*", "math-grpo-8b-minerva")
    for phase in some.phases():
        names = ("math/math500", "math/minerva") if "math" in phase.recipe else ("searchqa/searchqa_test_musique",)
        finish(phase, *(score(name, [0.1 * i]) for i, name in enumerate(names, start=1)), score("all", [0.9]))
    values = {cell.name.split("-", 3)[3]: Results(tmp_path).of(cell).value for cell in some.cells}
    absent = dict.fromkeys(("searchqa-hotpotqa", "searchqa-2wiki", "searchqa-bamboogle"))
    assert values == {"searchqa": 90.0, "searchqa-musique": 10.0, "minerva": 20.0, **absent}


def test_data_has_its_checksum_or_how_to_get_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, test = described("qwen3_8b_webshop_4xh100").data
    assert train.entry == "data/webshop_train.jsonl"
    assert train.state.startswith("missing: `hf download AgentGym/") and "`icrl data webshop_test`" in test.state
    monkeypatch.chdir(place)
    run = described("qwen3_8b_searchqa_8xh100")
    ids, file = run.data
    assert ids.entry == "51713:221328" and "task ids" in ids.state
    assert re.fullmatch(r"sha256 [0-9a-f]{64}", file.state)
    assert run.gpus == 8 and 0 < run.peak_gib < 80 and run.gpu_hours > 1


def test_the_list_has_each_cell_and_its_needs(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(place)
    cells = chosen(["critic-*", "ablation-icrl-8b-all", "rounds-icrl-8b-math-third"])
    train, evaluation = asked(tmp_path, "critic-itself-8b-webshop-tokens").phases()
    finish(train)
    finish(evaluation, score("webshop", [0.1, 0.2, 0.3], tokens=80))
    listed = {one["cell"]: one for one in json.loads(cell_views.as_json(cells, [0], tmp_path))}
    assert list(listed) == [cell.name for cell in cells]
    tokens = listed["critic-itself-8b-webshop-tokens"]
    assert (tokens["published"], tokens["ours"], tokens["seeds"]) == (94, 80, [0])
    assert "2605.15224" in tokens["source"] and [run["gpus"] for run in tokens["runs"]] == [4]
    other = listed["critic-start-8b-webshop-tokens"]
    assert (other["published"], other["source"], other["ours"]) == (None, "not stated in our sources", "not run")
    whole = listed["ablation-icrl-8b-all"]
    assert len(whole["runs"]) == 4 and "paper's weights" in whole["note"] and len(whole["evaluations"]) == 3


def test_the_list_is_printed_in_80_columns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--list", "agentic-critique_grpo-4b_instruct_2507-*", "rounds-icrl-8b-alfworld-third"]
    done = CliRunner().invoke(cli.app, ["reproduce", *words])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80 and "…" not in done.output
    for cell in chosen(words[1:]):
        assert re.search(rf"^ ?{re.escape(cell.name)} ", done.output, re.MULTILINE), cell.name
    assert re.search(r"rounds-icrl-8b-alfworld-third +\d +98 +not run", done.output)
    assert "the size of the model behind this number is not stated" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agentic-icrl-8b-alfwrld"], r"no such cell; did you mean agentic-icrl-8b-alfworld"),
        (["nothing-*"], r"no such cell; .*`icrl reproduce --list` lists all"),
        ([], r"no cell is named: give some, e\.g\. agentic-icrl-8b-alfworld, or --list"),
        (["--json"], r"--json prints the list: give --list too"),
        (["math-icrl-8b-amc23", "--on", "cloud"], r"--on=cloud: choose local or slurm"),
        (["math-icrl-8b-amc23", "--seeds", "a"], r"--seeds=a: write whole numbers"),
        (["math-icrl-8b-amc23", "--seeds", "-1"], r"--seeds=-1: seeds are not negative"),
        (["math-icrl-8b-amc23", "run_dir=x"], r"run_dir: `icrl reproduce` sets it for each run"),
        (["math-icrl-8b-amc23", "step=1"], r"unknown setting"),
        (["critic-external-8b-webshop-tokens", "--critic", "gpt"], r"--critic=gpt: not an address"),
        (["critic-external-8b-webshop-tokens"], r"needs an external critic: serve a model of 20B to 32B"),
        (["math-icrl-8b-amc23", "--out", "data/aime24.jsonl"], r"--out=data/aime24\.jsonl: a file"),
        (["math-icrl-8b-amc23", "tasks.sources.0.data.train=[data/x.jsonl]"], r"data/x\.jsonl"),
        (["math-icrl-8b-amc23", "actor.tensor_parallel=3"], r"does not divide"),
    ],
)
def test_mistakes_are_refused_at_once(
    words: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sglang_kind, "installed_version", lambda python: "0.5.23")
    before = sorted(place.rglob("*"))
    done = CliRunner().invoke(cli.app, ["reproduce", *words])
    assert isinstance(done.exception, ConfigError), done.output  # `main` ends with code 2
    assert re.search(message, str(done.exception)), done.exception
    assert sorted(place.rglob("*")) == before


def test_missing_data_and_models_are_named_with_their_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"`icrl data webshop_train` writes it"):
        reproduce.check(asked(tmp_path / "out", "agentic-grpo-8b-webshop"))
    with pytest.raises(ConfigError, match=r"models/Qwen3-8B"):
        local = ("engine.kind=local", "engine.tensor_parallel=1", "actor.offload=none")
        reproduce.check(asked(tmp_path / "out", "agentic-grpo-8b-alfworld", *local))


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    cell = "agentic-grpo-8b-alfworld"
    train, evaluation = asked(tmp_path, cell, "steps=3").phases()
    finish(train)
    finish(evaluation, score("alfworld", [0.5]))
    reproduce.check(asked(tmp_path, cell, "steps=3", "engine.memory_fraction=0.5"))
    with pytest.raises(ConfigError, match=r"finished run with steps=3, and now steps is 300; give steps=3"):
        reproduce.check(asked(tmp_path, cell))
    assert reproduce.run(asked(tmp_path, cell, "steps=3")) == 0  # nothing is left to do


def test_settings_of_the_machine_do_not_change_a_result() -> None:
    recipe = "qwen3_8b_webshop_4xh100"
    here = loading.load(recipe, ["launch.ranks=8", "tasks.sources.0.serve.count=2", "checkpoint.interval=7"])
    assert differing(loading.load(recipe), here) == {}
    other = loading.load(recipe, ["rollout.temperature=0.5", "seed=3"])
    assert differing(loading.load(recipe), other) == {"rollout.temperature": (1.0, 0.5)}


def test_jobs_are_runs_and_evaluations_that_wait_for_them(tmp_path: Path) -> None:
    some = asked(tmp_path, "math-icrl-8b-average", "agentic-icrl-8b-alfworld", "model.path=/m")
    jobs = reproduce_slurm.jobs(some, Queue("A", "P", "04:00:00"))
    train, first, second, other, last = jobs
    assert train.after == () and first.after == second.after == (train.name,) and last.after == (other.name,)
    asked_of_slurm = {"--account=A", "--partition=P", "--time=04:00:00", "--nodes=1", "--gpus-per-node=4"}
    assert all(asked_of_slurm <= set(job.command) and not job.any_end for job in jobs)
    assert "--export=ALL,RECIPE=qwen3_8b_math_4xh100" in train.command
    run = tmp_path / "qwen3_8b_math_4xh100_0"
    assert train.command[-4:] == ("slurm/icrl_8b.sbatch", "model.path=/m", f"run_dir={run}", "seed=0")
    at = first.command.index("slurm/eval.sbatch")
    assert first.command[at + 1 :] == some.phases()[1].words[1:]
    assert len({word for job in jobs for word in job.command if word.startswith("--job-name=")}) == 1
    finish(some.phases()[0])
    finish(some.phases()[1], score("math/math500", [1.0]))
    left = reproduce_slurm.jobs(some, Queue())
    assert [job.name for job in left] == [second.name, other.name, last.name] and left[0].after == ()


def test_submitting_needs_slurm_and_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = asked(tmp_path, "math-icrl-8b-average")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here"):
        reproduce_slurm.submit(some, Queue())
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no slurm/icrl_8b\.sbatch here"):
        reproduce_slurm.submit(some, Queue())
    for script in (reproduce_slurm.TRAIN, reproduce_slurm.EVALUATE):
        assert (ROOT / script).is_file()


def test_an_evaluation_is_named_by_what_makes_it() -> None:
    assert Evaluation().name == "rounds1"
    assert Evaluation(3, 32, ("aime24", "amc23"), Critic.START).name == "rounds3_aime24_amc23_samples32_critic_start"


def test_the_commands_and_counts_of_the_guide_are_right() -> None:
    page = (ROOT / "docs" / "REPRODUCE.md").read_text()
    commands = re.findall(r"^icrl reproduce .+$", page, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command, comments=True)[2:]
        given = get_command(cli.app).commands["reproduce"].make_context("reproduce", words).params  # type: ignore[attr-defined]
        assert given["on"] in ("local", "slurm")
        assert chosen([word for word in given["words"] or ["*"] if "=" not in word])
    assert f"has {len(CELLS)} of them, which need {len(RECIPES)} training runs" in " ".join(page.split())
