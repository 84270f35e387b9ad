"""One batch of requests on a transformers model: prefill, then one token a step until every row has ended.

Shapes: B requests, R rows still in the batch, U distinct prompts, L longest prompt, N most new tokens, V vocabulary.
Cache columns 0..L-1 hold the prompts, right-padded; column L + t holds the token generated at step t, for every row.
The prefill therefore needs no mask (causal attention never sees padding to the right of a token), and a decode step
masks only the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from icrl_megatron.engines.protocol import EngineError, Sampling
from icrl_megatron.engines.stop_texts import StopRows, StopTexts
from icrl_megatron.types import FinishReason, FloatArray, IdArray, Ids, id_array, logprob_array

PREFILL_TOKENS = 16384
"""Padded prompt tokens in one prefill forward; bounds its memory."""
_GROWTH = 32
"""Columns by which a full cache grows, at least."""


@dataclass(frozen=True)
class Request:
    prompt: Ids
    sampling: Sampling
    stop: StopTexts | None = None
    """`sampling.stop` for the model's tokenizer."""


@dataclass(frozen=True)
class Finished:
    """`index` is the position of the request in the batch."""

    index: int
    ids: IdArray
    logprobs: FloatArray
    finish_reason: FinishReason


class _Layer(CacheLayerMixin):
    """Keys and values in one growing buffer [rows, kv_heads, columns, head_dim], written in place. Concatenating, as
    transformers' DynamicLayer does, would copy the whole cache at every token."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self._shape = (rows, columns)
        self.window = slice(0, rows)
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        (rows, columns), (_, heads, _, width) = self._shape, key_states.shape
        self.keys = key_states.new_zeros(rows, heads, columns, width)
        self.values = value_states.new_zeros(rows, heads, columns, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        assert self.keys is not None and self.values is not None
        if end > self.keys.shape[-2]:
            extra = max(_GROWTH, self.keys.shape[-2] // 2)
            self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, extra)) for t in (self.keys, self.values))
        self.keys[self.window, :, start:end] = key_states
        self.values[self.window, :, start:end] = value_states
        if start == 0:
            return key_states, value_states
        self.length = end
        return self.keys[self.window, :, :end], self.values[self.window, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.window = slice(0, rows.numel())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Decoding:
    """The state of one batch. Call `step()` until `rows` is 0.

    Log-probs are those of the distribution the token was drawn from: softmax(logits / T) in fp32 over all V rows of the
    head, with T = 1 for greedy requests. Rows without a token in the tokenizer are included because the trainer, SGLang
    and other users of the exported model normalize over them too. Such an id decodes to an empty string.
    """

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request]) -> None:
        self._model = model
        self._backbone = model.base_model
        self._head = model.get_output_embeddings()
        device = model.device
        samplings = [r.sampling for r in requests]
        self._steps = max(s.max_new_tokens for s in samplings)
        widest = max(len(s.stop_ids) for s in samplings)
        stops = [(*s.stop_ids, *[-1] * (widest - len(s.stop_ids))) for s in samplings]
        self._stop_RS = torch.tensor(stops, dtype=torch.long, device=device).view(len(requests), widest)
        self._stop_rows = StopRows([r.stop for r in requests], device)
        self._limit_R = torch.tensor([s.max_new_tokens for s in samplings], device=device)
        self._index_R = torch.arange(len(requests), device=device)
        self._alive_R = torch.ones(len(requests), dtype=torch.bool, device=device)
        self._temperature_R1 = torch.tensor([[s.temperature or 1.0] for s in samplings], device=device)
        self._tempered = any(s.temperature not in (0.0, 1.0) for s in samplings)
        greedy = [s.temperature == 0.0 for s in samplings]
        self._greedy_R = torch.tensor(greedy, device=device) if any(greedy) else None
        self._uniform_NR = torch.from_numpy(_uniforms(samplings, self._steps)).to(device)
        self._ids_NR = torch.zeros(self._steps, len(requests), dtype=torch.long, device=device)
        self._logprobs_NR = torch.zeros(self._steps, len(requests), device=device)
        self._done = 0
        self._alive = len(requests)
        self._prompts = [r.prompt for r in requests]
        self._tokens_R: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that have not finished."""
        return self._alive

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Samples one token for every row (the first call prefills) and returns the requests that finished with it.

        Raises EngineError when log-probs are not finite.
        """
        logits_RV = self._prefill() if self._tokens_R is None else self._decode()
        self._tokens_R, logprobs_R = self._sample(logits_RV)
        self._ids_NR[self._done] = self._tokens_R
        self._logprobs_NR[self._done] = logprobs_R
        self._done += 1
        stopped_R = (self._tokens_R[:, None] == self._stop_RS).any(1)
        stopped_R |= self._stop_rows.ended(self._tokens_R, self._ids_NR[: self._done], self._alive_R)
        ended_R = (stopped_R | (self._limit_R <= self._done)) & self._alive_R
        ended = ended_R.nonzero().flatten().tolist()
        return self._finish(ended, ended_R, stopped_R) if ended else []

    @torch.inference_mode()
    def abort(self) -> list[Finished]:
        """Ends all rows that have not finished, with the tokens that they have."""
        if self._done == 0:
            return [Finished(i, id_array(()), logprob_array(()), "abort") for i in range(self._alive)]
        rows, ended_R = self._alive_R.nonzero().flatten().tolist(), self._alive_R
        left = self._finish(rows, ended_R, torch.zeros_like(ended_R)) if rows else []
        return [replace(one, finish_reason="abort") for one in left]

    def _prefill(self) -> torch.Tensor:
        """Returns logits_RV of the first new token. A prompt shared by several requests is prefilled once."""
        device = self._model.device
        distinct = sorted(set(self._prompts), key=lambda p: (len(p), p))
        longest = len(distinct[-1])
        layers = [_Layer(len(distinct), longest + _GROWTH) for _ in range(self._model.config.num_hidden_layers)]
        self._cache, self._layers = Cache(layers=list(layers)), layers
        last_UH = torch.cat([self._prefill_rows(distinct, rows) for rows in _chunks([len(p) for p in distinct])])
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        select_R = torch.tensor([row_of[p] for p in self._prompts], device=device)
        for layer in layers:
            layer.length = longest
            layer.select(select_R)
        lengths_R = torch.tensor([len(p) for p in self._prompts], device=device)
        self._position_R1 = lengths_R[:, None]
        columns = torch.arange(longest + self._steps, device=device)
        padding_RC = (columns >= lengths_R[:, None]) & (columns < longest)
        mask_RC = torch.zeros(padding_RC.shape, dtype=self._model.dtype, device=device)
        self._mask_R11C = mask_RC.masked_fill_(padding_RC, torch.finfo(self._model.dtype).min)[:, None, None, :]
        return self._head(last_UH)[select_R].float()

    def _prefill_rows(self, prompts: Sequence[Ids], rows: slice) -> torch.Tensor:
        chunk = prompts[rows]
        width = len(chunk[-1])
        ids = np.zeros((len(chunk), width), dtype=np.int64)
        for row, prompt in enumerate(chunk):
            ids[row, : len(prompt)] = prompt
        for layer in self._layers:
            layer.window = rows
        device = self._model.device
        hidden_RLH = self._forward(torch.from_numpy(ids).to(device), torch.arange(width, device=device)[None], None)
        return hidden_RLH[torch.arange(len(chunk)), torch.tensor([len(p) - 1 for p in chunk])]

    def _decode(self) -> torch.Tensor:
        assert self._tokens_R is not None
        columns = self._layers[0].length + 1
        hidden = self._forward(self._tokens_R[:, None], self._position_R1, self._mask_R11C[..., :columns])
        self._position_R1 = self._position_R1 + 1
        logits_RV: torch.Tensor = self._head(hidden[:, -1]).float()
        return logits_RV

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # A mask per layer type skips transformers' own mask building, which costs more than a tiny layer.
        hidden: torch.Tensor = self._backbone(
            input_ids=ids,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _sample(self, logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse-CDF sampling: (ids_R, log-probs_R)."""
        if self._tempered:
            logits_RV = logits_RV / self._temperature_R1
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        cdf_RV = logprobs_RV.exp().cumsum(-1)
        total_R1 = cdf_RV[:, -1:]
        # Strictly below the total, so that the search cannot pass the last id with nonzero probability.
        point_R1 = torch.minimum(self._uniform_NR[self._done][:, None] * total_R1, total_R1.nextafter(-total_R1))
        ids_R1 = torch.searchsorted(cdf_RV, point_R1, right=True).clamp_(max=logits_RV.shape[-1] - 1)
        if self._greedy_R is not None:
            ids_R1 = torch.where(self._greedy_R[:, None], logprobs_RV.argmax(-1, keepdim=True), ids_R1)
        return ids_R1[:, 0], logprobs_RV.gather(1, ids_R1)[:, 0]

    def _finish(self, ended: list[int], ended_R: torch.Tensor, stopped_R: torch.Tensor) -> list[Finished]:
        rows = torch.tensor(ended, device=ended_R.device)
        ids = self._ids_NR[: self._done].index_select(1, rows).T.to("cpu", torch.int32).numpy()
        logprobs_RN = self._logprobs_NR[: self._done].index_select(1, rows).T
        if not bool(torch.isfinite(logprobs_RN).all()):
            raise EngineError("The model returned log-probs that are not finite: check the last weight update.")
        reasons: list[FinishReason] = ["stop" if s else "length" for s in stopped_R[rows].tolist()]
        indices = self._index_R[rows].tolist()
        self._alive_R = self._alive_R & ~ended_R
        self._alive -= len(ended)
        # Finished rows stay until they are a quarter of the batch, because compaction copies the cache.
        if 0 < self._alive <= 0.75 * self._alive_R.numel():
            self._compact(self._alive_R.nonzero().flatten())
        # Copies: a row of the batch would keep the whole batch in memory.
        rows_of = zip(indices, map(np.copy, ids), map(np.copy, logprobs_RN.float().cpu().numpy()), reasons, strict=True)
        return [Finished(*row) for row in rows_of]

    def _compact(self, keep: torch.Tensor) -> None:
        for layer in self._layers:
            layer.select(keep)
        assert self._tokens_R is not None
        self._tokens_R, self._stop_RS = self._tokens_R[keep], self._stop_RS[keep]
        self._stop_rows.select(keep)
        self._limit_R, self._index_R, self._alive_R = self._limit_R[keep], self._index_R[keep], self._alive_R[keep]
        self._temperature_R1, self._position_R1 = self._temperature_R1[keep], self._position_R1[keep]
        self._mask_R11C = self._mask_R11C[keep]
        self._greedy_R = None if self._greedy_R is None else self._greedy_R[keep]
        self._uniform_NR = self._uniform_NR.index_select(1, keep)
        self._ids_NR, self._logprobs_NR = self._ids_NR.index_select(1, keep), self._logprobs_NR.index_select(1, keep)


def _uniforms(samplings: Sequence[Sampling], steps: int) -> np.ndarray:
    """[N, B] fp32: column b depends only on the seed of request b."""
    uniforms = np.zeros((steps, len(samplings)), dtype=np.float32)
    for column, sampling in enumerate(samplings):
        generator = np.random.Generator(np.random.Philox(key=sampling.seed))
        uniforms[: sampling.max_new_tokens, column] = generator.random(sampling.max_new_tokens, dtype=np.float32)
    return uniforms


def _chunks(lengths: Sequence[int]) -> list[slice]:
    """Splits ascending lengths into chunks of at most PREFILL_TOKENS padded tokens (a longer prompt gets its own)."""
    cuts, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > PREFILL_TOKENS:
            cuts.append(slice(start, end))
            start = end
    return cuts
