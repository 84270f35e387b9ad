"""Real Transformer Engine layers and the weight table: `python tests/te_model.py FOLDER FP8`, in a separate process.

Builds the Qwen3 of a Hugging Face folder as on a GPU, with actor.fp8=FP8, loads the folder's weights, exports them
again, and prints the result as JSON. Needs Transformer Engine but no GPU: the modules' parameters are on the CPU, and
nothing is computed with them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from icrl_megatron.distributed import platform
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import ActorSettings, Settings


def pretend_hopper() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]


def build(shape: ModelShape, fp8: str, grid: Any) -> Any:
    """The model as on a GPU: checks for a GPU succeed, but tensors are created on the CPU."""
    from icrl_megatron.model import gpt as model

    platform.device = lambda: torch.device("cuda", 0)
    pretend_hopper()
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[assignment]
    return model.build(shape, ActorSettings(layers="transformer_engine", fp8=fp8), grid)


def main(folder: Path, fp8: str) -> None:
    platform.show_gpu_library("transformer_engine")
    os.environ["LOCAL_RANK"] = "0"
    pretend_hopper()
    platform.keep_fp8_scales_exact()
    torch.cuda.is_available = lambda: False
    platform.prepare("cpu")
    from megatron.core.fp8_utils import get_fp8_recipe

    from icrl_megatron.distributed import grid as grids
    from icrl_megatron.model import weights

    grids.single_process()
    grid, shape = grids.build(Settings()), ModelShape.read(folder)
    model = build(shape, fp8, grid)
    table = weights.rows(model, shape, grid)
    with torch.no_grad():
        for row in table:
            row.param.fill_(torch.nan)  # so that only loaded values can be exported
    weights.load_hf(table, folder, shape)
    stored, found = load_file(folder / "model.safetensors"), dict(weights.Gatherer(table, grid).stream())
    layer = model.decoder.layers[0]
    recipe = get_fp8_recipe(model.config) if fp8 != "off" else None
    forward = getattr(recipe, "fp8_quant_fwd_inp", None)
    report = {
        "parameters": [row.name for row in table],
        "bases": {
            name: type(part).__mro__[1].__module__ for name, part in layer.named_modules() if "TE" in str(type(part))
        },
        "absent": sorted(stored.keys() - found.keys()),
        "unknown": sorted(found.keys() - stored.keys()),
        "unequal": [name for name, tensor in found.items() if not torch.equal(tensor, stored[name])],
        "epsilons": sorted({part.eps for part in model.modules() if hasattr(part, "eps")}),
        "recipe": type(recipe).__name__ if recipe is not None else "",
        "power_of_two_scales": getattr(forward, "power_2_scale", None) if fp8 == "blockwise" else None,
    }
    print(json.dumps(report))
    grids.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
