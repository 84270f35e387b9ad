"""The one object that moves the actor's weights into the rollout engine, with a version."""

from __future__ import annotations

from icrl_megatron.actor.weights import Gatherer
from icrl_megatron.rollout.engine import WeightReceiver


class WeightSync:
    """Streams full Hugging Face tensors from the grid into this rank's engine. All ranks call `push` together."""

    def __init__(self, gatherer: Gatherer, engine: WeightReceiver, version: int = 0) -> None:
        self.gatherer, self.engine, self.version = gatherer, engine, version

    def push(self) -> int:
        """Hands over the current weights and returns their new version, which completions then carry."""
        self.version += 1
        self.engine.update_weights(self.gatherer.stream(), self.version)
        return self.version
