"""`icrl plan`: from a recipe and its overrides to tables."""

from __future__ import annotations

from pathlib import Path

from icrl_megatron.plan import async_plan, hardware, planner
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.scaling import picture, require_writable, scale
from icrl_megatron.plan.search import search
from icrl_megatron.plan.show import show, show_scaling, show_search
from icrl_megatron.plan.supervised import supervised
from icrl_megatron.plan.workload import assumptions
from icrl_megatron.run import checks as validate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.utils.console import PlainConsole
from icrl_megatron.utils.errors import ConfigError


def run(
    recipe: str,
    overrides: list[str],
    gpus: int | None,
    gpu_name: str,
    searching: bool,
    scaling: bool,
    image: Path | None,
    overwrite: bool = False,
    asynchronous: bool = False,
) -> None:
    """Prints the plan, its scaling or a search. Raises ConfigError for a plan that does not fit."""
    resolved, gpu = settings_module.load(recipe, overrides), hardware.get(gpu_name)
    console = PlainConsole()
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus}: must be at least 1")
    validate.validate_settings(resolved)
    if image is not None:
        require_writable(image, overwrite)
    if searching:
        found = search(resolved, gpus or planner.ranks(resolved), gpu)
        show_search(found, console)
        if not found.best:
            raise ConfigError(
                f"no layout of {gpus or planner.ranks(resolved)} x {gpu.name} fits; see the reasons above"
            )
        return
    layout = Layout.of(resolved, gpus or planner.ranks(resolved))
    validate.validate_grid(resolved, layout.gpus, min(layout.gpus, layout.node))
    validate.validate_shape(resolved, shape_of(resolved))
    made = planner.plan(resolved, gpus, gpu)
    show(made, console)
    for line in assumptions(resolved):
        console.print(line, soft_wrap=True)
    stage = supervised(resolved, made.shape, made.layout, gpu)
    if stage is not None:
        console.print(stage.line(), soft_wrap=True)
    if scaling or image is not None:
        points = scale(resolved, gpu)
        show_scaling(points, console)
        if image is not None:
            console.print(f"picture: {picture(points, image, f'{recipe} on {gpu.name}')}")
    if asynchronous:
        async_plan.show(async_plan.predict(resolved, gpu), console)
    planner.require_fit(made, resolved)
