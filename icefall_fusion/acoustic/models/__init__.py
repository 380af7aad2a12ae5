"""Acoustic models: Conformer encoder, CTC head, attention decoder.

    ctc_aed.py           the whole model: loss, N-best scores
    model_folder.py      folders of weights, options and vocabulary
    conformer.py         the encoder: whole, with a chunk mask, or chunk by chunk
    chunk_state.py       what the encoder remembers of streams between two chunks
    conformer_layer.py   one layer of it
    subsampling.py       10 ms feature frames to 40 ms encoder frames
    attention.py         multi-head attention with rotary positions
    ctc.py               CTC head: frames to log-probs of pieces
    decoder.py           attention decoder
    transducer.py        transducer head: stateless predictor and joiner
    transducer_loss.py   its loss, exact or pruned, in bounded memory
"""

from __future__ import annotations

from icefall_fusion.acoustic.models.chunk_state import StreamingState, join_states
from icefall_fusion.acoustic.models.conformer import ChunkOptions, ConformerEncoder, EncoderOptions
from icefall_fusion.acoustic.models.ctc import CtcHead, greedy_pieces
from icefall_fusion.acoustic.models.ctc_aed import CtcAed, ModelOptions
from icefall_fusion.acoustic.models.decoder import AttentionDecoder, DecoderOptions
from icefall_fusion.acoustic.models.model_folder import load, save
from icefall_fusion.acoustic.models.transducer import TransducerHead, TransducerOptions

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
    "TransducerHead",
    "TransducerOptions",
    "greedy_pieces",
    "join_states",
    "load",
    "save",
]
