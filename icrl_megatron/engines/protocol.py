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
    """Seed of this request: the same seed, prompt and weights give the same tokens whatever else is in the batch."""
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    """A reply also ends with the token that completes one of these texts; the whole token and its log-prob are kept."""


class EngineError(RuntimeError):
    """The engine failed or timed out; the message says what was waited for and what to do."""


class NoAnswerError(EngineError):
    """The engine did not answer, failed, or gave an invalid answer: it hangs or is dying."""


class RequestFailedError(EngineError):
    """This request failed but the engine did not: the episode may be replayed."""


class EngineLostError(EngineError):
    """The engine died or hangs: its work can be replayed after a restart."""


class WeightReceiver(Protocol):
    """Receives weights: an engine, or a sink on ranks that generate nothing.

    An engine that shares GPUs with the actor releases its memory during training and takes it back in two stages:
    sleep, wake_weights, update_weights, wake. So the peak memory use of engine and actor never coincides.
    """

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Receives a stream of full tensors with Hugging Face names. Raises EngineError on a missing, unknown or bad
        one."""
        ...

    def sleep(self) -> None:
        """Releases memory while the actor trains; `generate` is refused until `wake`."""
        ...

    def wake_weights(self) -> None:
        """Allocates memory for weights only; their values are undefined until they are updated."""
        ...

    def wake(self) -> None:
        """Allocates the remaining memory; requests are accepted again."""
        ...


class NeverSleeps:
    """The part of a `WeightReceiver` that has no memory to release and restore here."""

    def sleep(self) -> None:
        """Does nothing."""

    def wake_weights(self) -> None:
        """Does nothing."""

    def wake(self) -> None:
        """Does nothing."""


@dataclass
class EngineStats:
    """Counters since the last call of `take_stats`."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens read from the prefix cache."""
    retries: int = 0
    aborted: int = 0
    """Requests aborted at their deadline."""
    full_pushes: int = 0
    """Times that `engine.sync=delta` sent all weights: at first, and whenever the server might have had others."""
    sync_bytes: int = 0
    """Bytes of weights and differences that `engine.sync=delta` sent."""

    def __add__(self, other: EngineStats) -> EngineStats:
        return EngineStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Engine(WeightReceiver, Protocol):
    """Serves requests of many concurrent episodes. A weight update takes effect between requests; completions carry its
    version."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion: ...

    async def interrupt(self) -> None:
        """Aborts running requests, if the engine can: they return what they have with finish reason "abort", and later
        requests in the same event loop return nothing with "abort"."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Pausable(Protocol):
    """An engine whose weights can change while episodes are played (`rollout.staleness`)."""

    async def pause(self) -> None:
        """Ends the running requests at their next token: each returns what it has, with finish reason "abort"."""
        ...

    def resume(self) -> None:
        """Ends a pause, in the same event loop. No request was running any more."""
        ...


@runtime_checkable
class Served(Protocol):
    """An engine outside of this process. It can be lost and restarted. An `Engine` that is not `Served` is ready once
    it is built, and ends with the rank."""

    def start(self) -> None:
        """Starts the server without waiting for it; does nothing for a server of `engine.urls`."""
        ...

    def wait_ready(self, tick: Callable[[], None]) -> None:
        """Returns when the server accepts requests, and calls `tick` while waiting. Raises EngineError on timeout."""
        ...

    def lost(self) -> str:
        """Why the server has to be restarted; empty while it works."""
        ...

    def revive(self) -> None:
        """Restarts the server with the weights of its model folder. Raises EngineError."""
        ...

    def take_stats(self) -> EngineStats:
        """Returns the counters since the last call."""
        ...

    def sleep(self) -> None: ...

    def wake_weights(self) -> None: ...

    def wake(self) -> None: ...


@runtime_checkable
class Verifiable(Protocol):
    """An engine whose weights can be compared with those it was sent."""

    def verify(self, tensors: Iterable[tuple[str, torch.Tensor]], shape: ModelShape) -> bool:
        """Compares full tensors with Hugging Face names to those of the engine. `shape` is the shape of the model.
        Returns False if the server was lost before or during the comparison. Raises EngineError with the first name
        whose values differ."""
        ...
