"""rich's console, which styles text and shows the control characters in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from icrl_megatron.utils.terminal import printable, unguarded


class PlainConsole(Console):
    """Takes no markup: a task or a file may be called [bold]. Styles are given as `Text` or `style=`."""

    def __init__(self, stderr: bool = False, **options: Any) -> None:
        options.setdefault("file", unguarded("stderr" if stderr else "stdout"))
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Before the text is laid out, so that what is shown fits."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """All that is shown passes here, `Text` too; rich's own movements of the cursor are marked as control."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def text(said: str, style: str = "") -> Text:
    """What a model, an environment or a file says, to be laid out."""
    return Text(printable(said), style=style)
