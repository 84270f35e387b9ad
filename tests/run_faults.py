"""Faults inside a run, at a given step: `with fault("engine@2"):` fails in the third step (counted from 0).

engine, memory, bug, interrupt: while episodes are played; nan: a reward is NaN; lost: no reward at all;
flat: all rewards are equal, while those of other steps depend on the replies; score: before the update; update: after
it has begun; heldout@N: in the N-th evaluation on held-out problems, from 0; dump: the step's rollouts cannot be
written; sft: in a step of the warm start; gone: the model's folder is deleted.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from icrl_megatron import sft
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.optimizer import Optimizer
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.run.conversations import Conversations
from icrl_megatron.tasks.rulebook import Rulebook
from icrl_megatron.telemetry import dump_writer
from icrl_megatron.types import Task

IN_ENGINE: dict[str, BaseException] = {
    "engine": EngineError("the engine failed"),
    "heldout": EngineError("the engine failed"),
    "memory": MemoryError("no memory is left"),
    "bug": ZeroDivisionError("a bug"),
    "interrupt": KeyboardInterrupt(),
}
REWARDS = {"flat": 0.0, "nan": math.nan}


class _Fault:
    def __init__(self, kind: str, number: int, model_path: str) -> None:
        self.kind, self.number, self.model_path = kind, number, model_path
        self.step, self.on, self.evaluations = -1, False, 0

    def playing(self, step: int, purpose: str) -> None:
        """Called when the episodes of a step or of an evaluation begin."""
        if purpose == "heldout":
            self.on = self.kind == "heldout" and self.evaluations == self.number
            self.evaluations += 1
            return
        self.step, self.on = step, step == self.number and self.kind != "heldout"
        if self.on and self.kind == "gone":
            shutil.rmtree(self.model_path)

    def reward(self, outcome: float, said: str) -> float:
        if self.on and self.kind == "lost":
            raise ZeroDivisionError("the grader divided by zero")
        if self.on and self.kind in REWARDS:
            return REWARDS[self.kind]
        return zlib.crc32(said.encode()) % 3 / 2 if self.kind == "flat" else outcome


@contextmanager
def fault(text: str, model_path: str = "") -> Iterator[None]:
    """Installs the fault `KIND@STEP` in this process until the block ends."""
    kind, _, number = text.partition("@")
    state = _Fault(kind, int(number), model_path)
    play, generate, environment = EngineSource.play, LocalEngine.generate, Rulebook.environment
    score, update = Actor.score, Optimizer.step

    def playing(self: Any, request: Any) -> Any:
        state.playing(request.seeds.step, request.seeds.purpose)
        return play(self, request)

    async def generating(self: Any, prompt_ids: Any, sampling: Any) -> Any:
        done = await generate(self, prompt_ids, sampling)
        if state.on and kind in IN_ENGINE:
            raise IN_ENGINE[kind]
        return done

    def rewarding(self: Any, task: Task) -> Any:
        made = environment(self, task)
        outcome, parse, replies = made.outcome, made.parse, list[str]()
        made.parse = lambda reply: (replies.append(reply), parse(reply))[1]  # type: ignore[method-assign]
        made.outcome = lambda: state.reward(outcome(), " ".join(replies))  # type: ignore[method-assign]
        return made

    def scoring(self: Any, *plans: Any) -> Any:
        if kind == "score" and state.step == state.number:
            raise MemoryError("no memory is left")
        return score(self, *plans)

    def updating(self: Any, *how: Any, **named: Any) -> Any:
        done = update(self, *how, **named)
        if kind == "update" and state.step == state.number:
            raise MemoryError("no memory is left")
        return done

    def encoding(step: int, *what: Any) -> Any:
        if kind == "dump" and step == state.number + 1:
            raise OSError(5, "Input/output error")
        return encoded(step, *what)

    def demonstrating(demonstrate: Any) -> Any:
        def spy(self: Any, request: Any) -> Any:
            if kind == "sft" and request.seeds.step == state.number:
                raise ZeroDivisionError("a bug")
            return demonstrate(self, request)

        return spy

    encoded = dump_writer.encoded
    with ExitStack() as installed:
        for where, name, spy in (
            (EngineSource, "play", playing),
            (LocalEngine, "generate", generating),
            (Rulebook, "environment", rewarding),
            (Actor, "score", scoring),
            (Optimizer, "step", updating),
            (dump_writer, "encoded", encoding),
            *((source, "play", demonstrating(source.play)) for source in (sft.TeacherSource, Conversations)),
        ):
            installed.enter_context(patch.object(where, name, spy))
        yield
