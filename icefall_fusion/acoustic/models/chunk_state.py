"""What the encoder remembers of streams between two chunks; states of several streams as one batch.
Knows: caches of layers. Must not know: what a layer computes, features, streams' audio.

Keys are cached before their rotation, and positions are counted within what a chunk sees. So streams that
are at different places share a batch, and no position grows with a stream.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from icefall_fusion.acoustic.models.conformer_layer import ChunkOptions, LayerCache
from icefall_fusion.common.checks import check


@dataclass
class StreamingState:
    """The state of the encoder between two chunks; made by ``ConformerEncoder.start``."""

    chunk: ChunkOptions
    features: Tensor  # [B,HISTORY,bins], normalized
    valid: list[Tensor]  # per rate (40 ms, 80 ms): which cached keys are real [B,P]
    layers: list[LayerCache]
    rates: list[int]  # of the layers: 0 or 1

    def forget(self) -> None:
        """Drop keys that no later chunk sees."""
        if self.chunk.left_chunks is None:
            return
        keep = [self.chunk.left_chunks * self.chunk.size // (rate + 1) for rate in range(2)]
        self.valid = [valid[:, max(valid.shape[1] - most, 0) :] for most, valid in zip(keep, self.valid)]
        for rate, cache in zip(self.rates, self.layers):
            drop = max(cache.keys.shape[2] - keep[rate], 0)
            cache.keys, cache.values = cache.keys[:, :, drop:], cache.values[:, :, drop:]

    def rows(self) -> list[StreamingState]:
        """Return the state of each stream; they share no memory."""
        if len(self.features) == 1:
            return [self]
        return [self._row(slice(row, row + 1)) for row in range(len(self.features))]

    def _row(self, one: slice) -> StreamingState:
        valid = [valid[one].clone() for valid in self.valid]
        layers = [LayerCache(c.keys[one].clone(), c.values[one].clone(), c.conv[one].clone())
                  for c in self.layers]
        return StreamingState(self.chunk, self.features[one].clone(), valid, layers, self.rates)


def join_states(states: Sequence[StreamingState]) -> StreamingState:
    """Return streams, whatever they have seen, as one batch; shorter caches are filled up on the left.

    Raises:
        ValueError: there is none, or their chunks differ.
    """
    check(len(states) > 0, "states", "hold at least one stream", 0)
    first = states[0]
    chunks = {state.chunk for state in states}
    check(len(chunks) == 1, "states", "be of equal chunks", chunks)
    if len(states) == 1:
        return first
    unseen = [[_leading(valid) for valid in state.valid] for state in states]
    lengths = [[v.shape[1] - n for v, n in zip(s.valid, cut)] for s, cut in zip(states, unseen)]
    longest = [max(one[rate] for one in lengths) for rate in range(2)]

    def align(values: Sequence[Tensor], rate: int) -> Tensor:
        """Join [b,...,P,E] of all states along b."""
        parts = [x[..., x.shape[-2] - n[rate] :, :] for x, n in zip(values, lengths)]
        return torch.cat([F.pad(x, (0, 0, longest[rate] - x.shape[-2], 0)) for x in parts])

    valid = [align([s.valid[rate].unsqueeze(-1) for s in states], rate).squeeze(-1) for rate in range(2)]
    layers = []
    for index, rate in enumerate(first.rates):
        caches = [state.layers[index] for state in states]
        keys, values = (align([getattr(c, name) for c in caches], rate) for name in ("keys", "values"))
        layers.append(LayerCache(keys, values, torch.cat([c.conv for c in caches])))
    return StreamingState(first.chunk, torch.cat([s.features for s in states]), valid, layers, first.rates)


def _leading(valid: Tensor) -> int:
    """Return how many columns of [B,P] bool come before the first True."""
    seen = valid.any(0).nonzero()
    return int(seen[0]) if len(seen) else valid.shape[1]
