"""Arguments that several commands of `icrl` take."""

from __future__ import annotations

from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(help="A name of `icrl recipes`, my_recipe.py:run or settings.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. optim.learning_rate=1e-5 steps=50."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing files even if another program wrote them.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings, check them, and stop.")]
