"""From 10 ms feature frames to 40 ms encoder frames, without looking ahead of the encoder frame.
Knows: features. Must not know: data, search, fusion, the encoder above it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTOR = 4
HISTORY = 3  # earlier feature frames that the first output frame of a chunk sees


class Subsampling(nn.Module):
    """Two convolutions over time, kernel 3, stride 2, all mel bins at once (as in Whisper's stem).

    It multiplies windows by a matrix. On a CPU this costs less than half a Conformer layer; a 2-D convolution
    costs more than six (measured). Output frame t sees input frames 4t-3 .. 4t+3, so a chunk of n output
    frames needs its own 4n input frames and HISTORY older ones.

    Args:
        bins: mel bins of a feature frame.
        size: D of an output frame.
    """

    def __init__(self, bins: int, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * bins, size)
        self.second = nn.Linear(3 * size, size)

    @staticmethod
    def out_lens(lens: Tensor) -> Tensor:
        """Return the numbers of output frames, ceil(lens / 4)."""
        return torch.div(lens + FACTOR - 1, FACTOR, rounding_mode="floor")

    def forward(self, features: Tensor) -> Tensor:
        """Return [B,n,D] for features [B,HISTORY+4n,bins] (history first, zeros where there is none)."""
        x = F.silu(self.first(_windows(features)))
        return self.second(_windows(x))


def _windows(x: Tensor) -> Tensor:
    """Return windows of 3 frames at a stride of 2: [B,T,F] -> [B,(T-1)/2,3F]."""
    even = x[:, 0::2]
    return torch.cat((even[:, :-1], x[:, 1::2][:, : even.shape[1] - 1], even[:, 1:]), dim=-1)
