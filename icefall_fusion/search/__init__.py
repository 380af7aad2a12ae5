"""Search: greedy and batched prefix beam search over CTC log-probs (see README.md).
Knows: log-probs, prefixes, fusions. Must not know: which language model takes part.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icefall_fusion.search.beam import Beam
from icefall_fusion.search.ctc_prefix import ctc_prefix_search
from icefall_fusion.search.fusion import Fusion
from icefall_fusion.search.search_input import PrefixSearchOptions

if TYPE_CHECKING:
    from icefall_fusion.search.ctc_greedy import ctc_greedy_search

__all__ = ["Beam", "Fusion", "PrefixSearchOptions", "ctc_greedy_search", "ctc_prefix_search"]


def __getattr__(name: str) -> Any:
    """Load the greedy search on first use: most users of this package never need it."""
    if name == "ctc_greedy_search":
        from icefall_fusion.search.ctc_greedy import ctc_greedy_search

        return ctc_greedy_search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
