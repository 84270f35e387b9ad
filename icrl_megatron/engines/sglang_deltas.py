"""An engine that sends a server on other GPUs only what changed since the last push (`engine.sync=delta`).

The leading rank keeps the weights that it sent last in host memory. `on_server/icrl_deltas.py` explains how a
difference is written and added. After every delta a checksum of each of the server's parameters is compared. In case of
doubt all weights are sent: the server does not report the version that was sent last (it was restarted, or something
else changed its weights), or a checksum differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from icrl_megatron.engines import sglang_weights as weights
from icrl_megatron.engines.flat_buffer import sizes
from icrl_megatron.engines.on_server import icrl_deltas
from icrl_megatron.engines.on_server.icrl_deltas import DeltaPiece
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_group import OverGroup
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.utils.errors import ConfigError

_log = logging.getLogger(__name__)


class Copy:
    """The weights that were sent last, in host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def keeping(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the same tensors, and keeps them."""
        for name, tensor in tensors:
            if name not in self._tensors:
                pinned = self._device.type == "cuda"
                self._tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._tensors[name].copy_(tensor)
            yield name, tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor on the device."""
        return ((name, tensor.to(self._device)) for name, tensor in self._tensors.items())

    def differences(
        self, tensors: Iterable[tuple[str, Tensor]], expected: Checksums
    ) -> Iterator[tuple[DeltaPiece, bytes]]:
        """Encodes the differences from the kept tensors, keeps the new ones, and adds them to `expected`."""
        for name, tensor in tensors:
            sizes, data = icrl_deltas.encode(self._tensors[name].to(self._device), tensor)
            if sizes:
                self._tensors[name].copy_(tensor)
            expected.add(name, tensor)
            yield DeltaPiece(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), sizes), data


@dataclass
class DeltaRequest:
    """The pieces of one request, and their bytes."""

    pieces: list[DeltaPiece] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)


class DeltaEngine(SGLangEngine):
    """Implements `engines.protocol.Engine` for a server that was started with the loader (`require_loader`)."""

    def __init__(
        self,
        server: Server,
        settings: EngineSettings,
        transport: Callable[[], OverGroup],
        model: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(server, settings, transport, model.tensors(), dtype, device)
        self._model, self._device = model, device
        self._copy = Copy(device)
        self._known = False
        """Whether the server got the weights of the copy."""

    def _update(self, tensors: Iterable[tuple[str, Tensor]], version: int, send: Any = None) -> None:
        known, self._known = self._known, False
        whole = weights.checked(tensors, self._sender.shapes, self._sender.dtype, version)
        doubt = self._doubt() if known else ""
        if known and not doubt:
            expected = Checksums(self._settings.tensor_parallel, self._model)
            super()._update(self._copy.differences(whole, expected), version, self._send_differences)
            doubt = self._differs(expected)
            if doubt:
                self._push_all(self._copy, version)
        else:
            if self._transport is not None:  # its group may have ended with the server
                self._transport.close()
                self._transport = None
            self._push_all(self._copy.keeping(whole), version)
        if doubt:
            _log.warning("%s was sent all weights of version %d: %s", self.server.url, version, doubt)
            self.verify(self._copy, self._model)
        self._known = True

    def _push_all(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        super()._update(tensors, version)
        self.stats.full_pushes += 1
        self.stats.sync_bytes += sizes(self._sender.shapes, self._sender.dtype.itemsize)[1]

    def _doubt(self) -> str:
        """Why a delta must not be sent; empty if the server has the version that was sent last."""
        reported = self.server.weight_version()
        return "" if reported == str(self._version) else f"it has version {reported!r} instead of {self._version}"

    def _differs(self, expected: Checksums) -> str:
        answer = self.server.post("/weights_checker", {"action": "checksum"}, self._settings.sync_timeout_s)
        try:
            expected.compare(answer)
        except EngineError as error:
            return str(error)
        return ""

    def _send_differences(
        self, pieces: Iterable[tuple[DeltaPiece, bytes]], version: int, transport: Any, lost: str = ""
    ) -> None:
        """Like `WeightSender.send_all`, for differences."""

        def send(request: DeltaRequest, options: dict[str, Any]) -> weights.Answer:
            data = (
                torch.frombuffer(request.data, dtype=torch.uint8) if request.data else torch.empty(0, dtype=torch.uint8)
            )
            self.stats.sync_bytes += len(request.data)
            answer: weights.Answer = transport.send_pieces(request.pieces, data.to(self._device), options)
            return answer

        each, flush = requests(pieces, self._sender.limit), not self._sender.keep_cache
        weights.deliver(each, send, transport.begin(lost), version, flush)


def requests(pieces: Iterable[tuple[DeltaPiece, bytes]], limit: int) -> Iterator[tuple[DeltaRequest, bool]]:
    """Collects pieces up to `limit` bytes, or one larger piece. Yields (request, whether it is the last) at least
    once."""
    request = DeltaRequest()
    for piece, data in pieces:
        if request.data and len(request.data) + len(data) > limit:
            yield request, False
            request = DeltaRequest()
        request.pieces.append(piece)
        request.data += data
    yield request, True


def require_loader(url: str, info: dict[str, Any]) -> None:
    """Raises ConfigError if the server (`info`: its /server_info) cannot be sent deltas."""
    if icrl_deltas.LOADER not in (info.get("custom_weight_loader") or ()):
        raise ConfigError(
            f"engine.sync=delta: the server at {url} was started without the loader of deltas; copy "
            f"{icrl_deltas.__file__} into an empty folder of its machine and start it with PYTHONPATH=FOLDER and "
            f"--custom-weight-loader {icrl_deltas.LOADER}, or set engine.sync=full"
        )
    if int(info.get("dp_size") or 1) > 1:
        raise ConfigError(
            f"engine.sync=delta: the server at {url} was started with --dp-size {info['dp_size']}, and SGLang then "
            "takes no deltas; start one server for each replica, or set engine.sync=full"
        )
    if info.get("quantization"):
        raise ConfigError(
            f"engine.sync=delta: the server at {url} was started with --quantization {info['quantization']}: its "
            "weights are not those that were sent, and differences cannot be added to them; set engine.sync=full"
        )
