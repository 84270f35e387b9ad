"""The sections of task sets' options: `data`, `serve`, `agent`, `reward` and `judge`. `task_options.py` says which task
set has which.

A section that shares an option with others, under the same name, takes it from a common base class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.limits import Choice, Range
from icrl_megatron.settings.tool_schema import TOOLS, McpTools, PageTool

PORT = "{port}"
"""In `serve.command`: the port that the server has to listen on."""


SHAPES = ("gaia", "browsecomp", "hle", "webwalker", "livecodebench", "humaneval", "mbpp", "apps", "kodcode")
"""Functions of tasks/row_shapes.py and tasks/program_rows.py."""


# `data`: where a task set finds its problems and its helpers (docs/TASKS.md)


@dataclass
class TrainAndHeldout:
    train: list[str] = field(default_factory=list)
    """Where the training problems are."""
    heldout: list[str] = field(default_factory=list)
    """The same for held-out problems, one subset per entry; none may also be a training problem."""

    def of(self, split: str) -> list[str]:
        return self.train if split == "train" else self.heldout


@dataclass
class Rows(TrainAndHeldout):
    train: list[str] = field(default_factory=list)
    """Files of training rows: JSONL, Parquet, or a folder of a Hugging Face dataset; a pattern names several."""
    prompt_column: str = "prompt"
    """Column of the rows that contains the problem, as a dotted path. Where neither column is set and the rows lack
    these two, common columns are recognized (docs/TASKS.md)."""
    label_column: str = "label"
    """Column of the rows that contains the correct answer, such as reward_model.ground_truth."""
    heldout_prompt_column: str = ""
    """The same for held-out rows. Empty: prompt_column."""
    heldout_label_column: str = ""
    """The same for held-out rows. Empty: label_column."""
    subset_column: str = ""
    """Column by which results are reported, within each file. Empty: by file."""
    system: Annotated[str, Choice(("message", "join"))] = "message"
    """What becomes of a row's system messages. message: the system message of the solver's prompts. join: the first
    paragraph of the problem, for models whose chat template has no system messages."""
    duplicates: Annotated[str, Choice(("error", "drop"))] = "error"
    """What to do with rows that repeat the prompt of an earlier row of their split. error: end with their number. drop:
    leave them out and count them."""
    shape: Annotated[str, Choice(("", *SHAPES))] = ""
    """Rows of a published question set, in its own columns. Empty: prompt_column and label_column."""
    unusable: Annotated[str, Choice(("error", "drop"))] = "error"
    """With shape: what to do with rows that need an attached file or an image, or whose answer is hidden. error: end
    with the first of them. drop: leave them out and count them."""


@dataclass
class Grading:
    grading_workers: Annotated[int, Range(1, 1e6)] = 2
    """Processes of each rank that judge answers; one that hangs is killed."""
    grading_timeout_s: Annotated[float, Range(0.01, 1e6)] = 5.0
    """CPU seconds that judging an answer may cost; for code, each of its tests, and for tools, a program."""


@dataclass
class NumberGrading(Grading):
    numeric_tolerance: Annotated[float, Range(0, 1e6)] = 0.0
    """Relative error at which two plain numbers are still equal; labels that were rounded need one, e.g. 0.01."""


@dataclass
class FamilyData(Grading, TrainAndHeldout):
    train: list[str] = field(default_factory=list)
    """Families of training problems, family:problems:seed or family:problems:seed:level."""


@dataclass
class ServerData(TrainAndHeldout):
    train: list[str] = field(default_factory=list)
    """Training problems: ranges of task ids, e.g. 0:2420, or JSONL files of rows with a task_id."""
    servers: list[str] = field(default_factory=list)
    """URLs of servers that are already running."""
    request_timeout_s: Annotated[float, Range(1e-3)] = 14.0
    """Deadline of one call to a server. Four tries must fit rollout.environment_timeout_s."""


@dataclass
class GameData(ServerData):
    train: list[str] = field(default_factory=list)
    """Training games: folders, or as for other servers ranges of task ids or JSONL files of rows with a task_id."""
    request_timeout_s: Annotated[float, Range(1e-3)] = 14.0
    """Deadline of one call to a server or a process with games. Four tries at a server must fit
    rollout.environment_timeout_s."""
    grading_workers: Annotated[int, Range(1, 1e6)] = 2
    """Processes of each rank that play the games of folders; one that hangs is killed."""


@dataclass
class VerifiersData(TrainAndHeldout):
    train: list[str] = field(default_factory=list)
    """Training problems: ranges of rows of the environment's dataset, e.g. 0:900. Empty: all."""
    heldout: list[str] = field(default_factory=list)
    """Held-out problems: ranges of rows of its evaluation dataset, one subset per entry. Empty: all."""
    environment: str = ""
    """Its id, as for verifiers.load_environment; or module:NAME of a function or class that makes it. With verifiers
    0.4 the id of a taskset."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment. With verifiers 0.4 its settings, {taskset: {...}}."""
    python: str = ""
    """The Python interpreter in which the environment is installed. Empty: this one."""
    max_turns: Annotated[int, Range(1)] = 10
    """An attempt is scored after this many replies, if its environment has not ended it before."""
    grading_workers: Annotated[int, Range(1, 1e6)] = 2
    """Processes of each rank that run the environment; one that hangs is killed."""
    request_timeout_s: Annotated[float, Range(1e-3)] = 30.0
    """Seconds that a step of the environment may take, with its scoring."""


@dataclass
class OpenEnvData(ServerData):
    train: list[str] = field(default_factory=list)
    """Training problems: ranges of seeds, e.g. 0:900, or JSONL files whose rows are arguments of reset."""
    reset: dict[str, Any] = field(default_factory=dict)
    """Further arguments of reset, the same for all problems."""
    fields: list[str] = field(default_factory=list)
    """Fields of observations that the model reads. Empty: all."""
    max_turns: Annotated[int, Range(1)] = 10
    """Replies of an attempt."""


