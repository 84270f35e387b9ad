"""A trajectory as tokens, in any format of calls, by the code that encodes rollouts (`rollout/prompts.py`).

Masks are built while segments are encoded. Where a reply has trained and untrained segments, it is encoded in parts, so
that every token belongs to one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from icrl_megatron.agents.formats import FORMATS, MOST_CALLS, Malformed, ToolCalls, ToolFormat, harmless
from icrl_megatron.distill.check import ReplySegments, replies
from icrl_megatron.distill.rows import BadRowError
from icrl_megatron.distill.trajectory import THINK, USER, Trajectory
from icrl_megatron.distill.written import around, separator
from icrl_megatron.rollout.prompts import PLAIN, Prompter
from icrl_megatron.tasks.base import Opening
from icrl_megatron.types import Attempt, BoolArray, Completion, Episode, Ids, Task, Turn
from icrl_megatron.utils.errors import ConfigError

EncodedText = tuple[Ids, bool]
"""Ids, and whether they carry loss."""


@dataclass(frozen=True)
class Encoded:
    """One trajectory of T tokens, in 5 bytes per token."""

    ids_T: npt.NDArray[np.int32]
    trained_T: BoolArray
    """True where the token carries loss."""

    @staticmethod
    def of(pieces: Sequence[EncodedText]) -> Encoded:
        """Without what follows the last token with loss."""
        ids = np.fromiter((i for part, _ in pieces for i in part), dtype=np.int32)
        trained = np.fromiter((trained for part, trained in pieces for _ in part), dtype=np.bool_)
        return Encoded(ids, trained).first(len(ids))

    def first(self, count: int) -> Encoded:
        """The first tokens, at most `count`, up to the last one with loss."""
        with_loss = np.flatnonzero(self.trained_T[:count])
        kept = int(with_loss[-1]) + 1 if len(with_loss) else 0
        return Encoded(self.ids_T[:kept], self.trained_T[:kept])

    def episode(self, task: Task, index: int) -> Episode:
        """The trajectory as an episode of one attempt: tokens with loss are completions, all others context."""
        ids, turns = self.ids_T, list[Turn]()
        edges = [0, *(np.flatnonzero(np.diff(self.trained_T)) + 1).tolist(), len(ids)]
        for begin, middle, end in zip(edges[1::2], edges[2::2], [*edges[3::2], len(ids)], strict=False):
            completion = Completion(ids[begin:middle], np.zeros(middle - begin, dtype=np.float32), "stop", 0)
            turns.append(Turn(completion, "", None, "", ids[middle:end]))
        prompt = ids[: edges[1]]
        attempt = Attempt(0, prompt, prompt, tuple(turns), 1.0, True, "", "done")
        return Episode(task, index, (attempt,), ())


def encode(trajectory: Trajectory, format: str, prompter: Prompter) -> Encoded:
    """The tokens of a trajectory whose calls are written in a format of `agents/formats.py`.

    Raises BadRowError if the format cannot write it, and ConfigError if the tokenizer's template does not fit.
    """
    form = _form(trajectory, format)
    dialogue = PLAIN if form is None else form.dialogue
    if prompter.has_control(dialogue.tools):
        raise BadRowError("a tool whose description holds a control token of the model's tokenizer; change it")
    opening = prompter.templates.opening(Opening(trajectory.problem, trajectory.system))
    found: list[EncodedText] = [(prompter.attempt(opening.text, dialogue, opening.system), False)]
    inline = dialogue.observation == "inline"
    said = [part for reply in replies(trajectory.segments) for part in (_single(reply) if inline else [reply])]
    for reply in said:
        texts = list(_texts(reply, form, inline))
        thinks = bool(reply.texts) and reply.texts[0].agent == THINK
        if reply is said[-1] and not reply.calls and not thinks:
            found.append((prompter.last_opening(dialogue), texts[0][1]))
        encoded = prompter.encode_parts([text for text, _ in texts], dialogue.stop)
        found += [(ids, trained) for ids, (_, trained) in zip(encoded, texts, strict=True)]
        found.append((_observed(reply, form, prompter, prompter.ended(encoded[-1])), False))
    encoded_whole = Encoded.of(found)
    if prompter.unknown(encoded_whole.ids_T.tolist()):
        raise BadRowError(
            "words that the model's tokenizer does not know; use a model with a larger vocabulary (the model of a tiny "
            "recipe knows the words of its task sets only)"
        )
    return encoded_whole


def _form(trajectory: Trajectory, format: str) -> ToolFormat | None:
    """None for a conversation without tools, which any model can have."""
    if not trajectory.tools:
        return None
    try:
        return FORMATS[format](trajectory.tools)
    except ConfigError as error:
        raise BadRowError(f"the format {format} cannot write its calls: {error}") from error


def _single(reply: ReplySegments) -> Iterator[ReplySegments]:
    """A reply with several calls as several replies: inline, a reply stops at its first call."""
    yield replace(reply, calls=reply.calls[:1], observations=reply.observations[:1])
    for call, observation in zip(reply.calls[1:], reply.observations[1:], strict=True):
        yield ReplySegments([], [call], [observation])


def _texts(reply: ReplySegments, form: ToolFormat | None, inline: bool) -> Iterator[tuple[str, bool]]:
    """The text of a reply in the fewest parts that are trained or not as a whole. Raises BadRowError if the format
    would read other calls from it."""
    parts: list[tuple[str, bool]] = []
    whole = ""
    for segment in reply.texts:
        before, after = around(segment, inline)
        text = f"{separator(whole)}{before}{segment.text}{after}"
        parts.append((text, segment.trained))
        whole += text
    if reply.calls and form is not None:
        text = separator(whole) + _rendered(reply, form)
        parts.append((text, all(call.trained for call in reply.calls)))
        whole += text
    if form is not None:
        _check_read_back(whole, reply, form)
    for trained, same in groupby(parts, key=lambda part: part[1]):
        yield "".join(text for text, _ in same), trained


def _rendered(reply: ReplySegments, form: ToolFormat) -> str:
    if len(reply.calls) > MOST_CALLS:
        raise BadRowError(f"{len(reply.calls)} calls in one reply; write at most {MOST_CALLS}")
    try:
        return form.render(ToolCalls(reply.called()))
    except (KeyError, ValueError, TypeError) as error:
        name = reply.called()[0].name
        raise BadRowError(f"a call of {name!r} lacks the argument {error} of its tool; correct it") from error


def _check_read_back(text: str, reply: ReplySegments, form: ToolFormat) -> None:
    found = form.parse(text)
    if isinstance(found, Malformed):
        raise BadRowError(f"a reply whose calls cannot be read back ({found.problem}); correct it")
    read = form.parse(form.render(found)) if isinstance(found, ToolCalls) else None
    meant = form.parse(_rendered(reply, form)) if reply.calls else None
    if read != meant:
        raise BadRowError(f"a reply from which other calls would be read ({text.strip()[:80]!r}); correct it")


def _observed(reply: ReplySegments, form: ToolFormat | None, prompter: Prompter, ended: bool) -> Ids:
    """What follows a reply, as in a rollout: tags of the format in a tool's answer are changed."""
    dialogue = PLAIN if form is None else form.dialogue
    if not reply.observations:
        return ()
    if reply.observations[0].agent == USER:
        user = replace(dialogue, observation="user") if dialogue.observation == "tool" else dialogue
        return prompter.observation_ids([reply.observations[0].text], ended, user)
    tags = () if form is None else form.tags
    return prompter.observation_ids([harmless(one.text, tags)[0] for one in reply.observations], ended, dialogue)
