"""Search: greedy and batched prefix beam search over CTC log-probs (see README.md).
Knows: log-probs, prefixes, fusions. Must not know: which language model takes part.
"""
from __future__ import annotations

from icefall_fusion.search.beam import Beam
from icefall_fusion.search.ctc_greedy import ctc_greedy_search
from icefall_fusion.search.ctc_prefix import ctc_prefix_search
from icefall_fusion.search.fusion import Fusion
from icefall_fusion.search.search_input import PrefixSearchOptions

__all__ = ["Beam", "Fusion", "PrefixSearchOptions", "ctc_greedy_search", "ctc_prefix_search"]
