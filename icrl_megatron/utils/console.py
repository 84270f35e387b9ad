"""A rich console that escapes control characters in the text it prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from icrl_megatron.utils.terminal import printable, unguarded


class PlainConsole(Console):
    """Markup is off, because the name of a task or file may contain [bold]. Pass styles as `Text` or `style=`."""

    def __init__(self, stderr: bool = False, **options: Any) -> None:
        options.setdefault("file", unguarded("stderr" if stderr else "stdout"))
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes before layout, so that the escaped text fits."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escapes all output, `Text` included; rich marks its own cursor movements as control segments."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def text(said: str, style: str = "") -> Text:
    """Untrusted text (of a model, an environment or a file) as a renderable."""
    return Text(printable(said), style=style)
