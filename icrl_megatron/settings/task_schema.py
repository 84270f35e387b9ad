"""Settings of the task sets: where problems come from, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from icrl_megatron.settings.limits import Choice, Range


@dataclass
class TaskData:
    """Where a task set that is not embedded finds its problems and its helpers; docs/TASKS.md shows each in use."""

    train: list[str] = field(default_factory=list)
    """Files of training rows: JSONL, Parquet, or a folder of a Hugging Face dataset; a pattern names several. Task sets
    behind servers also take ranges of task ids, e.g. 0:2420; alfworld also takes folders of games."""
    heldout: list[str] = field(default_factory=list)
    """The same for held-out rows, one subset per entry; no row may also be a training row."""
    prompt_column: str = "prompt"
    """Column of the rows that contains the problem."""
    label_column: str = "label"
    """Column of the rows that contains the correct answer."""
    numeric_tolerance: Annotated[float, Range(0, 1e6)] = 0.0
    """math, code: relative error at which two plain numbers are still equal; labels that were rounded need one, e.g.
    0.01."""
    grading_workers: Annotated[int, Range(1, 1e6)] = 2
    """math, reasoning_gym, code, alfworld from a folder: processes of each rank that judge answers or play games; one
    that hangs is killed."""
    grading_timeout_s: Annotated[float, Range(0.01, 1e6)] = 5.0
    """CPU seconds that judging an answer may cost; code: that each of its tests may."""
    program_memory_mib: Annotated[int, Range(64, 1e6)] = 512
    """code: memory of a program."""
    servers: list[str] = field(default_factory=list)
    """alfworld, webshop, sciworld, babyai, textcraft: URLs of AgentGym servers; searchqa: of retrievers."""
    request_timeout_s: Annotated[float, Range(1e-3)] = 60.0
    """Deadline of one call to a server, retries not counted."""
    corpus: str = ""
    """searchqa: JSONL of documents for the built-in retriever, in place of servers."""
    passages: Annotated[int, Range(1)] = 3
    """searchqa: documents shown for a search."""


@dataclass
class TaskServers:
    """Environment servers that the run starts beside itself, waits for, watches and ends with itself (docs/TASKS.md).
    Their addresses become the source's `data.servers`; where those are given, nothing is started."""

    command: str = ""
    """What a shell starts one server with; empty: none. {port} stands for its port, and {host} for the address that it
    listens on: 127.0.0.1, or 0.0.0.0 where the job has several nodes. E.g. alfworld --host {host} --port {port}."""
    count: Annotated[int, Range(1)] = 1
    """Servers, each with a port of its own."""
    port: Annotated[int, Range(0, 65535)] = 0
    """Of the first one, the others follow; 0: any free ones."""
    health: str = "/"
    """A server is ready when it answers this path with anything but a server error."""
    startup_timeout_s: Annotated[float, Range(1e-3)] = 600.0
    """One that does not answer by then ends the run."""


@dataclass
class JudgeEndpoint:
    """A model behind an OpenAI-compatible endpoint that judges answers (`agent.judge=model`)."""

    url: str = ""
    """Base URL of the server, without /chat/completions, e.g. http://host:8000/v1."""
    model: str = ""
    """Name of the model in the requests."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that contains the API key. It may be unset if the server needs no key."""
    timeout_s: Annotated[float, Range(1e-3)] = 12.0
    """Time limit of one request, in seconds. With up to three retries it must fit rollout.environment_timeout_s."""
    concurrency: Annotated[int, Range(1)] = 32
    """Largest number of requests of a rank at the same time."""


