"""Answers and labels as texts: cleaned notation, units, lists, words, and labels that mean nothing. What these rules do
not decide goes to math-verify (formulas.py)."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from icrl_megatron.tasks import exact_numbers

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_CHARACTERS = {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000\t\n\r", " "),
    "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "\\div ", "\u03c0": "\\pi ",
    "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u222a": "\\cup ",
    "\u2229": "\\cap ", "\u2205": "\\emptyset ", "\u2208": "\\in ", "\u00b1": "\\pm ", "\u2026": "...",
    "\u00b0": "^{\\circ}", "\u2248": "\\approx ", "\u2261": "\\equiv ", "\u211d": "\\mathbb{R}",
    "\u2018": "'", "\u2019": "'",
}  # fmt: skip
_TRANSLATED = str.maketrans(_CHARACTERS)
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"
)
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_FRACTIONS = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_ROOT = re.compile("\u221a\\s*(\\d+|[a-z]|\\(([^()]*)\\))")
_MARKED = re.compile(r"(\*{1,3}|_{1,3}|`{1,3})([^\s*_`](?:[^*_`]*[^\s*_`])?)\1([.,;]?)")
"""Markdown's emphasis of a whole answer. `2 *3* 4` is a product."""
_STRONG = re.compile(r"(?<![\w)}\]])\*\*([^\s*](?:[^*]*[^\s*])?)\*\*(?![\w({\\])")
_EMPHASIS = re.compile(r"\\(?:text(?:bf|it|rm|sf|sc)|mathbf|mathit|boldsymbol|emph|bm|underline)\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_ENDS = re.compile(r"[\s.,;]+$")
_NOTHING = re.compile(r"(?:^|,)\s*(?:None|null|nan|NaN)\s*(?:,|$)")
_MOD = re.compile(r"\s*\(?\s*\\(?:pmod|bmod|mod)\s*(?:\{([^{}]*)\}|(\w+))\s*\)?|\s*\(\s*mod(?:ulo)?\s+(\w+)\s*\)")
_TAG = re.compile(r"<(b|i|em|strong|u|sub|p|span)>(.*)</\1>|~~(.*)~~", re.S)
_GOES_ON = re.compile(r"(?:\.\.\.|\\(?:l|c)?dots)$")
_NAMED = re.compile(r"^[A-Za-z](?:_\{?\w+\}?)?\s*=\s*")
_QUALIFIER = re.compile(
    r"[,;(]?\s*(?:where|for|with)?\s*[a-z]\s*(?:\\in|is an)\s*(?:\\(?:mathbb|mathbf)\{?\s*[ZN]\}?|integer)\)?$"
)
_PRICE = re.compile(r"(-?)(\\?\$|[\u20ac\u00a3\u00a5])\s?(\d[\d,]*(?:\.\d+)?)")
"""The dollar signs around a formula come in pairs."""
_CURRENCIES = {"\u20ac": "euros", "\u00a3": "pounds sterling", "\u00a5": "yen"}
_ANGLE = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?)\s*(\(?)\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*(\)?)"
)
"""The sine of a number of degrees."""
_TUPLE = re.compile(r"\(\s*([a-z](?:\s*,\s*[a-z])+)\s*\)\s*=\s*(?=\()")
_CHOICE = re.compile(r"(?:(?i:option|choice) )?(?:\(?([A-J])(?:\)|[.:)])(?:\s.*)?|([A-J]))")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' .()-]*")
_VARIABLES = re.compile(r"[xyz]{2,3}")
_QUANTITY = re.compile(r"(.*?[\d})!])\s*((?:\\text\{)?\s*[A-Za-z][A-Za-z /-]*\}?(?:\^\{?[23]\}?|[23])?)")
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = {
    "pi", "sqrt", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "exp", "mod", "infinity", "inf",
    "choose", "or", "and", "to", "over", "times", "plus", "minus", "more", "less", "than", "remainder", "squared",
    "cubed", "half", "halves", "third", "thirds", "quarter", "quarters", "fourths", "fifths", "sixths", "eighths",
    "tenths", "hundredths", "thousandths", "ab", "xy",
}  # fmt: skip
"""Words after a number that change it, or may be variables."""
_UNITS = {
    **dict.fromkeys(("m", "meter", "metre"), "m"), **dict.fromkeys(("cm", "centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("km", "kilometer", "kilometre"), "km"), **dict.fromkeys(("in", "inch", "inches"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"), **dict.fromkeys(("mi", "mile"), "mi"),
    **dict.fromkeys(("g", "gram"), "g"), **dict.fromkeys(("kg", "kilogram"), "kg"),
    **dict.fromkeys(("l", "liter", "litre"), "l"), **dict.fromkeys(("ml", "milliliter", "millilitre"), "ml"),
    **dict.fromkeys(("s", "sec", "second"), "s"), **dict.fromkeys(("min", "minute"), "min"),
    **dict.fromkeys(("h", "hr", "hour"), "h"), **dict.fromkeys(("lb", "pound"), "lb"),
    **dict.fromkeys(("deg", "degree"), "degree"), **dict.fromkeys(("usd", "dollar"), "dollar"),
    **dict.fromkeys(("percent", "percentage", "pct"), "%"),
}  # fmt: skip
_SHORT = frozenset(
    ["m", "cm", "mm", "km", "in", "ft", "mi", "g", "kg", "l", "ml", "s", "h", "hr", "lb", "mph", "kmh", "km/h", "m/s"]
)
_MEANINGLESS = frozenset(
    ("", "nan", "null", "n/a", "#n/a", "na", "todo", "tbd", "?", "-", "--", "...", "[]", "{}", "answer", "unknown")
) | {"nil", "(none)", "no answer", "proof", "see solution", "see above", "not available", "not applicable"}


@dataclass(frozen=True)
class Quantity:
    """A number with what stands behind it."""

    number: Fraction
    unit: str
    """Empty, "%", one of the units above, or any other word, singular and in lower case."""


def last_box(text: str) -> str | None:
    """The content of the last complete \\boxed{...} or \\fbox{...} with balanced braces; None if there is none."""
    if "box" not in text:  # avoids scanning megabytes of braces one by one
        return None
    opened: list[int | None] = []
    found: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, brace.start()
    return text[found[0] : found[1]].strip() if found else None


def good_answers(label: str) -> list[str]:
    """The good answers in a label: the texts of a JSON list, what follows GSM8K's `####`, or the label itself."""
    if label.startswith("["):
        try:
            listed = json.loads(label)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed):
            return listed
    return [label.rpartition("####")[2]]


