"""Every setting of the trainer: plain dataclasses, no torch. Recipes return `Settings`; OmegaConf merges overrides.

A field has everything about a setting: its type, range or choices (`Annotated`, settings/limits.py), default, and help
text (the docstring). Defaults are those of the paper (arXiv 2605.15224) if it gives one. `run/checks.py` checks
combinations of settings before anything heavy is imported. Larger sections have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from icrl_megatron.settings.algo_schema import AlgoSettings
from icrl_megatron.settings.distill_schema import DistillSettings
from icrl_megatron.settings.limits import Choice, Range
from icrl_megatron.settings.rollout_schema import EngineSettings, RolloutSettings
from icrl_megatron.settings.task_schema import TaskSettings
from icrl_megatron.utils.errors import ConfigError

FAMILIES = ("qwen3", "qwen2")
"""Modules of model/, named like `model_type` in config.json."""
SCHEDULES = ("constant", "linear", "cosine", "wsd")
"""Functions of algo/schedules.py."""
TRACKERS = ("wandb", "mlflow", "trackio")
"""Python packages; each has a module telemetry/<name>_tracker.py."""
CONVERSATION_FORMATS = ("openai", "sharegpt", "alpaca", "afm", "oagents")
"""Formats of files in distill/readers.py."""
_SEED = Range(0, 2**31 - 1)


@dataclass
class TinyModel:
    """A small model with random weights and a tokenizer of its own, for machines without a GPU and for tests."""

    tokenizer: Annotated[str, Choice(("words", "bytes"))] = "words"
    """words: one token per word of the task sets, which must list their words. bytes: one token per byte, for any
    text."""
    family: Annotated[str, Choice(FAMILIES)] = "qwen3"
    """Architecture (docs/MODELS.md)."""
    layers: Annotated[int, Range(1)] = 2
    """Number of decoder layers."""
    hidden: Annotated[int, Range(1)] = 64
    """Width of the hidden states."""
    heads: Annotated[int, Range(1)] = 4
    """Number of attention heads."""
    kv_heads: Annotated[int, Range(1)] = 2
    """Number of key-value heads."""
    head_dim: Annotated[int, Range(1)] = 16
    """Width of one attention head."""
    ffn: Annotated[int, Range(1)] = 192
    """Inner width of the MLP."""
    tie_embeddings: bool = True
    """Use the input embedding as the output head too."""
    max_positions: Annotated[int, Range(2)] = 1024
    """Longest sequence in tokens."""


@dataclass
class ModelSettings:
    path: str = ""
    """A Hugging Face folder (docs/MODELS.md). Empty: the model of `init` is created in the run folder."""
    init: TinyModel | None = None
    """Create this small model with random weights if `path` is empty."""


@dataclass
class ConversationFiles:
    """Files of conversations that the warm start trains on (docs/AGENTS.md)."""

    path: str = ""
    """A file, a folder, or a pattern that names several: JSONL, a JSON list, Parquet or Arrow."""
    weight: Annotated[float, Range(1e-6)] = 1.0
    """Share of this entry in the mixture, relative to the weights of the others."""
    format: Annotated[str, Choice(("", *CONVERSATION_FORMATS))] = ""
    """Format of the files. Empty: told by the columns of their first rows."""
    tool_format: Annotated[str, Choice(("", "qwen3", "tags", "search_r1"))] = ""
    """How calls and answers are written for the model. Empty: as in the task sets (`agent.format`)."""


@dataclass
class WarmStart:
    """Supervised training before RL (`icrl sft`) on conversations from files, or else on the task sets' teachers'
    demonstrations in the three prompt forms."""

    steps: Annotated[int, Range(0)] = 0
    """Number of supervised steps. 0: no warm start, unless `epochs` is given."""
    epochs: Annotated[float | None, Range(1e-6)] = None
    """Passes over the conversations of `data`, in place of `steps`, which is then 0. Null: `steps`."""
    data: list[ConversationFiles] = field(default_factory=list)
    """Conversations to train on. Empty: demonstrations of the task sets' teachers."""
    heldout: str = ""
    """Held-out conversations: a path as in `data.0`, or the fraction of all problems of `data` that is held out, such
    as 0.02. With them, the weights with the lowest held-out loss are exported. Empty: none."""
    heldout_interval: Annotated[int, Range(1)] = 50
    """Steps between measurements of the loss on held-out conversations; also before the first and after the last."""
    patience: Annotated[int | None, Range(1)] = None
    """Training ends after this many measurements in a row without a new lowest held-out loss. Null: never early."""
    max_tokens: Annotated[int | None, Range(2)] = None
    """Largest number of tokens of a conversation. Null: `rollout.context_tokens`."""
    too_long: Annotated[str, Choice(("error", "drop", "cut"))] = "error"
    """What to do with longer conversations. error: end the run before the model is loaded. drop: leave them out and
    count them. cut: train on their first `max_tokens` tokens."""
    bad_rows: Annotated[str, Choice(("error", "drop"))] = "error"
    """What to do with rows of `data` that cannot be trained on, such as a call without an answer. error: end the run
    before the model is loaded. drop: leave them out and count them."""
    episodes_per_step: Annotated[int, Range(1)] = 64
    """Demonstrated episodes, or conversations, per step."""
    learning_rate: Annotated[float, Range(0)] = 3e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Weight decay of AdamW."""
    warmup_steps: Annotated[int, Range(0)] = 20
    """Number of steps in which the learning rate rises linearly to its peak."""
    schedule: Annotated[str, Choice(SCHEDULES)] = "wsd"
    """How the learning rate falls after the warm-up, as in `optim`."""
    decay_steps: Annotated[int | None, Range(1)] = None
    """Number of final steps in which the learning rate falls. Null: all after the warm-up, or half of all with wsd."""
    final_factor: Annotated[float, Range(0, 1)] = 0.1
    """Final learning rate as a fraction of the peak."""

    @property
    def wanted(self) -> bool:
        return self.steps > 0 or self.epochs is not None


@dataclass
class ActorSettings:
    tensor_parallel: Annotated[int, Range(1)] = 1
    """Number of ranks that share each layer."""
    pipeline_parallel: Annotated[int, Range(1)] = 1
    """Number of pipeline stages; each has an equal part of the layers."""
    context_parallel: Annotated[int, Range(1)] = 1
    """Number of ranks that share the tokens of each sequence, for long contexts."""
    sequence_parallel: bool = False
    """Also split activations along the sequence over the tensor-parallel ranks."""
    precision: Annotated[str, Choice(("bf16", "fp32"))] = "bf16"
    """Precision of weights and activations."""
    layers: Annotated[str, Choice(("auto", "transformer_engine", "torch"))] = "auto"
    """Implementation of the layers. auto: Transformer Engine for bf16 on GPUs, otherwise torch."""
    fp8: Annotated[str, Choice(("off", "current", "blockwise"))] = "off"
    """FP8 recipe of Transformer Engine, only on GPUs with FP8. current: one scale per tensor. blockwise: one scale per
    block."""
    recompute: Annotated[str, Choice(("none", "selective", "full"))] = "none"
    """Which activations are recomputed in the backward pass to save memory. selective: those of the attention core.
    full: those of every layer."""
    offload: Annotated[str, Choice(("none", "optimizer", "all"))] = "none"
    """What is moved to CPU memory while episodes are played. optimizer: moments and main weights. all: also
    gradients."""
    micro_batch_tokens: Annotated[int, Range(1)] = 16384
    """Largest number of tokens in a packed micro-batch. A longer sequence gets a micro-batch of its own."""
    head_chunk_tokens: Annotated[int | None, Range(1)] = None
    """Number of loss tokens whose logits are in memory at the same time. Null: chosen for the device."""
    head_backend: Annotated[str, Choice(("auto", "torch", "triton"))] = "auto"
    """Implementation of the output head and the loss. auto: triton on GPUs, torch on CPUs."""
    head_logits: Annotated[str, Choice(("fp32", "bf16"))] = "fp32"
    """Precision in which a chunk's logits are stored. bf16 requires triton and precision=bf16 (docs/KERNEL.md)."""


