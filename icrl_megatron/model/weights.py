"""The mapping between Hugging Face tensors and Megatron parameters, for both weights and optimizer moments.

Every Megatron parameter of a rank is a join of rectangular slices of Hugging Face tensors. Import, export, checkpoints
and weight sync iterate over this table, one tensor at a time, so no rank ever holds a second copy of the model.
"""

from __future__ import annotations

from icrl_megatron.distributed import before_megatron  # noqa: F401

# isort: split
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.model.gpt import PolicyModel
from icrl_megatron.model.shape import ModelShape, locate_weights
from icrl_megatron.model.weight_files import EMBEDDING, HEAD
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Slice:
    """A rectangle of a Hugging Face tensor: the tensor's name and full shape, and the offset and size of the part."""

    name: str
    full: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class WeightRow:
    """One Megatron parameter and the slices it consists of.

    `split` maps a tensor of the parameter's shape to one tensor per slice; `join` is its inverse (padding rows of the
    vocabulary become zeros).
    """

    name: str
    param: torch.nn.Parameter
    slices: tuple[Slice, ...]
    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]
    duplicate: bool = False
    """A tied head on a later pipeline stage than the embedding: loaded from the embedding, never saved."""


def rows(model: PolicyModel, shape: ModelShape, grid: Grid) -> list[WeightRow]:
    """The table for this rank's parameters, each exactly once."""
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    table = _Table(shape, grid.tensor, grid.tensor_rank, offset)
    return [table.row(name, param) for name, param in model.named_parameters()]


class _Table:
    """The mapping rules; `layer_offset` is the global index of this stage's first layer."""

    def __init__(self, shape: ModelShape, tensor: int, tensor_rank: int, layer_offset: int) -> None:
        self.shape, self.tensor, self.rank, self.layer_offset = shape, tensor, tensor_rank, layer_offset

    def row(self, name: str, param: torch.nn.Parameter) -> WeightRow:
        layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            return self._outer(name, param)
        prefix = f"model.layers.{int(layer[1]) + self.layer_offset}."
        return self._inner(name, layer[2], prefix, param)

    def _outer(self, name: str, param: torch.nn.Parameter) -> WeightRow:
        if name == "decoder.final_layernorm.weight":
            return self._whole(name, param, "model.norm.weight")
        if name == "embedding.word_embeddings.weight":
            return self._vocab(name, param, EMBEDDING, duplicate=False)
        if name == "output_layer.weight":
            source = EMBEDDING if self.shape.tied else HEAD
            return self._vocab(name, param, source, duplicate=self.shape.tied)
        raise RuntimeError(f"no rule maps Megatron's parameter {name}")

    def _inner(self, name: str, local: str, prefix: str, param: torch.nn.Parameter) -> WeightRow:
        s = self.shape
        match local:
            case "input_layernorm.weight" | "self_attention.linear_qkv.layer_norm_weight":
                return self._whole(name, param, prefix + "input_layernorm.weight")
            case "pre_mlp_layernorm.weight" | "mlp.linear_fc1.layer_norm_weight":
                return self._whole(name, param, prefix + "post_attention_layernorm.weight")
            case "self_attention.q_layernorm.weight":
                return self._whole(name, param, prefix + "self_attn.q_norm.weight")
            case "self_attention.k_layernorm.weight":
                return self._whole(name, param, prefix + "self_attn.k_norm.weight")
            case "self_attention.linear_qkv.weight":
                return self._qkv(name, param, prefix, "weight", (s.hidden,))
            case "self_attention.linear_qkv.bias":
                return self._qkv(name, param, prefix, "bias", ())
            case "self_attention.linear_proj.weight":
                part = self._slice(prefix + "self_attn.o_proj.weight", (s.hidden, s.heads * s.head_dim), dim=1)
                return WeightRow(name, param, (part,), _alone, _only)
            case "mlp.linear_fc1.weight":
                full = (s.ffn, s.hidden)
                gate = self._slice(prefix + "mlp.gate_proj.weight", full, dim=0)
                up = self._slice(prefix + "mlp.up_proj.weight", full, dim=0)
                return WeightRow(name, param, (gate, up), lambda t: list(t.chunk(2)), torch.cat)
            case "mlp.linear_fc2.weight":
                part = self._slice(prefix + "mlp.down_proj.weight", (s.hidden, s.ffn), dim=1)
                return WeightRow(name, param, (part,), _alone, _only)
        raise RuntimeError(f"no rule maps Megatron's parameter {name}")

    def _slice(self, name: str, full: tuple[int, ...], dim: int) -> Slice:
        size, offset = list(full), [0] * len(full)
        size[dim] //= self.tensor
        offset[dim] = size[dim] * self.rank
        return Slice(name, full, tuple(offset), tuple(size))

    def _whole(self, name: str, param: torch.nn.Parameter, source: str) -> WeightRow:
        full = tuple(param.shape)
        return WeightRow(name, param, (Slice(source, full, (0,) * len(full), full),), _alone, _only)

    def _qkv(self, name: str, param: torch.nn.Parameter, prefix: str, kind: str, inputs: tuple[int, ...]) -> WeightRow:
        """Megatron stores, per group, the query heads, the key head and the value head. `inputs` is the shape of one
        row: () for biases."""
        s = self.shape
        groups, per_group = s.kv_heads // self.tensor, s.heads // s.kv_heads
        q = self._slice(f"{prefix}self_attn.q_proj.{kind}", (s.heads * s.head_dim, *inputs), dim=0)
        k = self._slice(f"{prefix}self_attn.k_proj.{kind}", (s.kv_heads * s.head_dim, *inputs), dim=0)
        v = self._slice(f"{prefix}self_attn.v_proj.{kind}", (s.kv_heads * s.head_dim, *inputs), dim=0)

        def split(t: Tensor) -> list[Tensor]:
            grouped = t.reshape(groups, per_group + 2, s.head_dim, *inputs)
            return [p.reshape(-1, *inputs) for p in grouped.split([per_group, 1, 1], dim=1)]

        def join(parts: list[Tensor]) -> Tensor:
            grouped = [p.reshape(groups, -1, s.head_dim, *inputs) for p in parts]
            return torch.cat(grouped, dim=1).reshape(-1, *inputs)

        return WeightRow(name, param, (q, k, v), split, join)

    def _vocab(self, name: str, param: torch.nn.Parameter, source: str, duplicate: bool) -> WeightRow:
        s, per_rank = self.shape, param.shape[0]
        start = min(self.rank * per_rank, s.vocab)
        real = min(per_rank, s.vocab - start)
        part = Slice(source, (s.vocab, s.hidden), (start, 0), (real, s.hidden))

        def join(parts: list[Tensor]) -> Tensor:
            return torch.nn.functional.pad(parts[0], (0, 0, 0, per_rank - real))

        return WeightRow(name, param, (part,), lambda t: [t[:real]], join, duplicate)


