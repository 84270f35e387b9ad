"""Every setting of the trainer: plain dataclasses, no torch. Recipes return `Settings`; OmegaConf merges overrides.

A field's docstring is its help text. Defaults are the paper's (arXiv 2605.15224) where it names one. What makes values
wrong together is checked in `run/checks.py`, before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from icrl_megatron.settings.task_schema import TaskSettings


@dataclass
class TinyModel:
    """An embedded model made on the spot with its own word tokenizer, for machines without a GPU and for tests."""

    family: str = "qwen3"
    """qwen3 | qwen2 (docs/MODELS.md)."""
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 192
    tie_embeddings: bool = True
    max_positions: int = 1024


@dataclass
class ModelSettings:
    path: str = ""
    """A Hugging Face folder (docs/MODELS.md). Empty with `init` set: made in the run folder."""
    init: TinyModel | None = None
    """Make this tiny model (random weights) when `path` is empty."""


@dataclass
class WarmStart:
    """The supervised stage (`icrl sft`): demonstrations of the task sets' teachers in the three prompt forms."""

    steps: int = 0
    """0: none."""
    episodes_per_step: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    warmup_steps: int = 20
    schedule: str = "wsd"
    """constant | linear | cosine | wsd, as in `optim`."""
    decay_steps: int | None = None
    final_factor: float = 0.1


@dataclass
class ExternalCritic:
    """A critic behind an OpenAI-compatible endpoint (`rollout.critic=external`): never trained."""

    url: str = ""
    """Up to and without /chat/completions, e.g. https://api.openai.com/v1."""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; a server that wants none needs none."""
    timeout_s: float = 120.0
    concurrency: int = 32
    """Requests in flight."""


@dataclass
class RolloutSettings:
    tasks_per_step: int = 16
    """B."""
    episodes_per_task: int = 8
    """G."""
    rounds: int = 2
    """K: attempts per episode. 1 is plain GRPO."""
    critic: str = "self"
    """self: the trained backbone; frozen: the starting weights, never trained; external: `rollout.external`; empty: no
    text at all (a control)."""
    external: ExternalCritic = field(default_factory=ExternalCritic)
    temperature: float = 1.0
    """Above 0. `icrl eval` also takes 0: greedy decoding."""
    max_turn_tokens: int = 2048
    max_critique_tokens: int = 1024
    max_turns: int = 30
    """Upper bound; an environment may ask for fewer."""
    repeat_limit: int = 3
    """The same action this many times in a row ends the attempt."""
    context_tokens: int = 16384
    """Prompt and response together."""
    observation_chars: int = 800
    """Observations are cut at this length in the critic's prompt."""
    templates: str = "standard"
    """standard | compact | a folder with attempt.jinja, revision.jinja and critique.jinja."""
    chat_template_args: dict[str, bool | str] = field(default_factory=dict)
    """Handed to the tokenizer's chat template, e.g. enable_thinking."""
    call_cost: float = 0.0
    """Taken from the reward of an attempt for each tool call (task/calls); the reward stays at least 0."""
    token_cost: float = 0.0
    """The same for each generated token."""
    environment_timeout_s: float = 60.0
    """Longest call of an environment: reset, step, parse or grading. A call that takes longer costs its episode."""
    max_observation_bytes: int = 4 << 20
    """At most this many bytes of one answer of an environment or its server are read; the rest is cut and counted."""
    max_observation_tokens: int = 8192
    """At most this many tokens of one observation enter the context; the rest is cut and counted."""
    concurrency: int = 512
    """Episodes in flight per engine."""
    oversample: float = 1.0
    """Tasks begun for each task needed: once enough groups are complete, the slowest are cut off. It favours tasks that
    are quickly played."""
    partial: bool = False
    """Keep what was cut off and go on with it in the next step, with the log-probs its old tokens were sampled with:
    algo.mismatch_correction weighs them. Checkpoints hold what is kept."""


@dataclass
class MismatchLimit:
    """Largest accepted |log pi_train - log pi_engine| of a step under the same prompt. Null: the default of
    `actor.precision` (docs/ENGINES.md says how it was measured)."""

    mean: float | None = None
    """Mean over the loss tokens of a step."""
    largest: float | None = None
    """Of any one token."""
    patience: int | None = None
    """Steps in a row above a limit after which the run stops; each logs a warning. Null: 1 in fp32, 3 in bf16."""


