"""Counters that batches and fusions report, and how they add up.
Knows: names and numbers. Must not know: who counts.
"""
from __future__ import annotations

from typing import Mapping, MutableMapping


def add_counters(total: MutableMapping[str, float], more: Mapping[str, float]) -> None:
    """Add counters of one batch to a sum; of peaks the largest is kept, rates are made new."""
    for name, value in more.items():
        before = total.get(name, 0)
        total[name] = max(before, value) if "peak" in name else before + value
    if total.get("retokenize_words"):
        total["retokenize_hit_rate"] = total["retokenize_hits"] / total["retokenize_words"]
