"""Models, samples, settings and layouts of the grid tests, shared by the tests and all ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor
from whole_samples import Whole

from icrl_megatron.settings.schema import Settings, TinyModel

LEARNING_RATE = 1e-2
STEPS = 2
VOCAB = {"tied": 101, "untied": 99, "qwen2": 97}
"""Odd, so that no TP size divides it and the last ranks have padding rows."""
MODELS = {
    "tied": TinyModel(max_positions=128),
    "untied": TinyModel(layers=4, hidden=48, heads=8, kv_heads=4, head_dim=12, ffn=80, tie_embeddings=False),
    "qwen2": TinyModel(family="qwen2", max_positions=128, tie_embeddings=False),
}
"""Two K/V groups (one per rank at TP 2) and four. qwen2 has biases and no norms of query and key heads."""
ROPE = {
    "tied": {"rope_type": "default", "rope_theta": 10_000.0},
    "qwen2": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "untied": {"rope_type": "yarn", "rope_theta": 500.5, "factor": 4.0, "original_max_position_embeddings": 16},
}
"""The samples are longer than YaRN's original_max_position_embeddings."""


@dataclass(frozen=True)
class Layout:
    """How a case is distributed over ranks and micro-batches; this must not change the results."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence: bool = False
    budget: int = 64
    recompute: str = "none"
    shuffle: bool = False
    head: str = "torch"
    multiple: int = 1
    """Tokens of a micro-batch are padded to a multiple of this, as FP8 requires."""

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context


LAYOUTS = {
    "one": Layout(budget=4096),
    "budget": Layout(budget=48),
    "shuffled": Layout(shuffle=True),
    "padded": Layout(multiple=128),
    "full": Layout(recompute="full"),
    "selective": Layout(recompute="selective"),
    "tp2": Layout(tensor=2),
    "tp2sp": Layout(tensor=2, sequence=True),
    "tp2sp-padded": Layout(tensor=2, sequence=True, multiple=16),
    "tp2sp-full": Layout(tensor=2, sequence=True, recompute="full"),
    "pp2": Layout(pipeline=2),
    "pp2-selective": Layout(pipeline=2, recompute="selective"),
    "dp2": Layout(data=2),
    "tp2pp2sp": Layout(tensor=2, pipeline=2, sequence=True),
    "tp2dp2sp": Layout(tensor=2, data=2, sequence=True),
    "pp2dp2": Layout(pipeline=2, data=2),
    "kernels": Layout(head="triton"),
    "tp2pp2sp-kernels": Layout(tensor=2, pipeline=2, sequence=True, head="triton"),
}
CONTEXT_LAYOUTS = {
    "cp2": Layout(context=2, data=4, budget=48),
    "tp2cp2sp": Layout(tensor=2, context=2, data=2, sequence=True, recompute="selective"),
    "tp2cp2pp2sp": Layout(tensor=2, context=2, pipeline=2, sequence=True),
}
"""Layouts of eight ranks (`test_context_parallel.py`)."""
GRIDS = ("one", "tp2", "tp2sp", "pp2", "dp2", "tp2pp2sp", "tp2dp2sp", "pp2dp2")
"""Layouts with different grids, between which weights and checkpoints must be transferable."""
SAVERS = ("tp2pp2sp", "pp2dp2", "dp2", "tp2", "one")
"""Layouts whose checkpoints are loaded by all later layouts; those with the most ranks run first."""
SHARD_BYTES = 40_000
"""Shard size for exports to several files."""


@dataclass(frozen=True)
class Case:
    """One training problem."""

    model: str
    samples: int
    adjust: Callable[[Settings], None]

    def settings(self, layout: Layout) -> Settings:
        settings = Settings()
        settings.actor.precision = "fp32"
        settings.actor.tensor_parallel, settings.actor.pipeline_parallel = layout.tensor, layout.pipeline
        settings.actor.context_parallel = layout.context
        settings.actor.sequence_parallel, settings.actor.recompute = layout.sequence, layout.recompute
        settings.actor.micro_batch_tokens, settings.actor.head_chunk_tokens = layout.budget, 16
        settings.actor.head_backend = layout.head
        # With a large eps, Adam does not amplify rounding errors of gradients near 0.
        settings.optim.learning_rate, settings.optim.eps = LEARNING_RATE, 1e-3
        settings.optim.clip_grad = 0.05
        settings.launch.timeout_s = 120.0
        self.adjust(settings)
        return settings

    def draw(self, layout: Layout) -> list[Whole]:
        """Attempts and revisions with random tokens, and masked observations in their responses."""
        samples = draw_samples(self.samples, VOCAB[self.model])
        if layout.shuffle:
            random.Random(7).shuffle(samples)
        return samples


@dataclass
class Trained:
    """The results of a run of STEPS steps; lists are ordered by step or by update."""

    logprobs: dict[str, Tensor]
    """Whole id -> log-probs of its loss tokens before the first step."""
    losses: list[float]
    """By step."""
    norms: list[float]
    """By step: the largest norm of its updates."""
    metrics: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    """By update, with Hugging Face names, before clipping."""
    weights: dict[str, Tensor]
    token_weights: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Whole id -> calibration weights in the first step, where it is calibrated."""


