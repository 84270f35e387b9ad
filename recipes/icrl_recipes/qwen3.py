"""What the Qwen3 recipes share: the hyper-parameters of ICRL's published training code (arXiv 2605.15224), on H100s.

The model is a folder in Hugging Face's layout; a recipe names models/Qwen3-8B under the working directory, and
`model.path=/elsewhere/Qwen3-8B` another. Planned figures are `icrl plan`'s: predicted, not measured (docs/PLANNER.md).
"""

from __future__ import annotations

from icrl_megatron.settings.schema import (
    ActorSettings,
    Calibration,
    EngineSettings,
    LaunchSettings,
    ModelSettings,
    OptimSettings,
    RolloutSettings,
    Settings,
)
from icrl_megatron.settings.task_schema import TaskData, TaskServers, TaskSettings, TaskSource

NODE = 8

AGENTGYM = "conda run --no-capture-output -n agentenv-{name} {name} --host {{host}} --port {{port}}"
"""How AgentGym's own README starts a server, in the environment that it has one make."""

SERVERS = {"alfworld": 32, "webshop": 1, "searchqa": 1}
"""Processes of each: ALFWorld's serialises its games."""


def source(task: str) -> TaskSource:
    """A task of the paper. AgentGym's servers start with the run; ALFWorld's games are numbered as AgentGym does it.

    What else a task needs (rows or task ids of the others) is up to the user: docs/TASKS.md.
    """
    if task not in SERVERS:
        return TaskSource(task)
    data = TaskData(train=["0:2420"], heldout=["2420:2620"]) if task == "alfworld" else TaskData()
    return TaskSource(task, data=data, serve=TaskServers(AGENTGYM.format(name=task), count=SERVERS[task]))


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
            max_turn_tokens=2048,
            max_critique_tokens=1024,
            max_turns=30,
            context_tokens=16384,
        ),
        engine=EngineSettings(kind="sglang", tensor_parallel=2),
        actor=ActorSettings(
            tensor_parallel=2,
            sequence_parallel=True,
            recompute="full",
            offload="all",  # beside the actor's whole state an engine's 0.7 of a GPU has no room
            precision="bf16",
            micro_batch_tokens=16384,
        ),
        optim=OptimSettings(learning_rate=1e-6, beta1=0.9, beta2=0.98, weight_decay=0.1, clip_grad=1.0),
        launch=LaunchSettings(ranks=gpus // nodes, nodes=nodes, device="cuda"),
    )


def grpo(name: str, size: str, task: str, gpus: int) -> Settings:
    """One attempt a task and no critic: everything else as `icrl`."""
    settings = icrl(name, size, task, gpus)
    settings.rollout.rounds = 1
    settings.algo.calibration = Calibration(enabled=False)
    return settings


def critique_grpo(name: str, size: str, task: str, gpus: int) -> Settings:
    """A critic that is never trained, whose revisions enter the solver's group and are shaped (docs/BASELINES.md)."""
    settings = icrl(name, size, task, gpus)
    settings.rollout.critic = "frozen"
    settings.algo.calibration = Calibration(enabled=False)
    settings.algo.normalise_std = False
    settings.algo.shaping_gamma = 0.1
    settings.algo.revisions_per_task = 1
    settings.algo.loss_normalisation = "token_mean"
    return settings
