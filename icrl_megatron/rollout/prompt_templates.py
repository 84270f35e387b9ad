"""The texts of prompts, from the Jinja files of `rollout.templates`, without the chat template.

attempt, revision     what the solver reads as the first user message
critique              what the critic reads
system                optional: the system message of attempt and revision
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from icrl_megatron.settings.rollout_schema import TEMPLATES
from icrl_megatron.tasks.base import Opening
from icrl_megatron.utils.errors import ConfigError

FORMS = ("attempt", "revision", "critique")
SYSTEM = "system"
KEEPS = ("earliest", "latest")
"""Which turns a critic's prompt keeps where not all of them fit: what `keeps` is set to in critique.jinja."""
_BUILT_IN = Path(__file__).parent / "templates"

T = TypeVar("T")


@dataclass(frozen=True)
class TurnText:
    """One turn as the critic reads it."""

    number: int
    """Counted from 1."""
    text: str
    """The solver's whole reply."""
    observation: str
    """Cut at `rollout.observation_chars`; empty if there was none."""
    action: str | None = None
    """What the environment read from the reply, such as the content of a box; None if there was no action in it."""


@dataclass(frozen=True)
class PromptTemplates:
    """The templates of one folder."""

    forms: Mapping[str, jinja2.Template]
    keeps: Literal["earliest", "latest"]
    """`latest` unless critique.jinja says otherwise."""

    @staticmethod
    def load(name: str) -> PromptTemplates:
        """Raises ConfigError if a template of `rollout.templates` is missing or broken."""
        folder = template_folder(name)
        environment = SandboxedEnvironment(
            loader=jinja2.FileSystemLoader(folder), autoescape=False, undefined=jinja2.StrictUndefined
        )
        sample = {"observation": "", "critique": "", "turns": [TurnText(1, "", "")], "summary": "", "omitted": 0}
        try:
            forms = {path.stem: environment.get_template(path.name) for path in template_files(name)}
            for form, template in forms.items():  # finds a misspelled variable before the run starts
                template.render({"manual": "", "system": ""} if form == SYSTEM else sample)
            keeps = getattr(forms["critique"].make_module(sample), "keeps", "latest")
        except jinja2.TemplateError as error:
            raise ConfigError(f"rollout.templates is {name!r}: a template in {folder} fails: {error}") from error
        if keeps not in KEEPS:
            raise ConfigError(
                f"rollout.templates is {name!r}: {folder}/critique.jinja sets keeps to {keeps!r}; set it to "
                f"{' or '.join(KEEPS)}, or leave it out"
            )
        return PromptTemplates(forms, cast(Literal["earliest", "latest"], keeps))

    @property
    def has_system(self) -> bool:
        return SYSTEM in self.forms

    def text(self, form: str, **values: object) -> str:
        """The content of a prompt of one of FORMS."""
        return self.forms[form].render(**values).strip()

    def opening(self, opening: Opening, manual: str = "") -> Opening:
        """A problem as the solver first reads it: with the system message of these templates, if they have one.
        `manual`: as in `tasks.base.Environment`."""
        if not self.has_system:
            return opening
        return Opening(opening.text, self.text(SYSTEM, manual=manual, system=opening.system))

    def kept(self, turns: list[T], omitted: int) -> list[T]:
        """The turns that a critic's prompt has if `omitted` of them do not fit."""
        return turns[: len(turns) - omitted] if self.keeps == "earliest" else turns[omitted:]


def template_folder(name: str) -> Path:
    """The names of TEMPLATES are built in; any other one is a folder. Raises ConfigError if a template is missing."""
    folder = _BUILT_IN / name if name in TEMPLATES else Path(name)
    missing = [f"{form}.jinja" for form in FORMS if not (folder / f"{form}.jinja").is_file()]
    if missing:
        raise ConfigError(
            f"rollout.templates is {name!r}: no {', '.join(missing)} in {folder}. Use {', '.join(TEMPLATES)}, or a "
            f"folder that holds {', '.join(f'{form}.jinja' for form in FORMS)}."
        )
    return folder


def template_files(name: str) -> list[Path]:
    """The files of the templates of this name. Raises ConfigError as `template_folder` does."""
    folder = template_folder(name)
    optional = folder / f"{SYSTEM}.jinja"
    return [*(folder / f"{form}.jinja" for form in FORMS), *([optional] if optional.is_file() else [])]


def template_words(name: str) -> set[str]:
    """Every whitespace-separated word that the templates of this name can add to a prompt."""
    environment = jinja2.Environment()
    words: set[str] = set()
    for path in template_files(name):
        source = path.read_text(encoding="utf-8")
        words.update(word for _, kind, text in environment.lex(source) if kind == "data" for word in text.split())
    return words
