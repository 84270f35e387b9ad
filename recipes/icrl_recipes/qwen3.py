"""The recipes for H100s as a table: ICRL's runs and baselines (arXiv 2605.15224), larger runs, ablations, and RL with
tools as in Chain-of-Agents (arXiv 2508.13167).

Each row is `icrl(...)`, with the hyper-parameters of ICRL's published training code, and changes. The model is a folder
in Hugging Face's layout: models/Qwen3-8B under the working directory, or `model.path=/elsewhere/Qwen3-8B`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

from icrl_megatron.settings.arms import ARMS
from icrl_megatron.settings.loading import apply_overrides
from icrl_megatron.settings.schema import (
    ActorSettings,
    CheckpointSettings,
    EngineSettings,
    LaunchSettings,
    ModelSettings,
    OptimSettings,
    RolloutSettings,
    Settings,
)
from icrl_megatron.settings.task_options import ServedSource, ToolsSource, source_of
from icrl_megatron.settings.task_schema import TaskSettings, TaskSource
from icrl_megatron.settings.task_sections import TaskServers
from icrl_megatron.tasks.published import MATH_TESTS, entry

NODE = 8

AGENTGYM = "conda run --no-capture-output -n agentenv-{name} {name} --host {{host}} --port {{port}}"
"""How AgentGym's own README starts a server, in the environment that it has one make."""

SERVERS = {"alfworld": 32, "webshop": 1, "searchqa": 1}
"""Processes of each: ALFWorld's serialises its games."""
REQUEST_S, STEP_S = 60.0, 250.0
"""Limits of a request to them, which share a machine with many episodes, and of a step, which may send one 4 times."""


PAPER_TASKS = ("alfworld", "webshop", "searchqa", "math")


def source(task: str) -> TaskSource:
    """A task of the paper, with its data: ranges of task ids, or the files that `icrl data` writes (docs/REPRODUCE.md).
    AgentGym's servers start with the run."""
    made = source_of(task)
    if isinstance(made, ServedSource) and task in SERVERS:
        made.data.request_timeout_s = REQUEST_S
        made.serve = TaskServers(AGENTGYM.format(name=task), count=SERVERS[task])
        made.data.train, made.data.heldout = [entry(f"{task}_train")], [entry(f"{task}_test")]
    if isinstance(made, ToolsSource) and task == "math":
        made.data.train, made.data.heldout = [entry("openr1_math_4k")], [entry(name) for name in MATH_TESTS]
        made.data.duplicates = "drop"  # published sets may repeat a problem, which would end the run
    return made