@dataclass
class AgentSettings:
    """Task sets that are solved with tools (docs/AGENTS.md)."""

    format: Annotated[str, Choice(("qwen3", "tags", "search_r1"))] = "qwen3"
    """How calls and answers are written. qwen3: the chat template's tool calls and tool messages. tags: inline tags, as
    in Chain-of-Agents. search_r1: Search-R1's inline tags. Archive always uses tags."""
    tools: list[str] = field(default_factory=list)
    """math: python and calculator, in several turns. Empty: one reply without tools."""
    python_state: bool = False
    """math with python: keep the variables of an attempt's earlier programs."""
    judge: Annotated[str, Choice(("", "exact", "f1", "math", "model"))] = ""
    """Who grades an answer. exact: normalized text. f1: overlap of words. math: numbers and formulas. model:
    `endpoint`. Empty: the task set's own, exact for searchqa and math for math."""
    answer_chars: Annotated[int, Range(1)] = 4000
    """A judge reads at most this many characters of an answer."""
    grammar: Annotated[str, Choice(("calls", "multi_hop", "web", "code"))] = "calls"
    """Which tag may follow which; calls: only calls and answers are read. Logged as task/format."""
    reward: Annotated[str, Choice(("answer", "answer_times_format"))] = "answer"
    """answer_times_format: an attempt that breaks the grammar has reward 0."""
    endpoint: JudgeEndpoint = field(default_factory=JudgeEndpoint)


@dataclass
class PlannedAttempt:
    """What `icrl plan` expects of an attempt. 0: its own assumption about the task set (docs/PLANNER.md). Runs do not
    read it."""

    prompt_tokens: Annotated[float, Range(0)] = 0.0
    """Tokens of the first prompt."""
    reply_tokens: Annotated[float, Range(0)] = 0.0
    """Mean number of tokens of a reply."""
    observation_tokens: Annotated[float, Range(0)] = 0.0
    """Mean number of tokens of an observation."""
    calls: Annotated[float, Range(0)] = 0.0
    """Mean number of tool calls of an attempt, each in a turn of its own. The answer takes one more turn."""
    call_s: Annotated[float, Range(0)] = 0.0
    """Mean time of a tool call, in seconds. With `calls`, 0 means no time."""


@dataclass
class TaskSource:
    name: str = "rulebook_hard"
    """A task set (docs/TASKS.md)."""
    weight: Annotated[float, Range(1e-6)] = 1.0
    """Share of this source in the mixture, relative to the weights of the others."""
    data: TaskData = field(default_factory=TaskData)
    serve: TaskServers = field(default_factory=TaskServers)
    agent: AgentSettings = field(default_factory=AgentSettings)
    plan: PlannedAttempt = field(default_factory=PlannedAttempt)

    @property
    def served(self) -> bool:
        """Whether servers are started for it."""
        return bool(self.serve.command) and not self.data.servers


@dataclass
class ToolCacheSettings:
    """Answers of tools that are kept in one SQLite file (docs/TASKS.md)."""

    mode: Annotated[str, Choice(("off", "read_write", "replay"))] = "off"
    """replay: only answers of the file, at any age; a call that it does not have costs its episode. A run whose answers
    are all in the file needs no network."""
    path: str = ""
    """The file, on a local disk of each node. Several runs may use it at the same time."""
    expiry_s: Annotated[float | None, Range(0)] = None
    """Older answers are asked for again, in seconds. Null: never."""
    max_mib: Annotated[int, Range(1)] = 4096
    """Size at which the file takes no more answers, in MiB."""


@dataclass
class TaskSettings:
    sources: list[TaskSource] = field(default_factory=lambda: [TaskSource()])
    """Mixture the training tasks are drawn from."""
    limit: Annotated[int | None, Range(1)] = None
    """Use only this many training problems of each source, the first ones. Null: all."""
    curriculum: bool = False
    """Draw problems according to their recent success: those that always or never succeed are drawn less often. False:
    each problem in turn."""
    curriculum_floor: Annotated[float, Range(0, 1)] = 0.1
    """With a curriculum: the weight of a problem that always or never succeeds. An unseen problem has weight 1."""
    too_long: Annotated[str, Choice(("error", "drop"))] = "error"
    """What to do with problems whose prompt does not fit into rollout.context_tokens. error: end the run with a list of
    them before the model is loaded. drop: leave them out and count them."""
    tool_cache: ToolCacheSettings = field(default_factory=ToolCacheSettings)


PORT = "{port}"
"""In `serve.command`: the port that the server has to listen on."""
