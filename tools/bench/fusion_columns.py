"""What fusion.py prints of a row.
Knows: keys of its rows. Must not know: how they were measured.
"""
from __future__ import annotations

from typing import Any, NamedTuple


class Shown(NamedTuple):
    """A column that is printed: its title, the row's key, the number's form and factor, the width."""

    title: str
    key: str
    form: str
    width: int = 9
    factor: float = 1

    def cell(self, row: dict[str, Any]) -> str:
        """Return the text of a row; empty where it lacks the figure."""
        text = format(row[self.key] * self.factor, self.form) if self.key in row else ""
        return f"{text:>{self.width}}"


SHOWN = (
    Shown("groups", "groups", "d", 7), Shown("WER %", "wer", ".2f", 8), Shown("RTF", "rtf", ".5f"),
    Shown("x faster", "times_faster", ".2f"), Shown("search s", "search_seconds", ".3f"),
    Shown("LM s", "lm_seconds", ".3f"), Shown("floor s", "floor_seconds", ".3f"),
    Shown("x floor", "times_floor", ".2f", 8), Shown("LM RTF", "llm_rtf", ".5f"),
    Shown("calls", "lm_forwards", ",", 7), Shown("tokens", "lm_tokens_forwarded", ","),
    Shown("KV MB", "kv_bytes_peak", ",.1f", 9, 1 / 2**20), Shown("of rows", "kv_of_rows", ".2f", 8),
    Shown("host", "host_share", ".2f", 6),
)
