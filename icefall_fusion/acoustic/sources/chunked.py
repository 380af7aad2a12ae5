"""A streaming encoder of icefall over whole utterances.
Knows: chunks of features and the states between them. Must not know: what an encoder computes, decoding.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.data.features import PADDING

TAIL = 30  # feature frames of silence after an utterance, as icefall's streaming decoding adds


class ChunkedEncoder:
    """Runs ``encoder(features, lens, states)`` of icefall's ``export.py --causal 1`` chunk by chunk.

    Args:
        encoder: with ``get_init_states``, ``chunk_size`` (frames of 20 ms) and ``pad_length`` (frames of
            10 ms that a chunk sees beyond its own).
        name: of the model, for messages.
    """

    def __init__(self, encoder: Any, name: str) -> None:
        self._encoder = encoder
        with loading(name, "a streaming encoder of icefall (get_init_states, chunk_size, pad_length)"):
            self._hop = 2 * int(encoder.chunk_size)
            self._length = self._hop + int(encoder.pad_length)

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
        return torch.cat(outs, dim=1), chunks * outs[0].shape[1]
