"""The messages between a rank and its rollout process (`channel.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from icrl_megatron.distributed.grid import Failure
from icrl_megatron.engines.flat_buffer import Placed
from icrl_megatron.engines.protocol import EngineStats
from icrl_megatron.rollout.episode import Ended
from icrl_megatron.rollout.open_group import OpenGroup
from icrl_megatron.rollout.played import Job
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import Episode


@dataclass(frozen=True)
class Setup:
    """The first message to a rollout process."""

    settings: Settings
    model: Path
    """Hugging Face folder that the engine is built from."""
    has_weights: bool
    tokenizer: Path
    rank: int
    world: int
    server_device: torch.device | None = None
    """`EngineRequest.server_device`."""


@dataclass(frozen=True)
class Begin:
    """Play these groups. Those that have `ended` are only kept for the next checkpoint."""

    groups: tuple[OpenGroup, ...]


@dataclass(frozen=True)
class Forget:
    """These groups were trained on, or are too old."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Update:
    """Pause the requests, take these weights, and go on."""

    version: int
    tensors: tuple[Placed, ...]


@dataclass(frozen=True)
class Sleep:
    """Pause the requests, and release the engine's memory until the next update (`rollout.interleave`)."""


@dataclass(frozen=True)
class RunJob:
    """Play a job with the current weights, beside the groups."""

    job: Job[Any]


@dataclass(frozen=True)
class Save:
    """Send the groups that are not forgotten."""


@dataclass(frozen=True)
class StopRollouts:
    """The run was asked to stop: calls of environments may block only for a short time."""


ToService = Begin | Forget | Update | Sleep | RunJob | Save | StopRollouts


@dataclass(frozen=True)
class Ready:
    """The engine accepts requests."""


@dataclass(frozen=True)
class Heartbeat:
    """The process is alive. Sent every second, and before other messages about tokens."""

    generated: int = 0
    """Tokens generated for groups since the last beat."""
    stats: EngineStats = field(default_factory=EngineStats)
    deaths: int = 0
    """Engines that were lost since the last beat."""
    needs_weights: bool = False
    """The engine was restarted, and waits for the current weights."""


@dataclass(frozen=True)
class EngineLost:
    """The engine is restarted. Its deaths are counted by `Heartbeat`."""

    why: str


@dataclass(frozen=True)
class GroupEnded:
    number: int
    task_id: str
    version: int
    """Version of the weights when it began."""
    results: tuple[Ended, ...]
    tokens: int
    """Generated tokens, including those of dropped episodes."""


@dataclass(frozen=True)
class Abandoned:
    """Groups that will be too old by the time they end, and the generated tokens and the episodes that are lost."""

    numbers: tuple[int, ...]
    tokens: int
    episodes: int


@dataclass(frozen=True)
class Updated:
    version: int


@dataclass(frozen=True)
class Asleep:
    """The engine has released its memory."""


@dataclass(frozen=True)
class Probed:
    """The answer to a `rollout.probe.Probe`."""

    version: int
    """Version of the weights that generated its newest token."""
    episodes: tuple[Episode, ...]


@dataclass(frozen=True)
class JobResult:
    value: Any


@dataclass(frozen=True)
class SavedGroups:
    """The answer to `Save`."""

    groups: tuple[OpenGroup, ...]


@dataclass(frozen=True)
class ServiceFailed:
    """The process ends because of this."""

    failure: Failure


FromService = (
    Ready
    | Heartbeat
    | EngineLost
    | GroupEnded
    | Abandoned
    | Updated
    | Asleep
    | Probed
    | JobResult
    | SavedGroups
    | ServiceFailed
)