@dataclass
class ToolData(NumberGrading, Rows, ServerData):
    train: list[str] = field(default_factory=list)
    """Files of training rows: JSONL, Parquet, or a folder of a Hugging Face dataset; a pattern names several."""
    servers: list[str] = field(default_factory=list)
    """With search: URLs of retrievers that are already running."""
    corpus: str = ""
    """With search: JSONL of documents for the built-in retriever, in place of servers."""
    passages: Annotated[int, Range(1)] = 3
    """With search: documents shown for a search."""
    program_memory_mib: Annotated[int, Range(64, 1e6)] = 512
    """Memory of a program in the sandbox."""


@dataclass
class SearchData(ToolData):
    train: list[str] = field(default_factory=list)
    """Files of training rows, as for math; or ranges of task ids of AgentGym's server, which then judges answers."""
    servers: list[str] = field(default_factory=list)
    """URLs of retrievers that are already running; with ranges of task ids, of AgentGym's servers."""


# `serve`: environment servers


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


# `agent`: how a task set is solved with tools (docs/AGENTS.md)


@dataclass
class Answers:
    answer_chars: Annotated[int, Range(1)] = 4000
    """A judge reads at most this many characters of an answer. A program is read as a whole."""
    grammar: Annotated[str, Choice(("calls", "multi_hop", "web", "code"))] = "calls"
    """Which tag may follow which; calls: only calls and answers are read. Logged as task/format."""
    reward: Annotated[str, Choice(("answer", "answer_times_format"))] = "answer"
    """With answer_times_format, an attempt that breaks the grammar has reward 0."""


@dataclass
class CallFormat:
    format: Annotated[str, Choice(("qwen3", "tags", "search_r1"))] = "qwen3"
    """How calls and answers are written. qwen3: the chat template's tool calls and tool messages. tags: inline tags, as
    in Chain-of-Agents. search_r1: Search-R1's inline tags."""


@dataclass
class Calls(CallFormat, Answers):
    """How a task set's own tools are called, and its answers graded."""


@dataclass
class ToolAgent(Calls):
    tools: Annotated[list[str], Choice(TOOLS)] = field(default_factory=list)
    """Tools to solve problems with, in several turns. Empty: replies without tools; for searchqa, search."""
    python_state: bool = False
    """With python: keep the variables of an attempt's earlier programs."""
    page: PageTool = field(default_factory=PageTool)
    mcp: list[McpTools] = field(default_factory=list)


@dataclass
class SearchAgent(ToolAgent):
    judge: Annotated[str, Choice(("exact", "f1", "math", "model", "tests"))] = "exact"
    """Who grades an answer. exact: normalized text. f1: overlap of words. math: numbers and formulas. model:
    `endpoint`. tests: the label's tests, run on a program as for code."""
    endpoint: Endpoint = field(default_factory=lambda: Endpoint(timeout_s=12.0))


# `reward` and `options`: environments of packages, and a user's own reward or task set (docs/TASKS.md)


@dataclass
class MoreReward:
    name: str = ""
    """Another reward: a function, FILE.py:NAME or package.module:NAME, or a judge, FILE.jinja:NAME."""
    weight: Annotated[float, Range(1e-6)] = 1.0
    """Its weight; that of the reward that names the task set is 1."""


@dataclass
class RewardRange:
    low: Annotated[float, Range(-1e9, 1e9)] = 0.0
    """Lowest reward; it becomes 0."""
    high: Annotated[float, Range(-1e9, 1e9)] = 1.0
    """Highest reward; it becomes 1. A reward that is out of range costs its episode."""
    success: Annotated[float, Range(0, 1)] = 1.0
    """An attempt with at least this reward, on the scale from 0 to 1, is a success."""


@dataclass
class StepReward(RewardRange):
    of: Annotated[str, Choice(("sum", "last"))] = "sum"
    """The reward of an attempt: the sum over its steps, or that of its last step."""


@dataclass
class OwnReward(RewardRange):
    more: list[MoreReward] = field(default_factory=list)
    """More rewards: functions and judges. The reward is the weighted mean of all."""
    workers: Annotated[int, Range(1, 1e6)] = 2
    """Processes of each rank that call the functions; one that hangs is killed."""
    timeout_s: Annotated[float, Range(0.01, 1e6)] = 30.0
    """Seconds that all functions together may take for one reply; after that, its episode is dropped."""


@dataclass
class RewardJudge:
    """The model that answers the prompts FILE.jinja:NAME among the rewards, and ends with "Score: NUMBER"."""

    engine: Annotated[str, Choice(("endpoint", "solver", "frozen"))] = "endpoint"
    """Who answers. endpoint: judge.endpoint. solver: the run's own engine, with its current weights. frozen: the engine
    of the frozen critic (rollout.critic=frozen)."""
    endpoint: Endpoint = field(default_factory=lambda: Endpoint(timeout_s=12.0))
    low: Annotated[float, Range(-1e9, 1e9)] = 0.0
    """Lowest score that the prompts ask for; it becomes 0."""
    high: Annotated[float, Range(-1e9, 1e9)] = 10.0
    """Highest score; it becomes 1. Any other number is not a score."""
    tries: Annotated[int, Range(1, 100)] = 2
    """Replies without a score until the episode is dropped."""
    max_tokens: Annotated[int, Range(1)] = 1024
    """Longest reply of the judge, its reasoning included."""
    temperature: Annotated[float, Range(0, 100)] = 0.0
    """Sampling temperature of the judge."""
