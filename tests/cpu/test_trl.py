"""TRL's trainer on the files that `icrl distill` writes: it trains on the tokens of `icrl sft`."""

from __future__ import annotations

from pathlib import Path

import byte_model
import pytest
from datasets import load_dataset
from trajectory_files import openai, write_jsonl
from trl import SFTConfig, SFTTrainer

from icrl_megatron.distill import readers, writers
from icrl_megatron.distill.encode import encode
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.settings.rollout_schema import RolloutSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = byte_model.build(tmp_path_factory.mktemp("trl") / "bytes")
    byte_model.use_template(folder, "qwen3")
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_trl_trains_the_same_tokens(suffix: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # set by tests that make this process a rank
        monkeypatch.delenv(name, raising=False)
    rows = write_jsonl(tmp_path / "rows.jsonl", [openai(n) for n in range(3)])
    written = tmp_path / f"written.{suffix}"
    trajectories = [read.trajectory for read in readers.read(str(rows)) if read.trajectory is not None]
    writers.write(written, trajectories)
    kind, cache = "json" if suffix == "jsonl" else "parquet", str(tmp_path / "cache")
    data = load_dataset(kind, data_files=str(written), split="train", cache_dir=cache)
    settings = SFTConfig(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=3, max_length=None, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(str(model), args=settings, train_dataset=data)
    vocabulary = tokenizer(model)
    encoded = [encode(one, "qwen3", Prompter(vocabulary, RolloutSettings())) for one in trajectories]
    newline = vocabulary("\n").input_ids  # after the last end of turn
    assert list(trainer.train_dataset["input_ids"]) == [[*one.ids_T.tolist(), *newline] for one in encoded]
    assert trainer.train().training_loss > 0
