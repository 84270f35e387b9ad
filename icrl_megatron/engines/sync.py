"""The one object that moves the actor's weights into the rollout engine, with a version."""

from __future__ import annotations

from collections.abc import Callable

from icrl_megatron.distributed import platform
from icrl_megatron.engines.protocol import WeightReceiver
from icrl_megatron.model.weights import Gatherer


class WeightSync:
    """Streams full Hugging Face tensors from the grid into this rank's engine. All ranks call each method together."""

    def __init__(
        self,
        gatherer: Gatherer,
        engine: WeightReceiver,
        verify: Callable[[], bool] | None = None,
        frozen: WeightReceiver | None = None,
        meet: Callable[[], None] = lambda: None,
    ) -> None:
        """`verify` compares what the engines hold with the actor's weights (`engines.sglang_checks`), and says whether
        all of them lived to be compared: until they did, each sync ends with it. `frozen` is an engine that is sent
        nothing, and gives its memory at the same times. `meet` waits for the ranks that share this rank's engine, on
        whose GPUs it takes memory and gives it back."""
        self.gatherer, self.engine, self.frozen, self.version = gatherer, engine, frozen, 0
        self.memory_gib: dict[str, float] = {}
        """Memory in use on this rank's device at each point of the last step, by the actor and the engine together."""
        self._verify, self._meet = verify, meet

    def sleep(self) -> None:
        """The engines give their memory to the actor until the next push."""
        self.memory_gib = {"rollout": platform.memory_gib()}
        self.engine.sleep()
        if self.frozen is not None:
            self.frozen.sleep()
        self._meet()  # only now may this rank take what the engine had
        self.memory_gib["asleep"] = platform.memory_gib()

    def push(self) -> int:
        """Hands over the current weights and returns their new version, which completions then carry. Wakes the engine:
        its weights first, and the rest once they are there."""
        self.version += 1
        self.memory_gib["trained"] = platform.memory_gib()
        self._meet()  # the others have given up what the engine takes
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
        """The same version again, for engines that were restarted; `stale` says whether this rank's was. It must say
        the same on every rank that shares an engine: they send its weights together."""
        if stale:
            self.engine.update_weights(self.gatherer.stream(), self.version)
        else:
            for _ in self.gatherer.stream():  # the ranks gather together
                pass
        self._check()

    def _check(self) -> None:
        if self._verify is not None and self._verify():
            self._verify = None
