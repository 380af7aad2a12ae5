"""The log-mel features of all acoustic models, and how a batch of them is padded.
Knows: tensors. Must not know: audio, extractors, manifests, models.
"""
from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

DIM = 80  # mel bins
FRAME_SHIFT = 0.01  # seconds
HOP = 160  # samples at 16 kHz in it
PADDING = math.log(1e-10)  # log energy of digital silence, as lhotse and icefall pad; 0.0 would be loud


def pad_features(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return features [T,80] of several utterances as one float32 batch [B,T,80], and their lengths [B].

    Models that do not mask the end of an utterance (icefall's convolutions) hear silence there.
    """
    lens = torch.tensor([len(row) for row in rows], dtype=torch.long)
    if not rows:
        return torch.zeros(0, 0, DIM), lens
    return pad_sequence([row.float() for row in rows], batch_first=True, padding_value=PADDING), lens