def _alone(t: Tensor) -> list[Tensor]:
    return [t]


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


class HFFolder:
    """Lazy reader of the weights of a Hugging Face folder."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Raises ConfigError unless the folder holds exactly the tensors of `shape`."""
        self.where = locate_weights(folder, shape)
        try:
            self.files = {file: safe_open(file, framework="pt") for file in {t.file for t in self.where.values()}}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder}: weights cannot be read ({error}); copy the model's folder again") from error

    def read(self, part: Slice, dtype: torch.dtype) -> Tensor:
        """Reads the slice in `dtype`. Raises ConfigError if a value is not finite."""
        stored = self.where[part.name]
        values: Tensor = self.files[stored.file].get_slice(stored.name)[part.index]
        converted = values.to(dtype)
        if not converted.isfinite().all():
            bad = values[~converted.isfinite()]
            raise ConfigError(
                f"{stored.file}: tensor {stored.name} has {len(bad)} values that are not finite in {dtype}, the first "
                f"is {float(bad[0])}; use a folder without such values"
            )
        return converted


@torch.no_grad()
def load_hf(table: list[WeightRow], folder: Path, shape: ModelShape) -> None:
    """Fills every parameter from a Hugging Face folder, one tensor at a time. Raises ConfigError if the folder does not
    hold exactly this model, or has values that are not finite."""
    source = HFFolder(folder, shape)
    for row in table:
        row.param.copy_(row.join([source.read(part, row.param.dtype) for part in row.slices]))


class Gatherer:
    """Streams full Hugging Face tensors from the grid: gathered over tensor-parallel ranks, broadcast over stages.

    Iterating is collective over each model-parallel group; every rank receives every tensor.
    """

    def __init__(self, table: list[WeightRow], grid: Grid) -> None:
        self.grid = grid
        self.mine = {part.name: (row, i) for row in table if not row.duplicate for i, part in enumerate(row.slices)}
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        described = [
            (part.name, part.full, row.param.dtype) for row, i in self.mine.values() for part in [row.slices[i]]
        ]
        stages: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[] for _ in range(grid.pipeline)]
        dist.all_gather_object(stages, described, group=self.pipeline_group)
        self.owned = [(stage, *entry) for stage, entries in enumerate(stages) for entry in entries]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model with its full shape, in streaming order."""
        return {name: full for _, name, full, _ in self.owned}

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full tensor in the parameters' dtype, on the device), one at a time."""
        for stage, name, full, dtype in self.owned:
            if self.grid.pipeline_rank == stage:
                whole = self._gather(name)
            else:
                whole = torch.empty(full, dtype=dtype, device=torch.cuda.current_device())
            if self.grid.pipeline > 1:
                source = dist.get_global_rank(self.pipeline_group, stage)
                dist.broadcast(whole, src=source, group=self.pipeline_group)
            yield name, whole

    def _gather(self, name: str) -> Tensor:
        row, i = self.mine[name]
        part, local = row.slices[i], row.split(row.param.detach())[i].contiguous()
        if self.grid.tensor == 1 or part.size == part.full:
            return local
        dim = next(d for d in range(len(part.full)) if part.size[d] != part.full[d])
        # The last vocabulary shard may have fewer rows: all ranks gather the same padded size, and the result is cut.
        step = -(-part.full[dim] // self.grid.tensor)
        padded = (
            local if local.shape[dim] == step else torch.nn.functional.pad(local, (0, 0, 0, step - local.shape[dim]))
        )
        parts = [torch.empty_like(padded) for _ in range(self.grid.tensor)]
        dist.all_gather(parts, padded, group=self.tensor_group)
        return torch.cat(parts, dim=dim).narrow(dim, 0, part.full[dim]).contiguous()
