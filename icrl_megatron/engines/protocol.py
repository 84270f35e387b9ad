"""The engine protocol: what the rollout and the weight sync need from an engine. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from icrl_megatron.types import Completion

if TYPE_CHECKING:
    import torch

    from icrl_megatron.model.shape import ModelShape


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request. No top-p and no top-k: the log-probs must be those of the policy."""

    temperature: float
    """0 means greedy; log-probs are then those of temperature 1."""
    max_new_tokens: int
    seed: int
    """Of this request alone: the same seed, prompt and weights give the same tokens whatever else is in the batch."""
    stop_ids: tuple[int, ...]


class EngineError(RuntimeError):
    """The engine failed or timed out; the message says what was waited for and what to do."""


class NoAnswerError(EngineError):
    """The engine did not answer, failed, or answered what makes no sense: it hangs, or is dying."""


class RequestFailedError(EngineError):
    """This request failed, the engine did not: its episode may be played again."""


class EngineLostError(EngineError):
    """The engine died or hangs: whatever it was doing can be played again once it was revived."""


class WeightReceiver(Protocol):
    """What weights are synced to: an engine, or a sink where nothing is generated.

    Beside the actor an engine gives its memory back for the time of training, and takes it again in two stages: sleep,
    wake_weights, update_weights, wake. So the two never hold their peaks together.
    """

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Takes Hugging-Face-named full tensors, streamed. Raises EngineError on a missing, unknown or wrong one."""
        ...

    def sleep(self) -> None:
        """Gives memory back while the actor trains; generate is refused until `wake`."""
        ...

    def wake_weights(self) -> None:
        """Takes memory for weights alone; what they hold is undefined until they are updated."""
        ...

    def wake(self) -> None:
        """Takes the rest of the memory; requests are taken again."""
        ...


@dataclass
class EngineStats:
    """What an engine counted since it was last asked."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were read from the prefix cache."""
    retries: int = 0
    aborted: int = 0
    """Requests that were cut off at their deadline."""

    def __add__(self, other: EngineStats) -> EngineStats:
        return EngineStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Engine(WeightReceiver, Protocol):
    """Requests from many concurrent episodes; a weight update takes effect between requests and is stamped on them."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion: ...

    async def interrupt(self) -> None:
        """Ends what is being generated, where the engine can: such requests return "abort" and what they have, and
        those that come later in the same event loop return "abort" and nothing."""
        ...

    def health(self) -> str:
        """ "ok", or what is wrong."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Served(Protocol):
    """An engine outside of this process. It can be lost, and started again. `Engine`s that are not `Served` are ready
    once they are built, and end with the rank."""

    def start(self) -> None:
        """Starts the server without waiting for it; does nothing for a server of `engine.urls`."""
        ...

    def wait_ready(self, tick: Callable[[], None]) -> None:
        """Returns when the server takes requests, and calls `tick` meanwhile. Raises EngineError if that takes too
        long."""
        ...

    def lost(self) -> str:
        """Why the server has to be restarted; empty while it works."""
        ...

    def revive(self) -> None:
        """Restarts the server. It has the weights of its model folder until the next update. Raises EngineError."""
        ...

    def take_stats(self) -> EngineStats:
        """What was counted since the last call."""
        ...

    def sleep(self) -> None: ...

    def wake_weights(self) -> None: ...

    def wake(self) -> None: ...


@runtime_checkable
class Verifiable(Protocol):
    """An engine whose weights can be compared with those it was sent."""

    def verify(self, tensors: Iterable[tuple[str, torch.Tensor]], shape: ModelShape) -> bool:
        """Compares full tensors, under their Hugging Face names, with the engine's. `shape` is
        the model's. Returns False if the server was lost, before or meanwhile. Raises EngineError with the first name
        whose values differ."""
        ...
