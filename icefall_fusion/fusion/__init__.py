"""Language models that take part in the search: shallow and delayed fusion, and when delayed fusion scores.
Knows: its own files' names. Must not know: k2, acoustic models.
"""
from __future__ import annotations

from icefall_fusion.fusion.delayed import DelayedFusion
from icefall_fusion.fusion.look_ahead import LookAhead
from icefall_fusion.fusion.ngram_fusion import NgramFusion
from icefall_fusion.fusion.shallow import ShallowFusion
from icefall_fusion.fusion.triggers import AtEnd, EveryFrame, FixedInterval, ShortestHypothesis

__all__ = [
    "AtEnd",
    "DelayedFusion",
    "EveryFrame",
    "FixedInterval",
    "LookAhead",
    "NgramFusion",
    "ShallowFusion",
    "ShortestHypothesis",
]
