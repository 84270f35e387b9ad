"""Notations of answers that math-verify would read as arithmetic or as products of letters: times, dates, numbers with
a base, names of figures, measures in several units. All texts are cleaned (`answers.cleaned`)."""

from __future__ import annotations

import re
from fractions import Fraction

from icrl_megatron.tasks import answers

_TIME = re.compile(r"\d{1,2}(?::\d{2}(?: ?[ap]\.?m\.?)?| ?[ap]\.?m\.?)", re.I)
_BASED = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{?(\d{1,2})\}?")
_DATE = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-/.])(\d{1,2})\6(\d{4})")
_PREFIXED = re.compile(r"0([xob])([0-9a-f]+)", re.I)
_FIGURE = re.compile(
    r"\\(triangle|angle|overline|overrightarrow|overleftrightarrow|vec|widehat)\s*\{?\s*([A-Z](?:\s*[A-Z])+)\s*\}?"
)
_UNDIRECTED = ("overline", "overleftrightarrow", "angle")
"""Figures that are the same with their points in reverse."""
_COMPOUND = re.compile(r"(?:\d+(?:\.\d+)?\s*[a-z]+\s*){2,}")


def time_of_day(text: str) -> str | None:
    """A time as one text; 3 pm is 3:00 pm."""
    if not _TIME.fullmatch(text):
        return None
    bare = re.sub(r"[ .]", "", text.casefold())
    return bare if ":" in bare else f"{bare[:-2]}:00{bare[-2:]}"


def date(text: str) -> tuple[int, ...] | None:
    """The numbers of a date such as 2024-01-05, which is not a difference; the year comes first. None if it is none."""
    found = _DATE.fullmatch(text)
    if found is None:
        return None
    year, _, second, third, day, _, month, last = found.groups()
    return tuple(map(int, (year, second, third) if year else (last, day, month)))


def figure(text: str) -> tuple[str, str] | None:
    """(kind, points) of an angle, a segment or another figure with the names of its points, whose order counts."""
    found = _FIGURE.fullmatch(text.strip())
    if found is None:
        return None
    kind, points = found[1].replace("vec", "overrightarrow"), found[2].replace(" ", "")
    return kind, min(points, points[::-1]) if kind in _UNDIRECTED else points


def compound(text: str) -> tuple[tuple[Fraction, str], ...] | None:
    """The parts of a measure in several units, such as 5 ft 3 in; None if the text is not one."""
    bare = answers.without_text(text).casefold()
    if not _COMPOUND.fullmatch(bare):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", bare)
    measured = tuple((Fraction(number), answers.unit(word)) for number, word in parts)
    return measured if all(unit for _, unit in measured) else None


def glued_unit(text: str) -> str:
    """The unit right behind a number, as in 5kg; empty without one."""
    found = re.fullmatch(r"-?\d+(?:\.\d+)?([A-Za-z]+)", text)
    return answers.unit(found[1].casefold()) if found else ""


def goes_on(text: str) -> bool:
    """Whether a text is a decimal whose digits go on, such as 3.14..."""
    return re.fullmatch(r"[+-]?\d*\.\d+ ?(?:\.\.\.|\\(?:l|c)?dots)", text) is not None


def based(text: str) -> tuple[int, int] | None:
    """(value, base) of a number such as 120_8 or 0x1F; None if it is not one."""
    bare = text.replace(" ", "")
    if (prefixed := _PREFIXED.fullmatch(bare)) is not None:
        bare = f"{prefixed[2]}_{ {'x': 16, 'o': 8, 'b': 2}[prefixed[1].lower()] }"
    found = _BASED.fullmatch(bare)
    if found is None or not 2 <= int(found[2]) <= 16:
        return None
    try:
        return int(found[1], int(found[2])), int(found[2])
    except ValueError:
        return None
