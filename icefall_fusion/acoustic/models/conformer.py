"""Conformer encoder that runs whole, whole with a chunk mask, or chunk by chunk with caches.
Knows: features and frames. Must not know: data, search, fusion, tokens.

Legend: B utterances, T frames (of the layer's own rate), D model size, H heads, E head size.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icefall_fusion.acoustic.models.attention import masked_bias, rotary_table
from icefall_fusion.acoustic.models.chunk_state import StreamingState
from icefall_fusion.acoustic.models.conformer_layer import (
    ChunkOptions,
    ConformerLayer,
    EncoderOptions,
    Frames,
    LayerCache,
)
from icefall_fusion.acoustic.models.subsampling import FACTOR, HISTORY, Subsampling
from icefall_fusion.common.checks import check


class ConformerEncoder(nn.Module):
    """Conformer (Gulati et al. 2020) whose middle layers run at half the frame rate.

    The change that the middle stack makes is added to the 40 ms frames (temporal U-Net, Kim et al. 2022,
    Squeezeformer, section 3.1.1). Its layers cost half as much, and a quarter in attention. Features are
    normalized by the global mean and deviation of the training data, which are stored with the weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("mean", torch.zeros(options.bins))
        self.register_buffer("deviation", torch.ones(options.bins))
        self.subsampling = Subsampling(options.bins, options.size)
        self.stacks = nn.ModuleList(
            nn.ModuleList(ConformerLayer(options) for _ in range(count)) for count in options.layers
        )
        self.norm = nn.LayerNorm(options.size)

    @staticmethod
    def out_lens(lens: Tensor) -> Tensor:
        """Return the numbers of 40 ms frames for numbers of 10 ms frames: ceil(lens / 4)."""
        return Subsampling.out_lens(lens)

    def forward(
        self, features: Tensor, lens: Tensor, chunk: Optional[ChunkOptions] = None
    ) -> tuple[Tensor, Tensor]:
        """Encode whole utterances, with a chunk mask if there is ``chunk``.

        Args:
            features: [B,T,bins] log-mel features, padded at the end with anything.
            lens: [B] real frames of each, 0..T.

        Returns:
            frames [B,T',D] (zero beyond the end) with T' = ceil(T/4), and their numbers [B].
        """
        out, out_lens, _ = self.forward_with_middle(features, lens, chunk)
        return out, out_lens

    def forward_with_middle(
        self, features: Tensor, lens: Tensor, chunk: Optional[ChunkOptions] = None,
        frames: Optional[Sequence[int]] = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``; also return the 80 ms frames half-way up the middle stack, for a further loss.

        With ``frames``, the numbers of ``lens`` on the host, a GPU is not waited for.
        """
        self._check(features, lens, frames)
        x = self._normalize(features, lens)
        if x.shape[1] == 0:
            nothing = x.new_zeros(x.shape[0], 0, self.options.size)
            return nothing, self.out_lens(lens), nothing
        x = self.subsampling(F.pad(x, (0, 0, HISTORY, -x.shape[1] % FACTOR)))
        lens = self.out_lens(lens)
        full = self._whole_frames(x, lens, None if chunk is None else chunk.size, chunk)
        half_lens = torch.div(lens + 1, 2, rounding_mode="floor")
        half_length = (x.shape[1] + 1) // 2
        half_size = None if chunk is None else chunk.size // 2
        half = self._whole_frames(x.new_empty(x.shape[0], half_length, 0), half_lens, half_size, chunk)
        x, middle = self._run(x, full, half, None)
        return x, lens, middle

    def start(self, batch: int, chunk: ChunkOptions) -> StreamingState:
        """Return the state before the first chunk of ``batch`` parallel streams."""
        heads, size = self.options.heads, self.options.size
        zeros, layers = self.mean.new_zeros, []
        for _ in range(sum(self.options.layers)):
            nothing = zeros(batch, heads, 0, size // heads)
            layers.append(LayerCache(nothing, nothing, zeros(batch, self.options.kernel // 2, size)))
        first, second, third = self.options.layers
        valid = [zeros(batch, 0, dtype=torch.bool) for _ in range(2)]
        history = zeros(batch, HISTORY, self.options.bins)
        return StreamingState(chunk, history, valid, layers, [0] * first + [1] * second + [0] * third)

    def forward_chunk(self, features: Tensor, lens: Tensor, state: StreamingState) -> tuple[Tensor, Tensor]:
        """Encode the next chunk; equal to ``forward`` with ``state.chunk``, frame for frame.

        Args:
            features: [B,n,bins] with n <= 4 * chunk size; fewer only in the last chunk of all streams.
            lens: [B] real frames; less than 4 * chunk size means that the stream has ended.

        Returns:
            frames [B,size,D] (zero beyond the end) and their numbers [B]. The state is updated.
        """
        self._check(features, lens)
        size = state.chunk.size
        most = FACTOR * size
        check(features.shape[1] <= most, "features", f"hold at most {most} frames a chunk", features.shape[1])
        x = self._normalize(features, lens)
        x = torch.cat((state.features, F.pad(x, (0, 0, 0, FACTOR * size - x.shape[1]))), dim=1)
        state.features = x[:, -HISTORY:]
        x = self.subsampling(x)
        lens = self.out_lens(lens)
        full = self._chunk_frames(x, lens, size, state, 0)
        half = self._chunk_frames(x, torch.div(lens + 1, 2, rounding_mode="floor"), size // 2, state, 1)
        x, _ = self._run(x, full, half, state.layers)
        state.forget()
        return x, lens

    def _run(
        self, x: Tensor, full: Frames, half: Frames, layer_caches: Optional[list[LayerCache]]
    ) -> tuple[Tensor, Tensor]:
        """The three stacks and the last norm; caches are in the order of the layers."""
        caches: list[Optional[LayerCache]] = [None] * sum(self.options.layers)
        caches[:] = layer_caches or caches
        first, second = self.options.layers[0], sum(self.options.layers[:2])
        for layer, cache in zip(self.stacks[0], caches[:first]):
            x = layer(x, full, cache)
        x = x * full.valid
        pairs = F.pad(x, (0, 0, 0, x.shape[1] % 2))
        down = pairs.reshape(x.shape[0], -1, 2, x.shape[2]).mean(dim=2)
        y = middle = down
        for index, (layer, cache) in enumerate(zip(self.stacks[1], caches[first:second])):
            y = layer(y, half, cache)
            if index + 1 == (len(self.stacks[1]) + 1) // 2:
                middle = y
        x = x + (y - down).repeat_interleave(2, dim=1)[:, : x.shape[1]]
        for layer, cache in zip(self.stacks[2], caches[second:]):
            x = layer(x, full, cache)
        return self.norm(x) * full.valid, middle

    def _normalize(self, features: Tensor, lens: Tensor) -> Tensor:
        real = torch.arange(features.shape[1], device=features.device) < lens[:, None]
        x = (features - self.mean) / self.deviation
        return torch.where(real[:, :, None], x, x.new_zeros(()))  # not a product: padding may be NaN

    def _whole_frames(
        self, x: Tensor, lens: Tensor, size: Optional[int], chunk: Optional[ChunkOptions]
    ) -> Frames:
        length = x.shape[1]
        index = torch.arange(length, device=x.device)
        valid = index < lens[:, None]  # [B,T]
        allowed = valid[:, None, None, :]
        if chunk is not None:
            own = torch.div(index, size, rounding_mode="floor")
            back = own[:, None] - own[None, :]
            sees = (back >= 0) if chunk.left_chunks is None else (back >= 0) & (back <= chunk.left_chunks)
            allowed = allowed & sees
        rotary = rotary_table(0, length, self.options.size // self.options.heads, x)
        return Frames(valid[:, :, None].to(x.dtype), masked_bias(allowed, x.dtype), rotary, size)

    def _chunk_frames(self, x: Tensor, lens: Tensor, size: int, state: StreamingState, rate: int) -> Frames:
        valid = torch.arange(size, device=x.device) < lens[:, None]
        state.valid[rate] = torch.cat((state.valid[rate], valid), dim=1)
        length = state.valid[rate].shape[1]
        rotary = rotary_table(0, length, self.options.size // self.options.heads, x)
        bias = masked_bias(state.valid[rate][:, None, None, :], x.dtype)
        return Frames(valid[:, :, None].to(x.dtype), bias, rotary, size)

    def _check(self, features: Tensor, lens: Tensor, frames: Optional[Sequence[int]] = None) -> None:
        good = features.dim() == 3 and features.shape[2] == self.options.bins
        check(good, "features", f"be [B,T,{self.options.bins}]", tuple(features.shape))
        check(lens.shape == features.shape[:1], "lens", f"be [{features.shape[0]}]", tuple(lens.shape))
        frames = lens.tolist() if frames is None else frames
        in_range = all(0 <= count <= features.shape[1] for count in frames)
        check(in_range, "lens", f"be in 0..{features.shape[1]}", frames)
