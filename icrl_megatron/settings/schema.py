"""Every setting of the trainer: plain dataclasses, no torch. Recipes return `Settings`; OmegaConf merges overrides.

A field's docstring is its help text. Defaults are the paper's (arXiv 2605.15224) where it names one. What makes values
wrong together is checked in `run/checks.py`, before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from icrl_megatron.settings.algo_schema import AlgoSettings
from icrl_megatron.settings.allowed import FAMILIES, SCHEDULES, chosen, limited
from icrl_megatron.settings.task_schema import TaskSettings


@dataclass
class TinyModel:
    """An embedded model made on the spot with its own word tokenizer, for machines without a GPU and for tests."""

    family: str = chosen("qwen3", *FAMILIES)
    """qwen3 | qwen2 (docs/MODELS.md)."""
    layers: int = limited(2, 1)
    """Transformer blocks."""
    hidden: int = limited(64, 1)
    """Width of the residual stream."""
    heads: int = limited(4, 1)
    """Attention heads."""
    kv_heads: int = limited(2, 1)
    """Key and value heads; must divide `heads`."""
    head_dim: int = limited(16, 1)
    """Width of a head."""
    ffn: int = limited(192, 1)
    """Width inside the feed-forward network."""
    tie_embeddings: bool = True
    """Use the embedding as the output head."""
    max_positions: int = limited(1024, 2)
    """Longest sequence in tokens."""


@dataclass
class ModelSettings:
    path: str = ""
    """A Hugging Face folder (docs/MODELS.md). Empty with `init` set: made in the run folder."""
    init: TinyModel | None = None
    """Make this tiny model (random weights) when `path` is empty."""


@dataclass
class WarmStart:
    """The supervised stage (`icrl sft`): demonstrations of the task sets' teachers in the three prompt forms."""

    steps: int = limited(0, 0)
    """0: none."""
    episodes_per_step: int = limited(64, 1)
    """Demonstrations in an update."""
    learning_rate: float = limited(3e-3, 0)
    """After the warm-up."""
    weight_decay: float = limited(0.0, 0)
    """Of Adam."""
    warmup_steps: int = limited(20, 0)
    """Steps over which the learning rate rises from 0."""
    schedule: str = chosen("wsd", *SCHEDULES)
    """constant | linear | cosine | wsd, as in `optim`."""
    decay_steps: int | None = limited(None, 1)
    """As in `optim`."""
    final_factor: float = limited(0.1, 0, 1)
    """As in `optim`."""


@dataclass
class ExternalCritic:
    """A critic behind an OpenAI-compatible endpoint (`rollout.critic=external`): never trained."""

    url: str = ""
    """Up to and without /chat/completions, e.g. https://api.openai.com/v1."""
    model: str = ""
    """Its name at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; a server that wants none needs none."""
    timeout_s: float = limited(120.0, 0.001)
    """Seconds until a request is sent again."""
    concurrency: int = limited(32, 1)
    """Requests in flight."""


@dataclass
class RolloutSettings:
    tasks_per_step: int = limited(16, 1)
    """B."""
    episodes_per_task: int = limited(8, 1)
    """G."""
    rounds: int = limited(2, 1)
    """K: attempts per episode. 1 is plain GRPO."""
    critic: str = chosen("self", "self", "frozen", "external", "empty")
    """self: the trained backbone; frozen: the starting weights, never trained; external: `rollout.external`; empty: no
    text at all (a control)."""
    external: ExternalCritic = field(default_factory=ExternalCritic)
    temperature: float = limited(1.0, 0.001)
    """Above 0. `icrl eval` also takes 0: greedy decoding."""
    max_turn_tokens: int = limited(2048, 1)
    """Longest reply of the solver."""
    max_critique_tokens: int = limited(1024, 1)
    """Longest reply of the critic."""
    max_turns: int = limited(30, 1)
    """Upper bound; an environment may ask for fewer."""
    format_reward: bool = False
    """Multiply the reward of an attempt by its format score (task/format), where the task set has a grammar."""
    max_calls: int | None = limited(None, 0)
    """Tool calls of an attempt; later ones are answered with a request for the final answer. Null: no limit."""
    call_cost: float = limited(0.0, 0, 1)
    """Taken off the reward of an attempt for each of its tool calls; a reward never falls below 0."""
    token_cost: float = limited(0.0, 0, 1)
    """The same for each token that the solver generates."""
    repeat_limit: int = limited(3, 2)
    """The same action this many times in a row ends the attempt."""
    context_tokens: int = limited(16384, 2)
    """Prompt and response together."""
    observation_chars: int = limited(800, 1)
    """Observations are cut at this length in the critic's prompt."""
    templates: str = "standard"
    """standard | compact | a folder with attempt.jinja, revision.jinja and critique.jinja."""
    chat_template_args: dict[str, bool | str] = field(default_factory=dict)
    """Handed to the tokenizer's chat template, e.g. enable_thinking."""
    environment_timeout_s: float = limited(60.0, 0.001)
    """Longest call of an environment: reset, step, parse or grading. A call that takes longer costs its episode."""
    max_observation_bytes: int = limited(4 << 20, 1024)
    """At most this many bytes of one answer of an environment or its server are read; the rest is cut and counted."""
    max_observation_tokens: int = limited(8192, 16)
    """At most this many tokens of one observation enter the context; the rest is cut and counted."""
    concurrency: int = limited(512, 1)
    """Episodes in flight per engine."""
    oversample: float = limited(1.0, 1, 16)
    """Tasks begun for each task needed: once enough groups are complete, the slowest are cut off. It favours tasks that
    are quickly played."""
    partial: bool = False
    """Keep what was cut off and go on with it in the next step, with the log-probs its old tokens were sampled with:
    algo.mismatch_correction weighs them. Checkpoints hold what is kept."""


