"""Settings of the task sets: where problems come from, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TaskData:
    """Where a task set that is not embedded finds its problems and its helpers; docs/TASKS.md shows each in use."""

    train: list[str] = field(default_factory=list)
    """Files of training rows: JSONL, Parquet, or a folder of a Hugging Face dataset; a pattern names several. Task sets
    behind servers also take ranges of task ids, e.g. 0:2420; alfworld also takes folders of games."""
    heldout: list[str] = field(default_factory=list)
    """The same for held-out rows, one subset per entry; no row may also be a training row."""
    prompt_column: str = "prompt"
    label_column: str = "label"
    numeric_tolerance: float = 0.0
    """math, code: relative error at which two plain numbers are still equal; labels that were rounded need one, e.g.
    0.01."""
    grading_workers: int = 2
    """math, reasoning_gym, code, alfworld from a folder: processes of each rank that judge answers or play games; one
    that hangs is killed."""
    grading_timeout_s: float = 5.0
    """CPU seconds that judging an answer may cost; code: that each of its tests may."""
    program_memory_mib: int = 512
    """code: memory of a program."""
    servers: list[str] = field(default_factory=list)
    """alfworld, webshop, sciworld, babyai, textcraft: URLs of AgentGym servers; searchqa: of retrievers."""
    request_timeout_s: float = 60.0
    """Deadline of one call to a server, retries not counted."""
    corpus: str = ""
    """searchqa: JSONL of documents for the built-in retriever, in place of servers."""
    passages: int = 3
    """searchqa: documents shown for a search."""


@dataclass
class TaskServers:
    """Environment servers that the run starts beside itself, waits for, watches and ends with itself (docs/TASKS.md).
    Their addresses become the source's `data.servers`; where those are given, nothing is started."""

    command: str = ""
    """What a shell starts one server with; empty: none. {port} stands for its port, and {host} for the address that it
    listens on: 127.0.0.1, or 0.0.0.0 where the job has several nodes. E.g. alfworld --host {host} --port {port}."""
    count: int = 1
    """Servers, each with a port of its own."""
    port: int = 0
    """Of the first one, the others follow; 0: any free ones."""
    health: str = "/"
    """A server is ready when it answers this path with anything but a server error."""
    startup_timeout_s: float = 600.0
    """One that does not answer by then ends the run."""


@dataclass
class JudgeEndpoint:
    """A model behind an OpenAI-compatible endpoint that judges answers (`agent.judge=model`)."""

    url: str = ""
    """Up to and without /chat/completions, e.g. http://host:8000/v1."""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; a server that wants none needs none."""
    timeout_s: float = 12.0
    """Of one request; up to three retries. All together must end within rollout.environment_timeout_s."""
    concurrency: int = 32
    """Requests in flight of each rank."""


@dataclass
class AgentSettings:
    """Task sets that are solved with tools: how an attempt is judged (docs/TASKS.md)."""

    judge: str = "exact"
    """exact | f1 (overlap of words) | math (numbers and formulas) | model (`endpoint`); archive has only exact."""
    answer_chars: int = 4000
    """A judge reads at most this many characters of an answer."""
    grammar: str = "calls"
    """Which tag may follow which: calls (only calls and answers are read) | multi_hop | web | code. Kept or not is
    logged as task/format."""
    reward: str = "answer"
    """answer | answer_times_format: an attempt that breaks the grammar has reward 0."""
    max_calls: int | None = None
    """Calls of an attempt, failed ones included. The next one is answered with "no calls left"; one more ends the
    attempt. Null: no limit besides the turns."""
    endpoint: JudgeEndpoint = field(default_factory=JudgeEndpoint)


@dataclass
class TaskSource:
    name: str = "rulebook_hard"
    weight: float = 1.0
    data: TaskData = field(default_factory=TaskData)
    serve: TaskServers = field(default_factory=TaskServers)
    agent: AgentSettings = field(default_factory=AgentSettings)

    @property
    def served(self) -> bool:
        """Whether servers are started for it."""
        return bool(self.serve.command) and not self.data.servers


@dataclass
class TaskSettings:
    sources: list[TaskSource] = field(default_factory=lambda: [TaskSource()])
    """Mixture the training tasks are drawn from."""
    limit: int | None = None
    """At most this many training problems of each source (the first ones)."""
    curriculum: bool = False
    """Draw problems by their recent success: what always or never succeeds comes less often. Off: each in its turn."""
    curriculum_floor: float = 0.1
    """With a curriculum: the weight of what always or never succeeds, where an unseen problem has 1."""
    too_long: str = "error"
    """What to do with a training or held-out problem whose prompt does not fit rollout.context_tokens: error (names the
    rows before the model is loaded) | drop (leaves them out and counts them)."""


PORT = "{port}"
"""In `serve.command`: the port that the server has to listen on."""
