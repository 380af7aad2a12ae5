"""Language models that take part in the search: shallow and delayed fusion, and when delayed fusion scores.
Knows: its own files' names. Must not know: k2, acoustic models.

A name is imported from its file when it is first asked for: a search with `DelayedFusion` reads no other
fusion's file.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icefall_fusion.fusion.ctc_head import CtcHeadFusion
    from icefall_fusion.fusion.delayed import DelayedFusion
    from icefall_fusion.fusion.hotwords import HotWordFusion
    from icefall_fusion.fusion.internal_lm import InternalLmFusion
    from icefall_fusion.fusion.lodr import LodrFusion
    from icefall_fusion.fusion.ngram import LookAhead, NgramFusion
    from icefall_fusion.fusion.shallow import ShallowFusion
    from icefall_fusion.fusion.triggers import AtEnd, EveryFrame, FixedInterval, ShortestHypothesis
    from icefall_fusion.fusion.word_ngram import WordNgramFusion

_FILES = {
    "AtEnd": "triggers", "CtcHeadFusion": "ctc_head", "DelayedFusion": "delayed", "EveryFrame": "triggers",
    "FixedInterval": "triggers", "HotWordFusion": "hotwords", "InternalLmFusion": "internal_lm",
    "LodrFusion": "lodr", "LookAhead": "ngram", "NgramFusion": "ngram",
    "ShallowFusion": "shallow",
    "ShortestHypothesis": "triggers", "WordNgramFusion": "word_ngram",
}
__all__ = [
    "AtEnd",
    "CtcHeadFusion",
    "DelayedFusion",
    "EveryFrame",
    "FixedInterval",
    "HotWordFusion",
    "InternalLmFusion",
    "LodrFusion",
    "LookAhead",
    "NgramFusion",
    "ShallowFusion",
    "ShortestHypothesis",
    "WordNgramFusion",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
