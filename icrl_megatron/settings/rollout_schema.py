"""Settings of generation: how episodes are played (`rollout`), and the engine that generates tokens (`engine`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.limits import Choice, Range

ENGINE_KINDS = ("local", "sglang")
"""Modules engines/<name>_kind.py."""
TEMPLATES = ("standard", "compact", "paper")
"""Prompt templates that come with the package."""


@dataclass
class TurnStage:
    """A limit on the turns of an attempt for the first steps of training."""

    until_step: Annotated[int, Range(1)] = 1
    """Last step with this limit, counted from 1."""
    turns: Annotated[int, Range(1)] = 1
    """Largest number of turns of an attempt in these steps. After the last stage, `rollout.max_turns` applies
    (ScalingInter-RL, docs/BASELINES.md)."""


@dataclass
class RolloutSettings:
    tasks_per_step: Annotated[int, Range(1)] = 16
    """Tasks per step (B)."""
    episodes_per_task: Annotated[int, Range(1)] = 8
    """Episodes per task and step (G)."""
    rounds: Annotated[int, Range(1)] = 2
    """Attempts per episode (K). With 1, the algorithm is plain GRPO."""
    critic: Annotated[str, Choice(("self", "frozen", "external", "empty"))] = "self"
    """Who writes critiques. self: the trained model. frozen: the starting weights, never trained. external:
    `rollout.external`. empty: no critic; the critique is empty text (a control)."""
    external: Endpoint = field(default_factory=Endpoint)
    temperature: Annotated[float, Range(1e-3)] = 1.0
    """Sampling temperature. `icrl eval` also accepts 0, greedy decoding."""
    max_turn_tokens: Annotated[int | None, Range(1)] = 2048
    """Largest number of tokens generated in one turn of an attempt. Null: what is left of `context_tokens`."""
    parse_truncated: bool = False
    """A reply that was cut off at `max_turn_tokens` or `context_tokens` is read for its action or answer like a whole
    one. False: such a reply ends the attempt without one."""
    max_critique_tokens: Annotated[int, Range(1)] = 1024
    """Largest number of tokens generated for one critique."""
    max_turns: Annotated[int, Range(1)] = 30
    """Largest number of turns of an attempt. An environment may set a lower limit."""
    max_calls: Annotated[int | None, Range(0)] = None
    """Largest number of tool calls of an attempt; after them it is asked for its answer. Null: no limit."""
    call_cost: Annotated[float, Range(0, 1)] = 0.0
    """Subtracted from the reward of an attempt for each of its tool calls; a reward never falls below 0."""
    token_cost: Annotated[float, Range(0, 1)] = 0.0
    """Subtracted from the reward of an attempt for each token that the solver generates."""
    repeat_limit: Annotated[int, Range(2)] = 3
    """An attempt ends when the same action occurs this many times in a row."""
    repeats_over_invalid: bool = False
    """A turn without a valid action neither adds to these repeats nor resets them (reference). False: it resets
    them."""
    context_tokens: Annotated[int, Range(2)] = 16384
    """Largest number of tokens of prompt and response together."""
    observation_chars: Annotated[int, Range(1)] = 800
    """Largest number of characters of an observation in the critic's prompt; the rest is cut."""
    templates: Annotated[
        str, Choice(TEMPLATES, other="a folder with attempt.jinja, revision.jinja and critique.jinja")
    ] = "standard"
    """Prompt templates (docs/TASKS.md)."""
    chat_template_args: dict[str, bool | str] = field(default_factory=dict)
    """Arguments for the tokenizer's chat template."""
    thinking: Annotated[str, Choice(("auto", "on", "off"))] = "auto"
    """Whether replies begin with a thought, as the template's argument enable_thinking. auto: the template's own
    default (docs/TASKS.md)."""
    environment_timeout_s: Annotated[float, Range(1e-3)] = 60.0
    """Time limit of one call of an environment (reset, step, parse or grading), in seconds. The episode of a call that
    takes longer is dropped."""
    max_observation_bytes: Annotated[int, Range(1024)] = 4 << 20
    """Largest number of bytes read from one answer of an environment or its server; the rest is cut and counted."""
    max_observation_tokens: Annotated[int, Range(16)] = 8192
    """Largest number of tokens of one observation in the context; the rest is cut and counted."""
    concurrency: Annotated[int, Range(1)] = 512
    """Largest number of episodes played at the same time per engine."""
    oversample: Annotated[float, Range(1, 16)] = 1.0
    """Start this many times `tasks_per_step` tasks, and interrupt the slowest when enough groups are complete. Tasks
    with short episodes are then trained more often."""
    partial: bool = False
    """Continue interrupted episodes in the next step. Their earlier tokens keep the log-probs they were sampled with,
    and algo.mismatch_correction weights them. Checkpoints include interrupted episodes."""
    staleness: Annotated[int, Range(0, 64)] = 0
    """Rollouts run at the same time as training, and a group may have begun up to this many steps before the step that
    trains on it (docs/ASYNC.md). Needs `algo.mismatch_correction`. 0: a step's episodes are played before it is
    trained."""
    interleave: bool = False
    """With `staleness`, for engines on the actor's GPUs: they sleep while a step is trained, and unfinished episodes
    continue afterwards (docs/ASYNC.md)."""
    turn_stages: list[TurnStage] = field(default_factory=list)
    """Lower limits than `max_turns` for the first steps of training, in order, e.g. [{until_step: 100, turns: 10},
    {until_step: 200, turns: 20}] (ScalingInter-RL, docs/BASELINES.md). Evaluations use `max_turns`. Empty: none."""

    def turns_at(self, step: int) -> int:
        """Largest number of turns of an attempt in the training step that is played after `step` completed ones."""
        staged = next((stage.turns for stage in self.turn_stages if step < stage.until_step), self.max_turns)
        return min(staged, self.max_turns)

    def longest_turn(self) -> int:
        """An upper bound on the tokens generated in one turn."""
        return self.context_tokens if self.max_turn_tokens is None else self.max_turn_tokens


