"""Arguments that several commands of `icrl` take, and their completion in a shell."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from icrl_megatron.utils.errors import ConfigError


def recipe_names(incomplete: str) -> list[str]:
    """The recipes whose names begin with `incomplete`, for a shell."""
    from icrl_recipes import registry

    return [name for name in registry() if name.startswith(incomplete)]


def setting_names(incomplete: str) -> list[str]:
    """The settings whose names begin with `incomplete`, each with `=`; if there is one, also with values. A shell
    completes as far as they agree, and adds no space after the `=`."""
    from icrl_megatron.settings.describe import described
    from icrl_megatron.settings.limits import Choice

    found = [one for one in described() if one.name.startswith(incomplete)]
    if len(found) != 1:
        return [f"{one.name}=" for one in found]
    (one,) = found
    named = one.limit.names if isinstance(one.limit, Choice) and one.kind == "str" else ()
    values = ("true", "false") if one.kind == "bool" else named or ("", one.default)
    return [f"{one.name}={value}" for value in values]


class SettingsCommand(TyperCommand):
    """A command that explains how to give a setting when it gets one as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError for `--steps 5` if the command takes settings and has no such option."""
        parameters = self.get_params(ctx)
        if any(one.name == "overrides" for one in parameters):
            options = {name: one for one in parameters for name in (*one.opts, *one.secondary_opts)}
            for i, word in enumerate(args):
                before = options.get(args[i - 1]) if i else None
                if before is not None and not getattr(before, "is_flag", False):
                    continue  # the value of an option
                if word == "--":
                    break
                if word.startswith("--") and word.partition("=")[0] not in options:
                    _refuse_setting(word, args[i + 1] if i + 1 < len(args) else "")
        return super().parse_args(ctx, args)


def _refuse_setting(word: str, following: str) -> None:
    """Raises ConfigError if `word` is a setting written as an option. `following`: the next word."""
    from icrl_megatron.settings.describe import described
    from icrl_megatron.settings.loading import named_like
    from icrl_megatron.settings.values import pasted

    option, equals, value = word.partition("=")
    names = named_like(option.strip("-").replace("-", "_"))
    if not names:
        return
    if not equals:
        value = "" if following.startswith("-") or re.match(r"[a-z_.0-9]+=", following) else following
    default = next((str(one.default) for one in described(names[0])), "")
    offered = " or ".join(pasted(name, value or default) for name in names)
    raise ConfigError(f"{option} is a setting, and settings are given without dashes; write {offered}")


Recipe = Annotated[
    str,
    typer.Argument(
        help="A name of `icrl recipes`, my_recipe.py:run or settings.yaml.",
        show_default=False,
        autocompletion=recipe_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings to change, e.g. optim.learning_rate=1e-5 steps=50.",
        autocompletion=setting_names,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing files even if another program wrote them.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings, check them, and stop.")]
