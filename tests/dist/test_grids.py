"""Parallel layouts do not change results: real gloo ranks against one process with Hugging Face's model and AdamW.

Three torchrun jobs with 4, 2 and 1 ranks run all layouts (`grid_worker.py`); the tests read their results.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import python
from grid_cases import CASES, GRIDS, LAYOUTS, MODELS, ROPE, SAVERS, SHARD_BYTES, VOCAB, Trained, cases_of, model_folder
from grid_reference import Reference, apart, check_training
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

WORKER = Path(__file__).parent / "grid_worker.py"
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1000)]


def make_model(folder: Path, name: str, dtype: torch.dtype) -> None:
    """Saves a model with weights so large that no layer, norm or bias is close to the identity."""
    tiny = MODELS[name]
    config = AutoConfig.for_model(
        tiny.family,
        vocab_size=VOCAB[name], hidden_size=tiny.hidden, intermediate_size=tiny.ffn, num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads, num_key_value_heads=tiny.kv_heads, head_dim=tiny.head_dim,
        max_position_embeddings=tiny.max_positions, tie_word_embeddings=tiny.tie_embeddings,
        rope_parameters=dict(ROPE[name]), initializer_range=0.08,
    )  # fmt: skip
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.empty_like(param).uniform_(-0.5, 0.5))  # biases are initialized to 0
    model.to(dtype).save_pretrained(folder)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all jobs, and their initial models."""
    root = tmp_path_factory.mktemp("grids")
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            make_model(model_folder(root, name, str(dtype).removeprefix("torch.")), name, dtype)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["TRITON_INTERPRET"] = "1"  # for layouts with the Triton kernels, on CPU tensors
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    for world in (4, 2, 1):
        command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world))
        job = python(*command, WORKER, root, env=environment)
        assert job.returncode == 0, job.stderr[-6000:]
    return root


@pytest.fixture(scope="session")
def references(root: Path) -> dict[str, Trained]:
    return {name: Reference(case, model_folder(root, case.model)).run() for name, case in CASES.items()}


def result(root: Path, layout: str, case: str) -> Trained:
    found = torch.load(root / layout / f"{case}.pt", weights_only=False)
    assert isinstance(found, Trained)
    return found


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout in LAYOUTS for case in cases_of(layout)])
def test_training_equals_the_reference(root: Path, references: dict[str, Trained], layout: str, case: str) -> None:
    """Compares log-probs, losses, norms, all gradients of all updates, and the weights after two steps."""
    updates = CASES[case].settings(LAYOUTS[layout]).algo.updates_per_step
    check_training(result(root, layout, case), references[case], updates)


def test_cases_reach_every_branch(references: dict[str, Trained]) -> None:
    """Ratios are clipped in both directions, calibration is truncated, gradients are clipped and nowhere all zero."""
    for name in ("everything", "plain", "gspo", "dual_clip"):
        last = references[name].metrics[-1]
        assert last["clip_low"] > 0 and last["clip_high"] > 0, name
    assert references["dual_clip"].metrics[-1]["loss_dual_clip"] > 0
    assert any(0 < m["calibration_at_max"] < 1 for m in references["paper"].metrics)
    assert all(norm > 0.05 for name in ("paper", "everything") for norm in references[name].norms)
    for trained in references.values():
        assert all(float(g.norm()) > 0 for gradients in trained.gradients for g in gradients.values())


@pytest.mark.parametrize("name", ["whole", "shards", "again"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("layout", GRIDS)
def test_export_equals_the_imported_model(root: Path, layout: str, model: str, dtype: str, name: str) -> None:
    """Bit for bit, in one or several files; the exported folder loads in transformers with the same logits."""
    folder, source = root / layout / f"{model}-{dtype}-{name}", model_folder(root, model, dtype)
    want = load_file(source / "model.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    got = {n: t for file in files for n, t in load_file(file).items()}
    assert got.keys() == want.keys()
    assert all(got[n].dtype == want[n].dtype and torch.equal(got[n], want[n]) for n in want)
    if name == "whole":
        assert [f.name for f in files] == ["model.safetensors"]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(files) > 1 and set(index["weight_map"].values()) == {f.name for f in files}
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in want.values())
        largest = max(t.numel() * t.element_size() for t in want.values())
        assert max(f.stat().st_size for f in files) < max(SHARD_BYTES, largest) + 4096
    assert not folder.with_name(folder.name + ".part").exists()
    if name != "whole":
        return  # same tensors as in the single file
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(p, dtype="auto")(ids).logits for p in (folder, source)]
    assert logits[0].dtype == logits[1].dtype == getattr(torch, dtype) and torch.equal(*logits)


def loads() -> list[tuple[str, str]]:
    """(saving layout, loading layout), where the loading layout runs later."""
    runs_at = {name: (-LAYOUTS[name].world, name not in SAVERS, list(LAYOUTS).index(name)) for name in GRIDS}
    return [(saver, loader) for saver in SAVERS for loader in GRIDS if runs_at[saver] <= runs_at[loader]]


@pytest.mark.parametrize("kind", ["fp32", "qwen2"])
@pytest.mark.parametrize(("saver", "loader"), loads())
def test_checkpoint_loads_on_another_grid(root: Path, saver: str, loader: str, kind: str) -> None:
    """Loaded weights are bit-identical, and the next update equals that of the uninterrupted run."""
    saved, following = torch.load(root / "saved" / f"{saver}-{kind}" / "next.pt")
    loaded, resumed = torch.load(root / loader / f"{saver}-{kind}.pt")
    assert saved.keys() == loaded.keys() == resumed.keys()
    assert all(torch.equal(saved[n], loaded[n]) for n in saved)
    for name in following:
        assert apart(resumed[name], following[name]) <= 1e-6, name
        assert apart(resumed[name] - loaded[name], following[name] - saved[name]) <= 1e-4, name
    if saver == loader:
        assert all(torch.equal(resumed[n], following[n]) for n in following)


@pytest.mark.parametrize("layout", SAVERS)
def test_bf16_checkpoint_keeps_the_fp32_weights(root: Path, layout: str) -> None:
    """Updates below bf16's resolution accumulate in the fp32 copy, so the next update is bit-identical."""
    saved, following = torch.load(root / "saved" / f"{layout}-bf16" / "next.pt")
    loaded, resumed = torch.load(root / layout / f"{layout}-bf16.pt")
    assert all(torch.equal(saved[n], loaded[n]) for n in saved)
    assert all(torch.equal(following[n], resumed[n]) for n in following)
    assert any(not torch.equal(saved[n], following[n]) for n in following)


@pytest.mark.parametrize("layout", GRIDS)
def test_fault_on_one_rank_affects_all_ranks(root: Path, layout: str) -> None:
    """A weight that changes between scoring and training ends the run; a NaN skips one update without other effects."""
    by_rank = torch.load(root / layout / "refused.pt")
    assert len(by_rank) == LAYOUTS[layout].world
    for rank, found in enumerate(by_rank):
        assert len(found) == 5 and all(found.values()), (rank, found)
