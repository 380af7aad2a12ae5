"""A streaming encoder of icefall over whole utterances.
Knows: chunks of features and the states between them. Must not know: what an encoder computes, decoding.
"""
from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from icefall_fusion.data.features import PADDING

TAIL = 30  # feature frames of silence after an utterance, as icefall's streaming decoding adds


class ChunkedEncoder:
    """Runs a streaming encoder chunk by chunk.

    Args:
        encoder: ``encoder(features, lens, states)`` returns frames, their numbers and the next states;
            ``get_init_states(batch, device)`` returns the first ones.
        hop: feature frames of a chunk.
        length: feature frames that a chunk sees, at least ``hop``.

    Attributes:
        subsampling: feature frames of an output frame; None before the first call.
    """

    def __init__(self, encoder: Any, hop: int, length: int) -> None:
        self._encoder, self._hop, self._length = encoder, hop, length
        self.subsampling: Optional[float] = None

    def __call__(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Return encoder frames [B,T',D] and their numbers [B] for features [B,T,80] and lengths [B]."""
        seen = lens + TAIL - (self._length - self._hop)
        chunks = torch.div(seen.clamp(min=1) + self._hop - 1, self._hop, rounding_mode="floor")
        most = int(chunks.max())
        whole = (most - 1) * self._hop + self._length
        features = F.pad(features, (0, 0, 0, max(0, whole - features.shape[1])), value=PADDING)
        batch, device = len(features), features.device
        states = self._encoder.get_init_states(batch, device)
        full = torch.full((batch,), self._length, dtype=torch.int32, device=device)
        outs = []
        for chunk in range(most):
            window = features[:, chunk * self._hop : chunk * self._hop + self._length]
            out, _, states = self._encoder(window, full, states)
            outs.append(out)
        self.subsampling = self._hop / outs[0].shape[1]
        return torch.cat(outs, dim=1), chunks * outs[0].shape[1]