@dataclass
class OptimSettings:
    learning_rate: Annotated[float, Range(0)] = 1e-6
    """Peak learning rate."""
    beta1: Annotated[float, Range(0, 1 - 1e-9)] = 0.9
    """Adam's decay rate of the first moment."""
    beta2: Annotated[float, Range(0, 1 - 1e-9)] = 0.98
    """Adam's decay rate of the second moment."""
    eps: Annotated[float, Range(0)] = 1e-8
    """Adam's epsilon, added to the denominator."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Weight decay of AdamW."""
    clip_grad: Annotated[float, Range(0)] = 1.0
    """Largest norm of the gradient; a longer gradient is scaled down to it. 0: no clipping."""
    warmup_steps: Annotated[int, Range(0)] = 0
    """Number of steps in which the learning rate rises linearly to its peak."""
    schedule: Annotated[str, Choice(SCHEDULES)] = "constant"
    """How the learning rate falls after the warm-up. wsd: it is constant, and then falls linearly."""
    decay_steps: Annotated[int | None, Range(1)] = None
    """Number of final steps in which the learning rate falls. Null: all after the warm-up, or half of all with wsd."""
    final_factor: Annotated[float, Range(0, 1)] = 0.0
    """Final learning rate as a fraction of the peak."""
    on_collapse: Annotated[str, Choice(("warn", "stop"))] = "warn"
    """What to do if the policy has collapsed, i.e. entropy and gradient norm are both close to 0 and the model no
    longer learns."""