def draw_samples(count: int, vocabulary: int) -> list[Whole]:
    r = random.Random(count)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(r.randrange(vocabulary) for _ in range(r.randrange(low, high)))

    found = []
    for i in range(count):
        revision = i % 3 == 0
        prompt, response = ids(2, 20), ids(1, 14)
        found.append(
            Whole(
                sample_id=f"t{i // 3}#{i}",
                group=f"t{i // 3}",
                role="revision" if revision else "attempt",
                round=int(revision),
                behaviour_prompt_ids=prompt + ids(1, 9) if revision else prompt,
                train_prompt_ids=prompt,
                response_ids=response,
                loss_mask=tuple(j == 0 or r.random() < 0.8 for j in range(len(response))),
                rollout_logprobs=tuple(-r.uniform(2.5, 7.0) for _ in response),
                calibrated=revision,
                reward=1.0,
                advantage=r.uniform(-1.5, 1.5),
            )
        )
    return found


def _paper(settings: Settings) -> None:
    settings.algo.entropy_coef = 0.01


def _everything(settings: Settings) -> None:
    algo = settings.algo
    algo.calibration.denominator = "recomputed"
    algo.mismatch_correction.enabled = True
    algo.kl_coef, algo.entropy_coef = 0.1, 0.02
    algo.loss_normalisation, algo.updates_per_step = "token_mean", 2
    # So narrow that the second update of a step is clipped.
    algo.clip_low = algo.clip_high = 0.02
    settings.rollout.temperature = 0.8


def _sparse(settings: Settings) -> None:
    settings.algo.updates_per_step = 3
    settings.algo.mismatch_correction.enabled = True
    settings.optim.clip_grad, settings.optim.eps = 0.0, 0.1


def _plain(settings: Settings) -> None:
    """Like `everything`, with the log-prob head that recomputes logits instead of the fused head."""
    _everything(settings)
    settings.algo.loss = "icrl_megatron.algo.losses:icrl"


def _gspo(settings: Settings) -> None:
    algo = settings.algo
    algo.loss, algo.kl_estimator, algo.kl_coef, algo.entropy_coef = "gspo", "k2", 0.1, 0.02
    algo.loss_normalisation, algo.constant_tokens, algo.updates_per_step = "constant", 20, 2
    algo.clip_low = algo.clip_high = 0.005


def _cispo(settings: Settings) -> None:
    algo = settings.algo
    algo.loss, algo.kl_estimator, algo.kl_coef = "cispo", "k1", 0.1
    algo.updates_per_step, algo.mismatch_correction.enabled = 2, True
    algo.clip_low = algo.clip_high = 0.01


def _dual_clip(settings: Settings) -> None:
    algo = settings.algo
    algo.dual_clip, algo.updates_per_step = 1.01, 2
    algo.clip_low = algo.clip_high = 0.02


def _sparse_gspo(settings: Settings) -> None:
    _sparse(settings)
    settings.algo.loss = "gspo"


CASES = {
    "paper": Case("tied", 13, _paper),
    "everything": Case("untied", 14, _everything),
    # One sample per update, so one of two replicas has none.
    "sparse": Case("tied", 3, _sparse),
    "plain": Case("untied", 14, _plain),
    "qwen2": Case("qwen2", 9, _everything),
    "gspo": Case("tied", 9, _gspo),
    "cispo": Case("tied", 9, _cispo),
    "dual_clip": Case("tied", 9, _dual_clip),
    "sparse_gspo": Case("tied", 3, _sparse_gspo),
}

_HEADS = ("paper", "everything", "plain")
"""Tied and own output weights; both heads with all terms of the loss."""
_MODELS = (*_HEADS, "sparse", "qwen2")
_FEWER = {
    # The kernels change only the head, and tests of the head cover its other inputs.
    "kernels": ("everything",),
    "tp2pp2sp-kernels": _HEADS,
    # How layers are computed cannot change a loss, which sees log-probs.
    **dict.fromkeys(("tp2sp", "tp2sp-padded", "tp2sp-full", "pp2-selective"), _MODELS),
}


def cases_of(layout: str) -> tuple[str, ...]:
    """The cases that a layout trains."""
    return _FEWER.get(layout, tuple(CASES))


SAVED = {
    "fp32": (CASES["paper"], "fp32"),
    "bf16": (CASES["paper"], "bf16"),
    "qwen2": (replace(CASES["paper"], model="qwen2"), "fp32"),
}
"""Name -> case and precision of the saved checkpoints. With qwen2, the optimizer also has moments of biases."""


def model_folder(root: Path, name: str, dtype: str = "float32") -> Path:
    return root / f"{name}-{dtype}"
