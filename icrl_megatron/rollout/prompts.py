"""The three prompt forms of one backbone, as token ids: attempt, revision (attempt after a critique) and critique.

Text is encoded once, here; generated ids are never decoded and encoded again. Text from a task, an environment or a
model is untrusted: it is encoded separately from the chat template's own text, so it cannot open or close a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.rollout.chat_template import (
    MessageParts,
    last_opening,
    message_parts,
    system_parts,
    template_arguments,
    tool_parts,
)
from icrl_megatron.rollout.prompt_templates import PromptTemplates, TurnText, template_words
from icrl_megatron.settings.rollout_schema import RolloutSettings
from icrl_megatron.types import IdArray, Ids
from icrl_megatron.utils.errors import ConfigError

__all__ = ["PLAIN", "Prompter", "TurnText", "parse_critique", "template_words", "tokenizer"]

REMEMBERED_TEXTS, REMEMBERED_CHARS = 512, 8192
"""How many texts have their ids cached, and the longest such text. The cache fills within a few steps and then stays at
its maximum size: a text of 8192 characters and its ids take about 90 KB, so at most about 45 MB."""
CHARS_A_TOKEN = 8
"""Of a text limited to n tokens, only n times this many characters are encoded: prose and code of that length have more
than n tokens, and megabytes are never encoded only to be discarded."""
REMEMBERED_DIALOGUES = 256
"""How many sets of tools have their parts of the template cached; trajectories from files may each have their own."""
_CRITIC = re.compile(r"<critic>(.*?)</critic>", re.DOTALL)


def tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder. Raises ConfigError if it is damaged."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded ({error}); copy the model's folder again"
        ) from error


def parse_critique(reply: str) -> str:
    """The part of a critic's reply that the solver reads: the last text between <critic> tags, or the whole reply
    without tags."""
    tagged = _CRITIC.findall(reply)
    return str(tagged[-1] if tagged else reply).strip()


PLAIN = Dialogue()


@dataclass(frozen=True)
class _Parts:
    """The chat template's own text and an inline format's, as ids where nothing else can merge with it."""

    head: Ids
    """Before the first user message."""
    next_user: Ids
    """From the end of a reply to the next user message. Starts with the end of turn."""
    tail: Ids
    """From the end of a user message to the reply."""
    before: Ids
    after: Ids
    tool: MessageParts
    """Around tool messages; empty texts unless the dialogue has them."""


class Prompter:
    """Builds prompts for one tokenizer and one set of templates.

    Raises ConfigError if a template is missing or broken, or if the tokenizer's chat template is missing, changes the
    content of a message, does not end a reply with a special token, or cannot show the templates' system message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings) -> None:
        self._tokenizer = tokenizer
        self._observation_chars = settings.observation_chars
        self.templates = PromptTemplates.load(settings.templates)
        self._control_ids = _control_ids(tokenizer)
        # Episodes of a task share their prompts, and environments repeat their observations.
        self._remembered = functools.lru_cache(maxsize=REMEMBERED_TEXTS)(self._encode)
        self._added_tokens = _added_tokens(tokenizer)
        self._arguments = template_arguments(tokenizer, settings)
        self._parts = functools.lru_cache(maxsize=REMEMBERED_DIALOGUES)(self._encoded_parts)
        self._system = functools.lru_cache(maxsize=REMEMBERED_DIALOGUES)(self._system_parts)
        self._opening = functools.lru_cache(maxsize=REMEMBERED_DIALOGUES)(self._encoded_opening)
        if self.templates.has_system:
            self._require_system(settings.templates)
        self._end_id = self._parts(PLAIN).next_user[0]
        opening = str(tokenizer.decode(self._parts(PLAIN).tail)).rstrip()
        self._opens_thought = opening.endswith("<think>")
        eos = tokenizer.eos_token_id
        self.stop_ids: Ids = (self._end_id,) if eos is None or eos == self._end_id else (self._end_id, int(eos))
        """Ids that end a reply: the template's end of turn, then the tokenizer's end of text if it is different."""

    def extra_tokens(self, dialogue: Dialogue) -> int:
        """Tokens that the dialogue's tools add to a prompt. Raises ConfigError if the chat template cannot render its
        tools or tool messages."""
        return self._around(dialogue) - self._around(PLAIN)

    def attempt(self, observation: str, dialogue: Dialogue = PLAIN, system: str = "") -> Ids:
        """The critique-free prompt of a task, after a `system` message unless that is empty. Raises ConfigError if the
        template cannot show it."""
        return self._message("attempt", dialogue, system, observation=observation)

    def system_tokens(self, system: str, dialogue: Dialogue = PLAIN) -> int:
        """Tokens that a system message adds to a prompt; may be negative, because it replaces the template's own.
        Raises ConfigError as `attempt` does."""
        return len(self._opened(dialogue, system)) - len(self._parts(dialogue).head)

    def at_most_with(self, system: str, dialogue: Dialogue = PLAIN) -> int:
        """An upper bound on `system_tokens`, without tokenizing it. Raises ConfigError as `attempt` does."""
        return sum(map(_most_tokens, (system, *self._system(dialogue.tools)))) if system else 0

    def last_opening(self, dialogue: Dialogue) -> Ids:
        """What the chat template puts in front of the last reply if it has no thinking: Qwen3's empty block."""
        return () if dialogue.observation == "inline" else self._opening(dialogue.tools)

    def said(self, reply: str) -> str:
        """A reply without its thoughts, which never count as an action, an answer or advice; empty if a thought is not
        closed. The chat template may have opened the first one in the prompt."""
        rest = reply.rpartition("</think>")[2]
        open_thought = "<think>" in rest or (self._opens_thought and "</think>" not in reply)
        return "" if open_thought else rest

    def has_control(self, text: str) -> bool:
        """Whether the text would become a control token if it were encoded as a part of the template."""
        return not self._control_ids.isdisjoint(self._encode_trusted(text))

    def unknown(self, ids: Sequence[int]) -> bool:
        """Whether some text of a sequence was lost because the vocabulary has no token for it."""
        return self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in ids

    def revision(self, observation: str, critique: str, dialogue: Dialogue = PLAIN, system: str = "") -> Ids:
        """The prompt of an attempt that follows a critique; it contains only the latest critique."""
        return self._message("revision", dialogue, system, observation=observation, critique=critique)

    def critique(self, observation: str, turns: Sequence[TurnText], summary: str, omitted: int = 0) -> Ids:
        """The critic's prompt: task, trajectory and outcome. `omitted` further turns were left out because they did not
        fit (`PromptTemplates.kept`)."""
        return self._message("critique", PLAIN, observation=observation, turns=turns, summary=summary, omitted=omitted)

    def question(self, text: str) -> Ids:
        """The prompt of one user message that is no task."""
        parts = self._parts(PLAIN)
        return (*parts.head, *self._encode_untrusted(text.strip()), *parts.tail)

    def text(self, form: str, **values: object) -> str:
        """The content of a prompt of one of `prompt_templates.FORMS`, without the chat template."""
        return self.templates.text(form, **values)

    def at_most(self, text: str) -> int:
        """An upper bound on the tokens of a prompt with this content, without tokenizing it
        (`rollout.context_budget`)."""
        return self._around(PLAIN) + _most_tokens(text)

    def lengths(self, texts: list[str]) -> list[int]:
        """Token counts of the prompts with these contents."""
        if not texts:
            return []
        plain = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        around = self._around(PLAIN)
        dropped = self._control_ids.__contains__
        return [around + len(ids) - sum(map(dropped, ids)) for ids in self._tokenizer(texts, **plain).input_ids]

    def critique_text(self, observation: str, turns: Sequence[TurnText], summary: str, omitted: int = 0) -> str:
        """The same as text, without the chat template: for a critic behind an endpoint that applies its own
        template."""
        return self.text("critique", observation=observation, turns=turns, summary=summary, omitted=omitted)

    def turn_text(self, number: int, text: str, observation: str, action: str | None = None) -> TurnText:
        cut = observation[: self._observation_chars].strip()
        return TurnText(number, text.strip(), cut, None if action is None else action.strip())

    def observation_ids(self, observations: Sequence[str], ended: bool, dialogue: Dialogue = PLAIN) -> Ids:
        """The ids between two replies. `ended`: the reply ended with the end of turn.

        A user or tool message: the end of turn (unless the reply has it), the observation, and the header of the next
        reply. Several observations are consecutive tool messages. Inline: the observation between the dialogue's texts.
        """
        parts = self._parts(dialogue)
        if dialogue.observation == "tool":
            template = [parts.tool.head, *[parts.tool.between] * (len(observations) - 1), parts.tool.tail]
            ids = self._between(template, [observation.strip() for observation in observations])
            return ids[1:] if ended else ids
        texts = [self._encode_untrusted(observation.strip()) for observation in observations]
        if dialogue.observation == "inline" and not ended:
            return tuple(i for text in texts for i in (*parts.before, *text, *parts.after))
        opening = parts.next_user[1:] if ended else parts.next_user
        return (*opening, *(i for text in texts for i in text), *parts.tail)

    def _between(self, texts: Sequence[str], messages: Sequence[str]) -> Ids:
        """The template's `texts` with untrusted `messages` between them. Text between two added tokens is encoded as
        one piece, as the template's rendering is: a tokenizer may merge the last character of a message with the line
        break that the template writes behind it."""
        ids: list[int] = []
        untrusted = ""
        for number, text in enumerate(texts):
            found = list(self._added_tokens.finditer(text))
            first, last = (found[0].start(), found[-1].end()) if found else (len(text), len(text))
            untrusted += text[:first]
            if found:
                ids += [*self._encode_untrusted(untrusted), *self._encode_trusted(text[first:last])]
                untrusted = text[last:]
            if number < len(messages):
                untrusted += messages[number]
        return (*ids, *self._encode_untrusted(untrusted))

    def shortened(self, text: str, max_tokens: int, missing: int = 0) -> tuple[str, int]:
        """(text cut to at most `max_tokens` tokens, number of characters cut). A cut text is the beginning and a note
        that says how much was cut. `missing` characters were already cut from the end."""
        if not missing and 4 * len(text) <= max_tokens:  # a character has at most 4 bytes, and a token at least one
            return text, 0
        head = text[: max_tokens * CHARS_A_TOKEN]
        if not missing and len(head) == len(text) and self._length(text) <= max_tokens:
            return text, 0
        kept = len(head)
        while True:
            lacks = missing + len(text) - kept
            shown = f"{head[:kept]}\n[... {lacks} characters cut]"
            length = self._length(shown)
            if length <= max_tokens:
                return shown, lacks
            if kept == 0:  # not even the note fits
                return "", lacks
            kept = min(kept - 1, int(0.98 * kept * max_tokens / length))

    def ended(self, ids: Ids | IdArray) -> bool:
        """Whether a reply ends with the end of turn."""
        return len(ids) > 0 and int(ids[-1]) == self._end_id

    def encode_reply(self, text: str, stop: Sequence[str] = ()) -> Ids:
        """Encodes a scripted reply as a model would have generated it: its text, and the end of turn unless it ends
        with a stop string."""
        return self.encode_parts([text], stop)[0]

    def encode_parts(self, texts: Sequence[str], stop: Sequence[str] = ()) -> list[Ids]:
        """The same for a reply that is the texts together. Each is encoded on its own, so that no token spans two."""
        texts = [texts[0].lstrip(), *texts[1:]]
        texts[-1] = texts[-1].rstrip()
        found = [self._encode_untrusted(text) for text in texts]
        if not "".join(texts).endswith(tuple(stop)):
            found[-1] = (*found[-1], self._end_id)
        return found

    def before_stop(self, ids: IdArray, stop: Sequence[str]) -> IdArray:
        """The beginning of a reply that was cut off, without the tokens of a stop string that has begun. The rest is
        generated by another request, and an engine looks for stop strings in what that request generates."""
        if not stop:
            return ids
        tail = self.decode(ids[-max(len(text.encode()) for text in stop) :])
        begun = max((n for text in stop for n in range(1, len(text)) if tail.endswith(text[:n])), default=0)
        kept = len(ids)
        while kept and len(self.decode(ids[kept:])) < begun:
            kept -= 1
        return ids[:kept]

    def decode(self, ids: Ids | IdArray) -> str:
        """Text for people and parsers, without special tokens. It must never be encoded again."""
        return str(self._tokenizer.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True))

    def _message(self, form: str, dialogue: Dialogue, system: str = "", **values: object) -> Ids:
        opened, tail = self._opened(dialogue, system), self._parts(dialogue).tail
        return (*opened, *self._encode_untrusted(self.text(form, **values)), *tail)

    def _opened(self, dialogue: Dialogue, system: str) -> Ids:
        """Everything before the first user message."""
        return self._between(self._system(dialogue.tools), [system]) if system else self._parts(dialogue).head

    def _around(self, dialogue: Dialogue) -> int:
        parts = self._parts(dialogue)
        return len(parts.head) + len(parts.tail)

    def _encoded_parts(self, dialogue: Dialogue) -> _Parts:
        """Raises ConfigError, as `chat_template` describes."""
        user = message_parts(self._tokenizer, self._arguments, dialogue.tools)
        tool = MessageParts("", "", "")
        if dialogue.observation == "tool":
            tool = tool_parts(self._tokenizer, self._arguments, dialogue.tools)
        texts = (user.head, user.between, user.tail, dialogue.before, dialogue.after)
        head, between, tail, before, after = map(self._encode_trusted, texts)
        parts = _Parts(head, between, tail, before, after, tool)
        for text in (user.between, *[tool.head] * (dialogue.observation == "tool")):
            opening = self._encode_trusted(text)
            if not opening or opening[0] not in self._control_ids:
                raise ConfigError(
                    f"The chat template of {self._tokenizer.name_or_path!r} closes a reply with {text!r}, which does "
                    "not start with a special token, so a generated reply could not end. Use a template like ChatML."
                )
        return parts

    def _system_parts(self, tools: str) -> tuple[str, str]:
        return system_parts(self._tokenizer, self._arguments, tools)

    def _require_system(self, templates: str) -> None:
        try:
            self._system("")
        except ConfigError as error:
            raise ConfigError(
                f"rollout.templates={templates} has a system message, and the chat template of "
                f"{self._tokenizer.name_or_path!r} does not show one: use rollout.templates=standard, or another model"
            ) from error

    def _encoded_opening(self, tools: str) -> Ids:
        return self._encode_trusted(last_opening(self._tokenizer, self._arguments, tools))

    def _encode_trusted(self, text: str) -> Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _length(self, text: str) -> int:
        return len(self._encode_untrusted(text.strip()))

    def _encode_untrusted(self, text: str) -> Ids:
        return self._remembered(text) if len(text) <= REMEMBERED_CHARS else self._encode(text)

    def _encode(self, text: str) -> Ids:
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        # A word-level vocabulary contains its special tokens as plain words, so splitting alone does not exclude them.
        return tuple(i for i in ids if i not in self._control_ids)


def _most_tokens(text: str) -> int:
    """An upper bound on the tokens of a text: its bytes, of which composing Unicode makes at most three times as
    many."""
    size = len(text) if text.isascii() else 3 * len(text.encode(errors="replace"))
    return size + 1  # some tokenizers put a space in front


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special ids that text must never produce. The unknown token stays allowed if it has no other function."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {int(i) for i in tokenizer.all_special_ids} | {i for i, token in added.items() if token.special}
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id
    return frozenset(special if unknown in used else special - {unknown})


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokens that a tokenizer finds before it splits text into pieces."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    contents = sorted((re.escape(str(token)) for token in added.values()), key=len, reverse=True)
    return re.compile("|".join(contents) or "(?!)")