def icrl(name: str, size: str, task: str, gpus: int) -> Settings:
    """The paper's run of one model size ("4B", "8B", ...) on one task, on one node or whole nodes of H100s."""
    nodes = -(-gpus // NODE)
    return Settings(
        name=name,
        steps=300,
        model=ModelSettings(path=f"models/Qwen3-{size}"),
        tasks=TaskSettings(sources=[source(task)]),
        rollout=RolloutSettings(
            tasks_per_step=16,
            episodes_per_task=8,
            rounds=2,
            temperature=1.0,
            max_turn_tokens=None,
            parse_truncated=True,
            max_critique_tokens=1024,
            max_turns=30,
            context_tokens=16384,
            templates="paper" if task in PAPER_TASKS else "standard",
            environment_timeout_s=STEP_S if task in SERVERS else RolloutSettings.environment_timeout_s,
        ),
        engine=EngineSettings(kind="sglang", tensor_parallel=2),
        actor=ActorSettings(
            tensor_parallel=2,
            sequence_parallel=True,
            recompute="full",
            offload="all",  # the engine takes 0.7 of a GPU; the actor's whole state does not fit beside it
            precision="bf16",
            micro_batch_tokens=16384,
        ),
        optim=OptimSettings(learning_rate=1e-6, beta1=0.9, beta2=0.98, weight_decay=0.1, clip_grad=1.0),
        checkpoint=CheckpointSettings(episodes=True),
        launch=LaunchSettings(ranks=gpus // nodes, nodes=nodes, device="cuda"),
    )


Run = tuple[str, str, int]
"""Model size, task and number of H100s."""


def _recipe(name: str, about: str, run: Run, *changes: str) -> Callable[[], Settings]:
    """A row of the table: a function of this name with a docstring."""

    @functools.cache  # merging takes long, and commands and tests ask for the same recipe several times
    def merged() -> Settings:
        return apply_overrides(icrl(name, *run), changes)

    def make() -> Settings:
        return copy.deepcopy(merged())

    make.__name__, make.__doc__ = name, about
    return make


EVALUATED_AS_PUBLISHED = ("eval.preset=paper",)
"""Changes of the runs that stand for the paper's."""
PAPER_RUNS: tuple[Run, ...] = (
    *(("4B", "alfworld", 2), ("8B", "alfworld", 4), ("4B", "webshop", 2), ("8B", "webshop", 4)),
    *(("4B", "searchqa", 4), ("8B", "searchqa", 8), ("8B", "math", 4)),
)
"""The models that the paper's tables name."""
CODE_RUNS: tuple[Run, ...] = tuple(("4B-Instruct-2507", task, gpus) for size, task, gpus in PAPER_RUNS if size == "4B")
"""The same with the 4B model that the authors' code has a configuration for."""
TITLES = {"alfworld": "ALFWorld", "webshop": "WebShop", "searchqa": "SearchQA", "math": "mathematics"}


def size_name(size: str) -> str:
    """A model's size as names of recipes have it."""
    return size.lower().replace("-", "_")


def name_of(method: str, run: Run) -> str:
    """The recipe of a method of the tables."""
    size, task, gpus = run
    return f"{method}_{size_name(size)}_{task}_{gpus}xh100"


@dataclass(frozen=True)
class Method:
    """A method of the paper's result tables."""

    name: str
    """What the names of its recipes begin with."""
    arm: str
    title: str
    averages: dict[str, float]
    """The paper's mean over the three agentic tasks, by model size, in %."""
    mathematics: str
    """About the run on mathematics."""

    def recipes(self) -> list[Callable[[], Settings]]:
        made = []
        for run in (*PAPER_RUNS, *CODE_RUNS):
            size, task, gpus = run
            about = f"{self.mathematics if task == 'math' else self._agentic(size, task)} {gpus} H100."
            changes = (*ARMS[self.arm].changes, *EVALUATED_AS_PUBLISHED)
            made.append(_recipe(name_of(self.name, run), about, run, *changes))
        return made

    def _agentic(self, size: str, task: str) -> str:
        run = f"{self.title} with Qwen3-{size} on {TITLES[task]}"
        if size in self.averages:
            return f"{run}, one of the three behind the paper's agentic average of {self.averages[size]}."
        return f"{run}: the 4B model of the authors' code, where the paper's tables name Qwen3-4B (docs/REPRODUCE.md)."


ICRL = Method(
    "qwen3",
    "icrl",
    "ICRL",
    {"4B": 57.0, "8B": 57.8},
    "ICRL with Qwen3-8B on mathematics: 75.3 on average over MATH500, Minerva, OlympiadBench, AIME24 and AMC23 in the "
    "paper, 65.1 on AIME24.",
)
GRPO = Method(
    "grpo",
    "grpo",
    "GRPO",
    {"4B": 49.2, "8B": 52.8},
    "GRPO with Qwen3-8B on mathematics: 68.3 on average over five sets in the paper, 50.0 on AIME24.",
)
CRITIQUE_GRPO = Method(
    "critique_grpo",
    "critique_grpo",
    "Critique-GRPO",
    {"4B": 55.9, "8B": 56.6},
    "Critique-GRPO with Qwen3-8B on mathematics: 73.3 on average over five sets in the paper.",
)
METHODS = (ICRL, GRPO, CRITIQUE_GRPO)

SHORT_TURNS = ("rollout.max_turn_tokens=2048", "rollout.parse_truncated=false")
# Nothing is offloaded, as memory suffices. Turns are short, because a batch must end within engine.request_timeout_s.
ON_LOCAL_ENGINE = ("engine.kind=local", "engine.tensor_parallel=1", "actor.offload=none", *SHORT_TURNS)
LARGER_AND_FIRST_RUNS = (
    _recipe(
        "qwen3_8b_alfworld_4xh100_cp2",
        "qwen3_8b_alfworld_4xh100 in the layout of the authors' code, TP 2 x CP 2; the loss is the same. 4 H100.",
        ("8B", "alfworld", 4),
        *("actor.context_parallel=2", *EVALUATED_AS_PUBLISHED),
    ),
    _recipe(
        "qwen3_8b_math_131k_2nodes",
        "Qwen3-8B on mathematics with 131,072 tokens of context by YaRN (docs/MODELS.md); reproduces nothing. 16 H100.",
        ("8B", "math", 16),
        *("model.path=models/Qwen3-8B-131k", "rollout.context_tokens=131072", "actor.micro_batch_tokens=131072"),
        *("actor.context_parallel=4", "tasks.sources.0.plan={prompt_tokens: 200, reply_tokens: 12000}"),
    ),
    _recipe(
        "qwen3_8b_math_8xh100_fp8",
        "The mathematics run on a whole node with FP8 products (blockwise scaling); reproduces nothing yet. 8 H100.",
        ("8B", "math", 8),
        "actor.fp8=blockwise",
    ),
    _recipe(
        "qwen3_8b_2nodes",
        "The 8B ALFWorld run with twice the tasks a step, data parallel over two nodes. 16 H100.",
        ("8B", "alfworld", 16),
        "rollout.tasks_per_step=32",
    ),
    _recipe(
        "qwen3_32b_4nodes",
        "Qwen3-32B on ALFWorld, a size that the paper does not train: TP 8, engines of 8. 32 H100.",
        ("32B", "alfworld", 32),
        *("rollout.tasks_per_step=32", "actor.tensor_parallel=8", "engine.tensor_parallel=8"),
    ),
    _recipe(
        "qwen3_4b",
        "Qwen3-4B on the embedded Household with the local engine: a first run on 2 H100 that needs only the model.",
        ("4B", "household", 2),
        *ON_LOCAL_ENGINE,
    ),
    _recipe(
        "qwen3_8b",
        "Qwen3-8B on the embedded Household with the local engine: a first run on 4 H100 that needs only the model.",
        ("8B", "household", 4),
        *ON_LOCAL_ENGINE,
    ),
)

ABLATIONS = {
    "ablation_no_role_groups": "no_role_groups",
    "ablation_no_calibration": "no_calibration",
    "ablation_frozen_critic": "frozen_critic",
    "ablation_not_internalised": "not_internalised",
    "ablation_recomputed_denominator": "recomputed",
    "reference_preset": "reference",
}
"""Recipe -> its arm, on the 8B ALFWorld run."""
PUBLISHED_ABLATIONS = ("ablation_no_role_groups", "ablation_no_calibration")
"""Ablations with an average over all tasks in the paper: they also have recipes on the other tasks."""
FURTHER_BASELINES = {
    "gspo": ("alfworld", "webshop", "searchqa", "math"),
    "scaling_inter": ("alfworld", "webshop", "searchqa"),
}
"""Arm -> tasks of its recipes, with the 8B model. The horizon of mathematics is the number of replies without a box."""
RUNS_8B = {task: gpus for size, task, gpus in PAPER_RUNS if size == "8B"}
"""Task -> H100s."""


def ablation_name(name: str, task: str) -> str:
    """The recipe of an ablation on a task."""
    return name if task == "alfworld" else f"{name}_{task}_{RUNS_8B[task]}xh100"


def _of_arm(name: str, arm: str, task: str) -> Callable[[], Settings]:
    gpus = RUNS_8B[task]
    about = f"{ARMS[arm].about} Qwen3-8B on {TITLES[task]}. {gpus} H100."
    return _recipe(name, about, ("8B", task, gpus), *ARMS[arm].changes, *EVALUATED_AS_PUBLISHED)


def _ablations() -> list[Callable[[], Settings]]:
    made = [_of_arm(name, arm, "alfworld") for name, arm in ABLATIONS.items()]
    for name in PUBLISHED_ABLATIONS:
        others = (task for task in RUNS_8B if task != "alfworld")
        made += [_of_arm(ablation_name(name, task), ABLATIONS[name], task) for task in others]
    return made


def _further_baselines() -> list[Callable[[], Settings]]:
    pairs = [(arm, task) for arm, tasks in FURTHER_BASELINES.items() for task in tasks]
    return [_of_arm(name_of(arm, ("8B", task, RUNS_8B[task])), arm, task) for arm, task in pairs]


SEARCH = "{command: 'icrl serve-search corpus.jsonl --host {host} --port {port}', count: 4}"
"""BM25 over corpus.jsonl in the working directory; tasks.sources.0.serve.command names another file or server."""
TRAJECTORIES = "sft.jsonl"
"""In the working directory; warm_start.data names others. With warm_start.epochs=null, only RL runs."""


@dataclass(frozen=True)
class Supervision:
    """Supervised training on trajectories, before RL. docs/AGENTS.md says which numbers are published."""

    epochs: int
    longest: int
    """Tokens of a conversation; what is longer is cut."""
    warmup: int
    """Steps."""
    sizes: dict[str, tuple[float, int]]
    """Model size -> learning rate and conversations per step. "7B" is for all that are not named."""

    def changes(self, size: str) -> tuple[str, ...]:
        rate, conversations = self.sizes.get(size, self.sizes["7B"])
        return (
            *(f"warm_start.data=[{{path: {TRAJECTORIES}}}]", f"warm_start.epochs={self.epochs}"),
            *(f"warm_start.max_tokens={self.longest}", "warm_start.too_long=cut"),
            *(f"warm_start.learning_rate={rate}", f"warm_start.episodes_per_step={conversations}"),
            *(f"warm_start.warmup_steps={self.warmup}", "warm_start.schedule=linear", "warm_start.final_factor=0"),
        )


@dataclass(frozen=True)
class AgentTask:
    """A task of Chain-of-Agents: supervised training, then GRPO. docs/AGENTS.md says which numbers its published
    scripts have."""

    about: str
    source: str
    """The entry of `tasks.sources`. What `plan` says is assumed."""
    tasks: int
    """Tasks of a step, attempted 8 times each."""
    prompt: int
    response: int
    """Tokens of the context. Observations count as part of the response."""
    turns: int
    updates: int
    """Updates of a step."""
    steps: int
    supervision: Supervision

    def changes(self) -> tuple[str, ...]:
        context = self.prompt + self.response
        return (
            *ARMS["grpo"].changes,
            f"steps={self.steps}",
            f"tasks.sources=[{self.source}]",
            f"rollout.tasks_per_step={self.tasks}",
            f"rollout.context_tokens={context}",
            "rollout.templates=standard",
            f"rollout.max_turn_tokens={self.response // 2}",
            "rollout.parse_truncated=false",
            f"rollout.max_turns={self.turns}",
            "rollout.max_observation_tokens=2048",
            f"actor.micro_batch_tokens={max(context, 16384)}",
            *("algo.clip_low=0.2", "algo.clip_high=0.28", "algo.dual_clip=10", "algo.kl_coef=0"),
            *("algo.dynamic_sampling=true", "algo.loss_normalisation=token_mean"),
            f"algo.updates_per_step={self.updates}",
            # The penalty of DAPO (arXiv 2503.14476), over the last fifth of the length.
            f"algo.overlong.max_tokens={self.response}",
            f"algo.overlong.buffer_tokens={self.response // 5}",
            *("optim.beta2=0.999", "optim.warmup_steps=10"),
        )


AGENT_TASKS = {
    "web": AgentTask(
        "web questions with search and pages",
        f"{{name: searchqa, serve: {SEARCH}, "
        "agent: {format: tags, tools: [search, page], grammar: web, judge: model}, "
        "plan: {prompt_tokens: 700, reply_tokens: 400, observation_tokens: 1200, calls: 12, call_s: 3}}",
        *(64, 2048, 30720, 25, 2, 60),
        Supervision(4, 32768, 24, {"7B": (1.4e-5, 128)}),
    ),
    "code": AgentTask(
        "mathematics with Python programs",
        "{name: math, data: {grading_workers: 12}, agent: {format: tags, tools: [python], grammar: code}, "
        "plan: {prompt_tokens: 400, reply_tokens: 1200, observation_tokens: 150, calls: 3, call_s: 1}}",
        *(256, 4096, 16384, 8, 8, 100),
        Supervision(2, 32768, 0, {"7B": (3e-5, 32), "32B": (1.4e-5, 64)}),
    ),
    "multihop": AgentTask(
        "multi-hop questions with search",
        f"{{name: searchqa, serve: {SEARCH}, agent: {{format: tags, grammar: multi_hop}}, "
        "plan: {prompt_tokens: 400, reply_tokens: 200, observation_tokens: 600, calls: 3, call_s: 0.2}}",
        *(512, 2048, 8192, 8, 2, 100),
        Supervision(4, 5120, 10, {"3B": (1e-5, 128), "7B": (2e-5, 32), "32B": (1.4e-5, 32)}),
    ),
}
AGENT_MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "Qwen2.5-3B-Instruct": (8, ("engine.tensor_parallel=1",)),
    "Qwen2.5-7B-Instruct": (8, ()),
    "Qwen2.5-32B-Instruct": (32, ("actor.tensor_parallel=8", "engine.tensor_parallel=8")),
    "Qwen3-8B": (8, ()),
}
"""Folder in models/ -> H100s and changes."""


def _agents() -> list[Callable[[], Settings]]:
    made = []
    for model, (gpus, layout) in AGENT_MODELS.items():
        size = model.removesuffix("-Instruct").lower().replace(".", "_").replace("-", "_")
        for name, task in AGENT_TASKS.items():
            about = f"SFT, then GRPO on {task.about} as in Chain-of-Agents, {model}. {gpus} H100."
            where = f"{gpus}xh100" if gpus <= NODE else f"{gpus // NODE}nodes"
            supervision = task.supervision.changes(model.split("-")[1])
            changes = (f"model.path=models/{model}", *task.changes(), *supervision, *layout)
            made.append(_recipe(f"coa_{size}_{name}_{where}", about, ("8B", "math", gpus), *changes))
    return made


RECIPES: tuple[Callable[[], Settings], ...] = (
    *ICRL.recipes(),
    *LARGER_AND_FIRST_RUNS,
    *GRPO.recipes(),
    *CRITIQUE_GRPO.recipes(),
    *_further_baselines(),
    *_ablations(),
    *_agents(),
)
