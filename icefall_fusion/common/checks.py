"""Checks of options and arguments: one message form for all of them.
Knows: names, rules, values. Must not know: torch, files, models.
"""
from __future__ import annotations

import difflib
import math
from numbers import Integral, Real
from typing import Any, Iterable


def check(condition: bool, name: str, rule: str, value: Any) -> None:
    """Raise ValueError ``name must rule, but is value`` unless the condition holds.

    Args:
        condition: must be true.
        name: the argument as the caller knows it, e.g. ``PrefixSearchOptions.beam``.
        rule: completes "must ...", e.g. ``be at least 1``.
        value: of the argument.
    """
    if not condition:
        raise ValueError(f"{name} must {rule}, but is {value!r}")


def check_choice(value: Any, choices: Iterable[Any], name: str) -> None:
    """Raise ValueError, naming the nearest choice, unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if any(isinstance(value, type(choice)) and value == choice for choice in choices):
        return
    raise ValueError(f"{name} must be one of {choices}, but is {value!r}{nearest(str(value), choices)}")


def check_at_least(least: float, options: Any, *names: str) -> None:
    """Raise ValueError unless each named field of an options object is at least ``least``."""
    for name in names:
        value = getattr(options, name)
        check(value >= least, f"{type(options).__name__}.{name}", f"be at least {least}", value)


def is_count(value: object, least: int = 1) -> bool:
    """Return whether a value is an integer of 64 bits, at least ``least``; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value < 2**63


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def check_text(value: Any, name: str) -> None:
    """Raise ValueError unless ``value`` is a string of whole characters (no lone surrogates)."""
    try:
        good = isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:  # a lone surrogate
        good = False
    check(good, name, "be text that UTF-8 can write", value)


def nearest(word: str, choices: Iterable[Any]) -> str:
    """Return "; did you mean 'x'?" for the choice most like ``word``, or an empty string."""
    close = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
