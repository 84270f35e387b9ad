"""Recipes, overrides, validation and files. Errors must name the setting, its value and a remedy."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.data.sampler import order_seed
from icrl_megatron.distributed.job_size import ranks
from icrl_megatron.run.checks import validate
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.describe import described
from icrl_megatron.settings.limits import Choice, Range
from icrl_megatron.settings.schema import EvalSettings, Settings, TinyModel
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("own_folder")


# --- recipes


def test_each_load_creates_new_settings() -> None:
    S.from_recipe("quickstart").optim.learning_rate = 1.0
    assert S.from_recipe("quickstart").optim.learning_rate != 1.0


def test_unknown_recipe_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'quikstart': did you mean quickstart\?"):
        S.load("quikstart")


# --- overrides


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("steps=7", "steps", 7),
        ("optim.learning_rate=1e-4", "optim.learning_rate", 1e-4),
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("algo.internalise=false", "algo.internalise", False),
        ("max_generated_tokens=1000", "max_generated_tokens", 1000),
        ("tasks.limit=null", "tasks.limit", None),
        ("name=1e3", "name", "1e3"),
        ("run_dir=a=b", "run_dir", "a=b"),
        ('name="quoted"', "name", "quoted"),
        ("run_dir=", "run_dir", ""),
        ("model.init.layers=3", "model.init.layers", 3),
        ("rollout.chat_template_args.enable_thinking=false", "rollout.chat_template_args", {"enable_thinking": False}),
    ],
)
def test_overrides(override: str, name: str, value: object) -> None:
    resolved: object = S.load("quickstart", [override])
    for part in name.split("."):
        resolved = getattr(resolved, part)
    assert resolved == value
    assert type(resolved) is type(value)


def test_overrides_of_list_elements_and_whole_lists() -> None:
    assert S.load("quickstart", ["tasks.sources[1].weight=2.5"]).tasks.sources[1].weight == 2.5
    assert S.load("quickstart", ["tasks.sources.1.weight=2.5"]).tasks.sources[0].weight == 1.0
    whole = S.load("quickstart", ["tasks.sources=[{name: household, weight: 3}]"])
    assert whole.tasks.sources == [TaskSource("household", 3.0)]


def test_arguments_of_another_package_are_nested(tmp_path: Path) -> None:
    """As docs/TASKS.md writes them for verifiers 0.4."""
    name, args = "tasks.sources.0.data", {"taskset": {"game": "Wordle-v0", "n": [1, {"at": "1:30"}]}}
    words = ("tasks.sources.0.name=verifiers", f"{name}.args={{taskset: {{game: W, n: [1, {{at: 1:30}}]}}}}")
    settings = S.load("any_text", [*words, f"{name}.args.taskset.game=Wordle-v0"])
    assert settings.tasks.sources[0].data.args == args  # type: ignore[attr-defined]
    S.save(settings, tmp_path / "settings.yaml")
    assert S.load_saved(tmp_path / "settings.yaml") == settings
    with pytest.raises(ConfigError, match=r"unknown setting 'tasks\.sources\.0\.data\.argz'"):
        S.load("any_text", [words[0], f"{name}.argz={{taskset: {{game: W}}}}"])


def test_null_section_accepts_overrides(tmp_path: Path) -> None:
    assert S.load("qwen3_4b", ["model.init.layers=5"]).model.init == TinyModel(layers=5)


def test_later_overrides_win_and_presets_apply_first() -> None:
    assert S.load("quickstart", ["steps=1", "steps=2"]).steps == 2
    reference = S.load("quickstart", ["algo.preset=reference"])
    assert (reference.algo.preset, reference.algo.pseudo_positive) == ("reference", True)
    changed = S.load("quickstart", ["algo.pseudo_positive=false", "algo.preset=reference"])
    assert (changed.algo.pseudo_positive, changed.algo.group_by) == (False, reference.algo.group_by)
    paper = S.load("quickstart", ["eval.problems=5", "eval.preset=paper", "eval.control_problems=3"]).eval
    assert paper == EvalSettings(preset="paper", interval=10, problems=5, samples=1, rounds=2, control_problems=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.round=3", "unknown setting 'rollout.round': did you mean rollout.rounds?"),
        ("learning_rat=3", "unknown setting 'learning_rat'"),
        ("learning_rate=3", "did you mean optim.learning_rate?"),
        ("optim.lr=3", "did you mean optim.learning_rate? Write optim.learning_rate=3"),
        ("optim.zzz=3", "optim has learning_rate, beta1"),
        ("tasks.sources[0].wight=3", "did you mean tasks.sources.0.weight?"),
        ("tasks.sources=[{nam: x}]", "unknown setting 'tasks.sources.0.nam': did you mean tasks.sources.0.name?"),
        ("tasks.sources.7.weight=3", "there is no such element"),
        ("steps=many", "steps=many: expected an integer"),
        ("steps=1.5", "steps=1.5: expected an integer"),
        ("steps=true", "steps=true: expected an integer"),
        ("steps=", "expected an integer"),
        ("max_generated_tokens=x", "max_generated_tokens=x: expected an integer or null"),
        ("optim.learning_rate=3e", "optim.learning_rate=3e: expected a number"),
        ("algo.internalise=maybe", "algo.internalise=maybe: expected true or false"),
        ("tasks.sources=household", "expected a list, each element with values for name, weight"),
        ("engine.server_args=[{a: b}]", "engine.server_args.0={a: b}: expected text; write"),
        ("engine.server_args=[[a]]", "engine.server_args.0=[a]: expected text; write"),
        ("engine.server_args={a: b}", "engine.server_args={a: b}: expected a list, each element with text"),
        ("rollout.chat_template_args={a: {b: c}}", "rollout.chat_template_args.a={b: c}: expected true or false"),
        ("tasks.sources=[{name: math, data: {train: [{0: 9}]}}]", "tasks.sources.0.data.train.0={0: 9}: expected text"),
        ("tasks=3", "tasks=3: expected values for sources, limit"),
        ("steps", "'steps' is not an override: write name=value"),
        ("name=${seed}", "are not values"),
        ("engine.server_args=[1", "cannot be read"),
        ("algo.preset=best", "best"),
    ],
)
def test_wrong_overrides_are_rejected(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        S.load("quickstart", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(sorted(S.field_types())), st.integers(0, 30), st.sampled_from("abcxyz_"))
def test_misspelled_names_are_rejected_by_name(name: str, at: int, letter: str) -> None:
    wrong = name[:at] + letter + name[at:]
    if wrong in S.field_types() or wrong.startswith("rollout.chat_template_args."):
        return
    with pytest.raises(ConfigError, match="unknown setting") as caught:
        S.load("quickstart", [f"{wrong}=1"])
    assert wrong in str(caught.value)


# --- files


@pytest.mark.parametrize("text", ["steps: [", "- 1\n- 2\n", "stepz: 3\n", "steps: many\n"])
def test_damaged_saved_settings_are_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        S.load_saved(tmp_path / "settings.yaml")
    with pytest.raises(ConfigError, match="absent"):
        S.load_saved(tmp_path / "absent.yaml")


def test_data_seed_overrides_seed_for_the_problem_order() -> None:
    words = ["actor.tensor_parallel=4", "seed=7"]
    assert order_seed(S.load("qwen3_8b_alfworld_4xh100", words)) == 7
    assert order_seed(S.load("qwen3_8b_alfworld_4xh100", [*words, "data.seed=1"])) == 1
    assert order_seed(S.load("qwen3_8b_alfworld_4xh100", [*words, "data.seed=0"])) == 0


def test_the_turn_limit_is_a_function_of_the_step() -> None:
    stages = "rollout.turn_stages=[{until_step: 2, turns: 3}, {until_step: 3, turns: 9}, {until_step: 5, turns: 40}]"
    rollout = S.load("quickstart", [stages, "rollout.max_turns=11"]).rollout
    assert [rollout.turns_at(step) for step in range(7)] == [3, 3, 9, 11, 11, 11, 11]
    assert {S.load("quickstart").rollout.turns_at(step) for step in (0, 99)} == {S.load("quickstart").rollout.max_turns}


UNTIL = "rollout.turn_stages.1.until_step=5: must be more than the 5 of the stage before"
TURNS = "rollout.turn_stages.1.turns=2: must be more than the 3 of the stage before"
PARTIAL = "rollout.partial=true rollout.oversample=1.5 algo.mismatch_correction.enabled=true"
THREE = "tasks.sources.0.name=verifiers tasks.sources.0.data.max_turns=3"


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ("{until_step: 5, turns: 3}, {until_step: 5, turns: 4}", "", UNTIL),
        ("{until_step: 5, turns: 3}, {until_step: 9, turns: 2}", "", TURNS),
        ("{turns: 9}", "rollout.max_turns=9", "rollout.turn_stages.0.turns=9 has no effect with rollout.max_turns=9"),
        ("{turns: 2}", PARTIAL, "rollout.turn_stages with rollout.partial=true"),
        ("{turns: 2}", THREE, "tasks.sources.0.data.max_turns=3 is more than rollout.turn_stages.0.turns=2"),
    ],
)
def test_wrong_turn_stages_are_rejected(stages: str, more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(S.load("quickstart", [f"rollout.turn_stages=[{stages}]", *more.split()]))


def test_run_folder() -> None:
    assert S.run_folder(Settings(name="x")) == Path("runs/x")
    assert S.run_folder(Settings(name="x", run_dir="/y/z")) == Path("/y/z")


# --- validation


TEXTS = {one.name: one.limit for one in described() if isinstance(one.limit, Choice) and one.kind == "str"}
RANGES = {one.name: one.limit for one in described() if isinstance(one.limit, Range)}
OPTIONS = {one.name: one.task_sets for one in described() if one.task_sets}


def given_to(name: str, value: str) -> Settings:
    """Quickstart with one setting. An option of a task set changes the source to such a set; one of an MCP server
    adds a server."""
    task_set = [f"tasks.sources.0.name={OPTIONS[name][0]}"] if name in OPTIONS else []
    server = ["tasks.sources.0.agent.mcp=[{command: [server]}]"] if ".mcp.0." in name else []
    return S.load("quickstart", [*task_set, *server, f"{name}={value}"])


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"algo.preset"}))  # apply_preset rejects it earlier
def test_every_choice_is_checked(name: str) -> None:
    own = {"rollout.templates": "not standard, compact, paper or a folder", "telemetry.dump": "must be all, none, or a"}
    expected = own.get(name, "choose one of")
    with pytest.raises(ConfigError, match=f"{name}=nonsense: {expected}"):
        validate(given_to(name, "nonsense"))


BELOW = [(name, math.floor(limit.low) - 1, "(at least|between)") for name, limit in RANGES.items()]
ABOVE = [(name, math.floor(limit.high) + 1, "between") for name, limit in RANGES.items() if limit.high < math.inf]


@pytest.mark.parametrize(("name", "value", "what"), [*BELOW, *ABOVE])
def test_every_range_is_checked(name: str, value: int, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={value}(\.0)?: must be a finite number, {what} "):
        validate(given_to(name, f"{value}"))


EXTERNAL = "engine.kind=sglang engine.urls=[http://a:1]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optim.learning_rate=nan", "optim.learning_rate=nan: expected a number"),
        ("optim.beta1=1", "optim.beta1=1.0"),
        ("name=a/b", "must be a plain name"),
        ("tasks.sources=[]", "tasks.sources is empty"),
        ("tasks.sources.0.weight=0", "tasks.sources.0.weight=0.0: must be a finite number, at least 1e-06"),
        ("tasks.sources.0.name=household", "named twice"),
        ("tasks.sources.0.name=houshold", "did you mean household?"),
        ("rollout.templates=nowhere", "attempt.jinja, revision.jinja, critique.jinja"),
        ("rollout.episodes_per_task=1 rollout.rounds=1", "rollout.episodes_per_task=1"),
        ("algo.updates_per_step=100000", "algo.updates_per_step=100000"),
        ("actor.tensor_parallel=4", "does not divide the 2 ranks (launch.ranks)"),
        (
            "actor.context_parallel=3 launch.ranks=4",
            "actor.tensor_parallel=2 x actor.pipeline_parallel=1 x actor.context_parallel=3 = 6 does not divide the 4 "
            "ranks (launch.ranks); use launch.ranks=6 or a multiple of it",
        ),
        ("actor.context_parallel=0", "actor.context_parallel=0: must be a finite number, at least 1"),
        ("actor.tensor_parallel=3 launch.ranks=3", "attention heads (4); 1 or 2 would do"),
        ("actor.tensor_parallel=4 launch.ranks=4", "key-value heads (2)"),
        ("model.init.ffn=63", "MLP width (63)"),
        ("model.init.kv_heads=3", "do not divide"),
        ("model.init.head_dim=15", "head_dim 15 is odd"),
        ("actor.pipeline_parallel=3 launch.ranks=6", "does not divide the model's 2 layers"),
        ("actor.sequence_parallel=true actor.tensor_parallel=1", "actor.sequence_parallel=true needs"),
        ("launch.ranks=4096", "2048 replicas"),
        ("engine.tensor_parallel=2", "engine.kind=local has only 1"),
        ("engine.kind=sglang engine.tensor_parallel=3", "engine.tensor_parallel=3 does not divide"),
        ("engine.urls=[http://a:1]", "engine.urls and engine.servers are for servers"),
        ("engine.kind=sglang engine.urls=[a:1]", "'a:1' is not an address"),
        ("engine.kind=sglang engine.urls=[http://a:1,http://b:1,http://c:1]", "names 3 servers for 2 ranks"),
        (f"{EXTERNAL} rollout.critic=frozen", "use another critic"),
        ("engine.kind=sglang engine.servers=2 engine.tensor_parallel=2", "engine.servers=2"),
        (
            "engine.kind=sglang launch.ranks=8 launch.nodes=3 engine.tensor_parallel=8 engine.servers=2",
            "splits 24 ranks into groups of 12, and a node has 8: a group would span two nodes, but a server runs on "
            "one; use engine.servers=3, or leave it out",
        ),
        (
            "engine.kind=sglang launch.ranks=6 launch.nodes=2 engine.tensor_parallel=4",
            "does not divide the 6 ranks of a node",
        ),
        ("engine.kind=sglang engine.server_args=[--host=0.0.0.0]", "engine.server_args has --host, which the run sets"),
        ("engine.kind=sglang engine.server_args=[--api-key,x]", "engine.server_args has --api-key, which the run sets"),
        ("engine.kind=sglang engine.api_key_env=KEY", "engine.api_key_env is for servers of engine.urls"),
        (f"{EXTERNAL} engine.api_key_env=NOT_SET", "empty or not set; export it"),
        (f"{EXTERNAL} engine.api_key_env=sk-a.key", "is not the name of an environment"),
        ("engine.kind=sglang engine.server_args=[--preferred-sampling-params]", "those of the policy"),
        ("engine.sync=delta", "engine.sync=delta: engine.kind=local takes only whole weights; use engine.sync=full"),
        ("engine.kind=sglang engine.sync=delta", "engine.sync=delta is for servers of engine.urls"),
        (
            f"{EXTERNAL} engine.sync=delta engine.quantization=fp8",
            "engine.sync=delta: with engine.quantization=fp8 the server's weights are not those that were sent",
        ),
        ("engine.kind=sglang engine.kv_tokens=300 rollout.context_tokens=301", "engine.kv_tokens=300 holds less than"),
        ("engine.kind=sglang engine.python=/nowhere/python", "engine.python=/nowhere/python: cannot be run"),
        ("engine.quantization=int3", "choose one of '', fp8"),
        ("rollout.critic=external", "rollout.external.url"),
        ("actor.fp8=current", "actor.fp8=current needs a GPU"),
        ("model.init=null", "model.path is empty"),
        ("rollout.context_tokens=5000", "the model has 1024 positions"),
        ("rollout.max_turn_tokens=512", "leaves no room for a prompt"),
        ("rollout.max_critique_tokens=600", "leaves no room for a prompt"),
        ("telemetry.dump=some", "telemetry.dump=some: must be all, none, or a number of episodes of at least 1"),
        ("telemetry.dump=0", "telemetry.dump=0: must be all, none, or a number"),
        ("telemetry.dump=1.5", "telemetry.dump=1.5: must be all, none, or a number"),
        ("telemetry.dump=-1", "telemetry.dump=-1: must be all, none, or a number"),
        ("debug.mode=from_dump", "debug.mode=from_dump needs debug.dump"),
        ("debug.mode=from_dump debug.dump=nothing_here", "no rollouts/rank_"),
        ("debug.dump=x", "needs debug.mode=from_dump"),
    ],
)
def test_wrong_settings_are_rejected(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(S.load("quickstart", overrides.split()))


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_external_servers_may_have_any_number_of_workers(tensor_parallel: int) -> None:
    given = ["engine.kind=sglang", "engine.urls=[http://a:1]", f"engine.tensor_parallel={tensor_parallel}"]
    for ranks_given in ("launch.ranks=2", "launch.ranks=1 actor.tensor_parallel=1"):
        validate(S.load("quickstart", [*given, *ranks_given.split()]))


def test_number_of_ranks_comes_from_world_size_in_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks(S.load("quickstart")) == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks(S.load("quickstart")) == 2  # another program's leftover
    monkeypatch.setenv("RANK", "0")
    assert ranks(S.load("quickstart")) == 3
    with pytest.raises(ConfigError, match="does not divide the 3 ranks \\(WORLD_SIZE\\)"):
        validate(S.load("quickstart"))


@pytest.mark.parametrize("folder", ["/proc/icrl", "afile/run"])
def test_unwritable_run_folder_is_rejected(folder: str, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    with pytest.raises(ConfigError, match=f"run folder {folder} cannot be written"):
        validate(S.load("quickstart", [f"run_dir={folder}"]))


def test_validation_leaves_nothing_behind(tmp_path: Path) -> None:
    validate(S.load("quickstart"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rollout.top_p", "rollout.top_k", "engine.repetition_penalty"])
def test_sampling_other_than_the_policys_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: there is no such sampling here.*rollout.temperature is all"):
        S.load("quickstart", [f"{name}=0.9"])