@dataclass
class MismatchLimit:
    """Largest accepted |log pi_train - log pi_engine| of a step under the same prompt. Null: the default of
    `actor.precision` (docs/ENGINES.md says how it was measured)."""

    mean: float | None = limited(None, 0)
    """Mean over the loss tokens of a step."""
    largest: float | None = limited(None, 0)
    """Of any one token."""
    patience: int | None = limited(None, 1)
    """Steps in a row above a limit after which the run stops; each logs a warning. Null: 1 in fp32, 3 in bf16."""


@dataclass
class EngineSettings:
    kind: str = "local"
    """local: transformers in the rank's own process; sglang: SGLang servers (docs/ENGINES.md)."""
    tensor_parallel: int = limited(1, 1)
    """GPUs of one SGLang server; those of `urls` have their own."""
    servers: int | None = limited(None, 1)
    """SGLang servers that the run starts; null: one per `tensor_parallel` ranks."""
    urls: list[str] = field(default_factory=list)
    """External SGLang servers (http://host:port), used instead of starting any."""
    api_key_env: str = ""
    """Environment variable with the API key of the servers of `urls`; empty: they want none. Servers that the run
    starts have a key that is made for each of them."""
    python: str = ""
    """Interpreter that has SGLang, where that is not the trainer's own; empty: the trainer's."""
    server_args: list[str] = field(default_factory=list)
    """More arguments for sglang.launch_server, as they are."""
    quantization: str = chosen("", "", "fp8")
    """fp8: the engine quantises the weights it is sent; empty: they keep the actor's precision."""
    memory_fraction: float = limited(0.7, 0.01, 0.99)
    """Share of a GPU's memory for the engine's weights and KV cache together; a frozen critic's server gets half of
    it."""
    kv_tokens: int | None = limited(None, 1)
    """Tokens that the KV cache holds; null: what fits (GPU), or 65536 (CPU)."""
    bucket_mib: int = limited(512, 1)
    """Weights are handed over in a buffer of at most this size, or that of the largest tensor; in two that take turns
    where one does not hold them all."""
    startup_timeout_s: float = limited(600.0, 0.001)
    """A server that is not ready by then ends the run."""
    sync_timeout_s: float = limited(600.0, 0.001)
    """No answer to one bucket of weights may take longer."""
    allow_untested: bool = False
    """Accept a version of SGLang other than the tested ones."""
    max_batch: int = limited(256, 1)
    """Sequences decoded together, and requests in flight."""
    mismatch_limit: MismatchLimit = field(default_factory=MismatchLimit)
    request_timeout_s: float = limited(600.0, 0.001)
    """The local engine then fails; SGLang then aborts the request, and what was generated is kept."""


@dataclass
class ActorSettings:
    tensor_parallel: int = limited(1, 1)
    """Ranks that share each layer."""
    pipeline_parallel: int = limited(1, 1)
    """Stages of consecutive layers."""
    sequence_parallel: bool = False
    """Split activations between layers over the tensor-parallel ranks."""
    precision: str = chosen("bf16", "bf16", "fp32")
    """bf16 | fp32."""
    layers: str = chosen("auto", "auto", "transformer_engine", "torch")
    """auto (Transformer Engine for bf16 on GPUs, else torch) | transformer_engine | torch."""
    fp8: str = chosen("off", "off", "current", "blockwise")
    """off | current (a scale a tensor) | blockwise: Transformer Engine's recipes, on GPUs with FP8 only."""
    recompute: str = chosen("none", "none", "selective", "full")
    """none | selective | full."""
    offload: str = chosen("none", "none", "optimizer", "all")
    """What leaves the GPU while episodes are played: none | optimizer (moments, main weights) | all (gradients too)."""
    micro_batch_tokens: int = limited(16384, 1)
    """Token budget of a packed micro-batch; a longer sequence gets one of its own."""
    head_chunk_tokens: int | None = limited(None, 1)
    """Loss tokens whose logits exist at once; null: as many as suit the device."""
    head_backend: str = chosen("auto", "auto", "torch", "triton")
    """auto (triton on GPUs, torch on CPUs) | torch | triton."""
    head_logits: str = chosen("fp32", "fp32", "bf16")
    """fp32 | bf16: what a chunk's logits are stored in; bf16 is for triton with precision=bf16 (docs/KERNEL.md)."""


