"""The embedded engine: a transformers model in this process, shared by the requests of many concurrent episodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from icrl_megatron.engines.decoding import Decoding, Finished, Request
from icrl_megatron.engines.protocol import EngineError, Sampling
from icrl_megatron.engines.stop_texts import StopTexts
from icrl_megatron.model.shape import ModelShape, locate_weights
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.types import Completion, Ids, id_array, logprob_array
from icrl_megatron.utils.errors import ConfigError

_IDLE_PASSES = 4
"""Event-loop passes without a new request after which all episodes are assumed to be waiting for the engine."""


@dataclass(frozen=True)
class _Pending:
    request: Request
    future: asyncio.Future[Completion]
    deadline: float
    """time.monotonic() seconds."""


class LocalEngine:
    """Implements `engines.protocol.Engine`.

    Requests that are pending when the event loop is idle form a wave. A wave is sorted by prompt length and split into
    batches of at most `max_batch`. Batching does not depend on time, so the same requests always form the same batches.
    Raises ConfigError if the folder does not hold a complete model that the engine can run.
    """

    def __init__(
        self,
        model_dir: str | Path,
        settings: EngineSettings,
        dtype: torch.dtype,
        device: torch.device | str,
        weights: bool = True,
    ) -> None:
        """`weights`: False for a folder with only a configuration and a tokenizer; requests are then refused until a
        complete update has arrived."""
        self._settings, self._folder = settings, Path(model_dir)
        self._stop_texts: dict[tuple[str, ...], StopTexts] = {}
        self._device = torch.device(device)
        shape = ModelShape.read(Path(model_dir))
        model = _load(Path(model_dir), shape, dtype) if weights else _build(Path(model_dir), dtype)
        self._model = model.to(self._device)
        _require_finite(self._model, model_dir)
        self._vocabulary, self._max_positions = shape.vocab, shape.max_positions
        self._version = 0
        self._unfit = "" if weights else "The engine has no weights yet: send a complete update."
        """Why requests are refused; empty when they are accepted."""
        self._pending: list[_Pending] = []
        self._running: list[_Pending] = []
        self._driver: asyncio.Task[None] | None = None
        self._paused = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Raises EngineError when the engine sleeps, is closed or holds a partial update, when the prompt does not fit
        the model's positions or vocabulary, and after `engine.request_timeout_s`. A reply ends at the last position."""
        request = self._checked(tuple(prompt_ids), sampling)
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._settings.request_timeout_s
        waiting = _Pending(request, loop.create_future(), deadline)
        self._pending.append(waiting)
        if self._driver is None:
            self._driver = loop.create_task(self._drive())
        return await waiting.future

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies full tensors with Hugging Face names in place, one at a time, converted to the engine's dtype.

        Raises EngineError, naming the first bad tensor, on an unknown or duplicate name, a wrong shape, a dtype that is
        not floating point, a tied pair whose values differ, or missing names; requests are then refused until a
        complete update has arrived. Raises EngineError while requests are running.
        """
        if any(not p.future.done() for p in (*self._pending, *self._running)):
            raise EngineError(f"Weights of version {version} came while requests are running: wait until they finish.")
        if self._unfit == _CLOSED:
            raise EngineError(_CLOSED)
        asleep = self._unfit == _ASLEEP
        self._unfit = f"The engine has only a part of the weights of version {version}: send a complete update."
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        seen: set[str] = set()
        written: dict[int, str] = {}
        with torch.no_grad():
            for name, tensor in tensors:
                _check_tensor(name, tensor, parameters, seen, version)
                seen.add(name)
                target = parameters[name]
                tied = written.setdefault(id(target), name)
                if tied == name:
                    target.copy_(tensor)
                elif not torch.equal(target, tensor.to(target)):
                    raise EngineError(f"Update {version}: {name!r} differs from {tied!r}, but this model ties the two.")
        missing = [name for name, parameter in parameters.items() if id(parameter) not in written]
        if missing:
            raise EngineError(f"Update {version} lacks {len(missing)} of the model's tensors; first {missing[0]!r}.")
        self._version = version
        self._unfit = _ASLEEP if asleep else ""

    async def interrupt(self) -> None:
        """Does nothing: its batches finish, because one more token costs less than restarting an aborted batch."""

    async def pause(self) -> None:
        """Ends the running batch at its next token, and the requests that wait for a batch without any."""
        self._paused = True
        if self._driver is not None:
            await asyncio.wait({self._driver})

    def resume(self) -> None:
        self._paused = False

    def sleep(self) -> None:
        if any(not p.future.done() for p in (*self._pending, *self._running)):
            raise EngineError("The engine cannot sleep while requests are running: wait until they finish.")
        if not self._unfit:
            self._unfit = _ASLEEP
            self._model.to("cpu")

    def wake_weights(self) -> None:
        """Does nothing: weights are updated in host memory, where they are while the engine sleeps."""

    def wake(self) -> None:
        self._model.to(self._device)
        if self._unfit == _ASLEEP:
            self._unfit = ""

    def close(self) -> None:
        self._unfit = _CLOSED
        self._model.to("meta")

    def _checked(self, prompt: Ids, sampling: Sampling) -> Request:
        if self._unfit:
            raise EngineError(self._unfit)
        room = self._max_positions - len(prompt)
        if room < 1:
            raise EngineError(
                f"A prompt has {len(prompt)} tokens, but the model has {self._max_positions} positions: lower "
                "rollout.context_tokens to that, or use a model with more."
            )
        if not prompt or min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise EngineError(f"A prompt is empty or has ids outside 0..{self._vocabulary - 1}: check the tokenizer.")
        if sampling.max_new_tokens < 1 or sampling.temperature < 0:
            raise EngineError(f"max_new_tokens must be at least 1 and temperature at least 0, not {sampling}.")
        stop = self._stops(sampling.stop) if sampling.stop else None
        return Request(prompt, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)), stop)

    def _stops(self, texts: tuple[str, ...]) -> StopTexts:
        if texts not in self._stop_texts:
            tokenizer = AutoTokenizer.from_pretrained(self._folder)
            self._stop_texts[texts] = StopTexts(tokenizer, texts, self._vocabulary)
        return self._stop_texts[texts]

    async def _drive(self) -> None:
        """Runs waves until no request is pending. The next request starts it again, in that request's event loop."""
        try:
            while self._pending:
                if not self._paused:
                    await self._quiescence()
                wave, self._pending = sorted(self._pending, key=lambda p: len(p.request.prompt)), []
                self._running = wave
                batches = -(-len(wave) // self._settings.max_batch)
                for i in range(batches):
                    await self._run(wave[len(wave) * i // batches : len(wave) * (i + 1) // batches])
        finally:
            for left in (*self._pending, *self._running):
                left.future.cancel()
            self._pending, self._running, self._driver = [], [], None

    async def _quiescence(self) -> None:
        seen, idle = len(self._pending), 0
        while idle < _IDLE_PASSES:
            await asyncio.sleep(0)
            idle = idle + 1 if len(self._pending) == seen else 0
            seen = len(self._pending)

    async def _run(self, batch: list[_Pending]) -> None:
        """Runs one batch; its requests finish one at a time. A failure fails all requests that have not finished."""
        try:
            if self._paused:
                return self._abort(batch)
            decoding = Decoding(self._model, [p.request for p in batch])
            deadline = min(p.deadline for p in batch)
            while decoding.rows:
                if self._paused:
                    for left in decoding.abort():
                        self._answer(batch[left.index], left)
                    break
                for finished in decoding.step():
                    self._answer(batch[finished.index], finished)
                if time.monotonic() > deadline and decoding.rows:
                    raise EngineError(
                        f"{decoding.rows} requests of a batch of {len(batch)} had no answer after "
                        f"{self._settings.request_timeout_s} s: raise engine.request_timeout_s, or lower "
                        "engine.max_batch."
                    )
                await asyncio.sleep(0)
        except (EngineError, RuntimeError) as error:
            reason = error if isinstance(error, EngineError) else EngineError(f"The local engine failed: {error}")
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(reason)

    def _abort(self, batch: Sequence[_Pending]) -> None:
        for index, waiting in enumerate(batch):
            self._answer(waiting, Finished(index, id_array(()), logprob_array(()), "abort"))

    def _answer(self, waiting: _Pending, finished: Finished) -> None:
        if not waiting.future.done():  # its episode may have been canceled
            waiting.future.set_result(
                Completion(finished.ids, finished.logprobs, finished.finish_reason, self._version)
            )


_CLOSED = "The engine is closed: create a new one."
_ASLEEP = "The engine sleeps: call wake() before generate()."


def _check_tensor(
    name: str, tensor: torch.Tensor, parameters: dict[str, torch.nn.Parameter], seen: set[str], version: int
) -> None:
    if name not in parameters:
        raise EngineError(f"Update {version}: the model has no tensor {name!r}.")
    if name in seen:
        raise EngineError(f"Update {version}: {name!r} was sent twice.")
    if tensor.shape != parameters[name].shape:
        expected = tuple(parameters[name].shape)
        raise EngineError(f"Update {version}: {name!r} has shape {tuple(tensor.shape)}, the model's is {expected}.")
    if not tensor.is_floating_point():
        raise EngineError(f"Update {version}: {name!r} is {tensor.dtype}, not a floating-point tensor.")


def _load(folder: Path, shape: ModelShape, dtype: torch.dtype) -> PreTrainedModel:
    """Raises ConfigError unless the folder holds exactly the tensors of `shape`: transformers itself fills missing
    tensors with random values and ignores unexpected ones."""
    files = {stored.file.name for stored in locate_weights(folder, shape).values()}
    # Its progress bar would break into those of the run.
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        if len(files) == 1:  # transformers does not find a single numbered shard
            (config.transformers_weights,) = files
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:  # transformers raises many types of errors for fields of a wrong type
        raise ConfigError(f"The engine cannot load the model in {str(folder)!r}: {error}") from error
    return model.eval().requires_grad_(False)


def _build(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the configured model with random weights."""
    try:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:  # as above
        raise ConfigError(f"The engine cannot build the model in {str(folder)!r}: {error}") from error
    return model.eval().requires_grad_(False)


def _require_finite(model: PreTrainedModel, folder: str | Path) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(
                f"{folder}: tensor {name} has values that are not finite in {parameter.dtype}; use a folder without "
                "such values"
            )
