"""Every recipe is resolved, saved and loaded, validated, planned, and listed with its plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from model_folders import with_model

from icrl_megatron import cli
from icrl_megatron.engines import sglang_kind
from icrl_megatron.launch import servers
from icrl_megatron.plan import hardware, planner
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.supervised import supervised
from icrl_megatron.run import checks as validate
from icrl_megatron.run.conversation_checks import DATA_RECIPE
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import EngineSettings, Settings, WarmStart
from icrl_megatron.settings.task_options import ALFWorldSource, DataSource, ServedSource
from icrl_megatron.settings.task_schema import TaskSettings, TaskSource
from icrl_megatron.tasks import registry as task_sets
from icrl_megatron.tasks.datasets import id_range
from icrl_megatron.utils.errors import ConfigError
from icrl_recipes import registry

EMBEDDED = task_sets.names()
RECIPES = tuple(registry())
AGENTS = tuple(name for name in RECIPES if name.startswith("coa_"))
OF_TASKS = tuple(name for name in RECIPES if name != DATA_RECIPE)
"""All but the recipe that needs files of conversations and a model: test_sft_files.py runs it."""
ON_GPUS = tuple(name for name in RECIPES if registry()[name]().launch.device == "cuda")


def user_supplied(settings: Settings) -> list[str]:
    """What the user of the recipe provides: datasets of its tasks, and SGLang."""
    found = [f"data of {s.name}" for s in settings.tasks.sources if isinstance(s, DataSource) and lacks_data(s)]
    found += ["trajectories"] if settings.warm_start.data else []
    return found + (["SGLang"] if settings.engine.kind == "sglang" else [])


def lacks_data(source: DataSource) -> bool:
    """Whether it names nothing to train on, or files that are not here: those that `icrl data` writes."""
    entries = [*source.data.train, *source.data.heldout]
    return not source.data.train or any(id_range(one) is None and not Path(one).exists() for one in entries)


def without_supplied(settings: Settings) -> Settings:
    """The settings with an embedded task and the local engine instead of what the user provides."""
    missing, changed = user_supplied(settings), settings
    if any(what.startswith("data of") for what in missing):
        changed = replace(changed, tasks=TaskSettings(sources=[TaskSource("household")]))
    if "trajectories" in missing:
        changed = replace(changed, warm_start=WarmStart())
    return replace(changed, engine=EngineSettings()) if "SGLang" in missing else changed


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves_and_can_be_saved(name: str, tmp_path: Path) -> None:
    settings = settings_module.load(name, ["rollout.chat_template_args.enable_thinking=false", "optim.eps=1e-12"])
    assert settings.name == name
    settings_module.save(settings, tmp_path / "deep" / "settings.yaml")
    saved = settings_module.load_saved(tmp_path / "deep" / "settings.yaml")
    assert saved == settings and settings_module.changed(settings, saved) == {}
    assert (registry()[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", OF_TASKS)
def test_recipe_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = settings_module.load(name)
    if settings.model.path:
        settings = with_model(settings, tmp_path / "model")
    validate.validate(without_supplied(settings))
    if user_supplied(settings):
        monkeypatch.setattr(sglang_kind, "installed_version", lambda python: None)  # it is in the image
        supplied = r"SGLang|tasks\.sources|data\.(servers|train|corpus)|agent\.endpoint|icrl data"
        with pytest.raises(ConfigError, match=supplied):
            validate.validate(settings)
    else:
        validate.validate(settings)


@pytest.mark.parametrize("name", OF_TASKS)
def test_recipe_fits_its_gpus(name: str) -> None:
    made = planner.plan(settings_module.load(name))
    planner.require_fit(made, settings_module.load(name))
    assert made.times.total > 0


@pytest.mark.parametrize("name", ON_GPUS)
def test_docstring_states_the_number_of_gpus(name: str) -> None:
    assert f" {planner.ranks(settings_module.load(name))} H100" in (registry()[name].__doc__ or "")


def test_listing_has_each_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    cli.recipes()
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert tuple(listed) == RECIPES
    for name in RECIPES:
        planned = f" {planner.one_line(planner.plan(settings_module.load(name)))}" if name in ON_GPUS else ""
        assert listed[name].strip() == " ".join((registry()[name].__doc__ or "").split()) + planned


def test_name_states_the_number_of_gpus() -> None:
    for name in ON_GPUS:
        settings = settings_module.load(name)
        if "xh100" in name:
            assert f"_{planner.ranks(settings)}xh100" in name
        if "nodes" in name:
            assert f"_{settings.launch.nodes}nodes" in name
            assert settings.launch.ranks == 8


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in AGENTS])
def test_agentgym_recipes_start_their_servers(name: str) -> None:
    for source in settings_module.load(name).tasks.sources:
        served = isinstance(source, ServedSource) and source.served
        assert served == (source.name in ("alfworld", "webshop", "searchqa"))
        if isinstance(source, ServedSource) and served:
            assert f"{source.name} --host {{host}} --port {{port}}" in source.serve.command
        if isinstance(source, ALFWorldSource):
            assert (source.data.train, source.data.heldout, source.serve.count) == (["0:2420"], ["2420:2620"], 32)


def test_ranks_of_all_nodes_are_counted() -> None:
    assert validate.ranks(settings_module.load("qwen3_32b_4nodes")) == 32


@pytest.mark.parametrize("name", ON_GPUS)
def test_recipes_of_the_paper_have_its_prompts_and_limit_a_turn_only_by_the_context(name: str) -> None:
    rollout = settings_module.load(name).rollout
    embedded = name in ("qwen3_4b", "qwen3_8b")  # first runs with the local engine, not the paper's
    limit = 2048 if embedded else rollout.max_turn_tokens if name in AGENTS else None
    assert (rollout.max_turn_tokens, rollout.parse_truncated) == (limit, limit is None)
    assert rollout.longest_turn() == (limit or rollout.context_tokens)
    assert rollout.templates == ("standard" if embedded or name in AGENTS else "paper")


@pytest.mark.parametrize("name", AGENTS)
def test_chain_of_agents_recipes_have_the_published_sizes_and_losses(name: str) -> None:
    settings = settings_module.load(name)
    rollout, algo, (source,) = settings.rollout, settings.algo, settings.tasks.sources
    task = next(task for task in ("web", "code", "multihop") if f"_{task}_" in name)
    sizes = (rollout.tasks_per_step, rollout.context_tokens // 1024, rollout.max_turns)
    assert sizes == {"web": (64, 2 + 30, 25), "code": (256, 4 + 16, 8), "multihop": (512, 2 + 8, 8)}[task]
    assert (rollout.episodes_per_task, rollout.rounds) == (8, 1)
    assert (algo.clip_low, algo.clip_high, algo.dual_clip, algo.kl_coef) == (0.2, 0.28, 10, 0)
    assert algo.dynamic_sampling and algo.overlong.max_tokens is not None
    assert source.agent.tools == {"web": ["search", "page"], "code": ["python"], "multihop": []}[task]
    assert source.served == (task != "code")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("coa_qwen2_5_7b_web_8xh100", (1.4e-5, 4, 32768, 128)),
        ("coa_qwen2_5_32b_web_4nodes", (1.4e-5, 4, 32768, 128)),
        ("coa_qwen2_5_7b_code_8xh100", (3e-5, 2, 32768, 32)),
        ("coa_qwen2_5_32b_code_4nodes", (1.4e-5, 2, 32768, 64)),
        ("coa_qwen2_5_3b_multihop_8xh100", (1e-5, 4, 5120, 128)),
        ("coa_qwen2_5_7b_multihop_8xh100", (2e-5, 4, 5120, 32)),
    ],
)
def test_chain_of_agents_is_supervised_as_published(name: str, published: tuple[float, int, int, int]) -> None:
    warm = settings_module.load(name).warm_start
    assert (warm.learning_rate, warm.epochs, warm.max_tokens, warm.episodes_per_step) == published
    assert (warm.schedule, warm.final_factor, warm.weight_decay, warm.too_long) == ("linear", 0, 0, "cut")


@pytest.mark.parametrize("name", AGENTS)
def test_chain_of_agents_is_supervised_before_rl_unless_told_otherwise(name: str, tmp_path: Path) -> None:
    settings = settings_module.load(name)
    stage = supervised(settings, shape_of(settings), planner.plan(settings).layout, hardware.GPUS["h100"])
    assert stage is not None and stage.peak < stage.available and stage.seconds > 1
    without = settings_module.load(name, ["warm_start.epochs=null"])
    assert not without.warm_start.wanted
    assert supervised(without, shape_of(settings), planner.plan(settings).layout, hardware.GPUS["h100"]) is None


def test_chain_of_agents_says_which_trajectories_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sglang_kind, "installed_version", lambda python: "0.5.23")
    settings = with_model(settings_module.load("coa_qwen3_8b_code_8xh100"), tmp_path / "model")
    settings = replace(settings, tasks=TaskSettings(sources=[TaskSource("household")]))
    with pytest.raises(ConfigError, match=r"^warm_start\.data: sft\.jsonl: no such file"):
        validate.validate(settings)
    validate.validate(replace(settings, warm_start=replace(settings.warm_start, epochs=None)))


def test_chain_of_agents_recipes_cover_each_task_and_model() -> None:
    paths = {Path(settings_module.load(name).model.path).name for name in AGENTS}
    assert paths == {"Qwen2.5-3B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-32B-Instruct", "Qwen3-8B"}
    assert len(AGENTS) == 3 * len(paths)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("web", r"agent\.judge=model needs agent\.endpoint\.url"),
        ("code", r"task set 'math' has no train rows: .* 'tasks\.sources\.0\.data\.train=\[FILE\]'"),
        ("multihop", r"task set 'searchqa' has no train rows: .* 'tasks\.sources\.0\.data\.train=\[FILE\]'"),
    ],
)
def test_chain_of_agents_recipes_name_what_is_missing(
    task: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sglang_kind, "installed_version", lambda python: "0.5.23")
    settings = settings_module.load(f"coa_qwen3_8b_{task}_8xh100", [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=message):
        validate.validate(with_model(settings, tmp_path / "model"))


@pytest.mark.parametrize("task", ["web", "code", "multihop"])
def test_chain_of_agents_environments_allow_the_configured_turns(task: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "What is 3 + 4?", "label": "7"}))
    judge = ["tasks.sources.0.agent.judge=exact"] if task == "web" else []
    rows = f"tasks.sources.0.data.train=[{tmp_path / 'rows.jsonl'}]"
    settings = settings_module.load(f"coa_qwen3_8b_{task}_8xh100", [rows, *judge])
    # The address of the server that the run would start; this test sends no searches.
    (source,) = servers.with_servers(settings, {"searchqa": ["http://127.0.0.1:1"]}).tasks.sources
    task_set = task_sets.of_source(source)
    environment = task_set.environment(task_set.problems("train")[0])
    assert environment.max_turns >= settings.rollout.max_turns