@dataclass
class OptimSettings:
    learning_rate: float = limited(1e-6, 0)
    """After the warm-up."""
    beta1: float = limited(0.9, 0, 1 - 1e-9)
    """Of Adam."""
    beta2: float = limited(0.98, 0, 1 - 1e-9)
    """Of Adam."""
    eps: float = limited(1e-8, 0)
    """Of Adam."""
    weight_decay: float = limited(0.1, 0)
    """Of Adam."""
    clip_grad: float = limited(1.0, 0)
    """Largest gradient norm; 0: no limit."""
    warmup_steps: int = limited(0, 0)
    """Steps of a linear warm-up."""
    schedule: str = chosen("constant", *SCHEDULES)
    """constant | linear | cosine | wsd (stable, then linear): how the rate falls after the warm-up."""
    decay_steps: int | None = limited(None, 1)
    """Steps at the end over which it falls; null: all after the warm-up, and half of all with wsd."""
    final_factor: float = limited(0.0, 0, 1)
    """Share of the learning rate that is left at the end."""
    on_collapse: str = chosen("warn", "warn", "stop")
    """What to do when the policy has collapsed (entropy and gradient norm both near 0, so nothing is learned any more):
    warn | stop."""


@dataclass
class EvalSettings:
    interval: int = limited(0, 0)
    """Steps between critique-free evaluations on held-out problems; 0: only before and after."""
    problems: int = limited(64, 1)
    """Held-out problems of each task source."""
    samples: int = limited(1, 1)
    """Attempts per problem, at temperature 1."""
    control_problems: int = limited(128, 0)
    """Failed attempts retried in the control report (critique, empty critique, another attempt); 0: no report."""


@dataclass
class TrackerSettings:
    """Experiment trackers beside metrics.jsonl and TensorBoard, which are always written."""

    names: list[str] = field(default_factory=list)
    """Any of wandb, mlflow, trackio (docs/EXTENDING.md)."""
    project: str = "icrl-megatron"
    """Project or experiment at the tracker."""
    run_name: str = ""
    """Empty: the run's name."""
    group: str = ""
    """Group of the run at the tracker."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run at the tracker."""
    offline: bool = False
    """Write below the run folder and use no network."""
    episodes: int = limited(4, 0)
    """Attempts and critiques of a step that are logged as a table, with at most `max_chars` of their text; 0: none."""
    max_chars: int = limited(2000, 1)
    """Longest text of a table cell."""


@dataclass
class CheckpointSettings:
    interval: int = limited(50, 1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = limited(2, 1)
    """Newest checkpoints that are kept."""


@dataclass
class DebugSettings:
    mode: str = chosen("train", "train", "rollout_only", "from_dump", "fake_data")
    """train | rollout_only (no update) | from_dump (train on the episodes of a dump) | fake_data (random samples)."""
    dump: str = ""
    """Run folder whose rollouts `from_dump` reads."""


@dataclass
class LaunchSettings:
    ranks: int = limited(1, 1)
    """Processes on each machine; `icrl train` starts them on this one unless it is a rank already."""
    nodes: int = limited(1, 1)
    """Machines of the job; more than one are started by slurm/ or `icrl launch`."""
    device: str = chosen("auto", "auto", "cpu", "cuda")
    """auto | cpu | cuda."""
    timeout_s: float = limited(1800.0, 1)
    """No collective waits longer."""


@dataclass
class DataSettings:
    seed: int | None = limited(None, 0, 2**31 - 1)
    """Of the order in which problems are drawn; null: as `seed`, which everything that is sampled has."""


@dataclass
class Settings:
    """One run. `icrl train RECIPE key=value ...` resolves to one of these, and it is saved with the run."""

    name: str = "run"
    """Names the run folder below runs/."""
    run_dir: str = ""
    """Where everything is written; empty: runs/<name>."""
    seed: int = limited(0, 0, 2**31 - 1)
    """Of problems, sampled tokens and random weights."""
    steps: int = limited(300, 0)
    """Training steps."""
    max_generated_tokens: int | None = limited(None, 1)
    """Ends training once this many tokens were generated (for comparisons at equal cost)."""
    baseline: str = chosen("", "", "grpo")
    """Also train this baseline (grpo) from the same start with the same number of generated tokens, and compare."""
    start_from: str = ""
    """A checkpoint of another run (step_NNNNNN, a folder of them, or a run folder), whose weights a new run begins
    with. Data and algorithm may differ; steps count from 0; no warm start; the model is the checkpoint's."""
    start_with_moments: bool = False
    """With `start_from`: also take over the optimizer's moments and step count."""
    model: ModelSettings = field(default_factory=ModelSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    data: DataSettings = field(default_factory=DataSettings)
    warm_start: WarmStart = field(default_factory=WarmStart)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    algo: AlgoSettings = field(default_factory=AlgoSettings)
    actor: ActorSettings = field(default_factory=ActorSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    trackers: TrackerSettings = field(default_factory=TrackerSettings)
    debug: DebugSettings = field(default_factory=DebugSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