@dataclass
class MismatchLimit:
    """Largest accepted |log pi_train - log pi_engine| of a step under the same prompt. Null: the default for
    `actor.precision` (docs/ENGINES.md says how it was measured)."""

    mean: Annotated[float | None, Range(0)] = None
    """Limit on the mean of |log pi_train - log pi_engine| over a step's loss tokens, in nats. Null: the default for
    `actor.precision`."""
    largest: Annotated[float | None, Range(0)] = None
    """Limit on |log pi_train - log pi_engine| of any single token, in nats. Null: the default for `actor.precision`."""
    patience: Annotated[int | None, Range(1)] = None
    """The run stops after this many steps in a row above a limit; each of them logs a warning. Null: 1 in fp32, 3 in
    bf16."""


@dataclass
class EngineSettings:
    kind: Annotated[str, Choice(ENGINE_KINDS, other="package.module:OBJECT")] = "local"
    """local: transformers in the rank's own process. sglang: SGLang servers (docs/ENGINES.md). docs/EXTENDING.md
    explains how to write your own."""
    tensor_parallel: Annotated[int, Range(1)] = 1
    """GPUs per SGLang server that the run starts."""
    servers: Annotated[int | None, Range(1)] = None
    """Number of SGLang servers that the run starts. Null: one per `tensor_parallel` ranks."""
    urls: list[str] = field(default_factory=list)
    """Addresses of external SGLang servers (http://host:port). If given, the run starts none."""
    api_key_env: str = ""
    """Name of the environment variable that contains the API key of the servers in `urls`. Empty: they need no key.
    Servers that the run starts get a generated key each."""
    python: str = ""
    """Python interpreter with SGLang. Empty: the trainer's own."""
    server_args: list[str] = field(default_factory=list)
    """Additional arguments for sglang.launch_server, passed on unchanged."""
    quantization: Annotated[str, Choice(("", "fp8"))] = ""
    """fp8: the engine quantizes the weights that it receives. Empty: the weights keep the actor's precision."""
    memory_fraction: Annotated[float, Range(0.01, 0.99)] = 0.7
    """Fraction of a GPU's memory for the engine's weights and KV cache. The server of a frozen critic gets half of
    it."""
    kv_tokens: Annotated[int | None, Range(1)] = None
    """Capacity of the KV cache in tokens. Null: as many as fit on a GPU, or 65536 on CPUs."""
    sync: Annotated[str, Choice(("full", "delta"))] = "full"
    """What the servers of `urls` and `launch.engine_ranks` are sent after each step. full: all weights. delta: the bits
    that changed, which a server of `urls` must be able to add (docs/ENGINES.md)."""
    keep_cache: bool = False
    """With `rollout.staleness`: SGLang keeps its prefix cache when the weights change. An interrupted request
    continues without reading its tokens again, but from keys and values of older weights (docs/ASYNC.md)."""
    bucket_mib: Annotated[int, Range(1)] = 512
    """Size in MiB of the buffer through which weights are sent; it is larger if one tensor needs more. There are two
    buffers if all weights do not fit into one."""
    startup_timeout_s: Annotated[float, Range(1e-3)] = 600.0
    """The run ends if a server is not ready after this many seconds."""
    sync_timeout_s: Annotated[float, Range(1e-3)] = 600.0
    """Time limit of the answer to one buffer of weights, in seconds."""
    allow_untested: bool = False
    """Accept versions of SGLang other than the tested ones."""
    max_batch: Annotated[int, Range(1)] = 256
    """Largest number of sequences decoded together, and of requests at the same time."""
    mismatch_limit: MismatchLimit = field(default_factory=MismatchLimit)
    request_timeout_s: Annotated[float, Range(1e-3)] = 600.0
    """Time limit of one request, in seconds. After it, the local engine fails; SGLang aborts the request and keeps the
    tokens generated so far."""
