"""The exception for optional things that a machine lacks (a compiler, Triton, a fast path).
Knows: nothing. Must not know: what is looked for.
"""
from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Unavailable(Exception):
    """Something optional is missing here; the message says why. The caller goes the plain way then.

    Args:
        reason: completes "it cannot be used: ...".
        unusual: whether it is worth a warning, for it costs time and can be mended.
    """

    def __init__(self, reason: str, unusual: bool = False) -> None:
        super().__init__(reason)
        self.unusual = unusual


def asked_once(function: Function) -> Function:
    """Let a function of hashable arguments run once for each of them; `Unavailable` is remembered too.

    The function gets ``cache_clear()``, which forgets all answers.
    """
    answers: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    @functools.wraps(function)
    def asked(*arguments: Any) -> Any:
        if arguments not in answers:
            try:
                answers[arguments] = function(*arguments), None
            except Unavailable as reason:
                answers[arguments] = None, reason
        value, reason = answers[arguments]
        if reason is not None:
            raise Unavailable(str(reason), reason.unusual) from reason
        return value

    asked.cache_clear = answers.clear  # type: ignore[attr-defined]
    return asked  # type: ignore[return-value]
