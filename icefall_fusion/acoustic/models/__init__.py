"""Acoustic models: Conformer encoder, CTC head, attention decoder."""

from __future__ import annotations

from icefall_fusion.acoustic.models.conformer import (
    ChunkOptions,
    ConformerEncoder,
    EncoderOptions,
    StreamingState,
)
from icefall_fusion.acoustic.models.ctc import CtcHead, greedy_pieces
from icefall_fusion.acoustic.models.ctc_aed import CtcAed, ModelOptions, load, save
from icefall_fusion.acoustic.models.decoder import AttentionDecoder, DecoderOptions

__all__ = [
    "AttentionDecoder",
    "ChunkOptions",
    "ConformerEncoder",
    "CtcAed",
    "CtcHead",
    "DecoderOptions",
    "EncoderOptions",
    "ModelOptions",
    "StreamingState",
    "greedy_pieces",
    "load",
    "save",
]