@dataclass
class EngineSettings:
    kind: str = "local"
    """local: transformers in the rank's own process; sglang: SGLang servers (docs/ENGINES.md)."""
    tensor_parallel: int = 1
    """GPUs of one SGLang server; those of `urls` have their own."""
    servers: int | None = None
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
    quantization: str = ""
    """fp8: the engine quantises the weights it is sent; empty: they keep the actor's precision."""
    memory_fraction: float = 0.7
    """Share of a GPU's memory for the engine's weights and KV cache together; a frozen critic's server gets half of
    it."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds; null: what fits (GPU), or 65536 (CPU)."""
    bucket_mib: int = 512
    """Weights are handed over in a buffer of at most this size, or that of the largest tensor; in two that take turns
    where one does not hold them all."""
    startup_timeout_s: float = 600.0
    """A server that is not ready by then ends the run."""
    sync_timeout_s: float = 600.0
    """No answer to one bucket of weights may take longer."""
    allow_untested: bool = False
    """Accept a version of SGLang other than the tested ones."""
    max_batch: int = 256
    """Sequences decoded together, and requests in flight."""
    mismatch_limit: MismatchLimit = field(default_factory=MismatchLimit)
    request_timeout_s: float = 600.0
    """The local engine then fails; SGLang then aborts the request, and what was generated is kept."""


@dataclass
class Calibration:
    enabled: bool = True
    denominator: str = "rollout"
    """rollout: pi(y|q,c) from the engine's log-probs; recomputed: scored by the trainer (one more frozen pass)."""
    w_max: float = 2.0


@dataclass
class MismatchCorrection:
    enabled: bool = False
    cap: float = 2.0
    """pi_train / pi_engine under the same prompt, truncated here, multiplies the token's loss."""


@dataclass
class GroupFilter:
    """Reference preset: drops critique and revision groups that look hopeless."""

    enabled: bool = False
    min_mean_reward: float = 0.3


@dataclass
class Overlong:
    """DAPO's soft punishment of long replies (arXiv 2503.14476, Eq. 13), taken off the reward before advantages."""

    max_tokens: int | None = None
    """Generated tokens of a sample at which the whole penalty applies; null: none."""
    buffer_tokens: int = 1
    """The penalty grows linearly over this many tokens before `max_tokens`."""
    factor: float = 1.0
    """The whole penalty."""


@dataclass
class AlgoSettings:
    preset: str = "paper"
    """paper | reference: a bundle of the values below; explicit overrides win over it."""
    group_by: str = "task_role"
    """task_role (paper Eq. 5) | task_round_role (reference) | task (no role groups: an ablation)."""
    normalise_std: bool = True
    pseudo_positive: bool = False
    """Adds one pseudo sample of reward 1 to each group before mean and deviation are taken (reference)."""
    group_filter: GroupFilter = field(default_factory=GroupFilter)
    internalise: bool = True
    """Train revisions under the critique-free prompt. False: under the prompt they were written with (an ablation)."""
    calibration: Calibration = field(default_factory=Calibration)
    revisions_per_task: int | None = None
    """At most this many revisions of a task are trained, the best of them (Critique-GRPO's code: 1); null: all."""
    shaping_gamma: float = 0.0
    """Above 0, internalised revisions count p / (p + shaping_gamma) a token, unclipped, instead of w_t times the
    clipped ratio (Critique-GRPO's policy shaping, which takes 0.1); calibration.enabled must then be false."""
    mismatch_correction: MismatchCorrection = field(default_factory=MismatchCorrection)
    loss: str = "icrl"
    """icrl | gspo | cispo, or package.module:function (algo/losses.py, docs/EXTENDING.md)."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]: of a token, and with loss=gspo of a sequence (the paper
    takes 3e-4 and 4e-4)."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative (arXiv 1912.09729, which takes 3), with loss=icrl or
    gspo; null: no bound."""
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    """k1 | k2 | k3: how the KL term is estimated from the sampled tokens."""
    entropy_coef: float = 0.0
    loss_normalisation: str = "sequence_mean"
    """sequence_mean | token_mean | constant (the sum over `constant_tokens` times the sequences: Dr. GRPO, with
    normalise_std=false)."""
    constant_tokens: int | None = None
    """With loss_normalisation=constant: the same length for all sequences, such as the longest reply allowed."""
    overlong: Overlong = field(default_factory=Overlong)
    updates_per_step: int = 1
    """Optimizer updates made from one step's samples."""
    max_resamples: int = 4
    """Times a batch without any signal is drawn again."""
    on_no_signal: str = "error"
    """After that: error (ends the run and names the tasks) | skip (no update, and the step is counted: for baselines
    that may find nothing) | train (update anyway: the entropy and KL terms still act)."""

    def fused(self) -> bool:
        """Whether the fused head computes this objective. Every other one goes through the head that recomputes its
        logits in the backward pass (docs/KERNEL.md)."""
        return self.loss == "icrl" and self.kl_estimator == "k3" and self.dual_clip is None