def meaningless(label: str) -> bool:
    """Whether a label is a placeholder, or data other than an answer. Python's None and NaN are; the word `none` is an
    answer."""
    bare = label.strip().strip("$").strip()
    if bare.startswith("{") and '"' in bare:
        try:
            return isinstance(json.loads(bare), dict)
        except (ValueError, RecursionError):
            return False
    inner = last_box(bare)
    bare = _TEXT.sub(r"\1", bare if inner is None else inner).strip()
    if (marked := _MARKED.fullmatch(bare)) is not None:
        bare = marked[2]
    if bare.casefold() == "none":
        return label.strip() == "None"
    if bare[:1] in ("[", "{") and not bare[1:-1].strip():
        return True
    if bare.startswith("[") and bare.endswith("]") and _NOTHING.search(bare[1:-1]):
        return True
    return (bare.casefold().rstrip(".") if set(bare) != {"."} else "...") in _MEANINGLESS


@functools.lru_cache(maxsize=8192)
def cleaned(text: str) -> str:
    """One notation for what can be written in several: characters, spaces, emphasis, fractions, brackets' sizes."""
    text = text.strip()
    if (inner := last_box(text)) is not None:
        text = inner
    if text.startswith("\\[") and text.endswith("\\]"):
        text = text[2:-2].strip()
    if (marked := _MARKED.fullmatch(text)) is not None:
        text = marked[2]
    if (tagged := _TAG.fullmatch(text)) is not None:
        text = tagged[2] or tagged[3] or ""
    text = text.translate(_TRANSLATED)
    if (price := _PRICE.fullmatch(text)) is not None:
        text = f"{price[1]}{price[3]} {_CURRENCIES.get(price[2], 'dollars')}"
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[2] or m[1]}}}", text)
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _FRACTIONS.sub(lambda m: _fraction(m[0]), text)
    text = _STRONG.sub(r"\1", text).replace("**", "^").replace("\\$", "").replace("$", "")
    for _ in range(3):  # emphasis in emphasis
        text = _EMPHASIS.sub(r"\\text{\1}", text)
    text = re.sub(r"\\([dtc])frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr|limits)(?![a-z])", "", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = _MOD.sub(lambda m: f" (mod {m[1] or m[2] or m[3]})", text)
    text = re.sub(r"(?<=\S)~(?=\S)", " ", text).replace("\\R", "\\mathbb{R}") if "\\" in text else text
    text = re.sub(r"(?:\\[,;: ])+$", "", text)
    text = re.sub(r"(\\pi.*?)\s*(?:\\text\{\s*radians?\s*\}|\sradians?)$", r"\1", text)
    text = _ANGLE.sub(_radians, text)
    text = re.sub(r"\{?\^\s*\{?\s*\\(?:circ|degree)\s*\}?\}?", " degrees", text)
    text = (
        text.replace("\\degree", " degrees")
        .replace("\\%", "%")
        .replace("\\!", "")
        .replace("\\varnothing", "\\emptyset")
    )
    text = re.sub(r"\\mathrm\{\s*([ei])\s*\}", r"\1", text).replace("\\leq", "\\le").replace("\\geq", "\\ge")
    text = re.sub(r"\\choose(?![a-z])", "\\\\choose ", text)
    text = re.sub(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"^(?:\\approx|\\sim|=|~)\s*", "", text.strip())
    if (named := _TUPLE.match(text)) is not None and (letters := re.findall("[a-z]", named[1])) == sorted(letters):
        text = text[named.end() :]
    text = re.sub(r"^[A-Za-z]\s*\\in\s*(?=[\[(]|\\\{)", "", _QUALIFIER.sub("", text))
    text = re.sub(r"\\[lc]?dots$", "...", text.rstrip())
    return re.sub(r"\s+", " ", text if _GOES_ON.search(text) else _ENDS.sub("", text)).strip()


def _fraction(character: str) -> str:
    over, _, under = unicodedata.normalize("NFKC", character).partition("\u2044")
    return f"\\frac{{{over}}}{{{under}}}"


def _radians(found: re.Match[str]) -> str:
    function, opened, degrees, closed = found.groups()
    if bool(opened) != bool(closed):
        return found[0]
    return f"{function}(\\frac{{{degrees}\\pi}}{{180}})"


def plain(text: str) -> str:
    """A cleaned text as words: without \\text, in one case unless letters may be variables."""
    bare = re.sub(r"\s+", " ", re.sub(r"\\(?=[ ,;:])", "", _TEXT.sub(r"\1", text))).strip()
    bare = bare if _GOES_ON.search(bare) else _ENDS.sub("", bare)
    return bare.casefold() if re.search(r"[A-Za-z]{3}", bare) and "\\" not in bare else bare


def quantity(text: str) -> Quantity | None:
    """A cleaned text as a number with a unit; None if it is anything else. Raises `exact_numbers.TooLarge`."""
    bare = text.replace("\\;", " ").replace("\\:", " ")
    if bare.endswith("%"):
        number = exact_numbers.value(bare[:-1].rstrip())
        return None if number is None else Quantity(number, "%")
    if (number := exact_numbers.value(bare)) is not None:
        return Quantity(number, "")
    if (primes := re.search(r"('{1,2}|\")$", bare)) is not None:
        number = exact_numbers.value(bare[: primes.start()])
        return None if number is None else Quantity(number, primes[0].replace('"', "''"))
    bare = _TEXT.sub(r" \1", bare).replace("\\,", " ").replace("\\ ", " ").strip()
    found = _QUANTITY.fullmatch(re.sub(r"\s+", " ", bare))
    if found is None or (unit := _unit(found[2], found[1], bare)) is None:
        return None
    number = exact_numbers.value(found[1].strip())
    if number is None:
        return None
    times = _MULTIPLIERS.get(unit)
    return Quantity(number, unit) if times is None else Quantity(number * times, "")


def _unit(text: str, number: str, whole: str) -> str | None:
    """The unit in a text, or None if it may be variables or a function."""
    words = re.sub(r"[{}^]", "", text).casefold().split()
    first = words[0].rstrip("23")
    short = [word for word in words if len(word.rstrip("23")) < 3 and word.rstrip("23") not in _SHORT]
    if short or any(word in _NOT_UNITS for word in words):
        return None
    if len(first) < 3 and number == whole[: len(number)] and not whole[len(number) :].startswith(" "):
        return None  # 5m may be five times m
    singular = [_UNITS.get(w) or _UNITS.get(w.removesuffix("s")) or w.removesuffix("s") for w in words]
    return " ".join(singular)


def same_unit(left: str, right: str) -> bool:
    """Whether two units may mean the same; a missing one, and the word `unit`, may mean any."""
    return left == right or any(not unit or unit.endswith("unit") for unit in (left, right))


def elements(text: str) -> list[str] | None:
    """The parts of a list without brackets, or in braces; None if the text is not a list."""
    bare = text
    if bare.startswith("\\{") and bare.endswith("\\}"):
        bare = bare[2:-2]
    bare = re.sub(r"\\text\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", ",", bare)
    parts, depth, start = [], 0, 0
    for at, character in enumerate(bare):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ",;" and not bare.startswith("{,}", at - 1) and bare[at - 1 : at] != "\\":
            parts.append(bare[start:at])
            start = at + 1
    parts.append(bare[start:])
    found = [version for part in parts for version in _signs(part.strip())]
    listed = len(found) > 1 and all(found)
    return found if listed else [bare.strip()] if bare is not text and text.startswith("\\{") and bare.strip() else None


def _signs(text: str) -> list[str]:
    if text.count("\\pm") != 1:
        return [text]
    return [re.sub(r"\\pm\s*", sign, text).removeprefix("+") for sign in "+-"]


def has_words(text: str) -> bool:
    """Whether a text has words that are no commands, such as `at least`; math-verify would read past them."""
    return re.search(r"(?<![\\a-zA-Z])[A-Za-z]{4,}", _TEXT.sub(r" \1 ", text)) is not None


def is_equation(text: str) -> bool:
    """Whether a text with `=` says more than the value of a name, such as x^2 = 4."""
    left = re.sub(r"\([^()]*\)", "", text.partition("=")[0]).strip()
    return "=" in text and re.search(r"[+*/^]|.-|\\(?:frac|sqrt|cdot|times)", left) is not None


def name(text: str) -> str:
    """The variable in front of `=`, such as x in `x = 5`; empty if there is none."""
    found = _NAMED.match(text)
    return found[0].replace(" ", "") if found else ""


def unnamed(text: str) -> str:
    """Without `x =` in front."""
    return _NAMED.sub("", text)


def words(text: str) -> str | None:
    """A cleaned text as words whose letters have an order; None if it may be a formula."""
    bare = plain(text)
    marked = _TEXT.search(text) is not None
    if not _WORDS.fullmatch(bare) or bare in ("pi", "e", "i", "infinity", "inf"):
        return None
    if not marked and (len(bare) < 2 or _VARIABLES.fullmatch(bare)):
        return None
    return re.sub(r"[^a-z ]", "", bare.casefold()).strip()


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer such as (B), B. or B."""
    found = _CHOICE.fullmatch(_TEXT.sub(r"\1", text).replace("\\ ", " ").strip())
    return None if found is None else found[1] or found[2]


def unit(word: str) -> str:
    """The unit that a word in lower case names; empty if it names none."""
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or ""


def without_text(text: str) -> str:
    """Without LaTeX's commands for words, such as \\text."""
    return re.sub(r"\s+", " ", _TEXT.sub(r" \1 ", text)).strip()
