"""Moves the actor's weights into the rollout engine and assigns their version."""

from __future__ import annotations

from collections.abc import Callable

from icrl_megatron.distributed import platform
from icrl_megatron.engines.protocol import WeightReceiver
from icrl_megatron.model.weights import Gatherer


class WeightSync:
    """Streams full Hugging Face tensors from the grid into this rank's engine. All methods are collective over all
    ranks."""

    def __init__(
        self,
        gatherer: Gatherer,
        engine: WeightReceiver,
        verify: Callable[[], bool] | None = None,
        frozen: WeightReceiver | None = None,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        """`verify` compares the engines' weights with the actor's (`engines.sglang_checks`) and returns whether all
        engines lived long enough to be compared; each sync calls it until it returns True. `frozen` is an engine that
        is sent nothing but releases its memory at the same times. `barrier` waits for the ranks that share this rank's
        engine and therefore their GPU memory."""
        self.gatherer, self.engine, self.frozen, self.version = gatherer, engine, frozen, 0
        self.memory_gib: dict[str, float] = {}
        """GPU memory in use (actor plus engine) on this rank's device at each point of the last step."""
        self._verify, self._barrier = verify, barrier

    def sleep(self) -> None:
        """The engines release their memory for the actor until the next push."""
        self.memory_gib = {"rollout": platform.memory_gib()}
        self.engine.sleep()
        if self.frozen is not None:
            self.frozen.sleep()
        self._barrier()  # this rank may use the engine's memory only when all ranks have released it
        self.memory_gib["asleep"] = platform.memory_gib()

    def push(self) -> int:
        """Sends the current weights and returns their new version, which completions then carry. Wakes the engine in
        two stages: memory for weights first, the rest after the update."""
        self.version += 1
        self.memory_gib["trained"] = platform.memory_gib()
        self._barrier()  # all ranks have released the memory that the engine takes
        self.engine.wake_weights()
        self.engine.update_weights(self.gatherer.stream(), self.version)
        self.memory_gib["weights"] = platform.memory_gib()
        self.engine.wake()
        if self.frozen is not None:
            self.frozen.wake_weights()
            self.frozen.wake()
        self.memory_gib["awake"] = platform.memory_gib()
        self._check()
        return self.version

    def resend(self, stale: bool) -> None:
        """Sends the same version again to engines that were restarted; `stale` says whether this rank's was. It must be
        the same on every rank that shares an engine, because all of them send its weights."""
        if stale:
            self.engine.update_weights(self.gatherer.stream(), self.version)
        else:
            for _ in self.gatherer.stream():  # gathering is collective
                pass
        self._check()

    def _check(self) -> None:
        if self._verify is not None and self._verify():
            self._verify = None