@dataclass
class EvalSettings:
    preset: Annotated[str, Choice(("", "paper"))] = ""
    """paper: sets interval=10, problems=null, samples=1 and rounds=2, as ICRL's published code evaluates. Explicit
    overrides have priority. Empty: none."""
    interval: Annotated[int, Range(0)] = 0
    """Steps between critique-free evaluations on held-out problems. 0: only before and after training."""
    problems: Annotated[int | None, Range(1)] = 64
    """Number of held-out problems of each task source. Null: all."""
    samples: Annotated[int, Range(1)] = 1
    """Episodes per problem, at `rollout.temperature`."""
    rounds: Annotated[int, Range(1)] = 1
    """Attempts per episode. Above 1, the critic of `rollout.critic` critiques a failed attempt, and the next one is
    reported too (docs/EVALUATION.md)."""
    control_problems: Annotated[int, Range(0)] = 128
    """Number of failed attempts that the control report retries with a critique, an empty critique and without either.
    0: no report."""


@dataclass
class TrackerSettings:
    """Experiment trackers in addition to metrics.jsonl and TensorBoard, which are always written."""

    names: Annotated[list[str], Choice(TRACKERS)] = field(default_factory=list)
    """Trackers to use (docs/EXTENDING.md)."""
    project: str = "icrl-megatron"
    """Name of the project in the trackers."""
    run_name: str = ""
    """Name of the run in the trackers. Empty: `name`."""
    group: str = ""
    """Group of the run in the trackers. Empty: none."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in the trackers."""
    offline: bool = False
    """Write tracker data below the run folder and do not use the network."""
    episodes: Annotated[int, Range(0)] = 4
    """Number of attempts and critiques of each step that are logged as a table. 0: none."""
    max_chars: Annotated[int, Range(1)] = 2000
    """Largest number of characters of each text in that table."""


@dataclass
class CheckpointSettings:
    interval: Annotated[int, Range(1)] = 50
    """Steps between checkpoints. The last step is always saved."""
    keep: Annotated[int, Range(1)] = 2
    """Number of newest checkpoints that are kept; older ones are deleted, but not that of the lowest held-out loss."""
    episodes: bool = False
    """Write every episode of a step when it ends, until a checkpoint has the step. A run that is killed then continues
    its rollouts from these episodes, and does not play them again (docs/RELIABILITY.md). With `rollout.staleness`,
    checkpoints have the replies of unfinished groups instead."""