@dataclass
class ActorSettings:
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    precision: str = "bf16"
    """bf16 | fp32."""
    layers: str = "auto"
    """auto (Transformer Engine for bf16 on GPUs, else torch) | transformer_engine | torch."""
    fp8: str = "off"
    """off | current (a scale a tensor) | blockwise: Transformer Engine's recipes, on GPUs with FP8 only."""
    recompute: str = "none"
    """none | selective | full."""
    offload: str = "none"
    """What leaves the GPU while episodes are played: none | optimizer (moments, main weights) | all (gradients too)."""
    micro_batch_tokens: int = 16384
    """Token budget of a packed micro-batch; a longer sequence gets one of its own."""
    head_chunk_tokens: int | None = None
    """Loss tokens whose logits exist at once; null: as many as suit the device."""
    head_backend: str = "auto"
    """auto (triton on GPUs, torch on CPUs) | torch | triton."""
    head_logits: str = "fp32"
    """fp32 | bf16: what a chunk's logits are stored in; bf16 is for triton with precision=bf16 (docs/KERNEL.md)."""


@dataclass
class OptimSettings:
    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    warmup_steps: int = 0
    """Steps of a linear warm-up."""
    schedule: str = "constant"
    """constant | linear | cosine | wsd (stable, then linear): how the rate falls after the warm-up."""
    decay_steps: int | None = None
    """Steps at the end over which it falls; null: all after the warm-up, and half of all with wsd."""
    final_factor: float = 0.0
    """Share of the learning rate that is left at the end."""
    on_collapse: str = "warn"
    """What to do when the policy has collapsed (entropy and gradient norm both near 0, so nothing is learned any more):
    warn | stop."""


@dataclass
class EvalSettings:
    interval: int = 0
    """Steps between critique-free evaluations on held-out problems; 0: only before and after."""
    problems: int = 64
    """Held-out problems of each task source."""
    samples: int = 1
    """Attempts per problem, at temperature 1."""
    control_problems: int = 128
    """Failed attempts retried in the control report (critique, empty critique, another attempt); 0: no report."""


@dataclass
class TrackerSettings:
    """Experiment trackers beside metrics.jsonl and TensorBoard, which are always written."""

    names: list[str] = field(default_factory=list)
    """Any of wandb, mlflow, trackio (docs/EXTENDING.md)."""
    project: str = "icrl-megatron"
    run_name: str = ""
    """Empty: the run's name."""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    offline: bool = False
    """Write below the run folder and use no network."""
    episodes: int = 4
    """Attempts and critiques of a step that are logged as a table, with at most `max_chars` of their text; 0: none."""
    max_chars: int = 2000


@dataclass
class CheckpointSettings:
    interval: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2


@dataclass
class DebugSettings:
    mode: str = "train"
    """train | rollout_only (no update) | from_dump (train on the episodes of a dump) | fake_data (random samples)."""
    dump: str = ""
    """Run folder whose rollouts `from_dump` reads."""


@dataclass
class LaunchSettings:
    ranks: int = 1
    """Processes on each machine; `icrl train` starts them on this one unless it is a rank already."""
    nodes: int = 1
    """Machines of the job; more than one are started by slurm/ or `icrl launch`."""
    device: str = "auto"
    """auto | cpu | cuda."""
    timeout_s: float = 1800.0
    """No collective waits longer."""


@dataclass
class DataSettings:
    seed: int | None = None
    """Of the order in which problems are drawn; null: as `seed`, which everything that is sampled has."""


@dataclass
class Settings:
    """One run. `icrl train RECIPE key=value ...` resolves to one of these, and it is saved with the run."""

    name: str = "run"
    """Names the run folder below runs/."""
    run_dir: str = ""
    """Where everything is written; empty: runs/<name>."""
    seed: int = 0
    steps: int = 300
    max_generated_tokens: int | None = None
    """Ends training once this many tokens were generated (for comparisons at equal cost)."""
    baseline: str = ""
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
