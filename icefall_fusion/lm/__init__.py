"""Causal language models behind a token tree: score many texts that share beginnings, once each.
Knows: Hugging Face causal LMs and token ids. Must not know: acoustic models, search, fusion.
"""
from __future__ import annotations

from icefall_fusion.lm.causal_lm import CausalLm
from icefall_fusion.lm.loading import QUANTIZATIONS
from icefall_fusion.lm.tree_scorer import TreeOptions, TreeScorer

__all__ = ["QUANTIZATIONS", "CausalLm", "TreeOptions", "TreeScorer"]
