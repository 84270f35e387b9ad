"""The head on a GPU: cuBLAS products and Triton kernels over one reused buffer of logits.

A chunk's logits are written once, read for the statistics, and read once more to be replaced by their gradient in
place; the two products of the backward half then read that. A tensor-parallel group gathers four numbers per token.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from icrl_kernels import triton_kernels as kernels
from icrl_kernels.chunking import Gradients, Slopes, TokenOutputs
from icrl_kernels.objective import Streams, Terms
from icrl_kernels.vocabulary import VocabShard

CHUNK_BYTES = 2_100_000_000
"""Bytes of logits that exist at one time, if the caller gives no number of tokens."""
CHUNK_ALIGN = 128
TILE_ROWS, TILE_COLUMNS = 128, 256
"""Tile size of cuBLAS's bf16 products on Hopper: one tile occupies one multiprocessor."""
WIDTH_OF_A_WAVE = 4096
"""Hidden size at which one pass over the weight's fp32 gradient takes as long as one wave of d(hidden): 8 bytes per
weight at 3.0 TB/s, versus 2 x 128 x 256 FLOPs per vocabulary entry on one of 132 multiprocessors of 790 TF/s."""
ROW_ALIGN = 64
"""Rows of the buffer begin at multiples of this many elements, whatever the number of columns."""
TOKENS_PER_PROGRAM = 128


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of the kernels that process the logits."""

    block: int
    """Columns per iteration."""
    warps: int
    programs: int
    """Concurrent programs per multiprocessor."""


TUNING = {9: Tuning(2048, 8, 4)}
"""By major compute capability. Chosen from compiler output: with blocks of 4096 a thread uses 80 to 92 registers, and
four programs do not fit concurrently. On an H100 it reaches 89 % of the copy bandwidth;
`tools/bench_head_cuda.py --tune` compares other values, and has not run there yet."""
DEFAULT = Tuning(2048, 8, 4)
INTERPRETER = Tuning(1024, 4, 1)


class TritonChunks:
    """A buffer of [chunk, columns], with the products and kernels of the head.

    fp32 inputs have fp32 logits and gradients. bf16 inputs have logits of dtype `logits` and bf16 gradients, which are
    in the first half of their row if the logits are fp32.
    """

    dtype = torch.float32

    def __init__(
        self,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        temperature: float,
        shard: VocabShard,
        tokens: int | None,
        logits: str,
    ) -> None:
        self.hidden_LH, self.weight_VH = hidden_LH.detach(), weight_VH.detach()[: shard.valid]
        self.shard, self.inverse_temperature = shard, 1.0 / float(temperature)
        self.per_nat = math.log2(math.e) / float(temperature)
        stored = torch.bfloat16 if logits == "bf16" else torch.float32
        # Based on all rows including padding, which are equal on every rank: ranks must use the same chunks.
        self.tokens = tokens or chunk_rows(
            hidden_LH.shape[0],
            _stride(weight_VH.shape[0]) * stored.itemsize,
            hidden_LH.shape[1],
            _multiprocessors(hidden_LH.device),
        )
        rows = min(self.tokens, hidden_LH.shape[0])
        self.buffer_CV = hidden_LH.new_empty(rows, _stride(shard.valid), dtype=stored)
        self.tuning = _tuning(hidden_LH.device)
        self.programs = self.tuning.programs * _multiprocessors(hidden_LH.device)

    def score(self, span: slice, targets_C: Tensor, logprobs_C: Tensor, entropy_C: Tensor) -> None:
        """See `chunking.Chunks`."""
        with _on(targets_C.device):
            self._logits(span)
            partials_P4C = self.statistics(targets_C)
            parts, _, rows = partials_P4C.shape
            kernels.score_tokens[(triton.cdiv(rows, TOKENS_PER_PROGRAM),)](
                partials_P4C,
                logprobs_C,
                entropy_C,
                parts,
                rows,
                self.inverse_temperature,
                self.per_nat,
                ROWS=TOKENS_PER_PROGRAM,
            )

    def train(self, span: slice, streams: Streams, terms: Terms, outputs: TokenOutputs, grads: Gradients) -> None:
        """See `chunking.Chunks`."""
        with _on(streams.targets_L.device):
            self._logits(span)
            slopes_4C = self.objective(span, streams, terms, outputs)
            if grads.hidden_LH is None and grads.weight_VH is None:
                return
            entropy_C, has_entropy = outputs.entropy_L[span], terms.entropy_coef != 0
            self._add(span, streams.targets_L, entropy_C, slopes_4C, has_entropy, streams.coefficients_L == 0, grads)

    def backward(self, span: slice, targets_C: Tensor, slopes: Slopes, grads: Gradients) -> None:
        """See `chunking.Chunks`."""
        with _on(targets_C.device):
            self._logits(span)
            scratch = TokenOutputs.empty(targets_C, self.dtype)
            counted_C = (~slopes.silent_C).float()
            whole = slice(0, targets_C.shape[0])
            slopes_4C = self.objective(whole, Streams(targets_C, counted_C, counted_C), Terms(), scratch)
            slopes_4C[2] = slopes.logprob_C.masked_fill(slopes.silent_C, 0.0)
            if slopes.entropy_C is not None:
                slopes_4C[3] = slopes.entropy_C.masked_fill(slopes.silent_C, 0.0)
            has_entropy = slopes.entropy_C is not None
            self._add(span, targets_C, scratch.entropy_L, slopes_4C, has_entropy, slopes.silent_C, grads)

    def _add(
        self,
        span: slice,
        targets_C: Tensor,
        entropy_C: Tensor,
        slopes_4C: Tensor,
        has_entropy: bool,
        silent_C: Tensor,
        grads: Gradients,
    ) -> None:
        """Computes the two products of the backward half from the logits in the buffer."""
        grad_CV = self.logit_gradients(targets_C, entropy_C, slopes_4C, has_entropy)
        if grads.hidden_LH is not None:
            _product(grad_CV, self.weight_VH, out=grads.hidden_LH[span])
        if grads.weight_VH is not None:
            # The gradient of a silent token is 0, but 0 times a NaN would spread over the whole weight gradient.
            hidden_CH = self.hidden_LH[span].masked_fill(silent_C[:, None], 0.0)
            _add_product_(grads.weight_VH[: self.shard.valid], grad_CV.T, hidden_CH, grads.weight_scale)

    def _logits(self, span: slice) -> None:
        """Computes the chunk's logits into the buffer."""
        hidden_CH = self.hidden_LH[span]
        _product(hidden_CH, self.weight_VH.T, out=self.buffer_CV[: hidden_CH.shape[0], : self.shard.valid])

    def statistics(self, targets_C: Tensor) -> Tensor:
        """Statistics [parts, 4, C] of the logits in the buffer, over all ranks of the group (`triton_kernels`)."""
        rows, columns = targets_C.shape[0], self.shard.valid
        splits = self._splits(rows)
        partials_P4C = targets_C.new_empty(splits, 4, rows, dtype=torch.float32)
        kernels.split_statistics[(min(self.programs, rows * splits),)](
            self.buffer_CV,
            targets_C,
            partials_P4C,
            rows,
            columns,
            self.buffer_CV.stride(0),
            self.shard.start,
            splits,
            self.per_nat,
            BLOCK=self.tuning.block,
            num_warps=self.tuning.warps,
        )
        return partials_P4C if self.shard.ranks() == 1 else self._gathered(partials_P4C)

    def _gathered(self, partials_P4C: Tensor) -> Tensor:
        """[ranks, 4, C]: the statistics of all ranks; this rank's splits are merged first."""
        parts, _, rows = partials_P4C.shape
        own_4C = partials_P4C[0]
        if parts > 1:
            own_4C = torch.empty_like(own_4C)
            grid = (triton.cdiv(rows, TOKENS_PER_PROGRAM),)
            kernels.merge_statistics[grid](partials_P4C, own_4C, parts, rows, self.per_nat, ROWS=TOKENS_PER_PROGRAM)
        all_P4C = own_4C.new_empty(self.shard.ranks(), 4, rows)
        dist.all_gather_into_tensor(all_P4C.view(-1, rows), own_4C, group=self.shard.group)
        return all_P4C

    def objective(self, span: slice, streams: Streams, terms: Terms, outputs: TokenOutputs) -> Tensor:
        """Fills the chunk's outputs; returns [4, C]: top, log of the sum, dloss/dlogprob, dloss/dentropy."""
        partials_P4C = self.statistics(streams.targets_L)
        parts, _, rows = partials_P4C.shape
        slopes_4C = torch.empty_like(partials_P4C[0])
        coefficients_C = _plain(streams.coefficients_L)

        def given(stream_C: Tensor | None) -> Tensor:
            return coefficients_C if stream_C is None else _plain(stream_C)

        kernels.token_objective[(triton.cdiv(rows, TOKENS_PER_PROGRAM),)](
            partials_P4C,
            coefficients_C,
            _plain(streams.advantages_L),
            given(streams.old_logprobs_L),
            given(streams.behaviour_logprobs_L),
            coefficients_C if streams.calibrated_L is None else streams.calibrated_L.contiguous().view(torch.uint8),
            given(streams.reference_logprobs_L),
            outputs.loss_L[span],
            outputs.logprobs_L[span],
            outputs.entropy_L[span],
            outputs.ratio_L[span],
            outputs.calibration_weight_L[span],
            outputs.clipped_low_L[span].view(torch.uint8),
            outputs.clipped_high_L[span].view(torch.uint8),
            outputs.finite_L[span].view(torch.uint8),
            slopes_4C,
            parts,
            rows,
            self.inverse_temperature,
            self.per_nat,
            # Triton would compile again for integers, and once more for the integer 1.
            float(1.0 - terms.clip_low),
            float(1.0 + terms.clip_high),
            float(terms.w_max),
            float(terms.kl_coef),
            float(terms.entropy_coef),
            float(terms.shaping_gamma),
            HAS_OLD=streams.old_logprobs_L is not None,
            HAS_BEHAVIOUR=streams.behaviour_logprobs_L is not None,
            HAS_REFERENCE=terms.kl_coef != 0 and streams.reference_logprobs_L is not None,
            ROWS=TOKENS_PER_PROGRAM,
        )
        return slopes_4C

    def logit_gradients(self, targets_C: Tensor, entropy_C: Tensor, slopes_4C: Tensor, has_entropy: bool) -> Tensor:
        """[C, columns] in the dtype of the hidden states, in the buffer's memory."""
        rows, columns = targets_C.shape[0], self.shard.valid
        narrower = self.buffer_CV.dtype != self.hidden_LH.dtype
        grad_CV = self.buffer_CV.view(self.hidden_LH.dtype)[:rows, :columns]
        splits = 1 if narrower else self._splits(rows)
        kernels.logit_gradients[(min(self.programs, rows * splits),)](
            self.buffer_CV,
            grad_CV,
            targets_C,
            entropy_C,
            slopes_4C,
            rows,
            columns,
            self.buffer_CV.stride(0),
            grad_CV.stride(0),
            self.shard.start,
            splits,
            self.inverse_temperature,
            self.per_nat,
            HAS_ENTROPY=has_entropy,
            BLOCK=self.tuning.block,
            num_warps=self.tuning.warps,
        )
        return grad_CV

    def _splits(self, rows: int) -> int:
        """Splits per row, so that few rows also occupy all multiprocessors; a split has at least one block."""
        return max(1, min(triton.cdiv(self.programs, rows), triton.cdiv(self.shard.valid, self.tuning.block)))


