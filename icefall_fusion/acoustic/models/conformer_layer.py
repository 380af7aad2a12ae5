"""One Conformer layer, for whole utterances, with a chunk mask or chunk by chunk with a cache.
Knows: frames of one rate. Must not know: features, the encoder around it, data, search, fusion.

Legend: B utterances, T frames (of the layer's own rate), D model size, H heads, E head size, P cached frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icefall_fusion.acoustic.models.attention import SelfAttention
from icefall_fusion.common.checks import check, check_at_least


@dataclass(frozen=True)
class EncoderOptions:
    """The shape of the encoder.

    Args:
        bins: mel bins of a feature frame.
        size: model size D.
        heads: attention heads; D / heads must be even.
        feedforward: inner size of the two feed-forward modules of a layer.
        layers: numbers of layers at 40 ms, then at 80 ms, then at 40 ms again.
        kernel: taps of the depthwise convolution, odd.
        dropout: probability of dropping a value of a module's output in training.
    """

    bins: int = 80
    size: int = 256
    heads: int = 4
    feedforward: int = 768
    layers: tuple[int, int, int] = (2, 4, 1)
    kernel: int = 15
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(1, self, "bins", "size", "heads", "feedforward")
        even = self.size % (2 * self.heads) == 0
        check(even, "EncoderOptions.size", f"be a multiple of {2 * self.heads}", self.size)
        object.__setattr__(self, "layers", tuple(self.layers))
        good = len(self.layers) == 3 and min(self.layers) >= 0 and sum(self.layers) > 0
        check(good, "EncoderOptions.layers", "be three counts, not all zero", self.layers)
        check(self.kernel % 2 == 1, "EncoderOptions.kernel", "be odd", self.kernel)
        check(0 <= self.dropout < 1, "EncoderOptions.dropout", "be in [0, 1)", self.dropout)


@dataclass(frozen=True)
class ChunkOptions:
    """How far an encoder frame may look when the encoder works in chunks.

    Args:
        size: 40 ms frames of a chunk; even, because some layers run at 80 ms.
        left_chunks: earlier chunks that attention sees; None is all of them.
    """

    size: int = 16
    left_chunks: Optional[int] = 8

    def __post_init__(self) -> None:
        check(self.size >= 2 and self.size % 2 == 0, "ChunkOptions.size", "be even and at least 2", self.size)
        left = self.left_chunks
        check(left is None or left >= 0, "ChunkOptions.left_chunks", "be None or at least 0", left)


@dataclass
class LayerCache:
    """State of a layer between chunks: keys (before rotation) and values [B,H,P,E], last frames [B,pad,D]."""

    keys: Tensor
    values: Tensor
    conv: Tensor


@dataclass
class Frames:
    """Mask, positions and chunk size of one call, shared by all layers of one rate."""

    valid: Tensor  # [B,T,1] in the dtype of the frames
    bias: Tensor  # [B,1,1 or T,P+T]
    rotary: tuple[Tensor, Tensor]  # of all keys, those of the cache first
    chunk: Optional[int]  # frames of this rate; None: no chunks


class ConvModule(nn.Module):
    """Gated depthwise convolution (Gulati et al. 2020, section 2.2) with layer norm and dynamic chunks.

    In chunks, a frame sees all frames on its left, and on its right only those of its chunk (Li et al. 2023,
    arXiv 2304.09325). The same symmetric kernel serves whole utterances and streams.
    """

    def __init__(self, size: int, kernel: int) -> None:
        super().__init__()
        self.pad = kernel // 2
        self.gate = nn.Linear(size, 2 * size)
        self.depthwise = nn.Conv1d(size, size, kernel, groups=size)
        self.norm = nn.LayerNorm(size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, frames: Frames, past: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """Return the output [B,T,D] and the convolution's last inputs, for the next chunk."""
        x = F.glu(self.gate(x), dim=-1)
        x = x * frames.valid.to(x.dtype)
        if past is None:
            past = x.new_zeros(x.shape[0], self.pad, x.shape[2])
        joined = torch.cat((past.to(x.dtype), x), dim=1)
        if frames.chunk is None or x.shape[1] <= frames.chunk:
            y = self.depthwise(F.pad(joined, (0, 0, 0, self.pad)).transpose(1, 2)).transpose(1, 2)
        else:
            y = self._by_chunks(joined, x.shape[1], frames.chunk)
        y = self.out(F.silu(self.norm(y)))
        return y, joined[:, joined.shape[1] - self.pad :]

    def _by_chunks(self, joined: Tensor, length: int, chunk: int) -> Tensor:
        batch, _, size = joined.shape
        chunks = -(-length // chunk)
        joined = F.pad(joined, (0, 0, 0, chunks * chunk - length))
        windows = joined.unfold(1, self.pad + chunk, chunk)  # [B,chunks,D,pad+chunk]
        y = self.depthwise(F.pad(windows, (0, self.pad)).flatten(0, 1))  # [B*chunks,D,chunk]
        return y.transpose(1, 2).reshape(batch, chunks * chunk, size)[:, :length]


class FeedForward(nn.Sequential):
    """LayerNorm, linear, SiLU, linear."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__(nn.LayerNorm(size), nn.Linear(size, inner), nn.SiLU(), nn.Linear(inner, size))


class ConformerLayer(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward; pre-norm residuals.

    It has layer norm only, no batch norm, so results depend neither on padding nor on the batch.
    """

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.before = FeedForward(options.size, options.feedforward)
        self.attention_norm = nn.LayerNorm(options.size)
        self.attention = SelfAttention(options.size, options.heads)
        self.conv_norm = nn.LayerNorm(options.size)
        self.conv = ConvModule(options.size, options.kernel)
        self.after = FeedForward(options.size, options.feedforward)
        self.dropout = nn.Dropout(options.dropout) if options.dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, frames: Frames, cache: Optional[LayerCache] = None) -> Tensor:
        """Return [B,T,D]; ``cache`` is read and updated."""
        x = x + 0.5 * self.dropout(self.before(x))
        past = None if cache is None else (cache.keys, cache.values)
        y, seen = self.attention(self.attention_norm(x), frames.bias, frames.rotary, past)
        x = x + self.dropout(y)
        y, conv = self.conv(self.conv_norm(x), frames, None if cache is None else cache.conv)
        if cache is not None:
            cache.keys, cache.values, cache.conv = seen[0], seen[1], conv
        x = x + self.dropout(y)
        return x + 0.5 * self.dropout(self.after(x))
