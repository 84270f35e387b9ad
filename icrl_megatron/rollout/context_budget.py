"""Checks whether the prompts of a problem fit the context, before anything is generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import Opening
from icrl_megatron.types import Role, Task
from icrl_megatron.utils.errors import ConfigError

BATCH_CHARS = 1 << 22
"""Characters of text that are tokenized at once."""
SEAM_TOKENS = 16
"""An upper bound on the tokens that change where two texts are joined."""


class TooLongError(ConfigError):
    """A prompt leaves no room for a reply. The message names the task and a remedy."""


@dataclass(frozen=True)
class TooLong:
    """A problem that does not fit, with its prompt that needs the most context."""

    task: Task
    role: Role
    needed: int
    """The smallest `rollout.context_tokens` that fits it: the prompt's tokens, a critique of full length if the prompt
    contains or precedes one, and one token of a reply."""


@dataclass(frozen=True)
class Statement:
    """A problem as the solver first reads it."""

    task: Task
    text: str
    dialogue: Dialogue
    system: str = ""
    """The problem's own system message; empty: none."""
    manual: str = ""
    """As in `tasks.base.Environment`."""


def require_fits(task: Task, role: Role, length: int, settings: RolloutSettings) -> None:
    """Raises TooLongError unless a prompt of `length` tokens leaves room for a reply in `rollout.context_tokens`."""
    if length >= settings.context_tokens:
        raise TooLongError(
            f"The {role} prompt of task {task.task_id!r} has {length} tokens, and rollout.context_tokens is "
            f"{settings.context_tokens}: raise it above the prompt, lower rollout.max_critique_tokens, or set "
            "tasks.too_long=drop."
        )


def too_long(
    statements: Iterable[Statement], prompter: Prompter, settings: RolloutSettings, revised: bool
) -> list[TooLong]:
    """Returns the problems with a prompt that does not fit. Raises ConfigError if the chat template cannot render the
    tools or the system message of one.

    The attempt's prompt must leave room for one token. With `revised`, so must the revision's with a critique of full
    length, and the critic's prompt without any turn must leave room for that critique. Only texts that may be too long
    by their size are tokenized: a token is at least one byte of the text after Unicode is composed, and composing makes
    a text at most three times as large.
    """
    found: list[TooLong] = []
    for batch in _batches(_suspects(statements, prompter, settings, revised)):
        lengths = prompter.lengths([suspect.prompts[0].text for suspect in batch])
        for suspect, length in zip(batch, lengths, strict=True):
            if worst := _worst(suspect, length, prompter, settings.context_tokens):
                found.append(worst)
    return found


@dataclass(frozen=True)
class _Prompt:
    role: Role
    text: str
    beside: int
    """Tokens that must fit in the context in addition to the prompt."""


@dataclass(frozen=True)
class _Suspect:
    task: Task
    prompts: tuple[_Prompt, ...]
    """The attempt's prompt comes first."""


def _suspects(
    statements: Iterable[Statement], prompter: Prompter, settings: RolloutSettings, revised: bool
) -> Iterator[_Suspect]:
    critique = 0 if settings.critic == "empty" else settings.max_critique_tokens
    for given in statements:
        shown = prompter.templates.opening(Opening(given.text, given.system), given.manual)
        found = replace(given, system=shown.system)
        statement, tools = found.text, prompter.extra_tokens(found.dialogue)
        prompts = [_Prompt("attempt", prompter.text("attempt", observation=statement), tools + 1)]
        if revised:
            asked = prompter.text("revision", observation=statement, critique="-")
            prompts.append(_Prompt("revision", asked, critique + tools + 1))
            whole = Opening(statement, found.system).joined()
            read = prompter.critique_text(whole, [], "", omitted=settings.max_turns)
            prompts.append(_Prompt("critique", read, max(critique, 1)))
        system = prompter.at_most_with(found.system, found.dialogue)
        if any(prompter.at_most(p.text) + p.beside + system > settings.context_tokens for p in prompts):
            yield _Suspect(found.task, tuple(_beside_system(p, found, prompter) for p in prompts))


def _beside_system(prompt: _Prompt, found: Statement, prompter: Prompter) -> _Prompt:
    """The critic reads the system message as a part of the problem; the solver's prompts have it beside theirs."""
    if not found.system or prompt.role == "critique":
        return prompt
    return replace(prompt, beside=prompt.beside + prompter.system_tokens(found.system, found.dialogue))


def _worst(suspect: _Suspect, length: int, prompter: Prompter, limit: int) -> TooLong | None:
    """The prompt that needs the most context, if that is more than `limit`. `length`: tokens of the attempt's prompt.
    The other prompts contain the same text plus what the templates add, and are tokenized only if that may matter."""
    first = suspect.prompts[0]
    needed: list[tuple[int, Role]] = [(length + first.beside, first.role)]
    for prompt in suspect.prompts[1:]:
        added = prompter.at_most(prompt.text) - prompter.at_most(first.text)
        if length + added + prompt.beside + SEAM_TOKENS > limit:
            needed.append((prompter.lengths([prompt.text])[0] + prompt.beside, prompt.role))
    most, role = max(needed)
    return TooLong(suspect.task, role, most) if most > limit else None


def _batches(suspects: Iterable[_Suspect]) -> Iterator[Sequence[_Suspect]]:
    batch: list[_Suspect] = []
    chars = 0
    for suspect in suspects:
        batch.append(suspect)
        chars += len(suspect.prompts[0].text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