@dataclass
class TelemetrySettings:
    dump: Annotated[str, Choice(("all", "none"), other="a number of at least 1")] = "128"
    """Episodes of each training step that are dumped: for `icrl show`, `icrl report` and debug.mode=from_dump. A number
    means at most that many over all ranks: problems are chosen by a hash, each with its whole group. The default keeps
    all episodes of a batch of the default size, 16 x 8, and a sample of larger ones (docs/EVALUATION.md)."""

    def episodes(self) -> int | None:
        """Largest number of dumped episodes of a step; None: all. Raises ConfigError for any other text."""
        named = {"all": None, "none": 0}
        if self.dump in named:
            return named[self.dump]
        if not (self.dump.isascii() and self.dump.isdecimal() and 0 < int(self.dump[:10]) < 10**9):
            raise ConfigError(
                f"telemetry.dump={self.dump}: must be all, none, or a number of episodes of at least 1, such as 128"
            )
        return int(self.dump)


@dataclass
class DebugSettings:
    mode: Annotated[str, Choice(("train", "rollout_only", "from_dump", "fake_data"))] = "train"
    """train: normal. rollout_only: no updates. from_dump: train on the episodes of an earlier run. fake_data: train on
    random samples."""
    dump: str = ""
    """Folder of the run whose rollouts `from_dump` reads."""

    def generates(self) -> bool:
        """Whether an engine plays episodes."""
        return self.mode not in ("from_dump", "fake_data")


@dataclass
class LaunchSettings:
    ranks: Annotated[int, Range(1)] = 1
    """Processes on each machine. `icrl train` starts them on this machine, unless it already runs as a rank."""
    engine_ranks: Annotated[int, Range(0)] = 0
    """How many of the `ranks` of each machine, the last ones, serve SGLang engines and do not train; each engine has
    `engine.tensor_parallel` of them (docs/ENGINES.md). 0: none."""
    nodes: Annotated[int, Range(1)] = 1
    """Number of machines. If more than one, start the job with slurm/ or `icrl launch`."""
    device: Annotated[str, Choice(("auto", "cpu", "cuda"))] = "auto"
    """Device for training and for the local engine. auto: cuda if there is a GPU, otherwise cpu."""
    timeout_s: Annotated[float, Range(1)] = 1800.0
    """Time limit of a collective operation between ranks, in seconds."""


@dataclass
class DataSettings:
    seed: Annotated[int | None, _SEED] = None
    """Random seed of the order in which problems are drawn. Null: the run's `seed`."""


@dataclass
class Settings:
    """One run. `icrl train RECIPE key=value ...` resolves to one of these, and it is saved with the run."""

    name: str = "run"
    """Name of the run, and of its folder below runs/."""
    run_dir: str = ""
    """Folder for everything that the run writes. Empty: runs/<name>."""
    seed: Annotated[int, _SEED] = 0
    """Random seed of the run: of weights made with `model.init`, and of everything that is sampled."""
    steps: Annotated[int, Range(0)] = 300
    """Number of training steps."""
    max_generated_tokens: Annotated[int | None, Range(1)] = None
    """Training ends after this many generated tokens, for comparisons at equal cost. Null: no limit."""
    baseline: Annotated[str, Choice(("", "grpo"))] = ""
    """Also train this baseline from the same start with the same number of generated tokens, and compare. Empty:
    none."""
    start_from: str = ""
    """Checkpoint of another run from which the run takes its weights and model: step_NNNNNN, a folder of these, or a
    run folder. Data and algorithm may differ. Steps count from 0, and there is no warm start."""
    start_with_moments: bool = False
    """With `start_from`: also load the optimizer's moments and step count."""
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
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    debug: DebugSettings = field(default_factory=DebugSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