def _stride(columns: int) -> int:
    """Row stride of the buffer in elements."""
    return triton.cdiv(max(1, columns), ROW_ALIGN) * ROW_ALIGN


@lru_cache(maxsize=1024)
def chunk_rows(tokens: int, bytes_per_token: int, width: int, multiprocessors: int) -> int:
    """Tokens of every chunk but the last, at most CHUNK_BYTES of logits.

    d(hidden) of a chunk is [rows, width]: few tiles for many multiprocessors, so its last wave of tiles may be nearly
    empty. And every chunk reads and writes the fp32 gradient of the weight once. Returns the chunk size with the lowest
    predicted cost of both, and the smallest of equals. Ranks must use the same chunks: every argument is the same on
    all ranks of a group.
    """
    most = max(CHUNK_ALIGN, CHUNK_BYTES // bytes_per_token // CHUNK_ALIGN * CHUNK_ALIGN)
    whole = triton.cdiv(max(1, tokens), CHUNK_ALIGN) * CHUNK_ALIGN
    cuts = range(CHUNK_ALIGN, min(most, whole) + 1, CHUNK_ALIGN)

    def cost(rows: int) -> float:
        return waves(tokens, rows, width, multiprocessors) + triton.cdiv(tokens, rows) * width / WIDTH_OF_A_WAVE

    return min(cuts, key=lambda rows: (cost(rows), rows))


def waves(tokens: int, rows: int, width: int, multiprocessors: int) -> int:
    """Waves of tiles in the d(hidden) products of all chunks."""

    def of_chunk(count: int) -> int:
        tiles = triton.cdiv(count, TILE_ROWS) * triton.cdiv(width, TILE_COLUMNS)
        return int(triton.cdiv(tiles, multiprocessors))

    whole, last = divmod(tokens, rows)
    return whole * of_chunk(rows) + (of_chunk(last) if last else 0)


def _plain(stream_C: Tensor) -> Tensor:
    return stream_C.float().contiguous()


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, accumulated in fp32; `out` may be fp32 if the factors are bf16."""
    if out.dtype == left.dtype and (left.dtype == torch.float32 or out.is_cuda):
        torch.mm(left, right, out=out)
    elif out.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:  # for the interpreter: there is no CPU kernel for these products
        out.copy_(left.float() @ right.float())


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale * left @ right in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=scale)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current, because kernels launch on the current device, whatever that of their tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _tuning(device: torch.device) -> Tuning:
    if device.type != "cuda":
        return INTERPRETER
    return TUNING.get(torch.cuda.get_device_capability(device)[0], DEFAULT)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
