"""The parts of a model's chat template, found by rendering dialogues whose messages are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from icrl_megatron.settings.rollout_schema import RolloutSettings
from icrl_megatron.utils.errors import ConfigError, did_you_mean

FIRST, REPLY, SECOND, THIRD = "firstmessage", "thereply", "secondmessage", "thirdmessage"
SYSTEM = "systemmessage"


@dataclass(frozen=True)
class MessageParts:
    """The template's text around messages of one role that follow each other."""

    head: str
    between: str
    tail: str
    """Includes the header of the next reply."""


TemplateArguments = dict[str, bool | str]
"""`rollout.chat_template_args`."""


THINKING = "enable_thinking"
"""The argument of Qwen3's template that `rollout.thinking` sets."""


def template_arguments(tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings) -> TemplateArguments:
    """The arguments for the chat template. Raises ConfigError on one that the template does not use, or of a wrong
    type."""
    given = dict(settings.chat_template_args)
    if THINKING in given:
        raise ConfigError(
            f"rollout.chat_template_args.{THINKING}={given[THINKING]}: give "
            f"rollout.thinking={'on' if given[THINKING] in (True, 'true', 'on') else 'off'} instead"
        )
    if settings.thinking != "auto":
        given[THINKING] = settings.thinking == "on"
    known = _variables(tokenizer.chat_template)
    for name in sorted(set(given) - known) if known else ():
        setting = f"rollout.thinking={settings.thinking}" if name == THINKING else f"rollout.chat_template_args.{name}"
        hint = did_you_mean(name, known, f"it uses {', '.join(sorted(known)) or 'none'}")
        raise ConfigError(
            f"{setting}: the chat template of {tokenizer.name_or_path!r} does not use {name}, so this has no effect; "
            f"{hint}"
        )
    return given


def _variables(template: object) -> set[str]:
    """The names that a template reads and does not define; none if it has tags that only transformers knows."""
    try:
        return meta.find_undeclared_variables(jinja2.Environment(extensions=[loopcontrols]).parse(str(template)))
    except jinja2.TemplateError:
        return set()


def message_parts(tokenizer: PreTrainedTokenizerBase, arguments: TemplateArguments, tools: str = "") -> MessageParts:
    """(before the first user message, end of a reply up to the next user message, after a user message). `tools`: as in
    `Dialogue.tools`. Raises ConfigError if the template is missing, fails, changes messages, or leaves out a tool."""
    where = f"The chat template of {tokenizer.name_or_path!r}"
    if not tokenizer.chat_template:
        raise ConfigError(f"{where} is missing: the model folder needs a chat_template.jinja.")
    dialogue = [_message("user", FIRST), _message("assistant", REPLY), _message("user", SECOND)]
    options = {**arguments, **({"tools": json.loads(tools)} if tools else {})}
    text = _rendered(tokenizer, dialogue, options, "user, assistant, user")
    single = _rendered(tokenizer, dialogue[:1], options, "user")
    if any(text.count(part) != 1 for part in (FIRST, REPLY, SECOND)) or single.count(FIRST) != 1:
        raise ConfigError(f"{where} does not show each message once and unchanged: it rendered {text!r}.")
    head, tail = single.split(FIRST)
    for tool in json.loads(tools) if tools else ():
        if tool["function"]["name"] not in head:
            raise ConfigError(
                f"{where} does not show the tool {tool['function']['name']!r} to the model: use a model whose template "
                "takes tools, or a format that describes them in the prompt (agent.format=tags)."
            )
    return MessageParts(head, text[text.index(REPLY) + len(REPLY) : text.index(SECOND)], tail)


def tool_parts(tokenizer: PreTrainedTokenizerBase, arguments: TemplateArguments, tools: str) -> MessageParts:
    """(end of a reply up to the first tool message, between two tool messages, after the last one). Raises ConfigError
    if the template has no tool messages."""
    messages = (("user", FIRST), ("assistant", REPLY), ("tool", SECOND), ("tool", THIRD))
    dialogue = [_message(role, content) for role, content in messages]
    text = _rendered(tokenizer, dialogue, {**arguments, "tools": json.loads(tools)}, "user, assistant, tool, tool")
    if any(text.count(part) != 1 for part in (REPLY, SECOND, THIRD)):
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path!r} has no tool messages: use a model whose template has, or "
            "a format that does without (agent.format=tags)."
        )
    _, after = text.split(REPLY)
    head, rest = after.split(SECOND)
    return MessageParts(head, *rest.split(THIRD))


def system_parts(tokenizer: PreTrainedTokenizerBase, arguments: TemplateArguments, tools: str) -> tuple[str, str]:
    """(before a system message, from there to the first user message). Raises ConfigError if the template changes it or
    leaves it out."""
    options = {**arguments, **({"tools": json.loads(tools)} if tools else {})}
    dialogue = [_message("system", SYSTEM), _message("user", FIRST)]
    try:
        text, why = _rendered(tokenizer, dialogue, options, "system, user"), ""
    except ConfigError as error:  # as the templates do that have no such role
        text, why = "", f" ({error})"
    if text.count(SYSTEM) != 1 or text.count(FIRST) != 1 or text.index(SYSTEM) > text.index(FIRST):
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path!r} does not show system messages{why}: use a model whose "
            "template does, or leave them out of the data. For rows of tasks, "
            "'tasks.sources[...].data.system=join' makes them the first paragraph of the problem."
        )
    before, after = text.split(SYSTEM)
    return before, after.split(FIRST)[0]


def last_opening(tokenizer: PreTrainedTokenizerBase, arguments: TemplateArguments, tools: str) -> str:
    """What the template writes between the header and the text of a last reply without thinking: an empty thinking
    block, or nothing."""
    options = {**arguments, **({"tools": json.loads(tools)} if tools else {})}
    dialogue = [_message("user", FIRST), _message("assistant", REPLY)]
    prompt = _rendered(tokenizer, dialogue[:1], options, "user")
    whole = _rendered(tokenizer, dialogue, options, "user, assistant", prompts=False)
    before = whole.split(REPLY)[0]
    return before[len(prompt) :] if before.startswith(prompt) else ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    options: dict[str, Any],
    roles: str,
    prompts: bool = True,
) -> str:
    """`prompts`: ends with the header of the next reply."""
    try:
        render = tokenizer.apply_chat_template
        return cast(str, render(messages, tokenize=False, add_generation_prompt=prompts, **options))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path!r} cannot render a dialogue of {roles}: {error}"
        ) from error
