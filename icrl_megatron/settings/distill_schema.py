"""Settings of `icrl distill`: a multi-agent system plays training problems, and its runs become training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.limits import Choice, Range


@dataclass
class DistillEndpoint(Endpoint):
    """The endpoint of the system's agents (`distill.system=endpoint`). Without a url, engine.kind=sglang starts a
    server on model.path for as long as the command runs."""

    timeout_s: Annotated[float, Range(1e-3)] = 120.0
    """Time limit of one request, in seconds."""
    concurrency: Annotated[int, Range(1)] = 32
    """Largest number of requests to one address at the same time."""
    requests_per_minute: Annotated[float | None, Range(1e-3)] = None
    """Largest number of requests to one address in a minute, retries included. Null: no limit."""
    temperature: Annotated[float, Range(0)] = 1.0
    """Sampling temperature."""
    max_tokens: Annotated[int, Range(1)] = 2048
    """Largest number of tokens of one reply."""
    read_price: Annotated[float, Range(0)] = 0.0
    """Price of a million tokens of prompts, in any currency. With a price, the report has the cost of the attempts."""
    written_price: Annotated[float, Range(0)] = 0.0
    """Price of a million tokens of replies."""


@dataclass
class SystemAgent:
    """One agent of an endpoint system. planner, reflector, answerer and verifier always exist."""

    name: str = ""
    """planner, reflector, answerer or verifier, to change that one; any other name adds an agent that gets jobs."""
    tools: list[str] = field(default_factory=list)
    """Tools of the task set that it may call, if it gets jobs. Empty: all."""
    about: str = ""
    """What the planner is told about it. Only for agents that get jobs."""
    prompt: str = ""
    """File with its instructions. Empty: the built-in ones."""
    model: str = ""
    """Name of its model. Empty: distill.endpoint.model."""
    url: str = ""
    """Address of its server. Empty: distill.endpoint.url."""
    read_price: Annotated[float | None, Range(0)] = None
    """Price of a million tokens that its model reads. Null: distill.endpoint.read_price."""
    written_price: Annotated[float | None, Range(0)] = None
    """Price of a million tokens that its model writes. Null: distill.endpoint.written_price."""


FILTERS = (
    "correctness", "complexity", "format", "length", "redundancy", "leakage", "duplicates", "reflection", "correction",
)  # fmt: skip
"""Functions of distill/filters.py, in the order in which they apply."""


@dataclass
class DistillFilters:
    """Which trajectories are kept, and how often (docs/AGENTS.md)."""

    leave_out: Annotated[list[str], Choice(FILTERS)] = field(default_factory=list)
    """Filters that are not applied."""
    min_interactions: Annotated[int, Range(0)] = 5
    """complexity: trajectories with fewer texts, calls and answers are dropped."""
    max_chars: Annotated[int, Range(1)] = 60000
    """length: longer trajectories are dropped; problem and observations count."""
    max_repeats: Annotated[int, Range(0)] = 0
    """redundancy: trajectories that repeat more calls with the same answer are dropped."""
    leakage_similarity: Annotated[float, Range(0.5, 1)] = 0.7
    """leakage: a problem is nearly a held-out one from this share of common runs of three words."""
    duplicate_similarity: Annotated[float, Range(0.5, 1)] = 0.9
    """duplicates: the same for two trajectories, of which the later one is dropped."""
    keep_without_reflection: Annotated[float, Range(0, 1)] = 0.5
    """reflection: share that is kept of the trajectories without a reflection or check."""
    correction_copies: Annotated[int, Range(1, 100)] = 2
    """correction: how often a trajectory appears in which a low check led to another, right answer."""


@dataclass
class DistillSettings:
    system: Annotated[str, Choice(("scripted", "endpoint", "model"))] = "scripted"
    """scripted: agents without a model, only for Archive. endpoint: models behind `distill.endpoint`. model: only
    `model.path`, as the solver of `rollout.rounds` attempts and as the critic between them."""
    endpoint: DistillEndpoint = field(default_factory=DistillEndpoint)
    agents: list[SystemAgent] = field(default_factory=list)
    """Agents of an endpoint system that differ from the built-in ones. Without an agent of another name than the four
    roles, one called worker has all tools."""
    attempts: Annotated[int, Range(1)] = 4
    """Attempts of the system at each training problem."""
    rounds: Annotated[int, Range(1, 16)] = 3
    """Largest number of plans for one problem. No reflection or check follows the last one."""
    job_calls: Annotated[int, Range(1)] = 8
    """Largest number of tool calls in one job of a plan."""
    tries: Annotated[int, Range(1, 16)] = 3
    """Replies of an agent until one can be read. After them, the attempt has failed."""
    concurrency: Annotated[int, Range(1, 4096)] = 16
    """Largest number of attempts at the same time."""
    task_timeout_s: Annotated[float, Range(1e-3)] = 900.0
    """Time limit of one attempt, in seconds."""
    filters: DistillFilters = field(default_factory=DistillFilters)
