"""Whether an answer is right: exact rules for numbers, units, words and lists, then math-verify (formulas.py)."""

from __future__ import annotations

import functools
from fractions import Fraction

from icrl_megatron.tasks import answers, exact_numbers, formulas, notations

MAX_ANSWER_CHARS = 2000
"""Answers of real problems are shorter; a longer one is wrong."""
MAX_ELEMENTS = 50
"""Parts of a list that are compared in any order."""


@functools.lru_cache(maxsize=4096)
def correct(answer: str, label: str, tolerance: float) -> bool:
    """Whether an answer equals a label, or one of those in a list of good answers. `tolerance` is relative, and applies
    if both are plain numbers."""
    # Cached, because the episodes of a group often end in the same answer.
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    given = answers.cleaned(answer)
    return any(_equal(given, answers.cleaned(one), tolerance) for one in answers.good_answers(label))


def readable(label: str) -> bool:
    """Whether the grader can judge answers by a label: each of its good answers means something."""
    return all(_readable(one) for one in answers.good_answers(label))


def is_number(label: str) -> bool:
    """Whether a label is one number, which takes no parsing of formulas to see."""
    try:
        return not answers.meaningless(label) and answers.quantity(answers.cleaned(label)) is not None
    except exact_numbers.TooLarge:
        return True


def _readable(label: str) -> bool:
    gold = answers.cleaned(label)
    if answers.meaningless(label) or not gold:
        return False
    if is_number(label) or answers.plain(gold).replace(" ", "").isalnum():
        return True
    return any(not isinstance(part, str) for part in formulas.parsed(gold))


def _equal(given: str, gold: str, tolerance: float) -> bool:
    """Whether two cleaned texts are equal."""
    if not given or not gold:
        return False
    if given == gold or answers.plain(given) == answers.plain(gold):
        return True
    if _unlike(given, gold):
        return False
    counts = given.count("="), gold.count("=")
    if 0 in counts and (answers.is_equation(given) or answers.is_equation(gold)):
        return False
    names = answers.name(given), answers.name(gold)
    if any(names) and max(counts) == 1 and (names[0] == names[1] or 0 in counts):
        return _equal(answers.unnamed(given), answers.unnamed(gold), tolerance)
    try:
        decided = _as_text(given, gold)
        if decided is None:
            decided = _as_quantities(given, gold, tolerance)
    except exact_numbers.TooLarge:  # only the same text is surely the same number
        return given.replace(" ", "") == gold.replace(" ", "")
    if decided is None:
        decided = _as_lists(given, gold, tolerance)
    if decided is None and not any(counts) and answers.has_words(given) != answers.has_words(gold):
        return False
    return formulas.equal(given, gold) if decided is None else decided


def _unlike(given: str, gold: str) -> bool:
    """Whether two texts that differ are of kinds that math-verify takes for the same: a set and a pair or an interval,
    two units behind numbers, and a decimal of unknown digits."""
    for one, other in ((given, gold), (gold, given)):
        a_set = one.startswith("\\{") and one.endswith("\\}") and not one[2:].lstrip().startswith(("(", "["))
        if a_set and other[0] in "([" and other[-1] in ")]" and "\\cup" not in one + other:
            return True
    units = notations.glued_unit(given), notations.glued_unit(gold)
    if all(units) and units[0] != units[1] and max(map(len, units)) > 1:  # one letter may be a variable
        return True
    return any(notations.goes_on(text) and answers.quantity(text) is None for text in (given, gold))


def _as_text(given: str, gold: str) -> bool | None:
    """Words, letters of a choice, and texts in the notations of notations.py."""
    times = notations.time_of_day(given), notations.time_of_day(gold)
    if any(times):
        return times[0] == times[1]
    for read in (notations.based, notations.date, notations.figure):
        found = read(given), read(gold)
        if any(one is not None for one in found):
            return found[0] == found[1]
    measures = notations.compound(given), notations.compound(gold)
    if all(measures):
        return measures[0] == measures[1]
    letters = answers.choice(given), answers.choice(gold)
    if all(letters):
        return letters[0] == letters[1]
    left, right = answers.words(given), answers.words(gold)
    if left is not None and right is not None:
        return left == right
    return None


def _as_quantities(given: str, gold: str, tolerance: float) -> bool | None:
    """Numbers, exactly or within the tolerance. 50, 0.5 and 1/2 all equal 50 %."""
    left, right = answers.quantity(given), answers.quantity(gold)
    if left is None or right is None:
        other = given if left is None else gold
        return False if (left or right) and answers.words(other) is not None else None
    if "%" in (left.unit, right.unit) and left.unit != right.unit:
        share, other_number = (left, right) if left.unit == "%" else (right, left)
        readings = (share.number, share.number / 100)
        return not other_number.unit and any(_close(one, other_number.number, tolerance) for one in readings)
    return answers.same_unit(left.unit, right.unit) and _close(left.number, right.number, tolerance)


def _close(left: Fraction, right: Fraction, tolerance: float) -> bool:
    return abs(left - right) <= Fraction(tolerance) * max(abs(left), abs(right))


def _as_lists(given: str, gold: str, tolerance: float) -> bool | None:
    """Lists without brackets, or in braces. Numbers and formulas may come in any order, words and letters in one."""
    left, right = answers.elements(given), answers.elements(gold)
    if left is None or right is None:
        listed, single = (left, gold) if right is None else (right, given)
        inside = answers.elements(single[1:-1]) if single.startswith("(") and single.endswith(")") else None
        if listed is not None and inside is not None and len(inside) == len(listed) > 1:  # a pair has an order
            return all(_element(one, other, tolerance) for one, other in zip(inside, listed, strict=True))
        if listed is None or len(listed) < 2 or single.startswith(("(", "[")):
            return None
        return False if "=" not in single and not any(sign in single for sign in "<>{\\") else None
    if len(left) != len(right) or len(left) > MAX_ELEMENTS:
        return False
    names = [{answers.name(one) for one in side} for side in (left, right)]
    of_names = any(len(of) > 1 for of in names) and {""} in names  # values of x and y, without their names
    if of_names or (all(_ordered(one) for one in (*left, *right)) and " and " not in given + gold):
        return all(_element(one, other, tolerance) for one, other in zip(left, right, strict=True))
    rest = list(right)
    for one in left:
        found = next((k for k, other in enumerate(rest) if _element(one, other, tolerance)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _ordered(text: str) -> bool:
    return answers.words(text) is not None or answers.choice(text) is not None


def _element(given: str, gold: str, tolerance: float) -> bool:
    """Whether two parts of lists are equal; `x=3` also equals 3, but not `y=3`."""
    names = answers.name(given), answers.name(gold)
    if all(names) and names[0] != names[1]:
        return False
    return _equal(answers.unnamed(given), answers.unnamed(gold), tolerance)
